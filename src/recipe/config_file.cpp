#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/yaml.h>

#include <charconv>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "base/utf8.hpp"
#include "recipe/config.hpp"

namespace bitwright {
namespace {

constexpr int kMaxDepth = 32;
constexpr size_t kMaxNodes = 100'000;  // aliases can make a short text stand for a huge document
constexpr size_t kMaxBytes = 10'000'000;

[[noreturn]] void fail(const std::string& where, const std::string& why) {
  throw Error({.code = "bad-config",
               .what = "cannot read configuration",
               .where = where,
               .why = why,
               .status = ExitStatus::usage});
}

/// YAML 1.2 core schema: null, true and false, whole numbers, decimals; everything else is text. Quoted is text.
OrderedJson scalar(const YAML::Node& node) {
  const std::string& text = node.Scalar();
  if (node.Tag() == "!") return text;
  if (text.empty() || text == "~" || text == "null" || text == "Null" || text == "NULL") return nullptr;
  if (text == "true" || text == "True" || text == "TRUE") return true;
  if (text == "false" || text == "False" || text == "FALSE") return false;
  const char* end = text.data() + text.size();
  int64_t whole = 0;
  if (const auto r = std::from_chars(text.data(), end, whole); r.ec == std::errc() && r.ptr == end) return whole;
  double number = 0;
  if (const auto r = std::from_chars(text.data(), end, number); r.ec == std::errc() && r.ptr == end) return number;
  return text;
}

OrderedJson convert(const YAML::Node& node, const std::string& where, int depth, size_t& nodes) {
  if (depth > kMaxDepth || ++nodes > kMaxNodes) fail(where, "nested too deep or too large");
  if (!node.IsDefined() || node.IsNull()) return nullptr;
  if (node.IsScalar()) return scalar(node);
  if (node.IsSequence()) {
    OrderedJson list = OrderedJson::array();
    for (const YAML::Node& item : node) list.push_back(convert(item, where, depth + 1, nodes));
    return list;
  }
  OrderedJson object = OrderedJson::object();
  for (const auto& member : node) {
    if (!member.first.IsScalar()) fail(where, "a key is no text");
    const std::string& key = member.first.Scalar();
    if (object.contains(key)) fail(where, fmt::format("key '{}' appears twice", key));
    object[key] = convert(member.second, where, depth + 1, nodes);
  }
  return object;
}

/// Takes no second document. YAML::LoadAll would collect them, and finds one after another where a "," stands outside
/// of a list.
class OneDocument : public YAML::EventHandler {
 public:
  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1)
      throw YAML::ParserException(mark, "a second document begins, or a ',' stands outside of a list; one is read");
  }
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark&, YAML::anchor_t) override {}
  void OnAlias(const YAML::Mark&, YAML::anchor_t) override {}
  void OnScalar(const YAML::Mark&, const std::string&, YAML::anchor_t, const std::string&) override {}
  void OnSequenceStart(const YAML::Mark&, const std::string&, YAML::anchor_t, YAML::EmitterStyle::value) override {}
  void OnSequenceEnd() override {}
  void OnMapStart(const YAML::Mark&, const std::string&, YAML::anchor_t, YAML::EmitterStyle::value) override {}
  void OnMapEnd() override {}

 private:
  int documents_ = 0;
};

OrderedJson parse(const std::string& text, const std::string& where) {
  if (text.size() > kMaxBytes) fail(where, fmt::format("{} bytes are too many", text.size()));
  if (!is_utf8(text)) fail(where, "it is not UTF-8");
  try {
    std::istringstream input(text);
    YAML::Parser parser(input);
    OneDocument one;
    while (parser.HandleNextDocument(one)) {
    }
    size_t nodes = 0;
    return convert(YAML::Load(text), where, 0, nodes);
  } catch (const YAML::Exception& e) {
    fail(where, fmt::format("line {}: {}", e.mark.line + 1, e.msg));
  }
}

}  // namespace

OrderedJson read_config_file(const std::filesystem::path& path) {
  OrderedJson config;
  try {
    const std::string text = read_text_file(path);
    config = path.extension() == ".json" ? parse_ordered_json(text, path.string()) : parse(text, path.string());
  } catch (const Error& error) {  // whatever is wrong, it is the configuration that was given
    ErrorReport report = error.report();
    report.status = ExitStatus::usage;
    throw Error(report);
  }
  if (config.is_null()) config = OrderedJson::object();
  if (!config.is_object()) fail(path.string(), "it is no mapping of keys to values");
  return config;
}

OrderedJson parse_config_value(std::string_view text, const std::string& where) {
  return parse(std::string(text), where);
}

}  // namespace bitwright

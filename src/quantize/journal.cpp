#include "quantize/journal.hpp"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "base/error.hpp"
#include "base/mapped_file.hpp"

namespace bitwright {
namespace {

/// Reads lines up to the first that is torn or makes no sense.
class Reader {
 public:
  explicit Reader(std::string text) : text_(std::move(text)) {}

  std::optional<OrderedJson> header() {
    std::optional<OrderedJson> line = next();
    if (line) accept();
    return line;
  }

  void errors(std::vector<SquaredError>& done) {
    for (std::optional<OrderedJson> line = next(); line; line = next()) {
      if (!line->contains("done") || !line->contains("errors") || !(*line)["errors"].is_array()) return;
      std::vector<SquaredError> read;
      for (const OrderedJson& pair : (*line)["errors"]) {
        if (!pair.is_array() || pair.size() != 2 || !pair[0].is_number() || !pair[1].is_number()) return;
        read.push_back({.difference = pair[0], .norm = pair[1]});
      }
      if ((*line)["done"] != done.size() + read.size()) return;
      done.insert(done.end(), read.begin(), read.end());
      accept();
    }
  }

  size_t valid_bytes() const { return valid_; }

 private:
  std::optional<OrderedJson> next() {
    const size_t end = text_.find('\n', valid_);
    if (end == std::string::npos) return std::nullopt;
    next_ = end + 1;
    try {
      OrderedJson line = parse_ordered_json(text_.substr(valid_, end - valid_), "journal");
      return line.is_object() ? std::optional(std::move(line)) : std::nullopt;
    } catch (const Error&) {
      return std::nullopt;
    }
  }
  void accept() { valid_ = next_; }

  std::string text_;
  size_t valid_ = 0, next_ = 0;
};

void check_same(const std::filesystem::path& path, const OrderedJson& before, const OrderedJson& now) {
  for (const auto& [key, value] : now.items()) {
    const OrderedJson old = before.value(key, OrderedJson());
    if (old == value) continue;
    std::string change = "changed";
    if (value.is_string() && old.is_string() && value.get<std::string>().size() < 24)
      change = fmt::format("was {} and is {}", printable(old.get<std::string>()), value.get<std::string>());
    throw Error({.code = "cannot-resume",
                 .what = "cannot resume",
                 .where = path.parent_path().string(),
                 .why = fmt::format("the {} {} since the run was interrupted", key, change),
                 .fix = "repeat the command as it was, or add --force without --resume to start again"});
  }
}

}  // namespace

Journal::Journal(const std::filesystem::path& path, const OrderedJson& header)
    : file_(path, OutputFile::Contents::keep) {
  Reader reader(read_text_file(path));
  const std::optional<OrderedJson> before = reader.header();
  if (before) {
    check_same(path, *before, header);
    reader.errors(done_);
  }
  file_.resize(reader.valid_bytes());  // a torn line would spoil the one appended after it
  if (!before) append(header);
}

void Journal::record(std::span<const SquaredError> errors) {
  OrderedJson list = OrderedJson::array();
  for (const SquaredError& e : errors) list.push_back({e.difference, e.norm});
  append({{"done", done_.size() + errors.size()}, {"errors", std::move(list)}});
  done_.insert(done_.end(), errors.begin(), errors.end());
}

void Journal::append(const OrderedJson& line) {
  file_.write(line.dump() + "\n");
  file_.sync_data();
}

}  // namespace bitwright

#include "base/json.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <unordered_set>
#include <vector>

#include "base/error.hpp"

namespace bitwright {
namespace {

constexpr int kMaxDepth = 128;

[[noreturn]] void fail(const std::string& where, const std::string& why) {
  throw Error({.code = "bad-json",
               .what = "cannot read JSON",
               .where = where,
               .why = why,
               .fix = "the file is damaged or not JSON, fetch or write it again"});
}

template <class T>
T parse(std::string_view text, const std::string& where) {
  std::vector<std::unordered_set<std::string>> members;
  const auto check = [&](int depth, nlohmann::json::parse_event_t event, T& value) {
    using Event = nlohmann::json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      if (depth >= kMaxDepth) fail(where, fmt::format("nested more than {} levels deep", kMaxDepth));
      members.emplace_back();
    } else if (event == Event::object_end || event == Event::array_end) {
      members.pop_back();
    } else if (event == Event::key) {
      const auto& name = value.template get_ref<const std::string&>();
      if (!members.back().insert(name).second) fail(where, fmt::format("member '{}' appears twice", printable(name)));
    }
    return true;
  };
  try {
    return T::parse(text, check);
  } catch (const nlohmann::json::parse_error& e) {
    const size_t at = std::min(e.byte, text.size());
    const auto line = 1 + std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(at), '\n');
    fail(where, fmt::format("not valid JSON at byte {} (line {})", e.byte, line));
  }
}

}  // namespace

Json parse_json(std::string_view text, const std::string& where) { return parse<Json>(text, where); }

OrderedJson parse_ordered_json(std::string_view text, const std::string& where) {
  return parse<OrderedJson>(text, where);
}

}  // namespace bitwright

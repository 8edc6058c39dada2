#include "base/json.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "base/error.hpp"

namespace bitwright {
namespace {

constexpr size_t kMaxDepth = 128;

[[noreturn]] void fail(const std::string& where, const std::string& why) {
  throw Error({.code = "bad-json",
               .what = "cannot read JSON",
               .where = where,
               .why = why,
               .fix = "the file is damaged or not JSON, fetch or write it again"});
}

/// Builds the value while nlohmann's parser reads. Its own callbacks look every finished member up again, which takes
/// quadratic time; here a member that exists already is seen when it is inserted.
template <class T>
class Builder : public nlohmann::json_sax<T> {
 public:
  using typename nlohmann::json_sax<T>::number_integer_t;
  using typename nlohmann::json_sax<T>::number_unsigned_t;
  using typename nlohmann::json_sax<T>::number_float_t;
  using typename nlohmann::json_sax<T>::string_t;
  using typename nlohmann::json_sax<T>::binary_t;

  T take() { return std::move(root_); }
  const std::string& problem() const { return problem_; }
  size_t position() const { return position_; }

  bool null() override { return add(nullptr) != nullptr; }
  bool boolean(bool value) override { return add(value) != nullptr; }
  bool number_integer(number_integer_t value) override { return add(value) != nullptr; }
  bool number_unsigned(number_unsigned_t value) override { return add(value) != nullptr; }
  bool number_float(number_float_t value, const string_t&) override { return add(value) != nullptr; }
  bool string(string_t& value) override { return add(std::move(value)) != nullptr; }
  bool binary(binary_t&) override { return false; }  // no JSON text has it
  bool start_object(size_t) override { return open(T::object()); }
  bool end_object() override { return close(); }
  bool start_array(size_t) override { return open(T::array()); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    const auto [member, is_new] = open_.back()->template get_ref<typename T::object_t&>().emplace(name, nullptr);
    if (!is_new) problem_ = fmt::format("member '{}' appears twice", printable(name));
    member_ = &member->second;
    return is_new;
  }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
    position_ = position;
    return false;
  }

 private:
  T* add(T value) {
    if (open_.empty()) return &(root_ = std::move(value));
    if (open_.back()->is_object()) return &(*member_ = std::move(value));
    open_.back()->push_back(std::move(value));
    return &open_.back()->back();
  }
  bool open(T container) {
    if (open_.size() >= kMaxDepth) {
      problem_ = fmt::format("nested more than {} levels deep", kMaxDepth);
      return false;
    }
    open_.push_back(add(std::move(container)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  T root_;
  T* member_ = nullptr;   ///< of the innermost object, waiting for its value
  std::vector<T*> open_;  ///< objects and arrays not yet closed
  std::string problem_;
  size_t position_ = 0;
};

template <class T>
T parse(std::string_view text, const std::string& where) {
  Builder<T> builder;
  // The parser takes a NUL for the end of the text, whatever follows it.
  if (const size_t at = text.find('\0'); at != std::string_view::npos)
    fail(where, fmt::format("a NUL byte at byte {}", at));
  if (T::sax_parse(text, &builder)) return builder.take();
  if (!builder.problem().empty()) fail(where, builder.problem());
  const size_t at = std::min(builder.position(), text.size());
  const auto line = 1 + std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(at), '\n');
  fail(where, fmt::format("not valid JSON at byte {} (line {})", builder.position(), line));
}

}  // namespace

Json parse_json(std::string_view text, const std::string& where) { return parse<Json>(text, where); }

OrderedJson parse_ordered_json(std::string_view text, const std::string& where) {
  return parse<OrderedJson>(text, where);
}

}  // namespace bitwright

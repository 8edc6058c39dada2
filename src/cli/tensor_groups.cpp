#include "cli/tensor_groups.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace bitwright {
namespace {

std::string text_at(const OrderedJson& row, const char* member) {
  const auto found = row.find(member);
  if (found == row.end() || found->is_null()) return {};
  return found->is_string() ? found->get<std::string>() : found->dump();
}

bool is_number(std::string_view word) {
  return !word.empty() && word.find_first_not_of("0123456789") == std::string_view::npos;
}

/// One group for each kind and way of storing it.
std::vector<TensorGroup> by_kind(const OrderedJson& tensors) {
  std::vector<TensorGroup> groups;
  std::map<std::vector<std::string>, size_t> known;
  if (!tensors.is_array()) return groups;
  for (const OrderedJson& tensor : tensors) {
    if (!tensor.is_object()) continue;
    TensorGroup group{.names = {tensor_kind(text_at(tensor, "name"))},
                      .scheme = text_at(tensor, "scheme"),
                      .algorithm = text_at(tensor, "algorithm"),
                      .reason = text_at(tensor, "reason")};
    const auto [at, is_new] =
        known.try_emplace({group.names.front(), group.scheme, group.algorithm, group.reason}, groups.size());
    if (is_new) groups.push_back(std::move(group));
    ++groups[at->second].count;
    if (const auto bytes = tensor.find("bytes"); bytes != tensor.end() && bytes->is_number())
      groups[at->second].bytes += bytes->get<double>();
  }
  return groups;
}

std::string last_word(const std::string& kind) { return kind.substr(kind.rfind('.') + 1); }

}  // namespace

std::string tensor_kind(const std::string& name) {
  std::vector<std::string> words;
  for (size_t begin = 0; begin <= name.size();) {
    const size_t dot = std::min(name.find('.', begin), name.size());
    words.push_back(name.substr(begin, dot - begin));
    begin = dot + 1;
  }
  if (words.size() > 1 && words.back() == "weight") words.pop_back();
  size_t first = words.size();
  while (first > 0 && !is_number(words[first - 1])) --first;
  if (first == words.size()) first = words.size() - 1;  // it ends with a number
  if (first == 0) {
    const bool parameter = words.size() > 1 && words.back() == "bias";
    first = words.size() - (parameter ? 2 : 1);
  } else if (first > 1 && words[first - 2] == "experts") {
    words[--first] = "experts";
  }
  return fmt::format("{}", fmt::join(words.begin() + static_cast<std::ptrdiff_t>(first), words.end(), "."));
}

std::vector<TensorGroup> group_tensors(const OrderedJson& tensors) {
  const std::vector<TensorGroup> kinds = by_kind(tensors);
  std::map<std::string, std::string> kind_of_word;  // empty: several kinds end with it
  for (const TensorGroup& kind : kinds) {
    const std::string& name = kind.names.front();
    const auto [at, is_new] = kind_of_word.try_emplace(last_word(name), name);
    if (!is_new && at->second != name) at->second.clear();
  }
  std::vector<TensorGroup> groups;
  for (const TensorGroup& kind : kinds) {
    const std::string& name = kind.names.front();
    const bool is_short = !name.starts_with("experts.") && !kind_of_word[last_word(name)].empty();
    const auto alike = std::ranges::find_if(groups, [&](const TensorGroup& g) {
      return g.count == kind.count && g.scheme == kind.scheme && g.algorithm == kind.algorithm &&
             g.reason == kind.reason;
    });
    if (alike == groups.end()) {
      groups.push_back(kind);
      if (is_short) groups.back().names = {last_word(name)};
    } else {
      alike->names.push_back(is_short ? last_word(name) : name);
      alike->bytes += kind.bytes;
    }
  }
  return groups;
}

std::map<std::string, std::string> schemes_by_kind(const OrderedJson& tensors) {
  std::map<std::string, std::string> schemes;
  for (const TensorGroup& group : by_kind(tensors)) {
    std::string& text = schemes[group.names.front()];
    text += fmt::format("{}{}{}{} x{}", text.empty() ? "" : ", ", group.scheme, group.algorithm.empty() ? "" : " by ",
                        group.algorithm, group.count);
  }
  return schemes;
}

}  // namespace bitwright

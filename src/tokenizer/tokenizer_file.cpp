#include "tokenizer/tokenizer_file.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <unordered_map>
#include <unordered_set>

#include "base/error.hpp"
#include "base/json.hpp"
#include "tokenizer/byte_level.hpp"

namespace bitwright {
namespace {

constexpr int64_t kMaxVocabulary = int64_t{1} << 22;  // 16 times the largest in use; bounds what a hostile id allocates

/// Ids by their text in the vocabulary, which is in GPT-2's alphabet.
using Vocabulary = std::unordered_map<std::string_view, int32_t>;

/// A JSON object with its place, for the error messages: "tokenizer.json: model".
struct Part {
  const Json& json;
  std::string file, name;

  [[noreturn]] void bad(const std::string& why) const {
    throw Error({.code = "bad-tokenizer",
                 .what = "cannot read tokenizer",
                 .where = file,
                 .why = name.empty() ? why : name + ": " + why,
                 .fix = "the file is damaged, fetch it again"});
  }
  [[noreturn]] void unsupported(const std::string& what) const {
    throw Error({.code = "unsupported-tokenizer",
                 .what = "cannot read tokenizer",
                 .where = file,
                 .why = fmt::format("{}{}{} is not supported", name, name.empty() ? "" : ": ", what),
                 .fix = "byte-level BPE with the split of GPT-2 is"});
  }

  /// Null where it is absent or null.
  const Json* find(const char* key) const {
    if (!json.is_object()) bad("not an object");
    const auto it = json.find(key);
    return it == json.end() || it->is_null() ? nullptr : &*it;
  }
  Part child(const char* key) const {
    const Json* value = find(key);
    if (value == nullptr) bad(fmt::format("'{}' is missing", key));
    return {*value, file, name.empty() ? key : fmt::format("{}.{}", name, key)};
  }
  bool flag(const char* key, bool otherwise) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) bad(fmt::format("'{}' is neither true nor false", key));
    return value->get<bool>();
  }
  const std::string& text(const char* key) const {
    const Json* value = find(key);
    if (value == nullptr || !value->is_string()) bad(fmt::format("'{}' is missing or not a string", key));
    return value->get_ref<const std::string&>();
  }
};

std::string shown(std::string_view token) { return "'" + printable(token, 40) + "'"; }

int32_t checked_id(const Part& part, const Json& value, std::string_view token) {
  const bool fits = value.is_number_integer() && value >= 0 && value < kMaxVocabulary;
  if (!fits) part.bad(fmt::format("the id of {} is not a number from 0 to {}", shown(token), kMaxVocabulary - 1));
  return value.get<int32_t>();
}

/// The token of a new `id`, with `bytes`.
Token& add_token(const Part& part, TokenizerFile& out, int32_t id, std::string bytes, std::string_view name) {
  const auto at = static_cast<size_t>(id);
  if (at >= out.tokens.size()) out.tokens.resize(at + 1);
  if (out.tokens[at].known) part.bad(fmt::format("id {} of {} is that of another token too", id, shown(name)));
  out.tokens[at] = {.bytes = std::move(bytes), .known = true};
  return out.tokens[at];
}

void check_byte_level(const Part& root, const char* key) {
  const Part part = root.child(key);
  const std::string& type = part.text("type");
  if (type != "ByteLevel") part.unsupported(fmt::format("type {}", shown(type)));
}

void check_pipeline(const Part& root, TokenizerFile& out) {
  if (const Json* normalizer = root.find("normalizer")) {
    const Part part = {*normalizer, root.file, "normalizer"};
    part.unsupported(fmt::format("type {}", shown(part.text("type"))));
  }
  check_byte_level(root, "pre_tokenizer");
  check_byte_level(root, "decoder");
  if (root.find("post_processor") != nullptr) check_byte_level(root, "post_processor");
  const Part pre_tokenizer = root.child("pre_tokenizer");
  if (!pre_tokenizer.flag("use_regex", true)) pre_tokenizer.unsupported("use_regex false");
  pre_tokenizer.child("add_prefix_space");
  out.adds_prefix_space = pre_tokenizer.flag("add_prefix_space", false);
}

void check_model(const Part& model) {
  const bool typed = model.find("type") != nullptr;  // older files tell the types apart by their members
  if (typed && model.text("type") != "BPE") model.unsupported(fmt::format("type {}", shown(model.text("type"))));
  if (!typed && model.find("merges") == nullptr) model.unsupported("a type other than BPE");
  if (const Json* dropout = model.find("dropout"); dropout != nullptr && *dropout != 0) model.unsupported("dropout");
  if (model.flag("byte_fallback", false)) model.unsupported("byte_fallback");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (model.find(key) != nullptr && !model.text(key).empty()) model.unsupported(key);
}

Vocabulary read_vocabulary(const Part& model, TokenizerFile& out) {
  const Part part = model.child("vocab");
  if (!part.json.is_object()) part.bad("not an object");
  const bool whole_pieces = model.flag("ignore_merges", false);
  Vocabulary ids;
  ids.reserve(part.json.size());
  for (const auto& [text, value] : part.json.items()) {
    const int32_t id = checked_id(part, value, text);
    const std::optional<std::string> bytes = bytes_of_token(text);
    add_token(part, out, id, bytes.value_or(text), text).whole_piece = whole_pieces && bytes.has_value();
    ids.emplace(text, id);
  }
  return ids;
}

/// The two texts of a merge: "a b", or ["a", "b"] where they may hold spaces.
std::pair<std::string_view, std::string_view> merge_parts(const Part& model, const Json& merge, size_t number) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string())
    return {merge[0].get_ref<const std::string&>(), merge[1].get_ref<const std::string&>()};
  const std::string_view text = merge.is_string() ? std::string_view(merge.get_ref<const std::string&>()) : "";
  const size_t space = text.find(' ');
  if (space == text.npos || text.find(' ', space + 1) != text.npos)
    model.bad(fmt::format("merge {} is neither two texts nor one with a space between them", number));
  return {text.substr(0, space), text.substr(space + 1)};
}

void read_merges(const Part& model, const Vocabulary& vocabulary, TokenizerFile& out) {
  const Part part = model.child("merges");
  if (!part.json.is_array()) part.bad("not an array");
  std::unordered_set<uint64_t> seen;
  for (size_t i = 0; i < part.json.size(); ++i) {
    const auto [left, right] = merge_parts(model, part.json[i], i);
    const auto id = [&](const std::string& text) {
      const auto it = vocabulary.find(text);
      if (it == vocabulary.end()) model.bad(fmt::format("merge {}: {} is not in the vocabulary", i, shown(text)));
      return it->second;
    };
    const Merge merge = {id(std::string(left)), id(std::string(right)), id(fmt::format("{}{}", left, right))};
    if (!seen.insert(static_cast<uint64_t>(merge.left) << 32 | static_cast<uint64_t>(merge.right)).second)
      model.bad(fmt::format("merge {} of {} and {} appears twice", i, shown(left), shown(right)));
    out.merges.push_back(merge);
  }
}

void read_added_tokens(const Part& root, const Vocabulary& vocabulary, TokenizerFile& out) {
  if (root.find("added_tokens") == nullptr) return;
  const Part part = root.child("added_tokens");
  if (!part.json.is_array()) part.bad("not an array");
  std::unordered_set<std::string_view> seen;
  for (const Json& json : part.json) {
    const Part token = {json, part.file, part.name};
    const std::string& text = token.text("content");
    if (text.empty() || !seen.insert(text).second) token.bad(fmt::format("{} is empty or appears twice", shown(text)));
    for (const char* key : {"single_word", "lstrip", "rstrip"})
      if (token.flag(key, false)) token.unsupported(fmt::format("{} of {}", key, shown(text)));
    const int32_t id = checked_id(token, token.child("id").json, text);
    const auto in_vocabulary = vocabulary.find(text);
    if (in_vocabulary == vocabulary.end()) add_token(token, out, id, text, text);
    if (in_vocabulary != vocabulary.end() && in_vocabulary->second != id)
      token.bad(fmt::format("id {} of {} is {} in the vocabulary", id, shown(text), in_vocabulary->second));
    const bool special = token.flag("special", false);
    out.tokens[static_cast<size_t>(id)].bytes = text;  // not its bytes in GPT-2's alphabet: text is matched as it is
    out.tokens[static_cast<size_t>(id)].special = special;
    out.added.push_back({id, text, special, token.flag("normalized", !special)});
  }
}

/// Sets byte_ids. That decoding is the inverse of encoding rests on what is checked here.
void check_bytes(const Part& model, const Vocabulary& vocabulary, TokenizerFile& out) {
  out.byte_ids.fill(-1);
  for (const auto& [text, id] : vocabulary) {
    const std::optional<std::string> bytes = bytes_of_token(text);
    if (!bytes || bytes->size() != 1 || out.tokens[static_cast<size_t>(id)].bytes != *bytes) continue;
    out.byte_ids.at(static_cast<unsigned char>(bytes->front())) = id;
  }
  const auto missing = std::find(out.byte_ids.begin(), out.byte_ids.end(), -1);
  if (missing != out.byte_ids.end())
    model.unsupported(fmt::format("a vocabulary without a token for byte {}", missing - out.byte_ids.begin()));
  const auto bytes = [&](int32_t id) -> const std::string& { return out.tokens[static_cast<size_t>(id)].bytes; };
  for (const Merge& merge : out.merges)
    if (bytes(merge.merged) != bytes(merge.left) + bytes(merge.right))
      model.bad(fmt::format("merge {} does not give the bytes of its parts", &merge - out.merges.data()));
}

/// The token that bos_token or eos_token names: a string, or an object with its content.
std::optional<int32_t> named_token(const Part& config, const char* key, const TokenizerFile& tokenizer,
                                   const Vocabulary& vocabulary) {
  const Json* value = config.find(key);
  if (value == nullptr) return std::nullopt;
  const std::string& text = value->is_object() ? Part{*value, config.file, key}.text("content") : config.text(key);
  for (const AddedToken& token : tokenizer.added)
    if (token.text == text) return token.id;
  const auto it = vocabulary.find(text);
  if (it == vocabulary.end()) config.bad(fmt::format("{} {} is not in tokenizer.json", key, shown(text)));
  return it->second;
}

}  // namespace

TokenizerFile read_tokenizer_file(std::string_view tokenizer, std::string_view config, const std::string& directory) {
  TokenizerFile out = {};
  const std::string file = directory + "/tokenizer.json";
  const Json json = parse_json(tokenizer, file);
  const Part root = {json, file, ""};
  check_pipeline(root, out);
  const Part model = root.child("model");
  check_model(model);
  const Vocabulary vocabulary = read_vocabulary(model, out);
  read_merges(model, vocabulary, out);
  read_added_tokens(root, vocabulary, out);
  check_bytes(model, vocabulary, out);
  if (config.empty()) return out;

  const std::string config_file = directory + "/tokenizer_config.json";
  const Json config_json = parse_json(config, config_file);
  const Part settings = {config_json, config_file, ""};
  out.bos = named_token(settings, "bos_token", out, vocabulary);
  out.eos = named_token(settings, "eos_token", out, vocabulary);
  out.adds_bos = settings.flag("add_bos_token", false);
  if (out.adds_bos && !out.bos) settings.bad("add_bos_token is true, but there is no bos_token");
  return out;
}

}  // namespace bitwright

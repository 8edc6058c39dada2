#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "base/json.hpp"
#include "base/mapped_file.hpp"
#include "checkpoint/gguf.hpp"
#include "tokenizer/byte_level.hpp"
#include "tokenizer/formats.hpp"
#include "tokenizer/gguf_vocabulary.hpp"
#include "tokenizer/json_part.hpp"
#include "tokenizer/scored_vocabulary.hpp"
#include "tokenizer/split_patterns.hpp"
#include "tokenizer/tokenizer.hpp"
#include "tokenizer/vocabulary.hpp"

namespace bitwright {
namespace {

constexpr float kUnusedScore = -10000, kAddedScore = -1000;  // as llama.cpp's converter has them

struct Token {
  std::string text;
  float score = 0;
  PieceType type = PieceType::normal;
};

/// By id; room is made as ids come.
class Tokens {
 public:
  explicit Tokens(size_t size) : tokens_(size) {}

  void set(size_t id, Token token, const std::string& file) {
    if (id >= kMaxVocabulary) bad_tokenizer(file, fmt::format("{} has the id {}", shown_token(token.text), id));
    if (id >= tokens_.size()) tokens_.resize(id + 1);
    tokens_[id] = std::move(token);
  }
  Token* find(size_t id) { return id < tokens_.size() && tokens_[id] ? &*tokens_[id] : nullptr; }

  /// What has no token is called as llama.cpp's converter calls it.
  void move_to(GgufVocabulary& out, bool scored) {
    for (size_t id = 0; id < tokens_.size(); ++id) {
      Token token =
          tokens_[id] ? std::move(*tokens_[id]) : Token{fmt::format("[PAD{}]", id), kUnusedScore, PieceType::unused};
      out.tokens.push_back(std::move(token.text));
      out.types.push_back(static_cast<int32_t>(token.type));
      if (scored) out.scores.push_back(token.score);
    }
  }

 private:
  std::vector<std::optional<Token>> tokens_;
};

void add_added_tokens(const JsonPart& root, bool scored, Tokens& tokens) {
  const std::optional<JsonPart> part = root.maybe("added_tokens");
  if (!part || !part->json.is_array()) return;
  for (const Json& json : part->json) {
    const JsonPart token = {json, part->file, part->name};
    const std::string& text = token.text("content");
    const auto id = static_cast<size_t>(token.id(token.child("id").json, text));
    const Token* const known = tokens.find(id);
    if (known != nullptr && known->type == PieceType::unknown) continue;
    const PieceType type = token.flag("special", false) ? PieceType::control : PieceType::user_defined;
    tokens.set(id, {text, scored ? kAddedScore : 0, type}, root.file);
  }
}

// ---- byte-level BPE

/// The expressions that the steps of a pre-tokenizer cut by, and whether bytes come last.
struct Steps {
  std::vector<std::string> splits;
  bool byte_level = false, add_prefix_space = false;
};

void read_step(const JsonPart& part, Steps& out) {
  const std::string& type = part.text("type");
  if (type == "Sequence") {
    const JsonPart list = part.child("pretokenizers");
    for (const Json& member : list.json) read_step({member, list.file, list.name}, out);
  } else if (type == "ByteLevel") {
    out.byte_level = true;
    out.add_prefix_space = part.flag("add_prefix_space", true);
    if (part.flag("use_regex", true)) out.splits.emplace_back(kGpt2Split);
  } else if (type == "Split") {
    const JsonPart pattern = part.child("pattern");
    const bool isolated = part.text("behavior") == "Isolated" || part.text("behavior") == "Removed";
    if (!isolated || !pattern.json.is_object() || pattern.find("Regex") == nullptr)
      part.unsupported("a split that llama.cpp has no name for");
    out.splits.push_back(pattern.text("Regex"));
  } else if (type == "Digits" && part.flag("individual_digits", false)) {
    out.splits.emplace_back(R"(\p{N})");
  } else {
    out.byte_level = false;
    return;
  }
}

void add_merges(const JsonPart& model, GgufVocabulary& out) {
  for (const Json& merge : model.child("merges").json) {
    if (merge.is_string()) {
      out.merges.push_back(merge.get<std::string>());
    } else {
      if (!merge.is_array() || merge.size() != 2 || !merge[0].is_string() || !merge[1].is_string())
        model.bad("a merge is neither two texts nor one");
      out.merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
    }
  }
}

void add_vocabulary_of(const JsonPart& model, Tokens& tokens, const std::function<Token(const std::string&)>& make) {
  const JsonPart vocabulary = model.child("vocab");
  for (const auto& [text, id] : vocabulary.json.items())
    tokens.set(static_cast<size_t>(vocabulary.id(id, text)), make(text), model.file);
}

GgufVocabulary byte_level(const JsonPart& root, const JsonPart& model, const Steps& steps, size_t size) {
  GgufVocabulary out = {.model = "gpt2", .tokens = {}};
  const auto pre = gguf_pre_tokenization(steps.splits, model.flag("ignore_merges", false));
  if (!pre) model.unsupported("a split of text that llama.cpp has no name for");
  out.pre = *pre;
  if (steps.add_prefix_space) out.add_space_prefix = true;
  Tokens tokens(size);
  add_vocabulary_of(model, tokens, [](const std::string& text) { return Token{text}; });
  add_added_tokens(root, false, tokens);
  tokens.move_to(out, false);
  add_merges(model, out);
  return out;
}

// ---- SentencePiece's BPE

/// Without byte tokens too: llama.cpp loads it, and cannot cut texts with characters it has no token for.
/// A piece's score is how early the first merge that makes it comes.
GgufVocabulary ranked(const JsonPart& root, const JsonPart& model, size_t size) {
  GgufVocabulary out = {.model = "llama", .tokens = {}};
  GgufVocabulary with_merges = {.model = "", .tokens = {}};
  add_merges(model, with_merges);
  std::unordered_map<std::string, size_t> ranks;
  for (size_t i = 0; i < with_merges.merges.size(); ++i) {
    const auto parts = split_merge(with_merges.merges[i]);
    if (!parts) model.bad(fmt::format("merge {} is not two texts with a space between them", i));
    ranks.try_emplace(std::string(parts->first) + std::string(parts->second), i);
  }
  const std::string unknown = model.text("unk_token", "");
  Tokens tokens(size);
  add_vocabulary_of(model, tokens, [&](const std::string& text) {
    Token token = {.text = text};
    const auto found = ranks.find(text);
    token.score = found == ranks.end() ? -static_cast<float>(ranks.size()) : -static_cast<float>(found->second);
    if (byte_of_token(text)) token.type = PieceType::byte;
    if (!unknown.empty() && text == unknown) token.type = PieceType::unknown;
    return token;
  });
  add_added_tokens(root, true, tokens);
  tokens.move_to(out, true);
  return out;
}

bool holds(const Json& json, std::string_view type, const char* key, const std::string& value) {
  if (json.is_array())
    return std::ranges::any_of(json, [&](const Json& each) { return holds(each, type, key, value); });
  if (!json.is_object()) return false;
  if (json.value("type", "") == type && json.value(key, Json()) == value) return true;
  return std::ranges::any_of(
      json, [&](const Json& each) { return (each.is_object() || each.is_array()) && holds(each, type, key, value); });
}

/// Does a text begin with a space of its own? Prepend, or Metaspace unless it says never.
bool adds_space(const Json& root) {
  const Json normalizer = root.value("normalizer", Json()), pre = root.value("pre_tokenizer", Json());
  if (holds(normalizer, "Prepend", "prepend", "▁")) return true;
  const bool meta = holds(pre, "Metaspace", "replacement", "▁");
  return meta && !holds(pre, "Metaspace", "prepend_scheme", "never");
}

GgufVocabulary from_tokenizer_json(const std::filesystem::path& path, size_t size) {
  const Json json = parse_json(MappedFile(path).text(), path.string());
  const JsonPart root = {json, path.string(), "tokenizer.json"};
  const JsonPart model = root.child("model");
  if (model.find("merges") == nullptr) model.unsupported("a model other than BPE as GGUF");
  Steps steps;
  if (const auto part = root.maybe("pre_tokenizer")) read_step(*part, steps);
  if (steps.byte_level) return byte_level(root, model, steps, size);
  GgufVocabulary out = ranked(root, model, size);
  out.add_space_prefix = adds_space(json);
  return out;
}

GgufVocabulary from_pieces(const ScoredVocabulary& vocabulary, const std::filesystem::path& path, size_t size) {
  GgufVocabulary out = {.model = vocabulary.unigram ? "t5" : "llama", .tokens = {}};
  Tokens tokens(size);
  for (size_t id = 0; id < vocabulary.pieces.size(); ++id) {
    const ScoredPiece& piece = vocabulary.pieces[id];
    tokens.set(id, {piece.text, piece.score, piece.type}, path.string());
  }
  if (const auto added = file_in(path.parent_path(), "added_tokens.json")) {
    const Json json = parse_json(MappedFile(*added).text(), added->string());
    const JsonPart root = {json, added->string(), "added_tokens.json"};
    for (const auto& [text, id] : json.items())
      tokens.set(static_cast<size_t>(root.id(id, text)), {text, kAddedScore, PieceType::user_defined}, added->string());
  }
  tokens.move_to(out, true);
  out.add_space_prefix = vocabulary.normalization.add_dummy_prefix;
  if (!vocabulary.unigram) return out;
  out.remove_extra_whitespaces = vocabulary.normalization.remove_extra_whitespaces;
  out.precompiled_charsmap = vocabulary.normalization.charsmap_bytes;
  return out;
}

GgufVocabulary read(const std::filesystem::path& file, size_t size) {
  if (file.extension() == ".json") return from_tokenizer_json(file, size);
  const MappedFile mapped(file);
  if (file.extension() == ".model")
    return from_pieces(sentencepiece_vocabulary(mapped.text(), file.string()), file, size);
  if (file.extension() == ".bin") return from_pieces(llama2c_vocabulary(mapped.text(), file.string()), file, size);
  unsupported_tokenizer(file.string(), "this kind of file as GGUF");
}

bool has_merges(const std::filesystem::path& path) {
  const Json json = parse_json(MappedFile(path).text(), path.string());
  const Json model = json.is_object() ? json.value("model", Json()) : Json();
  return model.is_object() && model.contains("merges");
}

}  // namespace

GgufVocabulary gguf_vocabulary_of(const std::filesystem::path& path, size_t size) {
  for (const char* name : {"tokenizer.json", "tokenizer.model", "tokenizer.bin"}) {
    const auto file = file_in(path, name);
    if (!file || (file->extension() == ".json" && file_in(path, "tokenizer.model") && !has_merges(*file))) continue;
    GgufVocabulary out = read(*file, size);
    const Tokenizer tokenizer(path);
    out.bos = tokenizer.bos_id();
    out.eos = tokenizer.eos_id();
    out.add_bos = tokenizer.adds_bos();
    for (size_t id = 0; id < out.types.size() && !out.unknown; ++id)
      if (out.types[id] == static_cast<int32_t>(PieceType::unknown)) out.unknown = static_cast<int32_t>(id);
    return out;
  }
  unsupported_tokenizer(path.string(), "a directory without tokenizer.json and tokenizer.model as GGUF");
}

void add_vocabulary(const GgufVocabulary& v, GgufMetadata& out) {
  out.add("tokenizer.ggml.model", v.model);
  if (v.tokens.empty()) return;
  out.add("tokenizer.ggml.pre", v.pre.empty() ? "default" : v.pre);
  out.add("tokenizer.ggml.tokens", std::span<const std::string>(v.tokens));
  if (!v.scores.empty()) out.add("tokenizer.ggml.scores", std::span<const float>(v.scores));
  if (!v.types.empty()) out.add("tokenizer.ggml.token_type", std::span<const int32_t>(v.types));
  if (!v.merges.empty()) out.add("tokenizer.ggml.merges", std::span<const std::string>(v.merges));
  for (const auto& [key, id] :
       {std::pair("bos_token_id", v.bos), std::pair("eos_token_id", v.eos), std::pair("eot_token_id", v.eot),
        std::pair("eom_token_id", v.eom), std::pair("unknown_token_id", v.unknown)})
    if (id && *id >= 0) out.add(fmt::format("tokenizer.ggml.{}", key), static_cast<uint32_t>(*id));
  for (const auto& [key, flag] :
       {std::pair("add_bos_token", v.add_bos), std::pair("add_space_prefix", v.add_space_prefix),
        std::pair("remove_extra_whitespaces", v.remove_extra_whitespaces)})
    if (flag) out.add(fmt::format("tokenizer.ggml.{}", key), *flag);
  if (!v.precompiled_charsmap.empty())
    out.add(GgufEntry{.key = "tokenizer.ggml.precompiled_charsmap",
                      .type = GgufValueType::u8,
                      .is_array = true,
                      .count = v.precompiled_charsmap.size(),
                      .raw = std::as_bytes(std::span(v.precompiled_charsmap))});
}

}  // namespace bitwright

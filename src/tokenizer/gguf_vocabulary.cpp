#include "tokenizer/gguf_vocabulary.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/json.hpp"
#include "base/mapped_file.hpp"
#include "checkpoint/gguf.hpp"
#include "tokenizer/byte_level.hpp"
#include "tokenizer/decoders.hpp"
#include "tokenizer/formats.hpp"
#include "tokenizer/scored_vocabulary.hpp"
#include "tokenizer/split_patterns.hpp"
#include "tokenizer/tokenizer.hpp"
#include "tokenizer/vocabulary.hpp"
#include "tokenizer/word_piece.hpp"

namespace bitwright {
namespace {

// ---- the keys

const GgufEntry* find_key(const GgufContents& contents, std::string_view name) {
  for (const GgufEntry& entry : contents.metadata)
    if (entry.key == fmt::format("tokenizer.ggml.{}", name)) return &entry;
  return nullptr;
}

/// Nothing where the key is absent.
template <class T>
std::optional<T> scalar(const GgufContents& contents, std::string_view name, const std::string& file) {
  const GgufEntry* entry = find_key(contents, name);
  if (entry == nullptr) return std::nullopt;
  const Json value = entry->is_array ? Json() : to_json(*entry);
  const bool fits = std::is_same_v<T, bool>          ? value.is_boolean()
                    : std::is_same_v<T, std::string> ? value.is_string()
                                                     : value.is_number_integer() && value < INT32_MAX && value >= -1;
  if (!fits) bad_tokenizer(file, fmt::format("tokenizer.ggml.{} is of another type", name));
  return value.get<T>();
}

std::vector<std::string> texts(const GgufContents& contents, std::string_view name, const std::string& file) {
  const GgufEntry* entry = find_key(contents, name);
  if (entry == nullptr) return {};
  if (!entry->is_array || entry->type != GgufValueType::string)
    bad_tokenizer(file, fmt::format("tokenizer.ggml.{} is not a list of texts", name));
  std::vector<std::string> out;
  const char* at = reinterpret_cast<const char*>(entry->raw.data());
  for (uint64_t i = 0; i < entry->count; ++i) {  // parse_gguf has checked the lengths
    uint64_t length = 0;
    std::memcpy(&length, at, sizeof length);
    out.emplace_back(at + sizeof length, length);
    at += sizeof length + length;
  }
  return out;
}

template <class T>
std::vector<T> numbers(const GgufContents& contents, std::string_view name, GgufValueType type,
                       const std::string& file) {
  const GgufEntry* entry = find_key(contents, name);
  if (entry == nullptr) return {};
  if (!entry->is_array || entry->type != type)
    bad_tokenizer(file, fmt::format("tokenizer.ggml.{} is not a list of the right type", name));
  std::vector<T> out(entry->raw.size() / sizeof(T));
  if (!out.empty()) std::memcpy(out.data(), entry->raw.data(), out.size() * sizeof(T));
  return out;
}

// ---- splits

/// How the BPE vocabularies of a tokenizer.ggml.pre cut text: each expression cuts what those before it left.
struct PreTokenization {
  std::vector<std::string_view> names;
  std::vector<std::string_view> splits;
  bool ignore_merges = false;
  bool adds_bos = false;
};

constexpr std::string_view kDigit = R"(\p{N})", kThreeDigits = "[0-9][0-9][0-9]";
constexpr std::string_view kDeepseekIdeographs = "[一-龥ࠀ-一가-퟿]+";
constexpr std::string_view kDeepseekLetters =
    R"(\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ)"
    R"(\x{1f5f}-\x{1f7d}ᾀ-ᾴᾶ-ᾼ\x{1fbe}ῂ-ῄῆ-ῌ\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}ῠ-\x{1fec}ῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126})"
    R"(ℨ\x{212a}-\x{212d}ℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+)";
constexpr std::string_view kPoro = R"( ?[^(\s|.,!?…。，、।۔،)]+)";

/// Names and expressions as llama.cpp's src/llama-vocab.cpp (00ad355e) has them.
const std::vector<PreTokenization>& pre_tokenizations() {
  static const std::vector<PreTokenization> kTable = {
      {.names = {"", "default"}, .splits = {R"([\p{P}\$\+<=>\^~\|]+)", kGpt2Split, R"(\p{N}+)", kThreeDigits}},
      {.names = {"gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
                 "modern-bert", "jina-v1-en", "jina-v2-code", "roberta-bpe", "mpt", "olmo", "jais", "trillion",
                 "exaone4", "granite-docling"},
       .splits = {kGpt2Split}},
      {.names = {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
                 "jina-v5-nano"},
       .splits = {kLlama3Split},
       .ignore_merges = true,
       .adds_bos = true},
      {.names = {"dbrx", "smaug-bpe", "chatglm-bpe", "glm4"}, .splits = {kLlama3Split}},
      {.names = {"qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "megrez", "hunyuan", "grok-2",
                 "solar-open"},
       .splits = {kQwen2Split}},
      {.names = {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"},
       .splits = {kDigit, kGpt2Split}},
      {.names = {"falcon"}, .splits = {R"([\p{P}\$\+<=>\^~\|`]+)", kGpt2Split, kThreeDigits}},
      {.names = {"deepseek-llm"},
       .splits = {R"([\r\n])", kDeepseekLetters, "\\s?[!-/:-~！-／：-～‘-‟　-。]+", R"(\s+$)", kDeepseekIdeographs,
                  R"(\p{N}+)"}},
      {.names = {"deepseek-coder"},
       .splits = {R"([\r\n])", R"(\s?\p{L}+)", R"(\s?\p{P}+)", kDeepseekIdeographs, kDigit}},
      {.names = {"deepseek-v3", "hunyuan-dense", "joyai-llm"},
       .splits = {R"(\p{N}{1,3})", "[一-龥぀-ゟ゠-ヿ]+",
                  R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|)"
                  R"( ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"}},
      {.names = {"poro-chat", "bloom", "gpt3-finnish"}, .splits = {kPoro}},
      {.names = {"viking"}, .splits = {kPoro, kDigit}},
      {.names = {"tekken"},
       .splits = {R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|)"
                  R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|)"
                  R"(\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)"},
       .ignore_merges = true,
       .adds_bos = true},
      {.names = {"gpt-4o", "llama4", "kanana2", "minimax-m2"}, .splits = {kO200kSplit}},
      {.names = {"chameleon"},
       .splits = {"<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", R"(([\t\n]|    |  ))", kDigit,
                  R"([\p{P}!-/:-@\[-`{-~])", kGpt2Split},
       .adds_bos = true},
      {.names = {"superbpe"}, .splits = {R"(\p{N}+)", R"((?=(\d{3})+(?!\d)))"}},
      {.names = {"bailingmoe", "bailingmoe2", "llada-moe"},
       .splits =
           {R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+)"}},
      {.names = {"seed-coder"},
       .splits =
           {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+)"}},
  };
  return kTable;
}

const PreTokenization& pre_tokenization(const std::string& name, const std::string& file) {
  for (const PreTokenization& row : pre_tokenizations())
    if (std::ranges::find(row.names, name) != row.names.end()) return row;
  unsupported_tokenizer(file, fmt::format("tokenizer.ggml.pre {}", shown_token(name)));
}

// ---- the models

PieceType type_of(const GgufVocabulary& v, size_t id) {
  const int32_t type = v.types.empty() ? 1 : v.types[id];
  return type >= 1 && type <= 6 ? static_cast<PieceType>(type) : PieceType::normal;
}

/// "llama" and "t5": SentencePiece's BPE and unigram.
TokenizerPipeline scored(const GgufVocabulary& v, const std::string& file) {
  ScoredVocabulary out;
  out.unigram = v.model == "t5";
  for (size_t id = 0; id < v.tokens.size(); ++id)
    out.pieces.push_back({v.tokens[id], v.scores.empty() ? 0.0f : v.scores[id], type_of(v, id)});
  out.unknown = v.unknown;
  out.user_defined_verbatim = true;  // llama.cpp's converter writes them with plain spaces
  out.bos = v.bos.value_or(out.unigram ? -1 : 1);
  out.eos = v.eos.value_or(out.unigram ? 1 : 2);
  out.adds_bos = v.add_bos.value_or(!out.unigram);
  out.normalization.add_dummy_prefix = v.add_space_prefix.value_or(true);
  out.normalization.remove_extra_whitespaces = v.remove_extra_whitespaces.value_or(false);
  if (!v.precompiled_charsmap.empty()) {
    out.normalization.charsmap = Charsmap::read(v.precompiled_charsmap);
    if (!out.normalization.charsmap) bad_tokenizer(file, "tokenizer.ggml.precompiled_charsmap is damaged");
  }
  return pipeline_of(std::move(out), file);
}

/// Control and user-defined tokens are found in text as they are.
void add_apart(const GgufVocabulary& v, size_t id, TokenizerPipeline& out) {
  const PieceType type = type_of(v, id);
  const bool special = type == PieceType::control || type == PieceType::unknown;
  if (!special && type != PieceType::user_defined) return;
  out.tokens[id].special = special;
  out.added.push_back({.id = static_cast<int32_t>(id), .text = v.tokens[id], .special = special});
}

TokenizerPipeline byte_level(const GgufVocabulary& v, const std::string& file) {
  const PreTokenization& pre = pre_tokenization(v.pre, file);
  TokenizerPipeline out;
  out.byte_pieces = true;
  TokenIds ids;
  ids.reserve(v.tokens.size());
  for (size_t i = 0; i < v.tokens.size(); ++i) {
    const auto id = static_cast<int32_t>(i);
    const bool plain = type_of(v, i) == PieceType::normal;
    add_token(file, out, id, plain ? bytes_of_token(v.tokens[i]).value_or(v.tokens[i]) : v.tokens[i], v.tokens[i]);
    ids.emplace(v.tokens[i], id);
    add_apart(v, i, out);
  }
  MergeList merges;
  for (const std::string& merge : v.merges) {
    const auto parts = split_merge(merge);
    if (!parts) bad_tokenizer(file, fmt::format("merge {} is not two texts with a space between them", merges.size()));
    merges.push_back(*parts);
  }
  const BpeSettings settings = {.byte_pieces = true, .ignore_merges = pre.ignore_merges};
  out.model = std::make_unique<Bpe>(bpe_rules(ids, merges, settings, file));
  for (const std::string_view split : pre.splits)
    out.pre_tokenizers.push_back(split_by_pattern(Pattern(split), SplitBehavior::isolated, false));
  out.bos = v.bos;
  out.eos = v.eos;
  out.adds_bos = v.add_bos.value_or(pre.adds_bos);
  return out;
}

/// "bert": WordPiece; U+2581 begins a word where Bert's own files mark the continuation.
TokenizerPipeline word_pieces(const GgufVocabulary& v, const std::string& file) {
  TokenizerPipeline out;
  WordPiece::Rules rules = {.first = {}, .continuing = {}, .unknown = v.unknown};
  for (size_t i = 0; i < v.tokens.size(); ++i) {
    const auto id = static_cast<int32_t>(i);
    add_token(file, out, id, v.tokens[i], v.tokens[i]);
    add_apart(v, i, out);
    if (v.tokens[i].starts_with(kMetaspace)) {
      rules.first.emplace_back(v.tokens[i].substr(kMetaspace.size()), id);
    } else {
      rules.continuing.emplace_back(v.tokens[i], id);
    }
  }
  out.normalizers.push_back(bert({}));
  out.pre_tokenizers.push_back(split_by_character(is_space, SplitBehavior::removed));
  out.pre_tokenizers.push_back(split_by_character(is_punctuation, SplitBehavior::isolated));
  out.model = std::make_unique<WordPiece>(rules);
  out.decoders = {replace_in_tokens(std::string(kMetaspace), " "), fuse(), strip_tokens(" ", 1, 0)};
  out.bos = v.cls ? v.cls : v.bos;
  out.eos = v.eos;
  out.adds_bos = v.add_bos.value_or(true);
  return out;
}

struct ModelKind {
  std::string_view name;
  TokenizerPipeline (*read)(const GgufVocabulary& vocabulary, const std::string& file);
};
constexpr std::array<ModelKind, 4> kModels = {
    {{"llama", scored}, {"t5", scored}, {"gpt2", byte_level}, {"bert", word_pieces}}};

TokenizerPipeline pipeline_of(const GgufVocabulary& v, const std::string& file) {
  if (v.tokens.empty() || v.tokens.size() > kMaxVocabulary)
    bad_tokenizer(file, fmt::format("it has {} tokens", v.tokens.size()));
  if (!v.scores.empty() && v.scores.size() != v.tokens.size())
    bad_tokenizer(file, fmt::format("it has {} tokens and {} scores", v.tokens.size(), v.scores.size()));
  if (!v.types.empty() && v.types.size() != v.tokens.size())
    bad_tokenizer(file, fmt::format("it has {} tokens and {} types", v.tokens.size(), v.types.size()));
  for (const std::optional<int32_t>& id : {v.bos, v.eos, v.unknown, v.cls})
    if (id && (*id < -1 || *id >= static_cast<int64_t>(v.tokens.size())))
      bad_tokenizer(file, fmt::format("it names token {}, but has {}", *id, v.tokens.size()));
  for (const ModelKind& kind : kModels) {
    if (kind.name != v.model) continue;
    TokenizerPipeline out = kind.read(v, file);
    out.adds_bos = out.adds_bos && out.bos;
    return out;
  }
  unsupported_tokenizer(file, fmt::format("tokenizer.ggml.model {}", shown_token(v.model)));
}

std::optional<std::filesystem::path> find(const std::filesystem::path& directory) {
  std::vector<std::filesystem::path> paths;
  std::error_code unreadable;
  for (const auto& entry : std::filesystem::directory_iterator(directory, unreadable))
    if (entry.path().extension() == ".gguf") paths.push_back(entry.path());
  return paths.empty() ? std::nullopt : std::optional(*std::min_element(paths.begin(), paths.end()));
}

TokenizerPipeline read(const std::filesystem::path& path) {
  const MappedFile file(path);
  return pipeline_of(gguf_vocabulary(parse_gguf(file.bytes(), path.string()), path.string()), path.string());
}

}  // namespace

GgufVocabulary gguf_vocabulary(const GgufContents& contents, const std::string& file) {
  const auto id = [&](std::string_view name) { return scalar<int32_t>(contents, name, file); };
  const auto flag = [&](std::string_view name) { return scalar<bool>(contents, name, file); };
  const auto model = scalar<std::string>(contents, "model", file);
  if (!model) unsupported_tokenizer(file, "a GGUF file without tokenizer.ggml.model");
  GgufVocabulary out = {.model = *model, .tokens = texts(contents, "tokens", file)};
  out.pre = scalar<std::string>(contents, "pre", file).value_or("");
  out.scores = numbers<float>(contents, "scores", GgufValueType::f32, file);
  out.types = numbers<int32_t>(contents, "token_type", GgufValueType::i32, file);
  out.merges = texts(contents, "merges", file);
  const GgufEntry* charsmap = find_key(contents, "precompiled_charsmap");
  if (charsmap != nullptr)
    out.precompiled_charsmap.assign(reinterpret_cast<const char*>(charsmap->raw.data()), charsmap->raw.size());
  out.bos = id("bos_token_id");
  out.eos = id("eos_token_id");
  out.unknown = id("unknown_token_id");
  out.cls = id("cls_token_id");
  out.add_bos = flag("add_bos_token");
  out.add_space_prefix = flag("add_space_prefix");
  out.remove_extra_whitespaces = flag("remove_extra_whitespaces");
  return out;
}

std::optional<std::string> gguf_pre_tokenization(std::span<const std::string> splits, bool ignore_merges) {
  for (const PreTokenization& row : pre_tokenizations())
    if (row.ignore_merges == ignore_merges && std::ranges::equal(row.splits, splits))
      return std::string(row.names.front());
  return std::nullopt;
}

Tokenizer Tokenizer::from_gguf(const GgufVocabulary& vocabulary, const std::string& file) {
  return Tokenizer(pipeline_of(vocabulary, file));
}

extern const TokenizerFormat gguf_tokenizer;
const TokenizerFormat gguf_tokenizer = {.name = "GGUF",
                                        .source = "ggml-org/llama.cpp 00ad355e, src/llama-vocab.cpp",
                                        .find = find,
                                        .recognises = [](std::string_view bytes) { return bytes.starts_with("GGUF"); },
                                        .read = read};

}  // namespace bitwright

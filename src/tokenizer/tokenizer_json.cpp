#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "base/json.hpp"
#include "base/mapped_file.hpp"
#include "tokenizer/bpe.hpp"
#include "tokenizer/byte_level.hpp"
#include "tokenizer/decoders.hpp"
#include "tokenizer/formats.hpp"
#include "tokenizer/json_part.hpp"
#include "tokenizer/normalizers.hpp"
#include "tokenizer/split_patterns.hpp"
#include "tokenizer/unigram.hpp"
#include "tokenizer/vocabulary.hpp"
#include "tokenizer/word_piece.hpp"

namespace bitwright {
namespace {

/// A row for each value of "type": `read` appends what the part means.
template <class Step>
struct Kind {
  std::string_view type;
  void (*read)(const JsonPart& part, std::vector<Step>& out);
};

/// Appends the steps of `part` and, where it is a Sequence, of its members, which `members` names.
template <class Step, size_t kCount>
void read_steps(const JsonPart& part, const std::array<Kind<Step>, kCount>& kinds, const char* members,
                std::vector<Step>& out) {
  const std::string& type = part.text("type");
  if (type == "Sequence") {
    const JsonPart list = part.child(members);
    if (!list.json.is_array()) list.bad("not an array");
    for (const Json& member : list.json) read_steps(JsonPart{member, list.file, list.name}, kinds, members, out);
    return;
  }
  for (const Kind<Step>& kind : kinds)
    if (kind.type == type) return kind.read(part, out);
  part.unsupported(fmt::format("type {}", shown_token(type)));
}

/// {"String": …} or {"Regex": …}.
Pattern read_pattern(const JsonPart& part) {
  const JsonPart pattern = part.child("pattern");
  if (pattern.json.is_string()) return Pattern::literal(part.text("pattern"));
  if (pattern.find("String") != nullptr) return Pattern::literal(pattern.text("String"));
  return Pattern(pattern.text("Regex"));
}

std::string decoded_base64(const JsonPart& part, const std::string& text) {
  const std::optional<std::string> bytes = from_base64(text);
  if (!bytes) part.bad("not base64");
  return *bytes;
}

// ---- normalizers

template <NormalForm kForm>
void read_form(const JsonPart&, std::vector<TextNormalizer>& out) {
  out.push_back(to_normal_form(kForm));
}

void read_replace(const JsonPart& part, std::vector<TextNormalizer>& out) {
  const bool empty = part.child("pattern").json == Json{{"String", ""}};
  if (!empty) out.push_back(replace_text(read_pattern(part), part.text("content")));
}

void read_bert_normalizer(const JsonPart& part, std::vector<TextNormalizer>& out) {
  const bool lowercase = part.flag("lowercase", true);
  out.push_back(bert({.clean_text = part.flag("clean_text", true),
                      .handle_chinese_chars = part.flag("handle_chinese_chars", true),
                      .strip_accents = part.flag("strip_accents", lowercase),
                      .lowercase = lowercase}));
}

void read_precompiled(const JsonPart& part, std::vector<TextNormalizer>& out) {
  const std::string blob = decoded_base64(part, part.text("precompiled_charsmap", ""));
  if (blob.empty()) return;
  std::optional<Charsmap> map = Charsmap::read(blob);
  if (!map) part.bad("precompiled_charsmap is damaged");
  out.push_back(precompiled(std::move(*map)));
}

constexpr std::array<Kind<TextNormalizer>, 13> kNormalizers = {{
    {"NFC", read_form<NormalForm::c>},
    {"NFD", read_form<NormalForm::d>},
    {"NFKC", read_form<NormalForm::kc>},
    {"NFKD", read_form<NormalForm::kd>},
    {"Lowercase", [](const JsonPart&, auto& out) { out.push_back(to_lower_case()); }},
    {"Strip",
     [](const JsonPart& part, auto& out) {
       out.push_back(strip_space(part.flag("strip_left", true), part.flag("strip_right", true)));
     }},
    {"StripAccents", [](const JsonPart&, auto& out) { out.push_back(strip_accents()); }},
    {"Replace", read_replace},
    {"Prepend", [](const JsonPart& part, auto& out) { out.push_back(prepend_text(part.text("prepend"))); }},
    {"BertNormalizer", read_bert_normalizer},
    {"Nmt", [](const JsonPart&, auto& out) { out.push_back(nmt()); }},
    {"Precompiled", read_precompiled},
    {"ByteLevel", [](const JsonPart&, auto& out) { out.push_back(text_to_byte_alphabet()); }},
}};

// ---- pre-tokenizers

/// One step; the last step of a byte-level BPE may be left to the model.
struct PreStep {
  PreTokenizer run;
  bool to_alphabet = false;
};

SplitBehavior behavior_of(const JsonPart& part, const std::string& otherwise = "") {
  static constexpr std::array<std::pair<std::string_view, SplitBehavior>, 5> kBehaviors = {
      {{"Removed", SplitBehavior::removed},
       {"Isolated", SplitBehavior::isolated},
       {"MergedWithPrevious", SplitBehavior::merged_with_previous},
       {"MergedWithNext", SplitBehavior::merged_with_next},
       {"Contiguous", SplitBehavior::contiguous}}};
  const std::string name = otherwise.empty() ? part.text("behavior") : part.text("behavior", otherwise);
  for (const auto& [text, behavior] : kBehaviors)
    if (text == name) return behavior;
  part.unsupported(fmt::format("behavior {}", shown_token(name)));
}

void read_byte_level(const JsonPart& part, std::vector<PreStep>& out) {
  part.child("add_prefix_space");
  if (part.flag("add_prefix_space", true)) out.push_back({prepend_piece(" ", false)});
  if (part.flag("use_regex", true))
    out.push_back({split_by_pattern(Pattern(kGpt2Split), SplitBehavior::isolated, false)});
  out.push_back({to_byte_alphabet(), true});
}

void read_split(const JsonPart& part, std::vector<PreStep>& out) {
  const bool invert = part.flag("invert", false);
  if (part.child("pattern").json == Json{{"String", ""}}) return;
  out.push_back({split_by_pattern(read_pattern(part), behavior_of(part), invert)});
}

struct MetaspaceSettings {
  std::string replacement, scheme;
};
MetaspaceSettings metaspace_settings(const JsonPart& part) {
  const bool prefix = part.flag("add_prefix_space", true);
  MetaspaceSettings settings = {part.text("replacement", std::string(kMetaspace)),
                                part.text("prepend_scheme", prefix ? "always" : "never")};
  if (settings.replacement.empty()) part.bad("'replacement' is empty");
  const bool known = settings.scheme == "always" || settings.scheme == "first" || settings.scheme == "never";
  if (!known) part.unsupported(fmt::format("prepend_scheme {}", shown_token(settings.scheme)));
  return settings;
}

void read_metaspace(const JsonPart& part, std::vector<PreStep>& out) {
  const MetaspaceSettings settings = metaspace_settings(part);
  out.push_back({replace_in_piece(" ", settings.replacement)});
  if (settings.scheme != "never") out.push_back({prepend_piece(settings.replacement, settings.scheme == "first")});
  if (part.flag("split", true))
    out.push_back({split_by_pattern(Pattern::literal(settings.replacement), SplitBehavior::merged_with_next, false)});
}

void read_delimiter(const JsonPart& part, std::vector<PreStep>& out) {
  const std::string& delimiter = part.text("delimiter");
  if (delimiter.empty()) part.bad("'delimiter' is empty");
  out.push_back({split_by_pattern(Pattern::literal(delimiter), SplitBehavior::removed, false)});
}

void read_bert_pre_tokenizer(const JsonPart&, std::vector<PreStep>& out) {
  out.push_back({split_by_character(is_space, SplitBehavior::removed)});
  out.push_back({split_by_character(is_punctuation, SplitBehavior::isolated)});
}

constexpr std::array<Kind<PreStep>, 9> kPreTokenizers = {{
    {"ByteLevel", read_byte_level},
    {"Split", read_split},
    {"Metaspace", read_metaspace},
    {"CharDelimiterSplit", read_delimiter},
    {"BertPreTokenizer", read_bert_pre_tokenizer},
    {"Whitespace",
     [](const JsonPart&, auto& out) {
       out.push_back({split_by_pattern(Pattern(kWhitespaceWords), SplitBehavior::removed, true)});
     }},
    {"WhitespaceSplit",
     [](const JsonPart&, auto& out) { out.push_back({split_by_character(is_space, SplitBehavior::removed)}); }},
    {"Digits",
     [](const JsonPart& part, auto& out) {
       const bool each = part.flag("individual_digits", false);
       out.push_back({split_by_character(is_number, each ? SplitBehavior::isolated : SplitBehavior::contiguous)});
     }},
    {"Punctuation",
     [](const JsonPart& part, auto& out) {
       out.push_back({split_by_character(is_punctuation, behavior_of(part, "Isolated"))});
     }},
}};

// ---- decoders

struct DecodeStep {
  TokenDecoder run;
  bool from_alphabet = false;
};

void read_metaspace_decoder(const JsonPart& part, std::vector<DecodeStep>& out) {
  const MetaspaceSettings settings = metaspace_settings(part);
  out.push_back({metaspace(settings.replacement, settings.scheme != "never")});
}

void read_replace_decoder(const JsonPart& part, std::vector<DecodeStep>& out) {
  const JsonPart pattern = part.child("pattern");
  const std::string& content = part.text("content");
  const bool literal = pattern.json.is_object() && pattern.find("String") != nullptr;
  out.push_back(
      {literal ? replace_in_tokens(pattern.text("String"), content) : replace_in_tokens(read_pattern(part), content)});
}

constexpr std::array<Kind<DecodeStep>, 9> kDecoders = {{
    {"ByteLevel",
     [](const JsonPart&, auto& out) {
       out.push_back({from_byte_alphabet(), true});
     }},
    {"Metaspace", read_metaspace_decoder},
    {"ByteFallback", [](const JsonPart&, auto& out) { out.push_back({byte_fallback()}); }},
    {"Fuse", [](const JsonPart&, auto& out) { out.push_back({fuse()}); }},
    {"Strip",
     [](const JsonPart& part, auto& out) {
       out.push_back({strip_tokens(part.text("content"), part.count("start", 0), part.count("stop", 0))});
     }},
    {"Replace", read_replace_decoder},
    {"WordPiece",
     [](const JsonPart& part, auto& out) {
       out.push_back({word_piece(part.text("prefix", "##"), part.flag("cleanup", true))});
     }},
    {"BPEDecoder", [](const JsonPart& part, auto& out) { out.push_back({end_of_word(part.text("suffix", "</w>"))}); }},
    {"CTC",
     [](const JsonPart& part, auto& out) {
       out.push_back(
           {ctc(part.text("pad_token", "<pad>"), part.text("word_delimiter_token", "|"), part.flag("cleanup", true))});
     }},
}};

// ---- models

/// The token that `key` names; nothing where it is absent. One that is not in the vocabulary is an error.
std::optional<int32_t> named_in(const JsonPart& model, const char* key, const TokenIds& ids) {
  if (model.find(key) == nullptr) return std::nullopt;
  const auto it = ids.find(model.text(key));
  if (it == ids.end()) model.bad(fmt::format("{} {} is not in the vocabulary", key, shown_token(model.text(key))));
  return it->second;
}

TokenIds read_vocabulary(const JsonPart& model, TokenizerPipeline& out) {
  return add_vocabulary(model.child("vocab"), out);
}

/// The two texts of a merge: "a b", or ["a", "b"] where they may hold spaces.
std::pair<std::string_view, std::string_view> merge_parts(const JsonPart& model, const Json& merge, size_t number) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string())
    return {merge[0].get_ref<const std::string&>(), merge[1].get_ref<const std::string&>()};
  const std::string_view text = merge.is_string() ? std::string_view(merge.get_ref<const std::string&>()) : "";
  const auto parts = split_merge(text);
  if (!parts) model.bad(fmt::format("merge {} is neither two texts nor one with a space between them", number));
  return *parts;
}

std::unique_ptr<PieceModel> read_bpe(const JsonPart& model, TokenizerPipeline& out) {
  if (const Json* dropout = model.find("dropout"); dropout != nullptr && *dropout != 0) model.unsupported("dropout");
  const TokenIds ids = read_vocabulary(model, out);
  MergeList merges;
  const JsonPart list = model.child("merges");
  if (!list.json.is_array()) list.bad("not an array");
  merges.reserve(list.json.size());
  for (size_t i = 0; i < list.json.size(); ++i) merges.push_back(merge_parts(model, list.json[i], i));
  BpeSettings settings = {.byte_pieces = out.byte_pieces,
                          .byte_fallback = model.flag("byte_fallback", false),
                          .ignore_merges = model.flag("ignore_merges", false),
                          .unknown = named_in(model, "unk_token", ids),
                          .fuse_unknown = model.flag("fuse_unk", false),
                          .prefix = model.text("continuing_subword_prefix", ""),
                          .suffix = model.text("end_of_word_suffix", "")};
  return std::make_unique<Bpe>(bpe_rules(ids, merges, settings, fmt::format("{}: {}", model.file, model.name)));
}

std::unique_ptr<PieceModel> read_unigram(const JsonPart& model, TokenizerPipeline& out) {
  const JsonPart vocabulary = model.child("vocab");
  if (!vocabulary.json.is_array()) vocabulary.bad("not an array");
  UnigramRules rules;
  TokenIds ids;
  for (const Json& piece : vocabulary.json) {
    const bool sound = piece.is_array() && piece.size() == 2 && piece[0].is_string() && piece[1].is_number();
    if (!sound) vocabulary.bad(fmt::format("entry {} is not a text and a number", rules.pieces.size()));
    const auto id = vocabulary.id(rules.pieces.size(), "the last");
    const auto& text = piece[0].get_ref<const std::string&>();
    const auto score = piece[1].get<double>();
    rules.worst_score = rules.pieces.empty() ? score : std::min(rules.worst_score, score);
    rules.pieces.push_back({text, score, id});
    add_token(vocabulary.file, out, id, text, text);
    ids.emplace(text, id);
  }
  if (model.find("unk_id") != nullptr) {
    const size_t unknown = model.count("unk_id", 0);
    if (unknown >= rules.pieces.size()) model.bad("'unk_id' is not in the vocabulary");
    rules.unknown = static_cast<int32_t>(unknown);
  }
  rules.bytes = model.flag("byte_fallback", false) ? byte_token_ids(ids) : no_byte_ids();
  return std::make_unique<Unigram>(std::move(rules));
}

std::unique_ptr<PieceModel> read_word_piece(const JsonPart& model, TokenizerPipeline& out) {
  const TokenIds ids = read_vocabulary(model, out);
  const std::string prefix = model.text("continuing_subword_prefix", "##");
  WordPiece::Rules rules = {.first = {},
                            .continuing = {},
                            .unknown = named_in(model, "unk_token", ids),
                            .longest = model.count("max_input_chars_per_word", 100)};
  for (const auto& [text, id] : ids) {
    rules.first.emplace_back(text, id);
    if (text.starts_with(prefix)) rules.continuing.emplace_back(text.substr(prefix.size()), id);
  }
  return std::make_unique<WordPiece>(rules);
}

std::unique_ptr<PieceModel> read_word_level(const JsonPart& model, TokenizerPipeline& out) {
  TokenIds ids = read_vocabulary(model, out);
  const std::optional<int32_t> unknown = named_in(model, "unk_token", ids);
  return std::make_unique<WordLevel>(std::move(ids), unknown);
}

struct ModelKind {
  std::string_view type;
  std::unique_ptr<PieceModel> (*read)(const JsonPart& model, TokenizerPipeline& out);
};
constexpr std::array<ModelKind, 4> kModels = {
    {{"BPE", read_bpe}, {"Unigram", read_unigram}, {"WordPiece", read_word_piece}, {"WordLevel", read_word_level}}};

/// Older files tell the types apart by their members.
std::string model_type(const JsonPart& model) {
  if (model.find("type") != nullptr) return model.text("type");
  if (model.find("merges") != nullptr) return "BPE";
  if (model.child("vocab").json.is_array()) return "Unigram";
  return model.find("continuing_subword_prefix") != nullptr ? "WordPiece" : "WordLevel";
}

// ---- the file

void read_pre_tokenizers(const JsonPart& root, const std::string& model, TokenizerPipeline& out) {
  std::vector<PreStep> steps;
  if (const auto part = root.maybe("pre_tokenizer")) read_steps(*part, kPreTokenizers, "pretokenizers", steps);
  // Where bytes come last, the model takes them as they are: the same ids, without the detour by the alphabet.
  if (model == "BPE" && !steps.empty() && steps.back().to_alphabet) {
    out.byte_pieces = true;
    steps.pop_back();
  }
  for (PreStep& step : steps) out.pre_tokenizers.push_back(std::move(step.run));
}

void read_decoders(const JsonPart& root, TokenizerPipeline& out) {
  std::vector<DecodeStep> steps;
  if (const auto part = root.maybe("decoder")) {
    read_steps(*part, kDecoders, "decoders", steps);
  } else {
    steps.push_back({join_with_spaces()});
  }
  for (DecodeStep& step : steps) {
    if (step.from_alphabet && out.decoders.empty()) {  // done once and for all
      for (Token& token : out.tokens)
        if (auto bytes = bytes_of_token(token.text)) token.text = std::move(*bytes);
      continue;
    }
    out.decoders.push_back(std::move(step.run));
  }
}

std::string normalized(std::string text, const std::vector<TextNormalizer>& normalizers) {
  for (const TextNormalizer& step : normalizers) text = step(text);
  return text;
}

void read_added_tokens(const JsonPart& root, const TokenIds& vocabulary, TokenizerPipeline& out) {
  const std::optional<JsonPart> part = root.maybe("added_tokens");
  if (!part) return;
  if (!part->json.is_array()) part->bad("not an array");
  std::unordered_set<std::string_view> seen;
  for (const Json& json : part->json) {
    const JsonPart token = {json, part->file, part->name};
    const std::string& text = token.text("content");
    if (text.empty() || !seen.insert(text).second)
      token.bad(fmt::format("{} is empty or appears twice", shown_token(text)));
    const int32_t id = token.id(token.child("id").json, text);
    const auto known = vocabulary.find(text);
    if (known == vocabulary.end()) add_token(token.file, out, id, text, text);
    if (known != vocabulary.end() && known->second != id)
      token.bad(fmt::format("id {} of {} is {} in the vocabulary", id, shown_token(text), known->second));
    const bool special = token.flag("special", false);
    const bool in_normalized = token.flag("normalized", !special);
    out.tokens[static_cast<size_t>(id)].special = special;
    out.added.push_back({.id = id,
                         .text = in_normalized ? normalized(text, out.normalizers) : text,
                         .special = special,
                         .normalized = in_normalized,
                         .single_word = token.flag("single_word", false),
                         .lstrip = token.flag("lstrip", false),
                         .rstrip = token.flag("rstrip", false)});
  }
}

/// The token that the post-processor puts before a text.
void read_post_processor(const JsonPart& part, TokenizerPipeline& out) {
  const auto begins_with = [&](const Json& id) {
    out.bos = part.id(id, "the first");
    if (static_cast<size_t>(*out.bos) >= out.tokens.size()) part.bad(fmt::format("{} is no token", *out.bos));
    out.adds_bos = true;
  };
  const std::string& type = part.text("type");
  if (type == "Sequence") {
    const JsonPart list = part.child("processors");
    if (!list.json.is_array()) list.bad("not an array");
    for (const Json& member : list.json) read_post_processor({member, list.file, list.name}, out);
  } else if (type == "TemplateProcessing") {
    const JsonPart single = part.child("single");
    if (!single.json.is_array()) single.bad("not an array");
    if (single.json.empty()) return;
    const auto first = JsonPart{single.json[0], single.file, single.name}.maybe("SpecialToken");
    if (!first) return;
    const JsonPart token = part.child("special_tokens").child(first->text("id").c_str());
    const JsonPart ids = token.child("ids");
    if (!ids.json.is_array() || ids.json.empty()) ids.bad("not an array with ids");
    begins_with(ids.json[0]);
  } else if (type == "BertProcessing" || type == "RobertaProcessing") {
    const JsonPart first = part.child("cls");
    if (!first.json.is_array() || first.json.size() != 2) first.bad("not a token and its id");
    begins_with(first.json[1]);
  } else if (type != "ByteLevel") {
    part.unsupported(fmt::format("type {}", shown_token(type)));
  }
}

TokenIds ids_of(const TokenizerPipeline& pipeline) {
  TokenIds ids;
  ids.reserve(pipeline.tokens.size());
  for (size_t id = 0; id < pipeline.tokens.size(); ++id)
    if (pipeline.tokens[id].known) ids.emplace(pipeline.tokens[id].text, static_cast<int32_t>(id));
  return ids;
}

bool is_json(std::string_view bytes) { return bytes.substr(0, bytes.find_first_not_of(" \t\r\n") + 1).ends_with('{'); }

TokenizerPipeline read(const std::filesystem::path& path) {
  const MappedFile file(path);
  TokenizerPipeline pipeline = read_tokenizer_json(file.text(), path.string());
  apply_tokenizer_config(path, pipeline);
  return pipeline;
}

}  // namespace

TokenizerPipeline read_tokenizer_json(std::string_view text, const std::string& file) {
  const Json json = parse_json(text, file);
  const JsonPart root = {json, file, ""};
  TokenizerPipeline out;
  const JsonPart model = root.child("model");
  const std::string type = model_type(model);
  if (const auto part = root.maybe("normalizer")) read_steps(*part, kNormalizers, "normalizers", out.normalizers);
  read_pre_tokenizers(root, type, out);
  for (const ModelKind& kind : kModels)
    if (kind.type == type) out.model = kind.read(model, out);
  if (out.model == nullptr) model.unsupported(fmt::format("type {}", shown_token(type)));
  const TokenIds vocabulary = ids_of(out);
  read_decoders(root, out);
  read_added_tokens(root, vocabulary, out);
  if (const auto part = root.maybe("post_processor")) read_post_processor(*part, out);
  return out;
}

extern const TokenizerFormat tokenizer_json_tokenizer;
const TokenizerFormat tokenizer_json_tokenizer = {
    .name = "tokenizer.json",
    .source = "huggingface/tokenizers 3ba8ad00",
    .find = [](const std::filesystem::path& directory) { return file_in(directory, "tokenizer.json"); },
    .recognises = is_json,
    .read = read};

}  // namespace bitwright

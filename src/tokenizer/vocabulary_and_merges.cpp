#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "base/mapped_file.hpp"
#include "tokenizer/byte_level.hpp"
#include "tokenizer/formats.hpp"
#include "tokenizer/normalizers.hpp"
#include "tokenizer/split_patterns.hpp"
#include "tokenizer/vocabulary.hpp"

namespace bitwright {
namespace {

/// What the files do not say, known by tokenizer_config.json's tokenizer_class: how transformers' class of that name
/// cuts text.
struct TokenizerClass {
  std::string_view name;
  std::string_view split;
  bool nfc = false;
};
constexpr std::array<TokenizerClass, 7> kClasses = {{
    {"GPT2Tokenizer", kGpt2Split},
    {"RobertaTokenizer", kGpt2Split},
    {"BartTokenizer", kGpt2Split},
    {"LongformerTokenizer", kGpt2Split},
    {"GPTNeoXTokenizer", kGpt2Split, true},
    {"CodeGenTokenizer", kGpt2Split},
    {"Qwen2Tokenizer", kQwen2Split, true},
}};

const TokenizerClass& class_of(const JsonPart* config) {
  if (config == nullptr || config->find("tokenizer_class") == nullptr) return kClasses[0];
  std::string name = config->text("tokenizer_class");
  if (name.ends_with("Fast")) name.resize(name.size() - 4);
  for (const TokenizerClass& known : kClasses)
    if (known.name == name) return known;
  config->unsupported(fmt::format("tokenizer_class {} without tokenizer.json", shown_token(name)));
}

/// Lines of "a b", an optional first one that begins with #version; their ends may be CR LF.
MergeList read_merges(std::string_view text, const std::string& file) {
  MergeList merges;
  for (size_t number = 1; !text.empty(); ++number) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.empty() || (number == 1 && line.starts_with("#version"))) continue;
    const auto parts = split_merge(line);
    if (!parts) bad_tokenizer(file, fmt::format("line {} is not two texts with a space between them", number));
    merges.push_back(*parts);
  }
  return merges;
}

void add(const JsonPart& part, const TokenIds& vocabulary, const AddedToken& token, TokenizerPipeline& out) {
  for (AddedToken& known : out.added) {
    if (known.text != token.text) continue;
    if (known.id != token.id)
      part.bad(fmt::format("{} has two ids, {} and {}", shown_token(token.text), known.id, token.id));
    known.special |= token.special;
    out.tokens[static_cast<size_t>(token.id)].special = known.special;
    return;
  }
  const auto known = vocabulary.find(token.text);
  if (known == vocabulary.end()) add_token(part.file, out, token.id, token.text, token.text);
  if (known != vocabulary.end() && known->second != token.id)
    part.bad(fmt::format("id {} of {} is {} in the vocabulary", token.id, shown_token(token.text), known->second));
  out.tokens[static_cast<size_t>(token.id)] = {.text = token.text, .known = true, .special = token.special};
  out.added.push_back(token);
}

/// added_tokens_decoder: {"id": {"content": …, flags}}.
void add_from_config(const JsonPart& config, const TokenIds& vocabulary, TokenizerPipeline& out) {
  const auto list = config.maybe("added_tokens_decoder");
  if (!list) return;
  if (!list->json.is_object()) list->bad("not an object");
  for (const auto& [key, value] : list->json.items()) {
    const JsonPart token = {value, list->file, list->name};
    const Json number = Json::parse(key, nullptr, false);
    add(token, vocabulary,
        {.id = token.id(number, token.text("content")),
         .text = token.text("content"),
         .special = token.flag("special", false),
         .single_word = token.flag("single_word", false),
         .lstrip = token.flag("lstrip", false),
         .rstrip = token.flag("rstrip", false)},
        out);
  }
}

/// Adds the texts of {"bos_token": "…" or {"content": "…"}, "additional_special_tokens": [either, …], …}.
void add_texts(const Json& json, std::unordered_set<std::string>& texts) {
  if (json.is_string()) texts.insert(json.get<std::string>());
  if (json.is_object() && json.contains("content")) return add_texts(json["content"], texts);
  if (json.is_structured())
    for (const Json& member : json) add_texts(member, texts);
}

/// added_tokens.json: {"text": id}. special_tokens_map.json tells which are special; without it all are.
void add_from_directory(const std::filesystem::path& directory, const TokenIds& vocabulary, TokenizerPipeline& out) {
  const auto path = file_in(directory, "added_tokens.json");
  if (!path) return;
  const Json json = parse_json(read_text_file(*path), path->string());
  const JsonPart part = {json, path->string(), ""};
  if (!json.is_object()) part.bad("not an object");
  std::unordered_set<std::string> special;
  const auto map = file_in(directory, "special_tokens_map.json");
  if (map) add_texts(parse_json(read_text_file(*map), map->string()), special);
  for (const auto& [text, id] : json.items())
    if (!text.empty())
      add(part, vocabulary, {.id = part.id(id, text), .text = text, .special = !map || special.contains(text)}, out);
}

std::optional<std::filesystem::path> find(const std::filesystem::path& directory) {
  return file_in(directory, "merges.txt") ? file_in(directory, "vocab.json") : std::nullopt;
}

TokenizerPipeline read(const std::filesystem::path& path) {
  const std::filesystem::path directory = path.parent_path();
  const auto merges_path = directory / "merges.txt";
  const auto config_path = file_in(directory, "tokenizer_config.json");
  const Json config_json = config_path ? parse_json(read_text_file(*config_path), config_path->string()) : Json();
  const JsonPart config = {config_json, config_path ? config_path->string() : "", ""};
  const TokenizerClass& kind = class_of(config_path ? &config : nullptr);

  TokenizerPipeline out;
  out.byte_pieces = true;
  const MappedFile vocabulary_file(path), merges_file(merges_path);
  const Json vocabulary_json = parse_json(vocabulary_file.text(), path.string());
  const TokenIds vocabulary = add_vocabulary({vocabulary_json, path.string(), ""}, out);
  const MergeList merges = read_merges(merges_file.text(), merges_path.string());
  out.model = std::make_unique<Bpe>(bpe_rules(vocabulary, merges, {.byte_pieces = true}, merges_path.string()));
  for (Token& token : out.tokens)
    if (auto bytes = bytes_of_token(token.text)) token.text = std::move(*bytes);
  if (config_path) add_from_config(config, vocabulary, out);
  add_from_directory(directory, vocabulary, out);
  // GPT-2's own token, which its files do not list apart.
  static constexpr const char* kEndOfText = "<|endoftext|>";
  const auto end = vocabulary.find(kEndOfText);
  if (end != vocabulary.end())
    add({vocabulary_json, path.string(), ""}, vocabulary, {.id = end->second, .text = kEndOfText, .special = true},
        out);
  if (!config_path && end != vocabulary.end()) out.bos = out.eos = end->second;

  if (kind.nfc) out.normalizers.push_back(to_normal_form(NormalForm::c));
  out.pre_tokenizers.push_back(split_by_pattern(Pattern(kind.split), SplitBehavior::isolated, false));
  apply_tokenizer_config(path, out);
  return out;
}

}  // namespace

extern const TokenizerFormat vocabulary_and_merges_tokenizer;
const TokenizerFormat vocabulary_and_merges_tokenizer = {
    .name = "vocab.json and merges.txt",
    .source = "openai/gpt-2, encoder.py; huggingface/transformers, tokenization_gpt2.py, tokenization_qwen2.py",
    .find = find,
    .recognises = [](std::string_view) { return false; },  // one file is not enough
    .read = read};

}  // namespace bitwright

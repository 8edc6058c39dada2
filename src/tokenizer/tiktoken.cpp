#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>

#include "base/mapped_file.hpp"
#include "tokenizer/bpe.hpp"
#include "tokenizer/formats.hpp"
#include "tokenizer/normalizers.hpp"
#include "tokenizer/split_patterns.hpp"
#include "tokenizer/vocabulary.hpp"

namespace bitwright {
namespace {

struct SpecialToken {
  int32_t id;
  std::string text;
};
using SpecialTokens = std::vector<SpecialToken>;

/// Llama 3.1 and later; Llama 3.0 had reserved ones for <|finetune_right_pad_id|>, <|step_id|>, <|eom_id|> and
/// <|python_tag|>.
SpecialTokens llama3_tokens() {
  constexpr int32_t kFirst = 128000, kCount = 256;
  static constexpr std::array<std::string_view, 11> kNamed = {"<|begin_of_text|>",
                                                              "<|end_of_text|>",
                                                              "<|reserved_special_token_0|>",
                                                              "<|reserved_special_token_1|>",
                                                              "<|finetune_right_pad_id|>",
                                                              "<|step_id|>",
                                                              "<|start_header_id|>",
                                                              "<|end_header_id|>",
                                                              "<|eom_id|>",
                                                              "<|eot_id|>",
                                                              "<|python_tag|>"};
  SpecialTokens out;
  for (int32_t i = 0; i < kCount; ++i) {
    const auto at = static_cast<size_t>(i);
    out.push_back({kFirst + i, at < kNamed.size()
                                   ? std::string(kNamed.at(at))
                                   : fmt::format("<|reserved_special_token_{}|>", at - kNamed.size() + 2)});
  }
  return out;
}

SpecialTokens qwen_tokens() {
  SpecialTokens out = {{151643, "<|endoftext|>"}, {151644, "<|im_start|>"}, {151645, "<|im_end|>"}};
  for (int32_t i = 0; i < 205; ++i) out.push_back({151646 + i, fmt::format("<|extra_{}|>", i)});
  return out;
}

/// What the file does not say, known by how many ranks it has: the split, the special tokens, whether text is
/// normalized.
struct Encoding {
  std::string_view name;
  size_t ranks;
  std::string_view split;
  SpecialTokens (*special)();
  std::string_view bos, eos;  ///< bos empty: none
  bool nfc = false;
};

constexpr std::array<Encoding, 6> kEncodings = {{
    {"r50k_base", 50256, kGpt2Split,
     [] {
       return SpecialTokens{{50256, "<|endoftext|>"}};
     },
     "", "<|endoftext|>"},
    {"p50k_base", 50280, kGpt2Split,
     [] {
       return SpecialTokens{{50256, "<|endoftext|>"}};
     },
     "", "<|endoftext|>"},
    {"cl100k_base", 100256, kCl100kSplit,
     [] {
       return SpecialTokens{{100257, "<|endoftext|>"},
                            {100258, "<|fim_prefix|>"},
                            {100259, "<|fim_middle|>"},
                            {100260, "<|fim_suffix|>"},
                            {100276, "<|endofprompt|>"}};
     },
     "", "<|endoftext|>"},
    {"o200k_base", 199998, kO200kSplit,
     [] {
       return SpecialTokens{{199999, "<|endoftext|>"}, {200018, "<|endofprompt|>"}};
     },
     "", "<|endoftext|>"},
    {"Llama 3", 128000, kLlama3Split, llama3_tokens, "<|begin_of_text|>", "<|end_of_text|>"},
    {"Qwen", 151643, kQwen2Split, qwen_tokens, "", "<|endoftext|>", true},
}};

const Encoding& encoding_of(size_t ranks, const std::string& file) {
  for (const Encoding& encoding : kEncodings)
    if (encoding.ranks == ranks) return encoding;
  unsupported_tokenizer(file, fmt::format("a tiktoken file of {} ranks, which does not tell its split,", ranks));
}

/// A line: a token in base64, a space, its rank.
std::pair<std::string, uint32_t> read_line(std::string_view line, size_t number, const std::string& file) {
  const size_t space = line.find(' ');
  const std::string_view digits = space == line.npos ? "" : line.substr(space + 1);
  uint32_t rank = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), rank);
  std::optional<std::string> bytes = from_base64(line.substr(0, space));
  const bool sound = error == std::errc{} && end == digits.data() + digits.size() && bytes && !bytes->empty();
  if (!sound || rank >= kMaxVocabulary)
    bad_tokenizer(file, fmt::format("line {} is not a token in base64 and its rank", number));
  return {std::move(*bytes), rank};
}

bool is_tiktoken(std::string_view bytes) {
  const std::string_view line = bytes.substr(0, bytes.find('\n'));
  const size_t space = line.find(' ');
  if (space == line.npos || space == 0 || space > 1024 || space + 1 == line.size()) return false;
  return from_base64(line.substr(0, space)) && line[space + 1] >= '0' && line[space + 1] <= '9';
}

std::optional<std::filesystem::path> find(const std::filesystem::path& directory) {
  std::vector<std::filesystem::path> paths;
  std::error_code unreadable;
  for (const auto& entry : std::filesystem::directory_iterator(directory, unreadable))
    if (entry.path().extension() == ".tiktoken" || entry.path().filename() == "tokenizer.model")
      paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  for (const auto& path : paths)
    if (is_tiktoken(MappedFile(path).text())) return path;
  return std::nullopt;
}

TokenizerPipeline read(const std::filesystem::path& path) {
  const MappedFile file(path);
  TokenizerPipeline pipeline = read_tiktoken(file.text(), path.string());
  apply_tokenizer_config(path, pipeline);
  return pipeline;
}

}  // namespace

TokenizerPipeline read_tiktoken(std::string_view text, const std::string& file) {
  std::vector<std::pair<std::string, uint32_t>> lines;
  while (!text.empty()) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (!line.empty()) lines.push_back(read_line(line, lines.size() + 1, file));
  }
  const Encoding& encoding = encoding_of(lines.size(), file);
  TokenizerPipeline out;
  BpeRules rules;
  rules.byte_pieces = out.byte_pieces = true;
  std::vector<RankedToken> ranked;
  for (const auto& [bytes, rank] : lines) {
    const auto id = static_cast<int32_t>(rank);
    add_token(file, out, id, bytes, bytes);
    ranked.push_back({bytes, id, rank});
    if (!rules.whole.emplace(bytes, id).second)
      bad_tokenizer(file, fmt::format("{} appears twice", shown_token(bytes)));
  }
  for (const SpecialToken& token : encoding.special()) {
    add_token(file, out, token.id, token.text, token.text).special = true;
    out.added.push_back({.id = token.id, .text = token.text, .special = true});
    if (token.text == encoding.bos) out.bos = token.id;
    if (token.text == encoding.eos) out.eos = token.id;
  }
  out.adds_bos = out.bos.has_value();
  add_merges_of_ranks(ranked, static_cast<int32_t>(out.tokens.size()), rules);
  if (encoding.nfc) out.normalizers.push_back(to_normal_form(NormalForm::c));
  out.pre_tokenizers.push_back(split_by_pattern(Pattern(encoding.split), SplitBehavior::isolated, false));
  out.model = std::make_unique<Bpe>(std::move(rules));
  return out;
}

extern const TokenizerFormat tiktoken_tokenizer;
const TokenizerFormat tiktoken_tokenizer = {.name = "tiktoken",
                                            .source =
                                                "openai/tiktoken, openai_public.py; meta-llama/llama-models a9c89c47, "
                                                "llama3/tokenizer.py; Qwen/Qwen-7B, tokenization_qwen.py",
                                            .find = find,
                                            .recognises = is_tiktoken,
                                            .read = read};

}  // namespace bitwright

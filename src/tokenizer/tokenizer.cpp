#include "tokenizer/tokenizer.hpp"

#include <fmt/format.h>

#include <limits>
#include <utility>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "base/utf8.hpp"
#include "tokenizer/added_tokens.hpp"
#include "tokenizer/formats.hpp"
#include "tokenizer/pipeline.hpp"
#include "tokenizer/unicode.hpp"

namespace bitwright {
namespace {

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& why) {
  throw Error({.code = "no-tokenizer",
               .what = "cannot read tokenizer",
               .where = path.string(),
               .why = why,
               .fix = "docs/tokenizers.md lists the files that are read"});
}

TokenizerPipeline read_path(const std::filesystem::path& path) {
  std::error_code unreadable;
  if (std::filesystem::is_directory(path, unreadable)) {
    for (const TokenizerFormat* format : tokenizer_formats())
      if (const auto file = format->find(path)) return format->read(*file);
    fail(path, "the directory holds no tokenizer");
  }
  const MappedFile file(path);
  for (const TokenizerFormat* format : tokenizer_formats())
    if (format->recognises(file.text())) return format->read(path);
  fail(path, "the file is no tokenizer of a known kind");
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(TokenizerPipeline read)
      : pipeline(std::move(read)), verbatim(pipeline.added, false), normalized(pipeline.added, true) {}

  /// What is being encoded.
  struct Work {
    std::vector<int32_t> ids;
    PieceCache cache;
    bool stray_bytes;
    bool begins_text = true;  ///< nothing has been encoded yet
  };
  void encode_stretch(std::string_view text, bool special, Work& work) const;
  void encode_normalized(std::string_view text, Work& work) const;

  TokenizerPipeline pipeline;
  AddedTokens verbatim, normalized;
};

/// text: between added tokens, escaped.
void Tokenizer::Impl::encode_stretch(std::string_view text, bool special, Work& work) const {
  std::string changed;
  for (const TextNormalizer& step : pipeline.normalizers) text = changed = step(text);
  for (const Stretch& stretch : normalized.split(text, special)) {
    if (stretch.id >= 0) {
      work.ids.push_back(stretch.id);
    } else {
      encode_normalized(stretch.text, work);
    }
    work.begins_text = false;
  }
}

void Tokenizer::Impl::encode_normalized(std::string_view text, Work& work) const {
  Pieces pieces;
  pieces.add(text);
  for (const PreTokenizer& step : pipeline.pre_tokenizers) {
    Pieces next;
    next.owned = pieces.owned;
    next.texts.reserve(pieces.texts.size());
    bool first = work.begins_text;
    for (const std::string_view piece : pieces.texts) step(piece, std::exchange(first, false), next);
    pieces = std::move(next);
  }
  for (const std::string_view piece : pieces.texts) {
    if (pipeline.byte_pieces && work.stray_bytes) {
      pipeline.model->encode(unescape_stray_bytes(piece), work.cache, work.ids);
    } else {
      pipeline.model->encode(piece, work.cache, work.ids);
    }
  }
}

Tokenizer::Tokenizer(TokenizerPipeline pipeline) : impl_(std::make_unique<Impl>(std::move(pipeline))) {}
Tokenizer::Tokenizer(const std::filesystem::path& path) : Tokenizer(read_path(path)) {}
Tokenizer Tokenizer::from_json(std::string_view tokenizer, std::string_view config, const std::string& directory) {
  TokenizerPipeline pipeline = read_tokenizer_json(tokenizer, directory + "/tokenizer.json");
  if (!config.empty()) apply_tokenizer_config(config, directory + "/tokenizer_config.json", pipeline);
  return Tokenizer(std::move(pipeline));
}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;

bool Tokenizer::exists_in(const std::filesystem::path& directory) {
  for (const TokenizerFormat* format : tokenizer_formats())
    if (format->find(directory)) return true;
  return false;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool special) const {
  if (text.size() > std::numeric_limits<int32_t>::max() - size_t{1})
    throw Error({.code = "text-too-long",
                 .what = "cannot encode text",
                 .why = fmt::format("{} bytes are more than {}", text.size(), std::numeric_limits<int32_t>::max() - 1),
                 .fix = "give it in parts"});
  Impl::Work work = {.ids = {}, .cache = {}, .stray_bytes = !is_utf8(text)};
  const std::string escaped = work.stray_bytes ? escape_stray_bytes(text) : "";
  for (const Stretch& stretch : impl_->verbatim.split(work.stray_bytes ? escaped : text, special)) {
    if (stretch.id >= 0) {
      work.ids.push_back(stretch.id);
    } else {
      impl_->encode_stretch(stretch.text, special, work);
    }
    work.begins_text = false;
  }
  return std::move(work.ids);
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  const std::vector<Token>& tokens = impl_->pipeline.tokens;
  std::vector<std::string> texts;
  std::string all;
  for (const int32_t id : ids) {
    const auto at = static_cast<size_t>(id);
    if (id < 0 || at >= tokens.size() || !tokens[at].known)
      throw Error(
          {.code = "bad-token",
           .what = "cannot decode tokens",
           .why = fmt::format("{} is not a token of this tokenizer, whose largest is {}", id, tokens.size() - 1),
           .fix = "use the tokenizer that made them"});
    if (skip_special && tokens[at].special) continue;
    if (impl_->pipeline.decoders.empty()) {
      all += tokens[at].text;
    } else {
      texts.push_back(tokens[at].text);
    }
  }
  if (texts.empty()) return all;
  for (const TokenDecoder& step : impl_->pipeline.decoders) step(texts);
  for (const std::string& text : texts) all += text;
  return all;
}

size_t Tokenizer::vocabulary_size() const { return impl_->pipeline.tokens.size(); }
std::optional<int32_t> Tokenizer::bos_id() const { return impl_->pipeline.bos; }
std::optional<int32_t> Tokenizer::eos_id() const { return impl_->pipeline.eos; }
bool Tokenizer::adds_bos() const { return impl_->pipeline.adds_bos; }

}  // namespace bitwright

#include "tokenizer/tokenizer.hpp"

#include <fmt/format.h>

#include <limits>
#include <unordered_map>
#include <utility>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "tokenizer/added_tokens.hpp"
#include "tokenizer/bpe.hpp"
#include "tokenizer/byte_level.hpp"
#include "tokenizer/split_pattern.hpp"
#include "tokenizer/tokenizer_file.hpp"

namespace bitwright {

/// Encoding goes: added tokens, the prefix space, valid UTF-8 apart from other bytes, pieces, merges.
struct Tokenizer::Impl {
  explicit Impl(TokenizerFile read)
      : file(std::move(read)),
        verbatim(file.added, false),
        normalized(file.added, true),
        pattern(kGpt2Pattern),
        bpe(file) {}

  void encode_pieces(std::string_view text, std::vector<int32_t>& ids) const;
  void encode_stretch(std::string_view text, std::vector<int32_t>& ids) const;

  TokenizerFile file;
  AddedTokens verbatim, normalized;
  SplitPattern pattern;
  Bpe bpe;
};

/// text: UTF-8.
void Tokenizer::Impl::encode_pieces(std::string_view text, std::vector<int32_t>& ids) const {
  std::unordered_map<std::string_view, std::pair<size_t, size_t>> known;  // where in `ids` the piece stands already
  for (const std::string_view piece : pattern.split(text)) {
    const auto [it, is_new] = known.try_emplace(piece, ids.size(), ids.size());
    auto& [begin, end] = it->second;
    if (is_new) {
      bpe.encode(piece, ids);
      end = ids.size();
    } else {
      for (size_t i = begin; i < end; ++i) ids.push_back(ids[i]);
    }
  }
}

void Tokenizer::Impl::encode_stretch(std::string_view text, std::vector<int32_t>& ids) const {
  std::string prefixed;
  if (file.adds_prefix_space && !text.starts_with(' ')) text = prefixed.append(" ").append(text);
  while (!text.empty()) {
    size_t valid = 0;
    while (const size_t length = utf8_character(text.substr(valid))) valid += length;
    encode_pieces(text.substr(0, valid), ids);
    text.remove_prefix(valid);
    size_t other = 0;
    while (other < text.size() && utf8_character(text.substr(other)) == 0) ++other;
    bpe.encode_bytes(text.substr(0, other), ids);
    text.remove_prefix(other);
  }
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(const std::filesystem::path& directory) {
  const MappedFile tokenizer(directory / "tokenizer.json");
  const std::filesystem::path config = directory / "tokenizer_config.json";
  std::error_code unreadable;  // then the directory is, and the line above has said so
  const std::string settings = std::filesystem::exists(config, unreadable) ? read_text_file(config) : "";
  impl_ = std::make_unique<Impl>(read_tokenizer_file(tokenizer.text(), settings, directory.string()));
}
Tokenizer Tokenizer::from_json(std::string_view tokenizer, std::string_view config, const std::string& directory) {
  return Tokenizer(std::make_unique<Impl>(read_tokenizer_file(tokenizer, config, directory)));
}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool special) const {
  if (text.size() > std::numeric_limits<int32_t>::max() - size_t{1})
    throw Error({.code = "text-too-long",
                 .what = "cannot encode text",
                 .why = fmt::format("{} bytes are more than {}", text.size(), std::numeric_limits<int32_t>::max() - 1),
                 .fix = "give it in parts"});
  std::vector<int32_t> ids;
  for (const Stretch& outer : impl_->verbatim.split(text, special)) {
    if (outer.id >= 0) {
      ids.push_back(outer.id);
      continue;
    }
    for (const Stretch& inner : impl_->normalized.split(outer.text, special)) {
      if (inner.id >= 0) {
        ids.push_back(inner.id);
      } else {
        impl_->encode_stretch(inner.text, ids);
      }
    }
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  const std::vector<Token>& tokens = impl_->file.tokens;
  std::string text;
  for (const int32_t id : ids) {
    const auto at = static_cast<size_t>(id);
    if (id < 0 || at >= tokens.size() || !tokens[at].known)
      throw Error(
          {.code = "bad-token",
           .what = "cannot decode tokens",
           .why = fmt::format("{} is not a token of this tokenizer, whose largest is {}", id, tokens.size() - 1),
           .fix = "use the tokenizer that made them"});
    if (!skip_special || !tokens[at].special) text += tokens[at].bytes;
  }
  return text;
}

size_t Tokenizer::vocabulary_size() const { return impl_->file.tokens.size(); }
std::optional<int32_t> Tokenizer::bos_id() const { return impl_->file.bos; }
std::optional<int32_t> Tokenizer::eos_id() const { return impl_->file.eos; }
bool Tokenizer::adds_bos() const { return impl_->file.adds_bos; }

}  // namespace bitwright

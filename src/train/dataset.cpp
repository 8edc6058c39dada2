#include "train/dataset.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/error.hpp"
#include "base/mapped_file.hpp"

namespace bitwright::train {
namespace {

/// SplitMix64 (Steele, Lea, Flood 2014): the same on every machine, which std::shuffle is not.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  /// In [0, count), each equally likely.
  uint64_t below(uint64_t count) {
    const uint64_t end = std::numeric_limits<uint64_t>::max() / count * count;
    for (;;)
      if (const uint64_t value = next(); value < end) return value % count;
  }

 private:
  uint64_t state_;
};

[[noreturn]] void fail(const std::string& code, const std::string& why, const std::string& fix) {
  throw Error({.code = code, .what = "cannot train", .why = why, .fix = fix});
}

}  // namespace

void check_tokens(std::span<const int32_t> tokens, int64_t length, int64_t vocabulary) {
  if (std::ssize(tokens) <= length)
    fail("text-too-short",
         fmt::format("the text has {} tokens, a window takes {} and one to predict", tokens.size(), length),
         "give a longer text or a smaller data.sequence_length");
  const auto [least, most] = std::ranges::minmax(tokens);
  if (least < 0 || (vocabulary > 0 && most >= vocabulary))
    fail("vocabulary-mismatch",
         fmt::format("the text has token {}, the model {} tokens", least < 0 ? least : most, vocabulary),
         "use the tokenizer that belongs to the model");
}

TokenDataset::TokenDataset(std::span<const int32_t> tokens, int64_t length, uint64_t seed, int64_t vocabulary)
    : size_(static_cast<int64_t>(tokens.size())), length_(length), seed_(seed) {
  BW_ASSERT(length > 0);
  check_tokens(tokens, length, vocabulary);
  windows_ = std::max<int64_t>(1, (size_ - length) / length);
  if (std::ranges::max(tokens) <= std::numeric_limits<uint16_t>::max())
    narrow_.assign(tokens.begin(), tokens.end());
  else
    wide_.assign(tokens.begin(), tokens.end());
  digest_ = sha256(std::as_bytes(tokens));
}

int64_t TokenDataset::token(int64_t index) const {
  const auto i = static_cast<size_t>(index);
  return narrow_.empty() ? wide_[i] : narrow_[i];
}

const TokenDataset::Epoch& TokenDataset::epoch(int64_t number) const {
  if (epoch_.number == number) return epoch_;
  Random random(seed_ ^ Random(static_cast<uint64_t>(number) + 1).next());
  const int64_t slack = std::min(length_ - 1, size_ - 1 - windows_ * length_);
  epoch_ = {.number = number,
            .offset = static_cast<int64_t>(random.below(static_cast<uint64_t>(slack) + 1)),
            .order = std::vector<uint32_t>(static_cast<size_t>(windows_))};
  std::iota(epoch_.order.begin(), epoch_.order.end(), 0u);
  for (size_t i = epoch_.order.size(); i > 1; --i) std::swap(epoch_.order[i - 1], epoch_.order[random.below(i)]);
  return epoch_;
}

torch::Tensor TokenDataset::batch(int64_t position, int64_t count) const {
  torch::Tensor tokens = torch::empty({count, length_ + 1}, torch::kInt64);
  auto* out = tokens.data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    const Epoch& e = epoch((position + i) / windows_);
    const int64_t begin = e.offset + length_ * e.order[static_cast<size_t>((position + i) % windows_)];
    for (int64_t t = 0; t <= length_; ++t) *out++ = token(begin + t);
  }
  return tokens;
}

Protocol protocol_of(const TrainingConfig& config, const Tokenizer& tokenizer, int64_t context) {
  constexpr int64_t kUsual = 512;  // as eval has it
  Protocol protocol;
  protocol.context = config.data.sequence_length > 0 ? config.data.sequence_length : std::min(kUsual, context);
  if (protocol.context > context)
    throw Error({.code = "bad-value",
                 .what = "bad configuration",
                 .where = "data.sequence_length",
                 .why = fmt::format("{} is more than the model's {}", protocol.context, context),
                 .fix = fmt::format("use at most {}", context),
                 .status = ExitStatus::usage});
  protocol.stride = protocol.context;
  const bool automatic = config.data.bos == "auto" && tokenizer.adds_bos() && tokenizer.bos_id();
  protocol.bos = automatic || config.data.bos == "document" ? Protocol::Bos::document : Protocol::Bos::none;
  protocol.split = config.data.split;
  return protocol;
}

TokenTexts read_texts(const TrainingConfig& config, const Tokenizer& tokenizer, const Protocol& protocol) {
  if (config.data.text.empty())
    throw Error({.code = "missing-text",
                 .what = "bad configuration",
                 .where = "data.text",
                 .why = "there is no text to train on",
                 .fix = "name a file",
                 .status = ExitStatus::usage});
  const auto tokens_of = [&](const std::string& path) {
    return token_stream(tokenizer, MappedFile(path).text(), protocol);
  };
  TokenTexts texts = {.training = tokens_of(config.data.text), .validation = {}};
  if (!config.data.validation.empty()) {
    texts.validation = tokens_of(config.data.validation);
    return texts;
  }
  const auto total = texts.training.size();
  const auto held_out = static_cast<size_t>(static_cast<double>(total) * config.data.validation_fraction);
  if (held_out <= static_cast<size_t>(protocol.context)) return texts;
  texts.validation.assign(texts.training.end() - static_cast<std::ptrdiff_t>(held_out), texts.training.end());
  texts.training.resize(total - held_out);
  return texts;
}

}  // namespace bitwright::train

#include "quantize/verify.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "base/threads.hpp"
#include "kernels/decode.hpp"
#include "model/model.hpp"
#include "quantize/model_files.hpp"
#include "tokenizer/tokenizer.hpp"

namespace bitwright {
namespace {

constexpr int64_t kContext = 256;
constexpr int64_t kMostWindows = 32;
constexpr double kMostOperations = 4e12;  // a minute or so on a small machine

[[noreturn]] void fail(const std::string& where, const std::string& why) {
  throw Error({.code = "verification-failed",
               .what = "the written model is not what was meant",
               .where = where,
               .why = why,
               .fix = "nothing was kept; check the disk and memory, and report this"});
}

/// Errors after which a model is merely not judged: it is of a kind the runtime or the tokenizer does not know.
bool means_not_runnable(const Error& error) {
  constexpr std::array<std::string_view, 4> kCodes = {"unknown-architecture", "unsupported-config",
                                                      "unsupported-tensor", "unsupported-tokenizer"};
  return std::ranges::find(kCodes, error.code()) != kCodes.end();
}

/// As many windows as the budget of operations allows, two models each.
int64_t affordable_windows(const Checkpoint& model) {
  double parameters = 0;
  for (const TensorEntry& entry : model.tensors()) parameters += static_cast<double>(element_count(entry.shape));
  const double windows = kMostOperations / (2 * 2 * parameters * static_cast<double>(kContext));
  return std::clamp<int64_t>(static_cast<int64_t>(windows), 1, kMostWindows);
}

}  // namespace

void verify_tensors(const Checkpoint& source, const Checkpoint& written, const std::vector<LayerResult>& layers) {
  if (source.tensors().size() != written.tensors().size())
    fail(written.path().string(),
         fmt::format("{} tensors, the original has {}", written.tensors().size(), source.tensors().size()));
  auto layer = layers.begin();
  for (const TensorEntry& entry : source.tensors()) {
    throw_if_interrupted();
    const TensorEntry* found = written.find(entry.name);
    if (found == nullptr || found->shape != entry.shape) fail(entry.name, "missing, or of another shape");
    if (!found->quantized()) {
      if (!std::ranges::equal(source.plain_bytes(entry), written.plain_bytes(*found)))
        fail(entry.name, "its bytes differ from the original's");
      continue;
    }
    const double error =
        relative_error({.dtype = entry.dtype, .bytes = source.plain_bytes(entry)}, written.read(*found));
    if (layer == layers.end() || layer->name != entry.name || layer->relative_error != error || !std::isfinite(error))
      fail(entry.name, fmt::format("reads back with a relative error of {}", error));
    ++layer;
  }
  if (layer != layers.end()) fail(layer->name, "it was quantized and reads back as kept");
}

std::optional<Judgement> judge(const Checkpoint& source, const Checkpoint& written, std::string& reason) {
  if (!std::filesystem::exists(model_directory(source) / "tokenizer.json")) {
    reason = "the model has no tokenizer.json";
    return std::nullopt;
  }
  try {
    const Tokenizer tokenizer(model_directory(source));
    const Model original(source), quantized(written);
    Judgement j;
    j.protocol.context = std::min(kContext, original.config().context);
    j.protocol.stride = j.protocol.context;
    j.protocol.split = "<|endoftext|>";
    j.protocol.bos = tokenizer.adds_bos() && tokenizer.bos_id() ? Protocol::Bos::document : Protocol::Bos::none;
    j.protocol.max_windows = affordable_windows(source);
    const std::vector<int32_t> tokens = token_stream(tokenizer, bundled_text(), j.protocol);
    j.quality = evaluate(quantized, &original, tokens, j.protocol, tokenizer.bos_id());
    return j;
  } catch (const Error& e) {
    if (!means_not_runnable(e)) throw;
    reason = e.what();
    return std::nullopt;
  }
}

}  // namespace bitwright

// What quantizing to each type of GGUF costs one core: choosing the codes, packing the blocks, measuring the error.
//   cmake --build --preset release --target gguf_encode_bench && build/release/bin/gguf_encode_bench [TYPE...]
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <span>
#include <string_view>
#include <vector>

#include "algorithm/block_search.hpp"
#include "base/threads.hpp"
#include "benchmarks/measure.hpp"
#include "container/gguf_blocks.hpp"
#include "container/gguf_rounding.hpp"
#include "kernels/decode.hpp"
#include "kernels/encode.hpp"

namespace bitwright {
namespace {

constexpr int64_t kRows = 512, kColumns = 2048;  // 2 MiB of f16, a piece of a tensor as `quantize` takes it
constexpr int kRuns = 9;

/// Normal, with rows of different scales and one value in 2000 six times as large, as weights of models are.
std::vector<std::byte> weights_like_a_models() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> values(static_cast<size_t>(kRows * kColumns));
  for (size_t row = 0; row < static_cast<size_t>(kRows); ++row) {
    const float scale = 0.02f * std::exp(0.3f * normal(random));
    for (size_t i = 0; i < static_cast<size_t>(kColumns); ++i)
      values[row * static_cast<size_t>(kColumns) + i] = scale * normal(random) * (random() % 2000 == 0 ? 6.0f : 1.0f);
  }
  std::vector<std::byte> bytes(2 * values.size());
  from_f32(DType::f16, values, bytes);
  return bytes;
}

void run(std::span<char*> types) {
  const std::vector<std::byte> bytes = weights_like_a_models();
  const WeightView weight = {DType::f16, bytes};
  const Shape shape = {kRows, kColumns};
  const auto count = static_cast<double>(weight.count());
  const auto nanoseconds = [&](const auto& work) { return 1e9 * best_seconds(work, kRuns) / count; };
  fmt::print("a weight, ns: codes, packing, error; GB/s of f16 a core; relative error\n");
  fmt::print("check for NaN {:.2f}\n", nanoseconds([&] { check_finite(weight); }));
  const Container& gguf = *find_container("gguf");
  std::vector<const BlockCodec*> codecs;
  for (const SchemeChoice& choice : gguf.choices)
    codecs.push_back(find_block_codec(gguf.scheme_for(choice, {}, shape)));
  std::ranges::sort(codecs);
  codecs.erase(std::unique(codecs.begin(), codecs.end()), codecs.end());
  for (const BlockCodec* codec : codecs) {
    const auto asked = [&](const char* type) { return codec->type == type; };
    if (!types.empty() && std::ranges::none_of(types, asked)) continue;
    const Scheme scheme = codec->scheme();
    const StoredTensor stored = {.name = "w", .shape = shape, .scheme = scheme};
    QuantizedTensor t;
    const double codes = nanoseconds([&] {
      t = is_block_scheme(scheme) ? search_blocks(scheme, shape, weight) : round_to_gguf(scheme, shape, weight);
    });
    const double packing = nanoseconds([&] { gguf.pack(stored, t); });
    double error = 0;
    const double measuring = nanoseconds([&] { error = relative_error(weight, t); });
    fmt::print("{:<8} {:7.2f} {:6.2f} {:6.2f}  {:6.3f}  {:.6f}\n", codec->type, codes, packing, measuring,
               2 / (codes + packing + measuring), error);
  }
}

}  // namespace
}  // namespace bitwright

int main(int argc, char** argv) {
  bitwright::set_thread_count(1);
  bitwright::run(std::span(argv, static_cast<size_t>(argc)).subspan(1));
}

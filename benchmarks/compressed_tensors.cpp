// Speed of each kind of compressed-tensors on one thread: quantizing, packing, unpacking, decoding, beside a copy.
//   cmake --build --preset release --target compressed_tensors_bench && build/release/bin/compressed_tensors_bench
#include <fmt/format.h>

#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <random>

#include "base/threads.hpp"
#include "benchmarks/measure.hpp"
#include "container/container.hpp"

namespace bitwright {
namespace {

constexpr int64_t kRows = 4096, kColumns = 4096;

void report(std::string_view what, std::string_view step, size_t bytes, double seconds) {
  fmt::print("{:<34} {:<9} {:7.2f} GB/s {:8.1f} ms\n", what, step, static_cast<double>(bytes) / seconds / 1e9,
             1e3 * seconds);
}

void run(const Container& container, const SchemeChoice& choice, WeightView weight, const QuantizedLinear& linear) {
  StoredTensor t = {.name = "w.weight",
                    .shape = {kRows, kColumns},
                    .scheme = container.make_scheme(choice, weight.dtype),
                    .value_dtype = weight.dtype,
                    .linear = linear};
  const std::string what = describe(t.scheme);
  report(what, "quantize", weight.bytes.size(), best_seconds([&] { container.encode(t.scheme, t.shape, weight); }));
  const QuantizedTensor values = container.encode(t.scheme, t.shape, weight);
  report(what, "pack", values.codes.size(), best_seconds([&] { container.pack(t, values); }));
  std::map<std::string, std::vector<std::byte>, std::less<>> data;
  for (NamedArray& array : container.pack(t, values)) {
    t.arrays.push_back(array.spec.name);
    data[array.spec.name] = std::move(array.data);
  }
  const std::map<std::string, ArraySpec, std::less<>> specs;
  const Json nothing;
  const CheckpointView view = {
      .arrays = specs,
      .config = nothing,
      .quantization_metadata = nothing,
      .bytes = [&](const std::string& name) { return std::span<const std::byte>(data.at(name)); },
      .where = "memory"};
  report(what, "unpack", values.codes.size(), best_seconds([&] { container.unpack(t, view); }));
}

void run_all() {
  std::vector<float> values(static_cast<size_t>(kRows * kColumns));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& value : values) value = normal(random);
  std::vector<std::byte> weight(values.size() * 2), copy(weight.size());
  from_f32(DType::bf16, values, weight);
  report("copy", "", weight.size(), best_seconds([&] { std::memcpy(copy.data(), weight.data(), weight.size()); }));
  const Container& container = *find_container("compressed-tensors");
  for (const SchemeChoice& choice : container.choices) {
    const bool weighty = choice.bits == 4 || choice.bits == 8 || choice.bits == 3;
    if (weighty && (choice.weight_only || choice.quant_type != "nvfp4"))
      run(container, choice, {DType::bf16, weight},
          choice.weight_only ? QuantizedLinear{} : container.make_linear(choice));
  }
}

}  // namespace
}  // namespace bitwright

int main() {
  bitwright::set_thread_count(1);
  bitwright::run_all();
}

// Speed of packing and unpacking on one thread, each container and kind of code of 4 and 8 bits, beside the machine's
// own.
//   cmake --build --preset release --target containers_bench && build/release/bin/containers_bench
//     [CONTAINER [ROWS COLUMNS]]
// Codes are bytes, one each: `pack` reads them and `unpack` writes them. "all" are the bytes read and written: codes,
// scales and offsets on the one side, the arrays of the file on the other. Reading is that of memory, 256 MiB summed
// up. "fresh": each buffer comes from the system, page by page; else from memory used before, as quantize's pieces do.
#include <fmt/format.h>
#include <malloc.h>

#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>

#include "base/threads.hpp"
#include "benchmarks/measure.hpp"
#include "container/container.hpp"
#include "kernels/encode.hpp"

namespace bitwright {
namespace {

/// Buffers as large as these come from memory that was used before, or each time from the system (page faults).
void reuse_memory(bool reuse) {
  mallopt(M_MMAP_THRESHOLD, reuse ? 32 << 20 : 64 << 10);
  mallopt(M_TRIM_THRESHOLD, reuse ? 1 << 30 : 0);
}

/// Bytes a second.
struct Machine {
  double read, copy;  ///< a copy's bytes are counted twice
};

Machine measure_machine(size_t bytes) {
  std::vector<uint64_t> words(bytes / sizeof(uint64_t), 1), copy(words.size());
  volatile uint64_t sum = 0;
  const double reading = best_seconds([&] {
    uint64_t all = 0;
    for (const uint64_t word : words) all += word;
    sum = all;
  });
  const double copying = best_seconds([&] { std::memcpy(copy.data(), words.data(), bytes); });
  return {static_cast<double>(bytes) / reading, 2 * static_cast<double>(bytes) / copying};
}

uint64_t bytes_of(const QuantizedTensor* t) {
  if (t == nullptr) return 0;
  return t->codes.size() + 4 * t->group_index.size() + bytes_of(t->scale.get()) + bytes_of(t->offset.get());
}

struct Work {
  const Container& container;
  StoredTensor tensor;
  QuantizedTensor values;
  std::map<std::string, NamedArray, std::less<>> arrays{};
};

struct Times {
  double pack, unpack;
};

Times measure(Work& work) {
  const std::map<std::string, ArraySpec, std::less<>> specs;
  const Json nothing;
  const CheckpointView view = {
      .arrays = specs,
      .config = nothing,
      .quantization_metadata = nothing,
      .bytes = [&](const std::string& name) { return std::span<const std::byte>(work.arrays.at(name).data); },
      .where = "memory"};
  return {best_seconds([&] { work.container.pack(work.tensor, work.values); }),
          best_seconds([&] { work.container.unpack(work.tensor, view); })};
}

void report(Work& work, const Machine& machine) {
  for (NamedArray& array : work.container.pack(work.tensor, work.values)) {
    work.tensor.arrays.push_back(array.spec.name);
    work.arrays[array.spec.name] = std::move(array);
  }
  const auto codes = static_cast<double>(work.values.codes.size());
  double both = static_cast<double>(bytes_of(&work.values));
  for (const auto& [name, array] : work.arrays) both += static_cast<double>(array.data.size());
  fmt::print("{:<19} {:<58}", work.container.name, describe(work.tensor.scheme));
  reuse_memory(true);
  const Times warm = measure(work);
  reuse_memory(false);
  const Times fresh = measure(work);
  for (const auto time : {&Times::pack, &Times::unpack})
    fmt::print(" {:6.1f} {:6.1f} {:4.0f}% {:4.0f}% {:6.1f} |", codes / (warm.*time) / 1e9, both / (warm.*time) / 1e9,
               100 * codes / (warm.*time) / machine.read, 100 * both / (warm.*time) / machine.read,
               codes / (fresh.*time) / 1e9);
  fmt::print("\n");
}

/// The common scheme, where the container has none of its own.
Scheme scheme_of(const Container& container, const SchemeChoice& choice, DType dtype) {
  if (container.make_scheme != nullptr) return container.make_scheme(choice, dtype);
  const Grouping grouping = choice.granularity == "group" ? Grouping::along(choice.group_size) : Grouping::channel();
  Scheme scheme = {.element = &integer_element(choice.bits, choice.symmetric),
                   .scale = parameter(grouping, plain(DType::f16))};
  if (choice.symmetric) return scheme;
  scheme.offset_kind = OffsetKind::zero_point;
  scheme.offset = parameter(grouping, {.element = scheme.element});
  return scheme;
}

constexpr std::array kCommon = {SchemeChoice{.bits = 4, .group_size = 64},
                                SchemeChoice{.bits = 8, .symmetric = true, .granularity = "channel"}};

/// As a matrix, and for those that hold only stacks of them as four.
void run_size(const Shape& matrix, std::string_view only) {
  const Shape experts = {4, matrix[0] / 2, matrix[1] / 2};
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 0.02f);
  std::vector<float> values(static_cast<size_t>(element_count(matrix)));
  for (float& v : values) v = normal(random);
  std::vector<std::byte> weight(2 * values.size());
  from_f32(DType::bf16, values, weight);
  reuse_memory(true);
  const Machine machine = measure_machine(size_t{256} << 20);
  const Machine near = measure_machine(values.size());
  fmt::print(
      "{}: reading memory {:.1f} GB/s, copying it {:.1f} GB/s read and written; as many bytes as there are codes, "
      "from caches: {:.1f}, {:.1f}\n",
      to_string(matrix), machine.read / 1e9, machine.copy / 1e9, near.read / 1e9, near.copy / 1e9);
  fmt::print("{:<78}{:^33}|{:^33}|\n", "GB/s of codes, of all, each in % of reading; of codes, fresh", "pack",
             "unpack");
  for (const Container* container : all_containers()) {
    if (container->pack == nullptr || (!only.empty() && container->name != only)) continue;
    std::set<std::string> seen;
    const std::span<const SchemeChoice> own = container->choices;
    for (const SchemeChoice& choice : own.empty() ? std::span<const SchemeChoice>(kCommon) : own) {
      if (choice.bits != 4 && choice.bits != 8) continue;
      const std::string kind = fmt::format("{} {} {} {} {}", choice.quant_type, choice.bits, choice.symmetric,
                                           choice.granularity, choice.nested_scales);
      if (!seen.insert(kind).second) continue;
      const Scheme scheme = scheme_of(*container, choice, DType::bf16);
      const Shape own_shape = container->fit(scheme, matrix).verdict == Verdict::impossible ? experts : matrix;
      if (container->fit(scheme, own_shape).verdict == Verdict::impossible) continue;
      Work work = {.container = *container,
                   .tensor = {.name = "w.weight", .shape = own_shape, .scheme = scheme, .value_dtype = DType::bf16},
                   .values = container->encode != nullptr
                                 ? container->encode(scheme, own_shape, {DType::bf16, weight})
                                 : encode(scheme, own_shape, {DType::bf16, weight}, RangeRule::minmax)};
      if (!choice.weight_only && container->make_linear != nullptr) work.tensor.linear = container->make_linear(choice);
      report(work, machine);
    }
  }
}

}  // namespace
}  // namespace bitwright

int main(int argc, char** argv) {
  bitwright::set_thread_count(1);
  const std::string only = argc > 1 ? argv[1] : "";
  if (argc > 3) return bitwright::run_size({std::stol(argv[2]), std::stol(argv[3])}, only), 0;
  for (const int64_t rows : {256, 4096}) bitwright::run_size({rows, 4096}, only);
}

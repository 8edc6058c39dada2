// Dequantizing to f32 on one thread: every scheme that containers produce, into memory that was touched before, beside
// what the core can write; and into fresh memory, with the system's page faults.
//   cmake --build --preset release --target decode_bench && build/release/bin/decode_bench [ROWS COLUMNS [LEVEL]]
#include "kernels/decode.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "base/threads.hpp"
#include "benchmarks/memory.hpp"

namespace bitwright {
namespace {

constexpr double kGoal = 0.85;  ///< of the core's write bandwidth

struct Job {
  std::string name;
  Scheme scheme;
};

Scheme element(const char* name) { return {.element = find_element(name)}; }

Scheme scaled(const char* name, const Grouping& grouping, Scheme scale) {
  Scheme scheme = element(name);
  scheme.scale = parameter(grouping, std::move(scale));
  return scheme;
}

Scheme with_offset(Scheme scheme, OffsetKind kind, Scheme offset) {
  scheme.offset_kind = kind;
  scheme.offset = parameter(scheme.scale->grouping, std::move(offset));
  return scheme;
}

std::vector<Job> jobs() {
  std::vector<Job> all;
  const Grouping g64 = Grouping::along(64), g128 = Grouping::along(128), flat64 = Grouping::flat(64);
  const Grouping channel = Grouping::channel(), columns32 = Grouping::along(32, -2);
  const Grouping columns64 = Grouping::along(64, -2);
  Grouping interleaved = flat64, index = g128;
  interleaved.interleaved = true;
  index.kind = Grouping::Kind::index;
  const Grouping blocks = {.kind = Grouping::Kind::block, .block_rows = 128, .block_columns = 128};
  for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
    const std::string type = " " + std::string(info(dtype).name);
    const Scheme s = plain(dtype);
    all.push_back({"int4 group 64" + type, scaled("int4", g64, s)});
    all.push_back({"int8 row" + type, scaled("int8", channel, s)});
    all.push_back({"GPTQ/AWQ 4 bits group 128" + type,
                   with_offset(scaled("uint4", g128, s), OffsetKind::zero_point, element("uint4"))});
    all.push_back({"GPTQ 8 bits group 128" + type,
                   with_offset(scaled("uint8", g128, s), OffsetKind::zero_point, element("uint8"))});
    all.push_back({"HQQ 4 bits axis 1" + type, with_offset(scaled("uint4", flat64, s), OffsetKind::float_zero, s)});
    all.push_back({"HQQ 8 bits axis 1" + type, with_offset(scaled("uint8", flat64, s), OffsetKind::float_zero, s)});
    all.push_back(
        {"HQQ 4 bits axis 0" + type, with_offset(scaled("uint4", interleaved, s), OffsetKind::float_zero, s)});
    all.push_back({"MLX 4 bits group 64" + type, with_offset(scaled("uint4", g64, s), OffsetKind::bias, s)});
    all.push_back({"MLX 8 bits group 64" + type, with_offset(scaled("uint8", g64, s), OffsetKind::bias, s)});
    all.push_back({"Quanto qint4 axis 0" + type, with_offset(scaled("uint4", flat64, s), OffsetKind::minimum, s)});
    all.push_back({"Quanto qint4 axis -1" + type, with_offset(scaled("uint4", columns64, s), OffsetKind::minimum, s)});
    all.push_back({"GPTQ act-order group 128" + type,
                   with_offset(scaled("uint4", index, s), OffsetKind::zero_point, element("uint4"))});
  }
  Scheme nested = scaled("dynamic8", Grouping::flat(256), plain(DType::f32));
  nested.offset_kind = OffsetKind::bias;
  nested.offset = parameter(Grouping::tensor(), plain(DType::f32));
  Scheme llm_int8 = scaled("int8", channel, plain(DType::f32));
  llm_int8.factor = 1.0f / 127;
  Scheme divided = scaled("float8_e4m3", Grouping::tensor(), plain(DType::f32));
  divided.scale->divides = true;
  const Scheme e4m3_under_f32 = scaled("float8_e4m3", Grouping::tensor(), plain(DType::f32));
  const Grouping g16 = Grouping::along(16), g32 = Grouping::along(32);
  all.insert(all.end(), {{"nf4 block 64", scaled("nf4", flat64, plain(DType::f32))},
                         {"fp4 block 64", scaled("fp4", flat64, plain(DType::f32))},
                         {"nf4 block 64, nested", scaled("nf4", flat64, nested)},
                         {"LLM.int8", llm_int8},
                         {"fp8 tensor", scaled("float8_e4m3", Grouping::tensor(), plain(DType::f32))},
                         {"fp8 row, bf16 scales", scaled("float8_e4m3", channel, plain(DType::bf16))},
                         {"fp8 e5m2 row", scaled("float8_e5m2", channel, plain(DType::f32))},
                         {"fp8 128x128", scaled("float8_e4m3", blocks, plain(DType::f32))},
                         {"mxfp8", scaled("float8_e4m3", g32, plain(DType::f8_e8m0))},
                         {"mxfp4", scaled("float4_e2m1", g32, plain(DType::f8_e8m0))},
                         {"mxfp4 of gpt-oss", scaled("float4_e2m1", columns32, plain(DType::f8_e8m0))},
                         {"nvfp4, MLX", scaled("float4_e2m1", g16, plain(DType::f8_e4m3))},
                         {"nvfp4, ModelOpt", scaled("float4_e2m1", g16, e4m3_under_f32)},
                         {"nvfp4, compressed-tensors", scaled("float4_e2m1", g16, divided)}});
  return all;
}

/// Codes of all kinds under scales of one size.
QuantizedTensor example(const Scheme& scheme, const Shape& shape, std::mt19937& random) {
  const auto count = static_cast<size_t>(element_count(shape));
  const ElementType& type = *scheme.element;
  QuantizedTensor t = {.scheme = scheme, .shape = shape, .codes = std::vector<std::byte>(count * type.code_bytes())};
  if (type.code_bytes() > 1) {
    std::vector<float> values(count);
    for (float& value : values) value = 0.001f * static_cast<float>(1 + random() % 32);
    from_f32(*dtype_of(type), values, t.codes);
  } else if (type.name == "float8_e8m0") {
    for (std::byte& code : t.codes) code = static_cast<std::byte>(118 + random() % 4);
  } else {
    for (std::byte& code : t.codes) code = static_cast<std::byte>(random() % (1u << type.bits));
  }
  const auto stored = [&](const std::optional<Parameter>& p) -> std::shared_ptr<const QuantizedTensor> {
    if (!p) return nullptr;
    return std::make_shared<const QuantizedTensor>(example(*p->scheme, parameter_shape(p->grouping, shape), random));
  };
  t.scale = stored(scheme.scale);
  t.offset = stored(scheme.offset);
  if (scheme.scale && scheme.scale->grouping.kind == Grouping::Kind::index) {
    for (int64_t k = 0; k < shape.back(); ++k)
      t.group_index.push_back(static_cast<int32_t>(k / scheme.scale->grouping.size));
    std::ranges::shuffle(t.group_index, random);
  }
  return t;
}

void run(int64_t rows, int64_t columns, const KernelLevel& level) {
  const Shape shape = {rows, columns};
  std::vector<float> out(static_cast<size_t>(rows * columns));
  const size_t bytes = out.size() * sizeof(float);
  const double limit = measure_memory(kLimitBytes).write;
  fmt::print("f32 written, best of several runs, {} kernels; the goal is {:.0f} % of the writing\n", level.name,
             100 * kGoal);
  std::mt19937 random(1);
  for (const Job& job : jobs()) {
    const QuantizedTensor t = example(job.scheme, shape, random);
    const double warm = best_seconds([&] { decode(t, out, level); }, 5);
    const double fresh = best_seconds(
        [&] {
          std::vector<float> all(out.size());
          decode(t, all, level);
        },
        2);
    const double rate = gigabytes_a_second(bytes, warm);
    fmt::print("{:<36} {:6.3f} ns a weight {:6.2f} GB/s, {:4.0f} %{} fresh memory {:5.2f} GB/s\n", job.name,
               1e9 * warm / static_cast<double>(out.size()), rate, 100 * rate / limit,
               rate < kGoal * limit ? " (short)" : "        ", gigabytes_a_second(bytes, fresh));
  }
}

}  // namespace
}  // namespace bitwright

int main(int argc, char** argv) {
  bitwright::set_thread_count(1);
  bitwright::run(argc > 2 ? std::stol(argv[1]) : 4096, argc > 2 ? std::stol(argv[2]) : 8192,
                 bitwright::find_kernel_level(argc > 3 ? argv[3] : ""));
}

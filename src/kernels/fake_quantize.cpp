#include "kernels/fake_quantize.hpp"

#include <algorithm>
#include <cmath>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

constexpr size_t kPiece = size_t{1} << 16;  ///< elements of one task; sums over longer groups are merged in doubles

float load(DType dtype, const std::byte* from, size_t i) {
  const size_t bytes = size_bytes(dtype);
  float value = 0;
  to_f32(dtype, {from + i * bytes, bytes}, std::span(&value, 1));
  return value;
}

void store(DType dtype, float value, std::byte* to, size_t i) {
  const size_t bytes = size_bytes(dtype);
  from_f32(dtype, std::span(&value, 1), {to + i * bytes, bytes});
}

/// One group's grid.
struct Grid {
  float scale, inverse, lowest, highest;
  Grid(const FakeGroups& q, size_t g) : scale(q.scales[g]), inverse(scale == 0 ? 0 : 1 / scale) {
    const float zero = q.zeros == nullptr ? 0 : q.zeros[g];
    lowest = q.lowest - zero;
    highest = q.highest - zero;
  }
};

/// use(part, first element, first group) for stretches of equally long groups, or pieces of one long group. What of a
/// group several pieces share is their business.
template <class Use>
void for_each_piece(const FakeTensor& t, Use use) {
  const GroupRuns& runs = t.runs;
  const size_t bytes = size_bytes(t.values.dtype);
  const auto part = [&](size_t first, size_t group, size_t size, size_t groups) {
    use(FakeGroups{.dtype = t.values.dtype,
                   .values = &t.values.bytes[first * bytes],
                   .size = size,
                   .groups = groups,
                   .scales = &t.scales[group],
                   .zeros = t.zeros.empty() ? nullptr : &t.zeros[group],
                   .lowest = t.lowest,
                   .highest = t.highest},
        first, group);
  };
  if (static_cast<size_t>(runs.size) > kPiece) {  // each group by itself
    for (int64_t g = 0; g < runs.groups; ++g) {
      const auto first = static_cast<size_t>(runs.start(g));
      parallel_ranges(static_cast<size_t>(runs.end_of(g)) - first, kPiece,
                      [&](size_t begin, size_t end) { part(first + begin, static_cast<size_t>(g), end - begin, 1); });
    }
    return;
  }
  const size_t grain = std::max<size_t>(kPiece / static_cast<size_t>(runs.size), 1);
  parallel_ranges(static_cast<size_t>(runs.groups), grain, [&](size_t begin, size_t end) {
    for_each_stretch(runs, static_cast<int64_t>(begin), static_cast<int64_t>(end),
                     [&](size_t g, size_t first, size_t size, size_t groups) {
                       part(static_cast<size_t>(runs.start(static_cast<int64_t>(begin))) + first, begin + g, size,
                            groups);
                     });
  });
}

void check(const FakeTensor& t) {
  BW_ASSERT(t.scales.size() == static_cast<size_t>(t.runs.groups));
  BW_ASSERT(t.zeros.empty() || t.zeros.size() == t.scales.size());
  BW_ASSERT(t.values.count() == static_cast<size_t>(t.runs.end_of(t.runs.groups - 1)));
}

}  // namespace

float merge_lanes(float (&lanes)[kPanel]) {
  for (size_t half = kPanel / 2; half > 0; half /= 2)
    for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

void fake_quantize(const FakeTensor& t, DType type, std::byte* out, const KernelLevel& level) {
  check(t);
  for_each_piece(t, [&](const FakeGroups& q, size_t first, size_t) {
    level.fake_quantize_groups(q, type, out + first * size_bytes(type));
  });
}

FakeGradients fake_quantize_backward(const FakeTensor& t, WeightView gradient, std::byte* out,
                                     const KernelLevel& level) {
  check(t);
  BW_ASSERT(gradient.count() == t.values.count());
  const auto groups = static_cast<size_t>(t.runs.groups);
  const size_t pieces = (static_cast<size_t>(std::min(t.runs.size, t.runs.line)) - 1) / kPiece + 1;  // a group
  std::vector<float> scale(groups * pieces), clipped(groups * pieces);
  for_each_piece(t, [&](const FakeGroups& q, size_t first, size_t group) {
    const size_t piece =
        pieces == 1 ? 0 : (first - static_cast<size_t>(t.runs.start(static_cast<int64_t>(group)))) / kPiece;
    const size_t sum = group * pieces + piece;
    level.fake_quantize_gradients(q, gradient.dtype, &gradient.bytes[first * size_bytes(gradient.dtype)],
                                  out + first * size_bytes(t.values.dtype), &scale[sum], &clipped[sum]);
  });
  FakeGradients result = {.scale = std::vector<float>(groups), .zero = std::vector<float>(groups)};
  for (size_t g = 0; g < groups; ++g) {
    double scale_sum = 0, clipped_sum = 0;
    for (size_t i = g * pieces; i < (g + 1) * pieces; ++i) {
      scale_sum += static_cast<double>(scale[i]);
      clipped_sum += static_cast<double>(clipped[i]);
    }
    result.scale[g] = static_cast<float>(scale_sum);
    result.zero[g] = static_cast<float>(clipped_sum) * -t.scales[g];
  }
  return result;
}

void fake_quantize_groups(const FakeGroups& q, DType type, std::byte* out) {
  for (size_t g = 0; g < q.groups; ++g) {
    const Grid grid(q, g);
    for (size_t i = g * q.size; i < (g + 1) * q.size; ++i) {
      const float rounded = std::nearbyint(load(q.dtype, q.values, i) * grid.inverse);
      store(type, std::min(grid.highest, std::max(grid.lowest, rounded)) * grid.scale, out, i);
    }
  }
}

void fake_quantize_gradients(const FakeGroups& q, DType type, const std::byte* gradient, std::byte* out,
                             float* scale_sums, float* clipped_sums) {
  for (size_t g = 0; g < q.groups; ++g) {
    const Grid grid(q, g);
    float scale[kPanel] = {}, clipped[kPanel] = {};
    for (size_t j = 0; j < q.size; ++j) {
      const size_t i = g * q.size + j;
      const float quotient = load(q.dtype, q.values, i) * grid.inverse, rounded = std::nearbyint(quotient);
      const float code = std::min(grid.highest, std::max(grid.lowest, rounded)), slope = load(type, gradient, i);
      const bool inside = rounded >= grid.lowest && rounded <= grid.highest;
      scale[j % kPanel] = std::fma(slope, inside ? code - quotient : code, scale[j % kPanel]);
      clipped[j % kPanel] += inside ? 0 : slope;
      store(q.dtype, inside ? slope : 0, out, i);
    }
    scale_sums[g] = merge_lanes(scale);
    clipped_sums[g] = merge_lanes(clipped);
  }
}

}  // namespace bitwright

#include "kernels/dequantize_matmul.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "kernels/dequantize_matmul_amx.hpp"
#include "kernels/rows.hpp"

namespace bitwright {
namespace {

size_t rows_of(const DequantizedProduct& p) { return static_cast<size_t>(p.weight.shape()[0]); }
size_t columns_of(const DequantizedProduct& p) { return static_cast<size_t>(p.weight.shape()[1]); }

size_t panels_of(size_t columns) { return (columns + kPanel - 1) / kPanel; }

void load(const DequantizedProduct& p, size_t first, std::span<float> out) {
  const size_t bytes = size_bytes(p.type);
  to_f32(p.type, {p.in + first * bytes, out.size() * bytes}, out);
}
void store(const DequantizedProduct& p, size_t at, float value) {
  if (p.type == DType::f32) {
    std::memcpy(p.out + at * sizeof value, &value, sizeof value);
  } else {
    const uint16_t half = f32_to_bf16(value);
    std::memcpy(p.out + at * sizeof half, &half, sizeof half);
  }
}

bool always(DType type) { return type == DType::f32 || type == DType::bf16; }

// The vector units: W Xᵀ and dY W, the second factor in panels.

constexpr size_t kRows = 32;      ///< of W, decoded at a time in forward
constexpr size_t kColumns = 256;  ///< of W, a task of backward
constexpr size_t kDepth = 64;     ///< rows of W, decoded at a time there

/// Tokens as columns of panels: [panels][columns][kPanel].
std::vector<float> token_panels(const DequantizedProduct& p) {
  const size_t columns = columns_of(p), panels = panels_of(p.tokens);
  std::vector<float> packed(panels * columns * kPanel);
  parallel_for(panels, [&](size_t panel) {
    std::vector<float> row(columns);
    float* const to = &packed[panel * columns * kPanel];
    for (size_t lane = 0; lane < std::min(kPanel, p.tokens - panel * kPanel); ++lane) {
      load(p, (panel * kPanel + lane) * columns, row);
      for (size_t k = 0; k < columns; ++k) to[k * kPanel + lane] = row[k];
    }
  });
  return packed;
}

void forward_vector(const DequantizedProduct& p) {
  const KernelLevel& level = active_kernel_level();
  const CompactDecoder decoder(p.weight, level);
  const size_t rows = rows_of(p), columns = columns_of(p);
  const std::vector<float> tokens = token_panels(p);
  parallel_ranges(rows, kRows, [&](size_t begin, size_t end) {
    const size_t count = end - begin;
    std::vector<float> tile(count * columns), y(count * p.tokens);
    decoder.decode(static_cast<int64_t>(begin * columns), tile);
    level.multiply_tile({.x = tile.data(),
                         .x_stride = columns,
                         .w = tokens.data(),
                         .w_stride = columns * kPanel,
                         .y = y.data(),
                         .y_stride = p.tokens,
                         .rows = count,
                         .depth = columns,
                         .columns = p.tokens,
                         .add = false});
    for (size_t m = 0; m < p.tokens; ++m)
      for (size_t r = 0; r < count; ++r) store(p, m * rows + begin + r, y[r * p.tokens + m]);
  });
}

void backward_vector(const DequantizedProduct& p) {
  const KernelLevel& level = active_kernel_level();
  const CompactDecoder decoder(p.weight, level);
  const size_t rows = rows_of(p), columns = columns_of(p);
  std::vector<float> dy(p.tokens * rows);
  parallel_ranges(p.tokens, 1, [&](size_t m, size_t) { load(p, m * rows, std::span(dy).subspan(m * rows, rows)); });
  parallel_ranges(columns, kColumns, [&](size_t begin, size_t end) {
    const size_t count = end - begin, panels = panels_of(count);
    std::vector<float> part(count), tile(panels * kDepth * kPanel), dx(p.tokens * count);
    for (size_t first = 0; first < rows; first += kDepth) {
      const size_t depth = std::min(kDepth, rows - first);
      for (size_t r = 0; r < depth; ++r) {
        decoder.decode(static_cast<int64_t>((first + r) * columns + begin), part);
        for (size_t c = 0; c < count; c += kPanel)
          std::copy_n(&part[c], std::min(kPanel, count - c), &tile[(c / kPanel * kDepth + r) * kPanel]);
      }
      level.multiply_tile({.x = &dy[first],
                           .x_stride = rows,
                           .w = tile.data(),
                           .w_stride = kDepth * kPanel,
                           .y = dx.data(),
                           .y_stride = count,
                           .rows = p.tokens,
                           .depth = depth,
                           .columns = count,
                           .add = first > 0});
    }
    for (size_t m = 0; m < p.tokens; ++m)
      for (size_t c = 0; c < count; ++c) store(p, m * columns + begin + c, dx[m * count + c]);
  });
}

// The definition: exact products of what is stored, summed in doubles.

void forward_definition(const DequantizedProduct& p) {
  const CompactDecoder decoder(p.weight, scalar_kernel_level);
  const size_t rows = rows_of(p), columns = columns_of(p);
  std::vector<float> x(p.tokens * columns), w(columns);
  load(p, 0, x);
  for (size_t r = 0; r < rows; ++r) {
    decoder.decode(static_cast<int64_t>(r * columns), w);
    for (size_t m = 0; m < p.tokens; ++m) {
      double sum = 0;
      for (size_t k = 0; k < columns; ++k) sum += static_cast<double>(x[m * columns + k]) * static_cast<double>(w[k]);
      store(p, m * rows + r, static_cast<float>(sum));
    }
  }
}

void backward_definition(const DequantizedProduct& p) {
  const CompactDecoder decoder(p.weight, scalar_kernel_level);
  const size_t rows = rows_of(p), columns = columns_of(p);
  std::vector<float> dy(p.tokens * rows), w(columns);
  std::vector<double> dx(p.tokens * columns);
  load(p, 0, dy);
  for (size_t r = 0; r < rows; ++r) {
    decoder.decode(static_cast<int64_t>(r * columns), w);
    for (size_t m = 0; m < p.tokens; ++m)
      for (size_t k = 0; k < columns; ++k)
        dx[m * columns + k] += static_cast<double>(dy[m * rows + r]) * static_cast<double>(w[k]);
  }
  for (size_t i = 0; i < dx.size(); ++i) store(p, i, static_cast<float>(dx[i]));
}

}  // namespace

std::span<const DequantizeMatmul> dequantize_matmuls() {
  static const std::array<DequantizeMatmul, 3> table = {
      amx_dequantize_matmul, DequantizeMatmul{"vector", always, forward_vector, backward_vector},
      DequantizeMatmul{"definition", always, forward_definition, backward_definition}};
  return table;
}

const DequantizeMatmul& dequantize_matmul_for(DType type) {
  const std::span<const DequantizeMatmul> all = dequantize_matmuls();
  const bool scalar = active_kernel_level().name == scalar_kernel_level.name;
  const auto found =
      std::ranges::find_if(all.subspan(scalar ? 1 : 0), [&](const auto& row) { return row.usable(type); });
  BW_ASSERT(found != all.end());
  return *found;
}

}  // namespace bitwright

#include "kernels/matmul.hpp"

#include <algorithm>
#include <array>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

constexpr size_t kDepth = 256;             // columns at a time: kWide panels of them as f32 are 32 KiB, inside L1
constexpr size_t kWide = 2;                // panels a tile
constexpr size_t kWork = size_t{1} << 17;  // products a task, at least: less is not worth waking a thread
constexpr size_t kMostPanels = 16;         // panels a task that has enough to do: they all read one block of x from L2
constexpr size_t kTasks = 16;              // enough to keep cores busy

void expand(const PackedMatrix& w, size_t panel, size_t k_begin, size_t k_end, float* out, const KernelLevel& level) {
  if (w.kind != CodeKind::reference) return level.expand(w, panel, k_begin, k_end, out);
  std::array<float, kDepth> row;
  const size_t depth = k_end - k_begin;
  BW_ASSERT(depth <= kDepth);
  for (size_t lane = 0; lane < kPanel; ++lane) {
    const size_t n = panel * kPanel + lane;
    if (n < w.rows)
      w.decoder->decode(static_cast<int64_t>(n * w.columns + k_begin), std::span(row).first(depth));
    else
      row.fill(0);
    for (size_t k = 0; k < depth; ++k) out[k * kPanel + lane] = row[k];
  }
}

/// The columns of y that belong to panels [panel_begin, panel_end).
void multiply_panels(const float* x, size_t m, const PackedMatrix& w, size_t panel_begin, size_t panel_end, float* y,
                     const KernelLevel& level) {
  alignas(64) std::array<float, kWide * kDepth * kPanel> scratch;
  for (size_t k = 0; k < w.columns; k += kDepth) {
    const size_t depth = std::min(kDepth, w.columns - k);
    for (size_t p = panel_begin; p < panel_end; p += kWide) {
      const size_t n = p * kPanel;
      Tile tile = {.x = x + k,
                   .x_stride = w.columns,
                   .w = reinterpret_cast<const float*>(w.panel(p)) + k * kPanel,
                   .w_stride = w.columns * kPanel,
                   .y = y + n,
                   .y_stride = w.rows,
                   .rows = m,
                   .depth = depth,
                   .columns = std::min(w.rows - n, std::min(kWide, panel_end - p) * kPanel),
                   .add = k > 0};
      if (w.kind != CodeKind::f32) {
        tile.w = scratch.data();
        tile.w_stride = kDepth * kPanel;
        for (size_t i = 0; i * kPanel < tile.columns; ++i)
          expand(w, p + i, k, k + depth, scratch.data() + i * tile.w_stride, level);
      }
      level.multiply_tile(tile);
    }
  }
}

size_t panels_a_task(const PackedMatrix& w, size_t m) {
  const size_t enough = (kWork + m * w.columns * kPanel - 1) / (m * w.columns * kPanel);
  const size_t even = std::max(enough, std::clamp(w.panels() / kTasks, kWide, kMostPanels));
  return (even + 3) / 4 * 4;
}

}  // namespace

void multiply(const float* x, size_t m, const PackedMatrix& w, float* y, const KernelLevel& level) {
  if (m == 0) return;
  parallel_ranges(w.panels(), panels_a_task(w, m), [&](size_t begin, size_t end) {
    if (m == 1 && w.kind != CodeKind::reference)
      level.multiply_vector(w, begin, end, x, y);
    else
      multiply_panels(x, m, w, begin, end, y, level);
  });
}

void expand_row(const PackedMatrix& w, size_t row, std::span<float> out, const KernelLevel& level) {
  BW_ASSERT(row < w.rows && out.size() == w.columns);
  alignas(64) std::array<float, kDepth * kPanel> scratch;
  for (size_t k = 0; k < w.columns; k += kDepth) {
    const size_t depth = std::min(kDepth, w.columns - k);
    expand(w, row / kPanel, k, k + depth, scratch.data(), level);
    for (size_t i = 0; i < depth; ++i) out[k + i] = scratch[i * kPanel + row % kPanel];
  }
}

}  // namespace bitwright

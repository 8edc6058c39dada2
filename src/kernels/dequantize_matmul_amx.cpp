#include "kernels/dequantize_matmul_amx.hpp"

#if defined(__x86_64__) && defined(__linux__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593: in its own header
#endif

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "base/threads.hpp"
#include "kernels/kernel_level.hpp"

#define BW_AMX [[gnu::target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")]]

// A tile is 16 rows of 64 bytes: 16 x 32 bf16 of the left factor; of the right one 16 pairs of rows, each 16 columns of
// two bf16; 16 x 16 f32 sums. Four sums at a time, two left and two right tiles:
//
//   sum[i][j] += left[i] x right[j]
//
// forward is W Xᵀ (its sums are written transposed), so that W's rows need no shuffling; backward is dY W, for which
// neighbouring rows of W are laid together as they are rounded.

namespace bitwright {
namespace {

constexpr size_t kSide = 16;              ///< of a tile of sums
constexpr size_t kPair = 2;               ///< tiles of sums along each axis
constexpr size_t kBlock = kSide * kPair;  ///< rows and columns of sums together; also the depth of one tile product
constexpr size_t kColumns = 256;          ///< of W, a task of backward
constexpr size_t kDepth = 256;            ///< rows of W, decoded at a time there

size_t padded(size_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

/// All eight tiles whole: what is ragged is padded with zeros.
class Tiles {
 public:
  BW_AMX Tiles() {
    Config config;
    std::fill_n(config.row_bytes, 8, uint16_t{64});
    std::fill_n(config.rows, 8, uint8_t{16});
    _tile_loadconfig(&config);
  }
  BW_AMX ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

/// [kBlock, kBlock] sums: of left [kBlock rows][depth] bf16 and right tiles, which follow each other.
/// left_stride, right_stride, sum_stride: bytes from a row to the next; right_next: bytes from tile j to j + 1, and
/// right_step: from one step of the depth to the next.
struct Block {
  const std::byte *left, *right;
  size_t left_stride, right_stride, right_next, right_step;
  size_t steps;  ///< depth / kBlock
  float* sum;
  size_t sum_stride;
  bool add;
};

BW_AMX void multiply_block(const Block& b) {
  float* const lower = b.sum + kSide * b.sum_stride / sizeof(float);
  if (b.add) {
    _tile_loadd(0, b.sum, b.sum_stride);
    _tile_loadd(1, b.sum + kSide, b.sum_stride);
    _tile_loadd(2, lower, b.sum_stride);
    _tile_loadd(3, lower + kSide, b.sum_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (size_t step = 0; step < b.steps; ++step) {
    const std::byte* const left = b.left + step * 2 * kBlock;
    const std::byte* const right = b.right + step * b.right_step;
    _tile_loadd(4, left, b.left_stride);
    _tile_loadd(5, left + kSide * b.left_stride, b.left_stride);
    _tile_loadd(6, right, b.right_stride);
    _tile_loadd(7, right + b.right_next, b.right_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, b.sum, b.sum_stride);
  _tile_stored(1, b.sum + kSide, b.sum_stride);
  _tile_stored(2, lower, b.sum_stride);
  _tile_stored(3, lower + kSide, b.sum_stride);
}

BW_AMX __m256i bits(__m256bh values) { return reinterpret_cast<__m256i>(values); }

/// Decodes ranges of rows, rounded to bf16.
class RoundedDecoder {
 public:
  explicit RoundedDecoder(const CompactTensor& weight);
  /// out: room for a multiple of 32, as scratch is; what is beyond `count` is 0.
  BW_AMX void decode(size_t row, size_t first_column, size_t count, float* scratch, uint16_t* out) const;

 private:
  BW_AMX void decode_nibbles(size_t begin, size_t count, uint16_t* out) const;
  /// What the 16 codes of group g mean.
  BW_AMX __m512i group_values(size_t g) const;

  const CompactTensor& weight_;
  CompactDecoder decoder_;
  std::optional<DecodedGroups> groups_;  ///< of 4-bit codes whose groups, and rows, are whole vectors
};

RoundedDecoder::RoundedDecoder(const CompactTensor& weight) : weight_(weight), decoder_(weight) {
  if (weight.scheme().element->bits != 4 || weight.shape()[1] % kBlock != 0) return;
  groups_ = decoder_.packed_groups();
  if (groups_ && (groups_->lines.size % kBlock != 0 || groups_->lines.line % groups_->lines.size != 0)) groups_.reset();
}

BW_AMX __m512i RoundedDecoder::group_values(size_t g) const {
  using Form = GroupDecoding::Form;
  const GroupDecoding& d = *groups_->decoding;
  const __m512 s = _mm512_set1_ps(groups_->scales[g]), factor = _mm512_set1_ps(d.factor);
  const __m512 z = _mm512_set1_ps(groups_->offsets == nullptr ? d.offset : groups_->offsets[g]);
  __m512 e = _mm512_loadu_ps(d.values.data());
  if (d.form == Form::subtract_scale) e = _mm512_sub_ps(e, z);
  e = _mm512_mul_ps(d.form == Form::divide ? _mm512_div_ps(e, s) : _mm512_mul_ps(e, s), factor);
  if (d.form == Form::scale_add) e = _mm512_add_ps(e, z);
  if (d.form == Form::scale_subtract) e = _mm512_sub_ps(e, z);
  return _mm512_castsi256_si512(bits(_mm512_cvtneps_pbh(e)));  // codes never select from the upper half
}

/// begin and count: whole vectors of 32.
BW_AMX void RoundedDecoder::decode_nibbles(size_t begin, size_t count, uint16_t* out) const {
  const auto size = static_cast<size_t>(groups_->lines.size), line = static_cast<size_t>(groups_->lines.line);
  const std::byte* const codes = weight_.codes().data();
  const __m512i low_bits = _mm512_set1_epi32(0x000f000f);
  for (size_t at = begin; at < begin + count;) {
    const auto first = static_cast<size_t>(groups_->lines.first(static_cast<int64_t>(at / line)));
    const __m512i values = group_values(first + at % line / size);
    const size_t end = std::min(begin + count, at + size - at % line % size);
    for (; at < end; at += kBlock, out += kBlock) {
      const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + at / 2)));
      const __m512i each = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12)), low_bits);
      _mm512_storeu_si512(out, _mm512_permutexvar_epi16(each, values));
    }
  }
}

BW_AMX void RoundedDecoder::decode(size_t row, size_t first_column, size_t count, float* scratch, uint16_t* out) const {
  const size_t begin = row * static_cast<size_t>(weight_.shape()[1]) + first_column;
  if (groups_) return decode_nibbles(begin, count, out);
  decoder_.decode(static_cast<int64_t>(begin), {scratch, count});
  std::fill(scratch + count, scratch + padded(count), 0.0f);
  for (size_t i = 0; i < padded(count); i += kSide)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bits(_mm512_cvtneps_pbh(_mm512_loadu_ps(scratch + i))));
}

/// out[2 i] = a[i], out[2 i + 1] = b[i]. count: a multiple of 32.
BW_AMX void interleave(const uint16_t* a, const uint16_t* b, size_t count, uint16_t* out) {
  for (size_t i = 0; i < count; i += kSide) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i)));
    _mm512_storeu_si512(out + 2 * i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

/// Memory that tiles load from, not cleared; rows begin at cache lines where their length allows it.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : data_(static_cast<T*>(::operator new (count * sizeof(T), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete (data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

/// Tokens as right tiles of forward: [tokens / 16][columns / 32] tiles of 16 pairs of columns x 16 tokens.
void pack_tokens(const DequantizedProduct& p, size_t columns, uint32_t* out) {
  const size_t depth = padded(columns), blocks = padded(p.tokens) / kSide;
  parallel_for(blocks, [&](size_t block) {
    uint32_t* const to = out + block * kSide * depth / 2;
    std::fill_n(to, kSide * depth / 2, 0u);
    for (size_t lane = 0; lane < kSide && block * kSide + lane < p.tokens; ++lane) {
      const std::byte* const row = p.in + (block * kSide + lane) * columns * 2;
      for (size_t pair = 0; pair < (columns + 1) / 2; ++pair)
        std::memcpy(&to[pair * kSide + lane], row + pair * 4, std::min<size_t>(4, columns * 2 - pair * 4));
    }
  });
}

/// y[m, n] = sums[n, m], rounded. count: columns of y.
BW_AMX void store_transposed(const float* sums, size_t stride, size_t tokens, size_t count, uint16_t* y,
                             size_t y_stride) {
  const __m512i rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(static_cast<int>(stride)));
  for (size_t n = 0; n < count; n += kSide) {
    const size_t left = std::min(kSide, count - n);
    const auto mask = static_cast<__mmask16>((1u << left) - 1);
    for (size_t m = 0; m < tokens; ++m) {
      const __m512 column = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, rows, sums + n * stride + m, 4);
      _mm256_mask_storeu_epi16(y + m * y_stride + n, mask, bits(_mm512_cvtneps_pbh(column)));
    }
  }
}

BW_AMX void forward_rows(const DequantizedProduct& p, const RoundedDecoder& decoder, const uint32_t* tokens,
                         size_t begin, size_t end) {
  const size_t rows = static_cast<size_t>(p.weight.shape()[0]), columns = static_cast<size_t>(p.weight.shape()[1]);
  const size_t depth = padded(columns), wide = padded(p.tokens);
  const Buffer<float> row(depth), sums(kBlock * wide);
  const Buffer<uint16_t> tile(kBlock * depth);
  for (size_t r = begin; r < end; ++r) decoder.decode(r, 0, columns, row.data(), tile.data() + (r - begin) * depth);
  std::memset(tile.data() + (end - begin) * depth, 0, (begin + kBlock - end) * depth * 2);
  const Tiles tiles;
  for (size_t m = 0; m < wide; m += kBlock)
    multiply_block({.left = reinterpret_cast<const std::byte*>(tile.data()),
                    .right = reinterpret_cast<const std::byte*>(tokens + m * depth / 2),
                    .left_stride = depth * 2,
                    .right_stride = 64,
                    .right_next = kSide * depth * 2,
                    .right_step = 1024,
                    .steps = depth / kBlock,
                    .sum = sums.data() + m,
                    .sum_stride = wide * sizeof(float),
                    .add = false});
  store_transposed(sums.data(), wide, p.tokens, end - begin, reinterpret_cast<uint16_t*>(p.out) + begin, rows);
}

void forward_amx(const DequantizedProduct& p) {
  if (p.tokens == 0) return;
  const size_t rows = static_cast<size_t>(p.weight.shape()[0]), columns = static_cast<size_t>(p.weight.shape()[1]);
  const RoundedDecoder decoder(p.weight);
  const Buffer<uint32_t> tokens(padded(p.tokens) * padded(columns) / 2);
  pack_tokens(p, columns, tokens.data());
  parallel_ranges(rows, kBlock, [&](size_t begin, size_t end) { forward_rows(p, decoder, tokens.data(), begin, end); });
}

/// dY with whole tiles: [padded tokens][padded rows].
void pad(const DequantizedProduct& p, size_t rows, uint16_t* out) {
  const size_t wide = padded(rows);
  parallel_for(padded(p.tokens), [&](size_t m) {
    uint16_t* const to = out + m * wide;
    if (m < p.tokens) std::memcpy(to, p.in + m * rows * 2, rows * 2);
    std::fill(to + (m < p.tokens ? rows : 0), to + wide, uint16_t{0});
  });
}

/// Pairs of rows [begin, end) of some columns of W as right tiles of backward: [pairs][width][2]. Rows from `end` up to
/// whole tiles are zeros.
BW_AMX void decode_pairs(const RoundedDecoder& decoder, size_t first_column, size_t count, size_t begin, size_t end,
                         float* scratch, uint16_t* rows, uint16_t* out) {
  const size_t width = padded(count);
  uint16_t *const a = rows, *const b = rows + width;
  for (size_t r = begin; r < begin + padded(end - begin); r += 2) {
    for (const size_t i : {r, r + 1}) {
      uint16_t* const to = i == r ? a : b;
      if (i < end) {
        decoder.decode(i, first_column, count, scratch, to);
      } else {
        std::fill_n(to, width, uint16_t{0});
      }
    }
    interleave(a, b, width, out + (r - begin) * width);
  }
}

BW_AMX void backward_columns(const DequantizedProduct& p, const RoundedDecoder& decoder, const uint16_t* dy,
                             size_t begin, size_t end) {
  const size_t rows = static_cast<size_t>(p.weight.shape()[0]), columns = static_cast<size_t>(p.weight.shape()[1]);
  const size_t count = end - begin, width = padded(count), tall = padded(p.tokens);
  const Buffer<float> scratch(width), sums(tall * width);
  const Buffer<uint16_t> pair(2 * width), tile(kDepth * width);
  const Tiles tiles;
  for (size_t first = 0; first < rows; first += kDepth) {
    const size_t last = std::min(rows, first + kDepth);
    decode_pairs(decoder, begin, count, first, last, scratch.data(), pair.data(), tile.data());
    for (size_t m = 0; m < tall; m += kBlock)
      for (size_t c = 0; c < width; c += kBlock)
        multiply_block({.left = reinterpret_cast<const std::byte*>(dy + m * padded(rows) + first),
                        .right = reinterpret_cast<const std::byte*>(tile.data() + 2 * c),
                        .left_stride = padded(rows) * 2,
                        .right_stride = width * 4,
                        .right_next = kSide * 4,
                        .right_step = kSide * width * 4,
                        .steps = padded(last - first) / kBlock,
                        .sum = sums.data() + m * width + c,
                        .sum_stride = width * sizeof(float),
                        .add = first > 0});
  }
  auto* const dx = reinterpret_cast<uint16_t*>(p.out);
  for (size_t m = 0; m < p.tokens; ++m)
    for (size_t c = 0; c < count; c += kSide) {
      const auto mask = static_cast<__mmask16>((1u << std::min(kSide, count - c)) - 1);
      const __m512 values = _mm512_loadu_ps(sums.data() + m * width + c);
      _mm256_mask_storeu_epi16(dx + m * columns + begin + c, mask, bits(_mm512_cvtneps_pbh(values)));
    }
}

void backward_amx(const DequantizedProduct& p) {
  if (p.tokens == 0) return;
  const size_t rows = static_cast<size_t>(p.weight.shape()[0]), columns = static_cast<size_t>(p.weight.shape()[1]);
  const RoundedDecoder decoder(p.weight);
  const Buffer<uint16_t> dy(padded(p.tokens) * padded(rows));
  pad(p, rows, dy.data());
  parallel_ranges(columns, kColumns,
                  [&](size_t begin, size_t end) { backward_columns(p, decoder, dy.data(), begin, end); });
}

/// The CPU has the instructions, and the system gives this process the tiles' state.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq") || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0)
    return false;
  const bool has_tiles = (d >> 24 & 1) != 0 && (d >> 22 & 1) != 0;  // AMX-TILE, AMX-BF16
  if (!has_tiles || __get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || (a >> 5 & 1) == 0) return false;  // AVX512_BF16
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool usable(DType type) {
  static const bool has = has_amx();
  return has && type == DType::bf16;
}

}  // namespace

const DequantizeMatmul amx_dequantize_matmul = {"amx", usable, forward_amx, backward_amx};

}  // namespace bitwright

#else

namespace bitwright {
const DequantizeMatmul amx_dequantize_matmul = {"amx", [](DType) { return false; }, nullptr, nullptr};
}  // namespace bitwright

#endif

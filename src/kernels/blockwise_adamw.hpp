#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace bitwright {

// AdamW (Loshchilov, Hutter 2019) with moments in floats or in the dynamic 8-bit code of Dettmers et al. (8-bit
// optimizers via block-wise quantization, 2022). No fused multiply-add and no sums: the same bits on every instruction
// set and for any division of the work.

/// The factors of one step.
struct AdamWStep {
  float beta1, beta2;
  float one_less_beta1, one_less_beta2;
  float rate;         ///< lr / (1 - beta1^step)
  float root_factor;  ///< 1 / sqrt(1 - beta2^step)
  float epsilon;
  float decay;  ///< lr * weight_decay
  float gradient_scale;

  /// step counts from 1.
  static AdamWStep make(double lr, double beta1, double beta2, double epsilon, double weight_decay, int64_t step,
                        double gradient_scale = 1);
};

/// Elements that share a scale, counted over the flat array.
constexpr size_t kMomentBlock = 256;
constexpr size_t moment_blocks(size_t count) { return (count + kMomentBlock - 1) / kMomentBlock; }

/// Moments of an array: codes one a byte, scales one a block (its largest magnitude). All zeros: all moments are 0.
struct Moments8 {
  uint8_t *first, *second;
  float *first_scale, *second_scale;

  /// Those of the elements from block `block` on.
  Moments8 from_block(size_t block) const {
    return {first + block * kMomentBlock, second + block * kMomentBlock, first_scale + block, second_scale + block};
  }
};
struct Moments32 {
  float *first, *second;
};

/// change[i] = what the step adds to a weight, weight decay left out, for the gradient in change[i]; moments are
/// brought up to date. Of Moments8 the fresh moments count, before they are rounded.
void adamw_changes(const AdamWStep& step, const Moments32& moments, std::span<float> change);
void adamw_changes(const AdamWStep& step, const Moments8& moments, std::span<float> change);

/// weight[i] += change[i] - decay * weight[i].
void apply_changes(const AdamWStep& step, std::span<const float> change, float* weight);

// One block of at most kMomentBlock values in the dynamic code: the nearest entry of the map times the block's largest
// magnitude, ties to the smaller magnitude. The signed map and its codes are scheme/'s "dynamic8" (127 is 0). The
// unsigned one has twice as many entries a decade; a value above 0 is never rounded to 0, because the root of it is
// what the next update is divided by.
float encode_signed(std::span<const float> values, uint8_t* codes);
float encode_unsigned(std::span<const float> values, uint8_t* codes);
void decode_signed(const uint8_t* codes, float scale, std::span<float> out);
void decode_unsigned(const uint8_t* codes, float scale, std::span<float> out);

}  // namespace bitwright

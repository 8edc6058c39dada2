#pragma once

#include "kernels/attention.hpp"

namespace bitwright {

/// One sequence's queries that read one key-value head. Token t has q + t * q_stride: [heads, head_size], and
/// k + t * kv_stride, v + t * kv_stride: [head_size].
struct Sequence {
  const float *q, *k, *v;
  size_t q_stride, kv_stride;
  size_t tokens, heads, head_size;
};

/// What attend() computes, of a whole sequence and without a cache. out: as q lies. One thread.
void attend_sequence(const Sequence& sequence, const AttentionRule& rule, float* out,
                     const KernelLevel& level = active_kernel_level());

/// dout: the gradient of `out`. dq, dout: as q lies; dk, dv: as k and v lie; each written, not added to. One thread;
/// memory for some rows of scores, never for all.
void attend_sequence_gradient(const Sequence& sequence, const AttentionRule& rule, const float* dout, float* dq,
                              float* dk, float* dv, const KernelLevel& level = active_kernel_level());

}  // namespace bitwright

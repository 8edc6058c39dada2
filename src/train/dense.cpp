#include "train/dense.hpp"

#include <algorithm>
#include <dnnl.hpp>

#include "base/error.hpp"

namespace bitwright::train {
namespace {

using dnnl::memory;

memory::desc describe(const Matrix& m) {
  return {{m.rows, m.columns},
          m.bf16 ? memory::data_type::bf16 : memory::data_type::f32,
          memory::dims{m.row_stride, m.column_stride}};
}

const dnnl::engine& processor() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

memory memory_at(const memory::desc& description, const void* data) {
  return {description, processor(), const_cast<void*>(data)};  // oneDNN has no constant memory
}

}  // namespace

void multiply(const Matrix& a, const Matrix& b, float* out, int64_t stride, bool add, const float* bias) {
  BW_ASSERT(a.columns == b.rows && a.bf16 == b.bf16);
  if (a.rows == 0 || b.columns == 0) return;
  if (a.columns == 0) {
    for (int64_t row = 0; row < a.rows && !add; ++row)
      for (int64_t i = 0; i < b.columns; ++i) out[row * stride + i] = bias != nullptr ? bias[i] : 0;
    return;
  }
  thread_local dnnl::stream stream(processor());
  const memory::desc a_desc = describe(a), b_desc = describe(b);
  const memory::desc out_desc = {{a.rows, b.columns}, memory::data_type::f32, memory::dims{stride, 1}};
  const memory::desc bias_desc = bias == nullptr
                                     ? memory::desc()
                                     : memory::desc({1, b.columns}, memory::data_type::f32, memory::dims{b.columns, 1});
  dnnl::primitive_attr attributes;
  if (add) {
    dnnl::post_ops after;
    after.append_sum(1.0f);
    attributes.set_post_ops(after);
  }
#if DNNL_VERSION_MAJOR >= 3
  const dnnl::matmul::primitive_desc how(processor(), a_desc, b_desc, bias_desc, out_desc, attributes);
#else
  const dnnl::matmul::primitive_desc how({a_desc, b_desc, bias_desc, out_desc}, attributes, processor());
#endif
  std::unordered_map<int, memory> arguments = {{DNNL_ARG_SRC, memory_at(a_desc, a.data)},
                                               {DNNL_ARG_WEIGHTS, memory_at(b_desc, b.data)},
                                               {DNNL_ARG_DST, memory_at(out_desc, out)}};
  if (bias != nullptr) arguments.emplace(DNNL_ARG_BIAS, memory_at(bias_desc, bias));
  dnnl::matmul(how).execute(stream, arguments);
  stream.wait();
}

}  // namespace bitwright::train

// Part of kernels_simd.cpp: included once per instruction set.
#ifndef BITWRIGHT_KERNELS_LANES_INL
#define BITWRIGHT_KERNELS_LANES_INL

#include <hwy/highway.h>

#include "kernels/kernel_level.hpp"

HWY_BEFORE_NAMESPACE();
namespace bitwright::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

constexpr hn::CappedTag<float, kPanel> kF32;
using F32 = decltype(kF32);
constexpr hn::Rebind<int32_t, F32> kI32;
constexpr hn::Rebind<uint32_t, F32> kU32;
using V = hn::Vec<F32>;
using Words = hn::Vec<decltype(kU32)>;

constexpr size_t kLanes = hn::MaxLanes(kF32);
constexpr size_t kParts = kPanel / kLanes;  // vectors a panel

}  // namespace bitwright::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

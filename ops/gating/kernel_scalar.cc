// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_scalar.h"
#include "ops/gating/kernels.h"

namespace moeops::gating_internal {
namespace {

using simd::Vec;
using simd::VecI;

inline VecI keys_of(Vec v) { return key_of(v); }
inline VecI minus_above(VecI c, VecI a, VecI b) { return c - (a > b); }
inline VecI keep_above(VecI a, VecI b, VecI keys) { return a > b ? keys : kNoKey; }
inline int64_t count_equal(VecI a, VecI b) { return a == b; }
inline VecI lesser(VecI a, VecI b) { return a < b ? a : b; }
inline int64_t append(VecI key, int32_t bound, int32_t id, int32_t* to_keys, int32_t* to_ids) {
  *to_keys = key;
  *to_ids = id;
  return key >= bound;
}

}  // namespace
}  // namespace moeops::gating_internal

#include "ops/gating/kernel_body.h"

namespace moeops::gating_internal {

extern const Kernel kernel_scalar;
const Kernel kernel_scalar = {"scalar", Isa::kScalar, run};

}  // namespace moeops::gating_internal

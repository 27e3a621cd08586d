// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_avx2.h"
#include "ops/gating/kernels.h"

namespace moeops::gating_internal {
namespace {

using simd::Vec;
using simd::VecI;

inline VecI keys_of(Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i flip = _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_xor_si256(bits, flip), _mm256_set1_epi32(kNanKey), nan);
}
inline VecI minus_above(VecI c, VecI a, VecI b) {
  return _mm256_add_epi32(c, _mm256_cmpgt_epi32(a, b));
}
inline VecI keep_above(VecI a, VecI b, VecI keys) {
  return _mm256_blendv_epi8(_mm256_set1_epi32(kNoKey), keys, _mm256_cmpgt_epi32(a, b));
}
inline uint32_t lanes(__m256i mask) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
}
inline int64_t count_equal(VecI a, VecI b) {
  return __builtin_popcount(lanes(_mm256_cmpeq_epi32(a, b)));
}
inline VecI lesser(VecI a, VecI b) { return _mm256_min_epi32(a, b); }
inline int64_t append(VecI keys, int32_t bound, int32_t id, int32_t* to_keys, int32_t* to_ids) {
  alignas(32) int32_t each[8];
  simd::store(each, keys);
  const uint32_t below = lanes(_mm256_cmpgt_epi32(simd::broadcast(bound), keys));
  int64_t n = 0;
  for (uint32_t left = below ^ 0xFFu; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    to_keys[n] = each[lane];
    to_ids[n++] = id + lane;
  }
  return n;
}

}  // namespace
}  // namespace moeops::gating_internal

#include "ops/gating/kernel_body.h"

namespace moeops::gating_internal {

extern const Kernel kernel_avx2;
const Kernel kernel_avx2 = {"avx2", Isa::kAvx2, run};

}  // namespace moeops::gating_internal

// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_avx2.h"
#include "ops/gating/kernels.h"

namespace moeops::gating_internal {
namespace {

using simd::Vec;
using simd::VecI;

inline VecI keys_of(Vec v) {
  const __m256i bits = _mm256_castps_si256(_mm256_add_ps(v, _mm256_setzero_ps()));  // -0 becomes 0
  const __m256i flip = _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_xor_si256(bits, flip), _mm256_set1_epi32(kNanKey), nan);
}
inline uint32_t above(VecI a, VecI b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b))));
}
inline uint32_t at_least(VecI a, VecI b) { return above(b, a) ^ 0xFFu; }
inline VecI lesser(VecI a, VecI b) { return _mm256_min_epi32(a, b); }
inline VecI if_below(VecI a, VecI b) {
  return _mm256_blendv_epi8(_mm256_set1_epi32(kNoKey), a, _mm256_cmpgt_epi32(b, a));
}
inline int64_t append(VecI keys, int32_t bound, int32_t id, int32_t* to_keys, int32_t* to_ids) {
  alignas(32) int32_t lanes[8];
  simd::store(lanes, keys);
  int64_t n = 0;
  for (uint32_t left = at_least(keys, simd::broadcast(bound)); left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    to_keys[n] = lanes[lane];
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

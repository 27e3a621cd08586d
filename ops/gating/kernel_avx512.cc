// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_avx512.h"
#include "ops/gating/kernels.h"

namespace moeops::gating_internal {
namespace {

using simd::Vec;
using simd::VecI;

inline VecI keys_of(Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i flip = _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(_mm512_xor_si512(bits, flip), nan, _mm512_set1_epi32(kNanKey));
}
inline VecI minus_above(VecI c, VecI a, VecI b) {
  return _mm512_mask_sub_epi32(c, _mm512_cmpgt_epi32_mask(a, b), c, _mm512_set1_epi32(1));
}
inline VecI keep_above(VecI a, VecI b, VecI keys) {
  return _mm512_mask_mov_epi32(_mm512_set1_epi32(kNoKey), _mm512_cmpgt_epi32_mask(a, b), keys);
}
inline int64_t count_equal(VecI a, VecI b) {
  return __builtin_popcount(_mm512_cmpeq_epi32_mask(a, b));
}
inline VecI lesser(VecI a, VecI b) { return _mm512_min_epi32(a, b); }
inline int64_t append(VecI keys, int32_t bound, int32_t id, int32_t* to_keys, int32_t* to_ids) {
  const __mmask16 mask = _mm512_cmpge_epi32_mask(keys, _mm512_set1_epi32(bound));
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i ids = _mm512_add_epi32(lanes, _mm512_set1_epi32(id));
  // In registers first: compressing to memory is slow on some CPUs.
  simd::store(to_keys, _mm512_maskz_compress_epi32(mask, keys));
  simd::store(to_ids, _mm512_maskz_compress_epi32(mask, ids));
  return __builtin_popcount(mask);
}

}  // namespace
}  // namespace moeops::gating_internal

#include "ops/gating/kernel_body.h"

namespace moeops::gating_internal {

extern const Kernel kernel_avx512;
const Kernel kernel_avx512 = {"avx512", Isa::kAvx512, run};

}  // namespace moeops::gating_internal

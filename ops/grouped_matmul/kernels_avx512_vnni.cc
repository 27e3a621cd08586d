// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/vectors_avx512.h"

namespace moeops::grouped_matmul_internal {

namespace {

struct S8 : Ints {
  using Weights = __m512i;
  static Weights weights(const char* p) { return read(p); }
  static Sum dot(Sum sum, const char* x, Weights w) {
    return _mm512_dpbusd_epi32(sum, broadcast(x), w);
  }
};

}  // namespace

MOEOPS_VECTOR_KERNEL(kernel_s8_avx512_vnni, "avx512_vnni", S8, DType::kS8, Isa::kAvx512Vnni)

}  // namespace moeops::grouped_matmul_internal

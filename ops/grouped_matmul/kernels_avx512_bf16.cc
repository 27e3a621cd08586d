// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/vectors_avx512.h"

namespace moeops::grouped_matmul_internal {

namespace {

struct Bf16 : Floats {
  using Weights = __m512i;
  static Weights weights(const char* p) { return read(p); }
  static Sum dot(Sum sum, const char* x, Weights w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)broadcast(x), (__m512bh)w);
  }
};

}  // namespace

MOEOPS_VECTOR_KERNEL(kernel_bf16_avx512_bf16, "avx512_bf16", Bf16, DType::kBf16, Isa::kAvx512Bf16)

}  // namespace moeops::grouped_matmul_internal

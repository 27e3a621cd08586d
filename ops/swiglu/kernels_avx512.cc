// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_avx512.h"
#include "ops/swiglu/kernels_body.h"

namespace moeops::swiglu_internal {

extern const RowKernels row_kernels_avx512;
const RowKernels row_kernels_avx512 = make_kernels(Isa::kAvx512);

}  // namespace moeops::swiglu_internal

// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_avx2.h"
#include "ops/swiglu/kernels_body.h"

namespace moeops::swiglu_internal {

extern const RowKernels row_kernels_avx2;
const RowKernels row_kernels_avx2 = make_kernels(Isa::kAvx2);

}  // namespace moeops::swiglu_internal

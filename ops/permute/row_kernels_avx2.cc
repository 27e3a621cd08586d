// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_avx2.h"
#include "ops/permute/row_kernels_body.h"

namespace moeops::routing_internal {

extern const RowKernels row_kernels_avx2;
const RowKernels row_kernels_avx2 = make_row_kernels("avx2", Isa::kAvx2);

}  // namespace moeops::routing_internal

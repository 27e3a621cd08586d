// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_avx512.h"
#include "ops/permute/row_kernels_body.h"

namespace moeops::routing_internal {

extern const RowKernels row_kernels_avx512;
const RowKernels row_kernels_avx512 = make_row_kernels("avx512", Isa::kAvx512);

}  // namespace moeops::routing_internal

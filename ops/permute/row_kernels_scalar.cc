// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_scalar.h"
#include "ops/permute/row_kernels_body.h"

namespace moeops::routing_internal {

extern const RowKernels row_kernels_scalar;
const RowKernels row_kernels_scalar = make_row_kernels("scalar", Isa::kScalar);

}  // namespace moeops::routing_internal

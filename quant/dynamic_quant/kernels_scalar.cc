// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_scalar.h"
#include "quant/dynamic_quant/kernels_body.h"

namespace moeops::dynamic_quant_internal {

extern const RowKernels row_kernels_scalar;
const RowKernels row_kernels_scalar = make_kernels(Isa::kScalar);

}  // namespace moeops::dynamic_quant_internal

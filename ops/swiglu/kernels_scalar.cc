// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_scalar.h"
#include "ops/swiglu/kernels_body.h"

namespace moeops::swiglu_internal {

extern const RowKernels row_kernels_scalar;
const RowKernels row_kernels_scalar = make_kernels(Isa::kScalar);

}  // namespace moeops::swiglu_internal

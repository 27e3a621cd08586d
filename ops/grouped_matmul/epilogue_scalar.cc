// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_scalar.h"
//
#include "ops/grouped_matmul/epilogue_body.h"

namespace moeops::grouped_matmul_internal {

extern const EpilogueKernels epilogue_scalar;
const EpilogueKernels epilogue_scalar = kernels_for(Isa::kScalar);

}  // namespace moeops::grouped_matmul_internal

// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_avx2.h"
//
#include "ops/grouped_matmul/epilogue_body.h"

namespace moeops::grouped_matmul_internal {

extern const EpilogueKernels epilogue_avx2;
const EpilogueKernels epilogue_avx2 = kernels_for(Isa::kAvx2);

}  // namespace moeops::grouped_matmul_internal

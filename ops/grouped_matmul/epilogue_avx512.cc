// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_avx512.h"
//
#include "ops/grouped_matmul/epilogue_body.h"

namespace moeops::grouped_matmul_internal {

extern const EpilogueKernels epilogue_avx512;
const EpilogueKernels epilogue_avx512 = kernels_for(Isa::kAvx512);

}  // namespace moeops::grouped_matmul_internal

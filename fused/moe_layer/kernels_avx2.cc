// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_avx2.h"
//
#include "fused/moe_layer/kernels_body.h"

namespace moeops::moe_layer_internal {

extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = kernels_for(Isa::kAvx2);

}  // namespace moeops::moe_layer_internal

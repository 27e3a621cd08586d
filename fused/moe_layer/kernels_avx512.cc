// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_avx512.h"
//
#include "fused/moe_layer/kernels_body.h"

namespace moeops::moe_layer_internal {

extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = kernels_for(Isa::kAvx512);

}  // namespace moeops::moe_layer_internal

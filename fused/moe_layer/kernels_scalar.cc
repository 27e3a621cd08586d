// SPDX-License-Identifier: Apache-2.0
#include "ops/core/simd_scalar.h"
//
#include "fused/moe_layer/kernels_body.h"

namespace moeops::moe_layer_internal {

extern const Kernels kernels_scalar;
const Kernels kernels_scalar = kernels_for(Isa::kScalar);

}  // namespace moeops::moe_layer_internal

// SPDX-License-Identifier: Apache-2.0
#include "fused/moe_layer/kernels.h"

namespace moeops::moe_layer_internal {

#define MOEOPS_MOE_LAYER_KERNELS(name) extern const Kernels name;
#include "fused/moe_layer/kernels.inc"
#undef MOEOPS_MOE_LAYER_KERNELS

const Kernels& kernels(Isa isa) {
#define MOEOPS_MOE_LAYER_KERNELS(name) \
  if (name.isa <= isa) return name;
#include "fused/moe_layer/kernels.inc"
#undef MOEOPS_MOE_LAYER_KERNELS
  return kernels_scalar;
}

}  // namespace moeops::moe_layer_internal

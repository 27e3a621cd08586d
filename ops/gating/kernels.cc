// SPDX-License-Identifier: Apache-2.0
#include "ops/gating/kernels.h"

namespace moeops::gating_internal {

#define MOEOPS_GATING_KERNEL(name) extern const Kernel name;
#include "ops/gating/kernels.inc"
#undef MOEOPS_GATING_KERNEL

const Kernel* const kKernels[] = {
#define MOEOPS_GATING_KERNEL(name) &name,
#include "ops/gating/kernels.inc"
#undef MOEOPS_GATING_KERNEL
};

const int kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);

}  // namespace moeops::gating_internal

// SPDX-License-Identifier: Apache-2.0
#include "ops/permute/row_kernels.h"

namespace moeops::routing_internal {

#define MOEOPS_ROW_KERNELS(name) extern const RowKernels name;
#include "ops/permute/kernels.inc"
#undef MOEOPS_ROW_KERNELS

const RowKernels* const kRowKernels[] = {
#define MOEOPS_ROW_KERNELS(name) &name,
#include "ops/permute/kernels.inc"
#undef MOEOPS_ROW_KERNELS
};

const int kRowKernelsCount = sizeof(kRowKernels) / sizeof(kRowKernels[0]);

const RowKernels& row_kernels(Isa isa) {
  int i = 0;
  while (kRowKernels[i]->isa > isa) ++i;  // the last one is scalar
  return *kRowKernels[i];
}

}  // namespace moeops::routing_internal

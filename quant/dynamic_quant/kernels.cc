// SPDX-License-Identifier: Apache-2.0
#include "quant/dynamic_quant/kernels.h"

namespace moeops::dynamic_quant_internal {

#define MOEOPS_ROW_KERNELS(name) extern const RowKernels name;
#include "quant/dynamic_quant/kernels.inc"
#undef MOEOPS_ROW_KERNELS

const RowKernels* const kRowKernels[] = {
#define MOEOPS_ROW_KERNELS(name) &name,
#include "quant/dynamic_quant/kernels.inc"
#undef MOEOPS_ROW_KERNELS
};

const int kRowKernelsCount = sizeof(kRowKernels) / sizeof(kRowKernels[0]);

const RowKernels& row_kernels(Isa isa) {
  int i = 0;
  while (kRowKernels[i]->isa > isa) ++i;  // the last one is scalar
  return *kRowKernels[i];
}

}  // namespace moeops::dynamic_quant_internal

// SPDX-License-Identifier: Apache-2.0
#include "ops/permute/row_kernels.h"

#include <atomic>

namespace moeops::routing_internal {

namespace {

std::atomic<bool> stream_all{false};

}  // namespace

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

bool streams(int64_t bytes) {
  return bytes >= (int64_t{16} << 20) || stream_all.load(std::memory_order_relaxed);
}

void stream_small_outputs(bool stream) { stream_all.store(stream, std::memory_order_relaxed); }

}  // namespace moeops::routing_internal

// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

#define MOEOPS_TILE_KERNEL(name) extern const TileKernel name;
#include "ops/grouped_matmul/kernels.inc"
#undef MOEOPS_TILE_KERNEL

const TileKernel* const kTileKernels[] = {
#define MOEOPS_TILE_KERNEL(name) &name,
#include "ops/grouped_matmul/kernels.inc"
#undef MOEOPS_TILE_KERNEL
};

const int kTileKernelCount = sizeof(kTileKernels) / sizeof(kTileKernels[0]);

Status choose_kernel(Context& ctx, DType dtype, const TileForm& form, const TileKernel** kernel,
                     const void** code) {
  for (const TileKernel* candidate : kTileKernels) {
    if (candidate->dtype != dtype || candidate->isa > ctx.isa()) continue;
    *code = nullptr;
    if (candidate->prepare != nullptr && !candidate->prepare(ctx, form, code)) continue;
    *kernel = candidate;
    return {};
  }
  return {StatusCode::kInternal, "grouped_matmul: no kernel for %s on %s", to_string(dtype),
          to_string(ctx.isa())};
}

}  // namespace moeops::grouped_matmul_internal

// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/epilogue.h"

#include <algorithm>
#include <cstring>

#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

extern const EpilogueKernels epilogue_avx512;
extern const EpilogueKernels epilogue_avx2;
extern const EpilogueKernels epilogue_scalar;

const EpilogueKernels& epilogue_kernels(const Context& ctx) {
  for (const EpilogueKernels* kernels : {&epilogue_avx512, &epilogue_avx2}) {
    if (kernels->isa <= ctx.isa()) return *kernels;
  }
  return epilogue_scalar;
}

ColumnConstants column_constants(const PackedWeights& weights, int64_t expert, int64_t panel,
                                 const ConstTensorView& bias, int32_t* room) {
  ColumnConstants constants;
  if (bias.present()) {
    // The bias ends with N, but vectors go on to the panel's width.
    std::memset(room, 0, kPanelColumns * sizeof(int32_t));
    const auto* from = bias.row<int32_t>(expert);
    for (const PackedWeights::ChannelRun& run : weights.channels(panel)) {
      for (int j = 0; j < run.count; ++j) room[run.column + j] = from[run.channel + j * run.step];
    }
    if (bias.dtype == DType::kI32) {
      constants.bias_i32 = room;
    } else {
      constants.bias = reinterpret_cast<const float*>(room);
    }
  }
  if (weights.dtype() == DType::kS8) {
    constants.sums = weights.column_sums(expert, panel);
    if (weights.has_scales()) constants.scale = weights.scales(expert, panel);
  }
  return constants;
}

}  // namespace moeops::grouped_matmul_internal

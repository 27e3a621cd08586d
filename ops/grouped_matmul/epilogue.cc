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

void gather_channels(const PackedWeights& weights, int64_t panel, const void* row, void* to) {
  const auto* from = static_cast<const int32_t*>(row);
  auto* columns = static_cast<int32_t*>(to);
  std::memset(columns, 0, kPanelColumns * sizeof(int32_t));
  for (const PackedWeights::ChannelRun& run : weights.channels(panel)) {
    for (int j = 0; j < run.count; ++j) columns[run.column + j] = from[run.channel + j * run.step];
  }
}

}  // namespace moeops::grouped_matmul_internal

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/dtype.h>
#include <moeops/ops/core/machine.h>
#include <moeops/ops/packed_weights.h>

#include <array>
#include <cstdint>

namespace moeops::grouped_matmul_internal {

// A panel to be packed, its channels still where the source has them.
struct PanelSource {
  struct Matrix {
    const void* w;
    int64_t row_stride;   // in elements
    const float* scales;  // of an s8 source, by channel; may be null
    int64_t scale_step;   // 0: one for all channels
  };

  DType dtype;
  bool transposed;  // rows are k's, else channels
  int64_t k;
  std::array<PackedWeights::ChannelRun, 2> runs;
  std::array<Matrix, 2> matrices;  // that the runs are of
};

struct Panel {
  DType dtype;
  int width;
  char* data;
  float* scales;  // s8 only
  int32_t* sums;  // s8 only
};

// Writes the whole panel, zeros included; the dtypes are legal ones. Every packer gives the same
// bits.
struct PanelPacker {
  Isa isa;
  void (*run)(const PanelSource& source, const Panel& panel);
};

}  // namespace moeops::grouped_matmul_internal

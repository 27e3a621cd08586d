// SPDX-License-Identifier: Apache-2.0
#pragma once

// The naive reference: every operator in plain loops, slow and obviously right, for telling which
// number of an accelerator or of an optimised kernel is wrong. An operator's contract - shapes,
// mathematics, errors - stands in its header; here are the functions that carry it out without a
// context: one thread, double accumulation for f32 and bf16 products, exact s32 for s8, exp and
// tanh in double, everything else in the f32 order of the contract. They allocate their scratch.
//
// GEMMs take plain weights here, not packed ones.

#include <moeops/ops/grouped_matmul.h>

namespace moeops::ref {

// w [E, N, K], or [E, K, N] with transpose_w; w_scale [E, N] f32 belongs to s8 weights.
struct Weights {
  ConstTensorView w;
  bool transpose_w = false;
  ConstTensorView w_scale;
};

Status grouped_matmul(const Weights& weights, const GroupedMatmulArgs& args) noexcept;

}  // namespace moeops::ref

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/dtype.h>
#include <moeops/ops/core/machine.h>

#include <cstdint>

namespace moeops::moe_layer_internal {

// out = sum over k ascending of fma(weights[k], y[rows[k]], .), then plus every shared expert's
// row, for one token; in f32, rounded once.
struct Combination {
  const float* y;        // rows of `columns`
  const int32_t* rows;   // [choices]; -1: masked, its weight is not read
  const int32_t* next;   // rows of the token that comes next, or null: they are asked for meanwhile
  const float* weights;  // [choices]; null: 1
  int64_t choices;
  const float* shared;  // the first one's row
  int64_t shared_stride;
  int64_t shared_count;
  int64_t columns;
};

struct Kernels {
  Isa isa;  // the least that they need
  // out: f32, bf16 or f16.
  void (*combine)(const Combination& combination, void* out, DType out_dtype);
  // to[j] = x[j] * weight, rounded to f32 or bf16.
  void (*weigh)(const void* x, DType x_dtype, int64_t n, float weight, void* to, DType to_dtype);
};

// The best of kernels.inc that `isa` allows.
const Kernels& kernels(Isa isa);

}  // namespace moeops::moe_layer_internal

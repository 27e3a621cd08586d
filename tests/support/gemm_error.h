// SPDX-License-Identifier: Apache-2.0
#pragma once

// How far an optimised GEMM may be from the reference, derived from its arithmetic.

#include <moeops/ops/core/params.h>
#include <moeops/ops/core/tensor.h>
#include <moeops/ops/swiglu.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/core/team.h"
#include "ref/numeric.h"

namespace moeops::test {

// While it lives, calls of any size use all their workers.
struct SplitSmallCalls {
  SplitSmallCalls() { split_small_calls(true); }
  ~SplitSmallCalls() { split_small_calls(false); }
};

// A rounding's relative error in f32, and that of two of them.
inline constexpr double kRounding = 0x1p-24;
inline constexpr double kRoundings = 0x1p-23;

// The norm of each row of w [.., N, K], or of each column of w [.., K, N] with transposed.
inline std::vector<double> row_norms(const ConstTensorView& w, bool transposed) {
  const int64_t matrices = w.rank == 3 ? w.dim(0) : 1;
  const int64_t rows = w.dim(w.rank - 2);
  const int64_t columns = w.columns();
  const int64_t N = transposed ? columns : rows;
  std::vector<double> norms(static_cast<size_t>(matrices * N));
  if (w.dtype != DType::kF32 && w.dtype != DType::kBf16) return norms;  // exact
  for (int64_t i = 0; i < matrices * rows; ++i) {
    const ref::FloatRow row(w, i);
    for (int64_t j = 0; j < columns; ++j) {
      const double v = row[j];
      norms[static_cast<size_t>(transposed ? i / rows * N + j : i)] += v * v;
    }
  }
  for (double& norm : norms) norm = std::sqrt(norm);
  return norms;
}

// A chain of K products and sums in f32, each rounded (two roundings a step at most, of which the
// product's counts once), is off by (K + 1) 2^-24 sum |x w| at most, and sum |x w| <= |x| |w|. The
// reference rounds once.
inline double sum_error(int64_t K, double x_norm, double w_norm) {
  return static_cast<double>(K + 2) * 1.001 * kRounding * x_norm * w_norm;
}

// After the activation of v, which is off by `error`. Slopes are at most 1.13 (gelu_tanh). Its own
// error on both sides: 5 ulp of the result, and for gelu_tanh below 0, where 1 + tanh cancels,
// 2^-21 of |v|.
inline double activation_error(Activation activation, double v, double error) {
  if (activation == Activation::kNone || activation == Activation::kRelu) return error;
  const double own = v > 0                             ? 5 * 0x1p-23 * v
                     : activation == Activation::kSilu ? 5 * 0x1p-23 * std::min(-v, 0.3)
                                                       : 0x1p-21 * -v;
  return 1.13 * error + own;
}

// Of h = act(g) * u from the same g and u: 2.2 ulp on one side, 2 on the other, and the roundings
// of the products; gelu_tanh below 0 as above.
inline double gated_error(const SwigluParams& params, double g, double u, double h) {
  const double relative = 6 * 0x1p-23 * std::fabs(h);
  const bool tail = params.activation == GatedActivation::kGeluTanh && g < 0;
  return relative + (tail ? 0x1p-21 * std::fabs(g * u) : 0);
}

// Of the same h, from g and u that are off: act has slopes of 1.13 at most and |act(g)| <= |g|, of
// any of the forms; the clamped one multiplies with u + 1.
inline double gated_slope_error(double g, double u, double g_error, double u_error) {
  return 1.13 * g_error * (std::fabs(u) + 1 + u_error) + std::fabs(g) * u_error;
}

// Gate and up of place j in a row of 2I.
struct GateAndUp {
  float g, u;
};
inline GateAndUp gate_and_up(Gate gate, const float* row, int64_t I, int64_t j) {
  if (gate == Gate::kInterleaved) return {row[2 * j], row[2 * j + 1]};
  return gate == Gate::kLeft ? GateAndUp{row[j], row[I + j]} : GateAndUp{row[I + j], row[j]};
}

// After both sides were rounded to y's dtype: half a unit each.
inline double stored_error(DType y, double expected, double error) {
  switch (y) {
    case DType::kBf16:
      return error + 0x1p-8 * (2 * std::fabs(expected) + error);
    case DType::kF16:
      return error + 0x1p-11 * (2 * std::fabs(expected) + error) + 0x1p-24;
    case DType::kS8:
      return error > 0 ? std::floor(error) + 1 : 0;
    default:
      return error;
  }
}

}  // namespace moeops::test

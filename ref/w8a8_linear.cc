// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <vector>

#include "ops/core/arg_check.h"
#include "ref/guarded.h"
#include "ref/linear_weights.h"
#include "ref/numeric.h"

namespace moeops::ref {

namespace {

Status run(const Weights& weights, const W8a8LinearArgs& args) {
  ArgCheck check("w8a8_linear");
  Dim M{"M"}, K{"K"}, N{"N"};
  check.input("x", args.x, {DType::kF32, DType::kBf16, DType::kF16}, {M, K});
  check_linear_weights(check, weights, N, K);
  check.require(weights.w_scale.present(), "w_scale is missing");
  check.optional_input("bias", args.bias, {DType::kI32, DType::kF32}, {N});
  check.output("y", args.y, {DType::kF32, DType::kBf16, DType::kF16}, {M, N});
  MOEOPS_RETURN_IF_ERROR(check.finish());

  std::vector<int8_t> q(static_cast<size_t>(M.value * K.value));
  std::vector<float> x_scale(static_cast<size_t>(M.value));
  std::vector<float> y(static_cast<size_t>(M.value * N.value));

  DynamicQuantArgs quant;
  quant.x = args.x;
  quant.q = {q.data(), {M.value, K.value}};
  quant.scale = {x_scale.data(), {M.value}};
  MOEOPS_RETURN_IF_ERROR(dynamic_quant(quant));

  QuantMatmulArgs gemm;
  gemm.x = quant.q;
  gemm.x_scale = quant.scale;
  gemm.bias = args.bias;
  gemm.y = {y.data(), {M.value, N.value}};
  MOEOPS_RETURN_IF_ERROR(quant_matmul(weights, gemm));

  for (int64_t i = 0; i < M.value; ++i) {
    for (int64_t j = 0; j < N.value; ++j) store(args.y, i, j, gemm.y.row<float>(i)[j]);
  }
  return {};
}

}  // namespace

Status w8a8_linear(const Weights& weights, const W8a8LinearArgs& args) noexcept {
  return guarded("w8a8_linear", [&] { return run(weights, args); });
}

}  // namespace moeops::ref

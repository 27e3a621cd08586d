// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cinttypes>
#include <vector>

#include "ops/core/arg_check.h"
#include "ref/dynamic_quant_row.h"
#include "ref/group_list.h"
#include "ref/guarded.h"
#include "ref/swiglu_row.h"

namespace moeops::ref {

namespace {

Status run(const Weights& weights, const GroupedMatmulSwigluQuantArgs& args) {
  ArgCheck check("grouped_matmul_swiglu_quant");
  Dim M{"M"}, K{"K"}, E{"E"}, width{"2I"}, I{"I"}, G{"G"};
  check.input("x", args.x, {DType::kS8}, {M, K});
  if (weights.transpose_w) {
    check.input("w", weights.w, {DType::kS8}, {E, K, width});
  } else {
    check.input("w", weights.w, {DType::kS8}, {E, width, K});
  }
  check.require(K.value <= 65536, "K = %" PRId64 " is more than 65536, beyond which s32 overflows",
                K.value);
  check_swiglu(check, args.swiglu, width, I);
  check.input("w_scale", weights.w_scale, {DType::kF32}, {E, width});
  check_group_list_view(check, args.group_list, args.list_type, E, G);
  check.optional_input("bias", args.bias, {DType::kI32, DType::kF32}, {E, width});
  check.optional_input("x_scale", args.x_scale, {DType::kF32}, {M});
  check.output("q", args.q, {DType::kS8}, {M, I});
  check.output("scale", args.scale, {DType::kF32}, {M});
  const std::vector<Group> groups =
      read_group_list(check, args.group_list, args.list_type, E.value, M.value);
  MOEOPS_RETURN_IF_ERROR(check.finish());

  std::vector<float> gate_up(static_cast<size_t>(M.value * width.value));
  std::vector<float> h(static_cast<size_t>(I.value));
  GroupedMatmulArgs gemm;
  gemm.x = args.x;
  gemm.group_list = args.group_list;
  gemm.list_type = args.list_type;
  gemm.bias = args.bias;
  gemm.x_scale = args.x_scale;
  gemm.y = {gate_up.data(), {M.value, width.value}};
  MOEOPS_RETURN_IF_ERROR(grouped_matmul(weights, gemm));

  int64_t covered = 0;
  for (const Group& group : groups) covered += group.rows;
  float* scale = args.scale.row<float>(0);
  for (int64_t i = 0; i < M.value; ++i) {
    int8_t* q = args.q.row<int8_t>(i);
    if (i < covered) {
      swiglu_row(args.swiglu, I.value, gemm.y.row<float>(i), h.data());
      dynamic_quant_row(I.value, h.data(), q, scale + i);
    } else {
      std::fill_n(q, I.value, int8_t{0});
      scale[i] = 0.0f;
    }
  }
  return {};
}

}  // namespace

Status grouped_matmul_swiglu_quant(const Weights& weights,
                                   const GroupedMatmulSwigluQuantArgs& args) noexcept {
  return guarded("grouped_matmul_swiglu_quant", [&] { return run(weights, args); });
}

}  // namespace moeops::ref

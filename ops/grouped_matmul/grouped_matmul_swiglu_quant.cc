// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/grouped_matmul_swiglu_quant.h>

#include <algorithm>

#include "ops/core/arg_check.h"
#include "ops/core/carver.h"
#include "ops/core/team.h"
#include "ops/grouped_matmul/gate_up_sink.h"
#include "ops/grouped_matmul/group_list.h"
#include "ops/swiglu/check_swiglu.h"

namespace moeops {

using namespace grouped_matmul_internal;  // NOLINT(google-build-using-namespace)

namespace {

Status check_call(const PackedWeights& weights, const GroupedMatmulSwigluQuantArgs& args,
                  GroupStatistics* groups) {
  ArgCheck check("grouped_matmul_swiglu_quant");
  swiglu_internal::check_params(check, args.swiglu);
  check.require(weights.packed(), "weights hold nothing");
  check.require(weights.form().role == WeightRole::kGateUp,
                "weights are packed as plain ones, expected gate and up");
  check.require(weights.form().gate == args.swiglu.gate,
                "weights were packed with another gate layout than swiglu.gate");
  check.require(weights.dtype() == DType::kS8, "weights are %s, expected s8",
                to_string(weights.dtype()));
  check.require(weights.has_scales(), "the weights have no scales");
  Dim M{"M"};
  Dim K{"K", weights.k(), "weights"}, E{"E", weights.experts(), "weights"};
  Dim width{"2I", weights.n(), "weights"}, I{"I", weights.n() / 2, "weights"};
  check.input("x", args.x, {DType::kS8}, {M, K});
  check_group_list_view(check, args.group_list, args.list_type, E);
  check.optional_input("bias", args.bias, {DType::kI32, DType::kF32}, {E, width});
  check.optional_input("x_scale", args.x_scale, {DType::kF32}, {M});
  check.output("q", args.q, {DType::kS8}, {M, I});
  check.output("scale", args.scale, {DType::kF32}, {M});
  check.memory("weights", weights.data(), weights.bytes());
  *groups = check_group_list(check, args.group_list, args.list_type, E.value, M.value);
  return check.finish();
}

}  // namespace

Status grouped_matmul_swiglu_quant(Context& ctx, const PackedWeights& weights,
                                   const GroupedMatmulSwigluQuantArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  GroupStatistics groups;
  MOEOPS_RETURN_IF_ERROR(check_call(weights, args, &groups));
  const int64_t M = args.x.dim(0);
  const int64_t I = weights.n() / 2;
  if (M == 0) return {};

  const int workers =
      team_for_rows(ctx, M, weights.bytes() / std::max<int64_t>(weights.experts(), 1));
  TileDriver driver;
  MOEOPS_RETURN_IF_ERROR(
      driver.prepare(ctx, weights, M, std::min(M, args.group_list.dim(0)), workers, true));
  float* h = nullptr;
  char* driver_scratch = nullptr;
  const auto carve = [&](void* scratch) {
    Carver carver(scratch);
    h = carver.take<float>(M, I);
    driver_scratch = carver.take<char>(driver.scratch_bytes());
    return carver.bytes();
  };
  void* scratch = nullptr;
  MOEOPS_RETURN_IF_ERROR(ctx.reserve_scratch(carve(nullptr), &scratch));
  carve(scratch);
  driver.start(driver_scratch, groups);
  for_each_group(args.group_list, args.list_type, [&](int64_t expert, int64_t row, int64_t rows) {
    if (rows > 0) driver.add_group(expert, row, rows);
    return true;
  });
  driver.deal();

  const RowFeed feed = {.data = static_cast<const char*>(args.x.data), .stride = args.x.row_stride};
  GateUpSink sink(ctx, {.weights = weights,
                        .bias = args.bias,
                        .x_scale = args.x_scale.present() ? args.x_scale.row<float>(0) : nullptr,
                        .x_scale_index = nullptr,
                        .swiglu = args.swiglu,
                        .h = reinterpret_cast<char*>(h),
                        .h_dtype = DType::kF32,
                        .q = args.q.data,
                        .q_stride = args.q.row_stride,
                        .q_is_u8 = false,
                        .scale = args.scale.row<float>(0)});
  run_team(workers, [&](const Team& team) {
    const int64_t uncovered = M - groups.rows;
    for (int64_t i = uncovered * team.worker / team.size;
         i < uncovered * (team.worker + 1) / team.size; ++i) {
      std::fill_n(args.q.row<int8_t>(groups.rows + i), I, int8_t{0});
      args.scale.row<float>(0)[groups.rows + i] = 0.0f;
    }
    driver.work(team.worker, feed, sink);
  });
  return {};
}

}  // namespace moeops

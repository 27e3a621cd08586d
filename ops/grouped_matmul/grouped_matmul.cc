// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/grouped_matmul.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cmath>
#include <cstring>

#include "ops/core/arg_check.h"
#include "ops/grouped_matmul/group_list.h"
#include "ops/grouped_matmul/kernels.h"
#include "ops/grouped_matmul/plan.h"

namespace moeops {

using namespace grouped_matmul_internal;  // NOLINT(google-build-using-namespace)

namespace {

// A group that has rows. Its tasks are numbered from first_task, panels fastest.
struct ActiveGroup {
  int64_t expert;
  int64_t first_row;
  int64_t rows;
  int64_t first_task;
};

float activate(Activation activation, float v) {
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:
      return v < 0.0f ? 0.0f : v;  // NaN stays
    case Activation::kGeluTanh:
      return 0.5f * v *
             (1.0f + std::tanh(0.7978845608028654f * (v + 0.044715f * (v * v * v))));  // sqrt(2/pi)
    case Activation::kSilu:
      return v / (1.0f + std::exp(-v));
  }
  return v;
}

// The call, once it is known to be right.
struct Call {
  const PackedWeights& weights;
  const GroupedMatmulArgs& args;
  Plan plan;
  const TileKernel* kernel;
  const void* code;

  int64_t panel_parts() const {
    return (weights.panels() + plan.task_panels - 1) / plan.task_panels;
  }
};

// Rows [row, row + rows) of y, columns of one panel. c: scratch for chunk_rows tiles' results.
void multiply_chunk(const Call& call, int64_t expert, int64_t row, int64_t rows, int64_t panel,
                    float* c) {
  const GroupedMatmulArgs& args = call.args;
  const int64_t K = call.weights.k();
  const int width = call.weights.panel_width(panel);
  std::memset(c, 0, static_cast<size_t>(rows * kTileColumns) * sizeof(float));
  // Tiles of equal height: 7 rows as 4 + 3, because a tile of one row waits for its 4 chains of
  // additions most of the time.
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t k = 0; k < K; k += call.plan.k_block) {
    Tile tile;
    tile.panel = call.weights.panel(expert, panel) + k * width;
    tile.width = width;
    tile.x_stride = args.x.row_stride;
    tile.k = std::min(call.plan.k_block, K - k);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = rows * t / tiles;
      tile.rows = static_cast<int>(rows * (t + 1) / tiles - first);
      tile.x = args.x.row<float>(row + first) + k;
      tile.c = c + first * kTileColumns;
      call.kernel->run(call.code, tile);
    }
  }

  const int64_t column = panel * kTileColumns;
  const int64_t columns = std::min<int64_t>(call.weights.n() - column, kTileColumns);
  const float* bias = args.bias.present() ? args.bias.row<float>(expert) + column : nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = c + r * kTileColumns;
    float* to = args.y.row<float>(row + r) + column;
    for (int64_t j = 0; j < columns; ++j) {
      to[j] = activate(args.activation, bias != nullptr ? from[j] + bias[j] : from[j]);
    }
  }
}

void run_task(const Call& call, const ActiveGroup& group, int64_t task, float* c) {
  const int64_t part = task % call.panel_parts();
  const int64_t first_row = task / call.panel_parts() * call.plan.task_rows;
  const int64_t end_row = std::min(first_row + call.plan.task_rows, group.rows);
  const int64_t first_panel = part * call.plan.task_panels;
  const int64_t end_panel = std::min(first_panel + call.plan.task_panels, call.weights.panels());
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    for (int64_t row = first_row; row < end_row; row += call.plan.chunk_rows) {
      multiply_chunk(call, group.expert, group.first_row + row,
                     std::min(call.plan.chunk_rows, end_row - row), panel, c);
    }
  }
}

Status check_call(const PackedWeights& weights, const GroupedMatmulArgs& args,
                  GroupTotals* totals) {
  ArgCheck check("grouped_matmul");
  check.require(weights.dtype() != DType::kNone, "weights hold nothing");
  Dim M{"M"};
  Dim K{"K", weights.k(), "weights"}, E{"E", weights.experts(), "weights"};
  Dim N{"N", weights.n(), "weights"};
  check.input("x", args.x, {DType::kF32, DType::kBf16, DType::kS8}, {M, K});
  check_group_list_view(check, args.group_list, args.list_type, E);
  check.optional_input("bias", args.bias, {DType::kF32, DType::kI32}, {E, N});
  check.output("y", args.y, {DType::kF32, DType::kBf16, DType::kI32, DType::kS8}, {M, N});
  check.require(args.x.dtype == weights.dtype(), "x is %s, but the weights are %s",
                to_string(args.x.dtype), to_string(weights.dtype()));
  check.require(args.y.dtype == DType::kF32, "x is f32, but y is %s", to_string(args.y.dtype));
  check.require(!args.bias.present() || args.bias.dtype == DType::kF32,
                "bias is i32, but x is f32");
  check.absent("x_scale", args.x_scale, "x is not s8");
  check.absent("offset", args.offset, "y is not s8");
  check.memory("weights", weights.data(), weights.bytes());
  *totals = check_group_list(check, args.group_list, args.list_type, E.value, M.value);
  return check.finish();
}

}  // namespace

Status grouped_matmul(Context& ctx, const PackedWeights& weights, const GroupedMatmulArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  GroupTotals totals;
  MOEOPS_RETURN_IF_ERROR(check_call(weights, args, &totals));
  const int64_t M = args.x.dim(0);
  const int64_t N = weights.n();
  if (M == 0 || N == 0) return {};

  const int workers = ctx.workers();
  const Plan plan = make_plan({.rows = totals.rows,
                               .active_groups = totals.active,
                               .n = N,
                               .k = weights.k(),
                               .element_bytes = size_of(weights.dtype()),
                               .l2_bytes = machine().l2_bytes,
                               .workers = workers});
  Call call{weights, args, plan, nullptr, nullptr};
  MOEOPS_RETURN_IF_ERROR(choose_kernel(
      ctx, {args.x.row_stride, weights.k(), weights.panel_width(weights.panels() - 1)},
      &call.kernel, &call.code));

  // One worker's results of a chunk, then the list of active groups.
  const int64_t c_floats = plan.chunk_rows * kTileColumns;
  void* scratch = nullptr;
  MOEOPS_RETURN_IF_ERROR(
      ctx.reserve_scratch(workers * c_floats * static_cast<int64_t>(sizeof(float)) +
                              totals.active * static_cast<int64_t>(sizeof(ActiveGroup)),
                          &scratch));
  auto* results = static_cast<float*>(scratch);
  auto* groups = reinterpret_cast<ActiveGroup*>(results + workers * c_floats);
  int64_t active = 0;
  int64_t tasks = 0;
  for_each_group(args.group_list, args.list_type, [&](int64_t expert, int64_t row, int64_t rows) {
    if (rows > 0) {
      groups[active++] = {expert, row, rows, tasks};
      tasks += (rows + plan.task_rows - 1) / plan.task_rows * call.panel_parts();
    }
    return true;
  });
  std::atomic<int64_t> next_task{0};
  const auto work = [&](int worker, int team) {
    if (args.uncovered == Uncovered::kZero) {
      const int64_t uncovered = M - totals.rows;
      for (int64_t i = uncovered * worker / team; i < uncovered * (worker + 1) / team; ++i) {
        std::memset(args.y.row<float>(totals.rows + i), 0, static_cast<size_t>(N) * sizeof(float));
      }
    }
    // Tasks are dealt in order, so a worker's groups only ascend.
    float* c = results + worker * c_floats;
    int64_t group = 0;
    for (int64_t task; (task = next_task.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      while (group + 1 < active && groups[group + 1].first_task <= task) ++group;
      run_task(call, groups[group], task - groups[group].first_task, c);
    }
  };
  if (workers == 1) {
    work(0, 1);  // without OpenMP, which would allocate a team of one
  } else {
#pragma omp parallel num_threads(workers)
    work(omp_get_thread_num(), omp_get_num_threads());
  }
  return {};
}

}  // namespace moeops

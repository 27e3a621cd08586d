// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/plan.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Plan make_plan(const Problem& problem) {
  const int64_t l2 = problem.l2_bytes > 0 ? problem.l2_bytes : int64_t{512} << 10;
  Plan plan;

  // A quarter of L2 for the panel, so that the rows, the tiles' results and what is on its way in
  // from memory have room beside it. Blocks of equal size, whole kBlockUnits.
  const int64_t panel_row = kTileColumns * problem.element_bytes;
  const int64_t most = std::max(l2 / 4 / panel_row / kBlockUnit * kBlockUnit, kBlockUnit);
  const int64_t blocks = std::max<int64_t>(divide_up(problem.k, most), 1);
  plan.k_block =
      std::max(divide_up(divide_up(problem.k, blocks), kBlockUnit), int64_t{1}) * kBlockUnit;

  // Three eighths for the rows; from 8 tiles on the panel's way in is well shared.
  const int64_t fitting = l2 * 3 / 8 / (plan.k_block * problem.element_bytes);
  plan.chunk_rows = std::clamp(fitting / kTileRows, int64_t{2}, int64_t{32}) * kTileRows;

  // A task reads 128 KiB of weights at least: some 3 us at memory speed, against 20 ns for taking
  // the next task from the common counter.
  const int64_t panels = std::max<int64_t>(divide_up(problem.n, kTileColumns), 1);
  plan.task_panels =
      std::clamp(divide_up(int64_t{128} << 10, std::max<int64_t>(problem.k, 1) * panel_row),
                 int64_t{1}, panels);
  // A group's rows come in one task, which reads the panel from memory once, unless that leaves
  // workers idle: 8 tasks a worker bound the wait for the last one by an eighth.
  const int64_t wanted = int64_t{8} * problem.workers;
  const int64_t row_parts = divide_up(
      wanted, std::max<int64_t>(problem.active_groups, 1) * divide_up(panels, plan.task_panels));
  const int64_t mean_rows = divide_up(problem.rows, std::max<int64_t>(problem.active_groups, 1));
  plan.task_rows =
      std::max(divide_up(divide_up(mean_rows, row_parts), plan.chunk_rows), int64_t{4}) *
      plan.chunk_rows;
  return plan;
}

std::string describe(const Problem& problem, const Plan& plan) {
  char text[320];
  std::snprintf(text, sizeof(text),
                "%" PRId64 " rows in %" PRId64 " groups, N = %" PRId64 ", K = %" PRId64
                ": tiles of %d x %d over K blocks of %" PRId64 ", chunks of %" PRId64
                " rows; a task is up to %" PRId64 " rows x %" PRId64
                " panel%s, dealt to %d worker%s",
                problem.rows, problem.active_groups, problem.n, problem.k, kTileRows, kTileColumns,
                plan.k_block, plan.chunk_rows, plan.task_rows, plan.task_panels,
                plan.task_panels == 1 ? "" : "s", problem.workers, problem.workers == 1 ? "" : "s");
  return text;
}

}  // namespace moeops::grouped_matmul_internal

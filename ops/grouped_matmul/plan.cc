// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/plan.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kPanelChunkBytes = int64_t{kPanelColumns} * kChunkBytes;

// How far tuning may go beyond the default, and the scratch with it.
constexpr int64_t kMostTunedTimes = 4;

// A cache may have been made for a kernel with other blocks.
bool is_tuned(const Problem& problem) {
  return problem.tuned.chunk_rows > 0 && problem.tuned.chunk_rows % problem.row_block == 0;
}

}  // namespace

Plan make_plan(const Problem& problem) {
  const int64_t l2 = problem.l2_bytes > 0 ? problem.l2_bytes : int64_t{512} << 10;
  const int64_t k_chunks = std::max<int64_t>(problem.k_chunks, 1);
  const int64_t panels = std::max<int64_t>(problem.panels, 1);
  Plan plan;

  // A quarter of L2 for the block that is used, another for the one that is on its way. Blocks of
  // equal size.
  const int64_t most_chunks = std::max(l2 / 4 / kPanelChunkBytes, int64_t{1});
  plan.k_block = divide_up(k_chunks, divide_up(k_chunks, most_chunks));

  // Three eighths for the rows; no more of them than there are, and 64 in any case: so many share a
  // block's way in well enough even where they do not fit.
  const int64_t block = problem.row_block;
  const int64_t fitting = l2 * 3 / 8 / (plan.k_block * kChunkBytes) / block;
  const int64_t present = divide_up(std::max<int64_t>(problem.max_rows, 1), block);
  plan.chunk_rows = std::min(std::max(fitting, divide_up(64, block)), present) * block;

  const bool tuned = is_tuned(problem);
  if (tuned) {
    plan.k_block = std::min(problem.tuned.k_block, k_chunks);
    const int64_t most = std::min(present, kMostTunedTimes * plan.chunk_rows / block);
    plan.chunk_rows = std::min(problem.tuned.chunk_rows / block, most) * block;
  }

  // Every worker that gets a task of some rows packs them for itself, so the more panels the
  // better, as long as the workers end together: 32 tasks a worker leave the last one a 64th to
  // wait for.
  const int64_t chunks = std::max(
      {divide_up(problem.groups.rows, plan.chunk_rows), problem.groups.active, int64_t{1}});
  const int64_t balanced = chunks * panels / (int64_t{32} * problem.workers);
  const int64_t least = tuned ? 1 : std::min(int64_t{problem.panels_together}, panels);
  const int64_t most = tuned ? std::min(problem.tuned.task_panels, panels) : panels;
  plan.task_panels = std::clamp(balanced, least, most);
  return plan;
}

std::string describe(const Problem& problem, const Plan& plan) {
  char text[320];
  std::snprintf(text, sizeof(text),
                "%" PRId64 " rows in %" PRId64 " groups, %" PRId64 " panels of %" PRId64
                " chunks: %" PRId64 " rows at a time in tiles of %d x %d, K in blocks of %" PRId64
                " chunks, the next one prefetched; tasks of %" PRId64
                " panel%s, dealt to %d worker%s",
                problem.groups.rows, problem.groups.active, problem.panels, problem.k_chunks,
                plan.chunk_rows, problem.tile_rows, kPanelColumns, plan.k_block, plan.task_panels,
                plan.task_panels == 1 ? "" : "s", problem.workers, problem.workers == 1 ? "" : "s");
  return std::string(is_tuned(problem) ? "tuned plan: " : "default plan: ") + text;
}

}  // namespace moeops::grouped_matmul_internal

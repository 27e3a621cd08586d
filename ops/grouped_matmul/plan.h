// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

#include "ops/core/tuning.h"

namespace moeops::grouped_matmul_internal {

// What the groups of a call come to.
struct GroupStatistics {
  int64_t rows = 0;    // of all groups together
  int64_t active = 0;  // groups that have any
};

// What a plan depends on, and nothing else.
struct Problem {
  int64_t max_rows;  // that the groups may come to, whatever the routing
  GroupStatistics groups;
  int64_t panels;       // of an expert
  int64_t k_chunks;     // of 64 bytes
  int row_block;        // of the kernel
  int tile_rows;        // of the kernel
  int panels_together;  // that the kernel takes at once
  int64_t l2_bytes;     // of the machine, 0 where unknown
  int workers;
  TunedPlan tuned = {};  // what the tuning cache has for it
};

// How a call is cut up. It decides speed only: every plan gives the same bits.
struct Plan {
  // A worker meets chunk_rows rows of a group with k_block chunks of a panel at a time, tile after
  // tile: rows and block stay in L2 meanwhile, and so does the next block, which the tiles ask for.
  // Both, and so the scratch that they take, do not depend on the routing.
  int64_t chunk_rows;
  int64_t k_block;
  // A task, what a worker takes at a time: chunk_rows rows of a group with task_panels panels.
  int64_t task_panels;
};

// A pure function of the problem. Of a tuned plan, chunk_rows is kept within a factor of the
// default, for the scratch that it takes, and task_panels leaves every worker its tasks.
Plan make_plan(const Problem& problem);

// The plan in words.
std::string describe(const Problem& problem, const Plan& plan);

}  // namespace moeops::grouped_matmul_internal

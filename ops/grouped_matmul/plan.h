// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

namespace moeops::grouped_matmul_internal {

struct Problem {
  int64_t rows;           // covered by groups
  int64_t active_groups;  // groups that have rows
  int64_t n;
  int64_t k;
  int64_t element_bytes;  // of x and of the weights
  int64_t l2_bytes;       // of the machine, 0 where unknown
  int workers;
};

// How a call is cut up. It decides speed only: every plan gives the same bits.
struct Plan {
  // A worker multiplies chunk_rows rows of x with k_block rows of a panel at a time: both stay in
  // L2 while 6-row tiles go over them.
  int64_t k_block;
  int64_t chunk_rows;
  // A task, what a worker takes at a time, is task_rows rows of a group with task_panels panels.
  int64_t task_rows;
  int64_t task_panels;
};

// A pure function of the problem.
Plan make_plan(const Problem& problem);

// The plan in words.
std::string describe(const Problem& problem, const Plan& plan);

}  // namespace moeops::grouped_matmul_internal

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "bench/opbench/operators.h"

namespace moeops::bench {

// One short repetition on two workers: for what is said of a run, not for its time.
inline Options small_options(const Problem& problem, std::vector<int64_t> tokens,
                             const std::string& routing) {
  Options options;
  options.problem = problem;
  options.gemms = {"w13"};
  options.tokens = std::move(tokens);
  options.routing.emplace(routing);
  options.dtype = "f32";
  options.impls = {"moeops"};
  options.threads = 2;
  options.cold = false;
  options.reps = 1;
  options.min_seconds = 0;
  return options;
}

}  // namespace moeops::bench

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/machine.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "bench/opbench/problem.h"
#include "bench/opbench/result.h"
#include "bench/opbench/routing.h"

namespace moeops::bench {

struct GroupedMatmulOptions {
  Problem problem;
  std::vector<std::string> gemms;  // of w13 and w2
  std::vector<int64_t> tokens;
  // Instead of tokens: rows of every expert (one value), or of the first experts (several).
  std::vector<int64_t> rows;
  std::optional<Routing> routing;
  std::vector<std::string> impls;
  std::optional<Isa> isa;
  int threads = 1;
  bool cold = true;
  int64_t reps = 9;
  double min_seconds = 0.2;
  uint64_t seed = 1;
  bool explain = false;
};

// Measures every implementation on every GEMM and token count. `progress` is told what is being
// done. Throws tools::Error.
//
// Weights are made by a generator, so that one implementation's are resident at a time and a wrong
// expert is seen. Implementations are visited forth and back (A B, B A): a machine that slows down
// meanwhile slows both. Cold: call after call uses the next experts of a pool of at least twice
// the last-level cache.
std::vector<Result> run_grouped_matmul(const GroupedMatmulOptions& options,
                                       const LimitsMeter& meter,
                                       const std::function<void(const std::string&)>& progress);

}  // namespace moeops::bench

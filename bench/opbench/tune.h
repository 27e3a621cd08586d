// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "ops/core/tuning.h"
#include "ops/grouped_matmul/plan.h"

namespace moeops::bench {

// Plans around the default one of a problem whose largest group has so many rows: one number
// changed by a factor of 2 or 4, k_block and task_panels also of 8 or 16, or two of them by 2. None
// is in effect the default plan or another candidate; at most 32.
std::vector<TunedPlan> tuning_candidates(const grouped_matmul_internal::Problem& problem,
                                         int64_t largest_group);

std::string words(const TunedPlan& plan);

// Stands for it beside the candidates' numbers.
inline constexpr size_t kDefaultPlan = SIZE_MAX;

// The first candidate whose result differs from the default plan's in any bit; `candidates` when
// none does.
size_t first_with_other_bits(size_t candidates,
                             const std::function<std::vector<char>(size_t)>& result);

// How candidates did against the default.
struct Race {
  struct Runner {
    std::vector<double> ratios;  // its time / the default's of the same pass
    double median = 0;
  };
  std::vector<Runner> runners;
  size_t best = 0;
  // Of the best one and the default, afterwards.
  int64_t pairs = 0;
  int64_t faster = 0;  // pairs in which it was
  double ratio = 1;    // their median
  bool won = false;    // it is at least 3% faster, and faster in eight of nine pairs
};

// Passes of all candidates and the default, forth and back, so that a machine that slows down slows
// all alike; after each round the slower half is dropped and the rest get more passes. What was
// measured then has chosen the best one and so flatters it: pairs of fresh calls, again forth and
// back, decide. `seconds(candidate)` runs and times one of them, or kDefaultPlan.
Race race(size_t candidates, int64_t pairs, const std::function<double(size_t)>& seconds);

// For people: the default plan, every candidate, and the verdict.
std::vector<std::string> tuning_report(const grouped_matmul_internal::Plan& untuned,
                                       const std::vector<TunedPlan>& candidates, const Race& race);

// The cache that tuning adds to: what the file has if it is this machine's and version's, else
// nothing. Throws tools::Error where there is a file that is no tuning cache.
Tuning read_for_tuning(const std::string& path);

// Before anything is tuned: says on stderr if what the file has will be replaced, and writes it
// again, or an empty cache where there is none, to learn that it can. Throws tools::Error.
void check_tuning_file(const std::string& path);

}  // namespace moeops::bench

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/limits/limits.h"

namespace moeops::bench {

// One line of opbench: an implementation on a problem. The names are those of its JSON.
struct Result {
  std::string op;
  std::string problem;
  int64_t tokens = 0;  // 0 where rows were given instead
  int64_t rows = 0;
  int64_t experts = 0;
  int64_t active_experts = 0;
  std::string gemm;
  int64_t n = 0;
  int64_t k = 0;
  std::string dtype;
  std::string variant;         // empty where the operator has one form
  std::string routing;         // empty where there is none
  int64_t fresh_routings = 0;  // not 0: the routings of as many calls; the figures below are those
                               // of the first
  std::string impl;
  std::string impl_detail;
  std::string note;  // how the problem differs from what was asked for; empty: in nothing
  std::string isa;
  int threads = 0;
  std::string weights;  // cold or warm
  bool verified = false;
  std::string wrong;  // why it is not verified; then nothing was timed
  bool steady = false;
  int64_t reps = 0;
  double median_ms = 0;
  double min_ms = 0;
  double max_ms = 0;
  double spread = 0;               // interquartile range / median
  double worst_of_neighbours = 0;  // the largest ratio of a call's time to the median of the 8
                                   // nearest to it; 0 where there are fewer
  double stolen_ms = 0;  // of the CPUs' time a hypervisor gave so much to others meanwhile
  double gops = 0;
  double gbps = 0;
  double tokens_per_s = 0;  // 0 where rows were given
  int64_t read_bytes = 0;   // that must come from memory, and go there
  int64_t written_bytes = 0;
  double roofline_ms = 0;
  double roofline_fraction = 0;
  double dot_peak_gops = 0;  // the limits around its runs; 0 for those that do not bind it
  double read_gbps = 0;
  double copy_gbps = 0;  // at the operator's own mix of reads and writes
  std::string repro;
  std::vector<std::string> explain;  // for people; not in the JSON
};

nlohmann::json to_json(const Result& result);

// For people: a line for each of one operator's results, those of one problem together, with how
// many times longer each took than moeops.
std::string table(const std::vector<Result>& results);

// The results whose median is more than `percent` % above their line in the baseline's JSON and
// beyond the noise of both (their spreads), in words; unsteady ones are not judged. Throws
// tools::Error when the file is no opbench JSON.
std::vector<std::string> regressions(const std::vector<Result>& results,
                                     const std::string& baseline_file, double percent);

}  // namespace moeops::bench

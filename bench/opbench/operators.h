// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/machine.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "bench/limits/limits.h"
#include "bench/opbench/problem.h"
#include "bench/opbench/result.h"
#include "bench/opbench/routing.h"

namespace moeops::bench {

// What the command line asks of every operator.
struct Options {
  Problem problem;
  std::string model;  // not empty: the problem, and its weights, are a layer of this folder's model
  int64_t layer = 0;
  std::vector<std::string> gemms;  // of w13 and w2
  std::vector<int64_t> tokens;
  // Instead of tokens: rows of every expert (one value), or of the first experts (several).
  std::vector<int64_t> rows;
  std::optional<Routing> routing;
  int64_t fresh_routings = 0;  // not 0: every call has a routing of its own
  std::string dtype;
  std::vector<std::string> variants;  // empty for an operator of one form
  std::vector<std::string> impls;
  std::optional<Isa> isa;
  int threads = 1;
  bool cold = true;
  int64_t reps = 9;
  double min_seconds = 0.2;
  uint64_t seed = 1;
  bool explain = false;
  bool tune = false;
  std::string tuning_cache;  // that tuning writes and contexts read
};

using Progress = std::function<void(const std::string&)>;

// An operator's benchmark: what it can be asked, and the function that does it.
struct Operator {
  std::string name;
  std::vector<std::string> dtypes;    // the first by default
  std::vector<std::string> variants;  // forms that cost differently; the first by default
  // That can do a dtype with an ISA; all but ref by default.
  std::function<std::vector<std::string>(const std::string& dtype, Isa isa)> impls;
  std::string tokens;       // by default
  bool takes_rows = false;  // --rows too
  bool takes_routing = true;
  bool tunes = false;  // --tune too
  bool fresh_routings = false;
  bool takes_model = false;  // --model too
  // Measures every implementation on every load; `progress` is told what is being done. Throws
  // tools::Error.
  std::function<std::vector<Result>(const Options&, const LimitsMeter&, const Progress&)> run;
};

// All of them, in the order of a layer's call.
const std::vector<Operator>& operators();

// Each stands in a file of its name, or with its kin.
Operator gating_top_k_operator();
Operator init_routing_operator();
Operator token_permute_operator();
Operator token_unpermute_operator();
Operator finalize_routing_operator();
Operator dynamic_quant_operator();
Operator swiglu_operator();
Operator dequant_swiglu_quant_operator();
Operator grouped_matmul_operator();
Operator grouped_matmul_swiglu_quant_operator();
Operator quant_matmul_operator();
Operator w8a8_linear_operator();
Operator moe_layer_operator();

}  // namespace moeops::bench

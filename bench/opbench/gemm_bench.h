// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bench/opbench/grouped_matmul_impls.h"
#include "bench/opbench/operators.h"

namespace moeops::bench {

// How the benchmark of an operator that multiplies rows by weights differs from others' of its
// kind.
struct GemmOperator {
  std::string name;
  std::vector<std::string> gemms = {"w13", "w2"};  // of a layer, those that it can be
  bool one_matrix = false;     // all tokens are rows of one product: no experts, no routing
  DType input = DType::kNone;  // of the rows that a caller hands in; none: the weights'
  // What a call must write for each row, in bytes; y holds at least n values of the form's y.
  std::function<int64_t(const GemmForm&, const std::string& impl)> row_bytes;
  std::function<std::unique_ptr<GroupedMatmulImpl>(const std::string& impl, std::optional<Isa>)>
      make_impl;
  // Runs the call and says what is wrong with its result; empty: nothing.
  std::function<std::string(GroupedMatmulImpl&, const GemmCall&, const WeightValues&,
                            uint64_t seed)>
      verify;
};

// In the files of their operators; for the tests too.
GemmOperator swiglu_quant_gemm();
GemmOperator quant_matmul_gemm();
GemmOperator w8a8_linear_gemm();

// What Operator::run does, for these operators. Weights are made by a generator, so that one
// implementation's are resident at a time and a wrong expert is seen. Cold: call after call uses
// the next experts of a pool of at least twice the last-level cache.
std::vector<Result> run_gemms(const GemmOperator& op, const Options& options,
                              const LimitsMeter& meter, const Progress& progress);

}  // namespace moeops::bench

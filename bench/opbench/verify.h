// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "bench/opbench/grouped_matmul_impls.h"

namespace moeops::bench {

// Runs the call once and checks the result: all of it finite and written, and at least 4,096 of
// its values, every group's first and last row among them, against sums over the full K: of s8
// exact ones, to the bit; else in double, within the bound on the rounding errors of an f32 sum in
// any order. Empty when it is right, else what is wrong.
std::string verify(GroupedMatmulImpl& impl, const GemmCall& call, const WeightValues& values,
                   uint64_t seed);
// The same of a call that has run.
std::string verify_result(const GemmCall& call, const WeightValues& values, uint64_t seed);

}  // namespace moeops::bench

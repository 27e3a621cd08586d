// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <utility>

#include "bench/limits/kernels.h"

namespace moeops::limits {

// Makes a DotKernel of a type with
//   Accumulator, Operand, Lane      vectors, and the type of an accumulator's lanes
//   kChains                         enough to hide the instruction's latency, yet all in registers
//   kMultiplyAdds                   of one instruction
//   left(int), right(int)           an operand with that value in every lane
//   dot(Accumulator&, Operand&, Operand&)
// The type lives in its ISA file's unnamed namespace, hence so does this code.
template <class Dot>
struct DotChains {
  using Index = std::make_index_sequence<Dot::kChains>;

  static constexpr DotKernel kernel() {
    return {[](int64_t steps, int u, int s) { return run(steps, u, s, Index()); },
            static_cast<int64_t>(Dot::kChains) * Dot::kMultiplyAdds};
  }

 private:
  template <size_t... kChain>
  static double run(int64_t steps, int u, int s, std::index_sequence<kChain...>) {
    using Accumulator = typename Dot::Accumulator;
    // To the compiler, chains that it knows to start alike are one chain.
    Accumulator start[Dot::kChains] = {};
    asm volatile("" : : "r"(start) : "memory");
    Accumulator chains[] = {start[kChain]...};
    typename Dot::Operand left = Dot::left(u);
    typename Dot::Operand right = Dot::right(s);
    for (int64_t step = 0; step < steps; ++step) (Dot::dot(chains[kChain], left, right), ...);

    typename Dot::Lane lanes[Dot::kChains * (sizeof(Accumulator) / sizeof(typename Dot::Lane))];
    __builtin_memcpy(lanes, chains, sizeof(lanes));
    double sum = 0;
    for (typename Dot::Lane lane : lanes) sum += static_cast<double>(lane);
    return sum;
  }
};

}  // namespace moeops::limits

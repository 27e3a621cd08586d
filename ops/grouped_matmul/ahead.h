// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

// Internal to each ISA file that includes this.
namespace {

// Asks for memory that will be read soon, a few lines at a time in step with the arithmetic. The
// fill buffers of L1 hold a line from memory as long as a core takes for hundreds of dots, and what
// misses L1 meanwhile waits for one: hence neither bursts nor more than memory can bring.
class Ahead {
 public:
  // `lines` from `from` on, in `requests` calls of request(); at most `most` lines in each, and
  // then not all of them.
  Ahead(const char* from, int64_t lines, int64_t requests, int most = 64) : cursor_(from) {
    if (from == nullptr || lines <= 0 || requests <= 0) return;
    const int64_t wanted = (lines + requests - 1) / requests;
    count_ = wanted < most ? static_cast<int>(wanted) : most;
    // Steps of at most a line, so that none is left out.
    step_ = (lines * 64 + requests * count_ - 1) / (requests * count_);
    if (step_ > 64) step_ = 64;
  }

  // The first lines of what the tile says is read next, as far as it is known.
  static Ahead next_panel(const Tile& tile, int64_t lines, int64_t requests) {
    return {tile.prefetch, lines < tile.prefetch_lines ? lines : tile.prefetch_lines, requests};
  }

  void request() {
    for (int i = 0; i < count_; ++i) {
      __builtin_prefetch(cursor_, 0, 2);  // to L2
      cursor_ += step_;
    }
  }

 private:
  const char* cursor_;
  int64_t step_ = 0;
  int count_ = 0;
};

}  // namespace

}  // namespace moeops::grouped_matmul_internal

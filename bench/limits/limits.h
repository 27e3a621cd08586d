// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/dtype.h>
#include <moeops/ops/core/huge_buffer.h>
#include <moeops/ops/core/status.h>

#include <cstdint>

#include "bench/limits/kernels.h"

namespace moeops {

// What the machine can do with a given number of threads, whatever ISA the operators are held to.
struct Limits {
  struct PerDtype {
    double f32 = 0;
    double bf16 = 0;
    double s8 = 0;
    double& of(DType dtype) {
      return dtype == DType::kF32 ? f32 : dtype == DType::kBf16 ? bf16 : s8;
    }
  };
  PerDtype dot_peak_gops;
  PerDtype vector_dot_peak_gops;  // without AMX
  double read_gbps = 0;
  double copy_gbps = 0;  // reading as much as writing
};

// Measures the limits, as often as wanted: every method takes some 50 to 150 ms and returns the
// best of a few short repetitions. A limit is a maximum: whatever else the machine does can only
// hide it.
class LimitsMeter {
 public:
  // Maps and touches the buffer that the bandwidths are measured on: of that many bytes if there is
  // room, or (0) of more than the last-level cache. invalid_argument when threads < 1,
  // out_of_memory when a quarter of the available memory is too little.
  static Status create(int threads, LimitsMeter* meter, int64_t bytes = 0);

  Limits measure() const;

  // 10^9 operations a second, a multiply-add being two, of the best dot instruction for f32, bf16
  // or s8 on independent chains in registers. bf16 and s8 may also be widened and computed in f32:
  // they never peak below it, though their own instruction may (vdpbf16ps does on some Xeons) or
  // be missing.
  double dot_peak(DType dtype) const;

  // The same without the tiles of AMX, which dwarf every vector instruction: what an operator held
  // to an ISA below amx can reach.
  double vector_dot_peak(DType dtype) const;

  // 10^9 bytes a second read from memory.
  double read_gbps() const;

  // 10^9 bytes a second, read and written together, when `reads` units come from memory for every
  // `writes` units that go there; both at least 1, together at most 256. With plain or
  // non-temporal stores, whichever is faster.
  double copy_gbps(int reads, int writes) const;

 private:
  int threads_ = 0;
  HugeBuffer buffer_;
};

}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/dtype.h>
#include <moeops/ops/core/machine.h>

#include <cstdint>

namespace moeops::routing_internal {

// One term of a sum of rows: weight * (row + bias).
struct RowTerm {
  const void* row;
  const void* bias;  // null in all terms, or in none
  float weight;
};

// out = round(skip1 + skip2 + the terms in their order), each element in one f32 accumulator, which
// starts at 0 where there is no skip. All rows are of one dtype and of `columns` elements.
struct RowSum {
  const RowTerm* terms;
  int64_t count;
  const void* skip1;  // optional
  const void* skip2;  // optional, only together with skip1
  void* out;
  int64_t columns;
  bool stream;  // write past the caches
  // The terms of the sum that comes next, if it is known: their rows are asked for in time.
  const RowTerm* next;
  int64_t next_count;
};

// A row to several places.
struct RowCopy {
  const void* from;
  int64_t bytes;
  void* const* to;  // [count]
  int64_t count;
  bool stream;  // write past the caches, which needs a fence() before anybody else reads
  // What is read next, if it is known and not read here. Quantising waits for its row, while
  // writing past the caches leaves time to fetch it: a quarter of the call's time.
  const void* next = nullptr;
  int64_t next_bytes = 0;
};

// What the operators that bring tokens to their experts and back do with a row.
struct RowKernels {
  const char* name;
  Isa isa;  // the least that they need

  void (*copy)(const RowCopy& copy);

  // The rest is for the f32, bf16 and f16 of float_index().
  // acc = fma(weight, value, acc)
  void (*sum_fma[3])(const RowSum& sum);
  // acc = acc + weight * value, rounded twice
  void (*sum[3])(const RowSum& sum);
  // q = clamp(rint(x * scale + offset), -128, 127), NaN gives 0
  void (*quantise[3])(const void* x, int64_t columns, float scale, float offset, int8_t* q);

  void (*fence)();
};

constexpr int float_index(DType dtype) {
  return dtype == DType::kF32 ? 0 : dtype == DType::kBf16 ? 1 : 2;
}

// Every set of kernels in kernels.inc, best first.
extern const RowKernels* const kRowKernels[];
extern const int kRowKernelsCount;

// The best that the ISA allows.
const RowKernels& row_kernels(Isa isa);

}  // namespace moeops::routing_internal

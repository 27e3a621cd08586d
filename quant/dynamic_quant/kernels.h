// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/dtype.h>
#include <moeops/ops/core/machine.h>

#include <cstdint>

namespace moeops::dynamic_quant_internal {

// Quantises one row as dynamic_quant.h defines it: v[j] = x[j] * smooth[j], or x[j] where smooth is
// null, to q[0 .. n) and *scale. x has the dtype that the function was chosen for. Nothing but
// these elements is touched, and nothing needs alignment. A row that is not finite gets NaN for
// its scale and zeros; one below 1e-36 gets zero and zeros.
using S8Row = void (*)(const void* x, const float* smooth, int64_t n, int8_t* q, float* scale);
// The same values plus 128: what VNNI instructions take, and zero is 128.
using U8Row = void (*)(const void* x, const float* smooth, int64_t n, uint8_t* q, float* scale);
// S8Row for calls that the caches cannot hold: q goes past them, to be ordered by fence(), and
// `next`, the row to come, is brought near meanwhile.
using StreamRow = void (*)(const void* x, const float* smooth, int64_t n, int8_t* q, float* scale,
                           const void* next);
// The asymmetric form; with a `next`, like StreamRow.
using AsymmetricRow = void (*)(const void* x, const float* smooth, int64_t n, int8_t* q,
                               float* scale, float* offset, const void* next);

// One function for each dtype of x.
template <class Row>
struct ByDType {
  Row f32, bf16, f16;

  Row of(DType x) const { return x == DType::kF32 ? f32 : x == DType::kBf16 ? bf16 : f16; }
};

// An ISA's functions. All ISAs give the same bits.
struct RowKernels {
  Isa isa;  // the least that they need
  ByDType<S8Row> s8;
  ByDType<U8Row> u8;
  ByDType<StreamRow> stream;
  ByDType<AsymmetricRow> asymmetric;
  void (*fence)();
};

// Every row of kernels.inc, best first.
extern const RowKernels* const kRowKernels[];
extern const int kRowKernelsCount;

// The best that `isa` allows.
const RowKernels& row_kernels(Isa isa);

}  // namespace moeops::dynamic_quant_internal

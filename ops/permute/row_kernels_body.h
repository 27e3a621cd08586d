// SPDX-License-Identifier: Apache-2.0
#pragma once

// The row kernels, for the one simd_<isa>.h that was included before.

#include <cstring>

#include "ops/permute/row_kernels.h"

namespace moeops::routing_internal {
namespace {

constexpr int64_t kLine = 64;

// Bytes from p to the next cache line.
int64_t to_line(const void* p) {
  return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(kLine));
}

// --- copies ---

// Places are written side by side, a few lines each in turn: one after the other, whole rows, is
// 10% slower.
constexpr int64_t kCopyBlock = 512;

// Whole lines, `to` on a line.
void stream_lines(const char* from, char* to, int64_t bytes) {
  constexpr int64_t kStep = static_cast<int64_t>(sizeof(simd::Vec));
  for (int64_t i = 0; i < bytes; i += kStep) {
    simd::stream(reinterpret_cast<float*>(to + i),
                 simd::load(reinterpret_cast<const float*>(from + i)));
  }
}

void copy(const RowCopy& copy) {
  const auto* from = static_cast<const char*>(copy.from);
  const int64_t bytes = copy.bytes;
  if (simd::kWidth == 1 || !copy.stream || bytes < 2 * kLine) {
    for (int64_t i = 0; i < copy.count; ++i) {
      std::memcpy(copy.to[i], from, static_cast<size_t>(bytes));
    }
    return;
  }
  if (copy.count == 0) return;
  const int64_t steps = (bytes + kCopyBlock - 1) / kCopyBlock * copy.count;
  const auto* next = static_cast<const char*>(copy.next);
  const int64_t next_step = copy.next_bytes / kLine / steps * kLine + kLine;
  int64_t fetched = 0;
  for (int64_t block = 0; block < bytes; block += kCopyBlock) {
    for (int64_t i = 0; i < copy.count; ++i) {
      auto* to = static_cast<char*>(copy.to[i]);
      // The lines of the place that begin in this block, and at the row's ends what is none.
      const int64_t head = to_line(to);
      const int64_t lines_end = head + (bytes - head) / kLine * kLine;
      const int64_t begin = head + block;
      const int64_t end = begin + kCopyBlock < lines_end ? begin + kCopyBlock : lines_end;
      if (block == 0) std::memcpy(to, from, static_cast<size_t>(head));
      if (begin < end) stream_lines(from + begin, to + begin, end - begin);
      if (block + kCopyBlock >= bytes) {
        std::memcpy(to + lines_end, from + lines_end, static_cast<size_t>(bytes - lines_end));
      }
      const int64_t fetch_end =
          fetched + next_step < copy.next_bytes ? fetched + next_step : copy.next_bytes;
      for (; fetched < fetch_end; fetched += kLine) __builtin_prefetch(next + fetched);
    }
  }
}

// --- sums ---

// Accumulators of a block of columns: 4 hide the latency of adding, and fill whole lines.
constexpr int kVecs = 4;
constexpr int64_t kColumns = kVecs * simd::kWidth;

// How far ahead a sum asks for its rows. Half a page: the hardware's own prefetch has to find out
// anew in each page that a row goes on.
constexpr int64_t kAheadBytes = 2048;

// Where row i is to be asked for while it is read at `column`: there or, past its end, in the next
// sum's row.
template <class T>
const char* ahead_of(const RowSum& sum, int64_t i, int64_t column) {
  constexpr int64_t kAhead = kAheadBytes / static_cast<int64_t>(sizeof(T));
  const void* row = sum.terms[i].row;
  column += kAhead;
  if (column >= sum.columns && i < sum.next_count) {
    row = sum.next[i].row;
    column -= sum.columns;
  }
  return reinterpret_cast<const char*>(static_cast<const T*>(row) + column);
}

template <bool kFma>
simd::Vec add(simd::Vec acc, simd::Vec weight, simd::Vec value) {
  return kFma ? simd::fma(weight, value, acc) : acc + weight * value;
}

template <class T, bool kFma, bool kBias, bool kStream>
void sum_block(const RowSum& sum, int64_t column) {
  simd::Vec acc[kVecs];
  const auto at = [column](const void* row, int v) {
    return static_cast<const T*>(row) + column + v * simd::kWidth;
  };
  for (int v = 0; v < kVecs; ++v) {
    acc[v] = sum.skip1 == nullptr ? simd::broadcast(0.0f) : simd::load(at(sum.skip1, v));
    if (sum.skip2 != nullptr) acc[v] = acc[v] + simd::load(at(sum.skip2, v));
  }
  for (int64_t i = 0; i < sum.count; ++i) {
    const RowTerm& term = sum.terms[i];
    const simd::Vec weight = simd::broadcast(term.weight);
    if (simd::kWidth > 1) {
      // Here and not in a function of its own: GCC drops calls that do nothing but this.
      const char* ahead = ahead_of<T>(sum, i, column);
      for (int64_t byte = 0; byte < kColumns * static_cast<int64_t>(sizeof(T)); byte += kLine) {
        __builtin_prefetch(ahead + byte);
      }
    }
    for (int v = 0; v < kVecs; ++v) {
      simd::Vec value = simd::load(at(term.row, v));
      if (kBias) value = value + simd::load(at(term.bias, v));
      acc[v] = add<kFma>(acc[v], weight, value);
    }
  }
  for (int v = 0; v < kVecs; ++v) {
    T* out = static_cast<T*>(sum.out) + column + v * simd::kWidth;
    if (kStream) {
      simd::stream(out, acc[v]);
    } else {
      simd::store(out, acc[v]);
    }
  }
}

// Columns [begin, end), fewer than a block.
template <class T, bool kFma, bool kBias>
void sum_rest(const RowSum& sum, int64_t begin, int64_t end) {
  for (int64_t column = begin; column < end; column += simd::kWidth) {
    const int64_t n = end - column < simd::kWidth ? end - column : simd::kWidth;
    const auto value_of = [column, n](const void* row) {
      return simd::load(static_cast<const T*>(row) + column, n);
    };
    simd::Vec acc = sum.skip1 == nullptr ? simd::broadcast(0.0f) : value_of(sum.skip1);
    if (sum.skip2 != nullptr) acc = acc + value_of(sum.skip2);
    for (int64_t i = 0; i < sum.count; ++i) {
      const RowTerm& term = sum.terms[i];
      simd::Vec value = value_of(term.row);
      if (kBias) value = value + value_of(term.bias);
      acc = add<kFma>(acc, simd::broadcast(term.weight), value);
    }
    simd::store(static_cast<T*>(sum.out) + column, acc, n);
  }
}

template <class T, bool kFma, bool kBias, bool kStream>
void sum_columns(const RowSum& sum) {
  int64_t column = 0;
  if (kStream) {
    column = to_line(sum.out) / static_cast<int64_t>(sizeof(T));
    if (column > sum.columns) column = sum.columns;
    sum_rest<T, kFma, kBias>(sum, 0, column);
  }
  for (; column + kColumns <= sum.columns; column += kColumns) {
    sum_block<T, kFma, kBias, kStream>(sum, column);
  }
  sum_rest<T, kFma, kBias>(sum, column, sum.columns);
}

template <class T, bool kFma>
void sum_rows(const RowSum& sum) {
  const bool bias = sum.count > 0 && sum.terms[0].bias != nullptr;
  if (bias) {
    sum.stream ? sum_columns<T, kFma, true, true>(sum) : sum_columns<T, kFma, true, false>(sum);
  } else {
    sum.stream ? sum_columns<T, kFma, false, true>(sum) : sum_columns<T, kFma, false, false>(sum);
  }
}

// --- static quantisation ---

template <class T>
void quantise(const void* x, int64_t columns, float scale, float offset, int8_t* q) {
  const auto* from = static_cast<const T*>(x);
  const simd::Vec s = simd::broadcast(scale);
  const simd::Vec o = simd::broadcast(offset);
  int64_t i = 0;
  for (; i + simd::kWidth <= columns; i += simd::kWidth) {
    simd::store(q + i, simd::load(from + i) * s + o);
  }
  simd::store(q + i, simd::load(from + i, columns - i) * s + o, columns - i);
}

void fence() { simd::stream_fence(); }

constexpr RowKernels make_row_kernels(const char* name, Isa isa) {
  return {name,
          isa,
          copy,
          {sum_rows<float, true>, sum_rows<bf16, true>, sum_rows<f16, true>},
          {sum_rows<float, false>, sum_rows<bf16, false>, sum_rows<f16, false>},
          {quantise<float>, quantise<bf16>, quantise<f16>},
          fence};
}

}  // namespace
}  // namespace moeops::routing_internal

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/tensor.h>

#include <algorithm>
#include <cstdint>

#include "ops/core/carver.h"
#include "ops/permute/row_kernels.h"

namespace moeops::routing_internal {

// Rows of any dtype, as bytes.
inline int64_t bytes_of_row(const TensorLayout& view) {
  return view.columns() * size_of(view.dtype);
}
inline char* row_at(const TensorView& view, int64_t i) {
  return static_cast<char*>(view.data) + i * view.row_stride * size_of(view.dtype);
}
inline const char* row_at(const ConstTensorView& view, int64_t i) {
  return static_cast<const char*>(view.data) + i * view.row_stride * size_of(view.dtype);
}

// Tokens that a worker takes at a time: so many that taking them costs nothing and that most know
// the next one, so few that all workers end together.
inline int64_t tokens_at_once(int64_t tokens, int64_t bytes_per_token, int workers) {
  constexpr int64_t kLeastBytes = int64_t{64} << 10;
  constexpr int64_t kMostBytes = int64_t{1} << 20;
  const int64_t bytes = std::max(bytes_per_token, int64_t{16});
  const int64_t fair = tokens / (int64_t{16} * workers);
  return std::max(std::clamp(fair, kLeastBytes / bytes, kMostBytes / bytes), int64_t{1});
}

// For each worker, room for what it knows of one token's rows, or with `tokens` of several, one
// after the other; on cache lines of its own.
template <class T>
class RowLists {
 public:
  RowLists(int workers, int64_t rows_per_token, int tokens = 1)
      : workers_(workers),
        stride_((tokens * rows_per_token * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64) {}

  void lay_out(Carver& scratch) { lists_ = scratch.take<char>(workers_ * stride_); }
  T* of(int worker) const { return reinterpret_cast<T*>(lists_ + worker * stride_); }

 private:
  int64_t workers_;
  int64_t stride_;
  char* lists_ = nullptr;
};

// A token's terms, for RowSum.
struct RowTerms {
  const RowTerm* terms;
  int64_t count;
};

// Sums the rows of the tokens [begin, end), each knowing the next one's. terms_of(t, room) is
// called for them in order; it may write the terms to `room`, of which there are two in `rooms`,
// each of `room_size` terms. start(t) sets the rest of `sum`.
template <class TermsOf, class Start>
void sum_tokens(int64_t begin, int64_t end, RowTerm* rooms, int64_t room_size, TermsOf terms_of,
                Start start, void (*kernel)(const RowSum&), RowSum& sum) {
  RowTerms next = terms_of(begin, rooms);
  for (int64_t t = begin; t < end; ++t) {
    sum.terms = next.terms;
    sum.count = next.count;
    next = t + 1 < end ? terms_of(t + 1, rooms + (t + 1 - begin) % 2 * room_size) : RowTerms{};
    sum.next = next.terms;
    sum.next_count = next.count;
    start(t);
    kernel(sum);
  }
}

}  // namespace moeops::routing_internal

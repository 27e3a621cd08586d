// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/pack_rows.h"

#include <moeops/ops/core/tensor.h>

#include <cstring>

#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

namespace {

const char* source_row(const SourceRows& source, int64_t i) {
  return offset(source.base, source.stride * (source.index != nullptr ? source.index[i] : i));
}

template <bool kAdd128>
void pack_chunk(const char* from, char* to) {
  uint64_t words[kChunkBytes / 8];
  std::memcpy(words, from, kChunkBytes);
  if constexpr (kAdd128) {
    for (uint64_t& word : words) word ^= 0x8080808080808080u;
  }
  std::memcpy(to, words, kChunkBytes);
}

// `next`: the row that comes after this one; rows from anywhere are too short for the processor to
// see that they are read in order.
template <bool kAdd128>
void pack_row(const char* from, const char* next, int64_t bytes, int64_t k_chunks,
              int64_t chunk_stride, char* to) {
  const int64_t whole = bytes / kChunkBytes;
  for (int64_t chunk = 0; chunk < whole; ++chunk, to += chunk_stride) {
    __builtin_prefetch(next + chunk * kChunkBytes);
    pack_chunk<kAdd128>(from + chunk * kChunkBytes, to);
  }
  if (whole < k_chunks) {
    char last[kChunkBytes] = {};
    std::memcpy(last, from + whole * kChunkBytes, static_cast<size_t>(bytes % kChunkBytes));
    pack_chunk<kAdd128>(last, to);
  }
}

}  // namespace

void pack_rows(const SourceRows& source, int64_t first, int64_t rows, int row_block,
               int64_t k_chunks, char* to) {
  const int64_t chunk_stride = int64_t{row_block} * kChunkBytes;
  const char* next = source_row(source, first);
  for (int64_t i = 0; i < rows; ++i) {
    const char* from = next;
    if (i + 1 < rows) next = source_row(source, first + i + 1);
    char* row_to = to + i / row_block * k_chunks * chunk_stride + i % row_block * kChunkBytes;
    if (source.add_128) {
      pack_row<true>(from, next, source.bytes, k_chunks, chunk_stride, row_to);
    } else {
      pack_row<false>(from, next, source.bytes, k_chunks, chunk_stride, row_to);
    }
  }
}

void RowsAhead::ask(int64_t done, int64_t all) {
  for (const int64_t end = end_ * done / all; next_ < end;) {
    const char* row = source_row(*source_, first_ + next_ / lines_);
    for (int64_t line = next_ % lines_; line < lines_ && next_ < end; ++line, ++next_) {
      __builtin_prefetch(row + line * 64, 0, 2);  // to L2
    }
  }
}

}  // namespace moeops::grouped_matmul_internal

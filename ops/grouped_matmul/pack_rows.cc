// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/pack_rows.h"

#include <moeops/ops/core/tensor.h>

#include <cstring>

#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

namespace {

template <bool kAdd128>
void pack_chunk(const char* from, char* to) {
  uint64_t words[kChunkBytes / 8];
  std::memcpy(words, from, kChunkBytes);
  if constexpr (kAdd128) {
    for (uint64_t& word : words) word ^= 0x8080808080808080u;
  }
  std::memcpy(to, words, kChunkBytes);
}

template <bool kAdd128>
void pack_row(const char* from, int64_t bytes, int64_t k_chunks, int64_t chunk_stride, char* to) {
  const int64_t whole = bytes / kChunkBytes;
  for (int64_t chunk = 0; chunk < whole; ++chunk, from += kChunkBytes, to += chunk_stride) {
    pack_chunk<kAdd128>(from, to);
  }
  if (whole < k_chunks) {
    char last[kChunkBytes] = {};
    std::memcpy(last, from, static_cast<size_t>(bytes % kChunkBytes));
    pack_chunk<kAdd128>(last, to);
  }
}

}  // namespace

void pack_rows(const SourceRows& source, int64_t first, int64_t rows, int row_block,
               int64_t k_chunks, char* to) {
  const int64_t chunk_stride = int64_t{row_block} * kChunkBytes;
  for (int64_t block = 0; block < rows; block += row_block, to += k_chunks * chunk_stride) {
    for (int64_t r = 0; r < row_block; ++r) {
      char* row_to = to + r * kChunkBytes;
      if (block + r >= rows) {
        for (int64_t chunk = 0; chunk < k_chunks; ++chunk) {
          std::memset(row_to + chunk * chunk_stride, 0, kChunkBytes);
        }
        continue;
      }
      const int64_t row = first + block + r;
      const char* from =
          offset(source.base, source.stride * (source.index != nullptr ? source.index[row] : row));
      if (source.add_128) {
        pack_row<true>(from, source.bytes, k_chunks, chunk_stride, row_to);
      } else {
        pack_row<false>(from, source.bytes, k_chunks, chunk_stride, row_to);
      }
    }
  }
}

}  // namespace moeops::grouped_matmul_internal

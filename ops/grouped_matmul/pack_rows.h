// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace moeops::grouped_matmul_internal {

// Rows in memory: row i is at base + stride * (index ? index[i] : i).
struct SourceRows {
  const char* base;
  int64_t stride;  // bytes
  const int32_t* index;
  int64_t bytes;  // of a row
  bool add_128;   // to each byte: s8 becomes u8
};

// Rows [first, first + rows) as tile kernels read them (kernels.h): [whole blocks][k_chunks]
// [row_block][64 bytes] at `to`. What a row has beyond its end is zero before add_128; rows that
// would fill the last block are left as they are.
void pack_rows(const SourceRows& source, int64_t first, int64_t rows, int row_block,
               int64_t k_chunks, char* to);

}  // namespace moeops::grouped_matmul_internal

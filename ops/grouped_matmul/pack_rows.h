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

// Asks, while other rows are multiplied, for those that are packed next: from anywhere in memory,
// they would be waited for line by line.
class RowsAhead {
 public:
  RowsAhead() = default;  // for none
  RowsAhead(const SourceRows& source, int64_t first, int64_t rows)
      : source_(&source), first_(first), lines_((source.bytes + 63) / 64), end_(rows * lines_) {}

  // For as much as makes it done / all of them, if that was not asked for before.
  void ask(int64_t done, int64_t all);

 private:
  const SourceRows* source_ = nullptr;
  int64_t first_ = 0;
  int64_t lines_ = 0;  // of a row
  int64_t next_ = 0;   // of the lines of all rows
  int64_t end_ = 0;
};

}  // namespace moeops::grouped_matmul_internal

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/params.h>
#include <moeops/ops/core/tensor.h>

#include <cinttypes>
#include <cstdint>

#include "ops/core/arg_check.h"
#include "ops/grouped_matmul/plan.h"

namespace moeops::grouped_matmul_internal {

// The shape that a group_list of this type has.
inline void check_group_list_view(ArgCheck& check, const ConstTensorView& list, ListType type,
                                  Dim& E) {
  check.choice("list_type", type, ListType::kSparse);
  Dim G{"G"};
  if (type == ListType::kSparse) {
    check.input("group_list", list, {DType::kI64}, {G, 2});
  } else {
    check.input("group_list", list, {DType::kI64}, {E});
  }
}

// Calls visit(expert, first row, rows) for every group, in row order, until it returns false.
template <class Visitor>
void for_each_group(const ConstTensorView& list, ListType type, Visitor visit) {
  int64_t row = 0;
  for (int64_t g = 0; g < list.dim(0); ++g) {
    int64_t expert = g;
    int64_t rows = 0;
    if (type == ListType::kSparse) {
      expert = list.row<int64_t>(g)[0];
      rows = list.row<int64_t>(g)[1];
    } else {
      // Unsigned, because a list that is not checked yet may hold anything.
      rows = static_cast<int64_t>(static_cast<uint64_t>(list.row<int64_t>(0)[g]) -
                                  static_cast<uint64_t>(type == ListType::kCumsum ? row : 0));
    }
    if (!visit(expert, row, rows)) return;
    row += rows;
  }
}

// The list's values: non-negative, cumsum non-decreasing, experts in [0, experts), at most
// max_rows rows together.
inline GroupStatistics check_group_list(ArgCheck& check, const ConstTensorView& list, ListType type,
                                        int64_t experts, int64_t max_rows) {
  GroupStatistics totals;
  if (!check.ok()) return totals;
  int64_t g = 0;
  for_each_group(list, type, [&](int64_t expert, int64_t row, int64_t rows) {
    // 256 entries that are fine take less time than the calls that would say so.
    const bool fine = expert >= 0 && expert < experts && rows >= 0 && rows <= max_rows - row;
    if (!fine) {
      check.require(expert >= 0 && expert < experts,
                    "group_list[%" PRId64 ",0] = %" PRId64 " is not in [0, %" PRId64 ")", g, expert,
                    experts);
      if (type == ListType::kCumsum) {
        const int64_t end = list.row<int64_t>(0)[g];
        check.require(end >= row,
                      "group_list[%" PRId64 "] = %" PRId64 " is less than the %" PRId64
                      " before it",
                      g, end, row);
      } else {
        check.require(rows >= 0, "group_list[%" PRId64 "%s] = %" PRId64 " is negative", g,
                      type == ListType::kSparse ? ",1" : "", rows);
      }
      check.require(rows <= max_rows - row,
                    "group_list makes more rows than there are: %" PRId64 " + %" PRId64
                    " at entry %" PRId64 ", M = %" PRId64,
                    row, rows, g, max_rows);
      if (!check.ok()) return false;
    }
    totals.rows += rows;
    totals.active += rows > 0 ? 1 : 0;
    ++g;
    return true;
  });
  return totals;
}

}  // namespace moeops::grouped_matmul_internal

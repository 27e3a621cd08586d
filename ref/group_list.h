// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/params.h>
#include <moeops/ops/core/tensor.h>

#include <cinttypes>
#include <vector>

#include "ops/core/arg_check.h"

namespace moeops::ref {

struct Group {
  int64_t expert;
  int64_t rows;
};

// The shape that a group_list of this type has; G is any size.
inline void check_group_list_view(ArgCheck& check, const ConstTensorView& list, ListType type,
                                  Dim& E, Dim& G) {
  check.choice("list_type", type, ListType::kSparse);
  if (type == ListType::kSparse) {
    check.input("group_list", list, {DType::kI64}, {G, 2});
  } else {
    check.input("group_list", list, {DType::kI64}, {E});
  }
}

// The groups in row order. Their values are checked: non-negative, cumsum non-decreasing, experts
// in [0, experts), at most max_rows rows together.
inline std::vector<Group> read_group_list(ArgCheck& check, const ConstTensorView& list,
                                          ListType type, int64_t experts, int64_t max_rows) {
  std::vector<Group> groups;
  if (!check.ok()) return groups;
  int64_t total = 0;
  for (int64_t g = 0; g < list.dim(0) && check.ok(); ++g) {
    Group group{g, 0};
    if (type == ListType::kSparse) {
      group = {list.row<int64_t>(g)[0], list.row<int64_t>(g)[1]};
      check.require(group.expert >= 0 && group.expert < experts,
                    "group_list[%" PRId64 ",0] = %" PRId64 " is not in [0, %" PRId64 ")", g,
                    group.expert, experts);
      check.require(group.rows >= 0, "group_list[%" PRId64 ",1] = %" PRId64 " is negative", g,
                    group.rows);
    } else {
      const int64_t value = list.row<int64_t>(0)[g];
      if (type == ListType::kCumsum) {
        check.require(value >= total,
                      "group_list[%" PRId64 "] = %" PRId64 " is less than the %" PRId64
                      " before it",
                      g, value, total);
        if (!check.ok()) break;
        group.rows = value - total;
      } else {
        check.require(value >= 0, "group_list[%" PRId64 "] = %" PRId64 " is negative", g, value);
        group.rows = value;
      }
    }
    if (!check.ok()) break;
    check.require(group.rows <= max_rows - total,
                  "group_list makes more rows than there are: %" PRId64 " + %" PRId64
                  " at entry %" PRId64 ", M = %" PRId64,
                  total, group.rows, g, max_rows);
    total += group.rows;
    groups.push_back(group);
  }
  return groups;
}

}  // namespace moeops::ref

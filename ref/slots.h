// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/tensor.h>

#include <algorithm>
#include <cinttypes>
#include <vector>

#include "ops/core/arg_check.h"

namespace moeops::ref {

// Slot t * K + k is the k-th choice of token t; expert_ids [T, K] says whom it chose.

inline int64_t expert_of(const ConstTensorView& expert_ids, int64_t slot) {
  const int64_t K = expert_ids.dim(1);
  return expert_ids.row<int32_t>(slot / K)[slot % K];
}

// Gating gives a finished token the id `experts`.
inline bool is_masked(int64_t id, int64_t experts) { return id == -1 || id == experts; }

inline void check_expert_ids(ArgCheck& check, const ConstTensorView& expert_ids, int64_t experts,
                             bool allow_masked) {
  for (int64_t t = 0; check.ok() && t < expert_ids.dim(0); ++t) {
    for (int64_t k = 0; check.ok() && k < expert_ids.dim(1); ++k) {
      const int64_t id = expert_ids.row<int32_t>(t)[k];
      check.require((id >= 0 && id < experts) || (allow_masked && is_masked(id, experts)),
                    "expert_ids[%" PRId64 ",%" PRId64 "] = %" PRId64 " is not in [0, %" PRId64
                    ")%s",
                    t, k, id, experts, allow_masked ? " and does not mask" : "");
    }
  }
}

// The slots whose expert lies in [begin, end), by (expert, slot) ascending.
inline std::vector<int64_t> sorted_slots(const ConstTensorView& expert_ids, int64_t begin,
                                         int64_t end) {
  std::vector<int64_t> slots;
  for (int64_t slot = 0; slot < expert_ids.dim(0) * expert_ids.dim(1); ++slot) {
    const int64_t id = expert_of(expert_ids, slot);
    if (id >= begin && id < end) slots.push_back(slot);
  }
  std::stable_sort(slots.begin(), slots.end(), [&](int64_t a, int64_t b) {
    return expert_of(expert_ids, a) < expert_of(expert_ids, b);
  });
  return slots;
}

}  // namespace moeops::ref

// SPDX-License-Identifier: Apache-2.0
#pragma once

// The kernel over the vector layer, for the ISA file that includes it after its simd_<isa>.h and
// these of its own:
//
//   VecI keys_of(Vec)          the lanes' keys
//   VecI minus_above(VecI c, VecI a, VecI b)
//                              c - 1 where a > b, else c
//   VecI keep_above(VecI a, VecI b, VecI keys)
//                              keys where a > b, else kNoKey
//   int64_t count_equal(VecI a, VecI b)
//   VecI lesser(VecI a, VecI b)
//   int64_t append(VecI keys, int32_t bound, int32_t id, int32_t* to_keys, int32_t* to_ids)
//                              packs the keys >= bound, and `id` + their lane, in the order of
//                              lanes; returns how many. May write whole registers.
//
// How a token's K best are found. Whatever is compared are integer keys, whose maxima need no care
// for NaN. The K-th largest of 16 columns' maxima is a bound that the K-th largest key cannot be
// below and that few others reach (11 of 128 random ones for K = 8). Those are packed together in
// the order of ids, and each finds its place by counting the ones before it. Nothing but their
// number depends on the data, so little is there for the branch predictor to get wrong.

#include "ops/core/simd_math.h"
#include "ops/gating/kernels.h"

namespace moeops::gating_internal {
namespace {

using simd::broadcast;
using simd::kWidth;
using simd::load;
using simd::store;
using simd::Vec;
using simd::VecI;

template <class Element>
void sigmoids(const Element* x, int64_t experts, float* n) {
  int64_t e = 0;
  for (; e + kWidth <= experts; e += kWidth) store(n + e, simd::sigmoid(load(x + e)));
  if (e < experts) store(n + e, simd::sigmoid(load(x + e, experts - e)));
}

// The numerators of softmax.
template <class Element>
void exponentials(const Element* x, int64_t experts, float* n) {
  // max gives its second operand where the first is NaN, as fmax does.
  Vec best = broadcast(-__builtin_inff());
  int64_t e = 0;
  for (; e + kWidth <= experts; e += kWidth) {
    const Vec v = load(x + e);
    store(n + e, v);
    best = simd::max(v, best);
  }
  if (e < experts) {
    store(n + e, load(x + e, experts - e));
    // Padding that changes no maximum, and whose exp is no slower than the others: a result that
    // underflows costs some CPUs hundreds of cycles.
    for (int64_t i = experts; i < e + kWidth; ++i) n[i] = n[0];
    best = simd::max(load(n + e), best);
  }
  const Vec max = broadcast(simd::reduce_max(best));
  for (e = 0; e < experts; e += kWidth) store(n + e, simd::exp(load(n + e) - max));
}

// Divides `kRows` rows by their sums. A sum in ascending order waits for each addition; those of
// several rows wait together.
template <int kRows>
void divide_by_sum(float* n, int64_t row_stride, int64_t experts) {
  float sums[kRows] = {};
  for (int64_t e = 0; e < experts; ++e) {
    for (int r = 0; r < kRows; ++r) sums[r] = sums[r] + n[r * row_stride + e];
  }
  for (int r = 0; r < kRows; ++r) {
    float* row = n + r * row_stride;
    const Vec sum = broadcast(sums[r]);
    for (int64_t e = 0; e < experts; e += kWidth) store(row + e, load(row + e) / sum);
  }
}

// A register of kFirst in the first n lanes and kOther in the others, for n in [0, kWidth].
template <int32_t kFirst, int32_t kOther>
VecI first_lanes(int64_t n) {
  struct Lanes {
    int32_t lane[2 * kWidth];
    constexpr Lanes() : lane() {
      for (int i = 0; i < 2 * kWidth; ++i) lane[i] = i < kWidth ? kFirst : kOther;
    }
  };
  static constexpr Lanes kLanes;
  return load(kLanes.lane + kWidth - n);
}

struct TopTwo {
  int32_t best;
  int32_t second;
};

// Writes the keys of one group's b = n + bias. kTop: how many of the largest ones are asked for.
template <int kTop>
TopTwo make_keys(const float* n, const float* bias, int64_t size, int32_t* keys) {
  VecI best = broadcast(kNoKey);
  VecI second = best;
  const auto take = [&](Vec b, int64_t i, int64_t lanes) {
    VecI key = keys_of(b);
    if (kWidth > 1 && lanes < kWidth) key = lesser(key, first_lanes<INT32_MAX, kNoKey>(lanes));
    store(keys + i, key);
    if (kTop > 1) second = simd::max(second, lesser(best, key));
    if (kTop > 0) best = simd::max(best, key);
  };
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    const Vec score = load(n + i);
    take(bias != nullptr ? score + load(bias + i) : score, i, kWidth);
  }
  if (i < size) {
    const Vec score = load(n + i);
    take(bias != nullptr ? score + load(bias + i, size - i) : score, i, size - i);
  }
  if (kTop == 0) return {};
  const int32_t first = simd::reduce_max(best);
  if (kTop == 1) return {first, first};
  // The second largest is in another lane's `best`, or in the winner's `second`.
  const VecI winner = broadcast(first);
  if (count_equal(best, winner) > 1) return {first, first};
  return {first, simd::reduce_max(simd::max(second, keep_above(winner, best, best)))};
}

// Minus the ranks of kWidth of the n keys, those from `at` on: how many come before each, being
// larger, or equal and of lower index. The array is padded with kNoKey.
inline VecI minus_ranks(const int32_t* keys, int64_t n, int64_t at) {
  const VecI own = load(keys + at);
  // A key that equals `own` is above `own` - 1.
  const VecI less = own + broadcast(-1);
  VecI ranks = broadcast(0);
  int64_t j = 0;
  for (; j < at; ++j) ranks = minus_above(ranks, broadcast(keys[j]), less);
  for (; j < at + kWidth && j < n; ++j) {
    // Lanes up to j's own have the lower index.
    const VecI limit = own + first_lanes<0, -1>(j - at + 1);
    ranks = minus_above(ranks, broadcast(keys[j]), limit);
  }
  for (; j < n; ++j) ranks = minus_above(ranks, broadcast(keys[j]), own);
  return ranks;
}

// The k-th largest of the maxima of kColumns columns into which the groups' keys are dealt:
// no more than the k-th largest key.
template <int kColumns>
int32_t bound_of(const Plan& plan, const int32_t* keys, const int32_t* groups, int64_t group_count,
                 int64_t k) {
  constexpr int kVectors = kColumns / kWidth;
  VecI best[kVectors];
  for (VecI& v : best) v = broadcast(kNoKey);
  for (int64_t m = 0; m < group_count; ++m) {
    const int32_t* group = keys + groups[m] * plan.group_stride;
    for (int64_t i = 0; i < plan.group_size; i += kColumns) {
      for (int v = 0; v < kVectors; ++v) {
        if (i + v * kWidth < plan.group_size) {
          best[v] = simd::max(best[v], load(group + i + v * kWidth));
        }
      }
    }
  }
  alignas(64) int32_t columns[kColumns];
  for (int v = 0; v < kVectors; ++v) store(columns + v * kWidth, best[v]);
  // The k-th largest is the largest one of rank k - 1 and more.
  const VecI limit = broadcast(static_cast<int32_t>(2 - k));
  VecI others = broadcast(kNanKey);
  for (int v = 0; v < kVectors; ++v) {
    const VecI ranks = minus_ranks(columns, kColumns, v * kWidth);
    others = simd::max(others, keep_above(limit, ranks, best[v]));
  }
  return simd::reduce_max(others);
}

// Packs the groups' keys >= bound together, and their ids. kFewTies: of those that equal the bound,
// only the ones that come early enough to be among the k largest, and a register's worth more.
template <bool kFewTies>
int64_t collect(const Plan& plan, const Scratch& scratch, const int32_t* groups,
                int64_t group_count, int64_t k, int32_t bound) {
  int64_t n = 0;
  for (int64_t m = 0; m < group_count; ++m) {
    const int64_t g = groups[m];
    for (int64_t i = 0; i < plan.group_size; i += kWidth) {
      n += append(load(scratch.keys + g * plan.group_stride + i),
                  kFewTies && n >= k ? bound + 1 : bound,
                  static_cast<int32_t>(g * plan.group_size + i), scratch.candidate_keys + n,
                  scratch.candidate_ids + n);
    }
  }
  return n;
}

// Puts the ids of the k largest keys of these groups in order. Returns the k-th largest.
inline int32_t select(const Plan& plan, const Scratch& scratch, const int32_t* groups,
                      int64_t group_count, int64_t k) {
  // More columns for a larger k, and none where they would not leave out much.
  const int64_t there = group_count * plan.group_size;
  int32_t bound = kNanKey;
  if (k <= 10 && there > 32) {
    bound = bound_of<16>(plan, scratch.keys, groups, group_count, k);
  } else if (k <= 48 && there > 128) {
    bound = bound_of<64>(plan, scratch.keys, groups, group_count, k);
  }
  int64_t n = collect<false>(plan, scratch, groups, group_count, k, bound);
  if (n > 32) n = collect<true>(plan, scratch, groups, group_count, k, bound);

  const int32_t* keys = scratch.candidate_keys;
  store(scratch.candidate_keys + n, broadcast(kNoKey));
  int32_t last = kNoKey;
  for (int64_t at = 0; at < n; at += kWidth) {
    alignas(64) int32_t ranks[kWidth];
    store(ranks, minus_ranks(keys, n, at));
    for (int64_t i = at; i < at + kWidth && i < n; ++i) {
      const int64_t rank = -ranks[i - at];
      scratch.order[rank] = scratch.candidate_ids[i];
      last = rank == k - 1 ? keys[i] : last;
    }
  }
  return last;
}

// Leaves the ids of the token's k best experts in scratch.order.
inline void choose(const GatingTopKArgs& args, const Plan& plan, const Scratch& scratch,
                   const float* n) {
  const float* bias = args.bias.present() ? args.bias.row<float>(0) : nullptr;
  if (args.k_group == plan.group_count) {
    for (int64_t g = 0; g < plan.group_count; ++g) {
      const int64_t e = g * plan.group_size;
      make_keys<0>(n + e, bias != nullptr ? bias + e : nullptr, plan.group_size,
                   scratch.keys + g * plan.group_stride);
    }
    select(plan, scratch, scratch.all_groups, plan.group_count, args.k);
    return;
  }
  for (int64_t g = 0; g < plan.group_count; ++g) {
    const int64_t e = g * plan.group_size;
    const float* group_bias = bias != nullptr ? bias + e : nullptr;
    int32_t* keys = scratch.keys + g * plan.group_stride;
    if (args.group_select == GroupSelect::kMax) {
      scratch.group_keys[g] = make_keys<1>(n + e, group_bias, plan.group_size, keys).best;
    } else {
      const TopTwo top = make_keys<2>(n + e, group_bias, plan.group_size, keys);
      scratch.group_keys[g] = key_of(value_of(top.best) + value_of(top.second));
    }
  }
  store(scratch.group_keys + plan.group_count, broadcast(kNoKey));
  int64_t kept = 0;
  for (int64_t g = 0; g < plan.group_count; g += kWidth) {
    const VecI ranks = minus_ranks(scratch.group_keys, plan.group_count, g);
    kept += append(ranks, static_cast<int32_t>(1 - args.k_group), static_cast<int32_t>(g),
                   scratch.candidate_keys + kept, scratch.kept_groups + kept);
  }
  if (select(plan, scratch, scratch.kept_groups, kept, args.k) > kMinusInfinityKey) return;

  // So few numbers in the kept groups that the others' -inf counts.
  int64_t m = 0;
  for (int64_t g = 0; g < plan.group_count; ++g) {
    if (m < kept && scratch.kept_groups[m] == g) {
      ++m;
      continue;
    }
    int32_t* keys = scratch.keys + g * plan.group_stride;
    for (int64_t i = 0; i < plan.group_size; ++i) keys[i] = kMinusInfinityKey;
  }
  select(plan, scratch, scratch.all_groups, plan.group_count, args.k);
}

inline void write_token(const GatingTopKArgs& args, const Plan& plan, const int32_t* order,
                        const float* n, int64_t t) {
  float divisor = 1.0f;  // y / 1 is y
  if (args.renormalize) {
    float sum = 0.0f;
    for (int64_t k = 0; k < args.k; ++k) sum = sum + n[order[k]];
    divisor = sum + args.eps;
  }
  float* weights = args.weights.row<float>(t);
  for (int64_t k = 0; k < args.k; ++k) {
    weights[k] = n[order[k]] / divisor * args.routed_scaling_factor;
  }
  const bool finished = args.finished.present() && args.finished.row<uint8_t>(0)[t] != 0;
  int32_t* ids = args.expert_ids.row<int32_t>(t);
  for (int64_t k = 0; k < args.k; ++k) {
    ids[k] = finished ? static_cast<int32_t>(plan.experts) : order[k];
  }
  if (args.row_index.present()) {
    int32_t* row_index = args.row_index.row<int32_t>(t);
    for (int64_t k = 0; k < args.k; ++k) {
      row_index[k] = static_cast<int32_t>(k * plan.tokens + t);
    }
  }
  if (args.scores.present()) {
    __builtin_memcpy(args.scores.row<float>(t), n,
                     static_cast<size_t>(plan.experts) * sizeof(float));
  }
}

template <class Element>
void run_blocks(const GatingTopKArgs& args, const Plan& plan, const Scratch& scratch, int64_t first,
                int64_t last) {
  for (int64_t g = 0; g < plan.group_count; ++g) scratch.all_groups[g] = static_cast<int32_t>(g);
  for (int64_t t = first; t < last; t += plan.block) {
    const int64_t rows = plan.block < last - t ? plan.block : last - t;
    for (int64_t r = 0; r < rows; ++r) {
      const Element* x = args.logits.row<Element>(t + r);
      float* n = scratch.scores + r * plan.row_stride;
      if (args.score == GatingScore::kSigmoid) {
        sigmoids(x, plan.experts, n);
      } else {
        exponentials(x, plan.experts, n);
      }
    }
    if (args.score == GatingScore::kSoftmax) {
      int64_t r = 0;
      for (; r + 8 <= rows; r += 8) {
        divide_by_sum<8>(scratch.scores + r * plan.row_stride, plan.row_stride, plan.experts);
      }
      for (; r < rows; ++r) {
        divide_by_sum<1>(scratch.scores + r * plan.row_stride, plan.row_stride, plan.experts);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float* n = scratch.scores + r * plan.row_stride;
      choose(args, plan, scratch, n);
      write_token(args, plan, scratch.order, n, t + r);
    }
  }
}

void run(const GatingTopKArgs& args, const Plan& plan, const Scratch& scratch, int64_t first,
         int64_t last) {
  switch (args.logits.dtype) {
    case DType::kF32:
      return run_blocks<float>(args, plan, scratch, first, last);
    case DType::kBf16:
      return run_blocks<bf16>(args, plan, scratch, first, last);
    default:
      return run_blocks<f16>(args, plan, scratch, first, last);
  }
}

}  // namespace
}  // namespace moeops::gating_internal

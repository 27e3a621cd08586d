// SPDX-License-Identifier: Apache-2.0
#pragma once

// The spellings of parameters that several operators take.

#include <moeops/ops/core/params.h>
#include <moeops/ops/packed_weights.h>
#include <moeops/ref/ref.h>

#include "tools/opdiff/operators.h"

namespace moeops::tools {

// A case's plain weights in the form that optimised operators take: in their own dtype.
inline Status pack_weights(Call& call, const ref::Weights& weights, WeightRole role, Gate gate,
                           PackedWeights* packed) {
  return PackedWeights::pack(call.context(), {.dtype = weights.w.dtype, .role = role, .gate = gate},
                             weights.w, weights.transpose_w, weights.w_scale, packed);
}
inline Status pack_plain(Call& call, const ref::Weights& weights, PackedWeights* packed) {
  return pack_weights(call, weights, WeightRole::kPlain, Gate::kLeft, packed);
}

inline ListType list_type(Params& params) {
  return params.choice<ListType>(
      "list_type",
      {{"count", ListType::kCount}, {"cumsum", ListType::kCumsum}, {"sparse", ListType::kSparse}});
}

inline Activation activation(Params& params) {
  return params.choice<Activation>("activation", {{"none", Activation::kNone},
                                                  {"relu", Activation::kRelu},
                                                  {"gelu_tanh", Activation::kGeluTanh},
                                                  {"silu", Activation::kSilu}});
}

inline GatedActivation gated_activation(Params& params) {
  return params.choice<GatedActivation>("activation", {{"silu", GatedActivation::kSilu},
                                                       {"swiglu_oai", GatedActivation::kSwigluOai},
                                                       {"gelu_tanh", GatedActivation::kGeluTanh}});
}

inline Gate gate(Params& params) {
  return params.choice<Gate>(
      "gate",
      {{"left", Gate::kLeft}, {"right", Gate::kRight}, {"interleaved", Gate::kInterleaved}});
}

// out_dtype; its default is the input's dtype, f32 for s8 (operators.md).
inline DType out_dtype(Params& params, DType x) {
  const DType given = params.choice<DType>("out_dtype", {{"default", DType::kNone},
                                                         {"f32", DType::kF32},
                                                         {"bf16", DType::kBf16},
                                                         {"f16", DType::kF16},
                                                         {"i32", DType::kI32},
                                                         {"s8", DType::kS8}});
  if (given != DType::kNone) return given;
  return x == DType::kS8 || x == DType::kNone ? DType::kF32 : x;
}

// A random group_list of the type that the parameters name: E experts, M rows, the last few of
// which no group covers.
inline void make_group_list(Maker& maker, int64_t E, int64_t M) {
  const ListType type = list_type(maker.params());
  std::vector<int64_t> rows = maker.counts(E, M - M / 8);
  if (type == ListType::kSparse) {
    std::vector<int64_t> pairs;
    for (int64_t e = E; e-- > 0;) {
      pairs.push_back(e);
      pairs.push_back(rows[static_cast<size_t>(e)]);
    }
    maker.values("group_list", DType::kI64, {E, 2}, pairs);
    return;
  }
  if (type == ListType::kCumsum) {
    for (size_t e = 1; e < rows.size(); ++e) rows[e] += rows[e - 1];
  }
  maker.values("group_list", DType::kI64, {E}, rows);
}

// What an f32 sum of K products of standard normal values may be off by: partial sums grow as
// sqrt(K) and each of K roundings adds up to 2^-24 of one, so the error's deviation is about
// K * 2^-24; three times that.
inline double gemm_atol(int64_t K) { return 1e-6 + 2e-7 * static_cast<double>(K); }

}  // namespace moeops::tools

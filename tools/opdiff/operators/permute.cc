// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/token_permute.h>
#include <moeops/ref/ref.h>

#include <algorithm>
#include <numeric>

#include "tools/opdiff/operators/routing.h"

namespace moeops::tools {

namespace {

Status run_token_permute(Call& call) {
  const int64_t N = product(call.dim("expert_ids", 0), call.dim("expert_ids", 1));
  TokenPermuteArgs args;
  args.tokens = call.in("tokens");
  args.expert_ids = call.in("expert_ids");
  args.num_out_tokens = call.params().integer("num_out_tokens", 0);
  int64_t M = N;
  if (args.num_out_tokens > 0) M = std::min(N, args.num_out_tokens);
  if (args.num_out_tokens < 0) M = std::max<int64_t>(0, N + args.num_out_tokens);
  args.permuted = call.out("permuted", dtype_like(args.tokens), {M, call.dim("tokens", 1)});
  args.sorted_indices = call.out("sorted_indices", DType::kI32, {N});
  return call.impl() == Impl::kRef ? ref::token_permute(args) : token_permute(call.context(), args);
}

void make_token_permute(Maker& maker) {
  const int64_t T = maker.dim("T"), H = maker.dim("H"), K = maker.dim("K"), E = maker.dim("E");
  maker.params().integer("num_out_tokens", 0);
  maker.normal("tokens", maker.dtype(), {T, H});
  maker.expert_ids("expert_ids", T, K, E);
}

Status run_token_unpermute(Call& call) {
  TokenUnpermuteArgs args;
  args.permuted = call.in("permuted");
  args.sorted_indices = call.in("sorted_indices");
  args.probs = call.in("probs");
  args.tokens = call.out(
      "tokens", dtype_like(args.permuted),
      {call.dim(args.probs.present() ? "probs" : "sorted_indices", 0), call.dim("permuted", 1)});
  return call.impl() == Impl::kRef ? ref::token_unpermute(args)
                                   : token_unpermute(call.context(), args);
}

// M: fewer rows than slots, as after a cutoff.
void make_token_unpermute(Maker& maker) {
  const int64_t T = maker.dim("T"), H = maker.dim("H"), K = maker.dim("K");
  const int64_t N = product(T, K);
  maker.normal("permuted", maker.dtype(), {maker.dim("M", N), H});
  std::vector<int64_t> rows(static_cast<size_t>(std::max<int64_t>(N, 0)));
  std::iota(rows.begin(), rows.end(), 0);
  std::shuffle(rows.begin(), rows.end(), maker.random());
  maker.values("sorted_indices", DType::kI32, {N}, rows);
  maker.uniform("probs", {T, K}, 0.0f, 1.0f);
  maker.tolerance("tokens", rounded(maker.dtype()));
}

Status run_permute_with_map(Call& call) {
  PermuteWithMapArgs args;
  args.tokens = call.in("tokens");
  args.map = call.in("map");
  args.probs = call.in("probs");
  args.drop_and_pad = call.params().flag("drop_and_pad");
  args.num_out_tokens = call.params().integer("num_out_tokens", 0);
  int64_t M = args.num_out_tokens;
  if (!args.drop_and_pad) {
    const auto* map = static_cast<const uint8_t*>(args.map.data);
    const int64_t places = args.map.dtype == DType::kBool && args.map.rank == 2
                               ? product(args.map.dim(0), args.map.dim(1))
                               : 0;
    M = places - std::count(map, map + places, uint8_t{0});
  }
  args.permuted = call.out("permuted", dtype_like(args.tokens), {M, call.dim("tokens", 1)});
  args.sorted_indices = call.out("sorted_indices", DType::kI32, {M});
  if (args.probs.present()) args.permuted_probs = call.out("permuted_probs", DType::kF32, {M});
  return call.impl() == Impl::kRef ? ref::permute_with_map(args)
                                   : permute_with_map(call.context(), args);
}

void make_permute_with_map(Maker& maker) {
  const int64_t T = maker.dim("T"), H = maker.dim("H"), E = maker.dim("E");
  maker.params().flag("drop_and_pad");
  maker.params().integer("num_out_tokens", 0);
  maker.normal("tokens", maker.dtype(), {T, H});
  maker.integers("map", DType::kBool, {T, E}, 0, 1);
  maker.uniform("probs", {T, E}, 0.0f, 1.0f);
}

Status run_unpermute_with_map(Call& call) {
  UnpermuteWithMapArgs args;
  args.permuted = call.in("permuted");
  args.sorted_indices = call.in("sorted_indices");
  args.permuted_probs = call.in("permuted_probs");
  args.num_tokens = call.params().integer("num_tokens", 0);
  args.tokens =
      call.out("tokens", dtype_like(args.permuted), {args.num_tokens, call.dim("permuted", 1)});
  return call.impl() == Impl::kRef ? ref::unpermute_with_map(args)
                                   : unpermute_with_map(call.context(), args);
}

void make_unpermute_with_map(Maker& maker) {
  const int64_t M = maker.dim("M"), H = maker.dim("H");
  const int64_t T = maker.parameter("num_tokens", "T");
  maker.normal("permuted", maker.dtype(), {M, H});
  maker.integers("sorted_indices", DType::kI32, {M}, 0, std::max<int64_t>(T - 1, 0));
  maker.uniform("permuted_probs", {M}, 0.0f, 1.0f);
  maker.tolerance("tokens", rounded(maker.dtype()));
}

}  // namespace

Operator token_permute_operator() {
  return {"token_permute", run_token_permute, make_token_permute};
}

Operator token_unpermute_operator() {
  return {"token_unpermute", run_token_unpermute, make_token_unpermute};
}

Operator permute_with_map_operator() {
  return {"permute_with_map", run_permute_with_map, make_permute_with_map};
}

Operator unpermute_with_map_operator() {
  return {"unpermute_with_map", run_unpermute_with_map, make_unpermute_with_map};
}

}  // namespace moeops::tools

// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/gating_top_k.h>
#include <omp.h>

#include <algorithm>
#include <cinttypes>

#include "ops/core/arg_check.h"
#include "ops/gating/kernels.h"

namespace moeops {

namespace gating_internal {

namespace {

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Hands out a worker's memory piece by piece; without memory, only counts.
class Words {
 public:
  explicit Words(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t n) {
    static_assert(sizeof(T) == 4);
    char* piece = offset(memory_, 4 * taken_);
    taken_ += padded(n);
    return reinterpret_cast<T*>(piece);
  }
  int64_t taken() const { return taken_; }

 private:
  char* memory_;
  int64_t taken_ = 0;
};

Scratch cut(const Plan& plan, Words& words) {
  Scratch s;
  s.scores = words.take<float>(plan.block * plan.row_stride);
  s.keys = words.take<int32_t>(plan.group_count * plan.group_stride);
  s.group_keys = words.take<int32_t>(plan.group_count + kPad);
  s.all_groups = words.take<int32_t>(plan.group_count);
  s.kept_groups = words.take<int32_t>(plan.group_count + kPad);
  s.candidate_keys = words.take<int32_t>(plan.experts + kPad);
  s.candidate_ids = words.take<int32_t>(plan.experts + kPad);
  s.order = words.take<int32_t>(plan.experts);
  return s;
}

}  // namespace

Plan make_plan(const GatingTopKArgs& args, int workers) {
  Plan plan;
  plan.tokens = args.logits.dim(0);
  plan.experts = args.logits.dim(1);
  plan.group_count = args.group_count;
  plan.group_size = plan.experts / plan.group_count;
  plan.group_stride = padded(plan.group_size);
  // As many as the additions that a core has under way, while their scores stay in its L1.
  plan.block = plan.experts <= 1024 ? 8 : 1;
  plan.row_stride = padded(plan.experts) + kPad;  // the last group is read a register at a time
  // A score takes about a nanosecond, starting a team some microseconds.
  constexpr int64_t kScoresOfAWorker = 16384;
  plan.team = static_cast<int>(
      std::clamp<int64_t>(plan.tokens * plan.experts / kScoresOfAWorker, 1, workers));
  Words words(nullptr);
  cut(plan, words);
  plan.scratch_words = words.taken();
  return plan;
}

Scratch cut_scratch(const Plan& plan, void* memory) {
  Words words(memory);
  return cut(plan, words);
}

}  // namespace gating_internal

namespace {

using namespace gating_internal;

void check_params(ArgCheck& check, const GatingTopKArgs& args, int64_t T, int64_t E) {
  if (!check.ok()) return;
  const int64_t groups = args.group_count;
  check.require(args.k >= 1, "k = %" PRId64 " is less than 1", args.k);
  check.require(groups >= 1, "group_count = %" PRId64 " is less than 1", groups);
  check.require(args.k_group >= 1 && args.k_group <= groups,
                "k_group = %" PRId64 " is not in [1, group_count = %" PRId64 "]", args.k_group,
                groups);
  if (!check.ok()) return;
  check.require(E % groups == 0,
                "group_count = %" PRId64 " does not divide the %" PRId64 " experts", groups, E);
  check.require(args.k <= E / groups * args.k_group,
                "k = %" PRId64 " is more than the %" PRId64 " experts to choose from", args.k,
                E / groups * args.k_group);
  check.require(groups == 1 || args.group_select != GroupSelect::kTop2Sum || E / groups >= 2,
                "group_select is top2_sum, but a group has %" PRId64 " expert", E / groups);
  check.require(E <= INT32_MAX, "E = %" PRId64 " does not fit in i32", E);
  check.require(!args.row_index.present() || T <= INT32_MAX / args.k,
                "row_index: T * K = %" PRId64 " * %" PRId64 " does not fit in i32", T, args.k);
}

Status check_call(const GatingTopKArgs& args) {
  ArgCheck check("gating_top_k");
  check.choice("score", args.score, GatingScore::kSigmoid);
  check.choice("group_select", args.group_select, GroupSelect::kTop2Sum);
  Dim T{"T"}, E{"E"}, K{"K", args.k, "k"};
  check.input("logits", args.logits, {DType::kF32, DType::kBf16, DType::kF16}, {T, E});
  check.optional_input("bias", args.bias, {DType::kF32}, {E});
  check.optional_input("finished", args.finished, {DType::kBool}, {T});
  check_params(check, args, T.value, E.value);
  check.output("weights", args.weights, {DType::kF32}, {T, K});
  check.output("expert_ids", args.expert_ids, {DType::kI32}, {T, K});
  check.optional_output("scores", args.scores, {DType::kF32}, {T, E});
  check.optional_output("row_index", args.row_index, {DType::kI32}, {T, K});
  return check.finish();
}

const Kernel& best_kernel(Isa isa) {
  const Kernel* const* kernel = kKernels;
  while ((*kernel)->isa > isa) ++kernel;
  return **kernel;
}

}  // namespace

Status gating_top_k(Context& ctx, const GatingTopKArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  MOEOPS_RETURN_IF_ERROR(check_call(args));
  const int64_t T = args.logits.dim(0);
  if (T == 0) return {};

  const Plan plan = make_plan(args, ctx.workers());
  void* memory = nullptr;
  MOEOPS_RETURN_IF_ERROR(ctx.reserve_scratch(plan.team * plan.scratch_words * 4, &memory));
  const Kernel& kernel = best_kernel(ctx.isa());
  const auto work = [&](int worker, int team) {
    const Scratch scratch =
        cut_scratch(plan, static_cast<int32_t*>(memory) + worker * plan.scratch_words);
    kernel.run(args, plan, scratch, T * worker / team, T * (worker + 1) / team);
  };
  if (plan.team == 1) {
    work(0, 1);
  } else {
#pragma omp parallel num_threads(plan.team)
    work(omp_get_thread_num(), omp_get_num_threads());
  }
  return {};
}

}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/weights.h"

#include <fmt/format.h>

#include <atomic>

#include "ops/core/team.h"
#include "tools/tensor_file/error.h"

namespace moeops::bench {

using tools::Error;

void check(const Status& status) {
  if (!status.ok()) throw Error(status.message());
}

void pack(const WeightValues& values, int64_t first, int64_t experts, PackedWeightsForm form,
          int threads, PackedWeights* out) {
  const GemmForm& gemm = values.form();
  form.dtype = gemm.x;
  form.experts = experts;
  form.n = gemm.n;
  form.k = gemm.k;
  check(PackedWeights::create(form, out));
  ConstTensorView scales;
  if (gemm.has_scales() && form.scales) scales = {values.scales().data(), {gemm.n}};
  std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads)
  {
    std::vector<char> plain(static_cast<size_t>(gemm.expert_bytes()));
#pragma omp for schedule(dynamic)
    for (int64_t e = 0; e < experts; ++e) {
      values.fill_expert(first + e, plain.data());
      const ConstTensorView w{plain.data(), {gemm.x, {gemm.n, gemm.k}}};
      if (!out->pack_expert(e, w, false, scales).ok()) failed = true;
    }
  }
  if (failed) throw Error("packing the weights failed");
}

std::string kernel_of(Context& ctx, const PackedWeights& weights) {
  grouped_matmul_internal::TileDriver driver;
  check(driver.prepare(ctx, weights, 1, 1, ctx.workers(), false));
  return fmt::format("{} tiles, {}", driver.kernel().name, to_string(ctx.isa()));
}

grouped_matmul_internal::Problem prepare(Context& ctx, const PackedWeights& weights, int64_t rows,
                                         int64_t groups, int workers,
                                         grouped_matmul_internal::TileDriver* driver) {
  if (workers == 0) workers = team_for_rows(ctx, rows, weights.bytes() / weights.experts());
  check(driver->prepare(ctx, weights, rows, groups, workers, false));
  grouped_matmul_internal::Problem problem = driver->problem();
  problem.groups = {rows, groups};
  return problem;
}

std::string plan_of(Context& ctx, const PackedWeights& weights, int64_t rows, int64_t groups,
                    int workers) {
  grouped_matmul_internal::TileDriver driver;
  const auto problem = prepare(ctx, weights, rows, groups, workers, &driver);
  return describe(problem, make_plan(problem));
}

void PlainWeights::load(const WeightValues& values, int64_t experts, int threads) {
  form_.emplace(values.form());
  experts_ = experts;
  check(HugeBuffer::allocate(experts * form_->expert_bytes(), &buffer_));
#pragma omp parallel for num_threads(threads)
  for (int64_t e = 0; e < experts; ++e) values.fill_expert(e, expert(e));
  scales_.clear();
  for (int64_t e = 0; form_->has_scales() && e < experts; ++e) {
    scales_.insert(scales_.end(), values.scales().begin(), values.scales().end());
  }
}

ref::Weights PlainWeights::view() const {
  ref::Weights weights;
  weights.w = {buffer_.data(), {form_->x, {experts_, form_->n, form_->k}}};
  if (form_->has_scales()) weights.w_scale = {scales_.data(), {experts_, form_->n}};
  return weights;
}

ref::Weights PlainWeights::matrix(int64_t e) const {
  ref::Weights weights;
  weights.w = {expert(e), {form_->x, {form_->n, form_->k}}};
  if (form_->has_scales()) weights.w_scale = {scales_.data() + e * form_->n, {form_->n}};
  return weights;
}

}  // namespace moeops::bench

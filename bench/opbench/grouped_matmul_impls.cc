// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/grouped_matmul_impls.h"

#include <cblas.h>
#include <fmt/format.h>
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <set>

#include "bench/opbench/context.h"
#include "bench/opbench/measure.h"
#include "bench/opbench/tune.h"
#include "bench/opbench/weights.h"
#include "tools/tensor_file/error.h"
#include "tools/tensor_file/write_file.h"

namespace moeops::bench {

namespace {

using tools::Error;

class Moeops final : public GroupedMatmulImpl {
 public:
  explicit Moeops(std::optional<Isa> isa) : isa_(isa) {}

  std::string name() const override { return "moeops"; }
  std::string detail() const override { return kernel_; }

  void load(const WeightValues& values, int64_t experts, int threads) override {
    form_.emplace(values.form());
    context_ = make_context(threads, isa_);
    pack(values, 0, experts, {}, threads, &weights_);
    kernel_ = kernel_of(*context_, weights_);
  }

  void unload() override { weights_ = PackedWeights(); }

  void run(const GemmCall& call) override {
    const auto groups = static_cast<int64_t>(call.groups.size());
    GroupedMatmulArgs args;
    args.x = {call.x, {form_->x, {call.rows, form_->k}}};
    if (form_->has_scales()) args.x_scale = {call.x_scale, {call.rows}};
    args.list_type = ListType::kSparse;
    static_assert(sizeof(Group) == 2 * sizeof(int64_t));
    args.group_list = {&call.groups.data()->expert, {groups, 2}};
    args.y = {call.y, {form_->y, {call.rows, form_->n}}};
    check(grouped_matmul(*context_, weights_, args));
  }

  std::string explain(const GemmCall& call) const override {
    return plan_of(*context_, weights_, call.rows, static_cast<int64_t>(call.groups.size()));
  }

  TuneReport tune(const TuneRequest& request) override {
    const GemmCall call = request.next_call();
    grouped_matmul_internal::TileDriver driver;
    const grouped_matmul_internal::Problem problem = prepare(
        *context_, weights_, call.rows, static_cast<int64_t>(call.groups.size()), 0, &driver);
    TunedShape shape = driver.tuned_shape(*context_);
    if (problem.workers != context_->threads()) {
      return {{}, {"not tuned: so small a call runs on one worker"}};
    }
    if (!tuned_.insert(shape).second) {
      return {{},
              {fmt::format("not tuned again: {} rows, {} of an expert, have their plan", shape.rows,
                           shape.rows_per_expert)}};
    }

    int64_t largest = 0;
    for (const Group& group : call.groups) largest = std::max(largest, group.rows);
    const std::vector<TunedPlan> candidates = tuning_candidates(problem, largest);
    std::vector<std::shared_ptr<const Tuning>> tunings;
    for (const TunedPlan& plan : candidates) {
      Tuning one;
      one.plans[shape] = plan;
      tunings.push_back(std::make_shared<const Tuning>(std::move(one)));
    }
    const auto use = [&](size_t candidate) {
      context_->set_tuning(candidate == kDefaultPlan ? nullptr : tunings[candidate]);
    };
    const size_t wrong = first_with_other_bits(candidates.size(), [&](size_t candidate) {
      use(candidate);
      std::vector<char> y(static_cast<size_t>(call.rows * form_->n * size_of(form_->y)));
      std::memset(call.y, 0xFF, y.size());
      run(call);
      std::memcpy(y.data(), call.y, y.size());
      return y;
    });
    if (wrong < candidates.size()) {
      context_->set_tuning(std::make_shared<const Tuning>(read_for_tuning(request.cache)));
      return {
          fmt::format("the plan {} gives other bits than the default", words(candidates[wrong])),
          {}};
    }

    int64_t calls = 1;
    const auto seconds = [&](size_t candidate) {
      use(candidate);
      double sum = 0;
      for (int64_t i = 0; i < calls; ++i) {
        const GemmCall next = request.next_call();
        const double start = seconds_now();
        run(next);
        sum += seconds_now() - start;
      }
      return sum;
    };
    (void)seconds(kDefaultPlan);  // wakes the workers
    calls = 1 + static_cast<int64_t>(request.seconds / seconds(kDefaultPlan));
    const Race result = race(candidates.size(), request.pairs, seconds);

    auto tuning = std::make_shared<Tuning>(read_for_tuning(request.cache));
    // Of these weights, and of the problem's, which they stand for.
    for (const int64_t experts : {weights_.experts(), request.experts}) {
      shape.rows_per_expert = TunedShape::row_class_of_expert(call.rows, experts);
      if (result.won) {
        tuning->plans[shape] = candidates[result.best];
      } else {
        tuning->plans.erase(shape);
      }
    }
    tools::write_file_atomically(request.cache, tuning->text());
    context_->set_tuning(tuning);
    grouped_matmul_internal::Problem untuned = problem;
    untuned.tuned = {};
    return {{}, tuning_report(make_plan(untuned), candidates, result)};
  }

 private:
  std::optional<Isa> isa_;
  std::unique_ptr<Context> context_;
  std::optional<GemmForm> form_;
  PackedWeights weights_;
  std::string kernel_;
  std::set<TunedShape> tuned_;
};

// What one writes without a MoE library: a BLAS call for each expert, sgemv where it has one row
// (sgemm is slower there).
class OpenBlas final : public GroupedMatmulImpl {
 public:
  std::string name() const override { return "openblas"; }
  std::string detail() const override {
    static constexpr const char* kParallel[] = {"serial", "pthread", "openmp"};
    return fmt::format("sgemm, sgemv for one row; {}, {}, {}", openblas_get_config(),
                       kParallel[openblas_get_parallel()], openblas_get_corename());
  }
  void load(const WeightValues& values, int64_t experts, int threads) override {
    openblas_set_num_threads(threads);
    weights_.load(values, experts, threads);
  }
  void unload() override { weights_.unload(); }
  void run(const GemmCall& call) override {
    const auto n = static_cast<blasint>(weights_.form().n);
    const auto k = static_cast<blasint>(weights_.form().k);
    const auto* x = static_cast<const float*>(call.x);
    auto* y = static_cast<float*>(call.y);
    for (const Group& group : call.groups) {
      const auto* w = reinterpret_cast<const float*>(weights_.expert(group.expert));
      if (group.rows == 1) {
        cblas_sgemv(CblasRowMajor, CblasNoTrans, n, k, 1.0f, w, k, x, 1, 0.0f, y, 1);
      } else {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<blasint>(group.rows), n, k,
                    1.0f, x, k, w, k, 0.0f, y, n);
      }
      x += group.rows * k;
      y += group.rows * n;
    }
  }

 private:
  PlainWeights weights_;
};

Status run_reference(const PlainWeights& weights, const GemmCall& call) {
  const GemmForm& form = weights.form();
  GroupedMatmulArgs args;
  args.x = {call.x, {form.x, {call.rows, form.k}}};
  if (form.has_scales()) args.x_scale = {call.x_scale, {call.rows}};
  args.list_type = ListType::kSparse;
  args.group_list = {&call.groups.data()->expert, {static_cast<int64_t>(call.groups.size()), 2}};
  args.y = {call.y, {form.y, {call.rows, form.n}}};
  return ref::grouped_matmul(weights.view(), args);
}

}  // namespace

std::vector<std::string> grouped_matmul_impl_names(const std::string& dtype, Isa isa) {
  std::vector<std::string> names = {"moeops"};
  if (dtype == "f32") names.push_back("openblas");
#if defined(MOEOPS_HAS_ONEDNN)
  // It has no bf16 below AVX-512, and s8 without VNNI saturates.
  const Isa least = dtype == "f32"    ? Isa::kScalar
                    : dtype == "bf16" ? Isa::kAvx512
                                      : Isa::kAvx512Vnni;
  if (isa >= least) names.push_back("onednn");
#else
  (void)isa;
#endif
  names.push_back("ref");
  return names;
}

std::unique_ptr<GroupedMatmulImpl> make_grouped_matmul_impl(const std::string& name,
                                                            std::optional<Isa> isa) {
  if (name == "moeops") return std::make_unique<Moeops>(isa);
  if (name == "openblas") return std::make_unique<OpenBlas>();
#if defined(MOEOPS_HAS_ONEDNN)
  if (name == "onednn") return make_onednn_grouped_matmul(isa.value_or(machine().isa));
#endif
  if (name == "ref") return std::make_unique<GemmReference>(run_reference);
  throw Error(fmt::format("no implementation {}", name));
}

}  // namespace moeops::bench

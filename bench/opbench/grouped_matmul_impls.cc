// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/grouped_matmul_impls.h"

#include <cblas.h>
#include <fmt/format.h>
#include <moeops/ref/ref.h>

#include <atomic>
#include <optional>

#include "ops/grouped_matmul/tile_driver.h"
#include "tools/tensor_file/error.h"

namespace moeops::bench {

namespace {

using tools::Error;

void check(const Status& status) {
  if (!status.ok()) throw Error(status.message());
}

class Moeops final : public GroupedMatmulImpl {
 public:
  explicit Moeops(std::optional<Isa> isa) : isa_(isa) {}

  std::string name() const override { return "moeops"; }
  std::string detail() const override { return kernel_; }

  void load(const WeightValues& values, const Gemm& gemm, int64_t experts, int threads) override {
    context_ = std::make_unique<Context>(ContextOptions{.threads = threads, .isa = isa_});
    check(context_->status());
    check(PackedWeights::create(
        {.dtype = DType::kF32, .experts = experts, .n = gemm.n, .k = gemm.k}, &weights_));
    // One expert at a time and a worker: never a second copy of the weights.
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads)
    {
      std::vector<float> plain(static_cast<size_t>(gemm.n * gemm.k));
#pragma omp for schedule(dynamic)
      for (int64_t e = 0; e < experts; ++e) {
        for (int64_t n = 0; n < gemm.n; ++n) values.fill_row(e, n, plain.data() + n * gemm.k);
        if (!weights_.pack_expert(e, {plain.data(), {gemm.n, gemm.k}}).ok()) failed = true;
      }
    }
    if (failed) throw Error("packing the weights failed");
    grouped_matmul_internal::TileDriver driver;
    check(driver.prepare(*context_, weights_, 1, 1, threads, false));
    kernel_ = fmt::format("{} tiles, {}", driver.kernel().name, to_string(context_->isa()));
  }

  void unload() override { weights_ = PackedWeights(); }

  void run(const GemmCall& call) override {
    const auto groups = static_cast<int64_t>(call.groups.size());
    GroupedMatmulArgs args;
    args.x = {call.x, {call.rows, weights_.k()}};
    args.list_type = ListType::kSparse;
    static_assert(sizeof(Group) == 2 * sizeof(int64_t));
    args.group_list = {&call.groups.data()->expert, {groups, 2}};
    args.y = {call.y, {call.rows, weights_.n()}};
    check(grouped_matmul(*context_, weights_, args));
  }

  std::string explain(const GemmCall& call) const override {
    grouped_matmul_internal::TileDriver driver;
    const auto groups = static_cast<int64_t>(call.groups.size());
    check(driver.prepare(*context_, weights_, call.rows, groups, context_->workers(), false));
    grouped_matmul_internal::Problem problem = driver.problem();
    problem.groups = {call.rows, groups};
    return describe(problem, make_plan(problem));
  }

 private:
  std::optional<Isa> isa_;
  std::unique_ptr<Context> context_;
  PackedWeights weights_;
  std::string kernel_;
};

// Weights as a model file has them: [experts, n, k].
class PlainWeights {
 public:
  void load(const WeightValues& values, const Gemm& gemm, int64_t experts, int threads) {
    gemm_ = gemm;
    experts_ = experts;
    check(HugeBuffer::allocate(experts * gemm.n * gemm.k * static_cast<int64_t>(sizeof(float)),
                               &buffer_));
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < experts * gemm.n; ++row) {
      values.fill_row(row / gemm.n, row % gemm.n, expert(0) + row * gemm.k);
    }
  }
  void unload() { buffer_ = HugeBuffer(); }
  float* expert(int64_t e) const {
    return static_cast<float*>(buffer_.data()) + e * gemm_.n * gemm_.k;
  }
  const Gemm& gemm() const { return gemm_; }
  int64_t experts() const { return experts_; }

 private:
  Gemm gemm_{};
  int64_t experts_ = 0;
  HugeBuffer buffer_;
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
  void load(const WeightValues& values, const Gemm& gemm, int64_t experts, int threads) override {
    openblas_set_num_threads(threads);
    weights_.load(values, gemm, experts, threads);
  }
  void unload() override { weights_.unload(); }
  void run(const GemmCall& call) override {
    const auto n = static_cast<blasint>(weights_.gemm().n);
    const auto k = static_cast<blasint>(weights_.gemm().k);
    const float* x = call.x;
    float* y = call.y;
    for (const Group& group : call.groups) {
      const float* w = weights_.expert(group.expert);
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

class Reference final : public GroupedMatmulImpl {
 public:
  std::string name() const override { return "ref"; }
  std::string detail() const override { return "naive, one thread, double accumulation"; }
  void load(const WeightValues& values, const Gemm& gemm, int64_t experts, int threads) override {
    weights_.load(values, gemm, experts, threads);
  }
  void unload() override { weights_.unload(); }
  void run(const GemmCall& call) override {
    const Gemm& gemm = weights_.gemm();
    GroupedMatmulArgs args;
    args.x = {call.x, {call.rows, gemm.k}};
    args.list_type = ListType::kSparse;
    args.group_list = {&call.groups.data()->expert, {static_cast<int64_t>(call.groups.size()), 2}};
    args.y = {call.y, {call.rows, gemm.n}};
    ref::Weights weights;
    weights.w = {weights_.expert(0), {weights_.experts(), gemm.n, gemm.k}};
    check(ref::grouped_matmul(weights, args));
  }

 private:
  PlainWeights weights_;
};

}  // namespace

std::vector<std::string> grouped_matmul_impl_names() { return {"moeops", "openblas", "ref"}; }

std::unique_ptr<GroupedMatmulImpl> make_grouped_matmul_impl(const std::string& name,
                                                            std::optional<Isa> isa) {
  if (name == "moeops") return std::make_unique<Moeops>(isa);
  if (name == "openblas") return std::make_unique<OpenBlas>();
  if (name == "ref") return std::make_unique<Reference>();
  throw Error(fmt::format("--impl {}: this build has {}", name,
                          fmt::join(grouped_matmul_impl_names(), ", ")));
}

}  // namespace moeops::bench

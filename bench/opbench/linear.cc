// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <moeops/quant/dynamic_quant.h>
#include <moeops/quant/quant_matmul.h>
#include <moeops/quant/w8a8_linear.h>

#include <cstring>
#include <exception>

#include "bench/opbench/context.h"
#include "bench/opbench/gemm_bench.h"
#include "bench/opbench/verify.h"
#include "bench/opbench/weights.h"

namespace moeops::bench {

namespace {

// A call is quant_matmul's if its rows have scales, else w8a8_linear's.
QuantMatmulArgs quant_matmul_args(const GemmForm& form, const GemmCall& call) {
  QuantMatmulArgs args;
  args.x = {call.x, {DType::kS8, {call.rows, form.k}}};
  args.x_scale = {call.x_scale, {call.rows}};
  args.y = {call.y, {form.y, {call.rows, form.n}}};
  return args;
}
W8a8LinearArgs linear_args(const GemmForm& form, const GemmCall& call) {
  W8a8LinearArgs args;
  args.x = {call.x, {form.y, {call.rows, form.k}}};
  args.y = {call.y, {form.y, {call.rows, form.n}}};
  return args;
}

class Moeops final : public GroupedMatmulImpl {
 public:
  explicit Moeops(std::optional<Isa> isa) : isa_(isa) {}
  std::string name() const override { return "moeops"; }
  std::string detail() const override { return kernel_of(*context_, matrices_.front()); }
  void load(const WeightValues& values, int64_t matrices, int threads) override {
    form_.emplace(values.form());
    context_ = make_context(threads, isa_);
    matrices_.resize(static_cast<size_t>(matrices));
    std::exception_ptr failed;  // no exception may leave the region
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < matrices; ++i) {
      try {
        pack(values, i, 1, {}, 1, &matrices_[static_cast<size_t>(i)]);
      } catch (...) {
#pragma omp critical
        failed = std::current_exception();
      }
    }
    if (failed) std::rethrow_exception(failed);
  }
  void unload() override { matrices_.clear(); }
  void run(const GemmCall& call) override {
    const PackedWeights& weights = matrices_[static_cast<size_t>(call.groups.front().expert)];
    check(call.x_scale != nullptr
              ? quant_matmul(*context_, weights, quant_matmul_args(*form_, call))
              : w8a8_linear(*context_, weights, linear_args(*form_, call)));
  }
  std::string explain(const GemmCall& call) const override {
    return plan_of(*context_, matrices_.front(), call.rows, 1);
  }

 private:
  std::optional<Isa> isa_;
  std::unique_ptr<Context> context_;
  std::optional<GemmForm> form_;
  std::vector<PackedWeights> matrices_;
};

Status run_reference(const PlainWeights& weights, const GemmCall& call) {
  const ref::Weights matrix = weights.matrix(call.groups.front().expert);
  return call.x_scale != nullptr
             ? ref::quant_matmul(matrix, quant_matmul_args(weights.form(), call))
             : ref::w8a8_linear(matrix, linear_args(weights.form(), call));
}

// What a caller of oneDNN does: its matmul, behind a dynamic_quant if x is not quantised yet.
class OneDnn final : public GroupedMatmulImpl {
 public:
  explicit OneDnn(std::optional<Isa> isa)
      : isa_(isa), matmul_(make_grouped_matmul_impl("onednn", isa)) {}
  std::string name() const override { return "onednn"; }
  std::string detail() const override {
    return (quantises_ ? "dynamic_quant, then " : "") + matmul_->detail();
  }
  void load(const WeightValues& values, int64_t matrices, int threads) override {
    k_ = values.form().k;
    y_ = values.form().y;
    context_ = make_context(threads, isa_);
    matmul_->load(values, matrices, threads);
  }
  void unload() override { matmul_->unload(); }
  void run(const GemmCall& call) override {
    GemmCall quantised = call;
    quantises_ = call.x_scale == nullptr;
    if (quantises_) {
      q_.resize(static_cast<size_t>(call.rows * k_));
      scale_.resize(static_cast<size_t>(call.rows));
      DynamicQuantArgs args;
      args.x = {call.x, {y_, {call.rows, k_}}};
      args.q = {q_.data(), {call.rows, k_}};
      args.scale = {scale_.data(), {call.rows}};
      check(dynamic_quant(*context_, args));
      quantised.x = q_.data();
      quantised.x_scale = scale_.data();
    }
    matmul_->run(quantised);
  }

 private:
  std::optional<Isa> isa_;
  std::unique_ptr<GroupedMatmulImpl> matmul_;
  std::unique_ptr<Context> context_;
  int64_t k_ = 0;
  DType y_ = DType::kNone;
  bool quantises_ = false;
  std::vector<int8_t> q_;
  std::vector<float> scale_;
};

// A w8a8_linear is right if it is the quant_matmul of what the reference quantises x to.
std::string verify_linear(GroupedMatmulImpl& impl, const GemmCall& call, const WeightValues& values,
                          uint64_t seed) {
  const GemmForm& form = values.form();
  std::memset(call.y, 0xFF, static_cast<size_t>(call.rows * form.n * size_of(form.y)));  // NaN
  impl.run(call);
  std::vector<int8_t> q(static_cast<size_t>(call.rows * form.k));
  std::vector<float> scale(static_cast<size_t>(call.rows));
  DynamicQuantArgs args;
  args.x = {call.x, {form.y, {call.rows, form.k}}};
  args.q = {q.data(), {call.rows, form.k}};
  args.scale = {scale.data(), {call.rows}};
  check(ref::dynamic_quant(args));
  GemmCall quantised = call;
  quantised.x = q.data();
  quantised.x_scale = scale.data();
  return verify_result(quantised, values, seed);
}

GemmOperator linear_gemm(const char* name) {
  GemmOperator op;
  op.name = name;
  op.one_matrix = true;
  op.row_bytes = [](const GemmForm& form, const std::string&) { return form.n * size_of(form.y); };
  op.make_impl = [](const std::string& impl,
                    std::optional<Isa> isa) -> std::unique_ptr<GroupedMatmulImpl> {
    if (impl == "moeops") return std::make_unique<Moeops>(isa);
    if (impl == "onednn") return std::make_unique<OneDnn>(isa);
    return std::make_unique<GemmReference>(run_reference);
  };
  op.verify = verify;
  return op;
}

Operator linear_operator(const GemmOperator& op) {
  return {.name = op.name,
          .dtypes = {"w8a8"},
          .variants = {},
          .impls = grouped_matmul_impl_names,
          .tokens = "1,16,128,1024",
          .takes_routing = false,
          .run = [op](const Options& options, const LimitsMeter& meter, const Progress& progress) {
            return run_gemms(op, options, meter, progress);
          }};
}

}  // namespace

GemmOperator quant_matmul_gemm() { return linear_gemm("quant_matmul"); }

GemmOperator w8a8_linear_gemm() {
  GemmOperator op = linear_gemm("w8a8_linear");
  op.input = DType::kBf16;
  op.verify = verify_linear;
  return op;
}

Operator quant_matmul_operator() { return linear_operator(quant_matmul_gemm()); }
Operator w8a8_linear_operator() { return linear_operator(w8a8_linear_gemm()); }

}  // namespace moeops::bench

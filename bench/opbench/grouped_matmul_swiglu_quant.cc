// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <moeops/ops/dequant_swiglu_quant.h>
#include <moeops/ops/grouped_matmul_swiglu_quant.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "bench/opbench/context.h"
#include "bench/opbench/gemm_bench.h"
#include "bench/opbench/verify.h"
#include "bench/opbench/weights.h"

namespace moeops::bench {

namespace {

ConstTensorView groups_of(const GemmCall& call) {
  return {&call.groups.data()->expert, {static_cast<int64_t>(call.groups.size()), 2}};
}

// q stands where y has room for more.
GroupedMatmulSwigluQuantArgs args_of(const GemmForm& form, const GemmCall& call) {
  GroupedMatmulSwigluQuantArgs args;
  args.x = {call.x, {DType::kS8, {call.rows, form.k}}};
  args.group_list = groups_of(call);
  args.list_type = ListType::kSparse;
  args.x_scale = {call.x_scale, {call.rows}};
  args.q = {call.y, {DType::kS8, {call.rows, form.n / 2}}};
  args.scale = {call.y_scale, {call.rows}};
  return args;
}

class Moeops final : public GroupedMatmulImpl {
 public:
  explicit Moeops(std::optional<Isa> isa) : isa_(isa) {}
  std::string name() const override { return "moeops"; }
  std::string detail() const override { return kernel_of(*context_, weights_); }
  void load(const WeightValues& values, int64_t experts, int threads) override {
    form_.emplace(values.form());
    context_ = make_context(threads, isa_);
    pack(values, 0, experts, gate_up({}), threads, &weights_);
  }
  void unload() override { weights_ = PackedWeights(); }
  void run(const GemmCall& call) override {
    check(grouped_matmul_swiglu_quant(*context_, weights_, args_of(*form_, call)));
  }
  std::string explain(const GemmCall& call) const override {
    return plan_of(*context_, weights_, call.rows, static_cast<int64_t>(call.groups.size()));
  }

 private:
  std::optional<Isa> isa_;
  std::unique_ptr<Context> context_;
  std::optional<GemmForm> form_;
  PackedWeights weights_;
};

// The GEMM alone, as one calls it without the fused operator: what SwiGLU and quantisation cost is
// the difference.
class Bare final : public GroupedMatmulImpl {
 public:
  explicit Bare(std::optional<Isa> isa) : gemm_(make_grouped_matmul_impl("moeops", isa)) {}
  std::string name() const override { return "bare"; }
  std::string detail() const override {
    return "grouped_matmul to bf16 and nothing else, " + gemm_->detail();
  }
  void load(const WeightValues& values, int64_t experts, int threads) override {
    gemm_->load(values, experts, threads);
  }
  void unload() override { gemm_->unload(); }
  void run(const GemmCall& call) override { gemm_->run(call); }
  std::string explain(const GemmCall& call) const override { return gemm_->explain(call); }

 private:
  std::unique_ptr<GroupedMatmulImpl> gemm_;
};

// The two operators that the fused one stands for.
class Chain final : public GroupedMatmulImpl {
 public:
  explicit Chain(std::optional<Isa> isa) : isa_(isa) {}
  std::string name() const override { return "chain"; }
  std::string detail() const override {
    return "grouped_matmul to i32, then dequant_swiglu_quant, " + kernel_of(*context_, weights_);
  }
  void load(const WeightValues& values, int64_t experts, int threads) override {
    form_.emplace(values.form());
    column_scales_ = values.scales();
    context_ = make_context(threads, isa_);
    pack(values, 0, experts, {.scales = false}, threads, &weights_);
  }
  void unload() override {
    weights_ = PackedWeights();
    products_ = HugeBuffer();
    product_rows_ = 0;
  }
  void run(const GemmCall& call) override {
    make_room(call);
    GroupedMatmulArgs gemm;
    gemm.x = {call.x, {DType::kS8, {call.rows, form_->k}}};
    gemm.list_type = ListType::kSparse;
    gemm.group_list = groups_of(call);
    gemm.y = {products_.data(), {DType::kI32, {call.rows, form_->n}}};
    check(grouped_matmul(*context_, weights_, gemm));

    counts_.clear();
    for (const Group& group : call.groups) counts_.push_back(group.rows);
    const auto groups = static_cast<int64_t>(counts_.size());
    DequantSwigluQuantArgs args;
    args.x = gemm.y;
    args.weight_scale = {scales_.data(), {groups, form_->n}};
    args.x_scale = {call.x_scale, {call.rows}};
    args.group_list = {counts_.data(), {groups}};
    args.q = {call.y, {DType::kS8, {call.rows, form_->n / 2}}};
    args.scale = {call.y_scale, {call.rows}};
    check(dequant_swiglu_quant(*context_, args));
  }
  std::string explain(const GemmCall& call) const override {
    return plan_of(*context_, weights_, call.rows, static_cast<int64_t>(call.groups.size()));
  }

 private:
  // The scales of all experts are alike, so those of the groups are.
  void make_room(const GemmCall& call) {
    if (product_rows_ < call.rows) {
      check(HugeBuffer::allocate(call.rows * form_->n * size_of(DType::kI32), &products_));
      product_rows_ = call.rows;
    }
    while (scales_.size() < call.groups.size() * column_scales_.size()) {
      scales_.insert(scales_.end(), column_scales_.begin(), column_scales_.end());
    }
  }

  std::optional<Isa> isa_;
  std::unique_ptr<Context> context_;
  std::optional<GemmForm> form_;
  PackedWeights weights_;
  std::vector<float> column_scales_;
  std::vector<float> scales_;
  std::vector<int64_t> counts_;
  HugeBuffer products_;
  int64_t product_rows_ = 0;
};

Status run_reference(const PlainWeights& weights, const GemmCall& call) {
  return ref::grouped_matmul_swiglu_quant(weights.view(), args_of(weights.form(), call));
}

// What is wrong with a row of the result, all of whose sums are made again.
std::string check_row(const GemmCall& call, const WeightValues& values, int64_t expert,
                      int64_t row) {
  const GemmForm& form = values.form();
  const int64_t I = form.n / 2;
  const auto* x = static_cast<const int8_t*>(call.x) + row * form.k;
  const auto value = [&](int64_t n) {
    const auto* w = static_cast<const int8_t*>(values.row(expert, n));
    int32_t sum = 0;
    for (int64_t k = 0; k < form.k; ++k) sum += x[k] * w[k];
    return static_cast<double>(static_cast<float>(sum) * values.scales()[static_cast<size_t>(n)] *
                               call.x_scale[row]);
  };
  std::vector<double> h;
  double largest = 0;
  for (int64_t i = 0; i < I; ++i) {
    const double gate = value(i);
    h.push_back(gate / (1 + std::exp(-gate)) * value(I + i));
    largest = std::max(largest, std::fabs(h.back()));
  }
  const auto scale = static_cast<double>(call.y_scale[row]);
  if (!(std::fabs(scale - largest / 127) <= 1e-5 * largest / 127)) {
    return fmt::format("scale[{}] = {:.8g}, expected {:.8g} (expert {})", row, scale, largest / 127,
                       expert);
  }
  const auto* q = static_cast<const int8_t*>(call.y) + row * I;
  for (int64_t i = 0; i < I; ++i) {
    // Half a step, and the errors in f32 of what is rounded.
    const double wanted = h[static_cast<size_t>(i)] / scale;
    if (!(std::fabs(q[i] - wanted) <= 0.5 + 0.01)) {
      return fmt::format("q[{},{}] = {}, expected {:.3f} (expert {})", row, i, q[i], wanted,
                         expert);
    }
  }
  return {};
}

std::string verify_fused(GroupedMatmulImpl& impl, const GemmCall& call, const WeightValues& values,
                         uint64_t seed) {
  const int64_t I = values.form().n / 2;
  auto* q = static_cast<int8_t*>(call.y);
  constexpr int kNever = -128;  // q is within 127
  std::memset(q, kNever, static_cast<size_t>(call.rows * I));
  std::fill_n(call.y_scale, call.rows, std::numeric_limits<float>::quiet_NaN());
  impl.run(call);
  for (int64_t i = 0; i < call.rows * I; ++i) {
    if (q[i] == kNever) return fmt::format("q[{},{}] is not written", i / I, i % I);
  }
  for (int64_t i = 0; i < call.rows; ++i) {
    if (!std::isfinite(call.y_scale[i])) {
      return fmt::format("scale[{}] is not written, or not finite", i);
    }
  }

  // The first and the last row of every group, and more until they hold 4,096 values.
  const auto groups = static_cast<int64_t>(call.groups.size());
  const int64_t samples = std::max<int64_t>(2, 4096 / (groups * I) + 1);
  std::mt19937_64 random(seed);
  struct Sample {
    int64_t expert, row;
  };
  std::vector<Sample> rows;
  int64_t row = 0;
  for (const Group& group : call.groups) {
    for (int64_t i = 0; i < std::min(samples, group.rows); ++i) {
      const auto inside = static_cast<int64_t>(random() % static_cast<uint64_t>(group.rows));
      rows.push_back({group.expert, row + (i == 0 ? 0 : i == 1 ? group.rows - 1 : inside)});
    }
    row += group.rows;
  }
  std::string wrong;
#pragma omp parallel for schedule(dynamic)
  for (const Sample& sample : rows) {
    const std::string words = check_row(call, values, sample.expert, sample.row);
#pragma omp critical
    if (wrong.empty()) wrong = words;
  }
  return wrong;
}

}  // namespace

GemmOperator swiglu_quant_gemm() {
  GemmOperator op;
  op.name = "grouped_matmul_swiglu_quant";
  op.gemms = {"w13"};
  op.row_bytes = [](const GemmForm& form, const std::string& impl) {
    return impl == "bare" ? form.n * size_of(form.y) : form.n / 2 + size_of(DType::kF32);
  };
  op.make_impl = [](const std::string& name,
                    std::optional<Isa> isa) -> std::unique_ptr<GroupedMatmulImpl> {
    if (name == "moeops") return std::make_unique<Moeops>(isa);
    if (name == "bare") return std::make_unique<Bare>(isa);
    if (name == "chain") return std::make_unique<Chain>(isa);
    return std::make_unique<GemmReference>(run_reference);
  };
  op.verify = [](GroupedMatmulImpl& impl, const GemmCall& call, const WeightValues& values,
                 uint64_t seed) {
    return impl.name() == "bare" ? verify(impl, call, values, seed)
                                 : verify_fused(impl, call, values, seed);
  };
  return op;
}

Operator grouped_matmul_swiglu_quant_operator() {
  const GemmOperator op = swiglu_quant_gemm();
  return {
      .name = op.name,
      .dtypes = {"w8a8"},
      .variants = {},
      .impls =
          [](const std::string&, Isa) {
            return std::vector<std::string>{"moeops", "bare", "chain", "ref"};
          },
      .tokens = "1,16,128,1024",
      .takes_rows = true,
      .fresh_routings = true,
      .run = [op](const Options& options, const LimitsMeter& meter,
                  const Progress& progress) { return run_gemms(op, options, meter, progress); }};
}

}  // namespace moeops::bench

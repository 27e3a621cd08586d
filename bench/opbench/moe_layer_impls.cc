// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/moe_layer_impls.h"

#include <fmt/format.h>
#include <moeops/fused/moe_layer.h>
#include <moeops/ops/grouped_matmul_swiglu_quant.h>
#include <moeops/ops/init_routing.h>
#include <moeops/ops/swiglu.h>
#include <moeops/ops/token_permute.h>
#include <moeops/quant/dynamic_quant.h>
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "bench/opbench/context.h"
#include "bench/opbench/grouped_matmul_impls.h"
#include "bench/opbench/weights.h"
#include "ops/core/team.h"
#include "tools/tensor_file/error.h"

namespace moeops::bench {

namespace {

using tools::Error;

// The call's arguments that do not depend on where the weights are.
MoeLayerArgs args_of(const LayerValues& values, const LayerCall& call) {
  const int64_t T = call.tokens;
  const int64_t H = values.hidden();
  MoeLayerArgs args;
  args.x = {call.x, {values.activations(), {T, H}}};
  args.expert_ids = {call.expert_ids, {T, call.top_k}};
  args.weights = {call.weights, {T, call.top_k}};
  args.swiglu = values.swiglu;
  if (values.model != nullptr && !values.model->b13.empty()) {
    args.b13 = {values.model->b13.data(), {values.model->experts, values.w13.form().n}};
  }
  if (values.model != nullptr && !values.model->b2.empty()) {
    args.b2 = {values.model->b2.data(), {values.model->experts, H}};
  }
  args.out = {call.out, {values.activations(), {T, H}}};
  return args;
}

class Moeops final : public LayerImpl {
 public:
  explicit Moeops(std::optional<Isa> isa) : isa_(isa) {}
  std::string name() const override { return "moeops"; }
  std::string detail() const override {
    return fmt::format("moe_layer, {}", to_string(context_->isa()));
  }

  void load(const LayerValues& values, const LayerSizes& sizes, int threads) override {
    values_.emplace(values);
    experts_ = sizes.experts;
    context_ = make_context(threads, isa_);
    if (values.model != nullptr) return;
    pack(values.w13, 0, experts_, gate_up(values.swiglu), threads, &w13_);
    pack(values.w2, 0, experts_, {}, threads, &w2_);
    const int64_t S = values.shared_experts;
    shared_.resize(static_cast<size_t>(S > 0 ? sizes.shared_sets : 0));
    int64_t first = experts_;
    for (Shared& set : shared_) {
      pack(values.w13, first, S, gate_up(values.swiglu), threads, &set.w13);
      pack(values.w2, first, S, {}, threads, &set.w2);
      first += S;
    }
  }
  void unload() override {
    w13_ = PackedWeights();
    w2_ = PackedWeights();
    shared_.clear();
  }
  void run(const LayerCall& call) override {
    check(moe_layer(*context_, weights_of(call), args_of(*values_, call)));
  }
  std::vector<moe_layer_internal::Phases> run_in_phases(const LayerCall& call) override {
    std::vector<moe_layer_internal::Phases> phases(static_cast<size_t>(context_->workers()));
    check(moe_layer_internal::moe_layer_in_phases(*context_, weights_of(call),
                                                  args_of(*values_, call), phases.data()));
    return phases;
  }
  std::vector<std::string> explain(const LayerCall& call) const override {
    const MoeLayerWeights weights = weights_of(call);
    const int64_t slots = call.tokens * call.top_k;
    const std::set<int32_t> active(call.expert_ids, call.expert_ids + slots);
    const auto workers_for = [&](const PackedWeights& w13, const PackedWeights& w2, int64_t rows) {
      return team_for_rows(*context_, rows, (w13.bytes() + w2.bytes()) / w13.experts());
    };
    const bool shared = weights.shared_w13 != nullptr && weights.shared_w13->experts() > 0;
    const int64_t S = shared ? weights.shared_w13->experts() : 0;
    int workers = workers_for(*weights.w13, *weights.w2, slots);
    if (shared) {
      workers =
          std::max(workers, workers_for(*weights.shared_w13, *weights.shared_w2, call.tokens * S));
    }
    std::vector<std::string> lines;
    const auto add = [&](const char* gemm, const PackedWeights& w, int64_t rows, int64_t groups) {
      lines.push_back(fmt::format("{}: {}", gemm, plan_of(*context_, w, rows, groups, workers)));
    };
    add("first GEMM", *weights.w13, slots, static_cast<int64_t>(active.size()));
    add("second GEMM", *weights.w2, slots, static_cast<int64_t>(active.size()));
    if (shared) {
      add("shared experts' first GEMM", *weights.shared_w13, call.tokens * S, S);
      add("shared experts' second GEMM", *weights.shared_w2, call.tokens * S, S);
    }
    return lines;
  }

 private:
  struct Shared {
    PackedWeights w13, w2;
  };

  MoeLayerWeights weights_of(const LayerCall& call) const {
    if (values_->model != nullptr) return values_->model->weights();
    MoeLayerWeights weights;
    weights.w13 = &w13_;
    weights.w2 = &w2_;
    if (!shared_.empty()) {
      const int64_t set = (call.first_shared - experts_) / values_->shared_experts;
      weights.shared_w13 = &shared_[static_cast<size_t>(set)].w13;
      weights.shared_w2 = &shared_[static_cast<size_t>(set)].w2;
    }
    return weights;
  }

  std::optional<Isa> isa_;
  std::optional<LayerValues> values_;
  std::unique_ptr<Context> context_;
  int64_t experts_ = 0;
  PackedWeights w13_, w2_;
  std::vector<Shared> shared_;
};

// The steps of a layer as separate calls, its GEMMs by an implementation of grouped_matmul. With
// moeops, the first one in w8a8 is the fused grouped_matmul_swiglu_quant. Shared experts are
// further choices of every token, of weight 1.
class Chain final : public LayerImpl {
 public:
  Chain(const char* name, const std::string& gemms, std::optional<Isa> isa)
      : name_(name),
        fuses_(gemms == "moeops"),
        isa_(isa),
        w13_(make_grouped_matmul_impl(gemms, isa)),
        w2_(make_grouped_matmul_impl(gemms, isa)) {}

  std::string name() const override { return name_; }
  std::string detail() const override {
    return fmt::format("operators one after another{}, GEMMs: {}",
                       values_->shared_experts > 0 ? ", shared experts as choices of weight 1" : "",
                       w2_->detail());
  }

  bool rounds_between() const override { return true; }

  void load(const LayerValues& values, const LayerSizes& sizes, int threads) override {
    values_.emplace(values);
    const int64_t experts = sizes.experts + sizes.shared_sets * values.shared_experts;
    const int64_t slots = sizes.tokens * (sizes.top_k + values.shared_experts);
    context_ = make_context(threads, isa_);
    if (fused()) {
      pack(values.w13, 0, experts, gate_up(values.swiglu), threads, &packed_w13_);
    } else {
      w13_->load(values.w13, experts, threads);
    }
    w2_->load(values.w2, experts, threads);
    const int64_t H = values.hidden();
    const int64_t I = values.intermediate();
    const int64_t gemm_bytes = size_of(values.w13.form().x);
    const int64_t value_bytes = size_of(values.activations());
    counts_.resize(static_cast<size_t>(experts));
    row_index_.resize(static_cast<size_t>(slots));
    x_scale_.resize(static_cast<size_t>(slots));
    h_scale_.resize(static_cast<size_t>(slots));
    reserve(slots * H * gemm_bytes, &x_);
    reserve(slots * 2 * I * value_bytes, &gate_up_);
    reserve(slots * I * value_bytes, &h_);
    reserve(slots * I * gemm_bytes, &h_q_);
    reserve(slots * H * value_bytes, &y_);
  }
  void unload() override {
    packed_w13_ = PackedWeights();
    if (!fused()) w13_->unload();
    w2_->unload();
    for (HugeBuffer* buffer : {&x_, &gate_up_, &h_, &h_q_, &y_}) *buffer = HugeBuffer();
  }

  void run(const LayerCall& routed) override {
    const LayerCall call = with_shared(routed);
    const int64_t slots = call.tokens * call.top_k;
    permute(call, slots);
    if (fused()) {
      first_gemm_fused(slots);
    } else {
      w13_->run({groups_, x_.data(), scale(x_scale_), gate_up_.data(), nullptr, slots});
      activate(slots);
    }
    w2_->run({groups_, second_input().data(), scale(h_scale_), y_.data(), nullptr, slots});
    TokenUnpermuteArgs back;
    back.permuted = view(y_, values_->activations(), slots, values_->hidden());
    back.sorted_indices = {row_index_.data(), {slots}};
    back.probs = {call.weights, {call.tokens, call.top_k}};
    back.tokens = {call.out, {values_->activations(), {call.tokens, values_->hidden()}}};
    check(token_unpermute(*context_, back));
  }

 private:
  static void reserve(int64_t bytes, HugeBuffer* buffer) {
    check(HugeBuffer::allocate(bytes, buffer));
  }
  static TensorView view(const HugeBuffer& buffer, DType dtype, int64_t rows, int64_t columns) {
    return {buffer.data(), {dtype, {rows, columns}}};
  }
  bool w8a8() const { return values_->w13.form().has_scales(); }
  bool fused() const { return fuses_ && w8a8(); }
  const float* scale(const std::vector<float>& scales) const {
    return w8a8() ? scales.data() : nullptr;
  }
  const HugeBuffer& second_input() const { return w8a8() ? h_q_ : h_; }

  LayerCall with_shared(LayerCall call) {
    const int64_t S = values_->shared_experts;
    if (S == 0) return call;
    ids_.clear();
    weights_.clear();
    for (int64_t t = 0; t < call.tokens; ++t) {
      const int64_t at = t * call.top_k;
      ids_.insert(ids_.end(), call.expert_ids + at, call.expert_ids + at + call.top_k);
      weights_.insert(weights_.end(), call.weights + at, call.weights + at + call.top_k);
      for (int64_t s = 0; s < S; ++s) {
        ids_.push_back(static_cast<int32_t>(call.first_shared + s));
        weights_.push_back(1.0f);
      }
    }
    call.top_k += S;
    call.expert_ids = ids_.data();
    call.weights = weights_.data();
    return call;
  }

  void permute(const LayerCall& call, int64_t slots) {
    InitRoutingArgs args;
    args.x = {call.x, {values_->activations(), {call.tokens, values_->hidden()}}};
    args.expert_ids = {call.expert_ids, {call.tokens, call.top_k}};
    args.expert_count = static_cast<int64_t>(counts_.size());
    args.counts = ExpertCounts::kCount;
    args.quant = w8a8() ? RoutingQuant::kDynamic : RoutingQuant::kNone;
    args.expanded_x = view(x_, values_->w13.form().x, slots, values_->hidden());
    if (w8a8()) args.expanded_scale = {x_scale_.data(), {slots}};
    args.row_index = {row_index_.data(), {slots}};
    args.expert_tokens = {counts_.data(), {args.expert_count}};
    check(init_routing(*context_, args));
    groups_.clear();
    for (size_t e = 0; e < counts_.size(); ++e) {
      if (counts_[e] > 0) groups_.push_back({static_cast<int64_t>(e), counts_[e]});
    }
  }

  void first_gemm_fused(int64_t slots) {
    GroupedMatmulSwigluQuantArgs args;
    args.x = view(x_, DType::kS8, slots, values_->hidden());
    args.group_list = {&groups_.data()->expert, {static_cast<int64_t>(groups_.size()), 2}};
    args.list_type = ListType::kSparse;
    args.x_scale = {x_scale_.data(), {slots}};
    args.swiglu = values_->swiglu;
    args.q = view(h_q_, DType::kS8, slots, values_->intermediate());
    args.scale = {h_scale_.data(), {slots}};
    check(grouped_matmul_swiglu_quant(*context_, packed_w13_, args));
  }

  void activate(int64_t slots) {
    const int64_t I = values_->intermediate();
    SwigluArgs args;
    args.x = view(gate_up_, values_->activations(), slots, 2 * I);
    args.swiglu = values_->swiglu;
    args.y = view(h_, values_->activations(), slots, I);
    check(swiglu(*context_, args));
    if (!w8a8()) return;
    DynamicQuantArgs quant;
    quant.x = args.y;
    quant.q = view(h_q_, DType::kS8, slots, I);
    quant.scale = {h_scale_.data(), {slots}};
    check(dynamic_quant(*context_, quant));
  }

  const char* name_;
  bool fuses_;
  std::optional<Isa> isa_;
  std::optional<LayerValues> values_;
  std::unique_ptr<Context> context_;
  std::unique_ptr<GroupedMatmulImpl> w13_, w2_;
  PackedWeights packed_w13_;
  std::vector<int32_t> ids_;
  std::vector<float> weights_;
  std::vector<int64_t> counts_;
  std::vector<int32_t> row_index_;
  std::vector<float> x_scale_, h_scale_;
  std::vector<Group> groups_;
  HugeBuffer x_, gate_up_, h_, h_q_, y_;
};

// Plain weights of some experts, for the reference.
class PlainExperts {
 public:
  PlainExperts() = default;
  PlainExperts(const WeightValues& values, const std::vector<int64_t>& experts) {
    allocate(values.form().x, static_cast<int64_t>(experts.size()), values.form().n,
             values.form().k);
    for (size_t i = 0; i < experts.size(); ++i) {
      values.fill_expert(experts[i], row(static_cast<int64_t>(i) * n_));
      scales_.insert(scales_.end(), values.scales().begin(), values.scales().end());
    }
  }
  // In the order of the channels that were packed.
  PlainExperts(const PackedWeights& packed, const std::vector<int64_t>& experts) {
    allocate(packed.dtype(), static_cast<int64_t>(experts.size()), packed.n(), packed.k());
    if (dtype_ == DType::kS8) scales_.resize(experts.size() * static_cast<size_t>(n_));
    for (size_t i = 0; i < experts.size(); ++i) {
      for (int64_t panel = 0; panel < packed.panels(); ++panel) {
        for (const PackedWeights::ChannelRun& run : packed.channels(panel)) {
          for (int j = 0; j < run.count; ++j) {
            unpack(packed, experts[i], panel, run.column + j,
                   static_cast<int64_t>(i) * n_ + run.channel + j * run.step);
          }
        }
      }
    }
  }

  ConstTensorView w(int64_t first, int64_t count) const {
    return {row(first * n_), {dtype_, {count, n_, k_}}};
  }
  ConstTensorView scales(int64_t first, int64_t count) const {
    if (scales_.empty()) return {};
    return {scales_.data() + first * n_, {count, n_}};
  }

 private:
  void allocate(DType dtype, int64_t experts, int64_t n, int64_t k) {
    dtype_ = dtype;
    n_ = n;
    k_ = k;
    check(HugeBuffer::allocate(experts * n * k * size_of(dtype), &w_));
  }
  char* row(int64_t i) const { return static_cast<char*>(w_.data()) + i * k_ * size_of(dtype_); }

  // A column of a panel, [k / group][width][group].
  void unpack(const PackedWeights& packed, int64_t expert, int64_t panel, int column, int64_t to) {
    constexpr int64_t kGroupBytes = 4;
    const char* from = packed.panel(expert, panel) + column * kGroupBytes;
    const int64_t step = packed.panel_width(panel) * kGroupBytes;
    const int64_t bytes = k_ * size_of(dtype_);
    for (int64_t at = 0; at < bytes; at += kGroupBytes) {
      std::memcpy(row(to) + at, from, static_cast<size_t>(std::min(kGroupBytes, bytes - at)));
      from += step;
    }
    if (!scales_.empty()) {
      scales_[static_cast<size_t>(to)] = packed.scales(expert, panel)[column];
    }
  }

  DType dtype_ = DType::kF32;
  int64_t n_ = 0;
  int64_t k_ = 0;
  HugeBuffer w_;
  std::vector<float> scales_;
};

// Some experts of a layer; behind them, unless they are a model's, shared ones.
class PlainLayer {
 public:
  PlainLayer(const LayerValues& values, const std::vector<int64_t>& experts)
      : shared_(values.shared_experts) {
    const tools::LoadedMoeLayer* model = values.model.get();
    if (model == nullptr) {
      w13_ = PlainExperts(values.w13, experts);
      w2_ = PlainExperts(values.w2, experts);
      return;
    }
    w13_ = PlainExperts(model->w13, experts);
    w2_ = PlainExperts(model->w2, experts);
    gather(model->b13, model->w13.n(), experts, &b13_);
    gather(model->b2, model->w2.n(), experts, &b2_);
    if (!model->shared_w13.packed()) return;
    model_shared_ = true;
    shared_w13_ = PlainExperts(model->shared_w13, {0});
    shared_w2_ = PlainExperts(model->shared_w2, {0});
  }

  // Of a call on the first `count` experts, whose shared ones begin at `first_shared`.
  ref::MoeLayerWeights weights(int64_t count, int64_t first_shared) const {
    ref::MoeLayerWeights weights;
    weights.w13 = w13_.w(0, count);
    weights.w13_scale = w13_.scales(0, count);
    weights.w2 = w2_.w(0, count);
    weights.w2_scale = w2_.scales(0, count);
    if (!model_shared_ && shared_ == 0) return weights;
    const PlainExperts& w13 = model_shared_ ? shared_w13_ : w13_;
    const PlainExperts& w2 = model_shared_ ? shared_w2_ : w2_;
    const int64_t first = model_shared_ ? 0 : first_shared;
    const int64_t shared = model_shared_ ? 1 : shared_;
    weights.shared_w13 = w13.w(first, shared);
    weights.shared_w13_scale = w13.scales(first, shared);
    weights.shared_w2 = w2.w(first, shared);
    weights.shared_w2_scale = w2.scales(first, shared);
    return weights;
  }
  // The experts' biases.
  void set_biases(int64_t count, MoeLayerArgs* args) const {
    const auto view = [&](const std::vector<float>& bias) -> ConstTensorView {
      if (bias.empty()) return {};
      return {bias.data(), {count, static_cast<int64_t>(bias.size()) / count}};
    };
    args->b13 = view(b13_);
    args->b2 = view(b2_);
  }

 private:
  static void gather(const std::vector<float>& all, int64_t n, const std::vector<int64_t>& experts,
                     std::vector<float>* some) {
    if (all.empty()) return;
    for (const int64_t e : experts) {
      some->insert(some->end(), all.begin() + e * n, all.begin() + (e + 1) * n);
    }
  }

  PlainExperts w13_, w2_, shared_w13_, shared_w2_;
  std::vector<float> b13_, b2_;
  int64_t shared_;
  bool model_shared_ = false;
};

class Reference final : public LayerImpl {
 public:
  std::string name() const override { return "ref"; }
  std::string detail() const override { return "naive, one thread"; }
  void load(const LayerValues& values, const LayerSizes& sizes, int) override {
    values_.emplace(values);
    experts_ = sizes.experts;
    std::vector<int64_t> all;
    const int64_t count = experts_ + sizes.shared_sets * values.shared_experts;
    for (int64_t e = 0; e < count; ++e) all.push_back(e);
    layer_ = std::make_unique<PlainLayer>(values, all);
  }
  void unload() override { layer_.reset(); }
  void run(const LayerCall& call) override {
    check(ref::moe_layer(layer_->weights(experts_, call.first_shared), args_of(*values_, call)));
  }

 private:
  std::optional<LayerValues> values_;
  int64_t experts_ = 0;
  std::unique_ptr<PlainLayer> layer_;
};

}  // namespace

std::vector<std::string> layer_impl_names(const std::string& dtype, Isa isa) {
  std::vector<std::string> names = {"moeops", "chain"};
  const std::vector<std::string> gemms = grouped_matmul_impl_names(dtype, isa);
  if (std::find(gemms.begin(), gemms.end(), "onednn") != gemms.end()) names.push_back("onednn");
  names.push_back("ref");
  return names;
}

std::unique_ptr<LayerImpl> make_layer_impl(const std::string& name, std::optional<Isa> isa) {
  if (name == "moeops") return std::make_unique<Moeops>(isa);
  if (name == "chain") return std::make_unique<Chain>("chain", "moeops", isa);
  if (name == "onednn") return std::make_unique<Chain>("onednn", "onednn", isa);
  if (name == "ref") return std::make_unique<Reference>();
  throw Error(fmt::format("no implementation {}", name));
}

std::vector<float> reference_token(const LayerValues& values, const LayerCall& call,
                                   int64_t token) {
  const int64_t H = values.hidden();
  const int32_t* ids = call.expert_ids + token * call.top_k;
  // The token's experts are all there is: the k-th choice is expert k, the shared ones follow.
  std::vector<int64_t> experts(ids, ids + call.top_k);
  for (int64_t i = 0; i < values.shared_experts; ++i) experts.push_back(call.first_shared + i);
  const PlainLayer layer(values, experts);
  std::vector<int32_t> renamed;
  for (int64_t k = 0; k < call.top_k; ++k) renamed.push_back(static_cast<int32_t>(k));
  const int64_t row_bytes = H * size_of(values.activations());
  std::vector<char> out(static_cast<size_t>(row_bytes));
  LayerCall alone = {1,
                     call.top_k,
                     static_cast<const char*>(call.x) + token * row_bytes,
                     renamed.data(),
                     call.weights + token * call.top_k,
                     call.top_k,
                     out.data()};
  MoeLayerArgs args = args_of(values, alone);
  layer.set_biases(call.top_k, &args);
  check(ref::moe_layer(layer.weights(call.top_k, call.top_k), args));
  std::vector<float> row;
  for (int64_t j = 0; j < H; ++j) row.push_back(load_value(values.activations(), out.data(), j));
  return row;
}

}  // namespace moeops::bench

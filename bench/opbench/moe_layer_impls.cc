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

#include "bench/opbench/context.h"
#include "bench/opbench/grouped_matmul_impls.h"
#include "bench/opbench/weights.h"
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
    MoeLayerWeights weights;
    weights.w13 = &w13_;
    weights.w2 = &w2_;
    if (!shared_.empty()) {
      const int64_t set = (call.first_shared - experts_) / values_->shared_experts;
      weights.shared_w13 = &shared_[static_cast<size_t>(set)].w13;
      weights.shared_w2 = &shared_[static_cast<size_t>(set)].w2;
    }
    check(moe_layer(*context_, weights, args_of(*values_, call)));
  }

 private:
  struct Shared {
    PackedWeights w13, w2;
  };

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

// Plain weights of some of the values' experts, for the reference.
class PlainExperts {
 public:
  PlainExperts(const WeightValues& values, const std::vector<int64_t>& experts)
      : form_(values.form()) {
    check(HugeBuffer::allocate(static_cast<int64_t>(experts.size()) * form_.expert_bytes(), &w_));
    for (size_t i = 0; i < experts.size(); ++i) {
      values.fill_expert(experts[i], at(static_cast<int64_t>(i)));
      scales_.insert(scales_.end(), values.scales().begin(), values.scales().end());
    }
  }
  ConstTensorView w(int64_t first, int64_t count) const {
    return {at(first), {form_.x, {count, form_.n, form_.k}}};
  }
  // Those of all experts are alike.
  ConstTensorView scales(int64_t count) const {
    if (!form_.has_scales()) return {};
    return {scales_.data(), {count, form_.n}};
  }

 private:
  char* at(int64_t i) const { return static_cast<char*>(w_.data()) + i * form_.expert_bytes(); }

  GemmForm form_;
  HugeBuffer w_;
  std::vector<float> scales_;
};

class PlainLayer {
 public:
  PlainLayer(const LayerValues& values, const std::vector<int64_t>& experts)
      : w13_(values.w13, experts), w2_(values.w2, experts), shared_(values.shared_experts) {}

  // The first `count` are the routed ones; the shared ones begin at `first_shared`.
  ref::MoeLayerWeights weights(int64_t count, int64_t first_shared) const {
    ref::MoeLayerWeights weights;
    weights.w13 = w13_.w(0, count);
    weights.w13_scale = w13_.scales(count);
    weights.w2 = w2_.w(0, count);
    weights.w2_scale = w2_.scales(count);
    if (shared_ == 0) return weights;
    weights.shared_w13 = w13_.w(first_shared, shared_);
    weights.shared_w13_scale = w13_.scales(shared_);
    weights.shared_w2 = w2_.w(first_shared, shared_);
    weights.shared_w2_scale = w2_.scales(shared_);
    return weights;
  }

 private:
  PlainExperts w13_, w2_;
  int64_t shared_;
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
  check(ref::moe_layer(layer.weights(call.top_k, call.top_k), args_of(values, alone)));
  std::vector<float> row;
  for (int64_t j = 0; j < H; ++j) row.push_back(load_value(values.activations(), out.data(), j));
  return row;
}

}  // namespace moeops::bench

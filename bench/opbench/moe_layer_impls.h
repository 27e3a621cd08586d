// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/machine.h>
#include <moeops/ops/swiglu.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bench/opbench/gemm_data.h"
#include "fused/moe_layer/phases.h"
#include "tools/checkpoint/moe_layer.h"

namespace moeops::bench {

// The weights of a layer's experts, w13 [2I, H] and w2 [H, I]; the shared ones are alike.
struct LayerValues {
  WeightValues w13;
  WeightValues w2;
  SwigluParams swiglu;
  int64_t shared_experts;
  // A model's layer, which then has the weights; only the sizes above hold.
  std::shared_ptr<const tools::LoadedMoeLayer> model;

  int64_t hidden() const { return w13.form().k; }
  int64_t intermediate() const { return w2.form().k; }
  // Of the layer's input and output.
  DType activations() const { return w2.form().y; }
  // Of all shared experts together.
  int64_t shared_width() const {
    if (model == nullptr) return shared_experts * intermediate();
    return model->shared_w2.packed() ? model->shared_w2.k() : 0;
  }
  int64_t expert_bytes() const { return w13.form().expert_bytes() + w2.form().expert_bytes(); }
};

// out [tokens, H] of x [tokens, H], as moe_layer's contract has it.
struct LayerCall {
  int64_t tokens;
  int64_t top_k;
  const void* x;
  const int32_t* expert_ids;  // [tokens, top_k]
  const float* weights;       // [tokens, top_k]
  int64_t first_shared;       // of the values' experts, as many as the layer has shared ones
  void* out;
};

// What an implementation has to be ready for.
struct LayerSizes {
  int64_t experts;      // the routed ones are the values' first
  int64_t shared_sets;  // behind them stand as many sets of shared ones
  int64_t tokens;       // of a call, at most
  int64_t top_k;
};

// An implementation of a whole layer, with the weights it was last given.
class LayerImpl {
 public:
  virtual ~LayerImpl() = default;
  virtual std::string name() const = 0;
  virtual std::string detail() const = 0;
  // Whether it rounds to 16 bits where moe_layer does not, between its steps.
  virtual bool rounds_between() const { return false; }
  // Makes and keeps the weights; throws tools::Error.
  virtual void load(const LayerValues& values, const LayerSizes& sizes, int threads) = 0;
  virtual void unload() = 0;
  virtual void run(const LayerCall& call) = 0;
  // The same, telling where its time went: the workers' phases; empty if it cannot.
  virtual std::vector<moe_layer_internal::Phases> run_in_phases(const LayerCall&) { return {}; }
  // How a call's GEMMs are cut up, a line in words for each; empty where there is nothing to say.
  virtual std::vector<std::string> explain(const LayerCall&) const { return {}; }
};

// By name, those that can do the dtype with the ISA:
//   moeops  moe_layer
//   chain   the library's operators one after another; shared experts as choices of weight 1
//   onednn  the same with oneDNN's GEMMs, if this build found it
//   ref     the reference
std::vector<std::string> layer_impl_names(const std::string& dtype, Isa isa);
std::unique_ptr<LayerImpl> make_layer_impl(const std::string& name, std::optional<Isa> isa);

// What the reference makes of one token of the call, f32 [H]. It takes the weights of that token's
// experts from the values.
std::vector<float> reference_token(const LayerValues& values, const LayerCall& call, int64_t token);

}  // namespace moeops::bench

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

namespace moeops::bench {

// The weights of a layer's experts, w13 [2I, H] and w2 [H, I].
struct LayerValues {
  WeightValues w13;
  WeightValues w2;
  SwigluParams swiglu;

  int64_t hidden() const { return w13.form().k; }
  int64_t intermediate() const { return w2.form().k; }
  // Of the layer's input and output.
  DType activations() const { return w2.form().y; }
  int64_t expert_bytes() const { return w13.form().expert_bytes() + w2.form().expert_bytes(); }
};

// out [tokens, H] of x [tokens, H], as moe_layer's contract has it.
struct LayerCall {
  int64_t tokens;
  int64_t top_k;
  const void* x;
  const int32_t* expert_ids;  // [tokens, top_k]
  const float* weights;       // [tokens, top_k]
  void* out;
};

// An implementation of a whole layer, with the weights it was last given.
class LayerImpl {
 public:
  virtual ~LayerImpl() = default;
  virtual std::string name() const = 0;
  virtual std::string detail() const = 0;
  // Makes and keeps the weights of `experts` experts, and room for calls of up to `slots` slots;
  // throws tools::Error.
  virtual void load(const LayerValues& values, int64_t experts, int64_t slots, int threads) = 0;
  virtual void unload() = 0;
  virtual void run(const LayerCall& call) = 0;
};

// By name, those that can do the dtype with the ISA:
//   moeops  moe_layer
//   chain   the library's operators one after another
//   onednn  the same with oneDNN's GEMMs, if this build found it
//   ref     the reference
std::vector<std::string> layer_impl_names(const std::string& dtype, Isa isa);
std::unique_ptr<LayerImpl> make_layer_impl(const std::string& name, std::optional<Isa> isa);

// What the reference makes of one token of the call, f32 [H]. It takes the weights of that token's
// experts from the values.
std::vector<float> reference_token(const LayerValues& values, const LayerCall& call, int64_t token);

}  // namespace moeops::bench

// SPDX-License-Identifier: Apache-2.0
//
// A whole byte-level language model whose MoE layers run on moeops: gating_top_k routes, moe_layer
// computes the experts. All the rest is plain C++. With the experts' weights in f32, bf16 and w8a8
// in turn it continues a prompt and measures the model's loss on the validation text beside it:
// what quantisation costs on a trained model.
//
//   tiny_lm [model folder] [prompt]
//
// Exit status: 1 if a loss is not what it should be, 2 if there is nothing to compute with.

#include <fmt/format.h>
#include <moeops/fused/moe_layer.h>
#include <moeops/ops/core/context.h>
#include <moeops/ops/gating_top_k.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tools/checkpoint/checkpoint.h"
#include "tools/checkpoint/moe_layer.h"
#include "tools/tensor_file/error.h"
#include "tools/tensor_file/safetensors.h"

namespace {

using moeops::DType;
using moeops::tools::Checkpoint;
using moeops::tools::Error;
using moeops::tools::TensorRef;
using Floats = std::vector<float>;

// Against the loss that the validation file records, and against the loss in f32.
constexpr double kRecordedTolerance = 1e-3;
constexpr double kQuantisationTolerance = 0.005;
constexpr int64_t kVocabulary = 256;  // a token is a byte
constexpr float kTemperature = 0.5f;

Floats zeros(int64_t n) { return Floats(static_cast<size_t>(n)); }

void check(const moeops::Status& status) {
  if (!status.ok()) throw Error(status.message());
}

int64_t positive(const Checkpoint& checkpoint, const char* field) {
  const auto it = checkpoint.config().find(field);
  if (it == checkpoint.config().end() || !it->is_number_integer() || *it < 1 || *it > 1 << 20) {
    throw Error(fmt::format("{}: config.json: {} is {}, expected an integer in [1, 2^20]",
                            checkpoint.folder().string(), field,
                            it == checkpoint.config().end() ? "missing" : it->dump()));
  }
  return it->get<int64_t>();
}

Floats load(Checkpoint& checkpoint, const std::string& name, const std::vector<int64_t>& shape) {
  const TensorRef& tensor = checkpoint.get(name);
  if (tensor.shape != shape) {
    throw Error(fmt::format("{}: tensor {}: shape is {}, expected {}", checkpoint.folder().string(),
                            name, moeops::tools::shape_text(tensor.shape),
                            moeops::tools::shape_text(shape)));
  }
  Floats values = zeros(tensor.numel());
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(moeops::tools::element(tensor, static_cast<int64_t>(i)));
  }
  return values;
}

// y[t] = W * x[t] for W [outputs, inputs], kept as [inputs, outputs]: apply's inner loop then runs
// over independent sums, and the compiler makes vectors of them.
class Linear {
 public:
  Linear(const Floats& w, int64_t outputs, int64_t inputs)
      : outputs_(outputs), inputs_(inputs), w_(w.size()) {
    for (int64_t n = 0; n < outputs; ++n) {
      for (int64_t k = 0; k < inputs; ++k) w_.data()[k * outputs + n] = w.data()[n * inputs + k];
    }
  }
  Linear(Checkpoint& checkpoint, const std::string& name, int64_t outputs, int64_t inputs)
      : Linear(load(checkpoint, name, {outputs, inputs}), outputs, inputs) {}

  Floats apply(const Floats& x) const {
    const int64_t tokens = static_cast<int64_t>(x.size()) / inputs_;
    Floats y = zeros(tokens * outputs_);
    for (int64_t t = 0; t < tokens; ++t) {
      float* to = y.data() + t * outputs_;
      for (int64_t k = 0; k < inputs_; ++k) {
        const float value = x.data()[t * inputs_ + k];
        const float* w = w_.data() + k * outputs_;
        for (int64_t n = 0; n < outputs_; ++n) to[n] += value * w[n];
      }
    }
    return y;
  }

 private:
  int64_t outputs_;
  int64_t inputs_;
  Floats w_;
};

Floats rms_norm(const Floats& x, const Floats& weight, float eps) {
  Floats y(x.size());
  const size_t width = weight.size();
  for (size_t row = 0; row < x.size(); row += width) {
    float squares = 0;
    for (size_t i = 0; i < width; ++i) squares += x[row + i] * x[row + i];
    const float scale = 1 / std::sqrt(squares / static_cast<float>(width) + eps);
    for (size_t i = 0; i < width; ++i) y[row + i] = x[row + i] * scale * weight[i];
  }
  return y;
}

void add(Floats& x, const Floats& y) {
  std::transform(x.begin(), x.end(), y.begin(), x.begin(), std::plus<>());
}

// values = softmax(values * scale); returns log(sum(exp(values * scale))).
double softmax(std::span<float> values, float scale) {
  const float max = *std::max_element(values.begin(), values.end());
  double sum = 0;
  for (float& value : values) sum += value = std::exp((value - max) * scale);
  for (float& value : values) value = static_cast<float>(value / sum);
  return max * scale + std::log(sum);
}

class Model {
 public:
  // The experts' weights are packed in `experts`; all others are kept in f32.
  Model(moeops::Context& ctx, Checkpoint& checkpoint, DType experts)
      : positions(positive(checkpoint, "max_position_embeddings")),
        ctx_(ctx),
        hidden_(positive(checkpoint, "hidden_size")),
        heads_(positive(checkpoint, "num_attention_heads")),
        eps_(checkpoint.config().value("rms_norm_eps", 1e-6f)),
        token_embedding_(load(checkpoint, "model.embed_tokens.weight", {kVocabulary, hidden_})),
        position_embedding_(load(checkpoint, "model.embed_positions.weight", {positions, hidden_})),
        norm_(load(checkpoint, "model.norm.weight", {hidden_})),
        lm_head_(checkpoint, "lm_head.weight", kVocabulary, hidden_) {
    if (hidden_ % heads_ != 0) {
      throw Error("config.json: num_attention_heads must divide hidden_size");
    }
    const int64_t layers = positive(checkpoint, "num_hidden_layers");
    for (int64_t i = 0; i < layers; ++i) {
      const std::string name = fmt::format("model.layers.{}.", i);
      const auto projection = [&](const char* part) {
        return Linear(checkpoint, name + "self_attn." + part + "_proj.weight", hidden_, hidden_);
      };
      auto moe = moeops::tools::load_moe_layer(ctx, checkpoint, i, experts);
      if (moe.hidden != hidden_) throw Error(name + "mlp: its experts are not of hidden_size");
      if (!moe.b13.empty() || !moe.b2.empty() || !moe.router_bias.empty() ||
          !moe.score_bias.empty()) {
        throw Error(name + "mlp: has biases, which this example leaves out");
      }
      Linear router(moe.router, moe.experts, hidden_);
      layers_.push_back({load(checkpoint, name + "input_layernorm.weight", {hidden_}),
                         load(checkpoint, name + "post_attention_layernorm.weight", {hidden_}),
                         projection("q"), projection("k"), projection("v"), projection("o"),
                         std::move(router), std::move(moe), zeros(positions * hidden_),
                         zeros(positions * hidden_)});
    }
  }

  const int64_t positions;

  // The logits [T, 256] that follow each of `tokens`. Before these came `past` tokens, whose
  // keys and values earlier calls left in the cache.
  Floats forward(std::span<const int32_t> tokens, int64_t past) {
    Floats x = zeros(static_cast<int64_t>(tokens.size()) * hidden_);
    for (size_t t = 0; t < tokens.size(); ++t) {
      const float* token = token_embedding_.data() + tokens[t] * hidden_;
      const float* position =
          position_embedding_.data() + (past + static_cast<int64_t>(t)) * hidden_;
      float* to = x.data() + static_cast<int64_t>(t) * hidden_;
      std::transform(token, token + hidden_, position, to, std::plus<>());
    }
    for (Layer& layer : layers_) {
      add(x, attention(layer, rms_norm(x, layer.attention_norm, eps_), past));
      add(x, moe(layer, rms_norm(x, layer.moe_norm, eps_)));
    }
    return lm_head_.apply(rms_norm(x, norm_, eps_));
  }

 private:
  struct Layer {
    Floats attention_norm, moe_norm;
    Linear q, k, v, o;
    Linear router;
    moeops::tools::LoadedMoeLayer moe;
    Floats keys, values;  // the cache: [positions, hidden]
  };

  // Causal: a token looks at itself and at all before it.
  Floats attention(Layer& layer, const Floats& x, int64_t past) const {
    const Floats q = layer.q.apply(x), k = layer.k.apply(x), v = layer.v.apply(x);
    std::copy(k.begin(), k.end(), layer.keys.begin() + past * hidden_);
    std::copy(v.begin(), v.end(), layer.values.begin() + past * hidden_);
    const int64_t width = hidden_ / heads_;
    Floats y(x.size()), scores;
    for (int64_t t = 0; t * hidden_ < static_cast<int64_t>(x.size()); ++t) {
      scores.resize(static_cast<size_t>(past + t + 1));
      for (int64_t column = 0; column < hidden_; column += width) {
        const float* query = q.data() + t * hidden_ + column;
        const float* key = layer.keys.data() + column;
        for (float& score : scores) {
          score = std::inner_product(query, query + width, key, 0.0f);
          key += hidden_;
        }
        softmax(scores, 1 / std::sqrt(static_cast<float>(width)));
        float* to = y.data() + t * hidden_ + column;
        const float* value = layer.values.data() + column;
        for (const float score : scores) {
          for (int64_t i = 0; i < width; ++i) to[i] += score * value[i];
          value += hidden_;
        }
      }
    }
    return layer.o.apply(y);
  }

  Floats moe(const Layer& layer, const Floats& x) {
    const moeops::tools::LoadedMoeLayer& moe = layer.moe;
    const int64_t T = static_cast<int64_t>(x.size()) / hidden_;
    const int64_t K = moe.gating.k;

    const Floats logits = layer.router.apply(x);
    std::vector<int32_t> expert_ids(static_cast<size_t>(T * K));
    Floats weights = zeros(T * K);
    moeops::GatingTopKArgs gating = moe.gating;
    gating.logits = {logits.data(), {T, moe.experts}};
    gating.expert_ids = {expert_ids.data(), {T, K}};
    gating.weights = {weights.data(), {T, K}};
    check(moeops::gating_top_k(ctx_, gating));

    Floats out(x.size());
    moeops::MoeLayerArgs args;
    args.expert_ids = gating.expert_ids;
    args.weights = gating.weights;
    args.swiglu = moe.swiglu;
    if (moe.w13.dtype() != DType::kBf16) {
      args.x = {x.data(), {T, hidden_}};
      args.out = {out.data(), {T, hidden_}};
      check(moeops::moe_layer(ctx_, moe.weights(), args));
      return out;
    }
    std::vector<moeops::bf16> x_bf16(x.size()), out_bf16(x.size());
    std::transform(x.begin(), x.end(), x_bf16.begin(), moeops::to_bf16);
    args.x = {x_bf16.data(), {T, hidden_}};
    args.out = {out_bf16.data(), {T, hidden_}};
    check(moeops::moe_layer(ctx_, moe.weights(), args));
    std::transform(out_bf16.begin(), out_bf16.end(), out.begin(),
                   [](moeops::bf16 value) { return moeops::to_f32(value); });
    return out;
  }

  moeops::Context& ctx_;
  int64_t hidden_;
  int64_t heads_;
  float eps_;
  Floats token_embedding_, position_embedding_, norm_;
  Linear lm_head_;
  std::vector<Layer> layers_;
};

struct Validation {
  std::vector<int32_t> tokens;
  int64_t width;         // of a window, in tokens
  double recorded_loss;  // of the model in f32
};

Validation load_validation(const std::string& path, int64_t positions) {
  const auto file = moeops::tools::SafetensorsFile::open(path);
  const TensorRef* tensor = file.find("tokens");
  const auto recorded = file.metadata().find("mean_nll");
  if (tensor == nullptr || tensor->dtype != moeops::tools::FileDType::kI32 ||
      tensor->shape.size() != 2 || tensor->shape[0] < 1 || tensor->shape[1] < 2 ||
      tensor->shape[1] > positions + 1 || recorded == file.metadata().end()) {
    throw Error(fmt::format("{}: expected I32 tokens [windows, 2 to {}] and mean_nll as metadata",
                            path, positions + 1));
  }
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < tensor->numel(); ++i) {
    tokens.push_back(moeops::tools::load<int32_t>(*tensor, i));
    if (tokens.back() < 0 || tokens.back() >= kVocabulary) {
      throw Error(fmt::format("{}: token {} is {}, expected a byte", path, i, tokens.back()));
    }
  }
  return {std::move(tokens), tensor->shape[1], std::strtod(recorded->second.c_str(), nullptr)};
}

// The mean negative log-likelihood, in nats, of a token after the others of its window.
double mean_nll(Model& model, const Validation& validation) {
  double sum = 0, count = 0;
  const auto width = static_cast<size_t>(validation.width);
  for (size_t at = 0; at < validation.tokens.size(); at += width) {
    const auto window = std::span(validation.tokens).subspan(at, width);
    Floats logits = model.forward(window.first(width - 1), 0);
    float* row = logits.data();
    for (const int32_t next : window.subspan(1)) {
      const float logit = row[next];
      sum += softmax({row, kVocabulary}, 1) - logit;
      count += 1;
      row += kVocabulary;
    }
  }
  return sum / count;
}

// The prompt and what the model makes of it, up to the last position that the model knows. The
// prompt is one call's work, every byte after it one more call's.
std::string continue_text(Model& model, std::string text) {
  std::mt19937_64 random(1);
  std::vector<int32_t> tokens;
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  while (static_cast<int64_t>(text.size()) < model.positions) {
    const auto past = static_cast<int64_t>(text.size() - tokens.size());
    Floats logits = model.forward(tokens, past);
    const std::span<float> last = std::span(logits).last(static_cast<size_t>(kVocabulary));
    softmax(last, 1 / kTemperature);
    double left = static_cast<double>(random() >> 11) * 0x1p-53;
    int32_t next = 0;
    while (next + 1 < kVocabulary && (left -= last[static_cast<size_t>(next)]) >= 0) ++next;
    tokens = {next};
    text += static_cast<char>(next);
  }
  return text;
}

// True if all losses are what they should be.
bool run(const std::string& folder, const std::string& prompt) {
  moeops::Context ctx;
  Checkpoint checkpoint = Checkpoint::open(folder);
  const int64_t positions = positive(checkpoint, "max_position_embeddings");
  if (prompt.empty() || static_cast<int64_t>(prompt.size()) > positions) {
    throw Error(fmt::format("the prompt has {} bytes, expected 1 to {}", prompt.size(), positions));
  }
  const Validation validation = load_validation(folder + "/validation.safetensors", positions);
  fmt::print("recorded: {:.5f} nats a byte\n\n", validation.recorded_loss);
  const auto measure = [&](const char* name, DType experts) {
    Model model(ctx, checkpoint, experts);
    const double nll = mean_nll(model, validation);
    fmt::print("{}: {:.5f} nats a byte\n{}\n\n", name, nll, continue_text(model, prompt));
    return nll;
  };
  const double f32 = measure("f32", DType::kF32);
  const double bf16 = measure("bf16", DType::kBf16);
  const double w8a8 = measure("w8a8", DType::kS8);
  fmt::print("cost to f32: bf16 {:+.4f}%, w8a8 {:+.4f}%\n", 100 * (bf16 / f32 - 1),
             100 * (w8a8 / f32 - 1));

  const bool as_recorded = std::abs(f32 - validation.recorded_loss) <= kRecordedTolerance;
  const bool cheap = w8a8 / f32 - 1 <= kQuantisationTolerance;
  if (!as_recorded)
    fmt::print("f32 is off the recorded loss by more than {}\n", kRecordedTolerance);
  if (!cheap) fmt::print("w8a8 costs more than {}%\n", 100 * kQuantisationTolerance);
  return as_recorded && cheap;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 3 || (argc > 1 && argv[1][0] == '-')) {
    std::fprintf(stderr, "usage: tiny_lm [model folder] [prompt]\n");
    return 2;
  }
  try {
    return run(argc > 1 ? argv[1] : "tests/data/tinymoe", argc > 2 ? argv[2] : "The LORD ") ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "tiny_lm: %s\n", error.what());
    return 2;
  }
}

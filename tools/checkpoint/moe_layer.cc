// SPDX-License-Identifier: Apache-2.0
#include "tools/checkpoint/moe_layer.h"

#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <new>
#include <string>
#include <utility>

#include "tools/tensor_file/error.h"

namespace moeops::tools {

namespace {

void check(const std::string& what, const Status& status) {
  if (!status.ok()) throw Error(fmt::format("{}: {}", what, status.message()));
}

// The matrix of an expert, where the file has it.
struct Matrix {
  std::string name;
  FileDType dtype = FileDType::kF32;
  int64_t rows = 0;
  int64_t columns = 0;
  const std::byte* data = nullptr;
  std::vector<float> scales;  // of I8

  // In the file, or where a file has it misaligned, in `copy`.
  ConstTensorView view(std::vector<std::byte>& copy) const {
    const void* from = data;
    const auto element = static_cast<uintptr_t>(size_of(dtype));
    if (reinterpret_cast<uintptr_t>(data) % element != 0) {
      copy.assign(data, data + rows * columns * size_of(dtype));
      from = copy.data();
    }
    return {from, TensorLayout(to_dtype(dtype), {rows, columns})};
  }
  ConstTensorView scale_view() const {
    if (dtype != FileDType::kI8) return {};
    return {scales.data(), {static_cast<int64_t>(scales.size())}};
  }
};

// What is packed by one call: a plain matrix, or gate and up.
struct Job {
  PackedWeights* to;
  int64_t expert;
  bool transposed;
  Matrix first;
  Matrix up;  // without data: `first` is all
};

Status run(const Job& job) noexcept {
  try {
    std::vector<std::byte> first, up;
    if (job.up.data == nullptr) {
      return job.to->pack_expert(job.expert, job.first.view(first), job.transposed,
                                 job.first.scale_view());
    }
    return job.to->pack_expert_halves(job.expert, job.first.view(first), job.up.view(up),
                                      job.transposed, job.first.scale_view(), job.up.scale_view());
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, "no memory for an aligned copy"};
  }
}

class Loader {
 public:
  Loader(Context& ctx, Checkpoint& checkpoint, int64_t layer, DType dtype)
      : ctx_(ctx),
        checkpoint_(checkpoint),
        dtype_(dtype),
        prefix_(fmt::format("model.layers.{}.", layer)) {}

  LoadedMoeLayer load() {
    check(checkpoint_.folder().string(), ctx_.status());
    if (has("mlp.experts.gate_up_proj_blocks")) {
      throw Error(fmt::format(
          "{}: {} holds MXFP4 weights, which are not supported; expected F32, BF16, F16, or I8 "
          "with a scale per channel",
          where(), in_quotes(prefix_ + "mlp.experts.gate_up_proj_blocks")));
    }
    if (has("mlp.experts.gate_up_proj")) {
      load_gpt_oss();
    } else if (has("block_sparse_moe.experts.0.w1.weight")) {
      load_separate("block_sparse_moe.", {"w1", "w3", "w2"});
      out_.gating.renormalize = true;
      read_activation();
    } else if (has("mlp.experts.0.gate_proj.weight")) {
      load_separate("mlp.", {"gate_proj", "up_proj", "down_proj"});
      read_activation();
    } else {
      throw Error(fmt::format(
          "{}: {} is no MoE layer of a known layout: expected {}mlp.experts.0.gate_proj.weight "
          "(DeepSeek, Qwen3), {}block_sparse_moe.experts.0.w1.weight (Mixtral) or "
          "{}mlp.experts.gate_up_proj (GPT-OSS)",
          where(), in_quotes(prefix_), prefix_, prefix_, prefix_));
    }
    read_gating();
    pack();
    return std::move(out_);
  }

 private:
  struct Names {
    const char* gate;
    const char* up;
    const char* down;
  };

  std::string where() const { return checkpoint_.folder().string(); }
  bool has(const std::string& name) { return checkpoint_.find(prefix_ + name) != nullptr; }

  [[noreturn]] void refuse(const std::string& name, const std::string& why) const {
    throw Error(fmt::format("{}: tensor {}: {}", where(), in_quotes(name), why));
  }

  // A tensor of this shape; a negative size may be any, and is then replaced.
  const TensorRef& get(const std::string& name, std::vector<int64_t> shape) {
    const TensorRef& tensor = checkpoint_.get(name);
    bool same = tensor.shape.size() == shape.size();
    for (size_t i = 0; same && i < shape.size(); ++i) {
      same = shape[i] < 0 || tensor.shape[i] == shape[i];
    }
    if (!same) {
      std::vector<std::string> sizes;
      for (const int64_t size : shape) sizes.push_back(size < 0 ? "*" : std::to_string(size));
      refuse(name, fmt::format("shape is {}, expected [{}]", shape_text(tensor.shape),
                               fmt::join(sizes, ",")));
    }
    return tensor;
  }

  std::vector<float> floats(const std::string& name, std::vector<int64_t> shape) {
    const TensorRef& tensor = get(name, std::move(shape));
    return floats(name, tensor);
  }
  std::vector<float> floats(const std::string& name, const TensorRef& tensor) const {
    if (!is_floating(tensor.dtype) || tensor.dtype == FileDType::kF64) {
      refuse(name, fmt::format("dtype is {}, expected F32, BF16 or F16", to_string(tensor.dtype)));
    }
    std::vector<float> values(static_cast<size_t>(tensor.numel()));
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>(element(tensor, static_cast<int64_t>(i)));
    }
    return values;
  }

  void check_source(const std::string& name, FileDType dtype) const {
    const bool s8 = dtype == FileDType::kI8;
    if (!s8 && dtype != FileDType::kF32 && dtype != FileDType::kBf16 && dtype != FileDType::kF16) {
      refuse(name, fmt::format("dtype is {}, expected F32, BF16, F16 or I8", to_string(dtype)));
    }
    if (s8 && dtype_ != DType::kS8) {
      refuse(name, fmt::format("dtype is I8, which packs into s8 only, not {}",
                               moeops::to_string(dtype_)));
    }
  }

  // <name> [rows, columns] with its scales, if it is quantised.
  Matrix matrix(const std::string& name, int64_t rows, int64_t columns) {
    const TensorRef& tensor = get(name, {rows, columns});
    check_source(name, tensor.dtype);
    Matrix result{name, tensor.dtype, tensor.shape[0], tensor.shape[1], tensor.data, {}};
    if (tensor.dtype != FileDType::kI8) return result;
    const std::string scale_name = name + "_scale";
    const TensorRef* scale = checkpoint_.find(scale_name);
    if (scale == nullptr) {
      refuse(name, checkpoint_.find(name + "_scale_inv") != nullptr
                       ? "I8 with block-wise scales (_scale_inv) is not supported, expected a "
                         "scale per channel (_scale)"
                       : fmt::format("dtype is I8, but there is no {}", in_quotes(scale_name)));
    }
    if (scale->shape != std::vector<int64_t>{rows} &&
        scale->shape != std::vector<int64_t>{rows, 1}) {
      refuse(scale_name, fmt::format("shape is {}, expected a scale per channel: [{}] or [{},1]",
                                     shape_text(scale->shape), rows, rows));
    }
    result.scales = floats(scale_name, *scale);
    for (const char* suffix : {"_offset", "_zero_point"}) {
      const TensorRef* offset = checkpoint_.find(name + suffix);
      for (int64_t i = 0; offset != nullptr && i < offset->numel(); ++i) {
        if (element(*offset, i) != 0) {
          refuse(name + suffix, fmt::format("element {} is {}: asymmetric weights are not "
                                            "supported, expected 0",
                                            i, element_text(*offset, i)));
        }
      }
    }
    return result;
  }

  void create(PackedWeights* pack, int64_t experts, int64_t n, int64_t k, WeightRole role) {
    check(where(), PackedWeights::create(
                       {.dtype = dtype_,
                        .experts = experts,
                        .n = n,
                        .k = k,
                        .role = role,
                        .gate = role == WeightRole::kGateUp ? out_.swiglu.gate : Gate::kLeft},
                       pack));
  }

  // Gate, up and down of one expert, each a matrix of its own.
  void add_expert(const std::string& name, const Names& names, int64_t intermediate, int64_t expert,
                  PackedWeights* w13, PackedWeights* w2) {
    const int64_t H = out_.hidden;
    const auto full = [&](const char* part) { return fmt::format("{}{}.weight", name, part); };
    jobs_.push_back({w13, expert, false, matrix(full(names.gate), intermediate, H),
                     matrix(full(names.up), intermediate, H)});
    jobs_.push_back({w2, expert, false, matrix(full(names.down), H, intermediate), {}});
    if (jobs_[jobs_.size() - 2].first.dtype != jobs_[jobs_.size() - 2].up.dtype) {
      refuse(full(names.up), fmt::format("dtype is not that of {}", names.gate));
    }
  }

  void load_router(const std::string& name) {
    const TensorRef& router = get(name, {-1, -1});
    out_.experts = router.shape[0];
    out_.hidden = router.shape[1];
    out_.router = floats(name, router);
    if (out_.experts < 1 || out_.hidden < 1) {
      refuse(name, fmt::format("shape is {}: no experts", shape_text(router.shape)));
    }
  }

  void load_separate(const std::string& block, const Names& names) {
    const std::string in_block = prefix_ + block;
    load_router(in_block + "gate.weight");
    const auto expert = [&](int64_t e) { return fmt::format("{}experts.{}.", in_block, e); };
    if (checkpoint_.find(fmt::format("{}{}.weight", expert(out_.experts), names.gate))) {
      refuse(in_block + "gate.weight",
             fmt::format("has rows for {} experts, but there are more", out_.experts));
    }
    const std::string first = fmt::format("{}{}.weight", expert(0), names.gate);
    out_.intermediate = get(first, {-1, out_.hidden}).shape[0];
    create(&out_.w13, out_.experts, 2 * out_.intermediate, out_.hidden, WeightRole::kGateUp);
    create(&out_.w2, out_.experts, out_.hidden, out_.intermediate, WeightRole::kPlain);
    for (int64_t e = 0; e < out_.experts; ++e) {
      add_expert(expert(e), names, out_.intermediate, e, &out_.w13, &out_.w2);
    }
    const std::string bias = in_block + "gate.e_score_correction_bias";
    if (checkpoint_.find(bias) != nullptr) out_.score_bias = floats(bias, {out_.experts});
    if (has(block + "shared_expert.gate_proj.weight")) {
      refuse(in_block + "shared_expert.gate_proj.weight",
             "shared experts with a gate of their own (Qwen2-MoE) are not supported");
    }
    const std::string shared = in_block + "shared_experts.";
    const std::string shared_gate = fmt::format("{}{}.weight", shared, names.gate);
    if (checkpoint_.find(shared_gate) != nullptr) {
      const int64_t width = get(shared_gate, {-1, out_.hidden}).shape[0];
      create(&out_.shared_w13, 1, 2 * width, out_.hidden, WeightRole::kGateUp);
      create(&out_.shared_w2, 1, out_.hidden, width, WeightRole::kPlain);
      add_expert(shared, names, width, 0, &out_.shared_w13, &out_.shared_w2);
    }
  }

  void load_gpt_oss() {
    const std::string experts = prefix_ + "mlp.experts.";
    out_.swiglu.gate = Gate::kInterleaved;
    out_.swiglu.activation = GatedActivation::kSwigluOai;
    out_.swiglu.limit = static_cast<float>(number("swiglu_limit", 7.0));
    if (!(out_.swiglu.limit >= 0)) throw Error(field("swiglu_limit") + " is negative");
    out_.gating.renormalize = true;
    load_router(prefix_ + "mlp.router.weight");
    const int64_t E = out_.experts, H = out_.hidden;
    if (has("mlp.router.bias")) out_.router_bias = floats(prefix_ + "mlp.router.bias", {E});

    const TensorRef& down = get(experts + "down_proj", {E, -1, H});
    const int64_t I = down.shape[1];
    out_.intermediate = I;
    const TensorRef& gate_up = get(experts + "gate_up_proj", {E, H, 2 * I});
    for (const auto& [tensor, name] :
         {std::pair(&gate_up, "gate_up_proj"), std::pair(&down, "down_proj")}) {
      if (!is_floating(tensor->dtype)) {
        refuse(experts + name,
               fmt::format("dtype is {}, expected F32, BF16 or F16", to_string(tensor->dtype)));
      }
      check_source(experts + name, tensor->dtype);
    }
    if (has("mlp.experts.gate_up_proj_bias")) {
      out_.b13 = floats(experts + "gate_up_proj_bias", {E, 2 * I});
    }
    if (has("mlp.experts.down_proj_bias")) out_.b2 = floats(experts + "down_proj_bias", {E, H});

    create(&out_.w13, E, 2 * I, H, WeightRole::kGateUp);
    create(&out_.w2, E, H, I, WeightRole::kPlain);
    const auto slice = [&](const TensorRef& tensor, const char* name, int64_t e) {
      const int64_t rows = tensor.shape[1], columns = tensor.shape[2];
      return Matrix{fmt::format("{}{}[{}]", experts, name, e),
                    tensor.dtype,
                    rows,
                    columns,
                    tensor.data + e * rows * columns * size_of(tensor.dtype),
                    {}};
    };
    for (int64_t e = 0; e < E; ++e) {
      jobs_.push_back({&out_.w13, e, true, slice(gate_up, "gate_up_proj", e), {}});
      jobs_.push_back({&out_.w2, e, true, slice(down, "down_proj", e), {}});
    }
  }

  // --- config.json ---

  std::string field(const char* name) const {
    return fmt::format("{}: field {}", (checkpoint_.folder() / "config.json").string(), name);
  }
  // null counts as missing.
  const nlohmann::json* find(const char* name) const {
    const auto it = checkpoint_.config().find(name);
    return it == checkpoint_.config().end() || it->is_null() ? nullptr : &*it;
  }
  double number(const char* name, double missing) const {
    const nlohmann::json* value = find(name);
    if (value == nullptr) return missing;
    if (!value->is_number()) {
      throw Error(fmt::format("{} is {}, expected a number", field(name), value->dump()));
    }
    return value->get<double>();
  }
  int64_t integer(const char* name, int64_t missing, int64_t most) const {
    const nlohmann::json* value = find(name);
    if (value == nullptr && missing > 0) return missing;
    if (value == nullptr || !value->is_number_integer() || *value < 1 || *value > most) {
      throw Error(fmt::format("{} is {}, expected an integer in [1, {}]", field(name),
                              value == nullptr ? "missing" : value->dump(), most));
    }
    return value->get<int64_t>();
  }
  bool flag(const char* name, bool missing) const {
    const nlohmann::json* value = find(name);
    if (value == nullptr) return missing;
    if (!value->is_boolean()) {
      throw Error(fmt::format("{} is {}, expected true or false", field(name), value->dump()));
    }
    return value->get<bool>();
  }
  // Which of the words the field is.
  size_t word(const char* name, size_t missing, const std::vector<std::string>& words) const {
    const nlohmann::json* value = find(name);
    if (value == nullptr) return missing;
    for (size_t i = 0; i < words.size(); ++i) {
      if (*value == words[i]) return i;
    }
    throw Error(fmt::format("{} is {}, expected {}", field(name), in_quotes(value->dump()),
                            fmt::join(words, ", ")));
  }

  void read_activation() {
    const size_t which = word("hidden_act", 0, {"silu", "swish", "gelu_pytorch_tanh"});
    out_.swiglu.activation = which == 2 ? GatedActivation::kGeluTanh : GatedActivation::kSilu;
  }

  void read_gating() {
    GatingTopKArgs& gating = out_.gating;
    const int64_t E = out_.experts;
    // Only models with a correction bias score by sigmoid and judge a group by its best two.
    const bool corrected = !out_.score_bias.empty();
    gating.k = integer("num_experts_per_tok", 0, E);
    gating.score = word("scoring_func", corrected ? 1 : 0, {"softmax", "sigmoid"}) == 1
                       ? GatingScore::kSigmoid
                       : GatingScore::kSoftmax;
    const size_t method =
        word("topk_method", corrected ? 2 : 0, {"greedy", "group_limited_greedy", "noaux_tc"});
    gating.group_select = method == 2 ? GroupSelect::kTop2Sum : GroupSelect::kMax;
    if (method != 0) {
      gating.group_count = integer("n_group", 1, E);
      gating.k_group = integer("topk_group", 1, gating.group_count);
      if (E % gating.group_count != 0) {
        throw Error(fmt::format("{} is {}, which does not divide the {} experts", field("n_group"),
                                gating.group_count, E));
      }
    }
    gating.renormalize = flag("norm_topk_prob", gating.renormalize);
    gating.routed_scaling_factor = static_cast<float>(number("routed_scaling_factor", 1.0));
  }

  void pack() {
    const auto count = static_cast<int64_t>(jobs_.size());
    int64_t failed = count;
    Status failure;
#pragma omp parallel for num_threads(ctx_.workers()) schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) {
      const Status status = run(jobs_[static_cast<size_t>(i)]);
      if (status.ok()) continue;
#pragma omp critical(moeops_checkpoint_failure)
      if (i < failed) {
        failed = i;
        failure = status;
      }
    }
    if (failed < count) {
      check(fmt::format("{}: tensor {}", where(),
                        in_quotes(jobs_[static_cast<size_t>(failed)].first.name)),
            failure);
    }
  }

  Context& ctx_;
  Checkpoint& checkpoint_;
  DType dtype_;
  std::string prefix_;
  LoadedMoeLayer out_;
  std::vector<Job> jobs_;
};

}  // namespace

LoadedMoeLayer load_moe_layer(Context& ctx, Checkpoint& checkpoint, int64_t layer, DType dtype) {
  return Loader(ctx, checkpoint, layer, dtype).load();
}

}  // namespace moeops::tools

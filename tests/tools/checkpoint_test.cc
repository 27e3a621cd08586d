// SPDX-License-Identifier: Apache-2.0
#include "tools/checkpoint/checkpoint.h"

#include <moeops/ref/ref.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "tests/tools/test_support.h"
#include "tools/checkpoint/moe_layer.h"
#include "tools/tensor_file/safetensors.h"

namespace moeops::tools {
namespace {

constexpr int64_t kE = 5, kH = 72, kI = 40;
const std::string kLayer = "model.layers.3.";

// A small model that a test writes: tensors by name, and a config.
class CheckpointTest : public testing::Test {
 protected:
  Tensor& add(const std::string& name, FileDType dtype, const std::vector<int64_t>& shape) {
    Tensor tensor(dtype, shape);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < tensor.numel(); ++i) {
      const float x = normal(random_);
      std::byte* to = tensor.data.data() + i * size_of(dtype);
      if (dtype == FileDType::kF32) {
        std::memcpy(to, &x, 4);
      } else if (dtype == FileDType::kI8) {
        *to = static_cast<std::byte>(random_());
      } else {
        const uint16_t bits = dtype == FileDType::kBf16 ? to_bf16(x).bits : to_f16(x).bits;
        std::memcpy(to, &bits, 2);
      }
    }
    return tensors_.insert_or_assign(name, std::move(tensor)).first->second;
  }
  // Of one expert, in three matrices.
  void add_expert(const std::string& name, const std::array<const char*, 3>& parts, FileDType dtype,
                  int64_t intermediate) {
    add(name + parts[0] + ".weight", dtype, {intermediate, kH});
    add(name + parts[1] + ".weight", dtype, {intermediate, kH});
    add(name + parts[2] + ".weight", dtype, {kH, intermediate});
    if (dtype == FileDType::kI8) {
      add(name + parts[0] + ".weight_scale", FileDType::kF32, {intermediate, 1});
      add(name + parts[1] + ".weight_scale", FileDType::kBf16, {intermediate, 1});
      add(name + parts[2] + ".weight_scale", FileDType::kF32, {kH});
    }
  }
  void add_qwen3(FileDType dtype) {
    add(kLayer + "mlp.gate.weight", FileDType::kBf16, {kE, kH});
    for (int64_t e = 0; e < kE; ++e) add_expert(qwen3_expert(e), kProjections, dtype, kI);
    config_ = {{"num_experts_per_tok", 2}, {"norm_topk_prob", true}, {"hidden_act", "silu"}};
  }
  void add_gpt_oss(FileDType dtype) {
    const std::string experts = kLayer + "mlp.experts.";
    add(kLayer + "mlp.router.weight", FileDType::kBf16, {kE, kH});
    add(kLayer + "mlp.router.bias", FileDType::kBf16, {kE});
    add(experts + "gate_up_proj", dtype, {kE, kH, 2 * kI});
    add(experts + "gate_up_proj_bias", FileDType::kBf16, {kE, 2 * kI});
    add(experts + "down_proj", dtype, {kE, kI, kH});
    add(experts + "down_proj_bias", FileDType::kBf16, {kE, kH});
    config_ = {{"num_experts_per_tok", 4}, {"swiglu_limit", 6.5}};
  }
  static std::string qwen3_expert(int64_t e) {
    return kLayer + "mlp.experts." + std::to_string(e) + ".";
  }

  void write_config() const { write_text(dir_ / "config.json", config_.dump()); }
  void write() const {
    write_config();
    std::vector<NamedTensor> named;
    for (const auto& [name, tensor] : tensors_) named.push_back({name, tensor.ref()});
    write_safetensors(dir_ / "model.safetensors", {}, named);
  }
  // Every third tensor in the same shard, and an index.
  void write_sharded() const {
    write_config();
    std::array<std::vector<NamedTensor>, 3> shards;
    nlohmann::json map;
    size_t i = 0;
    for (const auto& [name, tensor] : tensors_) {
      map[name] = shard_name(i % 3);
      shards[i++ % 3].push_back({name, tensor.ref()});
    }
    for (size_t s = 0; s < 3; ++s) write_safetensors(dir_ / shard_name(s), {}, shards[s]);
    write_index(map);
  }
  void write_index(const nlohmann::json& map) const {
    write_text(dir_ / "model.safetensors.index.json",
               nlohmann::json{{"metadata", {{"total_size", 1}}}, {"weight_map", map}}.dump());
  }
  static std::string shard_name(size_t i) {
    return "model-0000" + std::to_string(i + 1) + "-of-00003.safetensors";
  }
  static std::filesystem::path root(const TempDir& dir) { return (dir / "x").parent_path(); }

  LoadedMoeLayer load(DType dtype) {
    Checkpoint checkpoint = Checkpoint::open(root(dir_));
    return load_moe_layer(ctx_, checkpoint, 3, dtype);
  }
  void refused(std::initializer_list<std::string_view> parts, DType dtype = DType::kBf16) {
    expect_error([&] { load(dtype); }, parts);
  }

  std::vector<float> floats(const std::string& name) const {
    const Tensor& tensor = tensors_.at(name);
    std::vector<float> values;
    for (int64_t i = 0; i < tensor.numel(); ++i) {
      values.push_back(static_cast<float>(element(tensor.ref(), i)));
    }
    return values;
  }
  // Tensors one after the other.
  std::vector<std::byte> joined(const std::vector<std::string>& names) const {
    std::vector<std::byte> all;
    for (const std::string& name : names) {
      const Tensor& tensor = tensors_.at(name);
      all.insert(all.end(), tensor.data.begin(), tensor.data.end());
    }
    return all;
  }
  std::vector<float> joined_floats(const std::vector<std::string>& names) const {
    std::vector<float> all;
    for (const std::string& name : names) {
      const std::vector<float> one = floats(name);
      all.insert(all.end(), one.begin(), one.end());
    }
    return all;
  }

  static void expect_same(const PackedWeights& got, const PackedWeights& expected) {
    EXPECT_EQ(got.dtype(), expected.dtype());
    EXPECT_EQ(got.experts(), expected.experts());
    EXPECT_EQ(got.n(), expected.n());
    EXPECT_EQ(got.k(), expected.k());
    EXPECT_EQ(got.form().role, expected.form().role);
    EXPECT_EQ(got.form().gate, expected.form().gate);
    EXPECT_EQ(got.has_scales(), expected.has_scales());
    ASSERT_EQ(got.bytes(), expected.bytes());
    EXPECT_EQ(0, std::memcmp(got.data(), expected.data(), static_cast<size_t>(got.bytes())));
  }
  // Experts in three matrices each, which are at these names, packed as one tensor.
  void expect_experts(const PackedWeights& w13, const PackedWeights& w2,
                      const std::vector<std::string>& names,
                      const std::array<const char*, 3>& parts, FileDType dtype,
                      int64_t intermediate, DType to) {
    std::vector<std::string> both, both_scales, down, down_scales;
    for (const std::string& name : names) {
      for (const int part : {0, 1}) {
        both.push_back(name + parts[static_cast<size_t>(part)] + ".weight");
        both_scales.push_back(both.back() + "_scale");
      }
      down.push_back(name + parts[2] + ".weight");
      down_scales.push_back(down.back() + "_scale");
    }
    const auto E = static_cast<int64_t>(names.size());
    const auto expect = [&](const PackedWeights& got, const std::vector<std::string>& weights,
                            const std::vector<std::string>& scales, int64_t n, int64_t k,
                            WeightRole role) {
      const std::vector<std::byte> plain = joined(weights);
      std::vector<float> scale;
      ConstTensorView scale_view;
      if (dtype == FileDType::kI8) {
        scale = joined_floats(scales);
        scale_view = ConstTensorView(scale.data(), {E, n});
      }
      PackedWeights expected;
      const Status status = PackedWeights::pack(
          ctx_, {.dtype = to, .role = role},
          {plain.data(), TensorLayout(to_dtype(dtype), {E, n, k})}, false, scale_view, &expected);
      ASSERT_TRUE(status.ok()) << status.message();
      expect_same(got, expected);
    };
    expect(w13, both, both_scales, 2 * intermediate, kH, WeightRole::kGateUp);
    expect(w2, down, down_scales, kH, intermediate, WeightRole::kPlain);
  }

  static constexpr std::array<const char*, 3> kProjections = {"gate_proj", "up_proj", "down_proj"};
  TempDir dir_;
  std::mt19937_64 random_{7};
  std::map<std::string, Tensor> tensors_;
  nlohmann::json config_;
  Context ctx_{{.threads = 3}};
};

TEST_F(CheckpointTest, Qwen3InEveryDType) {
  std::vector<std::string> names;
  for (int64_t e = 0; e < kE; ++e) names.push_back(qwen3_expert(e));
  for (const FileDType from : {FileDType::kF32, FileDType::kBf16, FileDType::kF16}) {
    add_qwen3(from);
    write();
    for (const DType to : {DType::kF32, DType::kBf16, DType::kS8}) {
      const LoadedMoeLayer layer = load(to);
      EXPECT_EQ(layer.experts, kE);
      EXPECT_EQ(layer.hidden, kH);
      EXPECT_EQ(layer.intermediate, kI);
      expect_experts(layer.w13, layer.w2, names, kProjections, from, kI, to);
      EXPECT_FALSE(layer.shared_w13.packed());
      EXPECT_EQ(layer.weights().shared_w13, nullptr);
      EXPECT_EQ(layer.router, floats(kLayer + "mlp.gate.weight"));
      EXPECT_TRUE(layer.b13.empty() && layer.b2.empty() && layer.score_bias.empty());
      EXPECT_EQ(layer.gating.k, 2);
      EXPECT_EQ(layer.gating.score, GatingScore::kSoftmax);
      EXPECT_EQ(layer.gating.group_count, 1);
      EXPECT_TRUE(layer.gating.renormalize);
      EXPECT_EQ(layer.swiglu.activation, GatedActivation::kSilu);
      EXPECT_EQ(layer.swiglu.gate, Gate::kLeft);
    }
  }
}

TEST_F(CheckpointTest, DeepSeekInShards) {
  add(kLayer + "mlp.gate.weight", FileDType::kBf16, {kE + 1, kH});
  add(kLayer + "mlp.gate.e_score_correction_bias", FileDType::kF32, {kE + 1});
  std::vector<std::string> names;
  for (int64_t e = 0; e <= kE; ++e) {
    names.push_back(qwen3_expert(e));
    add_expert(names.back(), kProjections, FileDType::kBf16, kI);
  }
  const std::string shared = kLayer + "mlp.shared_experts.";
  add_expert(shared, kProjections, FileDType::kBf16, 2 * kI);
  add("model.layers.0.mlp.gate_proj.weight", FileDType::kBf16, {8, kH});
  config_ = {{"num_experts_per_tok", 3},
             {"scoring_func", "sigmoid"},
             {"topk_method", "noaux_tc"},
             {"n_group", 3},
             {"topk_group", 2},
             {"norm_topk_prob", true},
             {"hidden_act", "silu"},
             {"routed_scaling_factor", 2.5},
             {"quantization_config", nullptr}};
  write_sharded();
  const LoadedMoeLayer layer = load(DType::kBf16);
  expect_experts(layer.w13, layer.w2, names, kProjections, FileDType::kBf16, kI, DType::kBf16);
  expect_experts(layer.shared_w13, layer.shared_w2, {shared}, kProjections, FileDType::kBf16,
                 2 * kI, DType::kBf16);
  EXPECT_EQ(layer.weights().shared_w2, &layer.shared_w2);
  EXPECT_EQ(layer.score_bias, floats(kLayer + "mlp.gate.e_score_correction_bias"));
  EXPECT_EQ(layer.gating.k, 3);
  EXPECT_EQ(layer.gating.score, GatingScore::kSigmoid);
  EXPECT_EQ(layer.gating.group_count, 3);
  EXPECT_EQ(layer.gating.k_group, 2);
  EXPECT_EQ(layer.gating.group_select, GroupSelect::kTop2Sum);
  EXPECT_TRUE(layer.gating.renormalize);
  EXPECT_EQ(layer.gating.routed_scaling_factor, 2.5f);

  Checkpoint checkpoint = Checkpoint::open(root(dir_));
  expect_error([&] { load_moe_layer(ctx_, checkpoint, 0, DType::kF32); },
               {"'model.layers.0.' is no MoE layer of a known layout"});
}

TEST_F(CheckpointTest, Mixtral) {
  add(kLayer + "block_sparse_moe.gate.weight", FileDType::kF16, {kE, kH});
  std::vector<std::string> names;
  for (int64_t e = 0; e < kE; ++e) {
    names.push_back(kLayer + "block_sparse_moe.experts." + std::to_string(e) + ".");
    add_expert(names.back(), {"w1", "w3", "w2"}, FileDType::kF16, kI);
  }
  config_ = {{"num_experts_per_tok", 2}, {"hidden_act", "silu"}};
  write();
  const LoadedMoeLayer layer = load(DType::kS8);
  expect_experts(layer.w13, layer.w2, names, {"w1", "w3", "w2"}, FileDType::kF16, kI, DType::kS8);
  EXPECT_TRUE(layer.gating.renormalize);
}

TEST_F(CheckpointTest, GptOss) {
  add_gpt_oss(FileDType::kBf16);
  write_sharded();
  for (const DType to : {DType::kF32, DType::kBf16, DType::kS8}) {
    const LoadedMoeLayer layer = load(to);
    const std::string experts = kLayer + "mlp.experts.";
    PackedWeights w13, w2;
    const std::vector<std::byte> gate_up = joined({experts + "gate_up_proj"});
    const std::vector<std::byte> down = joined({experts + "down_proj"});
    ASSERT_TRUE(PackedWeights::pack(
                    ctx_, {.dtype = to, .role = WeightRole::kGateUp, .gate = Gate::kInterleaved},
                    {gate_up.data(), TensorLayout(DType::kBf16, {kE, kH, 2 * kI})}, true, {}, &w13)
                    .ok());
    ASSERT_TRUE(PackedWeights::pack(ctx_, {.dtype = to},
                                    {down.data(), TensorLayout(DType::kBf16, {kE, kI, kH})}, true,
                                    {}, &w2)
                    .ok());
    expect_same(layer.w13, w13);
    expect_same(layer.w2, w2);
    EXPECT_EQ(layer.intermediate, kI);
    EXPECT_EQ(layer.b13, floats(experts + "gate_up_proj_bias"));
    EXPECT_EQ(layer.b2, floats(experts + "down_proj_bias"));
    EXPECT_EQ(layer.router_bias, floats(kLayer + "mlp.router.bias"));
    EXPECT_EQ(layer.swiglu.activation, GatedActivation::kSwigluOai);
    EXPECT_EQ(layer.swiglu.gate, Gate::kInterleaved);
    EXPECT_EQ(layer.swiglu.limit, 6.5f);
    EXPECT_TRUE(layer.gating.renormalize);
    EXPECT_EQ(layer.gating.k, 4);
  }
}

TEST_F(CheckpointTest, Int8WithAScalePerChannel) {
  add_qwen3(FileDType::kI8);
  add(qwen3_expert(1) + "up_proj.weight_offset", FileDType::kF32, {kI, 1});
  Tensor& offset = tensors_.at(qwen3_expert(1) + "up_proj.weight_offset");
  std::fill(offset.data.begin(), offset.data.end(), std::byte{0});
  write();
  std::vector<std::string> names;
  for (int64_t e = 0; e < kE; ++e) names.push_back(qwen3_expert(e));
  const LoadedMoeLayer layer = load(DType::kS8);
  expect_experts(layer.w13, layer.w2, names, kProjections, FileDType::kI8, kI, DType::kS8);

  refused({"experts.0.gate_proj.weight", "I8, which packs into s8 only, not bf16"});
  offset.data[5] = std::byte{1};
  write();
  refused({"up_proj.weight_offset", "asymmetric"}, DType::kS8);
  tensors_.erase(qwen3_expert(1) + "up_proj.weight_offset");
  add(qwen3_expert(2) + "down_proj.weight_scale", FileDType::kF32, {kH, 2});
  write();
  refused({"experts.2.down_proj.weight_scale", "shape is [72,2], expected a scale per channel"},
          DType::kS8);
  tensors_.erase(qwen3_expert(2) + "down_proj.weight_scale");
  write();
  refused({"experts.2.down_proj.weight'", "there is no '"}, DType::kS8);
  add(qwen3_expert(2) + "down_proj.weight_scale_inv", FileDType::kF32, {1, 1});
  write();
  refused({"experts.2.down_proj.weight'", "block-wise scales"}, DType::kS8);
}

// A file whose data begins at an odd address.
TEST_F(CheckpointTest, MisalignedTensors) {
  add_qwen3(FileDType::kF32);
  write_config();
  std::string header = "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}";
  std::string data = "x";
  for (const auto& [name, tensor] : tensors_) {
    header += ",\"" + name + "\":{\"dtype\":\"" + std::string(to_string(tensor.dtype)) +
              "\",\"shape\":" + shape_text(tensor.shape) + ",\"data_offsets\":[" +
              std::to_string(data.size()) + "," + std::to_string(data.size() + tensor.data.size()) +
              "]}";
    data.append(reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size());
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>(header.size() >> 8 * i);
  write_text(dir_ / "model.safetensors", file + header + data);
  std::vector<std::string> names;
  for (int64_t e = 0; e < kE; ++e) names.push_back(qwen3_expert(e));
  const LoadedMoeLayer layer = load(DType::kF32);
  expect_experts(layer.w13, layer.w2, names, kProjections, FileDType::kF32, kI, DType::kF32);
}

TEST_F(CheckpointTest, RefusesKindsOfWeights) {
  add_gpt_oss(FileDType::kBf16);
  add(kLayer + "mlp.experts.gate_up_proj_blocks", FileDType::kI8, {1});
  write();
  refused({"gate_up_proj_blocks", "MXFP4"});
  tensors_.clear();
  add_qwen3(FileDType::kBf16);
  config_["quantization_config"] = {{"quant_method", "fp8"}, {"fmt", "e4m3"}};
  write();
  refused({"config.json", "FP8 weights are not supported"});
  config_.erase("quantization_config");
  write();
  std::string file = read_text(dir_ / "model.safetensors");
  file.replace(file.find("\"BF16\""), 6, "\"F8_E\"");
  write_text(dir_ / "model.safetensors", file);
  refused({"model.safetensors", "'F8_E'"});
  add(qwen3_expert(4) + "up_proj.weight", FileDType::kI64, {kI, kH});
  write();
  refused({"experts.4.up_proj.weight", "dtype is I64, expected F32, BF16, F16 or I8"});
  add(qwen3_expert(4) + "up_proj.weight", FileDType::kF16, {kI, kH});
  write();
  refused({"experts.4.up_proj.weight", "dtype is not that of gate_proj"});
  add_qwen3(FileDType::kBf16);
  add(kLayer + "mlp.shared_expert.gate_proj.weight", FileDType::kBf16, {kI, kH});
  write();
  refused({"shared_expert.gate_proj.weight", "Qwen2-MoE"});
}

TEST_F(CheckpointTest, RefusesMissingAndMalformedTensors) {
  add_qwen3(FileDType::kBf16);
  write();
  const auto without = [&](const std::string& name, auto change,
                           std::initializer_list<std::string_view> parts) {
    const std::map<std::string, Tensor> all = tensors_;
    tensors_.erase(name);
    change();
    write();
    refused(parts);
    tensors_ = all;
  };
  const auto nothing = [] {};
  const std::string down = qwen3_expert(3) + "down_proj.weight";
  without(down, nothing, {"no tensor '" + down + "'"});
  without(down,
          [&] {
            add(down, FileDType::kBf16, {kI, kH});
          },
          {"'" + down + "'", "shape is [40,72], expected [72,40]"});
  without(down, [&] { add(down, FileDType::kBf16, {kH * kI}); },
          {"'" + down + "'", "shape is [2880], expected [72,40]"});
  const std::string gate = kLayer + "mlp.gate.weight";
  without(gate, nothing, {"no tensor '" + gate + "'"});
  without(gate,
          [&] {
            add(gate, FileDType::kBf16, {kE - 1, kH});
          },
          {"'" + gate + "'", "has rows for 4 experts, but there are more"});
  without(gate,
          [&] {
            add(gate, FileDType::kBf16, {kE + 1, kH});
          },
          {"no tensor '" + qwen3_expert(kE) + "gate_proj.weight'"});
  without(gate,
          [&] {
            add(gate, FileDType::kI8, {kE, kH});
          },
          {"'" + gate + "'", "dtype is I8, expected F32, BF16 or F16"});
  without(gate, [&] { add(gate, FileDType::kBf16, {0, kH}); }, {"'" + gate + "'", "no experts"});
  without(qwen3_expert(0) + "gate_proj.weight", nothing, {"is no MoE layer of a known layout"});
}

TEST_F(CheckpointTest, RefusesConfigs) {
  add_qwen3(FileDType::kBf16);
  write();
  const nlohmann::json good = config_;
  const auto with = [&](const char* field, const nlohmann::json& value,
                        std::initializer_list<std::string_view> parts) {
    config_ = good;
    config_[field] = value;
    write_config();
    refused(parts);
  };
  with("num_experts_per_tok", nullptr,
       {"config.json: field num_experts_per_tok is missing, expected an integer in [1, 5]"});
  with("num_experts_per_tok", 6, {"field num_experts_per_tok is 6"});
  with("num_experts_per_tok", "2", {"field num_experts_per_tok is \"2\""});
  with("norm_topk_prob", 1, {"field norm_topk_prob is 1, expected true or false"});
  with("hidden_act", "relu", {"field hidden_act", "relu", "silu"});
  with("scoring_func", "tanh", {"field scoring_func", "tanh", "sigmoid"});
  with("routed_scaling_factor", "x", {"field routed_scaling_factor", "expected a number"});
  config_ = good;
  config_["topk_method"] = "noaux_tc";
  config_["n_group"] = 2;
  write_config();
  refused({"field n_group is 2, which does not divide the 5 experts"});
  write_text(dir_ / "config.json", "[]");
  refused({"config.json: expected a JSON object"});
  write_text(dir_ / "config.json", "{\"a\":1,\"a\":2}");
  refused({"config.json: duplicate key"});
  std::filesystem::remove(dir_ / "config.json");
  refused({"config.json: cannot open"});
}

TEST_F(CheckpointTest, RefusesIndices) {
  add_qwen3(FileDType::kBf16);
  write_sharded();
  const std::string gate = kLayer + "mlp.gate.weight";
  nlohmann::json map = nlohmann::json::parse(read_text(dir_ / "model.safetensors.index.json"));
  map = map["weight_map"];
  for (const nlohmann::json& file :
       {nlohmann::json("../x"), nlohmann::json("/etc/passwd"), nlohmann::json(""),
        nlohmann::json(3), nlohmann::json("a/b")}) {
    nlohmann::json bad = map;
    bad[gate] = file;
    write_index(bad);
    refused({"index.json: weight_map: '" + gate + "' is", "expected the name of a file"});
  }
  nlohmann::json bad = map;
  bad[gate] = "none.safetensors";
  write_index(bad);
  refused({"none.safetensors: cannot open"});
  bad[gate] = map[gate] == shard_name(0) ? shard_name(1) : shard_name(0);
  write_index(bad);
  refused({"no tensor '" + gate + "', which model.safetensors.index.json says is there"});
  write_index(nlohmann::json::object());
  refused({"weight_map names no tensor"});
  write_text(dir_ / "model.safetensors.index.json", "{}");
  refused({"field weight_map: expected an object"});
  std::filesystem::remove(dir_ / "model.safetensors.index.json");
  refused({"model.safetensors: cannot open"});
}

// A trained model from its folder through moe_layer: what another framework recorded comes out.
TEST(CheckpointOfTinyMoe, GivesTheRecordedOutputs) {
  constexpr int64_t kT = 384, kHidden = 128, kK = 4;
  const std::string folder = MOEOPS_TEST_DATA_DIR "/tinymoe";
  const SafetensorsFile recorded = SafetensorsFile::open(folder + "/moe_io.safetensors");
  Checkpoint checkpoint = Checkpoint::open(folder);
  Context ctx;
  for (const int64_t number : {0, 1}) {
    const LoadedMoeLayer layer = load_moe_layer(ctx, checkpoint, number, DType::kF32);
    EXPECT_EQ(layer.experts, 32);
    EXPECT_EQ(layer.gating.k, kK);
    const auto values = [&](const std::string& name) {
      const TensorRef* tensor = recorded.find("layers." + std::to_string(number) + "." + name);
      std::vector<float> all;
      for (int64_t i = 0; tensor != nullptr && i < tensor->numel(); ++i) {
        all.push_back(static_cast<float>(element(*tensor, i)));
      }
      return all;
    };
    const std::vector<float> x = values("x"), expected = values("out");
    ASSERT_EQ(x.size(), static_cast<size_t>(kT * kHidden));
    ASSERT_EQ(expected.size(), x.size());
    std::vector<float> logits(static_cast<size_t>(kT * layer.experts));
    for (int64_t t = 0; t < kT; ++t) {
      for (int64_t e = 0; e < layer.experts; ++e) {
        double sum = 0;
        for (int64_t h = 0; h < kHidden; ++h) {
          sum += double{x[static_cast<size_t>(t * kHidden + h)]} *
                 double{layer.router[static_cast<size_t>(e * kHidden + h)]};
        }
        logits[static_cast<size_t>(t * layer.experts + e)] = static_cast<float>(sum);
      }
    }
    std::vector<float> weights(kT * kK);
    std::vector<int32_t> ids(kT * kK);
    GatingTopKArgs gating = layer.gating;
    gating.logits = {logits.data(), {kT, layer.experts}};
    gating.weights = {weights.data(), {kT, kK}};
    gating.expert_ids = {ids.data(), {kT, kK}};
    const Status gated = ref::gating_top_k(gating);
    ASSERT_TRUE(gated.ok()) << gated.message();
    std::vector<float> out(x.size());
    MoeLayerArgs args;
    args.x = {x.data(), {kT, kHidden}};
    args.expert_ids = {ids.data(), {kT, kK}};
    args.weights = {weights.data(), {kT, kK}};
    args.swiglu = layer.swiglu;
    args.out = {out.data(), {kT, kHidden}};
    const Status status = moe_layer(ctx, layer.weights(), args);
    ASSERT_TRUE(status.ok()) << status.message();
    float largest = 0;
    for (const float v : expected) largest = std::fmax(largest, std::fabs(v));
    for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], expected[i], 1e-5f * largest) << i;
  }
}

}  // namespace
}  // namespace moeops::tools

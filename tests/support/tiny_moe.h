// SPDX-License-Identifier: Apache-2.0
#pragma once

// A trained model's MoE block (tests/data/tinymoe): its weights, and what went into it and came out
// of it on recorded text, in another framework.

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "tools/tensor_file/safetensors.h"

namespace moeops::test {

struct TinyMoe {
  static constexpr int64_t kT = 384, kH = 128, kI = 64, kE = 32, kK = 4;

  std::vector<float> gate;             // the router's, [E, H]
  std::vector<float> w13, w2;          // [E, 2I, H], [E, H, I]
  std::vector<float> x, weights, out;  // [T, H], [T, K], [T, H]
  std::vector<int32_t> ids;            // [T, K]

  explicit TinyMoe(int layer) {
    const auto model = open("model.safetensors");
    const auto recorded = open("moe_io.safetensors");
    const std::string mlp = "model.layers." + std::to_string(layer) + ".mlp.";
    append(model, mlp + "gate.weight", gate);
    for (int64_t e = 0; e < kE; ++e) {
      const std::string expert = mlp + "experts." + std::to_string(e) + ".";
      append(model, expert + "gate_proj.weight", w13);
      append(model, expert + "up_proj.weight", w13);
      append(model, expert + "down_proj.weight", w2);
    }
    const std::string block = "layers." + std::to_string(layer) + ".";
    append(recorded, block + "x", x);
    append(recorded, block + "weights", weights);
    append(recorded, block + "expert_ids", ids);
    append(recorded, block + "out", out);
  }

 private:
  static tools::SafetensorsFile open(const std::string& name) {
    return tools::SafetensorsFile::open(std::string(MOEOPS_TEST_DATA_DIR "/tinymoe/") + name);
  }
  // bf16 becomes f32 exactly.
  template <class T>
  static void append(const tools::SafetensorsFile& file, const std::string& name,
                     std::vector<T>& values) {
    const tools::TensorRef* tensor = file.find(name);
    if (tensor == nullptr) throw std::runtime_error("no tensor " + name);
    for (int64_t i = 0; i < tensor->numel(); ++i) {
      values.push_back(static_cast<T>(tools::element(*tensor, i)));
    }
  }
};

}  // namespace moeops::test

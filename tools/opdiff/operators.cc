// SPDX-License-Identifier: Apache-2.0
#include "tools/opdiff/operators.h"

namespace moeops::tools {

const std::vector<Operator>& operators() {
  static const std::vector<Operator> all = {
      gating_top_k_operator(),
      init_routing_operator(),
      cutoff_rows_operator(),
      token_permute_operator(),
      token_unpermute_operator(),
      permute_with_map_operator(),
      unpermute_with_map_operator(),
      finalize_routing_operator(),
      dynamic_quant_operator(),
      swiglu_operator(),
      dequant_swiglu_quant_operator(),
      grouped_matmul_operator(),
      grouped_matmul_swiglu_quant_operator(),
      quant_matmul_operator(),
      w8a8_linear_operator(),
      moe_layer_operator(),
  };
  return all;
}

const Operator* find_operator(const std::string& name) {
  for (const Operator& op : operators()) {
    if (name == op.name) return &op;
  }
  return nullptr;
}

}  // namespace moeops::tools

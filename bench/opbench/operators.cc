// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/operators.h"

namespace moeops::bench {

const std::vector<Operator>& operators() {
  static const std::vector<Operator> all = {
      gating_top_k_operator(),     init_routing_operator(),
      token_permute_operator(),    dynamic_quant_operator(),
      grouped_matmul_operator(),   grouped_matmul_swiglu_quant_operator(),
      quant_matmul_operator(),     w8a8_linear_operator(),
      swiglu_operator(),           dequant_swiglu_quant_operator(),
      finalize_routing_operator(), token_unpermute_operator(),
      moe_layer_operator(),
  };
  return all;
}

}  // namespace moeops::bench

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "tools/opdiff/call.h"

namespace moeops::tools {

// How opdiff calls an operator: one adapter each, in operators/.
struct Operator {
  const char* name;
  // Binds the case to the operator's arguments and calls the implementation the call asks for.
  Status (*run)(Call& call);
  // Makes the inputs of a random case, and says which outputs need not be exact.
  void (*make)(Maker& maker);
};

// All operators, in the order of operators.md.
const std::vector<Operator>& operators();
// Null when there is none of that name.
const Operator* find_operator(const std::string& name);

// The adapters.
Operator cutoff_rows_operator();
Operator dequant_swiglu_quant_operator();
Operator dynamic_quant_operator();
Operator finalize_routing_operator();
Operator gating_top_k_operator();
Operator grouped_matmul_operator();
Operator grouped_matmul_swiglu_quant_operator();
Operator init_routing_operator();
Operator moe_layer_operator();
Operator permute_with_map_operator();
Operator quant_matmul_operator();
Operator swiglu_operator();
Operator token_permute_operator();
Operator token_unpermute_operator();
Operator unpermute_with_map_operator();
Operator w8a8_linear_operator();

}  // namespace moeops::tools

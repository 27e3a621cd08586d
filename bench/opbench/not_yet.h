// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ref/ref.h>

// Operators whose optimised form is not declared: overload resolution prefers it once it is.
namespace moeops::bench {
#define MOEOPS_NOT_YET(op)                \
  template <class Context, class Args>    \
  Status op(Context&, const Args& args) { \
    return ref::op(args);                 \
  }
MOEOPS_NOT_YET(gating_top_k)
MOEOPS_NOT_YET(init_routing)
MOEOPS_NOT_YET(token_permute)
MOEOPS_NOT_YET(token_unpermute)
MOEOPS_NOT_YET(finalize_routing)
MOEOPS_NOT_YET(dynamic_quant)
MOEOPS_NOT_YET(swiglu)
MOEOPS_NOT_YET(dequant_swiglu_quant)
#undef MOEOPS_NOT_YET
}  // namespace moeops::bench

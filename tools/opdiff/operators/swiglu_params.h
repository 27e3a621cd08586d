// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/swiglu.h>

#include "tools/opdiff/operators/common.h"

namespace moeops::tools {

inline SwigluParams swiglu_params(Params& params) {
  SwigluParams swiglu;
  swiglu.activation = gated_activation(params);
  swiglu.gate = gate(params);
  swiglu.limit = static_cast<float>(params.number("limit", 7.0));
  swiglu.alpha = static_cast<float>(params.number("alpha", 1.702));
  return swiglu;
}

// What exp and tanh of a vector library may cost an s8 value and its scale: the value moves only
// where it stood on the edge between two.
inline void tolerate_requantised(Maker& maker, const char* q, const char* scale) {
  maker.tolerance(q, OffByOne{0.01});
  maker.tolerance(scale, Close{3e-6, 0.0});
}

}  // namespace moeops::tools

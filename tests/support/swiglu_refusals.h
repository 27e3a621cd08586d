// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/swiglu.h>

#include <cmath>
#include <string>

namespace moeops::test {

// Sets `params` to everything that no operator may take, one thing at a time, calls expect(what is
// wrong with it), and leaves the defaults.
template <class Expect>
void expect_swiglu_refusals(SwigluParams& params, const Expect& expect) {
  for (const int value : {3, -1}) {
    const std::string is_none = " = " + std::to_string(value) + " is not one of its 3 choices";
    params.activation = static_cast<GatedActivation>(value);
    expect("activation" + is_none);
    params = {};
    params.gate = static_cast<Gate>(value);
    expect("gate" + is_none);
    params = {};
  }
  params.activation = GatedActivation::kSwigluOai;
  params.limit = -0.5f;
  expect("limit = -0.5 is not a number from 0 on");
  params.limit = NAN;
  expect("limit = nan is not a number from 0 on");
  params = {};
}

}  // namespace moeops::test

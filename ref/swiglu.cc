// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <vector>

#include "ops/core/arg_check.h"
#include "ref/guarded.h"
#include "ref/numeric.h"
#include "ref/swiglu_row.h"

namespace moeops::ref {

namespace {

Status run(const SwigluArgs& args) {
  ArgCheck check("swiglu");
  Dim M{"M"}, width{"2I"}, I{"I"};
  check.input("x", args.x, {DType::kF32, DType::kBf16, DType::kF16}, {M, width});
  check_swiglu(check, args.swiglu, width, I);
  check.output("y", args.y, {args.x.dtype}, {M, I});
  MOEOPS_RETURN_IF_ERROR(check.finish());

  std::vector<float> gate_up(static_cast<size_t>(width.value));
  std::vector<float> h(static_cast<size_t>(I.value));
  for (int64_t i = 0; i < M.value; ++i) {
    for (int64_t j = 0; j < width.value; ++j) {
      gate_up[static_cast<size_t>(j)] = FloatRow(args.x, i)[j];
    }
    swiglu_row(args.swiglu, I.value, gate_up.data(), h.data());
    for (int64_t j = 0; j < I.value; ++j) store(args.y, i, j, h[static_cast<size_t>(j)]);
  }
  return {};
}

}  // namespace

Status swiglu(const SwigluArgs& args) noexcept {
  return guarded("swiglu", [&] { return run(args); });
}

}  // namespace moeops::ref

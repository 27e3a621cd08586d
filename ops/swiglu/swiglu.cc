// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/swiglu.h>

#include "ops/core/arg_check.h"
#include "ops/core/team.h"
#include "ops/swiglu/check_swiglu.h"
#include "ops/swiglu/kernels.h"

namespace moeops {

using namespace swiglu_internal;  // NOLINT(google-build-using-namespace)

Status swiglu(Context& ctx, const SwigluArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  ArgCheck check("swiglu");
  Dim M{"M"}, width{"2I"}, I{"I"};
  check.input("x", args.x, {DType::kF32, DType::kBf16, DType::kF16}, {M, width});
  halve(check, width, I);
  check_params(check, args.swiglu);
  check.output("y", args.y, {args.x.dtype}, {M, I});
  MOEOPS_RETURN_IF_ERROR(check.finish());

  const int64_t element = size_of(args.x.dtype);
  const int64_t bytes = M.value * 3 * I.value * element;
  const RowKernels& kernels = row_kernels(ctx.isa());
  const SwigluRow row = kernels.of(args.x.dtype);
  // By all that it moves: when that comes from memory, fetching it ahead pays as well.
  const bool stream = streams(bytes);
  run_team(team_for(ctx, M.value, bytes), [&](const Team& team) {
    const int64_t end = M.value * (team.worker + 1) / team.size;
    for (int64_t i = M.value * team.worker / team.size; i < end; ++i) {
      const char* x = args.x.row<char>(i * element);
      const char* next = !stream ? nullptr : i + 1 < end ? args.x.row<char>((i + 1) * element) : x;
      row(args.swiglu, x, I.value, args.y.row<char>(i * element), next);
    }
    if (stream) kernels.fence();
  });
  return {};
}

}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#include <moeops/quant/dynamic_quant.h>

#include <algorithm>
#include <cinttypes>

#include "ops/core/arg_check.h"
#include "ops/core/team.h"
#include "ops/grouped_matmul/group_list.h"
#include "quant/dynamic_quant/kernels.h"

namespace moeops {

using namespace dynamic_quant_internal;  // NOLINT(google-build-using-namespace)

namespace {

Status check_call(const DynamicQuantArgs& args) {
  ArgCheck check("dynamic_quant");
  Dim M{"M"}, H{"H"}, G{"G"};
  check.input("x", args.x, {DType::kF32, DType::kBf16, DType::kF16}, {M, H});
  if (args.group_list.present()) {
    grouped_matmul_internal::check_group_list_view(check, args.group_list, ListType::kCumsum, G);
    check.input("smooth", args.smooth, {DType::kF32}, {G, H});
  } else {
    check.optional_input("smooth", args.smooth, {DType::kF32}, {H});
  }
  check.output("q", args.q, {DType::kS8}, {M, H});
  check.output("scale", args.scale, {DType::kF32}, {M});
  if (args.asymmetric) {
    check.output("offset", args.offset, {DType::kF32}, {M});
  } else {
    check.absent("offset", args.offset, "asymmetric is false");
  }
  if (args.group_list.present()) {
    const int64_t rows = grouped_matmul_internal::check_group_list(
                             check, args.group_list, ListType::kCumsum, G.value, M.value)
                             .rows;
    check.require(rows == M.value, "group_list ends with %" PRId64 ", expected M = %" PRId64, rows,
                  M.value);
  }
  return check.finish();
}

// The smooth factors of the rows from `row` on, asked for in ascending order.
class SmoothRows {
 public:
  SmoothRows(const DynamicQuantArgs& args, int64_t row) : smooth_(args.smooth) {
    if (!args.group_list.present()) return;
    ends_ = args.group_list.row<int64_t>(0);
    group_ = std::upper_bound(ends_, ends_ + args.group_list.dim(0), row) - ends_;
  }

  const float* of(int64_t row) {
    if (!smooth_.present()) return nullptr;
    while (ends_ != nullptr && ends_[group_] <= row) ++group_;
    return smooth_.row<float>(group_);
  }

 private:
  const ConstTensorView& smooth_;
  const int64_t* ends_ = nullptr;
  int64_t group_ = 0;
};

void quantise_rows(const DynamicQuantArgs& args, const RowKernels& kernels, int64_t begin,
                   int64_t end, bool stream) {
  const int64_t H = args.x.dim(1);
  const int64_t x_stride = args.x.row_stride * size_of(args.x.dtype);
  float* scale = args.scale.row<float>(0);
  SmoothRows smooth(args, begin);
  for (int64_t i = begin; i < end; ++i) {
    const char* x = static_cast<const char*>(args.x.data) + i * x_stride;
    auto* q = args.q.row<int8_t>(i);
    const char* next = !stream ? nullptr : i + 1 < end ? x + x_stride : x;
    if (args.asymmetric) {
      kernels.asymmetric.of(args.x.dtype)(x, smooth.of(i), H, q, scale + i,
                                          args.offset.row<float>(0) + i, next);
    } else if (stream) {
      kernels.stream.of(args.x.dtype)(x, smooth.of(i), H, q, scale + i, next);
    } else {
      kernels.s8.of(args.x.dtype)(x, smooth.of(i), H, q, scale + i);
    }
  }
  if (stream) kernels.fence();
}

}  // namespace

Status dynamic_quant(Context& ctx, const DynamicQuantArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  MOEOPS_RETURN_IF_ERROR(check_call(args));
  const int64_t M = args.x.dim(0);
  const int64_t bytes = M * args.x.dim(1) * (size_of(args.x.dtype) + 1);
  const RowKernels& kernels = row_kernels(ctx.isa());
  // By all that it moves: when that comes from memory, fetching it ahead pays as well.
  const bool stream = streams(bytes);
  run_team(team_for(ctx, M, bytes), [&](const Team& team) {
    quantise_rows(args, kernels, M * team.worker / team.size, M * (team.worker + 1) / team.size,
                  stream);
  });
  return {};
}

}  // namespace moeops

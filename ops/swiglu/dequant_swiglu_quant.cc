// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/dequant_swiglu_quant.h>

#include <cstring>

#include "ops/core/arg_check.h"
#include "ops/core/team.h"
#include "ops/grouped_matmul/group_list.h"
#include "ops/swiglu/check_swiglu.h"
#include "ops/swiglu/kernels.h"
#include "quant/dynamic_quant/kernels.h"

namespace moeops {

using namespace swiglu_internal;  // NOLINT(google-build-using-namespace)

namespace {

Status check_call(const DequantSwigluQuantArgs& args, int64_t* covered) {
  ArgCheck check("dequant_swiglu_quant");
  Dim M{"M"}, width{"2I"}, I{"I"}, E{"E"};
  check.input("x", args.x, {DType::kI32}, {M, width});
  halve(check, width, I);
  check_params(check, args.swiglu);
  grouped_matmul_internal::check_group_list_view(check, args.group_list, ListType::kCount, E);
  check.input("weight_scale", args.weight_scale, {DType::kF32}, {E, width});
  check.input("x_scale", args.x_scale, {DType::kF32}, {M});
  check.optional_input("bias", args.bias, {DType::kI32, DType::kF32}, {E, width});
  check.optional_input("quant_scale", args.quant_scale, {DType::kF32}, {E, I});
  check.output("q", args.q, {DType::kS8}, {M, I});
  check.output("scale", args.scale, {DType::kF32}, {M});
  *covered = grouped_matmul_internal::check_group_list(check, args.group_list, ListType::kCount,
                                                       E.value, M.value)
                 .rows;
  return check.finish();
}

// One call's row kernels, and where its rows end.
struct Call {
  const DequantSwigluQuantArgs& args;
  const RowKernels& kernels;
  const dynamic_quant_internal::RowKernels& quantise;
  int64_t covered;  // rows from here on belong to no expert
  bool stream;      // q goes past the caches, and x is fetched ahead

  int64_t I() const { return args.q.dim(1); }

  // The row after it is `next`.
  void run_row(int64_t row, int64_t next, int64_t expert, float* h) const {
    DequantRow in;
    in.x = args.x.row<int32_t>(row);
    in.weight_scale = args.weight_scale.row<float>(expert);
    in.x_scale = args.x_scale.row<float>(0)[row];
    in.bias_i32 = args.bias.dtype == DType::kI32 ? args.bias.row<int32_t>(expert) : nullptr;
    in.bias_f32 = args.bias.dtype == DType::kF32 ? args.bias.row<float>(expert) : nullptr;
    kernels.dequant(args.swiglu, in, I(), h, stream ? args.x.row<int32_t>(next) : nullptr);
    // quant_scale is to h what smooth is to the x of dynamic_quant.
    const float* smooth =
        args.quant_scale.present() ? args.quant_scale.row<float>(expert) : nullptr;
    auto* q = args.q.row<int8_t>(row);
    float* scale = args.scale.row<float>(0) + row;
    if (stream) {
      quantise.stream.f32(h, smooth, I(), q, scale, h);  // h is near already
    } else {
      quantise.s8.f32(h, smooth, I(), q, scale);
    }
  }

  // Rows [begin, end); h: room for one row.
  void run_rows(int64_t begin, int64_t end, float* h) const {
    const auto* counts = static_cast<const int64_t*>(args.group_list.data);
    int64_t row = begin;
    int64_t expert = -1;
    int64_t group_end = 0;
    for (const int64_t last = end < covered ? end : covered; row < last; ++row) {
      while (group_end <= row) group_end += counts[++expert];
      run_row(row, row + 1 < last ? row + 1 : row, expert, h);
    }
    if (stream) quantise.fence();
    for (; row < end; ++row) {
      std::memset(args.q.row<int8_t>(row), 0, static_cast<size_t>(I()));
      args.scale.row<float>(0)[row] = 0.0f;
    }
  }
};

}  // namespace

Status dequant_swiglu_quant(Context& ctx, const DequantSwigluQuantArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  int64_t covered = 0;
  MOEOPS_RETURN_IF_ERROR(check_call(args, &covered));
  const int64_t M = args.q.dim(0);
  const int64_t bytes = M * args.q.dim(1) * 9;  // two s32 and one s8 an element of q
  const Call call{args, row_kernels(ctx.isa()), dynamic_quant_internal::row_kernels(ctx.isa()),
                  covered, streams(bytes)};
  const int workers = team_for(ctx, M, bytes);
  // A row of h for each worker, a cache line away from the next.
  const int64_t h_floats = (call.I() + 15) / 16 * 16;
  void* scratch = nullptr;
  MOEOPS_RETURN_IF_ERROR(
      ctx.reserve_scratch(workers * h_floats * static_cast<int64_t>(sizeof(float)), &scratch));
  run_team(workers, [&](const Team& team) {
    call.run_rows(M * team.worker / team.size, M * (team.worker + 1) / team.size,
                  static_cast<float*>(scratch) + team.worker * h_floats);
  });
  return {};
}

}  // namespace moeops

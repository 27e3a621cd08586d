// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/grouped_matmul.h>

#include <algorithm>
#include <cstring>

#include "ops/core/arg_check.h"
#include "ops/core/team.h"
#include "ops/grouped_matmul/epilogue.h"
#include "ops/grouped_matmul/group_list.h"
#include "ops/grouped_matmul/tile_driver.h"

namespace moeops {

using namespace grouped_matmul_internal;  // NOLINT(google-build-using-namespace)

namespace {

// Writes finished tiles to y.
class ToOutput final : public TileSink {
 public:
  ToOutput(const PackedWeights& weights, const GroupedMatmulArgs& args,
           const EpilogueKernels& kernels)
      : weights_(weights),
        args_(args),
        kernels_(kernels),
        streams_(outgrows_caches(args.y.rows(), args.y.columns() * size_of(args.y.dtype))) {
    if (args.offset.present()) offset_ = args.offset.row<float>(0)[0];
  }

  void take(const TileResult& tile) override {
    const int64_t column = tile.panel * kPanelColumns;
    const int columns = static_cast<int>(std::min<int64_t>(weights_.n() - column, kPanelColumns));
    char* y =
        args_.y.row<char>(0) + (tile.row * args_.y.row_stride + column) * size_of(args_.y.dtype);
    const int64_t y_stride = args_.y.row_stride * size_of(args_.y.dtype);

    alignas(64) int32_t room[kPanelColumns];
    const ColumnConstants constants =
        column_constants(weights_, tile.expert, tile.panel, args_.bias, room);
    if (args_.y.dtype == DType::kI32) {
      auto* c = static_cast<int32_t*>(tile.c);
      kernels_.to_exact(c, tile.rows, tile.width, constants);
      for (int r = 0; r < tile.rows; ++r) {
        std::memcpy(y + r * y_stride, c + r * kPanelColumns,
                    static_cast<size_t>(columns) * sizeof(int32_t));
      }
      return;
    }
    const float* x_scale =
        args_.x_scale.present() ? args_.x_scale.row<float>(0) + tile.row : nullptr;
    const Output output = {
        .y = y, .stride = y_stride, .dtype = args_.y.dtype, .offset = offset_, .streams = streams_};
    if (args_.activation == Activation::kNone) {
      kernels_.store(tile.c, tile.rows, columns, constants, x_scale, output);
      return;
    }
    kernels_.to_values(tile.c, tile.rows, tile.width, constants, x_scale);
    kernels_.activate(static_cast<float*>(tile.c), tile.rows, tile.width, args_.activation);
    kernels_.store(tile.c, tile.rows, columns, {}, nullptr, output);
  }

 private:
  const PackedWeights& weights_;
  const GroupedMatmulArgs& args_;
  const EpilogueKernels& kernels_;
  float offset_ = 0.0f;
  const bool streams_;
};

void check_dtypes(ArgCheck& check, const PackedWeights& weights, const GroupedMatmulArgs& args) {
  if (!check.ok()) return;
  const DType x = args.x.dtype;
  const DType y = args.y.dtype;
  check.require(x == weights.dtype(), "x is %s, but the weights are %s", to_string(x),
                to_string(weights.dtype()));
  if (x != DType::kS8) {
    check.require(y == DType::kF32 || (x == DType::kBf16 && y == DType::kBf16),
                  "x is %s, but y is %s", to_string(x), to_string(y));
    check.require(!args.bias.present() || args.bias.dtype == DType::kF32,
                  "bias is i32, but x is %s", to_string(x));
    check.absent("x_scale", args.x_scale, "x is not s8");
  } else if (y == DType::kI32) {
    check.require(!weights.has_scales(), "the weights have scales, but y is i32");
    check.absent("x_scale", args.x_scale, "y is i32");
    check.require(!args.bias.present() || args.bias.dtype == DType::kI32,
                  "bias is f32, but y is i32");
    check.require(args.activation == Activation::kNone, "activation is given, but y is i32");
  } else {
    check.require(weights.has_scales(), "the weights have no scales");
  }
  if (y != DType::kS8) check.absent("offset", args.offset, "y is not s8");
}

Status check_call(const PackedWeights& weights, const GroupedMatmulArgs& args,
                  GroupStatistics* groups) {
  ArgCheck check("grouped_matmul");
  check.choice("activation", args.activation, Activation::kSilu);
  check.choice("uncovered", args.uncovered, Uncovered::kKeep);
  check.require(weights.packed(), "weights hold nothing");
  check.require(weights.form().role == WeightRole::kPlain,
                "weights are packed as gate and up, expected plain ones");
  Dim M{"M"};
  Dim K{"K", weights.k(), "weights"}, E{"E", weights.experts(), "weights"};
  Dim N{"N", weights.n(), "weights"};
  check.input("x", args.x, {DType::kF32, DType::kBf16, DType::kS8}, {M, K});
  check_group_list_view(check, args.group_list, args.list_type, E);
  check.optional_input("bias", args.bias, {DType::kF32, DType::kI32}, {E, N});
  check.optional_input("x_scale", args.x_scale, {DType::kF32}, {M});
  check.optional_input("offset", args.offset, {DType::kF32}, {1});
  check.output("y", args.y, {DType::kF32, DType::kBf16, DType::kI32, DType::kS8}, {M, N});
  check_dtypes(check, weights, args);
  check.memory("weights", weights.data(), weights.bytes());
  *groups = check_group_list(check, args.group_list, args.list_type, E.value, M.value);
  return check.finish();
}

}  // namespace

Status grouped_matmul(Context& ctx, const PackedWeights& weights, const GroupedMatmulArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  GroupStatistics groups;
  MOEOPS_RETURN_IF_ERROR(check_call(weights, args, &groups));
  const int64_t M = args.x.dim(0);
  const int64_t N = weights.n();
  if (M == 0 || N == 0) return {};

  const int workers =
      team_for_rows(ctx, M, weights.bytes() / std::max<int64_t>(weights.experts(), 1));
  TileDriver driver;
  MOEOPS_RETURN_IF_ERROR(
      driver.prepare(ctx, weights, M, std::min(M, args.group_list.dim(0)), workers, false));
  void* scratch = nullptr;
  MOEOPS_RETURN_IF_ERROR(ctx.reserve_scratch(driver.scratch_bytes(), &scratch));
  driver.start(scratch, groups);
  for_each_group(args.group_list, args.list_type, [&](int64_t expert, int64_t row, int64_t rows) {
    if (rows > 0) driver.add_group(expert, row, rows);
    return true;
  });
  driver.deal();

  const RowFeed feed = {.data = static_cast<const char*>(args.x.data),
                        .stride = args.x.row_stride * size_of(args.x.dtype)};
  const EpilogueKernels& kernels = epilogue_kernels(ctx);
  ToOutput sink(weights, args, kernels);
  run_team(workers, [&](const Team& team) {
    if (args.uncovered == Uncovered::kZero) {
      const int64_t uncovered = M - groups.rows;
      const int64_t element = size_of(args.y.dtype);
      for (int64_t i = uncovered * team.worker / team.size;
           i < uncovered * (team.worker + 1) / team.size; ++i) {
        std::memset(args.y.row<char>(0) + (groups.rows + i) * args.y.row_stride * element, 0,
                    static_cast<size_t>(N * element));
      }
    }
    driver.work(team.worker, feed, sink);
    kernels.fence();
  });
  return {};
}

}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#include <moeops/quant/w8a8_linear.h>

#include <algorithm>

#include "ops/core/arg_check.h"
#include "ops/core/carver.h"
#include "ops/core/team.h"
#include "ops/grouped_matmul/epilogue.h"
#include "ops/grouped_matmul/tile_driver.h"
#include "quant/dynamic_quant/kernels.h"
#include "quant/w8a8/linear_weights.h"

namespace moeops {

using namespace grouped_matmul_internal;  // NOLINT(google-build-using-namespace)

namespace {

class Sink final : public TileSink {
 public:
  Sink(const PackedWeights& weights, const W8a8LinearArgs& args, const EpilogueKernels& kernels,
       const float* x_scale)
      : weights_(weights), args_(args), kernels_(kernels), x_scale_(x_scale) {}

  void take(const TileResult& tile) override {
    const int64_t column = tile.panel * kPanelColumns;
    const auto columns = static_cast<int>(std::min<int64_t>(weights_.n() - column, tile.width));
    const int64_t element = size_of(args_.y.dtype);
    alignas(64) int32_t room[kPanelColumns];
    kernels_.store(tile.c, tile.rows, columns,
                   column_constants(weights_, tile.expert, tile.panel, args_.bias, room),
                   x_scale_ + tile.row,
                   {.y = args_.y.row<char>(0) + (tile.row * args_.y.row_stride + column) * element,
                    .stride = args_.y.row_stride * element,
                    .dtype = args_.y.dtype});
  }

 private:
  const PackedWeights& weights_;
  const W8a8LinearArgs& args_;
  const EpilogueKernels& kernels_;
  const float* x_scale_;
};

Status check_call(const PackedWeights& weights, const W8a8LinearArgs& args) {
  ArgCheck check("w8a8_linear");
  check_linear_weights(check, weights);
  check.require(weights.has_scales(), "the weights have no scales");
  Dim M{"M"}, K{"K", weights.k(), "weights"}, N{"N", weights.n(), "weights"};
  check.input("x", args.x, {DType::kF32, DType::kBf16, DType::kF16}, {M, K});
  check.optional_input("bias", args.bias, {DType::kI32, DType::kF32}, {N});
  check.output("y", args.y, {DType::kF32, DType::kBf16, DType::kF16}, {M, N});
  return check.finish();
}

}  // namespace

Status w8a8_linear(Context& ctx, const PackedWeights& weights, const W8a8LinearArgs& args) {
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  MOEOPS_RETURN_IF_ERROR(check_call(weights, args));
  const int64_t M = args.x.dim(0);
  const int64_t K = weights.k();
  if (M == 0 || weights.n() == 0) return {};

  const int workers = team_for_rows(ctx, M, weights.bytes());
  TileDriver driver;
  MOEOPS_RETURN_IF_ERROR(driver.prepare(ctx, weights, M, 1, workers, false));
  uint8_t* q = nullptr;
  float* x_scale = nullptr;
  char* driver_scratch = nullptr;
  const auto carve = [&](void* scratch) {
    Carver carver(scratch);
    q = carver.take<uint8_t>(M, K);
    x_scale = carver.take<float>(M);
    driver_scratch = carver.take<char>(driver.scratch_bytes());
    return carver.bytes();
  };
  void* scratch = nullptr;
  MOEOPS_RETURN_IF_ERROR(ctx.reserve_scratch(carve(nullptr), &scratch));
  carve(scratch);
  driver.start(driver_scratch, {.rows = M, .active = 1});
  driver.add_group(0, 0, M);
  driver.deal();

  const RowFeed feed = {.data = reinterpret_cast<const char*>(q), .stride = K, .is_u8 = true};
  Sink sink(weights, args, epilogue_kernels(ctx), x_scale);
  const dynamic_quant_internal::U8Row quantise =
      dynamic_quant_internal::row_kernels(ctx.isa()).u8.of(args.x.dtype);
  run_team(workers, [&](const Team& team) {
    for (int64_t i = M * team.worker / team.size; i < M * (team.worker + 1) / team.size; ++i) {
      quantise(offset(args.x.row<char>(0), i * args.x.row_stride * size_of(args.x.dtype)), nullptr,
               K, q + i * K, x_scale + i);
    }
    team.barrier();
    driver.work(team.worker, feed, sink);
  });
  return {};
}

}  // namespace moeops

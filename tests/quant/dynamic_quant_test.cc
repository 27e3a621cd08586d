// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <malloc.h>
#include <moeops/quant/dynamic_quant.h>
#include <moeops/ref/ref.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "ops/core/team.h"
#include "quant/dynamic_quant/kernels.h"
#include "tests/support/contract_sweep.h"
#include "tests/support/draw.h"
#include "tests/support/guarded_buffer.h"
#include "tests/support/seed.h"

namespace moeops {
namespace {

using namespace dynamic_quant_internal;  // NOLINT(google-build-using-namespace)
using test::Draw;
using test::GuardedBuffer;
using test::GuardedMatrix;

std::vector<const RowKernels*> kernels() {
  std::vector<const RowKernels*> all;
  for (int i = 0; i < kRowKernelsCount; ++i) {
    if (kRowKernels[i]->isa <= machine().isa) all.push_back(kRowKernels[i]);
  }
  return all;
}

// A row of one of the kinds that the definition treats apart.
void draw_row(Draw& draw, const GuardedMatrix& x, int64_t row, int64_t H) {
  const int64_t kind = draw.between(0, 11);
  const float constant = draw.normal();
  const float scale = kind == 0   ? 1e-37f
                      : kind == 1 ? 1e-41f
                      : kind == 2 ? 1e38f
                      : kind == 3 ? 1e-30f
                                  : 1.0f;
  for (int64_t j = 0; j < H; ++j) {
    float v = draw.normal() * scale;
    if (kind == 4) v = 0.0f;
    if (kind == 5) v = constant;
    if (kind == 6) v = 1000.0f + v * 0.01f;
    if (kind == 7) v = static_cast<float>(draw.between(-127, 127)) * 0.5f;  // ties
    if (kind == 8) v = -std::fabs(v);
    if (kind == 9 && draw.chance(20)) v = draw.of({NAN, INFINITY, -INFINITY, 3e38f, -3e38f});
    if (kind == 10 && draw.chance(30)) v *= 100.0f;
    x.set(row, j, v);
  }
  if (kind == 7 && H > 0) x.set(row, draw.between(0, H - 1), draw.of({127.0f, -127.0f}) * 0.5f);
}

// One random problem: what it takes and what the reference gives.
struct Problem {
  int64_t M, H, G;
  DType dtype;
  GuardedBuffer::Against side;
  GuardedMatrix x, smooth, q, scale, offset;
  std::vector<int64_t> group_list;
  DynamicQuantArgs args;

  Problem(Draw& draw, int64_t m, int64_t h)
      : M(m),
        H(h),
        G(draw.between(1, 4)),
        dtype(draw.of({DType::kF32, DType::kBf16, DType::kF16})),
        side(draw.of({GuardedBuffer::Against::kFront, GuardedBuffer::Against::kBack})),
        x(dtype, M, H, H + draw.of<int64_t>({0, 0, 1, 7}), side),
        smooth(DType::kF32, G, H, H + draw.of<int64_t>({0, 0, 3}), side),
        q(DType::kS8, M, H, H + draw.of<int64_t>({0, 0, 1, 37}), side),
        scale(DType::kF32, 1, M, M, side),
        offset(DType::kF32, 1, M, M, side) {
    for (int64_t i = 0; i < M; ++i) draw_row(draw, x, i, H);
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t j = 0; j < H; ++j) smooth.set(g, j, 0.5f + std::fabs(draw.normal()));
    }
    for (int64_t g = 0; g < G; ++g) group_list.push_back(draw.between(0, M));
    std::sort(group_list.begin(), group_list.end());
    group_list.back() = M;

    args.x = x.view();
    args.asymmetric = draw.chance(3);
    const int64_t form = draw.between(0, 2);
    if (form == 1) args.smooth = {smooth.row<float>(0), {H}};
    if (form == 2) {
      args.smooth = smooth.view();
      args.group_list = {group_list.data(), {G}};
    }
    args.q = q.view();
    args.scale = scale.vector();
    if (args.asymmetric) args.offset = offset.vector();
  }

  const float* smooth_of(int64_t row) const {
    if (!args.smooth.present()) return nullptr;
    int64_t g = 0;
    while (args.group_list.present() && group_list[static_cast<size_t>(g)] <= row) ++g;
    return smooth.row<float>(g);
  }
};

// Every form, dtype and ISA; what lies between the rows of q is part of the comparison.
TEST(DynamicQuant, MatchesTheReferenceOnRandomProblems) {
  for (uint64_t round = 0; round < 3000; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    Draw draw(seed);
    const int64_t M = draw.between(0, 6);
    const int64_t H = draw.chance(10) ? draw.between(0, 400) : draw.between(0, 70);
    Problem problem(draw, M, H);

    const GuardedMatrix q(DType::kS8, M, H, problem.args.q.row_stride, problem.side);
    const GuardedMatrix scale(DType::kF32, 1, M, M, problem.side);
    const GuardedMatrix offset(DType::kF32, 1, M, M, problem.side);
    split_small_calls(draw.chance(4));
    DynamicQuantArgs args = problem.args;
    args.q = q.view();
    args.scale = scale.vector();
    if (args.asymmetric) args.offset = offset.vector();
    const Status expected = ref::dynamic_quant(args);
    ASSERT_TRUE(expected.ok()) << expected.message();

    for (const RowKernels* rows : kernels()) {
      SCOPED_TRACE(to_string(rows->isa));
      Context ctx({.threads = static_cast<int>(draw.between(1, 3)), .isa = rows->isa});
      problem.q.reset();
      problem.scale.reset();
      problem.offset.reset();
      const Status status = dynamic_quant(ctx, problem.args);
      ASSERT_TRUE(status.ok()) << status.message();
      ASSERT_TRUE(problem.q.same_bytes(q));
      ASSERT_TRUE(problem.scale.same_bytes(scale));
      ASSERT_TRUE(problem.offset.same_bytes(offset));

      // The forms that only other operators or large calls use.
      problem.q.reset();
      problem.scale.reset();
      problem.offset.reset();
      const GuardedMatrix u8(DType::kS8, M, H, problem.args.q.row_stride, problem.side);
      for (int64_t i = 0; i < M; ++i) {
        const char* x =
            problem.x.row<char>(0) + i * problem.args.x.row_stride * size_of(problem.dtype);
        auto* to = problem.q.row<int8_t>(i);
        float* to_scale = problem.scale.row<float>(0) + i;
        const float* smooth = problem.smooth_of(i);
        if (args.asymmetric) {
          rows->asymmetric.of(problem.dtype)(x, smooth, H, to, to_scale,
                                             problem.offset.row<float>(0) + i, x);
          continue;
        }
        float u8_scale;
        rows->u8.of(problem.dtype)(x, smooth, H, u8.row<uint8_t>(i), &u8_scale);
        rows->stream.of(problem.dtype)(x, smooth, H, to, to_scale, x);
        ASSERT_EQ(std::memcmp(&u8_scale, to_scale, sizeof(float)), 0);
        for (int64_t j = 0; j < H; ++j) ASSERT_EQ(u8.row<uint8_t>(i)[j] - 128, to[j]);
      }
      rows->fence();
      ASSERT_TRUE(problem.q.same_bytes(q));
      ASSERT_TRUE(problem.scale.same_bytes(scale));
      ASSERT_TRUE(problem.offset.same_bytes(offset));
    }
  }
  split_small_calls(false);
}

// Calls with a parallel region, and with non-temporal stores, give the reference's bits for any
// number of workers.
TEST(DynamicQuant, AnyNumberOfWorkers) {
  for (uint64_t round = 0; round < 12; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    Draw draw(seed);
    Problem problem(draw, draw.between(30, 60), 3001);
    stream_small_outputs(draw.chance(2));
    const GuardedMatrix q(DType::kS8, problem.M, problem.H, problem.args.q.row_stride,
                          problem.side);
    const GuardedMatrix scale(DType::kF32, 1, problem.M, problem.M, problem.side);
    const GuardedMatrix offset(DType::kF32, 1, problem.M, problem.M, problem.side);
    DynamicQuantArgs args = problem.args;
    args.q = q.view();
    args.scale = scale.vector();
    if (args.asymmetric) args.offset = offset.vector();
    ASSERT_TRUE(ref::dynamic_quant(args).ok());
    for (const RowKernels* rows : kernels()) {
      for (const int threads : {1, 2, 3, 7}) {
        Context ctx({.threads = threads, .isa = rows->isa});
        problem.q.reset();
        problem.scale.reset();
        problem.offset.reset();
        ASSERT_TRUE(dynamic_quant(ctx, problem.args).ok());
        ASSERT_TRUE(problem.q.same_bytes(q)) << to_string(rows->isa) << " " << threads;
        ASSERT_TRUE(problem.scale.same_bytes(scale)) << to_string(rows->isa) << " " << threads;
        ASSERT_TRUE(problem.offset.same_bytes(offset)) << to_string(rows->isa) << " " << threads;
      }
    }
  }
  stream_small_outputs(false);
}

// A plain call of one dtype.
struct Simple {
  int64_t M, H;
  std::vector<bf16> x;
  std::vector<float> smooth, scale, offset;
  std::vector<int8_t> q;
  std::vector<int64_t> group_list;
  DynamicQuantArgs args;

  Simple(int64_t m, int64_t h) : M(m), H(h), group_list{2, 2, m} {
    Draw draw(5);
    for (int64_t i = 0; i < M * H; ++i) x.push_back(to_bf16(draw.normal()));
    for (int64_t i = 0; i < 3 * H; ++i) smooth.push_back(1.0f + std::fabs(draw.normal()));
    q.assign(x.size(), 55);
    scale.assign(static_cast<size_t>(M), -5.0f);
    offset.assign(static_cast<size_t>(M), -5.0f);
    args.x = {x.data(), {M, H}};
    args.smooth = {smooth.data(), {3, H}};
    args.group_list = {group_list.data(), {3}};
    args.q = {q.data(), {M, H}};
    args.scale = {scale.data(), {M}};
  }
};

TEST(DynamicQuant, ANaNStaysInItsRow) {
  for (const RowKernels* rows : kernels()) {
    Context ctx({.threads = 3, .isa = rows->isa});
    for (const bool asymmetric : {false, true}) {
      Simple clean(40, 2001);
      Simple poisoned(40, 2001);
      clean.args.asymmetric = poisoned.args.asymmetric = asymmetric;
      if (asymmetric) {
        clean.args.offset = {clean.offset.data(), {clean.M}};
        poisoned.args.offset = {poisoned.offset.data(), {clean.M}};
      }
      poisoned.x[17 * 2001 + 1999] = to_bf16(NAN);
      ASSERT_TRUE(dynamic_quant(ctx, clean.args).ok());
      ASSERT_TRUE(dynamic_quant(ctx, poisoned.args).ok());
      for (size_t i = 0; i < 40; ++i) {
        if (i == 17) {
          EXPECT_TRUE(std::isnan(poisoned.scale[i]));
          EXPECT_EQ(std::isnan(poisoned.offset[i]), asymmetric);
          continue;
        }
        EXPECT_EQ(poisoned.scale[i], clean.scale[i]);
        EXPECT_EQ(poisoned.offset[i], clean.offset[i]);
        EXPECT_EQ(std::memcmp(&poisoned.q[i * 2001], &clean.q[i * 2001], 2001), 0);
      }
    }
  }
}

TEST(DynamicQuant, PermutedRowsGivePermutedResults) {
  Context ctx({.threads = 2});
  Simple straight(50, 1111);
  Simple reversed(50, 1111);
  straight.args.group_list = reversed.args.group_list = {};
  straight.args.smooth = reversed.args.smooth = {straight.smooth.data(), {straight.H}};
  for (size_t i = 0; i < 50; ++i) {
    std::copy_n(&straight.x[i * 1111], 1111, &reversed.x[(49 - i) * 1111]);
  }
  ASSERT_TRUE(dynamic_quant(ctx, straight.args).ok());
  ASSERT_TRUE(dynamic_quant(ctx, reversed.args).ok());
  for (size_t i = 0; i < 50; ++i) {
    EXPECT_EQ(straight.scale[i], reversed.scale[49 - i]);
    EXPECT_EQ(std::memcmp(&straight.q[i * 1111], &reversed.q[(49 - i) * 1111], 1111), 0);
  }
}

TEST(DynamicQuant, SameBitsInsideAParallelRegion) {
  Simple alone(60, 999);
  Context ctx({.threads = 2});
  ASSERT_TRUE(dynamic_quant(ctx, alone.args).ok());
  std::vector<Simple> inside(3, Simple(60, 999));
#pragma omp parallel num_threads(3)
  {
    Context mine({.threads = 2});
    Simple& call = inside[static_cast<size_t>(omp_get_thread_num())];
    call.args = alone.args;
    call.args.q.data = call.q.data();
    call.args.scale.data = call.scale.data();
    EXPECT_TRUE(dynamic_quant(mine, call.args).ok());
  }
  EXPECT_EQ(inside[0].q, alone.q);
  EXPECT_EQ(inside[0].scale, alone.scale);
}

TEST(DynamicQuant, AllocatesNothingAfterTheFirstCall) {
  Context ctx({.threads = 1});  // one worker: mallinfo2 sees this thread's arena
  Simple call(64, 3000);
  ASSERT_TRUE(dynamic_quant(ctx, call.args).ok());
  for (int i = 0; i < 20; ++i) {
    const struct mallinfo2 before = mallinfo2();
    ASSERT_TRUE(dynamic_quant(ctx, call.args).ok());
    const struct mallinfo2 after = mallinfo2();
    ASSERT_EQ(after.uordblks, before.uordblks);
    ASSERT_EQ(after.hblkhd, before.hblkhd);
  }
}

TEST(DynamicQuant, RefusesEveryMalformedView) {
  Context ctx;
  Simple call(9, 33);
  call.args.asymmetric = true;
  call.args.offset = {call.offset.data(), {9}};
  const std::vector<test::InputView<DynamicQuantArgs>> inputs = {
      {"x", &DynamicQuantArgs::x},
      {"smooth", &DynamicQuantArgs::smooth},
      {"group_list", &DynamicQuantArgs::group_list}};
  const std::vector<test::OutputView<DynamicQuantArgs>> outputs = {
      {"q", &DynamicQuantArgs::q},
      {"scale", &DynamicQuantArgs::scale},
      {"offset", &DynamicQuantArgs::offset}};
  test::sweep_contract(call.args, inputs, outputs,
                       [&](const DynamicQuantArgs& a) { return dynamic_quant(ctx, a); });
}

class DynamicQuantErrors : public ::testing::Test {
 protected:
  void expect(const char* message) {
    const Status status = dynamic_quant(ctx_, call_.args);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_STREQ(status.message(), message);
    for (const int8_t q : call_.q) ASSERT_EQ(q, 55) << "q was written";
    for (const float scale : call_.scale) ASSERT_EQ(scale, -5.0f) << "scale was written";
  }
  Context ctx_;
  Simple call_{6, 10};
};

TEST_F(DynamicQuantErrors, DecreasingGroupList) {
  call_.group_list = {3, 2, 6};
  expect("dynamic_quant: group_list[1] = 2 is less than the 3 before it");
}
TEST_F(DynamicQuantErrors, NegativeGroupList) {
  call_.group_list = {-1, 2, 6};
  expect("dynamic_quant: group_list[0] = -1 is less than the 0 before it");
}
TEST_F(DynamicQuantErrors, GroupListPastTheRows) {
  call_.group_list = {3, 4, 7};
  expect("dynamic_quant: group_list makes more rows than there are: 4 + 3 at entry 2, M = 6");
}
TEST_F(DynamicQuantErrors, GroupListThatEndsEarly) {
  call_.group_list = {3, 4, 5};
  expect("dynamic_quant: group_list ends with 5, expected M = 6");
}
TEST_F(DynamicQuantErrors, GroupListWithoutSmooth) {
  call_.args.smooth = {};
  expect("dynamic_quant: smooth is missing");
}
TEST_F(DynamicQuantErrors, OffsetWithoutAsymmetric) {
  call_.args.offset = {call_.offset.data(), {6}};
  expect("dynamic_quant: offset is given, but asymmetric is false");
}
TEST_F(DynamicQuantErrors, AsymmetricWithoutOffset) {
  call_.args.asymmetric = true;
  expect("dynamic_quant: offset is missing");
}

}  // namespace
}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/ops/core/context.h>
#include <moeops/ops/core/huge_buffer.h>
#include <omp.h>

#include <cstdlib>
#include <cstring>

namespace moeops {
namespace {

TEST(Context, DefaultsAreTheMachines) {
  const Context ctx;
  ASSERT_TRUE(ctx.status().ok()) << ctx.status().message();
  EXPECT_EQ(ctx.threads(), machine().threads);
  EXPECT_LE(ctx.isa(), machine().isa);
}

TEST(Context, KeepsBadOptionsAsItsStatus) {
  EXPECT_EQ(Context({.threads = -1}).status().code(), StatusCode::kInvalidArgument);
  if (machine().isa < Isa::kAmx) {
    EXPECT_EQ(Context({.isa = Isa::kAmx}).status().code(), StatusCode::kInvalidArgument);
  }
  const char* before = std::getenv("MOEOPS_ISA");
  const std::string kept = before != nullptr ? before : "";
  setenv("MOEOPS_ISA", "avx3", 1);
  const Status status = Context().status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(std::strstr(status.message(), "avx3"), nullptr) << status.message();
  setenv("MOEOPS_ISA", "scalar", 1);
  EXPECT_EQ(Context().isa(), Isa::kScalar);
  if (before != nullptr) {
    setenv("MOEOPS_ISA", kept.c_str(), 1);
  } else {
    unsetenv("MOEOPS_ISA");
  }
}

TEST(Context, OneWorkerInsideAParallelRegion) {
  const Context ctx({.threads = 3});
  EXPECT_EQ(ctx.workers(), 3);
  int nested = 0;
#pragma omp parallel num_threads(2)
  {
#pragma omp single
    nested = omp_in_parallel() ? ctx.workers() : 1;
  }
  EXPECT_EQ(nested, 1);
}

TEST(Context, ScratchGrowsToItsHighWaterMark) {
  Context ctx;
  void* first = nullptr;
  ASSERT_TRUE(ctx.reserve_scratch(1 << 20, &first).ok());
  EXPECT_EQ(reinterpret_cast<uintptr_t>(first) % 64, 0u);
  std::memset(first, 1, 1 << 20);
  void* again = nullptr;
  ASSERT_TRUE(ctx.reserve_scratch(1000, &again).ok());
  EXPECT_EQ(again, first);
  ASSERT_TRUE(ctx.reserve_scratch(5 << 20, &again).ok());
  std::memset(again, 1, 5 << 20);
  EXPECT_EQ(ctx.reserve_scratch(int64_t{1} << 60, &again).code(), StatusCode::kOutOfMemory);
  ASSERT_TRUE(ctx.reserve_scratch(64, &again).ok()) << "the context works on after a failure";
  std::memset(again, 1, 64);
}

TEST(HugeBuffer, SizesAndAlignment) {
  for (const int64_t bytes : {1, 4096, 4097, 1 << 21, (1 << 21) + 1, (5 << 20) + 123}) {
    HugeBuffer buffer;
    ASSERT_TRUE(HugeBuffer::allocate(bytes, &buffer).ok());
    EXPECT_EQ(buffer.size(), bytes);
    const auto address = reinterpret_cast<uintptr_t>(buffer.data());
    EXPECT_EQ(address % (bytes >= (1 << 21) ? uintptr_t{1} << 21 : uintptr_t{4096}), 0u);
    auto* p = static_cast<char*>(buffer.data());
    EXPECT_EQ(p[0], 0);
    EXPECT_EQ(p[bytes - 1], 0);
    p[0] = p[bytes - 1] = 1;
    HugeBuffer moved = std::move(buffer);
    EXPECT_EQ(moved.data(), p);
  }
  HugeBuffer none;
  EXPECT_TRUE(HugeBuffer::allocate(0, &none).ok());
  EXPECT_EQ(HugeBuffer::allocate(-1, &none).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(HugeBuffer::allocate(INT64_MAX, &none).code(), StatusCode::kOutOfMemory);
  EXPECT_EQ(HugeBuffer::allocate(int64_t{1} << 60, &none).code(), StatusCode::kOutOfMemory);
}

}  // namespace
}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#include "ops/core/tuning.h"

#include <gtest/gtest.h>
#include <moeops/ops/core/context.h>
#include <sys/stat.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

namespace moeops {
namespace {

namespace fs = std::filesystem;

// A path in a folder that is gone at the end of the test.
class TuningFile : public testing::Test {
 protected:
  TuningFile() {
    std::string name = (fs::temp_directory_path() / "moeops-tuning-XXXXXX").string();
    folder_ = mkdtemp(name.data());
    path_ = (folder_ / "cache").string();
  }
  ~TuningFile() override { fs::remove_all(folder_); }

  void write(const std::string& text) const { std::ofstream(path_, std::ios::binary) << text; }
  Context context(int threads = 2, Isa isa = Isa::kScalar) const {
    return Context({.threads = threads, .isa = isa, .tuning_cache = path_.c_str()});
  }
  // The context works, and says why it does without the cache.
  void expect_ignored(const std::string& why) const {
    const Context ctx = context();
    EXPECT_TRUE(ctx.status().ok());
    EXPECT_EQ(ctx.tuned_plans(), 0);
    EXPECT_EQ(ctx.tuning(), nullptr);
    EXPECT_FALSE(ctx.tuning_status().ok());
    EXPECT_NE(std::string(ctx.tuning_status().message()).find(why), std::string::npos)
        << ctx.tuning_status().message();
  }

  fs::path folder_;
  std::string path_;
};

Tuning two_plans() {
  Tuning tuning;
  TunedShape shape = {.isa = Isa::kScalar,
                      .threads = 2,
                      .dtype = DType::kS8,
                      .kernel = TunedShape::name_of("scalar"),
                      .panels = 24,
                      .k_chunks = 32,
                      .rows = 2048,
                      .rows_per_expert = 16};
  tuning.plans[shape] = {.chunk_rows = 96, .k_block = 16, .task_panels = 3};
  shape.rows = 1;
  tuning.plans[shape] = {.chunk_rows = 1, .k_block = 1, .task_panels = 24};
  return tuning;
}

std::string replaced(std::string text, const std::string& part, const std::string& by) {
  const size_t at = text.find(part);
  EXPECT_NE(at, std::string::npos) << part;
  return text.replace(at, part.size(), by);
}

TEST_F(TuningFile, IsReadAsItWasWritten) {
  const Tuning tuning = two_plans();
  write(tuning.text());
  const Context ctx = context();
  EXPECT_TRUE(ctx.tuning_status().ok()) << ctx.tuning_status().message();
  EXPECT_EQ(ctx.tuned_plans(), 2);
  ASSERT_NE(ctx.tuning(), nullptr);
  EXPECT_EQ(ctx.tuning()->plans, tuning.plans);
  TunedShape shape = tuning.plans.begin()->first;
  ASSERT_NE(ctx.tuning()->find(shape), nullptr);
  EXPECT_EQ(*ctx.tuning()->find(shape), tuning.plans.begin()->second);
}

TEST_F(TuningFile, EveryPartOfTheShapeCounts) {
  const Tuning tuning = two_plans();
  const TunedShape known = tuning.plans.begin()->first;
  const std::function<void(TunedShape&)> changes[] = {
      [](TunedShape& s) { s.isa = Isa::kAvx2; },
      [](TunedShape& s) { s.threads = 1; },
      [](TunedShape& s) { s.dtype = DType::kF32; },
      [](TunedShape& s) { s.kernel = TunedShape::name_of("avx2"); },
      [](TunedShape& s) { s.panels = 25; },
      [](TunedShape& s) { s.k_chunks = 33; },
      [](TunedShape& s) { s.rows = 4; },
      [](TunedShape& s) { s.rows_per_expert = 32; }};
  for (const auto& change : changes) {
    TunedShape other = known;
    change(other);
    EXPECT_EQ(tuning.find(other), nullptr);
  }
  EXPECT_EQ(TunedShape::row_class(0), 1);
  EXPECT_EQ(TunedShape::row_class(1), 1);
  EXPECT_EQ(TunedShape::row_class(1025), 2048);
  EXPECT_EQ(TunedShape::row_class(2048), 2048);
  EXPECT_EQ(TunedShape::row_class(INT64_MAX), int64_t{1} << 62);
  EXPECT_EQ(TunedShape::row_class_of_expert(2048, 128), 16);
  EXPECT_EQ(TunedShape::row_class_of_expert(2049, 128), 32);
  EXPECT_EQ(TunedShape::row_class_of_expert(2048, 214), 16);
  EXPECT_EQ(TunedShape::row_class_of_expert(8, 128), 1);
  EXPECT_EQ(TunedShape::row_class_of_expert(8, 0), 8);
}

TEST_F(TuningFile, OtherThreadsAndIsasHaveNoPlans) {
  write(two_plans().text());
  EXPECT_EQ(context(1).tuned_plans(), 0);
  EXPECT_TRUE(context(1).tuning_status().ok()) << "the file is as good as any";
  if (machine().isa >= Isa::kAvx2) {
    EXPECT_EQ(context(2, Isa::kAvx2).tuned_plans(), 0);
  }
}

TEST_F(TuningFile, AnotherMachineOrVersionIsIgnored) {
  const std::string text = two_plans().text();
  write(replaced(text, "library 0", "library 99.0"));
  expect_ignored("library 99.0");
  write(replaced(text, machine().cpu, "Another CPU"));
  expect_ignored("Another CPU");
  write(replaced(text, "L2 ", "L2 7"));
  expect_ignored("L2 7");
  write(replaced(text, "tuning 1", "tuning 2"));
  expect_ignored("tuning 2");
}

TEST_F(TuningFile, WhatIsNoCacheIsIgnored) {
  expect_ignored("No such file");
  fs::create_directory(path_);
  expect_ignored("not a regular file");
  fs::remove(path_);
  ASSERT_EQ(mkfifo(path_.c_str(), 0600), 0);
  expect_ignored("not a regular file");
  fs::remove(path_);
  write("");
  expect_ignored("begins ''");
  write(std::string(3, '\0') + "\xff garbage");
  expect_ignored("begins");
  write(two_plans().text() + std::string(1 << 20, '\n'));
  expect_ignored("too long");
}

// Wherever the text ends too soon, and whatever is behind its end.
TEST_F(TuningFile, ACutOrLongerOneIsIgnored) {
  const std::string text = two_plans().text();
  Tuning tuning;
  ASSERT_TRUE(Tuning::parse(text, &tuning).ok());
  for (size_t size = 0; size < text.size(); ++size) {
    EXPECT_FALSE(Tuning::parse(text.substr(0, size), &tuning).ok()) << "after " << size;
  }
  for (const char* more : {"\n", " ", "x", "scalar 2 s8"}) {
    EXPECT_FALSE(Tuning::parse(text + more, &tuning).ok()) << more;
  }
  EXPECT_EQ(tuning.plans, two_plans().plans) << "a failed call leaves it as it was";
  write(text.substr(0, text.size() - 1));
  expect_ignored("not as it was written");
  write(text + text.substr(text.find("scalar 2 s8")));  // twice
  expect_ignored("not as it was written");
}

TEST_F(TuningFile, NonsenseInALineIsIgnored) {
  const std::string text = two_plans().text();
  const std::string line = "scalar 2 s8 scalar 24 32 2048 16 96 16 3";
  for (const char* other :
       {"scalar 2 s8 scalar 24 32 2048 16 0 16 3", "scalar 2 s8 scalar 24 32 2048 16 96 -16 3",
        "scalar 2 s8 scalar 24 32 2048 16 96 16 99999999",
        "scalar 2 s8 scalar 24 32 2048 16 96 16 99999999999999999999",
        "scalar 2 s8 scalar 24 32 2048 16 96 16", "scalar 2 s8 scalar 24 32 2048 16 96 16 3 3",
        "scalar 2 s8 scalar 24 32 2048 16 96 16 03", "scalar 2 s8 scalar 24 32 2047 16 96 16 3",
        "scalar 2 s8 scalar 24 32 2048 -16 96 16 3", "mmx 2 s8 scalar 24 32 2048 16 96 16 3",
        "scalar 2 f16 scalar 24 32 2048 16 96 16 3", "scalar two s8 scalar 24 32 2048 16 96 16 3",
        "scalar 2 s8  scalar 24 32 2048 16 96 16 3", "scalar 2 s8 scalar 24 32 2048 16 96 1.6 3",
        "scalar 2 s8 a_name_that_is_longer_than_any_kernel_has 24 32 2048 16 96 16 3", ""}) {
    SCOPED_TRACE(other);
    write(replaced(text, line, other));
    expect_ignored("tuning cache: ");
  }
}

TEST_F(TuningFile, NoneIsAskedFor) {
  const Context ctx;
  EXPECT_TRUE(ctx.tuning_status().ok());
  EXPECT_EQ(ctx.tuned_plans(), 0);
  EXPECT_EQ(ctx.tuning(), nullptr);
}

}  // namespace
}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/tune.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "bench/opbench/context.h"
#include "bench/opbench/operators.h"
#include "tests/bench/small_options.h"
#include "tests/tools/test_support.h"
#include "tools/tensor_file/error.h"

namespace moeops::bench {
namespace {

namespace fs = std::filesystem;
using Plans = std::vector<TunedPlan>;

grouped_matmul_internal::Problem problem_of(int64_t rows, int64_t active, int64_t panels,
                                            int64_t k_chunks) {
  return {.max_rows = rows,
          .groups = {rows, active},
          .panels = panels,
          .k_chunks = k_chunks,
          .row_block = 6,
          .tile_rows = 48,
          .panels_together = 1,
          .l2_bytes = 1 << 20,
          .workers = 2};
}

TEST(TuningCandidates, AreFewAndDiffer) {
  for (const int64_t rows : {1, 40, 128, 16384}) {
    for (const int64_t panels : {1, 24, 448}) {
      for (const int64_t k_chunks : {1, 32, 448}) {
        auto problem = problem_of(rows, std::min<int64_t>(rows, 128), panels, k_chunks);
        const auto base = make_plan(problem);
        const Plans plans = tuning_candidates(problem, (rows + 127) / 128);
        EXPECT_LE(plans.size(), 32u);
        std::set<std::vector<int64_t>> all = {{base.chunk_rows, base.k_block, base.task_panels}};
        for (const TunedPlan& plan : plans) {
          EXPECT_TRUE(all.insert({plan.chunk_rows, plan.k_block, plan.task_panels}).second)
              << words(plan);
          problem.tuned = plan;
          const auto made = make_plan(problem);
          EXPECT_EQ(made.chunk_rows, plan.chunk_rows);
          EXPECT_EQ(made.k_block, plan.k_block);
          EXPECT_EQ(made.task_panels, plan.task_panels);
        }
        if (rows == 1 && panels == 1 && k_chunks == 1) {
          EXPECT_TRUE(plans.empty());
        }
        if (rows == 16384 && panels == 448 && k_chunks == 448) {
          EXPECT_GE(plans.size(), 20u);
        }
      }
    }
  }
}

// Fewer rows at a time mean something only where a group has more.
TEST(TuningCandidates, HaveTheRowsOfAGroup) {
  const auto problem = problem_of(16384, 128, 24, 32);
  for (const TunedPlan& plan : tuning_candidates(problem, 20)) {
    EXPECT_TRUE(plan.chunk_rows < 24 || plan.chunk_rows == make_plan(problem).chunk_rows)
        << words(plan);
  }
}

// Runners whose times are known: each takes `speeds[i]` times what the default does, more or less
// `noise` of it, on a machine that slows down by `drift` of its speed at every call.
struct Course {
  std::vector<double> speeds;
  double noise = 0;
  double drift = 0;
  std::mt19937_64 random{7};
  double pace = 1;
  std::vector<int> calls = std::vector<int>(speeds.size());

  Race run(int64_t pairs = 9) {
    return race(speeds.size(), pairs, [this](size_t i) {
      pace *= 1 + drift;
      if (i != kDefaultPlan) ++calls[i];
      const double speed = i == kDefaultPlan ? 1 : speeds[i];
      return pace * speed * std::uniform_real_distribution<double>(1 - noise, 1 + noise)(random);
    });
  }
};

TEST(Race, FindsTheFastest) {
  Course course{.speeds = std::vector<double>(24, 1.0), .noise = 0.02};
  course.speeds[17] = 0.9;
  course.speeds[3] = 1.5;
  const Race race = course.run();
  EXPECT_EQ(race.best, 17u);
  EXPECT_TRUE(race.won);
  EXPECT_NEAR(race.ratio, 0.9, 0.02);
  EXPECT_EQ(race.pairs, 9);
  EXPECT_EQ(race.faster, 9);
  EXPECT_EQ(race.runners[3].ratios.size(), 2u) << "dropped at once";
  EXPECT_NEAR(race.runners[3].median, 1.5, 0.06);
  EXPECT_GT(course.calls[17], 4 * course.calls[3]);
}

TEST(Race, KeepsTheDefault) {
  const auto won = [](double fastest, double noise, double drift) {
    Course course{.speeds = std::vector<double>(24, 1.0), .noise = noise, .drift = drift};
    course.speeds[5] = fastest;
    return course.run().won;
  };
  EXPECT_FALSE(won(1.0, 0.02, 0)) << "all alike: one of them is luckiest";
  EXPECT_FALSE(won(0.98, 0.001, 0)) << "too little";
  EXPECT_FALSE(won(1.0, 0, 0.02)) << "all alike on a machine that slows down";
  EXPECT_TRUE(won(0.95, 0, 0.02));
  EXPECT_FALSE(won(0.95, 0.5, 0)) << "not faster in nearly all pairs";
  EXPECT_FALSE(race(0, 9, [](size_t) { return 1.0; }).won) << "nobody runs";
  EXPECT_TRUE((Course{.speeds = {0.5}}.run().won)) << "one alone";
}

TEST(Tune, SeesOtherBits) {
  std::vector<std::string> results = {"abc", "abc", "abc"};
  const auto first = [&] {
    return first_with_other_bits(results.size(), [&](size_t i) {
      const std::string& text = i == kDefaultPlan ? "abc" : results[i];
      return std::vector<char>(text.begin(), text.end());
    });
  };
  EXPECT_EQ(first(), 3u);
  results[2] = "abd";
  EXPECT_EQ(first(), 2u);
}

class TuneFile : public testing::Test {
 protected:
  TuneFile() {
    std::string name = (fs::temp_directory_path() / "moeops-tune-XXXXXX").string();
    folder_ = mkdtemp(name.data());
    path_ = (folder_ / "cache").string();
  }
  ~TuneFile() override {
    set_tuning_cache("");
    fs::remove_all(folder_);
  }
  void write(const std::string& text) const { std::ofstream(path_) << text; }

  fs::path folder_;
  std::string path_;
};

TEST_F(TuneFile, AddsToItsOwnKindOnly) {
  EXPECT_TRUE(read_for_tuning(path_).plans.empty());
  Tuning tuning;
  tuning.plans[{.dtype = DType::kS8, .kernel = TunedShape::name_of("k")}] = {1, 2, 3};
  write(tuning.text());
  EXPECT_EQ(read_for_tuning(path_).plans, tuning.plans);
  write("moeops tuning 0, of long ago\n");
  EXPECT_TRUE(read_for_tuning(path_).plans.empty());
  for (const char* other : {"", "moeops", "# Notes\n"}) {
    write(other);
    EXPECT_THROW(read_for_tuning(path_), tools::Error) << other;
  }
  fs::remove(path_);
  fs::create_directory(path_);
  EXPECT_THROW(read_for_tuning(path_), tools::Error);
}

// The file that is to get the plans, before they are searched.
TEST_F(TuneFile, IsCheckedBefore) {
  const auto warning = [&] {
    testing::internal::CaptureStderr();
    check_tuning_file(path_);
    return testing::internal::GetCapturedStderr();
  };
  EXPECT_EQ(warning(), "");
  Tuning tuning;
  EXPECT_TRUE(Tuning::read(path_.c_str(), &tuning).ok()) << "now it is an empty cache";
  EXPECT_TRUE(tuning.plans.empty());

  tuning.plans[{.dtype = DType::kS8, .kernel = TunedShape::name_of("k")}] = {1, 2, 3};
  write(tuning.text());
  EXPECT_EQ(warning(), "");
  EXPECT_EQ(tools::read_text(path_), tuning.text());

  const std::string damaged = tuning.text() + "1 2 3\n";
  for (const std::string& text : {std::string("moeops tuning 0, of long ago\n"), damaged}) {
    write(text);
    const std::string words = warning();
    EXPECT_NE(words.find(path_ + ": its plans are of another machine or version, or damaged"),
              std::string::npos)
        << words;
    EXPECT_EQ(std::count(words.begin(), words.end(), '\n'), 1) << words;
    EXPECT_EQ(tools::read_text(path_), text) << "until there are others";
  }
  EXPECT_THROW(check_tuning_file(path_ + ".folder/cache"), tools::Error);
}

// Which plan wins is the machine's business; what is written is not.
TEST_F(TuneFile, RunsAndWrites) {
  Tuning other;
  const TunedShape known = {.dtype = DType::kS8, .kernel = TunedShape::name_of("k")};
  other.plans[known] = {1, 2, 3};
  write(other.text());
  set_tuning_cache(path_);

  Options options =
      small_options({"small", 256, 64, 8, 2, 0}, {50, 60}, "balanced");  // tokens of one class
  options.explain = true;
  options.tune = true;
  options.tuning_cache = path_;
  LimitsMeter meter;
  ASSERT_TRUE(LimitsMeter::create(2, &meter, 1 << 24).ok());
  const std::vector<Result> results =
      grouped_matmul_operator().run(options, meter, [](const std::string&) {});
  ASSERT_EQ(results.size(), 2u);
  size_t won = 0;
  for (const Result& r : results) {
    EXPECT_TRUE(r.verified) << r.wrong;
    ASSERT_GE(r.explain.size(), 2u);
    EXPECT_NE(r.repro.find("--tuning-cache " + path_), std::string::npos);
    const std::string& plan = r.explain[r.explain.size() - 2];
    if (r.tokens == 60) {
      EXPECT_EQ(r.explain[0], "not tuned again: 128 rows, 16 of an expert, have their plan");
      continue;
    }
    const std::string& verdict = r.explain[r.explain.size() - 3];
    EXPECT_TRUE(verdict.starts_with("tuned: ") || verdict.starts_with("default kept")) << verdict;
    EXPECT_EQ(verdict.starts_with("tuned: "), plan.starts_with("tuned plan")) << plan;
    won += verdict.starts_with("tuned: ") ? 1 : 0;
  }
  Tuning written;
  ASSERT_TRUE(Tuning::read(path_.c_str(), &written).ok());
  ASSERT_NE(written.find(known), nullptr) << "what was there stays";
  EXPECT_EQ(*written.find(known), (TunedPlan{1, 2, 3}));
  EXPECT_EQ(written.plans.size(), 1 + won);
}

}  // namespace
}  // namespace moeops::bench

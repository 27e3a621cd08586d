// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/tune.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <numeric>
#include <set>
#include <tuple>

#include "tools/tensor_file/error.h"
#include "tools/tensor_file/write_file.h"

namespace moeops::bench {

using grouped_matmul_internal::Plan;
using grouped_matmul_internal::Problem;

namespace {

constexpr double kLeastGain = 0.03;
constexpr int kMostPasses = 4;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

// `number` times 2 to the power of `steps`, at least 1.
int64_t scaled(int64_t number, int steps) {
  return steps >= 0 ? number << steps : std::max<int64_t>(number >> -steps, 1);
}

}  // namespace

std::vector<TunedPlan> tuning_candidates(const Problem& untuned, int64_t largest_group) {
  Problem problem = untuned;
  problem.tuned = {};
  const Plan base = make_plan(problem);
  const int64_t k_chunks = std::max<int64_t>(problem.k_chunks, 1);
  const int64_t block = problem.row_block;
  // More rows than a group has are as good as all of them.
  const int64_t all_blocks = divide_up(std::max<int64_t>(largest_group, 1), block);
  const auto blocks_of = [&](const Plan& plan) {
    return std::min(plan.chunk_rows / block, all_blocks);
  };
  const auto effect = [&](const Plan& plan) {
    return std::tuple(blocks_of(plan), plan.k_block, plan.task_panels);
  };

  std::vector<TunedPlan> candidates;
  std::set<std::tuple<int64_t, int64_t, int64_t>> seen = {effect(base)};
  const auto add = [&](int rows, int k, int panels) {
    // K in blocks of equal size, however many.
    const int64_t k_blocks = scaled(divide_up(k_chunks, base.k_block), -k);
    problem.tuned = {
        .chunk_rows = rows == 0 ? base.chunk_rows : scaled(blocks_of(base), rows) * block,
        .k_block = k == 0 ? base.k_block : divide_up(k_chunks, std::min(k_blocks, k_chunks)),
        .task_panels = scaled(base.task_panels, panels)};
    const Plan plan = make_plan(problem);
    if (!seen.insert(effect(plan)).second) return;
    candidates.push_back({plan.chunk_rows, plan.k_block, plan.task_panels});
  };
  for (const int step : {-1, 1, -2, 2, -3, 3, -4, 4}) {
    if (std::abs(step) <= 2) add(step, 0, 0);
    add(0, step, 0);
    add(0, 0, step);
  }
  for (const int first : {-1, 1}) {
    for (const int second : {-1, 1}) {
      add(first, second, 0);
      add(first, 0, second);
      add(0, first, second);
    }
  }
  return candidates;
}

size_t first_with_other_bits(size_t candidates,
                             const std::function<std::vector<char>(size_t)>& result) {
  const std::vector<char> expected = result(kDefaultPlan);
  size_t i = 0;
  while (i < candidates && result(i) == expected) ++i;
  return i;
}

Race race(size_t candidates, int64_t pairs, const std::function<double(size_t)>& seconds) {
  Race result;
  result.runners.resize(candidates);
  if (candidates == 0) return result;
  std::vector<size_t> running(candidates);
  std::iota(running.begin(), running.end(), size_t{0});
  for (int passes = 2;; passes = std::min(2 * passes, kMostPasses)) {
    for (int pass = 0; pass < passes; ++pass) {
      std::vector<size_t> order = {kDefaultPlan};
      order.insert(order.end(), running.begin(), running.end());
      std::vector<double> times(order.size());
      for (size_t i = 0; i < order.size(); ++i) times[i] += seconds(order[i]);
      for (size_t i = order.size(); i-- > 0;) times[i] += seconds(order[i]);
      for (size_t i = 1; i < order.size(); ++i) {
        result.runners[order[i]].ratios.push_back(times[i] / times[0]);
      }
    }
    for (const size_t i : running) result.runners[i].median = median(result.runners[i].ratios);
    std::sort(running.begin(), running.end(), [&](size_t a, size_t b) {
      return result.runners[a].median < result.runners[b].median;
    });
    if (running.size() == 1) break;
    running.resize((running.size() + 1) / 2);
  }
  result.best = running.front();

  std::vector<double> ratios;
  for (result.pairs = 0; result.pairs < pairs; ++result.pairs) {
    double ours = 0;
    double theirs = seconds(kDefaultPlan);
    for (int i = 0; i < 2; ++i) ours += seconds(result.best);
    theirs += seconds(kDefaultPlan);
    ratios.push_back(ours / theirs);
    if (ours < theirs) ++result.faster;
  }
  result.ratio = median(ratios);
  result.won = result.ratio <= 1 - kLeastGain && 9 * result.faster >= 8 * pairs;
  return result;
}

std::string words(const TunedPlan& plan) {
  return fmt::format("chunk_rows {}, k_block {}, task_panels {}", plan.chunk_rows, plan.k_block,
                     plan.task_panels);
}

std::vector<std::string> tuning_report(const Plan& untuned,
                                       const std::vector<TunedPlan>& candidates, const Race& race) {
  const auto line = [](const char* name, const TunedPlan& plan) {
    return fmt::format("{:<10} {:>10} {:>8} {:>12}", name, plan.chunk_rows, plan.k_block,
                       plan.task_panels);
  };
  std::vector<std::string> lines = {
      "plan       chunk_rows  k_block  task_panels  passes  time / default's",
      line("default", {untuned.chunk_rows, untuned.k_block, untuned.task_panels})};
  for (size_t i = 0; i < candidates.size(); ++i) {
    const Race::Runner& runner = race.runners[i];
    lines.push_back(fmt::format("{} {:>7} {:>17.3f}", line("candidate", candidates[i]),
                                runner.ratios.size(), runner.median));
  }
  if (candidates.empty()) {
    lines.push_back("default kept: no other plan differs in effect");
    return lines;
  }
  lines.push_back(fmt::format(
      "{}: {}; {:.1f}% {} time than the default, the median of {} more pairs, and less in {}",
      race.won ? "tuned" : "default kept; the best other one was", words(candidates[race.best]),
      100 * std::fabs(1 - race.ratio), race.ratio <= 1 ? "less" : "more", race.pairs, race.faster));
  return lines;
}

Tuning read_for_tuning(const std::string& path) {
  Tuning tuning;
  const Status status = Tuning::read(path.c_str(), &tuning);
  if (status.ok() || !std::filesystem::exists(path)) return tuning;
  if (!std::filesystem::is_regular_file(path)) {
    throw tools::Error(fmt::format("--tuning-cache {}: not a regular file", path));
  }
  const std::string own = tuning.text();
  std::ifstream file(path, std::ios::binary);
  std::string start(own.find(' ', own.find(' ') + 1), '\0');  // "moeops tuning"
  file.read(start.data(), static_cast<std::streamsize>(start.size()));
  if (!own.starts_with(start)) {
    throw tools::Error(
        fmt::format("--tuning-cache {}: there is a file that is none; {}", path, status.message()));
  }
  return tuning;
}

void check_tuning_file(const std::string& path) {
  std::string text = read_for_tuning(path).text();
  if (std::filesystem::exists(path)) {
    std::ifstream file(path, std::ios::binary);
    text.assign(std::istreambuf_iterator<char>(file), {});
    Tuning tuning;
    if (const Status status = Tuning::parse(text, &tuning); !status.ok()) {
      fmt::print(stderr,
                 "opbench: --tuning-cache {}: its plans are of another machine or version, or "
                 "damaged, and will be replaced: {}\n",
                 path, status.message());
    }
  }
  tools::write_file_atomically(path, text);
}

}  // namespace moeops::bench

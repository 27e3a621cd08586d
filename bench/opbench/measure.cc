// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/measure.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>

#include "tools/tensor_file/error.h"

namespace moeops::bench {

using tools::Error;

namespace {

double quantile(const std::vector<double>& sorted, double q) {
  const double at = q * static_cast<double>(sorted.size() - 1);
  const auto low = static_cast<size_t>(at);
  const size_t high = std::min(low + 1, sorted.size() - 1);
  return sorted[low] + (at - static_cast<double>(low)) * (sorted[high] - sorted[low]);
}

bool agree(const std::vector<double>& a, const std::vector<double>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::fabs(a[i] - b[i]) > 0.1 * std::max(a[i], b[i])) return false;
  }
  return true;
}

// A word of a command line, so that a shell gives it back as it is.
std::string shell_word(const std::string& text) {
  constexpr const char* kPlain =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./:=+-";
  if (!text.empty() && text.find_first_not_of(kPlain) == std::string::npos) return text;
  std::string word = "'";
  for (const char c : text) word += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return word + "'";
}

// The largest ratio of a call's time to the median of the 8 calls nearest to it.
double worst_of_neighbours(const std::vector<double>& times) {
  constexpr size_t kNeighbours = 8;
  if (times.size() <= kNeighbours) return 0;
  double worst = 0;
  for (size_t i = 0; i < times.size(); ++i) {
    const size_t first = std::min(i - std::min(i, kNeighbours / 2), times.size() - kNeighbours - 1);
    std::vector<double> others;
    for (size_t j = first; j <= first + kNeighbours; ++j) {
      if (j != i) others.push_back(times[j]);
    }
    std::sort(others.begin(), others.end());
    worst = std::max(worst, times[i] / quantile(others, 0.5));
  }
  return worst;
}

}  // namespace

double Measured::limit(size_t i) const {
  double sum = 0;
  for (const std::vector<double>& reading : limits) sum += reading[i];
  return sum / static_cast<double>(limits.size());
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int64_t available_memory() {
  std::ifstream file("/proc/meminfo");
  for (std::string key; file >> key;) {
    if (key == "MemAvailable:") {
      int64_t kib = 0;
      file >> kib;
      return kib << 10;
    }
  }
  return int64_t{4} << 30;
}

double stolen_seconds_of(std::istream& proc_stat) {
  // user, nice, system, idle, iowait, irq, softirq, steal
  std::string key;
  proc_stat >> key;
  int64_t ticks = 0;
  for (int field = 0; field < 8; ++field) proc_stat >> ticks;
  if (!proc_stat || key != "cpu") return 0;
  return static_cast<double>(ticks) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

double stolen_seconds() {
  std::ifstream file("/proc/stat");
  return stolen_seconds_of(file);
}

int64_t experts_that_fit(int64_t expert_bytes) {
  // Padded panels take up to 1 / 16 more.
  return available_memory() / 4 * 3 / (expert_bytes + expert_bytes / 16 + 1);
}

std::string note_of_experts(int64_t used, const Problem& problem) {
  if (used >= problem.experts) return {};
  return fmt::format("{} of the {} experts: memory holds no more", used, problem.experts);
}

int64_t cold_bytes() { return 2 * std::max(machine().l3_bytes, int64_t{32} << 20); }

void measure(const Options& options, const std::function<std::vector<double>()>& read_limits,
             const std::function<double()>& timed_call, Measured& measured) {
  std::vector<double> times;
  std::vector<double> before;
  std::vector<double> after;
  double stolen = 0;
  bool steady = false;
  for (int attempt = 0; attempt < 3 && !steady; ++attempt) {
    times.clear();
    before = read_limits();
    const double stolen_before = stolen_seconds();
    (void)timed_call();  // wakes the workers
    double total = 0;
    while (static_cast<int64_t>(times.size()) < (options.reps + 1) / 2 ||
           (total < options.min_seconds / 2 && times.size() < 1000)) {
      times.push_back(timed_call());
      total += times.back();
    }
    stolen = stolen_seconds() - stolen_before;
    after = read_limits();
    steady = agree(before, after);
  }
  measured.worst_of_neighbours = std::max(measured.worst_of_neighbours, worst_of_neighbours(times));
  measured.stolen += stolen;
  measured.times.insert(measured.times.end(), times.begin(), times.end());
  measured.limits.push_back(before);
  measured.limits.push_back(after);
  measured.steady = measured.steady && steady;
}

void visit_forth_and_back(size_t count, const std::function<void(size_t, bool)>& visit) {
  for (size_t step = 0; step < 2 * count; ++step) {
    const bool forth = step < count;
    visit(forth ? step : 2 * count - 1 - step, forth);
  }
}

void fill_times(const Measured& measured, Result& result) {
  std::vector<double> times = measured.times;
  std::sort(times.begin(), times.end());
  const double median = quantile(times, 0.5);
  result.steady = measured.steady;
  result.reps = static_cast<int64_t>(times.size());
  result.median_ms = 1e3 * median;
  result.min_ms = 1e3 * times.front();
  result.max_ms = 1e3 * times.back();
  result.worst_of_neighbours = measured.worst_of_neighbours;
  result.stolen_ms = 1e3 * measured.stolen;
  result.spread = (quantile(times, 0.75) - quantile(times, 0.25)) / median;
}

std::string common_repro(const Options& options, const Result& r) {
  std::string load;
  if (r.tokens > 0) {
    load = fmt::format("--tokens {}", r.tokens);
    if (!r.routing.empty()) load += fmt::format(" --routing {}", shell_word(r.routing));
  } else {
    load = fmt::format("--rows {}", fmt::join(options.rows, ","));
  }
  const std::string problem =
      options.model.empty()
          ? fmt::format("--problem {}", shell_word(r.problem))
          : fmt::format("--model {} --layer {}", shell_word(options.model), options.layer);
  std::string text = fmt::format("opbench --op {} {}{}{} {} --dtype {}", r.op, problem,
                                 r.gemm.empty() ? "" : " --gemm ", r.gemm, load, r.dtype);
  if (!r.variant.empty() && options.model.empty()) text += fmt::format(" --variant {}", r.variant);
  text += fmt::format(" --impl {} --threads {} --weights {}", r.impl, r.threads,
                      options.cold ? "cold" : "warm");
  text += r.fresh_routings > 0 ? fmt::format(" --fresh-routings {}", r.fresh_routings)
                               : fmt::format(" --reps {}", options.reps);
  text += fmt::format(" --seed {}", options.seed);
  if (!options.tuning_cache.empty()) {
    text += fmt::format(" --tuning-cache {}", shell_word(options.tuning_cache));
  }
  if (options.isa.has_value()) text += fmt::format(" --isa {}", to_string(*options.isa));
  return text;
}

Isa isa_of(const Options& options) {
  Isa isa = Isa::kScalar;
  if (const Status status = default_isa(&isa); !status.ok()) throw Error(status.message());
  return options.isa.value_or(isa);
}

}  // namespace moeops::bench

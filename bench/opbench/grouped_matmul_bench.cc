// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/grouped_matmul_bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <memory>

#include "bench/opbench/grouped_matmul_impls.h"
#include "bench/opbench/verify.h"
#include "tools/tensor_file/error.h"

namespace moeops::bench {

using tools::Error;

namespace {

constexpr int64_t kFloat = sizeof(float);

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

double quantile(const std::vector<double>& sorted, double q) {
  const double at = q * static_cast<double>(sorted.size() - 1);
  const auto low = static_cast<size_t>(at);
  const size_t high = std::min(low + 1, sorted.size() - 1);
  return sorted[low] + (at - static_cast<double>(low)) * (sorted[high] - sorted[low]);
}

// A token count, and what its routing came to.
struct Load {
  int64_t tokens = 0;
  std::vector<int64_t> active_rows;  // of the experts that have any
  int64_t rows = 0;
};

// What was measured of one implementation on one load, in one or more visits.
struct Measured {
  std::string wrong;
  std::vector<double> times;  // seconds
  bool steady = true;
  std::vector<double> dot_peaks;
  std::vector<double> read_gbps;
  std::vector<std::string> explain;
};

std::vector<Load> make_loads(const GroupedMatmulOptions& options) {
  std::vector<Load> loads;
  const auto add = [&](int64_t tokens, const std::vector<int64_t>& rows) {
    Load load;
    load.tokens = tokens;
    for (const int64_t r : rows) {
      if (r > 0) load.active_rows.push_back(r);
      load.rows += r;
    }
    loads.push_back(std::move(load));
  };
  const Problem& problem = options.problem;
  if (!options.rows.empty()) {
    if (static_cast<int64_t>(options.rows.size()) > problem.experts) {
      throw Error(
          fmt::format("--rows: {} values for {} experts", options.rows.size(), problem.experts));
    }
    add(0, options.rows.size() > 1
               ? options.rows
               : std::vector<int64_t>(static_cast<size_t>(problem.experts), options.rows[0]));
    return loads;
  }
  for (const int64_t tokens : options.tokens) {
    add(tokens,
        options.routing->rows_per_expert(tokens, problem.experts, problem.top_k, options.seed));
  }
  return loads;
}

class GemmBench {
 public:
  GemmBench(const GroupedMatmulOptions& options, const Gemm& gemm, std::vector<Load> loads,
            const LimitsMeter& meter)
      : options_(options),
        gemm_(gemm),
        loads_(std::move(loads)),
        meter_(meter),
        values_(static_cast<uint32_t>(options.seed), gemm.k) {
    int64_t rows = 0;
    for (const Load& load : loads_) rows = std::max(rows, load.rows);
    allocate(rows * gemm.k * kFloat, &x_);
    allocate(rows * gemm.n * kFloat, &y_);
    auto* x = static_cast<float*>(x_.data());
    for (int64_t i = 0; i < rows * gemm.k; ++i) {
      x[i] = value_at(static_cast<uint32_t>(options.seed) + 0x51ED270Bu, static_cast<uint32_t>(i));
    }
    choose_pool();
  }

  // Whether the pool is large enough for weights to come from memory at every call.
  bool cold() const { return cold_; }
  int64_t pool() const { return pool_; }

  void visit(GroupedMatmulImpl& impl, std::vector<Measured>& measured, bool first_visit,
             const std::function<void(const std::string&)>& progress) {
    progress(fmt::format("{} {}: loading {} experts", gemm_.name, impl.name(), pool_));
    const double start = seconds_now();
    impl.load(values_, gemm_, pool_, options_.threads);
    const double load_seconds = seconds_now() - start;
    for (size_t i = 0; i < loads_.size(); ++i) {
      progress(fmt::format("{} {}: {} rows for {} experts", gemm_.name, impl.name(), loads_[i].rows,
                           loads_[i].active_rows.size()));
      Measured& m = measured[i];
      cursor_ = 0;
      if (first_visit) {
        const double before = seconds_now();
        m.wrong = verify(impl, next_call(loads_[i]), values_, gemm_, options_.seed);
        if (options_.explain) explain(impl, loads_[i], load_seconds, seconds_now() - before, m);
      }
      if (m.wrong.empty()) measure(impl, loads_[i], m);
    }
  }

 private:
  static void allocate(int64_t bytes, HugeBuffer* buffer) {
    const Status status = HugeBuffer::allocate(bytes, buffer);
    if (!status.ok()) throw Error(status.message());
  }

  void choose_pool() {
    const int64_t expert_bytes = gemm_.n * gemm_.k * kFloat;
    const int64_t enough = 2 * std::max(machine().l3_bytes, int64_t{32} << 20);
    pool_ = options_.problem.experts;
    if (options_.cold) pool_ = std::max(pool_, (enough + expert_bytes - 1) / expert_bytes);
    // Padded panels take up to 1 / 16 more; the rest of memory is for the rest of the machine.
    pool_ = std::min(pool_, available_memory() / 5 * 3 / (expert_bytes + expert_bytes / 16));
    if (pool_ < 1) {
      throw Error(fmt::format("not enough memory for one expert of {} x {}", gemm_.n, gemm_.k));
    }
    cold_ = options_.cold && pool_ * expert_bytes >= enough;
  }

  // The load's groups on the next experts of the pool (the first ones again when warm).
  GemmCall next_call(const Load& load) {
    groups_.clear();
    for (const int64_t rows : load.active_rows) {
      groups_.push_back({cursor_, rows});
      cursor_ = (cursor_ + 1) % pool_;
    }
    if (!options_.cold) cursor_ = 0;
    return {groups_, static_cast<const float*>(x_.data()), static_cast<float*>(y_.data()),
            load.rows};
  }

  void explain(const GroupedMatmulImpl& impl, const Load& load, double load_seconds,
               double first_seconds, Measured& m) {
    if (const std::string words = impl.explain(next_call(load)); !words.empty()) {
      m.explain.push_back(words);
    }
    const double gib = static_cast<double>(pool_ * gemm_.n * gemm_.k * kFloat) / 0x1p30;
    m.explain.push_back(
        fmt::format("making and loading {:.2f} GiB of weights {:.0f} ms, first call and its "
                    "verification {:.1f} ms",
                    gib, 1e3 * load_seconds, 1e3 * first_seconds));
  }

  // Half of the repetitions (the other half comes on the way back), between two readings of the
  // limits; again when they disagree, three times at most.
  void measure(GroupedMatmulImpl& impl, const Load& load, Measured& m) {
    std::vector<double> times;
    double peaks[2];
    double reads[2];
    bool steady = false;
    for (int attempt = 0; attempt < 3 && !steady; ++attempt) {
      times.clear();
      read_limits(&peaks[0], &reads[0]);
      impl.run(next_call(load));  // wakes the workers
      double total = 0;
      while (static_cast<int64_t>(times.size()) < (options_.reps + 1) / 2 ||
             (total < options_.min_seconds / 2 && times.size() < 1000)) {
        const GemmCall call = next_call(load);
        const double start = seconds_now();
        impl.run(call);
        times.push_back(seconds_now() - start);
        total += times.back();
      }
      read_limits(&peaks[1], &reads[1]);
      steady = agree(peaks) && agree(reads);
    }
    m.times.insert(m.times.end(), times.begin(), times.end());
    m.dot_peaks.insert(m.dot_peaks.end(), peaks, peaks + 2);
    m.read_gbps.insert(m.read_gbps.end(), reads, reads + 2);
    m.steady = m.steady && steady;
  }

  void read_limits(double* peak, double* read) const {
    *peak = meter_.dot_peak(DType::kF32);
    *read = meter_.read_gbps();
  }
  static bool agree(const double (&readings)[2]) {
    return std::fabs(readings[0] - readings[1]) <= 0.1 * std::max(readings[0], readings[1]);
  }

  const GroupedMatmulOptions& options_;
  Gemm gemm_;
  std::vector<Load> loads_;
  const LimitsMeter& meter_;
  WeightValues values_;
  HugeBuffer x_, y_;
  int64_t pool_ = 0;
  bool cold_ = false;
  int64_t cursor_ = 0;
  std::vector<Group> groups_;
};

double mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return sum / static_cast<double>(values.size());
}

std::string repro_of(const GroupedMatmulOptions& options, const Result& r) {
  std::string load;
  if (r.tokens > 0) {
    load = fmt::format("--tokens {} --routing {}", r.tokens, r.routing);
  } else {
    load = fmt::format("--rows {}", fmt::join(options.rows, ","));
  }
  std::string text = fmt::format(
      "opbench --op {} --problem {} --gemm {} {} --dtype {} --impl {} --threads {} --weights {} "
      "--reps {} --seed {}",
      r.op, r.problem, r.gemm, load, r.dtype, r.impl, r.threads, options.cold ? "cold" : "warm",
      options.reps, options.seed);
  if (options.isa.has_value()) text += fmt::format(" --isa {}", to_string(*options.isa));
  return text;
}

void fill_figures(const Gemm& gemm, const Load& load, const Measured& m, Result& r) {
  std::vector<double> times = m.times;
  std::sort(times.begin(), times.end());
  const double median = quantile(times, 0.5);
  const double operations = 2.0 * static_cast<double>(load.rows) * static_cast<double>(gemm.n) *
                            static_cast<double>(gemm.k);
  const auto active = static_cast<int64_t>(load.active_rows.size());
  const double bytes = static_cast<double>(
      kFloat * (active * gemm.n * gemm.k + load.rows * gemm.k + load.rows * gemm.n));
  r.steady = m.steady;
  r.reps = static_cast<int64_t>(times.size());
  r.median_ms = 1e3 * median;
  r.min_ms = 1e3 * times.front();
  r.spread = (quantile(times, 0.75) - quantile(times, 0.25)) / median;
  r.gops = 1e-9 * operations / median;
  r.gbps = 1e-9 * bytes / median;
  r.dot_peak_gops = mean(m.dot_peaks);
  r.read_gbps = mean(m.read_gbps);
  r.roofline_ms = 1e-6 * std::max(operations / r.dot_peak_gops, bytes / r.read_gbps);
  r.roofline_fraction = r.roofline_ms / r.median_ms;
}

}  // namespace

std::vector<Result> run_grouped_matmul(const GroupedMatmulOptions& options,
                                       const LimitsMeter& meter,
                                       const std::function<void(const std::string&)>& progress) {
  const std::vector<Load> loads = make_loads(options);
  Isa isa = Isa::kScalar;
  if (const Status status = default_isa(&isa); !status.ok()) throw Error(status.message());
  if (options.isa.has_value()) isa = *options.isa;

  std::vector<Result> results;
  for (const Gemm& gemm : gemms_of(options.problem)) {
    if (std::find(options.gemms.begin(), options.gemms.end(), gemm.name) == options.gemms.end()) {
      continue;
    }
    GemmBench bench(options, gemm, loads, meter);
    std::vector<std::unique_ptr<GroupedMatmulImpl>> impls;
    for (const std::string& name : options.impls) {
      impls.push_back(make_grouped_matmul_impl(name, options.isa));
    }
    std::vector<std::vector<Measured>> measured(impls.size(), std::vector<Measured>(loads.size()));
    std::vector<std::string> details(impls.size());
    for (size_t step = 0; step < 2 * impls.size(); ++step) {
      const bool forth = step < impls.size();
      const size_t i = forth ? step : 2 * impls.size() - 1 - step;
      bench.visit(*impls[i], measured[i], forth, progress);
      details[i] = impls[i]->detail();
      impls[i]->unload();
    }
    for (size_t l = 0; l < loads.size(); ++l) {
      for (size_t i = 0; i < impls.size(); ++i) {
        const Measured& m = measured[i][l];
        Result r;
        r.op = "grouped_matmul";
        r.problem = options.problem.name;
        r.tokens = loads[l].tokens;
        r.rows = loads[l].rows;
        r.experts = options.problem.experts;
        r.active_experts = static_cast<int64_t>(loads[l].active_rows.size());
        r.gemm = gemm.name;
        r.n = gemm.n;
        r.k = gemm.k;
        r.dtype = "f32";
        r.routing = options.rows.empty() ? options.routing->text() : "rows";
        r.impl = impls[i]->name();
        r.impl_detail = details[i];
        r.isa = to_string(isa);
        r.threads = options.threads;
        r.weights = bench.cold() ? "cold" : "warm";
        r.verified = m.wrong.empty();
        r.wrong = m.wrong;
        r.explain = m.explain;
        r.repro = repro_of(options, r);
        if (r.verified) fill_figures(gemm, loads[l], m, r);
        results.push_back(std::move(r));
      }
    }
  }
  return results;
}

}  // namespace moeops::bench

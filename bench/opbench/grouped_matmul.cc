// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "bench/opbench/gemm_bench.h"
#include "bench/opbench/measure.h"
#include "bench/opbench/verify.h"
#include "tools/tensor_file/error.h"

namespace moeops::bench {

using tools::Error;

namespace {

// A token count, and what its routing came to.
struct Load {
  int64_t tokens = 0;
  std::vector<int64_t> active_rows;  // of the experts that have any
  int64_t rows = 0;
};

Load load_of(int64_t tokens, const std::vector<int64_t>& rows) {
  Load load;
  load.tokens = tokens;
  for (const int64_t r : rows) {
    if (r > 0) load.active_rows.push_back(r);
    load.rows += r;
  }
  return load;
}

Load routed_load(const Options& options, int64_t tokens, uint64_t seed) {
  const Problem& problem = options.problem;
  return load_of(tokens,
                 options.routing->rows_per_expert(tokens, problem.experts, problem.top_k, seed));
}

std::vector<Load> make_loads(const GemmOperator& op, const Options& options) {
  std::vector<Load> loads;
  const Problem& problem = options.problem;
  if (!options.rows.empty()) {
    if (static_cast<int64_t>(options.rows.size()) > problem.experts) {
      throw Error(
          fmt::format("--rows: {} values for {} experts", options.rows.size(), problem.experts));
    }
    loads.push_back(load_of(
        0, options.rows.size() > 1
               ? options.rows
               : std::vector<int64_t>(static_cast<size_t>(problem.experts), options.rows[0])));
    return loads;
  }
  for (const int64_t tokens : options.tokens) {
    loads.push_back(op.one_matrix ? load_of(tokens, {tokens})
                                  : routed_load(options, tokens, options.seed));
  }
  return loads;
}

class GemmBench {
 public:
  GemmBench(const GemmOperator& op, const Options& options, const Gemm& gemm,
            std::vector<Load> loads, const LimitsMeter& meter)
      : op_(op),
        options_(options),
        name_(gemm.name),
        form_(gemm.n, gemm.k, options.dtype),
        input_(op.input == DType::kNone ? form_.x : op.input),
        has_x_scale_(form_.has_scales() && input_ == form_.x),
        loads_(std::move(loads)),
        meter_(meter),
        values_(static_cast<uint32_t>(options.seed), form_) {
    int64_t rows = 0;
    for (const Load& load : loads_) rows = std::max(rows, load.rows);
    allocate(rows * form_.k * size_of(input_), &x_);
    allocate(rows * form_.n * size_of(form_.y), &y_);
    const auto seed = static_cast<uint32_t>(options.seed) + 0x51ED270Bu;
    for (int64_t i = 0; i < rows * form_.k; ++i) {
      store_value(input_, value_at(seed, static_cast<uint32_t>(i)), x_.data(), i);
    }
    for (int64_t i = 0; has_x_scale_ && i < rows; ++i) {
      x_scale_.push_back(0x1p-7f + 0x1p-9f * value_at(seed + 1, static_cast<uint32_t>(i)));
    }
    y_scale_.resize(static_cast<size_t>(rows));
    choose_pool();
  }

  // Whether the pool is large enough for weights to come from memory at every call.
  bool cold() const { return cold_; }
  // Groups beyond the pool take its first experts again.
  int64_t experts() const { return op_.one_matrix ? 1 : std::min(pool_, options_.problem.experts); }

  void visit(GroupedMatmulImpl& impl, std::vector<Measured>& measured, bool first_visit,
             const Progress& progress) {
    progress(fmt::format("{} {}: loading {} experts", name_, impl.name(), pool_));
    const double start = seconds_now();
    impl.load(values_, pool_, options_.threads);
    const double load_seconds = seconds_now() - start;
    for (size_t i = 0; i < loads_.size(); ++i) {
      progress(fmt::format("{} {}: {} rows for {} experts", name_, impl.name(), loads_[i].rows,
                           loads_[i].active_rows.size()));
      Measured& m = measured[i];
      cursor_ = 0;
      if (first_visit) {
        const double before = seconds_now();
        m.wrong = op_.verify(impl, next_call(loads_[i]), values_, options_.seed);
        if (options_.tune && m.wrong.empty()) tune(impl, loads_[i], m);
        if (options_.explain) explain(impl, loads_[i], load_seconds, seconds_now() - before, m);
      }
      if (m.wrong.empty()) measure_calls(impl, loads_[i], m);
    }
  }

  void fill_figures(const Load& load, const Measured& m, Result& r) const {
    fill_times(m, r);
    const double median = 1e-3 * r.median_ms;
    const double operations = 2.0 * static_cast<double>(load.rows) * static_cast<double>(form_.n) *
                              static_cast<double>(form_.k);
    const auto active = static_cast<int64_t>(load.active_rows.size());
    constexpr int64_t kScaleBytes = size_of(DType::kF32);
    r.read_bytes =
        active * (form_.expert_bytes() + (form_.has_scales() ? form_.n * kScaleBytes : 0)) +
        load.rows * (form_.k * size_of(input_) + (has_x_scale_ ? kScaleBytes : 0));
    r.written_bytes = load.rows * op_.row_bytes(form_, r.impl);
    const auto bytes = static_cast<double>(r.read_bytes + r.written_bytes);
    r.gops = 1e-9 * operations / median;
    r.gbps = 1e-9 * bytes / median;
    r.dot_peak_gops = m.limit(0);
    r.read_gbps = m.limit(1);
    r.roofline_ms = 1e-6 * std::max(operations / r.dot_peak_gops, bytes / r.read_gbps);
    r.roofline_fraction = r.roofline_ms / r.median_ms;
  }

 private:
  static void allocate(int64_t bytes, HugeBuffer* buffer) {
    const Status status = HugeBuffer::allocate(bytes, buffer);
    if (!status.ok()) throw Error(status.message());
  }

  void choose_pool() {
    const int64_t expert_bytes = form_.expert_bytes();
    const int64_t enough = cold_bytes();
    pool_ = op_.one_matrix ? 1 : options_.problem.experts;
    if (options_.cold) pool_ = std::max(pool_, (enough + expert_bytes - 1) / expert_bytes);
    pool_ = std::min(pool_, experts_that_fit(expert_bytes));
    if (pool_ < 1) {
      throw Error(fmt::format("not enough memory for one expert of {} x {}", form_.n, form_.k));
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
    return {groups_,   x_.data(),       has_x_scale_ ? x_scale_.data() : nullptr,
            y_.data(), y_scale_.data(), load.rows};
  }

  void tune(GroupedMatmulImpl& impl, const Load& load, Measured& m) {
    const TuneReport report = impl.tune({.cache = options_.tuning_cache,
                                         .experts = options_.problem.experts,
                                         .pairs = std::max<int64_t>(options_.reps, 9),
                                         .seconds = options_.min_seconds / 6,
                                         .next_call = [&] { return next_call(load); }});
    m.wrong = report.wrong;
    m.explain.insert(m.explain.end(), report.lines.begin(), report.lines.end());
  }

  void explain(const GroupedMatmulImpl& impl, const Load& load, double load_seconds,
               double first_seconds, Measured& m) {
    if (const std::string words = impl.explain(next_call(load)); !words.empty()) {
      m.explain.push_back(words);
    }
    const double gib = static_cast<double>(pool_ * form_.expert_bytes()) / 0x1p30;
    m.explain.push_back(
        fmt::format("making and loading {:.2f} GiB of weights {:.0f} ms, first call and its "
                    "verification {:.1f} ms",
                    gib, 1e3 * load_seconds, 1e3 * first_seconds));
  }

  void measure_calls(GroupedMatmulImpl& impl, const Load& load, Measured& m) {
    const auto read_limits = [&]() -> std::vector<double> {
      return {meter_.dot_peak(form_.x), meter_.read_gbps()};
    };
    const auto timed_call = [&] {
      if (options_.fresh_routings > 0) fresh_ = routed_load(options_, load.tokens, ++fresh_seed_);
      const GemmCall call = next_call(options_.fresh_routings > 0 ? fresh_ : load);
      const double start = seconds_now();
      impl.run(call);
      return seconds_now() - start;
    };
    measure(options_, read_limits, timed_call, m);
  }

  const GemmOperator& op_;
  const Options& options_;
  std::string name_;
  GemmForm form_;
  DType input_;
  bool has_x_scale_;
  std::vector<Load> loads_;
  const LimitsMeter& meter_;
  WeightValues values_;
  HugeBuffer x_, y_;
  std::vector<float> x_scale_, y_scale_;
  int64_t pool_ = 0;
  bool cold_ = false;
  int64_t cursor_ = 0;
  std::vector<Group> groups_;
  uint64_t fresh_seed_ = options_.seed;
  Load fresh_;
};

}  // namespace

std::vector<Result> run_gemms(const GemmOperator& op, const Options& options,
                              const LimitsMeter& meter, const Progress& progress) {
  const std::vector<Load> loads = make_loads(op, options);
  const Isa isa = isa_of(options);
  const auto names = [](const std::vector<std::string>& list, const std::string& gemm) {
    return std::find(list.begin(), list.end(), gemm) != list.end();
  };
  std::vector<Result> results;
  for (const Gemm& gemm : gemms_of(options.problem)) {
    if (!names(options.gemms, gemm.name) || !names(op.gemms, gemm.name)) continue;
    GemmBench bench(op, options, gemm, loads, meter);
    std::vector<std::unique_ptr<GroupedMatmulImpl>> impls;
    for (const std::string& name : options.impls) {
      impls.push_back(op.make_impl(name, options.isa));
    }
    std::vector<std::vector<Measured>> measured(impls.size(), std::vector<Measured>(loads.size()));
    std::vector<std::string> details(impls.size());
    visit_forth_and_back(impls.size(), [&](size_t i, bool forth) {
      bench.visit(*impls[i], measured[i], forth, progress);
      details[i] = impls[i]->detail();
      impls[i]->unload();
    });
    for (size_t l = 0; l < loads.size(); ++l) {
      for (size_t i = 0; i < impls.size(); ++i) {
        const Measured& m = measured[i][l];
        Result r;
        r.op = op.name;
        r.problem = options.problem.name;
        r.tokens = loads[l].tokens;
        r.rows = loads[l].rows;
        r.experts = bench.experts();
        if (!op.one_matrix) r.note = note_of_experts(r.experts, options.problem);
        r.active_experts = static_cast<int64_t>(loads[l].active_rows.size());
        r.gemm = gemm.name;
        r.n = gemm.n;
        r.k = gemm.k;
        r.dtype = options.dtype;
        if (!op.one_matrix) r.routing = options.rows.empty() ? options.routing->text() : "rows";
        r.fresh_routings = options.fresh_routings;
        r.impl = impls[i]->name();
        r.impl_detail = details[i];
        r.isa = to_string(isa);
        r.threads = options.threads;
        r.weights = bench.cold() ? "cold" : "warm";
        r.verified = m.wrong.empty();
        r.wrong = m.wrong;
        r.explain = m.explain;
        r.repro = common_repro(options, r);
        if (r.verified) bench.fill_figures(loads[l], m, r);
        results.push_back(std::move(r));
      }
    }
  }
  if (results.empty()) {
    throw Error(fmt::format("--gemm {}: {} is {}", fmt::join(options.gemms, ","), op.name,
                            fmt::join(op.gemms, ", ")));
  }
  return results;
}

Operator grouped_matmul_operator() {
  GemmOperator op;
  op.name = "grouped_matmul";
  op.row_bytes = [](const GemmForm& form, const std::string&) { return form.n * size_of(form.y); };
  op.make_impl = make_grouped_matmul_impl;
  op.verify = verify;
  return {.name = "grouped_matmul",
          .dtypes = {"f32", "bf16", "w8a8"},
          .variants = {},
          .impls = grouped_matmul_impl_names,
          .tokens = "1,16,128,1024",  // from one row an expert, where weights stream, to 64
          .takes_rows = true,
          .tunes = true,
          .fresh_routings = true,
          .run = [op](const Options& options, const LimitsMeter& meter, const Progress& progress) {
            return run_gemms(op, options, meter, progress);
          }};
}

}  // namespace moeops::bench

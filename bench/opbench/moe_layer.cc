// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <set>

#include "bench/opbench/context.h"
#include "bench/opbench/measure.h"
#include "bench/opbench/moe_layer_impls.h"
#include "bench/opbench/operators.h"
#include "bench/opbench/weights.h"
#include "tools/tensor_file/error.h"

namespace moeops::bench {

using tools::Error;

namespace {

// One layer with one routing of some tokens.
struct Load {
  int64_t tokens;
  std::vector<int32_t> choices;  // [tokens, top_k] of the problem's experts
  std::vector<int32_t> active;   // those that occur, ascending
};

class LayerBench {
 public:
  LayerBench(const Options& options, const std::string& variant,
             std::shared_ptr<const tools::LoadedMoeLayer> model, const LimitsMeter& meter)
      : options_(options),
        meter_(meter),
        values_(values_of(options, variant, std::move(model))),
        experts_(options.problem.experts) {
    choose_pool();
    for (const int64_t tokens : options.tokens) {
      loads_.push_back(load_of(tokens, options.seed));
      most_tokens_ = std::max(most_tokens_, tokens);
    }
    const int64_t values = most_tokens_ * values_.hidden();
    check(HugeBuffer::allocate(values * size_of(values_.activations()), &x_));
    check(HugeBuffer::allocate(values * size_of(values_.activations()), &out_));
    const auto seed = static_cast<uint32_t>(options.seed) + 0x51ED270Bu;
    for (int64_t i = 0; i < values; ++i) {
      // Small, so that the activation is not straight everywhere.
      store_value(values_.activations(), 0.1f * value_at(seed, static_cast<uint32_t>(i)), x_.data(),
                  i);
    }
    for (int64_t i = 0; i < most_tokens_ * options.problem.top_k; ++i) {
      weights_.push_back(0.5f + 0.25f * value_at(seed + 1, static_cast<uint32_t>(i)));
    }
  }

  bool cold() const { return cold_; }
  int64_t experts() const { return experts_; }
  const std::vector<Load>& loads() const { return loads_; }

  void visit(LayerImpl& impl, std::vector<Measured>& measured, bool first_visit,
             const Progress& progress) {
    progress(fmt::format("{}: loading {} experts", impl.name(), pool_));
    const double start = seconds_now();
    impl.load(values_, {pool_, shared_sets_, most_tokens_, options_.problem.top_k},
              options_.threads);
    const double load_seconds = seconds_now() - start;
    for (size_t i = 0; i < loads_.size(); ++i) {
      progress(fmt::format("{}: {} tokens", impl.name(), loads_[i].tokens));
      Measured& m = measured[i];
      cursor_ = 0;
      if (first_visit) {
        const double before = seconds_now();
        m.wrong = verify(impl, loads_[i]);
        if (options_.explain) {
          m.explain = impl.explain(next_call(loads_[i]));
          m.explain.push_back(fmt::format(
              "making and loading {:.2f} GiB of weights {:.0f} ms, first call and its verification "
              "{:.1f} ms",
              static_cast<double>((pool_ + shared_sets_ * values_.shared_experts) *
                                  values_.expert_bytes()) /
                  0x1p30,
              1e3 * load_seconds, 1e3 * (seconds_now() - before)));
          if (m.wrong.empty()) explain_phases(impl, loads_[i], m);
        }
      }
      if (m.wrong.empty()) measure_calls(impl, loads_[i], m);
    }
  }

  void fill_figures(const Load& load, const Measured& m, Result& r) const {
    fill_times(m, r);
    const double seconds = 1e-3 * r.median_ms;
    const int64_t H = values_.hidden();
    const int64_t I = values_.intermediate();
    const int64_t shared = values_.shared_width();
    const double operations =
        6.0 * static_cast<double>(r.rows * I + load.tokens * shared) * static_cast<double>(H);
    const auto active = static_cast<int64_t>(load.active.size());
    const int64_t shared_sets = values_.model == nullptr ? values_.shared_experts : shared > 0;
    // Of gate, up and down, with the scales of their outputs.
    const int64_t matrices = 3 * (active * I + shared) * H * size_of(values_.w13.form().x);
    const int64_t scales = values_.w13.form().has_scales()
                               ? 2 * (active * I + shared) + (active + shared_sets) * H
                               : 0;
    const int64_t x_bytes = load.tokens * values_.hidden() * size_of(values_.activations());
    r.read_bytes = matrices + 4 * scales + x_bytes + 8 * r.rows;
    r.written_bytes = x_bytes;
    const auto bytes = static_cast<double>(r.read_bytes + r.written_bytes);
    r.gops = 1e-9 * operations / seconds;
    r.gbps = 1e-9 * bytes / seconds;
    r.tokens_per_s = static_cast<double>(load.tokens) / seconds;
    r.dot_peak_gops = m.limit(0);
    r.read_gbps = m.limit(1);
    r.roofline_ms = 1e-6 * std::max(operations / r.dot_peak_gops, bytes / r.read_gbps);
    r.roofline_fraction = r.roofline_ms / r.median_ms;
  }

 private:
  static LayerValues values_of(const Options& options, const std::string& variant,
                               std::shared_ptr<const tools::LoadedMoeLayer> model) {
    const auto seed = static_cast<uint32_t>(options.seed);
    const int64_t H = options.problem.hidden;
    const int64_t I = options.problem.intermediate;
    LayerValues values = {{seed, {2 * I, H, options.dtype}},
                          {seed + 7, {H, I, options.dtype}},
                          {},
                          options.problem.shared_experts,
                          {}};
    if (variant == "swiglu_oai") {
      values.swiglu.activation = GatedActivation::kSwigluOai;
      values.swiglu.gate = Gate::kInterleaved;
    }
    if (model != nullptr) values.swiglu = model->swiglu;
    values.model = std::move(model);
    return values;
  }

  // As many of the problem's experts as memory holds; cold, enough of them that none is in a cache
  // when its turn comes again.
  void choose_pool() {
    const int64_t each = values_.expert_bytes();
    if (values_.model != nullptr) {
      pool_ = experts_;
      cold_ = options_.cold && pool_ * each >= cold_bytes();
      return;
    }
    const int64_t shared = values_.shared_experts;
    if (options_.cold && shared > 0) {
      shared_sets_ = (cold_bytes() + shared * each - 1) / (shared * each);
    }
    const int64_t room = experts_that_fit(each) - shared_sets_ * shared;
    experts_ = std::min(experts_, room);
    if (experts_ < options_.problem.top_k) {
      throw Error(fmt::format("not enough memory for {} experts", options_.problem.top_k));
    }
    pool_ = experts_;
    if (options_.cold) pool_ = std::min(room, std::max(pool_, (cold_bytes() + each - 1) / each));
    cold_ = options_.cold && pool_ * each >= cold_bytes();
  }

  Load load_of(int64_t tokens, uint64_t seed) const {
    Load load{
        tokens, options_.routing->expert_ids(tokens, experts_, options_.problem.top_k, seed), {}};
    const std::set<int32_t> active(load.choices.begin(), load.choices.end());
    load.active.assign(active.begin(), active.end());
    return load;
  }

  // Where the time of some calls went. What the caller's thread does alone, all workers wait for;
  // of everything else a call takes what its workers take on average.
  void explain_phases(LayerImpl& impl, const Load& load, Measured& m) {
    constexpr int kCalls = 9;
    using moe_layer_internal::Phases;
    static constexpr std::pair<double Phases::*, const char*> kPhases[] = {
        {&Phases::routing, "routing"},    {&Phases::prepare, "preparing tokens"},
        {&Phases::gate_up, "first GEMM"}, {&Phases::gate_up_epilogue, "its epilogue"},
        {&Phases::down, "second GEMM"},   {&Phases::down_epilogue, "its epilogue"},
        {&Phases::combine, "combine"},    {&Phases::waiting, "waiting at barriers"}};
    double seconds[std::size(kPhases)] = {};
    double all = 0;
    for (int call = 0; call < kCalls; ++call) {
      const LayerCall next = next_call(load);
      const double start = seconds_now();
      std::vector<Phases> phases = impl.run_in_phases(next);
      all += seconds_now() - start;
      // A small call has fewer workers than the context.
      std::erase_if(phases, [](const Phases& p) { return p.combine == 0; });
      if (phases.empty()) return;
      for (size_t i = 0; i < std::size(kPhases); ++i) {
        double sum = 0;
        for (const Phases& p : phases) sum += p.*kPhases[i].first;
        seconds[i] += i == 0 ? sum : sum / static_cast<double>(phases.size());
      }
    }
    std::string words = fmt::format("{:.4f} ms a call, of which", 1e3 * all / kCalls);
    double around = 0;
    double rest = all;
    for (size_t i = 0; i < std::size(kPhases); ++i) {
      words += fmt::format("{} {} {:.1f}%", i == 0 ? "" : ",", kPhases[i].second,
                           100 * seconds[i] / all);
      rest -= seconds[i];
      const auto phase = kPhases[i].first;
      if (phase != &Phases::gate_up && phase != &Phases::down && phase != &Phases::waiting) {
        around += seconds[i];
      }
    }
    words += fmt::format(", the rest, starting and ending the workers' region, {:.1f}%",
                         100 * rest / all);
    m.explain.push_back(words);
    m.explain.push_back(fmt::format("around the GEMMs {:.1f}%", 100 * around / all));
  }

  // The load's experts are the next ones of the pool (the first ones again when warm).
  LayerCall next_call(const Load& load) {
    std::vector<int32_t> place(static_cast<size_t>(experts_));
    for (const int32_t expert : load.active) {
      place[static_cast<size_t>(expert)] = static_cast<int32_t>(cursor_);
      cursor_ = (cursor_ + 1) % pool_;
    }
    shared_set_ = (shared_set_ + 1) % shared_sets_;
    if (!options_.cold) cursor_ = 0;
    ids_.clear();
    for (const int32_t expert : load.choices) ids_.push_back(place[static_cast<size_t>(expert)]);
    return {load.tokens, options_.problem.top_k, x_.data(),
            ids_.data(), weights_.data(),        pool_ + shared_set_ * values_.shared_experts,
            out_.data()};
  }

  std::string verify(LayerImpl& impl, const Load& load) {
    const LayerCall call = next_call(load);
    const int64_t H = values_.hidden();
    const DType dtype = values_.activations();
    std::memset(out_.data(), 0xFF, static_cast<size_t>(load.tokens * H * size_of(dtype)));  // NaN
    impl.run(call);
    for (int64_t i = 0; i < load.tokens * H; ++i) {
      if (!std::isfinite(load_value(dtype, out_.data(), i))) {
        return fmt::format("out[{},{}] is not written, or not finite", i / H, i % H);
      }
    }
    std::mt19937_64 random(options_.seed);
    std::set<int64_t> tokens = {0, load.tokens - 1};
    while (static_cast<int64_t>(tokens.size()) < std::min<int64_t>(load.tokens, 4096 / H + 3)) {
      tokens.insert(static_cast<int64_t>(random() % static_cast<uint64_t>(load.tokens)));
    }
    for (const int64_t token : tokens) {
      if (std::string wrong = check_token(call, token, impl.rounds_between()); !wrong.empty())
        return wrong;
    }
    return {};
  }

  // Rounding to 16 bits and to s8 on the way may fall either way, each time by little of the row.
  // To who rounds to 16 bits before quantising that happens often: noise of some 1% of the row,
  // whose extremes over thousands of values are five times that.
  std::string check_token(const LayerCall& call, int64_t token, bool noisy) const {
    const std::vector<float> want = reference_token(values_, call, token);
    double squares = 0;
    for (const float v : want) squares += static_cast<double>(v) * static_cast<double>(v);
    const double rms = std::sqrt(squares / static_cast<double>(want.size()));
    const bool exact = values_.activations() == DType::kF32;
    const double allowed = noisy && values_.w13.form().has_scales() ? 0.1 : 0.05;
    double errors = 0;
    for (size_t j = 0; j < want.size(); ++j) {
      const int64_t at = token * values_.hidden() + static_cast<int64_t>(j);
      const auto got = static_cast<double>(load_value(values_.activations(), call.out, at));
      const auto expected = static_cast<double>(want[j]);
      const double bound = exact ? 1e-5 * std::fabs(expected) + 1e-4 * rms
                                 : 0x1p-7 * std::fabs(expected) + allowed * rms;
      errors += (got - expected) * (got - expected);
      if (!(std::fabs(got - expected) <= bound)) {
        return fmt::format("out[{},{}] = {:.8g}, expected {:.8g}", token, j, got, expected);
      }
    }
    const double error = std::sqrt(errors / static_cast<double>(want.size()));
    if (!(error <= 0.02 * rms)) {
      return fmt::format("out[{}] is off by {:.2g} of its size on average", token, error / rms);
    }
    return {};
  }

  void measure_calls(LayerImpl& impl, const Load& load, Measured& m) {
    const auto read_limits = [&]() -> std::vector<double> {
      return {meter_.dot_peak(values_.w13.form().x), meter_.read_gbps()};
    };
    const auto timed_call = [&] {
      if (options_.fresh_routings > 0) fresh_ = load_of(load.tokens, ++fresh_seed_);
      const LayerCall call = next_call(options_.fresh_routings > 0 ? fresh_ : load);
      const double start = seconds_now();
      impl.run(call);
      return seconds_now() - start;
    };
    measure(options_, read_limits, timed_call, m);
  }

  const Options& options_;
  const LimitsMeter& meter_;
  LayerValues values_;
  std::vector<Load> loads_;
  int64_t experts_;  // of the problem, as many as memory holds
  int64_t pool_ = 0;
  bool cold_ = false;
  int64_t shared_sets_ = 1;  // cold, enough that none is in a cache when its turn comes again
  int64_t shared_set_ = 0;
  int64_t most_tokens_ = 0;
  HugeBuffer x_, out_;
  std::vector<float> weights_;
  int64_t cursor_ = 0;
  std::vector<int32_t> ids_;
  uint64_t fresh_seed_ = options_.seed;
  Load fresh_;
};

// Loads the layer of --model, which becomes the problem.
std::shared_ptr<const tools::LoadedMoeLayer> load_model(Options& options) {
  const DType dtype = GemmForm(1, 1, options.dtype).x;
  const std::unique_ptr<Context> context = make_context(options.threads, options.isa);
  tools::Checkpoint checkpoint = tools::Checkpoint::open(options.model);
  auto layer = std::make_shared<tools::LoadedMoeLayer>(
      tools::load_moe_layer(*context, checkpoint, options.layer, dtype));
  options.problem = {};
  options.problem.name = fmt::format(
      "{} layer {}", std::filesystem::path(options.model).filename().string(), options.layer);
  options.problem.hidden = layer->hidden;
  options.problem.intermediate = layer->intermediate;
  options.problem.experts = layer->experts;
  options.problem.top_k = layer->gating.k;
  static constexpr const char* kVariants[] = {"silu", "swiglu_oai", "gelu_tanh"};
  options.variants = {kVariants[static_cast<int>(layer->swiglu.activation)]};
  return layer;
}

std::vector<Result> run_moe_layer(const Options& asked, const LimitsMeter& meter,
                                  const Progress& progress) {
  Options options = asked;
  std::shared_ptr<const tools::LoadedMoeLayer> model;
  if (!options.model.empty()) {
    progress("loading the model's layer");
    model = load_model(options);
  }
  const Isa isa = isa_of(options);
  std::vector<Result> results;
  for (const std::string& variant : options.variants) {
    LayerBench bench(options, variant, model, meter);
    std::vector<std::unique_ptr<LayerImpl>> impls;
    for (const std::string& name : options.impls) {
      impls.push_back(make_layer_impl(name, options.isa));
    }
    std::vector<std::vector<Measured>> measured(impls.size(),
                                                std::vector<Measured>(bench.loads().size()));
    std::vector<std::string> details(impls.size());
    visit_forth_and_back(impls.size(), [&](size_t i, bool forth) {
      bench.visit(*impls[i], measured[i], forth, progress);
      details[i] = impls[i]->detail();
      impls[i]->unload();
    });
    for (size_t l = 0; l < bench.loads().size(); ++l) {
      const Load& load = bench.loads()[l];
      for (size_t i = 0; i < impls.size(); ++i) {
        const Measured& m = measured[i][l];
        Result r;
        r.op = "moe_layer";
        r.problem = options.problem.name;
        r.tokens = load.tokens;
        r.rows = static_cast<int64_t>(load.choices.size());
        r.experts = bench.experts();
        r.note = note_of_experts(r.experts, options.problem);
        r.active_experts = static_cast<int64_t>(load.active.size());
        r.dtype = options.dtype;
        r.variant = variant;
        r.routing = options.routing->text();
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
        if (r.verified) bench.fill_figures(load, m, r);
        results.push_back(std::move(r));
      }
    }
  }
  return results;
}

}  // namespace

Operator moe_layer_operator() {
  return {.name = "moe_layer",
          .dtypes = {"w8a8", "bf16", "f32"},
          .variants = {"silu", "swiglu_oai"},
          .impls = layer_impl_names,
          .tokens = "1,32,512,4096",
          .fresh_routings = true,
          .takes_model = true,
          .run = run_moe_layer};
}

}  // namespace moeops::bench

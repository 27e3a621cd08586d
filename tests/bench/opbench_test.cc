// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <numeric>
#include <sstream>
#include <string>

#include "bench/opbench/gemm_bench.h"
#include "bench/opbench/measure.h"
#include "bench/opbench/operators.h"
#include "bench/opbench/problem.h"
#include "bench/opbench/result.h"
#include "bench/opbench/routing.h"
#include "bench/opbench/row_bench.h"
#include "bench/opbench/verify.h"
#include "tests/bench/small_options.h"
#include "tests/tools/test_support.h"
#include "tools/tensor_file/error.h"
#include "tools/tensor_file/safetensors.h"

namespace moeops::bench {
namespace {

namespace fs = std::filesystem;
using List = std::vector<int64_t>;

// A file that is gone at the end of the test.
class TextFile {
 public:
  TextFile(const std::string& name, const std::string& text)
      : path_(fs::temp_directory_path() / (std::to_string(getpid()) + name)) {
    std::ofstream(path_) << text;
  }
  ~TextFile() { fs::remove(path_); }
  std::string path() const { return path_.string(); }

 private:
  fs::path path_;
};

template <class Body>
std::string error_of(Body body) {
  try {
    body();
  } catch (const tools::Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(ParseList, AllForms) {
  EXPECT_EQ(parse_list("--tokens", "1,8,64"), (List{1, 8, 64}));
  EXPECT_EQ(parse_list("--tokens", "1-20*2"), (List{1, 2, 4, 8, 16}));
  EXPECT_EQ(parse_list("--tokens", "64-256+64"), (List{64, 128, 192, 256}));
  EXPECT_EQ(parse_list("--tokens", "3,1-4*2,9"), (List{3, 1, 2, 4, 9}));
  EXPECT_EQ(parse_list("--tokens", "5-5*2"), (List{5}));
}

TEST(ParseList, NamesWhatItCannotRead) {
  for (const char* text : {"", "0", "-1", "1,,2", "1-8", "1-8*1", "8-1*2", "1-8*", "x", "1.5",
                           "1-8+0", "99999999999999999999", "1-10000000+1"}) {
    EXPECT_NE(error_of([&] { parse_list("--tokens", text); }).find("--tokens"), std::string::npos)
        << text;
  }
}

TEST(Problem, AllNamedOnesLoad) {
  const std::vector<std::string> names = problem_names();
  for (const char* name : {"deepseek-v3", "qwen3-30b-a3b", "qwen3-235b-a22b", "mixtral-8x7b",
                           "gpt-oss-20b", "gpt-oss-120b", "kimi-k2", "glm-4.5"}) {
    EXPECT_NE(std::find(names.begin(), names.end(), name), names.end()) << name;
  }
  for (const std::string& name : names) EXPECT_EQ(load_problem(name).name, name);
  const Problem qwen = load_problem("qwen3-30b-a3b");
  EXPECT_EQ(gemms_of(qwen)[0].n, 1536);
  EXPECT_EQ(gemms_of(qwen)[0].k, 2048);
  EXPECT_EQ(gemms_of(qwen)[1].n, 2048);
  EXPECT_EQ(gemms_of(qwen)[1].k, 768);
}

TEST(Problem, BrokenFilesAreNamedWithTheirField) {
  const auto load = [](const std::string& text) {
    const TextFile file("problem.json", text);
    return error_of([&] { load_problem(file.path()); });
  };
  const auto has = [](const std::string& message, const char* part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  has(load("{"), "not JSON");
  has(load("[]"), "not a JSON object");
  has(load(R"({"hidden": 8})"), "intermediate is missing");
  has(load(R"({"hidden": 8, "hidden": 9})"), "duplicate key");
  const std::string rest = R"("intermediate": 4, "experts": 2, "shared_experts": 0, )";
  has(load("{" + rest + R"("hidden": -8, "top_k": 1})"), "hidden = -8");
  has(load("{" + rest + R"("hidden": 8.5, "top_k": 1})"), "hidden = 8.5");
  has(load("{" + rest + R"("hidden": 8, "top_k": 3})"), "top_k = 3 of experts = 2");
  has(load("{" + rest + R"("hidden": 8, "top_k": 1, "colour": 1})"), "unknown field");
  const auto gating = [&](const std::string& fields) {
    return load("{" + rest + R"("hidden": 8, "top_k": 1, "gating": )" + fields + "}");
  };
  has(gating("7"), "gating is not a JSON object");
  has(gating(R"({"score": "relu"})"), R"(score = "relu", expected softmax or sigmoid)");
  has(gating(R"({"group_select": 1})"), "group_select = 1, expected max or top2_sum");
  has(gating(R"({"bias": 1})"), "bias = 1, expected true or false");
  has(gating(R"({"group_count": 0})"), "group_count = 0");
  has(gating(R"({"group_count": 3})"), "1 of 3 groups of 2 experts");
  has(gating(R"({"k_group": 2})"), "2 of 1 groups of 2 experts");
  has(gating(R"({"routed_scaling_factor": "2"})"), "expected a number");
  has(gating(R"({"softmax": true})"), "unknown field");
  has(error_of([] { load_problem("no-such-model"); }), "qwen3-30b-a3b");
}

TEST(Problem, KnowsItsRouter) {
  const Gating deepseek = load_problem("deepseek-v3").gating;
  EXPECT_EQ(deepseek.score, GatingScore::kSigmoid);
  EXPECT_TRUE(deepseek.bias);
  EXPECT_EQ(deepseek.group_count, 8);
  EXPECT_EQ(deepseek.k_group, 4);
  EXPECT_EQ(deepseek.group_select, GroupSelect::kTop2Sum);
  EXPECT_TRUE(deepseek.renormalize);
  EXPECT_EQ(deepseek.routed_scaling_factor, 2.5f);
  const Gating mixtral = load_problem("mixtral-8x7b").gating;
  EXPECT_EQ(mixtral.score, GatingScore::kSoftmax);
  EXPECT_FALSE(mixtral.bias);
  EXPECT_EQ(mixtral.group_count, 1);
}

TEST(Routing, EveryTokenChoosesDistinctExperts) {
  for (const char* text : {"uniform", "balanced", "zipf:1.1", "hot:0.5"}) {
    const Routing routing(text);
    for (const int64_t tokens : {1, 7, 300}) {
      const List rows = routing.rows_per_expert(tokens, 16, 4, 1);
      EXPECT_EQ(std::accumulate(rows.begin(), rows.end(), int64_t{0}), tokens * 4) << text;
      for (const int64_t r : rows) EXPECT_LE(r, tokens) << text;
      EXPECT_EQ(rows, routing.rows_per_expert(tokens, 16, 4, 1)) << "the seed decides";
    }
  }
}

TEST(Routing, DistributionsAreWhatTheySay) {
  const auto largest = [](const char* text) {
    const List rows = Routing(text).rows_per_expert(2000, 32, 4, 3);
    return *std::max_element(rows.begin(), rows.end());
  };
  EXPECT_EQ(largest("balanced"), 250);
  EXPECT_LT(largest("uniform"), 320);
  EXPECT_NEAR(static_cast<double>(largest("hot:0.5")), 1000, 100);
  EXPECT_EQ(largest("hot:1"), 2000);
  EXPECT_GT(largest("zipf:1.1"), 1000);
}

TEST(Routing, ReadsATrace) {
  const TextFile file("trace.csv", "0,2\n2,1\r\n2,3\n");
  const Routing routing("trace:" + file.path());
  EXPECT_EQ(routing.rows_per_expert(3, 4, 2, 1), (List{1, 1, 3, 1}));
  EXPECT_EQ(routing.rows_per_expert(4, 4, 2, 1), (List{2, 1, 4, 1})) << "begins again";
  EXPECT_EQ(routing.rows_per_expert(1, 4, 2, 1), (List{1, 0, 1, 0}));
  EXPECT_NE(error_of([&] { routing.rows_per_expert(3, 3, 2, 1); }).find(":3: expert 3"),
            std::string::npos);
  EXPECT_NE(error_of([&] { routing.rows_per_expert(3, 4, 3, 1); }).find("top_k = 3"),
            std::string::npos);
}

TEST(Routing, TheTrainedModelsTrace) {
  const Routing routing("trace:" + std::string(MOEOPS_TEST_DATA_DIR) +
                        "/tinymoe/routing_layer0.csv");
  const List rows = routing.rows_per_expert(12288, 32, 4, 1);
  EXPECT_EQ(std::accumulate(rows.begin(), rows.end(), int64_t{0}), 12288 * 4);
  const int64_t busiest = *std::max_element(rows.begin(), rows.end());
  EXPECT_GT(busiest, 2 * 12288 * 4 / 32) << "its router has favourites";
}

TEST(Routing, BrokenTracesAreNamedWithTheirLine) {
  const auto load = [](const std::string& text) {
    const TextFile file("trace.csv", text);
    return error_of([&] { Routing("trace:" + file.path()); });
  };
  EXPECT_NE(load("").find("no tokens"), std::string::npos);
  EXPECT_NE(load("1,2\n1\n").find(":2: 1 experts"), std::string::npos);
  EXPECT_NE(load("1,2\n1,x\n").find(":2: 'x'"), std::string::npos) << load("1,2\n1,x\n");
  EXPECT_NE(load("1,-2\n").find(":1: '-2'"), std::string::npos);
  EXPECT_NE(load("1,2\n\n").find(":2: ''"), std::string::npos);
  for (const char* text :
       {"", "zipf", "zipf:", "zipf:x", "zipf:-1", "hot:1.5", "hot:nan", "trace:", "random"}) {
    EXPECT_NE(error_of([&] { Routing routing(text); }).find("--routing"), std::string::npos)
        << text;
  }
}

// An implementation that makes one mistake.
class Wrong final : public GroupedMatmulImpl {
 public:
  enum class Mistake { kNone, kNeighbour, kOneElement, kUnwritten };
  explicit Wrong(Mistake mistake)
      : mistake_(mistake), right_(make_grouped_matmul_impl("moeops", {})) {}
  std::string name() const override { return "wrong"; }
  std::string detail() const override { return ""; }
  void load(const WeightValues& values, int64_t experts, int threads) override {
    form_.emplace(values.form());
    right_->load(values, experts, threads);
  }
  void unload() override { right_->unload(); }
  void run(const GemmCall& call) override {
    std::vector<Group> groups(call.groups.begin(), call.groups.end());
    if (mistake_ == Mistake::kNeighbour) groups[1].expert += 1;
    GemmCall changed = call;
    changed.groups = groups;
    right_->run(changed);
    const int64_t last = call.rows * form_->n - 1;
    const float value = load_value(form_->y, call.y, last);
    if (mistake_ == Mistake::kOneElement) store_value(form_->y, 1.02f * value + 0.1f, call.y, last);
    if (mistake_ == Mistake::kUnwritten) store_value(form_->y, NAN, call.y, last);
  }

 private:
  Mistake mistake_;
  std::unique_ptr<GroupedMatmulImpl> right_;
  std::optional<GemmForm> form_;
};

// A call on random x, with the memory that it refers to.
struct SmallGemm {
  SmallGemm(int64_t n, int64_t k, const std::string& dtype, std::vector<Group> the_groups)
      : values(1, {n, k, dtype}), groups(std::move(the_groups)) {
    const GemmForm& form = values.form();
    for (const Group& group : groups) call.rows += group.rows;
    x.resize(static_cast<size_t>(call.rows * k * size_of(form.x)));
    y.resize(static_cast<size_t>(call.rows * n * size_of(form.y)));
    for (int64_t i = 0; i < call.rows * k; ++i) {
      store_value(form.x, value_at(9, static_cast<uint32_t>(i)), x.data(), i);
    }
    for (int64_t i = 0; form.has_scales() && i < call.rows; ++i) {
      x_scale.push_back(0.01f * static_cast<float>(i + 1));
    }
    call = {groups,   x.data(), form.has_scales() ? x_scale.data() : nullptr,
            y.data(), nullptr,  call.rows};
  }

  WeightValues values;
  std::vector<Group> groups;
  std::vector<char> x, y;
  std::vector<float> x_scale;
  GemmCall call{};
};

TEST(Verify, SeesEveryMistake) {
  for (const char* dtype : {"f32", "bf16", "w8a8"}) {
    SmallGemm gemm(70, 96, dtype, {{2, 5}, {0, 1}, {4, 9}});
    const auto verdict = [&](Wrong::Mistake mistake) {
      Wrong impl(mistake);
      impl.load(gemm.values, 6, 1);
      return verify(impl, gemm.call, gemm.values, 1);
    };
    EXPECT_EQ(verdict(Wrong::Mistake::kNone), "") << dtype;
    EXPECT_NE(verdict(Wrong::Mistake::kNeighbour).find("y[5,0]"), std::string::npos) << dtype;
    EXPECT_NE(verdict(Wrong::Mistake::kOneElement).find("y[14,69]"), std::string::npos) << dtype;
    EXPECT_NE(verdict(Wrong::Mistake::kUnwritten).find("not written"), std::string::npos) << dtype;
  }
}

TEST(Verify, EveryImplementationIsRight) {
  for (const char* dtype : {"f32", "bf16", "w8a8"}) {
    SmallGemm gemm(130, 70, dtype, {{1, 1}, {0, 3}, {1, 20}});
    for (const std::string& name : grouped_matmul_impl_names(dtype, machine().isa)) {
      const auto impl = make_grouped_matmul_impl(name, {});
      impl->load(gemm.values, 2, 2);
      EXPECT_EQ(verify(*impl, gemm.call, gemm.values, 1), "") << name << ", " << dtype;
    }
  }
}

// Another implementation's result with one mistake in it.
class Spoilt final : public GroupedMatmulImpl {
 public:
  Spoilt(std::unique_ptr<GroupedMatmulImpl> right, std::function<void(const GemmCall&)> spoil)
      : right_(std::move(right)), spoil_(std::move(spoil)) {}
  std::string name() const override { return right_->name(); }
  std::string detail() const override { return ""; }
  void load(const WeightValues& values, int64_t experts, int threads) override {
    right_->load(values, experts, threads);
  }
  void unload() override { right_->unload(); }
  void run(const GemmCall& call) override {
    right_->run(call);
    spoil_(call);
  }

 private:
  std::unique_ptr<GroupedMatmulImpl> right_;
  std::function<void(const GemmCall&)> spoil_;
};

TEST(Verify, SeesMistakesOfTheFusedOperator) {
  SmallGemm gemm(70, 96, "w8a8", {{2, 5}, {0, 1}, {4, 9}});
  std::vector<float> y_scale(15);
  gemm.call.y_scale = y_scale.data();
  const GemmOperator op = swiglu_quant_gemm();
  const auto verdict = [&](const std::function<void(const GemmCall&)>& spoil) {
    Spoilt impl(op.make_impl("moeops", {}), spoil);
    impl.load(gemm.values, 6, 2);
    return op.verify(impl, gemm.call, gemm.values, 1);
  };
  const auto q = [](const GemmCall& call, int64_t i) -> int8_t& {
    return static_cast<int8_t*>(call.y)[i];
  };
  EXPECT_EQ(verdict([](const GemmCall&) {}), "");
  EXPECT_EQ(verdict([&](const GemmCall& call) { q(call, 15 * 35 - 1) = -128; }),
            "q[14,34] is not written");
  EXPECT_EQ(verdict([&](const GemmCall& call) { q(call, 5 * 35) ^= 2; }).find("q[5,0] = "), 0u);
  EXPECT_EQ(verdict([](const GemmCall& call) { call.y_scale[14] *= 1.001f; }).find("scale[14] = "),
            0u);
  EXPECT_EQ(
      verdict([](const GemmCall& call) { call.y_scale[3] = NAN; }).find("scale[3] is not written"),
      0u);
}

// One for all tests, of what its caches hold: the figures do not matter here.
const LimitsMeter& shared_meter() {
  static const LimitsMeter meter = [] {
    LimitsMeter fresh;
    EXPECT_TRUE(LimitsMeter::create(2, &fresh, 1 << 24).ok());
    return fresh;
  }();
  return meter;
}

// The whole run on a small problem: results as the JSON promises them.
TEST(RunGroupedMatmul, SmallProblem) {
  Options options = small_options({"small", 64, 32, 8, 2, 0}, {1, 40}, "uniform");
  options.gemms = {"w13", "w2"};
  options.impls = {"moeops", "openblas"};
  options.reps = 3;
  const std::vector<Result> results =
      grouped_matmul_operator().run(options, shared_meter(), [](const std::string&) {});
  ASSERT_EQ(results.size(), 8u);
  for (const Result& r : results) {
    EXPECT_TRUE(r.verified) << r.wrong;
    EXPECT_GT(r.median_ms, 0);
    EXPECT_GE(r.median_ms, r.min_ms);
    EXPECT_GE(r.reps, 3);
    EXPECT_EQ(r.rows, 2 * r.tokens);
    EXPECT_DOUBLE_EQ(r.roofline_fraction, r.roofline_ms / r.median_ms);
    EXPECT_NE(r.repro.find("--gemm " + r.gemm + " --tokens " + std::to_string(r.tokens)),
              std::string::npos);
    for (const char* field : {"op",          "problem",
                              "tokens",      "rows",
                              "experts",     "active_experts",
                              "gemm",        "dtype",
                              "routing",     "impl",
                              "impl_detail", "isa",
                              "threads",     "weights",
                              "steady",      "median_ms",
                              "min_ms",      "spread",
                              "gops",        "gbps",
                              "roofline_ms", "roofline_fraction",
                              "verified",    "repro"}) {
      EXPECT_TRUE(to_json(r).contains(field)) << field;
    }
  }
  EXPECT_EQ(results[0].gemm, "w13");
  EXPECT_EQ(results[0].n, 64);
  EXPECT_EQ(results[7].impl, "openblas");
}

// Slow calls count against the calls around them, not against all.
TEST(Measure, TheWorstOfItsNeighbours) {
  const auto worst = [](std::vector<double> seconds) {
    Options options;
    options.reps = 2 * static_cast<int64_t>(seconds.size());
    options.min_seconds = 0;
    seconds.insert(seconds.begin(), 100.0);  // the call that only wakes the workers
    auto next = seconds.begin();
    Measured m;
    measure(
        options, [] { return std::vector<double>{1.0}; }, [&] { return *next++; }, m);
    Result r;
    fill_times(m, r);
    EXPECT_EQ(r.max_ms, 1e3 * *std::max_element(seconds.begin() + 1, seconds.end()));
    return r.worst_of_neighbours;
  };
  EXPECT_EQ(worst({1, 1, 1, 1, 1, 1, 1, 1}), 0) << "too few";
  EXPECT_EQ(worst({1, 1, 1, 1, 1, 1, 1, 1, 1}), 1);
  EXPECT_EQ(worst({3, 1, 1, 1, 1, 1, 1, 1, 1, 1}), 3);
  EXPECT_EQ(worst({1, 1, 1, 1, 1, 1, 1, 1, 1, 4}), 4);
  // A machine that slows down to half.
  EXPECT_EQ(worst({1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 2, 2}), 1.5);
}

TEST(Measure, StolenTimeIsTheEighthFigure) {
  const auto of = [](const std::string& text) {
    std::istringstream file(text);
    return stolen_seconds_of(file);
  };
  const double ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
  EXPECT_EQ(of("cpu  10 0 20 300 4 0 1 250 7 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n"), 250 / ticks);
  EXPECT_EQ(of("cpu  10 0 20 300 4 0 1\n"), 0);
  EXPECT_EQ(of("intr 10 0 20 300 4 0 1 250\n"), 0);
  EXPECT_EQ(of(""), 0);
  Result r;
  r.verified = true;
  r.fresh_routings = r.reps = 20;
  EXPECT_EQ(table({r}).find("hypervisor"), std::string::npos);
  r.stolen_ms = 30;
  EXPECT_NE(table({r}).find("of its neighbours; the hypervisor took 30 ms of the CPUs\n"),
            std::string::npos)
      << table({r});
}

// Every call has another routing, of whatever many experts.
TEST(RunGemms, FreshRoutings) {
  Options options = small_options({"small", 32, 32, 16, 2, 0}, {5}, "uniform");
  options.fresh_routings = options.reps = 20;
  for (Operator op : {grouped_matmul_operator(), moe_layer_operator()}) {
    options.variants = op.variants.empty() ? op.variants : std::vector<std::string>{"silu"};
    const std::vector<Result> results = op.run(options, shared_meter(), [](const std::string&) {});
    ASSERT_EQ(results.size(), 1u);
    EXPECT_TRUE(results[0].verified) << results[0].wrong;
    EXPECT_EQ(results[0].reps, 20);
    EXPECT_GE(results[0].worst_of_neighbours, 1);
    EXPECT_GE(results[0].max_ms, results[0].median_ms);
    EXPECT_NE(results[0].repro.find("--fresh-routings 20"), std::string::npos);
    EXPECT_EQ(results[0].repro.find("--reps"), std::string::npos) << "its range is a smaller one";
    EXPECT_NE(table(results).find("20 fresh routings: slowest "), std::string::npos);
  }
}

// A shell takes it apart again.
TEST(Repro, IsACommand) {
  const TextFile file("my problem's.json",
                      R"({"hidden": 8, "intermediate": 4, "experts": 2, "top_k": 1,
                          "shared_experts": 0})");
  Options options;
  options.problem = load_problem(file.path());
  options.tuning_cache = "plans/of(mine)";
  Result r;
  r.op = "grouped_matmul";
  r.problem = options.problem.name;
  r.gemm = "w13";
  r.tokens = 3;
  r.routing = "trace:a b.csv";
  r.dtype = "f32";
  r.impl = "moeops";
  r.threads = 2;
  const auto has = [&](const std::string& part) {
    const std::string repro = common_repro(options, r);
    return repro.find(part) != std::string::npos;
  };
  std::string quoted = file.path();
  quoted.replace(quoted.find('\''), 1, "'\\''");
  EXPECT_TRUE(has(" --problem '" + quoted + "' ")) << common_repro(options, r);
  EXPECT_TRUE(has(" --routing 'trace:a b.csv' "));
  EXPECT_TRUE(has(" --tuning-cache 'plans/of(mine)'"));
  EXPECT_TRUE(has(" --reps 9 "));
  r.routing = "zipf:1.1";
  EXPECT_TRUE(has(" --routing zipf:1.1 "));
  options.model = "my models/moe";
  EXPECT_TRUE(has(" --model 'my models/moe' --layer 0 "));
}

bool multiplies(const std::string& name) {
  return name.find("matmul") != std::string::npos || name == "w8a8_linear" || name == "moe_layer";
}

// The operators around grouped_matmul, by every implementation.
TEST(RunGemms, SmallProblem) {
  Options options = small_options({"small", 96, 64, 8, 2, 0}, {20}, "balanced");
  options.explain = true;
  options.dtype = "w8a8";
  for (const Operator& op : operators()) {
    if (!multiplies(op.name) || op.name == "grouped_matmul" || op.name == "moe_layer") continue;
    options.impls = op.impls("w8a8", machine().isa);
    const bool one_matrix = op.name != "grouped_matmul_swiglu_quant";
    const std::vector<Result> results = op.run(options, shared_meter(), [](const std::string&) {});
    ASSERT_EQ(results.size(), options.impls.size()) << op.name;
    for (const Result& r : results) {
      EXPECT_TRUE(r.verified) << r.repro << ": " << r.wrong;
      EXPECT_GT(r.median_ms, 0);
      EXPECT_EQ(r.rows, one_matrix ? r.tokens : 2 * r.tokens);
      EXPECT_EQ(r.active_experts, one_matrix ? 1 : 8);
      const int64_t x = op.name == "w8a8_linear" ? 2 * r.k : r.k + 4;
      EXPECT_EQ(r.read_bytes, r.active_experts * r.n * (r.k + 4) + r.rows * x);
      const bool quantises = !one_matrix && r.impl != "bare";
      EXPECT_EQ(r.written_bytes, r.rows * (quantises ? r.n / 2 + 4 : 2 * r.n));
      EXPECT_EQ(r.repro.find("--routing") == std::string::npos, one_matrix) << r.repro;
      if (r.impl != "ref" && r.impl != "onednn") {
        EXPECT_EQ(r.explain.at(0).find(one_matrix ? "default plan: 20 rows in 1 groups, "
                                                  : "default plan: 40 rows in 8 groups, "),
                  0u)
            << r.explain[0];
      }
    }
  }
  options.gemms = {"w2"};
  const Operator op = grouped_matmul_swiglu_quant_operator();
  EXPECT_NE(error_of([&] {
              op.run(options, shared_meter(), [](const std::string&) {});
            }).find("--gemm w2: grouped_matmul_swiglu_quant is w13"),
            std::string::npos);
}

// Every operator without weights, in all its forms and dtypes: verified, and its bytes counted.
TEST(RunRows, SmallProblem) {
  Options options = small_options({"small", 70, 24, 8, 2, 0}, {1, 90}, "uniform");
  options.problem.gating.bias = true;
  for (const Operator& op : operators()) {
    if (multiplies(op.name)) continue;
    options.variants = op.variants;
    // The other dtypes differ in nothing that is measured, and the limits take their time.
    options.dtype = op.dtypes.front();
    const std::vector<Result> results = op.run(options, shared_meter(), [](const std::string&) {});
    ASSERT_EQ(results.size(), 2 * std::max<size_t>(op.variants.size(), 1)) << op.name;
    for (const Result& r : results) {
      EXPECT_TRUE(r.verified) << r.repro << ": " << r.wrong;
      EXPECT_GT(r.median_ms, 0);
      EXPECT_GT(r.read_bytes, 0);
      EXPECT_GT(r.written_bytes, 0);
      EXPECT_GT(r.copy_gbps, 0);
      EXPECT_DOUBLE_EQ(r.tokens_per_s, 1e3 * static_cast<double>(r.tokens) / r.median_ms);
      EXPECT_DOUBLE_EQ(r.roofline_fraction, r.roofline_ms / r.median_ms);
      EXPECT_EQ(r.repro.find("--gemm"), std::string::npos);
      EXPECT_EQ(r.repro.find("--variant " + r.variant) != std::string::npos, !r.variant.empty());
    }
    EXPECT_NE(table(results).find("median us"), std::string::npos);
    if (op.name == "init_routing") {
      EXPECT_EQ(results[1].read_bytes, 90 * (70 * 2 + 2 * 4));
      EXPECT_EQ(results[1].written_bytes, 90 * 2 * (70 * 2 + 4) + 8 * 8);
    }
  }
}

// A whole layer, by every implementation.
TEST(RunMoeLayer, SmallProblem) {
  Options options =
      small_options({"small", 96, 64, 8, 2, 2}, {40}, "balanced");  // every expert has tokens
  options.variants = {"swiglu_oai"};
  const Operator op = moe_layer_operator();
  for (const std::string& dtype : op.dtypes) {
    options.dtype = dtype;
    options.impls = op.impls(dtype, machine().isa);
    const std::vector<Result> results = op.run(options, shared_meter(), [](const std::string&) {});
    ASSERT_EQ(results.size(), options.impls.size());
    const int64_t element = dtype == "f32" ? 4 : dtype == "bf16" ? 2 : 1;
    const int64_t weights = (8 + 2) * 3 * 64 * 96 * element;
    const int64_t scales = dtype == "w8a8" ? (8 + 2) * (2 * 64 + 96) * 4 : 0;
    const int64_t x = 40 * 96 * (dtype == "f32" ? 4 : 2);
    for (const Result& r : results) {
      EXPECT_TRUE(r.verified) << r.repro << ": " << r.wrong;
      EXPECT_EQ(r.rows, 2 * r.tokens);
      EXPECT_EQ(r.read_bytes, weights + scales + x + 80 * 8);
      EXPECT_EQ(r.written_bytes, x);
      EXPECT_GT(r.gops, 0);
      EXPECT_DOUBLE_EQ(r.roofline_fraction, r.roofline_ms / r.median_ms);
    }
  }
}

// The plans of a layer's GEMMs, and where all of its time goes.
TEST(RunMoeLayer, Explains) {
  Options options = small_options({"small", 96, 64, 8, 2, 3}, {40}, "balanced");
  options.variants = {"silu"};
  options.explain = true;
  const std::vector<Result> results =
      moe_layer_operator().run(options, shared_meter(), [](const std::string&) {});
  ASSERT_EQ(results.size(), 1u);
  const std::vector<std::string>& lines = results[0].explain;
  ASSERT_EQ(lines.size(), 7u);
  EXPECT_EQ(lines[0].find("first GEMM: default plan: 80 rows in 8 groups, 2 panels of 6 chunks"),
            0u);
  EXPECT_EQ(lines[1].find("second GEMM: default plan: 80 rows in 8 groups, 2 panels of 4 chunks"),
            0u);
  EXPECT_EQ(lines[2].find("shared experts' first GEMM: default plan: 120 rows in 3 groups"), 0u);
  EXPECT_EQ(lines[3].find("shared experts' second GEMM: default plan: 120 rows in 3 groups"), 0u);
  const std::string& phases = lines[5];
  EXPECT_NE(phases.find(", preparing tokens "), std::string::npos) << phases;
  EXPECT_NE(phases.find(", the rest, starting and ending the workers' region, "),
            std::string::npos);
  double sum = 0;
  for (size_t end = phases.find('%'); end != std::string::npos; end = phases.find('%', end + 1)) {
    sum += std::stod(phases.substr(phases.rfind(' ', end)));
  }
  EXPECT_NEAR(sum, 100, 0.5) << phases;
}

// The layer of a model that a test writes, [E, H, I] = [6, 72, 40].
class ModelLayer {
 public:
  void add(const std::string& name, const std::vector<int64_t>& shape) {
    tools::Tensor tensor(tools::FileDType::kF32, shape);
    for (int64_t i = 0; i < tensor.numel(); ++i) {
      store_value(DType::kF32,
                  value_at(static_cast<uint32_t>(tensors_.size()), static_cast<uint32_t>(i)),
                  tensor.data.data(), i);
    }
    tensors_.emplace_back("model.layers.2.mlp." + name, std::move(tensor));
  }
  void add_expert(const std::string& name, int64_t intermediate) {
    add(name + ".gate_proj.weight", {intermediate, 72});
    add(name + ".up_proj.weight", {intermediate, 72});
    add(name + ".down_proj.weight", {72, intermediate});
  }
  // Writes it and runs the benchmark on it.
  std::vector<Result> run(const nlohmann::json& config, const std::string& dtype, int64_t layer) {
    const std::string folder = fs::path(dir_ / "x").parent_path().string();
    tools::write_text(dir_ / "config.json", config.dump());
    std::vector<tools::NamedTensor> named;
    for (const auto& [name, tensor] : tensors_) named.push_back({name, tensor.ref()});
    tools::write_safetensors(dir_ / "model.safetensors", {}, named);
    Options options;
    options.model = folder;
    options.layer = layer;
    options.tokens = {9};
    options.routing.emplace("uniform");
    options.dtype = dtype;
    options.impls = {"moeops", "ref"};
    options.threads = 2;
    options.reps = 1;
    options.min_seconds = 0;
    return moe_layer_operator().run(options, shared_meter(), [](const std::string&) {});
  }

 private:
  tools::TempDir dir_;
  std::vector<std::pair<std::string, tools::Tensor>> tensors_;
};

// Weights of a real layer, with whatever belongs to them.
TEST(RunMoeLayer, OfAModelWithSharedExperts) {
  ModelLayer model;
  model.add("gate.weight", {6, 72});
  for (int e = 0; e < 6; ++e) model.add_expert("experts." + std::to_string(e), 40);
  model.add_expert("shared_experts", 96);
  const nlohmann::json config = {{"num_experts_per_tok", 2}, {"hidden_act", "gelu_pytorch_tanh"}};
  for (const char* dtype : {"w8a8", "bf16"}) {
    const std::vector<Result> results = model.run(config, dtype, 2);
    ASSERT_EQ(results.size(), 2u);
    for (const Result& r : results) {
      EXPECT_TRUE(r.verified) << dtype << ": " << r.wrong;
      EXPECT_EQ(r.experts, 6);
      EXPECT_EQ(r.rows, 9 * 2);
      EXPECT_EQ(r.variant, "gelu_tanh");
      EXPECT_EQ(r.weights, "warm") << "so few cannot be cold";
      EXPECT_NE(r.repro.find(" --layer 2 "), std::string::npos);
      EXPECT_EQ(r.repro.find("--problem"), std::string::npos);
      EXPECT_EQ(r.repro.find("--variant"), std::string::npos);
      const bool s8 = std::string_view(dtype) == "w8a8";
      const int64_t width = r.active_experts * 40 + 96;
      EXPECT_EQ(r.read_bytes, 3 * width * 72 *
                                      (s8                ? 1
                                       : dtype[0] == 'b' ? 2
                                                         : 4) +
                                  (s8 ? 4 * (2 * width + (r.active_experts + 1) * 72) : 0) +
                                  9 * 72 * (dtype[0] == 'f' ? 4 : 2) + 18 * 8);
    }
  }
  EXPECT_NE(error_of([&] { model.run(config, "bf16", 5); }).find("model.layers.5."),
            std::string::npos);
}

TEST(RunMoeLayer, OfAModelWithBiases) {
  ModelLayer model;
  model.add("router.weight", {6, 72});
  model.add("experts.gate_up_proj", {6, 72, 80});
  model.add("experts.gate_up_proj_bias", {6, 80});
  model.add("experts.down_proj", {6, 40, 72});
  model.add("experts.down_proj_bias", {6, 72});
  for (const char* dtype : {"w8a8", "f32"}) {
    for (const Result& r : model.run({{"num_experts_per_tok", 3}}, dtype, 2)) {
      EXPECT_TRUE(r.verified) << dtype << ": " << r.wrong;
      EXPECT_EQ(r.variant, "swiglu_oai");
    }
  }
}

// y = x + 1, with one mistake.
class PlusOne final : public RowCase {
 public:
  enum class Mistake { kNone, kOneElement, kUnwritten, kNan };
  PlusOne(int64_t rows, Mistake mistake) : RowCase(rows), mistake_(mistake) {
    x_ = floats("x", {DType::kF32, {rows, 3}}, 1.0f);
    y_ = output("y", {DType::kF32, {rows, 3}});
  }
  void bind(int64_t inputs, int64_t outputs, Rows rows) override {
    x_view_ = view(x_, inputs, rows);
    y_view_ = view(y_, outputs, rows);
  }
  Status run(Context* context) override {
    for (int64_t i = 0; i < x_view_.dim(0); ++i) {
      for (int64_t j = 0; j < 3; ++j) y_view_.row<float>(i)[j] = x_view_.row<float>(i)[j] + 1.0f;
    }
    float* last = y_view_.row<float>(y_view_.dim(0) - 1) + 2;
    if (context == nullptr || mistake_ == Mistake::kNone) return {};
    if (mistake_ == Mistake::kOneElement) *last += 0.001f;
    if (mistake_ == Mistake::kNan) *last = NAN;
    if (mistake_ == Mistake::kUnwritten) *last = garbage_ ? 3.0f : 2.0f;
    garbage_ = !garbage_;
    return {};
  }

 private:
  Mistake mistake_;
  bool garbage_ = false;
  Id x_, y_;
  TensorView x_view_, y_view_;
};

TEST(RowCase, SeesEveryMistake) {
  for (const int64_t rows : {1, 64, 1000}) {
    const auto verdict = [&](PlusOne::Mistake mistake) {
      PlusOne the_case(rows, mistake);
      std::vector<float> memory(static_cast<size_t>(2 * the_case.set_bytes() / 4));
      the_case.place(memory.data(), 2);
      Context context;
      return the_case.verify(&context, 1);
    };
    const std::string last = "y[" + std::to_string(rows - 1) + ",2]";
    EXPECT_EQ(verdict(PlusOne::Mistake::kNone), "");
    EXPECT_EQ(verdict(PlusOne::Mistake::kOneElement).find(last + " = "), 0u);
    EXPECT_EQ(verdict(PlusOne::Mistake::kNan).find(last + " is not finite"), 0u);
    EXPECT_EQ(verdict(PlusOne::Mistake::kUnwritten).find(last + " is not written"), 0u);
  }
}

TEST(RowLoad, SortsLikeTheContract) {
  const Problem problem = {"small", 8, 8, 4, 2, 0};
  const RowLoad load = {problem, 3, DType::kF32, "", {2, 0, 2, 3, 0, 2}};
  EXPECT_EQ(load.counts(), (List{2, 0, 3, 1}));
  EXPECT_EQ(load.sorted_rows(), (std::vector<int32_t>{2, 0, 3, 5, 1, 4}));
}

TEST(Regressions, OnlyBeyondPercentAndNoise) {
  Result r;
  r.op = "grouped_matmul";
  r.verified = r.steady = true;
  r.median_ms = 1.0;
  r.spread = 0.02;
  const TextFile file("baseline.json", nlohmann::json{{"results", {to_json(r)}}}.dump());
  const auto count = [&](double median, double percent) {
    Result now = r;
    now.median_ms = median;
    return regressions({now}, file.path(), percent).size();
  };
  EXPECT_EQ(count(1.04, 5), 0u);
  EXPECT_EQ(count(1.06, 5), 1u);
  EXPECT_EQ(count(1.015, 1), 0u) << "within the spread";
  Result other = r;
  other.median_ms = 9;
  other.tokens = 77;
  EXPECT_TRUE(regressions({other}, file.path(), 5).empty()) << "no line of it in the baseline";
  other = r;
  other.median_ms = 9;
  other.steady = false;
  EXPECT_TRUE(regressions({other}, file.path(), 5).empty()) << "unsteady";
  EXPECT_NE(error_of([&] { regressions({r}, "/no/such/file", 5); }).find("cannot be read"),
            std::string::npos);
  other = r;
  other.median_ms = 9;
  other.variant = "dynamic";
  EXPECT_TRUE(regressions({other}, file.path(), 5).empty()) << "another form";
  const TextFile broken("broken.json", R"({"results": [{}]})");
  EXPECT_NE(error_of([&] { regressions({r}, broken.path(), 5); }).find("not written by opbench"),
            std::string::npos);
}

}  // namespace
}  // namespace moeops::bench

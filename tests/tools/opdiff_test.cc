// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>

#include "tests/tools/test_support.h"
#include "tools/opdiff/operators.h"
#include "tools/opdiff/run.h"

namespace moeops::tools {
namespace {

Case grouped_matmul_case(const nlohmann::json& params = nlohmann::json::object()) {
  return make_case("grouped_matmul", params, {{"M", 9}, {"K", 20}, {"N", 7}, {"E", 3}}, DType::kF32,
                   1);
}

Tensor& output(Case& c, const std::string& name) {
  for (auto& [key, tensor] : c.outputs) {
    if (key == name) return tensor;
  }
  throw Error("no output " + name);
}

Verdict run(const Case& c, Impl impl) {
  Context context;
  return run_case(c, impl, context, 10);
}

TEST(RunCase, MadeCasesPassUnderBothImplementations) {
  for (const char* type : {"count", "cumsum", "sparse"}) {
    const Case c = grouped_matmul_case({{"list_type", type}, {"activation", "silu"}});
    for (const Impl impl : {Impl::kRef, Impl::kOpt}) {
      const Verdict verdict = run(c, impl);
      EXPECT_TRUE(verdict.passed) << verdict.message;
      ASSERT_EQ(verdict.outputs.size(), 1u);
      EXPECT_EQ(verdict.outputs[0].comparison.count, 63);
    }
  }
}

TEST(RunCase, NamesTheOutputAndTheFirstWrongElement) {
  Case c = grouped_matmul_case();
  float* y = reinterpret_cast<float*>(output(c, "y").data.data());
  y[3 * 7 + 2] += 1.0f;
  y[5 * 7] += 1.0f;
  const Verdict verdict = run(c, Impl::kRef);
  EXPECT_FALSE(verdict.passed);
  EXPECT_EQ(verdict.message, "output y is wrong");
  const Comparison& comparison = verdict.outputs[0].comparison;
  EXPECT_EQ(comparison.beyond, 2);
  EXPECT_EQ(comparison.mismatches[0].index, (std::vector<int64_t>{3, 2}));
}

TEST(RunCase, NamesTheFirstWrongStage) {
  Case c = make_case("moe_layer", nlohmann::json::object(),
                     {{"T", 5}, {"H", 16}, {"I", 8}, {"E", 4}, {"K", 2}}, DType::kF32, 1);
  EXPECT_TRUE(run(c, Impl::kRef).passed) << run(c, Impl::kRef).message;
  reinterpret_cast<float*>(output(c, "stage.y").data.data())[4] += 1.0f;
  reinterpret_cast<float*>(output(c, "out").data.data())[0] += 1.0f;
  const Verdict verdict = run(c, Impl::kRef);
  EXPECT_FALSE(verdict.passed);
  EXPECT_EQ(verdict.message, "the first wrong stage: stage.y is wrong");
}

TEST(RunCase, AnExpectedErrorMustComeAndLeaveTheOutputs) {
  Case c = grouped_matmul_case();
  c.outputs.clear();
  c.tolerance.clear();
  c.expect_error = "invalid_argument";
  EXPECT_EQ(run(c, Impl::kRef).message, "expected invalid_argument, got ok: ");
  for (auto& [name, tensor] : c.inputs) {
    if (name == "group_list") tensor.data[7] = std::byte{0x80};  // a negative count
  }
  for (const Impl impl : {Impl::kRef, Impl::kOpt}) {
    const Verdict verdict = run(c, impl);
    EXPECT_TRUE(verdict.passed) << verdict.message;
    EXPECT_NE(verdict.message.find("group_list[0]"), std::string::npos) << verdict.message;
  }
}

// What `make` makes by the reference, both implementations pass.
TEST(RunCase, BothImplementationsPassWhatTheReferenceMakes) {
  const Case c =
      make_case("swiglu", nlohmann::json::object(), {{"M", 2}, {"I", 4}}, DType::kF32, 1);
  EXPECT_TRUE(run(c, Impl::kRef).passed);
  EXPECT_TRUE(run(c, Impl::kOpt).passed);
}

TEST(RunCase, RefusesWhatNobodyAskedFor) {
  const auto expect = [](auto change, const char* message) {
    Case c = grouped_matmul_case();
    c.name = "file";
    change(c);
    expect_error([&] { (void)run(c, Impl::kRef); }, {message});
  };
  expect([](Case& c) { c.op = "convolution"; }, "convolution");
  expect([](Case& c) { c.params["colour"] = 1; }, "params.colour");
  expect([](Case& c) { c.params["list_type"] = "counts"; }, "count, cumsum, sparse");
  expect([](Case& c) { c.params["transpose_w"] = 1; }, "true or false");
  expect([](Case& c) { c.inputs.emplace_back("z", c.inputs[0].second); }, "in.z is not an input");
  expect([](Case& c) { c.outputs.emplace_back("z", c.outputs[0].second); },
         "out.z is not an output");
}

// Every operator's `make` works, and what it makes passes under the reference and survives a file.
TEST(MakeCase, EveryOperator) {
  const std::map<std::string, int64_t> sizes = {{"T", 6}, {"H", 12}, {"I", 8}, {"E", 4},
                                                {"K", 2}, {"M", 10}, {"N", 8}, {"G", 4}};
  for (const Operator& op : operators()) {
    SCOPED_TRACE(op.name);
    // Give each operator the sizes that it asks for: add one whenever it names one.
    std::map<std::string, int64_t> dims;
    nlohmann::json params = nlohmann::json::object();
    if (std::string(op.name) == "cutoff_rows") {
      params = {{"T", 6}, {"K", 2}, {"topk_scaling_factor", 0.5}};
    }
    Case c;
    for (;;) {
      try {
        c = make_case(op.name, params, dims, DType::kF32, 3);
        break;
      } catch (const Error& error) {
        const std::string text = error.what();
        const size_t at = text.find("needs the size ");
        ASSERT_NE(at, std::string::npos) << text;
        const std::string size = text.substr(at + 15, 1);
        ASSERT_TRUE(sizes.contains(size) && dims.emplace(size, sizes.at(size)).second) << text;
      }
    }
    ASSERT_FALSE(c.outputs.empty());
    const std::string path = (std::filesystem::temp_directory_path() /
                              (std::string("moeops_make_") + op.name + ".safetensors"))
                                 .string();
    write_case(path, c);
    const Case back = read_case(path);
    std::filesystem::remove(path);
    const Verdict verdict = run(back, Impl::kRef);
    EXPECT_TRUE(verdict.passed) << verdict.message;
  }
}

}  // namespace
}  // namespace moeops::tools

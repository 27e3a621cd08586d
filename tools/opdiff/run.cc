// SPDX-License-Identifier: Apache-2.0
#include "tools/opdiff/run.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "tools/opdiff/operators.h"
#include "tools/tensor_file/error.h"

namespace moeops::tools {

namespace {

const char* to_string(Impl impl) { return impl == Impl::kRef ? "ref" : "opt"; }

const Operator& operator_of(const std::string& name) {
  const Operator* op = find_operator(name);
  if (op == nullptr) throw Error(fmt::format("op {} is not an operator", in_quotes(name)));
  return *op;
}

// The first output that the call touched, though it was refused; empty when there is none.
std::string touched_output(const Call& call) {
  for (const auto& [name, output] : call.outputs()) {
    if (output.tensor.data != output.before) return name;
  }
  return {};
}

// The first `rows` rows; all when there are fewer.
TensorRef head(TensorRef tensor, int64_t rows) {
  if (tensor.shape.empty() || tensor.shape[0] <= rows) return tensor;
  tensor.bytes = tensor.bytes / static_cast<size_t>(tensor.shape[0]) * static_cast<size_t>(rows);
  tensor.shape[0] = rows;
  return tensor;
}

bool is_stage(const std::string& name) { return name.starts_with("stage."); }

void judge_error(const Case& c, const Call& call, const Status& status, Verdict& verdict) {
  const std::string got = fmt::format("{}: {}", moeops::to_string(status.code()), status.message());
  if (moeops::to_string(status.code()) != c.expect_error) {
    verdict.message = fmt::format("expected {}, got {}", c.expect_error, got);
  } else if (const std::string name = touched_output(call); !name.empty()) {
    verdict.message = fmt::format("returned {}, but wrote to {}", got, name);
  } else {
    verdict.passed = true;
    verdict.message = got;
  }
}

void judge_outputs(const Case& c, const Call& call, int first, Verdict& verdict) {
  verdict.passed = true;
  // Stages in the order in which the operator computes them, then the results in the file's.
  std::vector<std::string> names;
  for (const auto& [name, output] : call.outputs()) {
    if (is_stage(name) && c.output(name) != nullptr) names.push_back(name);
  }
  for (const auto& [name, tensor] : c.outputs) {
    if (!is_stage(name)) names.push_back(name);
  }
  for (const std::string& name : names) {
    const Call::Output& got = *call.output(name);
    const auto tolerance = c.tolerance.find(name);
    TensorRef expected = c.output(name)->ref();
    TensorRef actual = got.tensor.ref();
    if (got.defined_rows >= 0) {
      // A dump may hold the rows behind as well, or not: they were not to be written.
      expected = head(expected, got.defined_rows);
      actual = head(actual, got.defined_rows);
    }
    Comparison comparison = compare(
        expected, actual,
        tolerance != c.tolerance.end() ? tolerance->second : default_tolerance(expected.dtype),
        first);
    if (!comparison.pass && verdict.passed) {
      verdict.passed = false;
      verdict.message =
          fmt::format("{} {} is wrong", is_stage(name) ? "the first wrong stage:" : "output", name);
    }
    verdict.outputs.push_back({name, std::move(comparison)});
  }
}

}  // namespace

Verdict run_case(const Case& c, Impl impl, Context& context, int first) {
  const Operator& op = operator_of(c.op);
  Verdict verdict;
  verdict.case_name = c.name;
  verdict.op = c.op;
  verdict.impl = impl;
  Call call(c, impl, context);
  const Status status = op.run(call);
  call.check_all_used();
  if (!c.expect_error.empty()) {
    judge_error(c, call, status, verdict);
  } else if (!status.ok()) {
    verdict.message =
        fmt::format("returned {}: {}", moeops::to_string(status.code()), status.message());
  } else {
    judge_outputs(c, call, first, verdict);
  }
  return verdict;
}

Case make_case(const std::string& op_name, const nlohmann::json& params,
               const std::map<std::string, int64_t>& dims, DType dtype, uint64_t seed) {
  const Operator& op = operator_of(op_name);
  Case c;
  c.name = "the new case";
  c.op = op_name;
  c.params = params;
  c.source = fmt::format("moeops reference, seed {}", seed);
  Maker maker(c, dims, dtype, seed);
  op.make(maker);

  Context context;
  Call call(c, Impl::kRef, context, /*all_outputs=*/true);
  const Status status = op.run(call);
  if (!status.ok()) throw Error(status.message());
  call.check_all_used();
  maker.check_sizes_used();
  for (const auto& [name, output] : call.outputs()) {
    const TensorRef tensor = output.tensor.ref();
    c.outputs.emplace_back(
        name, Tensor(output.defined_rows >= 0 ? head(tensor, output.defined_rows) : tensor));
    c.tolerance.try_emplace(name, kExact);
  }
  return c;
}

std::string to_text(const Verdict& verdict) {
  std::string text = fmt::format("{} {} [{}]", verdict.passed ? "PASS" : "FAIL", verdict.case_name,
                                 to_string(verdict.impl));
  if (!verdict.message.empty()) text += ": " + verdict.message;
  text += '\n';
  for (const OutputVerdict& output : verdict.outputs) {
    text += to_text(output.name, output.comparison);
  }
  return text;
}

nlohmann::json to_json(const Verdict& verdict) {
  nlohmann::json outputs = nlohmann::json::array();
  for (const OutputVerdict& output : verdict.outputs) {
    nlohmann::json entry = output.comparison;
    entry["name"] = output.name;
    outputs.push_back(std::move(entry));
  }
  return {{"case", verdict.case_name},       {"op", verdict.op},
          {"impl", to_string(verdict.impl)}, {"passed", verdict.passed},
          {"message", verdict.message},      {"outputs", outputs}};
}

}  // namespace moeops::tools

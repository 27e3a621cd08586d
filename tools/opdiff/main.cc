// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <optional>

#include "tools/opdiff/compare.h"
#include "tools/opdiff/operators.h"
#include "tools/opdiff/run.h"
#include "tools/tensor_file/error.h"
#include "tools/tensor_file/npy.h"
#include "tools/tensor_file/safetensors.h"
#include "tools/tensor_file/strict_json.h"
#include "tools/tensor_file/write_file.h"

namespace moeops::tools {

namespace {

namespace fs = std::filesystem;

enum ExitStatus { kFine = 0, kMismatch = 1, kUsage = 2 };

// Files as they are, folders as the .safetensors files below them, in the order of their names.
std::vector<std::string> case_files(const std::vector<std::string>& paths) {
  std::vector<std::string> files;
  for (const std::string& path : paths) {
    if (!fs::exists(path)) throw Error(fmt::format("{}: no such file or folder", path));
    if (!fs::is_directory(path)) {
      files.push_back(path);
      continue;
    }
    std::vector<std::string> found;
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(path)) {
      if (entry.is_regular_file() && entry.path().extension() == ".safetensors") {
        found.push_back(entry.path().string());
      }
    }
    if (found.empty()) throw Error(fmt::format("{}: no .safetensors file in this folder", path));
    std::sort(found.begin(), found.end());
    files.insert(files.end(), found.begin(), found.end());
  }
  return files;
}

struct RunOptions {
  std::vector<std::string> paths;
  std::string impl = "both";
  std::string isa;
  int threads = 0;
  int first = 10;
  std::string json;
};

int run(const RunOptions& options) {
  ContextOptions context_options;
  context_options.threads = options.threads;
  if (!options.isa.empty()) {
    Isa isa;
    if (!parse_isa(options.isa.c_str(), &isa)) {
      throw Error(fmt::format(
          "--isa {}: expected scalar, avx2, avx512, avx512_vnni, avx512_bf16 or amx", options.isa));
    }
    context_options.isa = isa;
  }
  Context context(context_options);
  if (const Status status = context.status(); !status.ok()) throw Error(status.message());

  std::vector<Impl> impls;
  if (options.impl != "opt") impls.push_back(Impl::kRef);
  if (options.impl != "ref") impls.push_back(Impl::kOpt);

  nlohmann::json results = nlohmann::json::array();
  int passed = 0;
  int failed = 0;
  bool unreadable = false;
  for (const std::string& path : case_files(options.paths)) {
    try {
      const Case c = read_case(path);
      for (const Impl impl : impls) {
        const Verdict verdict = run_case(c, impl, context, options.first);
        fmt::print("{}", to_text(verdict));
        results.push_back(to_json(verdict));
        ++(verdict.passed ? passed : failed);
      }
    } catch (const Error& error) {
      // The other cases are still worth running.
      fmt::print("FAIL {}\n", error.what());
      fmt::print(stderr, "opdiff: {}\n", error.what());
      results.push_back({{"case", path}, {"passed", false}, {"message", error.what()}});
      ++failed;
      unreadable = true;
    }
  }
  if (!options.json.empty()) {
    write_file_atomically(
        options.json,
        nlohmann::json{{"passed", passed}, {"failed", failed}, {"cases", results}}.dump(
            1, ' ', true, nlohmann::json::error_handler_t::replace) +
            "\n");
  }
  fmt::print("{} passed, {} failed\n", passed, failed);
  return unreadable ? kUsage : failed > 0 ? kMismatch : kFine;
}

// The tensors of a .npy or .safetensors file by name; the one in a .npy has none.
struct TensorSet {
  explicit TensorSet(const std::string& path) {
    if (fs::path(path).extension() == ".npy") {
      array = NpyFile::open(path);
      tensors.push_back({"", array->tensor()});
    } else if (fs::path(path).extension() == ".safetensors") {
      file = SafetensorsFile::open(path);
      tensors = file->tensors();
    } else {
      throw Error(fmt::format("{}: expected a name that ends in .npy or .safetensors", path));
    }
  }
  const TensorRef* find(const std::string& name) const {
    for (const NamedTensor& entry : tensors) {
      if (entry.name == name) return &entry.tensor;
    }
    return nullptr;
  }
  std::optional<NpyFile> array;
  std::optional<SafetensorsFile> file;
  std::vector<NamedTensor> tensors;
};

struct ComparePaths {
  std::string expected;
  std::string got;
  std::optional<double> rtol, atol;
  std::optional<int64_t> ulp;
  bool exact = false;
  int first = 10;
};

int compare_files(const ComparePaths& options) {
  const TensorSet expected(options.expected);
  const TensorSet got(options.got);
  int passed = 0;
  int failed = 0;
  for (const NamedTensor& entry : expected.tensors) {
    const TensorRef* other = got.find(entry.name);
    if (other == nullptr) {
      fmt::print("FAIL {}: only in {}\n", entry.name, options.expected);
      ++failed;
      continue;
    }
    Tolerance tolerance = default_tolerance(entry.tensor.dtype);
    if (options.exact) tolerance = kExact;
    if (options.ulp) tolerance = WithinUlps{*options.ulp};
    if (options.rtol || options.atol) {
      tolerance = Close{options.rtol.value_or(0), options.atol.value_or(0)};
    }
    const Comparison comparison = compare(entry.tensor, *other, tolerance, options.first);
    fmt::print("{}", to_text(entry.name, comparison));
    ++(comparison.pass ? passed : failed);
  }
  for (const NamedTensor& entry : got.tensors) {
    if (expected.find(entry.name) != nullptr) continue;
    fmt::print("FAIL {}: only in {}\n", entry.name, options.got);
    ++failed;
  }
  fmt::print("{} passed, {} failed\n", passed, failed);
  return failed > 0 ? kMismatch : kFine;
}

struct MakeOptions {
  std::string op;
  std::string params = "{}";
  std::vector<std::string> dims;
  std::string dtype = "f32";
  uint64_t seed = 1;
  std::string output;
};

int make(const MakeOptions& options) {
  std::map<std::string, int64_t> dims;
  for (const std::string& text : options.dims) {
    const size_t equals = text.find('=');
    const std::string digits = equals == std::string::npos ? "" : text.substr(equals + 1);
    if (equals == 0 || digits.empty() || digits.size() > 12 ||
        digits.find_first_not_of("0123456789") != std::string::npos) {
      throw Error(fmt::format("--dims {}: expected NAME=SIZE", text));
    }
    if (!dims.emplace(text.substr(0, equals), std::stoll(digits)).second) {
      throw Error(fmt::format("--dims {}: this size is given twice", text));
    }
  }
  std::optional<DType> dtype;
  for (const DType known : {DType::kF32, DType::kBf16, DType::kF16, DType::kS8}) {
    if (options.dtype == moeops::to_string(known)) dtype = known;
  }
  if (!dtype) {
    throw Error(fmt::format("--dtype {}: expected f32, bf16, f16 or s8", options.dtype));
  }
  const Case c = make_case(options.op, parse_strict_json(options.params, "--params"), dims, *dtype,
                           options.seed);
  write_case(options.output, c);
  return kFine;
}

void print_tensor(const std::string& name, const TensorRef& tensor) {
  double low = INFINITY;
  double high = -INFINITY;
  int64_t nans = 0;
  int64_t infinities = 0;
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    const double v = element(tensor, i);
    nans += std::isnan(v) ? 1 : 0;
    infinities += std::isinf(v) ? 1 : 0;
    if (std::isfinite(v)) {
      low = std::min(low, v);
      high = std::max(high, v);
    }
  }
  fmt::print("  {:<24} {:<5}{:<18}", name, to_string(tensor.dtype), shape_text(tensor.shape));
  if (low <= high) fmt::print(" in [{:.6g}, {:.6g}]", low, high);
  if (nans > 0) fmt::print(", {} NaN", nans);
  if (infinities > 0) fmt::print(", {} infinite", infinities);
  fmt::print("\n");
}

int show(const std::string& path) {
  const TensorSet set(path);
  fmt::print("{}: {} tensor{}\n", path, set.tensors.size(), set.tensors.size() == 1 ? "" : "s");
  if (set.file) {
    for (const auto& [key, value] : set.file->metadata()) fmt::print("  {} = {}\n", key, value);
  }
  for (const NamedTensor& entry : set.tensors) print_tensor(entry.name, entry.tensor);
  return kFine;
}

int main_of(int argc, char** argv) {
  CLI::App app{"Replays one call of an operator and says which number is wrong first.", "opdiff"};
  app.require_subcommand(1);

  RunOptions run_options;
  CLI::App* run_command = app.add_subcommand("run", "Replay cases and compare");
  run_command->add_option("cases", run_options.paths, "Case files, or folders of them")->required();
  run_command->add_option("--impl", run_options.impl, "ref, opt or both")
      ->check(CLI::IsMember({"ref", "opt", "both"}))
      ->capture_default_str();
  run_command->add_option("--isa", run_options.isa, "Force a lower ISA");
  run_command->add_option("--threads", run_options.threads, "Workers; 0: all")
      ->check(CLI::NonNegativeNumber);
  run_command->add_option("--first", run_options.first, "Mismatches to print for each output")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  run_command->add_option("--json", run_options.json, "Write the verdicts to this file");

  ComparePaths compare_options;
  CLI::App* compare_command =
      app.add_subcommand("compare", "Compare two .npy or .safetensors files, tensor by tensor");
  compare_command->add_option("A", compare_options.expected, "What is expected")->required();
  compare_command->add_option("B", compare_options.got, "What was got")->required();
  CLI::Option* rtol =
      compare_command->add_option("--rtol", compare_options.rtol)->check(CLI::NonNegativeNumber);
  CLI::Option* atol =
      compare_command->add_option("--atol", compare_options.atol)->check(CLI::NonNegativeNumber);
  CLI::Option* ulp = compare_command->add_option("--ulp", compare_options.ulp)
                         ->check(CLI::NonNegativeNumber)
                         ->excludes(rtol)
                         ->excludes(atol);
  compare_command->add_flag("--exact", compare_options.exact)
      ->excludes(rtol)
      ->excludes(atol)
      ->excludes(ulp);
  compare_command->add_option("--first", compare_options.first, "Mismatches to print")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();

  MakeOptions make_options;
  CLI::App* make_command =
      app.add_subcommand("make", "Make a case with random inputs and the reference's outputs");
  make_command->add_option("--op", make_options.op, "The operator")->required();
  make_command->add_option("--params", make_options.params, "Parameters, a JSON object")
      ->capture_default_str();
  make_command->add_option("--dims", make_options.dims, "Sizes, as in T=64,H=256,E=8,K=2")
      ->delimiter(',');
  make_command->add_option("--dtype", make_options.dtype, "f32, bf16, f16 or s8")
      ->capture_default_str();
  make_command->add_option("--seed", make_options.seed)->capture_default_str();
  make_command->add_option("-o", make_options.output, "The file to write")->required();

  std::string show_path;
  CLI::App* show_command = app.add_subcommand("show", "Print what a tensor file holds");
  show_command->add_option("FILE", show_path)->required();

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kFine : kUsage;
  }
  if (run_command->parsed()) return run(run_options);
  if (compare_command->parsed()) return compare_files(compare_options);
  if (make_command->parsed()) return make(make_options);
  return show(show_path);
}

}  // namespace

}  // namespace moeops::tools

int main(int argc, char** argv) {
  try {
    return moeops::tools::main_of(argc, argv);
  } catch (const std::bad_alloc&) {
    std::fputs("opdiff: out of memory\n", stderr);
  } catch (const std::exception& error) {
    fmt::print(stderr, "opdiff: {}\n", error.what());
  }
  return 2;
}

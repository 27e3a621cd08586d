// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/tensor.h>

#include <deque>
#include <initializer_list>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "tools/opdiff/case.h"
#include "tools/opdiff/params.h"

namespace moeops::tools {

enum class Impl { kRef, kOpt };

// What an operator's adapter sees of a case: its inputs as views, its parameters, and outputs
// made to order. An adapter asks for everything, calls the operator and returns its status.
class Call {
 public:
  // all_outputs: make every output, whether the case expects it or not.
  Call(const Case& c, Impl impl, Context& context, bool all_outputs = false);

  Impl impl() const { return impl_; }
  Context& context() { return context_; }
  Params& params() { return params_; }

  // The view of in.<name>; absent when the case has none, or, for a broken case, one of a dtype
  // or rank that no operator knows: the operator then says what is wrong with it.
  ConstTensorView in(const char* name);
  // Size i of in.<name>; 0 when there is none, so that outputs can be sized before the operator
  // refuses the call.
  int64_t dim(const char* name, int i) const;

  // An output: filled with a pattern, or with in.<name> where the case gives its content before
  // the call. Sizes below 0 count as 0. Throws Error when it would not fit in 1 TiB.
  TensorView out(const char* name, DType dtype, std::initializer_list<int64_t> shape);
  // The same when the case expects it (or all_outputs); else an absent view.
  TensorView optional_out(const char* name, DType dtype, std::initializer_list<int64_t> shape);

  // After the call: only the first `rows` rows of the output are defined.
  void set_defined_rows(const char* name, int64_t rows);

  struct Output {
    Tensor tensor;
    std::vector<std::byte> before;  // its content before the call
    int64_t defined_rows = -1;      // -1: all
  };
  // Made so far, in the order in which they were asked for.
  const std::deque<std::pair<std::string, Output>>& outputs() const { return outputs_; }
  const Output* output(const std::string& name) const;

  // Throws Error when the case has an input, parameter or expected output that was not asked for.
  void check_all_used() const;

 private:
  const Case& case_;
  Impl impl_;
  Context& context_;
  Params params_;
  bool all_outputs_;
  std::set<std::string> used_inputs_;
  std::deque<std::pair<std::string, Output>> outputs_;  // a deque: views into it stay valid
};

// Makes the inputs of a new case (opdiff make): sizes and dtype from the command line, values from
// a seeded generator.
class Maker {
 public:
  Maker(Case& c, std::map<std::string, int64_t> dims, DType dtype, uint64_t seed);

  // The size given for `name`; without a fallback it must be given. Throws Error.
  int64_t dim(const char* name);
  int64_t dim(const char* name, int64_t fallback);
  // A parameter that is also a size: where only --dims gives it, it becomes the case's parameter.
  // Throws Error when both do and disagree.
  int64_t parameter(const char* name, const char* size);
  DType dtype() const { return dtype_; }
  Params& params() { return params_; }
  std::mt19937_64& random() { return random_; }

  // in.<name>, f32 | bf16 | f16, normally distributed.
  void normal(const char* name, DType dtype, std::vector<int64_t> shape, float deviation = 1.0f,
              float mean = 0.0f);
  // in.<name> f32, uniform in [low, high).
  void uniform(const char* name, std::vector<int64_t> shape, float low, float high);
  // in.<name>, s8 | i32 | i64 | bool, uniform in [low, high].
  void integers(const char* name, DType dtype, std::vector<int64_t> shape, int64_t low,
                int64_t high);
  // in.<name> i32 [T, K]: K distinct experts of E for every token.
  void expert_ids(const char* name, int64_t T, int64_t K, int64_t E);
  // `total` rows dealt at random to `groups` groups.
  std::vector<int64_t> counts(int64_t groups, int64_t total);
  // in.<name> with these values.
  void values(const char* name, DType dtype, std::vector<int64_t> shape,
              const std::vector<int64_t>& values);

  // How out.<name> is to be compared; without this, exactly.
  void tolerance(const char* name, const Tolerance& tolerance);

  // Throws Error when a size was given that nothing asked for.
  void check_sizes_used() const;

 private:
  Case& case_;
  std::map<std::string, int64_t> dims_;
  std::set<std::string> used_;
  DType dtype_;
  Params params_;
  std::mt19937_64 random_;
};

}  // namespace moeops::tools

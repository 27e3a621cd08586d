// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/tensor.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "bench/opbench/operators.h"

namespace moeops::bench {

// What an operator without weights is measured on.
struct RowLoad {
  const Problem& problem;
  int64_t tokens;
  DType dtype;
  std::string variant;
  std::vector<int32_t> expert_ids;  // [tokens, top_k]

  int64_t slots() const { return tokens * problem.top_k; }
  // [experts]: how many slots chose each.
  std::vector<int64_t> counts() const;
  // [slots]: where each goes in the order of experts, slots of one expert in theirs.
  std::vector<int32_t> sorted_rows() const;
};

// How far an output may be from the reference's; both 0 where the contract says bit-exact.
struct Tolerance {
  double relative = 0;
  double absolute = 0;
};

// That of what is computed in f32 with an exp of a few units' error, and rounded to `dtype`.
Tolerance rounded_to(DType dtype);

struct Rows {
  int64_t first;
  int64_t count;
};

// One operator on one load. Its tensors exist in many sets, alike but for where they lie, so that a
// call can find them cold. An operator's file derives from it: the constructor declares the tensors
// and what they hold; bind() points the call's arguments at them; run() makes the call.
class RowCase {
 public:
  virtual ~RowCase() = default;

  // The inputs of one set and the outputs of another; some rows of the call only, for operators
  // whose rows stand for themselves.
  virtual void bind(int64_t inputs, int64_t outputs, Rows rows) = 0;
  // Of moeops with a context, of the reference without.
  virtual Status run(Context* context) = 0;
  // What is wrong in the outputs of set 0 at the samples; empty when nothing is. Here: whatever
  // differs from what the reference makes of those rows alone, in the outputs of set 1.
  virtual std::string check(const std::vector<Rows>& samples);

  int64_t rows() const { return rows_; }
  int64_t read_bytes() const { return read_bytes_; }
  int64_t written_bytes() const { return written_bytes_; }
  int64_t set_bytes() const { return set_bytes_; }

  // From now on the tensors lie in `memory`, `sets` (at least 2) times; fills the inputs.
  void place(void* memory, int64_t sets);
  // Makes two calls on other garbage, whose results must be alike, thus written, finite and right.
  std::string verify(Context* context, uint64_t seed);

 protected:
  using Id = size_t;

  // rows: what `Rows` counts. Every byte of an input is read and every byte of an output written
  // once; the constructor may correct that.
  explicit RowCase(int64_t rows) : rows_(rows) {}

  Id floats(const char* name, const TensorLayout& layout, float scale);      // in [-scale, scale)
  Id integers(const char* name, const TensorLayout& layout, int32_t scale);  // likewise, i32
  template <class T>
  Id values(const char* name, std::initializer_list<int64_t> dims, const std::vector<T>& all) {
    return add(name, {dtype_of<T>, dims}, {},
               [all](void* to) { std::memcpy(to, all.data(), all.size() * sizeof(T)); });
  }
  Id output(const char* name, const TensorLayout& layout, Tolerance tolerance = {});

  TensorView view(Id tensor, int64_t set) const;
  // Of the tensor's first dimension, the entries that belong to the rows.
  TensorView view(Id tensor, int64_t set, Rows rows) const;

  int64_t read_bytes_ = 0;
  int64_t written_bytes_ = 0;

 private:
  struct Tensor {
    std::string name;
    TensorLayout layout;
    int64_t offset;  // in a set
    Tolerance tolerance;
    std::function<void(void*)> fill;  // null for an output

    int64_t bytes() const { return layout.rows() * layout.columns() * size_of(layout.dtype); }
  };

  Id add(const char* name, const TensorLayout& layout, Tolerance tolerance,
         std::function<void(void*)> fill);
  void fill_outputs(int64_t set, int byte);
  std::string unwritten() const;

  int64_t rows_;
  std::vector<Tensor> tensors_;
  int64_t set_bytes_ = 0;
  char* memory_ = nullptr;
};

// Entries [first, first + count) of the tensor's first dimension.
TensorView slice(TensorView tensor, int64_t first, int64_t count);

// Two tensors of one shape: empty when every element of `got` is close enough, else the first that
// is not, its row counted from `first_row`.
std::string compare(const std::string& name, const ConstTensorView& got,
                    const ConstTensorView& want, Tolerance tolerance, int64_t first_row);

using MakeRowCase = std::unique_ptr<RowCase> (*)(const RowLoad&);

template <class Case>
std::unique_ptr<RowCase> make_row_case(const RowLoad& load) {
  return std::make_unique<Case>(load);
}

// An operator whose time goes into reading and writing rows. It is judged by the copy bandwidth at
// its own mix of reads and writes.
Operator row_operator(const char* name, const std::vector<std::string>& dtypes,
                      const std::vector<std::string>& variants, MakeRowCase make);

}  // namespace moeops::bench

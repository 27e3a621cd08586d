// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include "bench/opbench/row_bench.h"

namespace moeops::bench {

namespace {

// The rows of all experts, back to their tokens.
class FinalizeRouting final : public RowCase {
 public:
  explicit FinalizeRouting(const RowLoad& load) : RowCase(load.tokens) {
    const int64_t H = load.problem.hidden;
    expanded_ = floats("expanded", {load.dtype, {load.slots(), H}}, 1.0f);
    row_index_ = values("row_index", {load.slots()}, load.sorted_rows());
    scales_ = floats("scales", {DType::kF32, {load.tokens, load.problem.top_k}}, 1.0f);
    out_ = output("out", {load.dtype, {load.tokens, H}});
  }

  void bind(int64_t inputs, int64_t outputs, Rows rows) override {
    args_.expanded = view(expanded_, inputs);
    args_.row_index = view(row_index_, inputs, rows);
    args_.scales = view(scales_, inputs, rows);
    args_.out = view(out_, outputs, rows);
  }

  Status run(Context* context) override {
    return context != nullptr ? finalize_routing(*context, args_) : ref::finalize_routing(args_);
  }

 private:
  Id expanded_, row_index_, scales_, out_;
  FinalizeRoutingArgs args_;
};

}  // namespace

Operator finalize_routing_operator() {
  return row_operator("finalize_routing", {"bf16", "f32", "f16"}, {},
                      make_row_case<FinalizeRouting>);
}

}  // namespace moeops::bench

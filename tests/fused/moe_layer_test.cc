// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <moeops/fused/moe_layer.h>
#include <moeops/ref/ref.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "fused/moe_layer/phases.h"
#include "tests/support/allocation_count.h"
#include "tests/support/array.h"
#include "tests/support/contract_sweep.h"
#include "tests/support/draw.h"
#include "tests/support/gemm_error.h"
#include "tests/support/refused.h"
#include "tests/support/seed.h"
#include "tests/support/swiglu_refusals.h"

namespace moeops {
namespace {

using test::Array;
using test::Draw;
using test::isas;
using test::SplitSmallCalls;

struct Form {
  DType x = DType::kF32, w = DType::kF32;
  int64_t T = 1, H = 1, I = 1, E = 1, K = 1, S = 0, Is = 0;
  SwigluParams swiglu = {};
  bool b13 = true, b2 = true;
  bool weight_on_input = false;
  bool allow_masked = false;
  int64_t gap = 0;
  Array::Against side = Array::Against::kBack;
};

std::string to_text(const Form& f) {
  return std::string(to_string(f.x)) + " x, " + to_string(f.w) + " w, T " + std::to_string(f.T) +
         " H " + std::to_string(f.H) + " I " + std::to_string(f.I) + " E " + std::to_string(f.E) +
         " K " + std::to_string(f.K) + " S " + std::to_string(f.S) + " Is " + std::to_string(f.Is) +
         (f.weight_on_input ? ", weight on input" : "") + (f.allow_masked ? ", masked" : "");
}

// A matrix of weights [E, N, K], its scales, and its pack. Products with a normal row deviate by 1.
struct Matrix {
  Array w, scale;
  PackedWeights packed;

  Matrix() = default;
  Matrix(Draw& draw, DType dtype, int64_t E, int64_t N, int64_t K, std::optional<Gate> gate,
         Array::Against side)
      : w(dtype, {E, N, K}, 0, side) {
    const float unit = 1.0f / std::sqrt(static_cast<float>(std::max<int64_t>(K, 1)));
    if (dtype == DType::kS8) {
      w.set_integers(draw, -128, 127);
      scale = Array(DType::kF32, {E, N}, 0, side);
      scale.set_uniform(draw, 0.5f * unit / 73.0f, 1.5f * unit / 73.0f);
    } else {
      w.set_normal(draw, unit);
    }
    PackedWeightsForm form = {.dtype = dtype};
    if (gate) {
      form.role = WeightRole::kGateUp;
      form.gate = *gate;
    }
    Context ctx;
    const Status status = PackedWeights::pack(ctx, form, w.in(), false, scale.in(), &packed);
    EXPECT_TRUE(status.ok()) << status.message();
  }
};

// Every stage that such a layer has.
struct Stages {
  Array x_q, x_scale, h, h_q, h_scale, y, shared;

  Stages(bool s8, bool has_shared, int64_t T, int64_t N, int64_t H, int64_t I, int64_t gap)
      : h(DType::kF32, {N, I}, gap), y(DType::kF32, {N, H}, gap) {
    if (s8) {
      x_q = Array(DType::kS8, {T, H}, gap);
      x_scale = Array(DType::kF32, {T});
      h_q = Array(DType::kS8, {N, I}, gap);
      h_scale = Array(DType::kF32, {N});
    }
    if (has_shared) shared = Array(DType::kF32, {T, H}, gap);
    for (Array* array : {&x_q, &x_scale, &h, &h_q, &h_scale, &y, &shared}) array->fill(0xA5);
  }
  MoeLayerStages views() const {
    return {x_q.out(), x_scale.out(), h.out(), h_q.out(), h_scale.out(), y.out(), shared.out()};
  }
};

// A call: views of what others own.
struct Call {
  ref::MoeLayerWeights plain;
  MoeLayerWeights packed;
  MoeLayerArgs args;

  int64_t T() const { return args.x.dim(0); }
  int64_t H() const { return args.x.dim(1); }
  int64_t K() const { return args.expert_ids.dim(1); }
  int64_t N() const { return T() * K(); }
  int64_t I() const { return plain.w2.dim(2); }
  int64_t E() const { return plain.w13.dim(0); }
  int64_t S() const { return plain.shared_w13.dim(0); }
  bool s8() const { return plain.w13.dtype == DType::kS8; }
  // The expert of a slot, -1 for none.
  int64_t expert(int64_t slot) const {
    const int64_t id = args.expert_ids.row<int32_t>(slot / K())[slot % K()];
    return id < E() ? id : -1;
  }
  Stages stages(int64_t gap) const {
    return {s8(), plain.shared_w13.present(), T(), N(), H(), I(), gap};
  }
};

// A call with all that it needs to live.
struct Layer {
  Form form;
  Array x, ids, weights, b13, b2, out;
  Matrix w13, w2, shared_w13, shared_w2;
  Call call;

  Layer(Draw& draw, const Form& f)
      : form(f),
        x(f.x, {f.T, f.H}, f.gap, f.side),
        ids(DType::kI32, {f.T, f.K}, f.gap, f.side),
        weights(DType::kF32, {f.T, f.K}, f.gap, f.side),
        out(f.x, {f.T, f.H}, f.gap, f.side),
        w13(draw, f.w, f.E, 2 * f.I, f.H, f.swiglu.gate, f.side),
        w2(draw, f.w, f.E, f.H, f.I, std::nullopt, f.side) {
    x.set_normal(draw);
    weights.set_uniform(draw, -0.2f, 1.0f);
    route(draw);
    if (f.b13) b13 = Array(DType::kF32, {f.E, 2 * f.I}, 0, f.side);
    if (f.b2) b2 = Array(DType::kF32, {f.E, f.H}, 0, f.side);
    for (Array* bias : {&b13, &b2}) {
      if (bias->present()) bias->set_normal(draw);
    }
    call.args.x = x.in();
    call.args.expert_ids = ids.in();
    call.args.weights = weights.in();
    call.args.b13 = b13.in();
    call.args.b2 = b2.in();
    call.args.swiglu = f.swiglu;
    call.args.weight_on_input = f.weight_on_input;
    call.args.allow_masked = f.allow_masked;
    call.args.out = out.out();
    call.plain.w13 = w13.w.in();
    call.plain.w13_scale = w13.scale.in();
    call.plain.w2 = w2.w.in();
    call.plain.w2_scale = w2.scale.in();
    call.packed.w13 = &w13.packed;
    call.packed.w2 = &w2.packed;
    if (f.S > 0) {
      shared_w13 = Matrix(draw, f.w, f.S, 2 * f.Is, f.H, f.swiglu.gate, f.side);
      shared_w2 = Matrix(draw, f.w, f.S, f.H, f.Is, std::nullopt, f.side);
      call.plain.shared_w13 = shared_w13.w.in();
      call.plain.shared_w13_scale = shared_w13.scale.in();
      call.plain.shared_w2 = shared_w2.w.in();
      call.plain.shared_w2_scale = shared_w2.scale.in();
      call.packed.shared_w13 = &shared_w13.packed;
      call.packed.shared_w2 = &shared_w2.packed;
    }
  }
  Layer(const Layer&) = delete;

  // Any experts, twice the same too; where it is allowed, a third of the slots masked, and the
  // weights of those are NaN.
  void route(Draw& draw) {
    for (int64_t t = 0; t < form.T; ++t) {
      for (int64_t k = 0; k < form.K; ++k) {
        const bool masked = form.allow_masked && (form.E == 0 || draw.between(0, 2) == 0);
        const int64_t id = masked ? draw.of<int64_t>({-1, form.E}) : draw.between(0, form.E - 1);
        ids.row<int32_t>(t)[k] = static_cast<int32_t>(id);
        if (masked) weights.set(t, k, NAN);
      }
    }
  }

  std::vector<char> run(Context& ctx) {
    out.fill(0xA5);
    const Status status = moe_layer(ctx, call.packed, call.args);
    EXPECT_TRUE(status.ok()) << status.message();
    return out.content();
  }
};

// Checks a call stage by stage: each must be what the reference makes of the stage before it, so
// that no error hides behind an earlier one.
//   x_q, x_scale     exact
//   h                within the error of the first GEMM's sums (f32, bf16) and of the activation
//   h_q, h_scale     exactly h quantised; against the reference's own, off by one at most
//   y                exactly the second GEMM of h_q; within the error of its sums in f32 and bf16
//   shared           exactly the sum of what the shared experts give as routed ones
//   out              exactly the weighted sum of y, plus the shared ones
class Checker {
 public:
  explicit Checker(const Call& call)
      : call_(call), expected_(call.stages(0)), gate_up_(DType::kF32, {call.N(), 2 * call.I()}) {
    Array out(call.args.out.dtype, {call.T(), call.H()});
    MoeLayerArgs args = call.args;
    args.out = out.out();
    args.stages = expected_.views();
    const Status status = ref::moe_layer(call.plain, args);
    EXPECT_TRUE(status.ok()) << status.message();
    find_gate_up();
    if (call.S() > 0) {
      shared_ids_ = Array(DType::kI32, {call.T(), call.S()});
      ones_ = Array(DType::kF32, {call.T(), call.S()});
      ones_.set_each([] { return 1.0f; });
      for (int64_t t = 0; t < call.T(); ++t) {
        for (int64_t s = 0; s < call.S(); ++s) shared_ids_.set(t, s, static_cast<float>(s));
      }
      shared_out_ = Array(call.args.out.dtype, {call.T(), call.H()});
      Call as_routed;
      as_routed.args.x = call.args.x;
      as_routed.args.swiglu = call.args.swiglu;
      as_routed.args.expert_ids = shared_ids_.in();
      as_routed.args.weights = ones_.in();
      as_routed.args.out = shared_out_.out();
      as_routed.plain.w13 = call.plain.shared_w13;
      as_routed.plain.w13_scale = call.plain.shared_w13_scale;
      as_routed.plain.w2 = call.plain.shared_w2;
      as_routed.plain.w2_scale = call.plain.shared_w2_scale;
      as_routed.packed.w13 = call.packed.shared_w13;
      as_routed.packed.w2 = call.packed.shared_w2;
      shared_ = std::make_unique<Checker>(as_routed);
    }
  }

  // Runs the operator with all its stages and checks them and out; leaves y of the routed slots.
  void check(Context& ctx, int64_t scratch_limit = 0, Array* y = nullptr) {
    Stages got = call_.stages(3);
    MoeLayerArgs args = call_.args;
    args.scratch_limit = scratch_limit;
    args.stages = got.views();
    const Status status = moe_layer(ctx, call_.packed, args);
    ASSERT_TRUE(status.ok()) << status.message();
    if (call_.s8()) {
      ASSERT_NO_FATAL_FAILURE(expect_equal("x_q", got.x_q, expected_.x_q));
      ASSERT_NO_FATAL_FAILURE(expect_equal("x_scale", got.x_scale, expected_.x_scale));
    }
    ASSERT_NO_FATAL_FAILURE(check_h(got));
    if (call_.s8()) {
      ASSERT_NO_FATAL_FAILURE(check_h_q(got));
    }
    ASSERT_NO_FATAL_FAILURE(check_y(got));
    Array shared_y;
    if (shared_ != nullptr) {
      SCOPED_TRACE("the shared experts as routed ones");
      ASSERT_NO_FATAL_FAILURE(shared_->check(ctx, 0, &shared_y));
    }
    ASSERT_NO_FATAL_FAILURE(check_out(got, shared_y));
    if (y != nullptr) *y = std::move(got.y);
  }

 private:
  static void expect_equal(const char* name, const Array& got, const Array& expected) {
    for (int64_t i = 0; i < got.layout().rows(); ++i) {
      for (int64_t j = 0; j < got.layout().columns(); ++j) {
        ASSERT_EQ(got.get(i, j), expected.get(i, j)) << name << " at " << i << ", " << j;
      }
    }
  }

  // One GEMM of the slots' rows, by the reference; rows of masked slots mean nothing.
  Array gemm(const ConstTensorView& rows, const ConstTensorView& scales, const ConstTensorView& w,
             const ConstTensorView& w_scale, const ConstTensorView& bias) const {
    Array y(DType::kF32, {call_.N(), w.dim(1)});
    if (call_.E() == 0) return y;
    std::vector<int64_t> list;
    for (int64_t slot = 0; slot < call_.N(); ++slot) {
      list.push_back(std::max<int64_t>(call_.expert(slot), 0));
      list.push_back(1);
    }
    GroupedMatmulArgs args;
    args.x = rows;
    args.x_scale = scales;
    args.list_type = ListType::kSparse;
    args.group_list = {list.data(), {call_.N(), 2}};
    args.bias = bias;
    args.y = y.out();
    const Status status = ref::grouped_matmul({w, false, w_scale}, args);
    EXPECT_TRUE(status.ok()) << status.message();
    return y;
  }

  void find_gate_up() {
    const DType dtype = call_.plain.w13.dtype;
    rows_ = Array(dtype, {call_.N(), call_.H()});
    Array scales = call_.s8() ? Array(DType::kF32, {call_.N()}) : Array();
    for (int64_t slot = 0; slot < call_.N(); ++slot) {
      const int64_t t = slot / call_.K();
      if (call_.s8()) {
        std::copy_n(expected_.x_q.row<int8_t>(t), call_.H(), rows_.row<int8_t>(slot));
        scales.set(0, slot, expected_.x_scale.get(0, t));
        continue;
      }
      const bool weighted = call_.args.weight_on_input && call_.expert(slot) >= 0;
      const float weight = weighted ? call_.args.weights.row<float>(t)[0] : 1.0f;
      for (int64_t j = 0; j < call_.H(); ++j) {
        const float v = dtype == DType::kF32 ? call_.args.x.row<float>(t)[j]
                                             : to_f32(call_.args.x.row<bf16>(t)[j]);
        rows_.set(slot, j, v * weight);
      }
    }
    gate_up_ =
        gemm(rows_.in(), scales.in(), call_.plain.w13, call_.plain.w13_scale, call_.args.b13);
    w13_norms_ = test::row_norms(call_.plain.w13, false);
    w2_norms_ = test::row_norms(call_.plain.w2, false);
    row_norms_ = test::row_norms(rows_.in(), false);
  }

  // Of the value v of a sum of n products and a bias, in f32 and bf16; s8 is exact.
  double gemm_error(int64_t n, double x_norm, double w_norm, double v) const {
    if (call_.s8()) return 0;
    return test::sum_error(n, x_norm, w_norm) + test::kRoundings * std::fabs(v);
  }

  void check_h(const Stages& got) {
    const int64_t I = call_.I();
    const Gate gate = call_.args.swiglu.gate;
    h_errors_.assign(static_cast<size_t>(call_.N()), 0.0);
    for (int64_t slot = 0; slot < call_.N(); ++slot) {
      const int64_t e = call_.expert(slot);
      double& h_error = h_errors_[static_cast<size_t>(slot)];
      for (int64_t j = 0; j < I; ++j) {
        if (e < 0) {
          ASSERT_EQ(got.h.get(slot, j), 0.0f) << "h of the masked slot " << slot;
          continue;
        }
        const auto [g, u] = test::gate_and_up(gate, gate_up_.row<float>(slot), I, j);
        const int64_t g_row = gate == Gate::kInterleaved ? 2 * j : gate == Gate::kLeft ? j : I + j;
        const int64_t u_row = gate == Gate::kInterleaved ? 2 * j + 1
                              : gate == Gate::kLeft      ? I + j
                                                         : j;
        const auto error_of = [&](int64_t row, double v) {
          return gemm_error(call_.H(), row_norms_[static_cast<size_t>(slot)],
                            w13_norms_[static_cast<size_t>(e * 2 * I + row)], v);
        };
        const double want = expected_.h.get(slot, j);
        const double error = test::gated_error(call_.args.swiglu, g, u, want) +
                             test::gated_slope_error(g, u, error_of(g_row, g), error_of(u_row, u));
        h_error = std::max(h_error, error);
        ASSERT_NEAR(got.h.get(slot, j), want, error) << "h at " << slot << ", " << j;
      }
    }
  }

  void check_h_q(const Stages& got) const {
    Array q(DType::kS8, {call_.N(), call_.I()}), scale(DType::kF32, {call_.N()});
    DynamicQuantArgs args;
    args.x = got.h.in();
    args.q = q.out();
    args.scale = scale.out();
    ASSERT_TRUE(ref::dynamic_quant(args).ok());
    ASSERT_NO_FATAL_FAILURE(expect_equal("h_q", got.h_q, q));
    ASSERT_NO_FATAL_FAILURE(expect_equal("h_scale", got.h_scale, scale));
    int64_t off = 0;
    for (int64_t i = 0; i < call_.N(); ++i) {
      // Unless all of the row lies in gelu_tanh's error in the negative tail.
      const double error = h_errors_[static_cast<size_t>(i)];
      if (error > 0 && !(2 * error < 0.5 * expected_.h_scale.get(0, i))) continue;
      for (int64_t j = 0; j < call_.I(); ++j) {
        const float difference = got.h_q.get(i, j) - expected_.h_q.get(i, j);
        ASSERT_LE(std::fabs(difference), 1.0f) << "h_q at " << i << ", " << j;
        off += difference != 0.0f ? 1 : 0;
      }
    }
    // At most 0.1% of the places, and one where there are few.
    ASSERT_LE(off, 1 + call_.N() * call_.I() / 1000);
  }

  void check_y(const Stages& got) const {
    Array h(call_.plain.w2.dtype, {call_.N(), call_.I()});  // as the second GEMM reads it
    if (call_.s8()) {
      for (int64_t i = 0; i < call_.N(); ++i) {
        std::copy_n(got.h_q.row<int8_t>(i), call_.I(), h.row<int8_t>(i));
      }
    } else {
      for (int64_t i = 0; i < call_.N(); ++i) {
        for (int64_t j = 0; j < call_.I(); ++j) h.set(i, j, got.h.get(i, j));
      }
    }
    const Array want =
        gemm(h.in(), got.h_scale.in(), call_.plain.w2, call_.plain.w2_scale, call_.args.b2);
    const std::vector<double> h_norms = test::row_norms(h.in(), false);
    for (int64_t slot = 0; slot < call_.N(); ++slot) {
      const int64_t e = call_.expert(slot);
      for (int64_t j = 0; j < call_.H(); ++j) {
        if (e < 0) {
          ASSERT_EQ(got.y.get(slot, j), 0.0f) << "y of the masked slot " << slot;
          continue;
        }
        const double v = want.get(slot, j);
        ASSERT_NEAR(got.y.get(slot, j), v,
                    gemm_error(call_.I(), h_norms[static_cast<size_t>(slot)],
                               w2_norms_[static_cast<size_t>(e * call_.H() + j)], v))
            << "y at " << slot << ", " << j;
      }
    }
  }

  void check_out(const Stages& got, const Array& shared_y) const {
    Array want(call_.args.out.dtype, {call_.T(), call_.H()});
    for (int64_t t = 0; t < call_.T(); ++t) {
      for (int64_t j = 0; j < call_.H(); ++j) {
        float acc = 0.0f;
        for (int64_t k = 0; k < call_.K(); ++k) {
          const int64_t slot = t * call_.K() + k;
          if (call_.expert(slot) < 0) continue;
          const float weight =
              call_.args.weight_on_input ? 1.0f : call_.args.weights.row<float>(t)[k];
          acc = std::fma(weight, got.y.get(slot, j), acc);
        }
        float shared = 0.0f;
        for (int64_t s = 0; s < call_.S(); ++s) {
          acc = acc + shared_y.get(t * call_.S() + s, j);
          shared = shared + shared_y.get(t * call_.S() + s, j);
        }
        if (call_.S() > 0) {
          ASSERT_EQ(got.shared.get(t, j), shared) << "shared at " << t << ", " << j;
        }
        want.set(t, j, acc);
      }
    }
    const int64_t row_bytes = call_.H() * size_of(want.layout().dtype);
    for (int64_t t = 0; t < call_.T() && row_bytes > 0; ++t) {
      const char* row = static_cast<const char*>(call_.args.out.data) +
                        t * call_.args.out.row_stride * size_of(want.layout().dtype);
      ASSERT_EQ(0,
                std::memcmp(row, want.row<char>(0) + t * row_bytes, static_cast<size_t>(row_bytes)))
          << "out of token " << t;
    }
  }

  const Call call_;
  Stages expected_;
  Array rows_;     // what the first GEMM of each slot reads
  Array gate_up_;  // what it gives
  std::vector<double> row_norms_, w13_norms_, w2_norms_;
  std::vector<double> h_errors_;  // the largest that is allowed in each slot's h
  Array shared_ids_, ones_, shared_out_;
  std::unique_ptr<Checker> shared_;
};

struct Types {
  DType x, w;
};
constexpr Types kTypes[] = {{DType::kF32, DType::kF32},
                            {DType::kBf16, DType::kBf16},
                            {DType::kF32, DType::kS8},
                            {DType::kBf16, DType::kS8},
                            {DType::kF16, DType::kS8}};

Form random_form(Draw& draw) {
  const Types types = kTypes[draw.between(0, std::ssize(kTypes) - 1)];
  Form form;
  form.x = types.x;
  form.w = types.w;
  form.T = draw.of<int64_t>({0, 1, 1, 2, 3, 8, 20});
  form.H = draw.of<int64_t>({0, 1, 3, 16, 31, 33, 64, 65, 130});
  form.I = draw.of<int64_t>({0, 1, 7, 16, 17, 32, 33, 70});
  form.E = draw.of<int64_t>({0, 1, 2, 5, 8});
  form.K = draw.of<int64_t>({0, 1, 1, 2, 4});
  form.S = draw.of<int64_t>({0, 0, 1, 2});
  form.Is = draw.of<int64_t>({0, 1, 17, 40, 64});
  form.swiglu = {
      draw.of({GatedActivation::kSilu, GatedActivation::kSwigluOai, GatedActivation::kGeluTanh}),
      draw.of({Gate::kLeft, Gate::kRight, Gate::kInterleaved}), draw.of({1.5f, 7.0f}),
      draw.of({1.702f, 1.0f})};
  form.b13 = draw.flag();
  form.b2 = draw.flag();
  form.weight_on_input = form.K == 1 && draw.flag();
  form.allow_masked = form.E == 0 || draw.flag();
  form.gap = draw.of<int64_t>({0, 0, 1, 5});
  form.side = draw.of({Array::Against::kFront, Array::Against::kBack});
  return form;
}

TEST(MoeLayer, EveryStageMatchesTheReferenceOnRandomLayers) {
  const SplitSmallCalls split;
  for (uint64_t round = 0; round < 250; ++round) {
    const uint64_t seed = test::seed_of(round);
    Draw draw(seed);
    const Form form = random_form(draw);
    SCOPED_TRACE(test::replay_hint(seed) + ": " + to_text(form));
    Layer layer(draw, form);
    Checker checker(layer.call);
    std::vector<char> bits;
    for (const Isa isa : isas()) {
      SCOPED_TRACE(to_string(isa));
      {
        Context ctx({.threads = 2, .isa = isa});
        layer.out.fill(0xA5);
        ASSERT_NO_FATAL_FAILURE(checker.check(ctx));
        // In s8 every ISA gives the same bits.
        if (form.w != DType::kS8 || isa == Isa::kScalar) bits = layer.out.content();
        ASSERT_EQ(layer.out.content(), bits);
      }
      for (const int threads : {1, 2, 3, 7}) {
        Context ctx({.threads = threads, .isa = isa});
        ASSERT_EQ(layer.run(ctx), bits) << "without stages, with " << threads << " workers";
      }
    }
  }
}

// Rows of several chunks, panels and tasks: every expert has some, all tokens are on one, and
// experts of many tokens beside those of few, which are worked on in another order than they lie.
TEST(MoeLayer, ManyTokens) {
  enum class Routing { kDrawn, kOneExpert, kSkewed };
  for (const Types& types : kTypes) {
    for (const Routing routing : {Routing::kDrawn, Routing::kOneExpert, Routing::kSkewed}) {
      if (routing == Routing::kOneExpert && types.x != DType::kF32) continue;
      Draw draw(3);
      Form form = {
          .x = types.x, .w = types.w, .T = 120, .H = 90, .I = 70, .E = 6, .K = 2, .S = 2, .Is = 40};
      Layer layer(draw, form);
      if (routing == Routing::kOneExpert) layer.ids.set_each([] { return 3.0f; });
      if (routing == Routing::kSkewed) {
        int slot = 0;  // tokens of experts 0 to 5: 105, 13, 0, 120, 0, 2
        layer.ids.set_each([&] {
          const int token = slot / 2;
          if (slot++ % 2 == 0) return 3.0f;
          return token < 2 ? 5.0f : token < 15 ? 1.0f : 0.0f;
        });
      }
      Checker checker(layer.call);
      for (const Isa isa : isas()) {
        SCOPED_TRACE(to_text(form) + " on " + to_string(isa));
        Context two({.threads = 2, .isa = isa});
        ASSERT_NO_FATAL_FAILURE(checker.check(two));
        const std::vector<char> bits = layer.out.content();
        for (const int threads : {1, 2, 3, 7}) {
          Context ctx({.threads = threads, .isa = isa});
          ASSERT_EQ(layer.run(ctx), bits) << "with " << threads << " workers";
        }
      }
    }
  }
}

// The experts' outputs, of more than 8 MiB, do not fit in the caches.
TEST(MoeLayer, ManyColumns) {
  for (const Types& types : {kTypes[0], kTypes[2]}) {
    Draw draw(4);
    Form form = {.x = types.x, .w = types.w, .T = 1100, .H = 1031, .I = 2, .E = 3, .K = 2};
    Layer layer(draw, form);
    Checker checker(layer.call);
    std::vector<Isa> rungs = {Isa::kScalar};
    if (machine().isa > Isa::kScalar) rungs.push_back(machine().isa);
    for (const Isa isa : rungs) {
      Context ctx({.threads = 3, .isa = isa});
      ASSERT_NO_FATAL_FAILURE(checker.check(ctx)) << to_text(form) << " on " << to_string(isa);
      const std::vector<char> bits = layer.out.content();
      EXPECT_TRUE(layer.run(ctx) == bits);
    }
  }
}

// The scratch that one token takes at the least, as the operator's refusal says.
int64_t least_scratch(Context& ctx, Layer& layer) {
  layer.call.args.scratch_limit = 1;
  const Status status = moe_layer(ctx, layer.call.packed, layer.call.args);
  layer.call.args.scratch_limit = 0;
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  const std::string message = status.message();
  const std::string start = "moe_layer: scratch_limit = 1 is less than the ";
  EXPECT_EQ(message.substr(0, start.size()), start);
  EXPECT_NE(message.find(" that one token takes"), std::string::npos) << message;
  return std::stoll(message.substr(start.size()));
}

TEST(MoeLayer, AScratchLimitCutsTheCallButNotTheResult) {
  for (const Types& types : kTypes) {
    for (const bool weight_on_input : {false, true}) {
      Draw draw(5);
      Form form = {.x = types.x,
                   .w = types.w,
                   .T = 37,
                   .H = 65,
                   .I = 40,
                   .E = 6,
                   .K = weight_on_input ? 1 : 3,
                   .S = 1,
                   .Is = 24,
                   .weight_on_input = weight_on_input,
                   .allow_masked = true,
                   .gap = 2};
      Layer layer(draw, form);
      SCOPED_TRACE(to_text(form));
      Checker checker(layer.call);
      for (const Isa isa : {Isa::kScalar, machine().isa}) {
        Context ctx({.threads = 2, .isa = isa});
        const std::vector<char> bits = layer.run(ctx);
        const int64_t least = least_scratch(ctx, layer);
        for (const int64_t limit :
             {least, least + 1, least * 5 / 4, least * 3 / 2, least * 2, least * 4, least * 100}) {
          layer.call.args.scratch_limit = limit;
          // A context of its own, whose scratch is what this limit leaves.
          Context fresh({.threads = 2, .isa = isa});
          ASSERT_EQ(layer.run(fresh), bits) << "with " << limit;
          ASSERT_NO_FATAL_FAILURE(checker.check(fresh, limit));
        }
        layer.call.args.scratch_limit = least - 1;
        layer.out.fill(0xA5);
        const std::vector<char> before = layer.out.content();
        test::expect_refused(moe_layer(ctx, layer.call.packed, layer.call.args),
                             "moe_layer: scratch_limit = " + std::to_string(least - 1) +
                                 " is less than the " + std::to_string(least) +
                                 " that one token takes");
        EXPECT_EQ(layer.out.content(), before);
        layer.call.args.scratch_limit = 0;
      }
    }
  }
}

// Scratch grows with T * K, not with T * E or E: thousands of experts take a few counters more.
TEST(MoeLayer, ScratchDoesNotGrowWithTheExperts) {
  int64_t least[2];
  for (const bool many : {false, true}) {
    Draw draw(6);
    Layer layer(draw, {.T = 4, .H = 8, .I = 4, .E = 2, .K = 2, .b13 = false, .b2 = false});
    if (many) {
      // Zeros, of which only what is used becomes memory.
      ASSERT_TRUE(
          PackedWeights::create({.experts = 20000, .n = 8, .k = 8, .role = WeightRole::kGateUp},
                                &layer.w13.packed)
              .ok());
      ASSERT_TRUE(PackedWeights::create({.experts = 20000, .n = 8, .k = 4}, &layer.w2.packed).ok());
      layer.ids.set(3, 1, 19999.0f);
    }
    Context ctx({.threads = 2});
    least[many ? 1 : 0] = least_scratch(ctx, layer);
    layer.run(ctx);
  }
  EXPECT_LE(least[1], least[0] + (16 << 10));
}

TEST(MoeLayer, ANonFiniteTokenStaysAlone) {
  for (const Types& types : kTypes) {
    for (const Isa isa : isas()) {
      Draw draw(7);
      Form form = {
          .x = types.x, .w = types.w, .T = 9, .H = 40, .I = 33, .E = 3, .K = 2, .S = 1, .Is = 8};
      Layer layer(draw, form);
      SCOPED_TRACE(to_text(form) + " on " + to_string(isa));
      Context ctx({.isa = isa});
      const std::vector<char> clean = layer.run(ctx);
      layer.x.set(1, 2, NAN);
      layer.x.set(4, 39, INFINITY);
      layer.weights.set(6, 0, NAN);
      layer.run(ctx);
      const int64_t row_bytes = form.H * size_of(form.x);
      for (int64_t t = 0; t < form.T; ++t) {
        const bool same =
            0 == std::memcmp(layer.out.row<char>(0) + t * row_bytes, clean.data() + t * row_bytes,
                             static_cast<size_t>(row_bytes));
        EXPECT_EQ(same, t != 1 && t != 4 && t != 6) << "token " << t;
        if (t == 1 || t == 6) {
          for (int64_t j = 0; j < form.H; ++j) EXPECT_TRUE(std::isnan(layer.out.get(t, j)));
        }
      }
    }
  }
}

TEST(MoeLayer, AWeightOfZeroMultiplies) {
  for (const Isa isa : isas()) {
    Draw draw(8);
    Layer layer(draw, {.T = 2, .H = 4, .I = 4, .E = 2, .K = 2});
    layer.ids.set_each([] { return 0.0f; });
    layer.weights.set_each([] { return 0.0f; });
    layer.b2.set(0, 1, INFINITY);
    Context ctx({.isa = isa});
    layer.run(ctx);
    EXPECT_TRUE(std::isnan(layer.out.get(1, 1))) << to_string(isa);
    EXPECT_EQ(layer.out.get(1, 2), 0.0f);
  }
}

TEST(MoeLayer, SameBitsConcurrentlyAndNested) {
  const SplitSmallCalls split;
  for (const Types& types : kTypes) {
    const auto make = [&] {
      Draw draw(17);
      return std::make_unique<Layer>(draw, Form{.x = types.x,
                                                .w = types.w,
                                                .T = 60,
                                                .H = 70,
                                                .I = 50,
                                                .E = 5,
                                                .K = 2,
                                                .S = 1,
                                                .Is = 20});
    };
    const auto original = make();
    SCOPED_TRACE(to_text(original->form));
    Context alone({.threads = 2});
    const std::vector<char> expected = original->run(alone);
    std::vector<std::unique_ptr<Layer>> layers;
    for (int i = 0; i < 3; ++i) layers.push_back(make());
    std::vector<std::thread> threads;
    for (const auto& layer : layers) {
      threads.emplace_back([&layer] {
        Context ctx({.threads = 2});
        for (int repeat = 0; repeat < 20; ++repeat) layer->run(ctx);
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const auto& layer : layers) EXPECT_EQ(layer->out.content(), expected);
#pragma omp parallel num_threads(3)
    {
      Context ctx({.threads = 2});
      layers[static_cast<size_t>(omp_get_thread_num())]->run(ctx);
    }
    for (const auto& layer : layers) EXPECT_EQ(layer->out.content(), expected);

    omp_set_dynamic(1);  // no more threads than CPUs
    Context many({.threads = 61});
    EXPECT_EQ(original->run(many), expected);
    omp_set_dynamic(0);
  }
}

// Once a shape was seen, nothing is allocated, whatever the routing; with the limit too.
TEST(MoeLayer, AllocatesNothingAfterTheFirstCall) {
  for (const Types& types : kTypes) {
    for (const int threads : {1, 2}) {
      for (const int64_t tokens : {1, 40}) {
        for (const bool limited : {false, true}) {
          Draw draw(19);
          Layer layer(draw, {.x = types.x,
                             .w = types.w,
                             .T = tokens,
                             .H = 130,
                             .I = 300,
                             .E = 8,
                             .K = 3,
                             .S = 1,
                             .Is = 40,
                             .allow_masked = true});
          Context ctx({.threads = threads});
          if (limited) layer.call.args.scratch_limit = 2 * least_scratch(ctx, layer);
          const int64_t before = test::allocation_count();
          ASSERT_TRUE(moe_layer(ctx, layer.call.packed, layer.call.args).ok());
          EXPECT_EQ(test::allocation_count() > before, test::kCountsAllocations);
          for (int i = 0; i < 20; ++i) {
            layer.route(draw);
            if (i % 5 == 0) {
              layer.ids.set_each([&] { return static_cast<float>(i % 8); });
            }
            const int64_t inside = test::allocation_count();
            const Status status = moe_layer(ctx, layer.call.packed, layer.call.args);
            ASSERT_EQ(test::allocation_count(), inside) << to_text(layer.form);
            ASSERT_TRUE(status.ok()) << status.message();
          }
        }
      }
    }
  }
}

// Every phase is counted, once, by every worker; and looking changes nothing.
TEST(MoeLayer, TellsItsPhases) {
  using moe_layer_internal::Phases;
  using Clock = std::chrono::steady_clock;
  const SplitSmallCalls split;
  for (const bool limited : {false, true}) {
    Draw draw(21);
    Layer layer(draw, {.x = DType::kF32,
                       .w = DType::kS8,
                       .T = 64,
                       .H = 130,
                       .I = 300,
                       .E = 8,
                       .K = 3,
                       .S = 1,
                       .Is = 40});
    Context ctx({.threads = 2});
    if (limited) layer.call.args.scratch_limit = 2 * least_scratch(ctx, layer);
    ASSERT_TRUE(moe_layer(ctx, layer.call.packed, layer.call.args).ok());
    const std::vector<char> unseen = layer.out.content();
    Phases phases[2];
    const auto start = Clock::now();
    ASSERT_TRUE(
        moe_layer_internal::moe_layer_in_phases(ctx, layer.call.packed, layer.call.args, phases)
            .ok());
    const double all = std::chrono::duration<double>(Clock::now() - start).count();
    EXPECT_EQ(layer.out.content(), unseen);
    EXPECT_GT(phases[0].routing, 0);
    EXPECT_EQ(phases[1].routing, 0) << "the caller's thread does it";
    Phases both;  // either worker may have had all tiles
    for (const Phases& p : phases) {
      EXPECT_GT(p.prepare, 0);
      EXPECT_GT(p.combine, 0);
      EXPECT_GT(p.waiting, 0);
      both.gate_up += p.gate_up;
      both.gate_up_epilogue += p.gate_up_epilogue;
      both.down += p.down;
      both.down_epilogue += p.down_epilogue;
      EXPECT_LE(p.routing + p.prepare + p.gate_up + p.gate_up_epilogue + p.down + p.down_epilogue +
                    p.combine + p.waiting,
                1.0001 * all);
    }
    EXPECT_GT(both.gate_up, 0);
    EXPECT_GT(both.gate_up_epilogue, 0);
    EXPECT_GT(both.down, 0);
    EXPECT_GT(both.down_epilogue, 0);
  }
}

// Sizes of zero in views whose data is null but whose rows have a stride, and a number of tokens
// without columns that no memory could describe one by one.
TEST(MoeLayer, EmptyViews) {
  for (const Types& types : kTypes) {
    for (const Isa isa : isas()) {
      Context ctx({.isa = isa});
      Draw draw(20);
      Form form = {.x = types.x,
                   .w = types.w,
                   .T = 5,
                   .H = 0,
                   .I = 12,
                   .E = 3,
                   .K = 1,
                   .weight_on_input = true};
      Layer layer(draw, form);
      layer.call.args.x = {nullptr, TensorLayout(types.x, {5, 0}, 9)};
      layer.call.args.out = {nullptr, TensorLayout(types.x, {5, 0}, 9)};
      Checker checker(layer.call);
      ASSERT_NO_FATAL_FAILURE(checker.check(ctx)) << to_text(form);
      EXPECT_TRUE(moe_layer(ctx, layer.call.packed, layer.call.args).ok());
    }
  }
  PackedWeights w13, w2;
  ASSERT_TRUE(PackedWeights::create({.experts = 1, .role = WeightRole::kGateUp}, &w13).ok());
  ASSERT_TRUE(PackedWeights::create({.experts = 1}, &w2).ok());
  const int64_t tokens = int64_t{1} << 61;
  MoeLayerArgs args;
  args.x = {nullptr, TensorLayout(DType::kF32, {tokens, 0})};
  args.expert_ids = {nullptr, TensorLayout(DType::kI32, {tokens, 0})};
  args.weights = {nullptr, TensorLayout(DType::kF32, {tokens, 0})};
  args.out = {nullptr, TensorLayout(DType::kF32, {tokens, 0})};
  Context ctx;
  EXPECT_TRUE(moe_layer(ctx, {.w13 = &w13, .w2 = &w2}, args).ok());
}

// The stages as members of their own, as the sweep wants them.
struct SweepArgs : MoeLayerArgs, MoeLayerStages {};

TEST(MoeLayerErrors, EveryViewIsChecked) {
  for (const Types& types : kTypes) {
    Draw draw(23);
    Layer layer(
        draw,
        {.x = types.x, .w = types.w, .T = 5, .H = 6, .I = 4, .E = 3, .K = 2, .S = 1, .Is = 3});
    SCOPED_TRACE(to_text(layer.form));
    const Stages stages = layer.call.stages(0);
    SweepArgs args;
    static_cast<MoeLayerArgs&>(args) = layer.call.args;
    static_cast<MoeLayerStages&>(args) = stages.views();
    const std::vector<test::InputView<SweepArgs>> inputs = {{"x", &SweepArgs::MoeLayerArgs::x},
                                                            {"expert_ids", &SweepArgs::expert_ids},
                                                            {"weights", &SweepArgs::weights},
                                                            {"b13", &SweepArgs::b13, false},
                                                            {"b2", &SweepArgs::b2, false}};
    std::vector<test::OutputView<SweepArgs>> outputs = {
        {"out", &SweepArgs::out},
        {"stage.h", &SweepArgs::h, false},
        {"stage.y", &SweepArgs::y, false},
        {"stage.shared", &SweepArgs::shared, false}};
    if (types.w == DType::kS8) {
      for (const auto& stage : {test::OutputView<SweepArgs>{"stage.x_q", &SweepArgs::x_q, false},
                                {"stage.x_scale", &SweepArgs::x_scale, false},
                                {"stage.h_q", &SweepArgs::h_q, false},
                                {"stage.h_scale", &SweepArgs::h_scale, false}}) {
        outputs.push_back(stage);
      }
    }
    Context ctx;
    test::sweep_contract<SweepArgs>(args, inputs, outputs, [&](const SweepArgs& a) {
      MoeLayerArgs call = a;
      call.stages = a;
      return moe_layer(ctx, layer.call.packed, call);
    });
  }
}

class MoeLayerRefusals : public testing::Test {
 protected:
  MoeLayerRefusals() : draw_(29) { make({}); }
  void make(Form form) {
    form.T = 5;
    form.H = 6;
    form.I = 4;
    form.E = 3;
    form.K = form.weight_on_input ? 1 : 2;
    layer_ = std::make_unique<Layer>(draw_, form);
  }
  MoeLayerArgs& args() { return layer_->call.args; }
  MoeLayerWeights& weights() { return layer_->call.packed; }
  void expect(const std::string& message) {
    layer_->out.fill(0xA5);
    const std::vector<char> before = layer_->out.content();
    test::expect_refused(moe_layer(ctx_, weights(), args()), "moe_layer: " + message);
    EXPECT_EQ(layer_->out.content(), before) << "out was written";
  }
  const PackedWeights* pack(const PackedWeightsForm& form) {
    packs_.push_back(std::make_unique<PackedWeights>());
    const Status status = PackedWeights::create(form, packs_.back().get());
    EXPECT_TRUE(status.ok()) << status.message();
    return packs_.back().get();
  }

  Draw draw_;
  std::unique_ptr<Layer> layer_;
  std::vector<std::unique_ptr<PackedWeights>> packs_;
  Context ctx_;
};

TEST_F(MoeLayerRefusals, ExpertIds) {
  layer_->ids.set(3, 1, 3.0f);
  expect("expert_ids[3,1] = 3 is not in [0, 3)");
  layer_->ids.set(3, 1, -1.0f);
  layer_->ids.set(4, 0, 77.0f);  // the first one is named
  expect("expert_ids[3,1] = -1 is not in [0, 3)");
  layer_->ids.set(4, 0, 0.0f);
  args().allow_masked = true;
  EXPECT_TRUE(moe_layer(ctx_, weights(), args()).ok());
  for (const float id : {4.0f, -2.0f}) {
    layer_->ids.set(3, 1, id);
    expect("expert_ids[3,1] = " + std::to_string(static_cast<int>(id)) +
           " is not in [0, 3), nor does it mask");
  }
  layer_->ids.row<int32_t>(3)[1] = INT32_MIN;
  expect("expert_ids[3,1] = -2147483648 is not in [0, 3), nor does it mask");
}

TEST_F(MoeLayerRefusals, Parameters) {
  args().weight_on_input = true;
  expect("weight_on_input is for K = 1, but K = 2 (from expert_ids)");
  args().weight_on_input = false;
  args().scratch_limit = -5;
  expect("scratch_limit = -5 is negative");
  args().scratch_limit = 0;
  test::expect_swiglu_refusals(args().swiglu,
                               [&](const std::string& wrong) { expect(wrong.c_str()); });
  args().swiglu.gate = Gate::kInterleaved;
  expect("w13 was packed with another gate layout than swiglu.gate");
}

TEST_F(MoeLayerRefusals, Dtypes) {
  std::vector<f16> halves(30);
  args().x = {halves.data(), {5, 6}};
  expect("x is f16, but w13 is f32");
  args().x = layer_->x.in();
  args().out = {halves.data(), {5, 6}};
  expect("out has dtype f16, which is not legal here");
  args().out = layer_->out.out();
  weights().w2 = pack({.dtype = DType::kBf16, .experts = 3, .n = 6, .k = 4});
  expect("w2 is bf16, but w13 is f32");
  make({.x = DType::kBf16, .w = DType::kBf16});
  args().x = {halves.data(), {5, 6}};
  expect("x is f16, but w13 is bf16");
  const float floats[30] = {};
  args().x = {floats, {5, 6}};
  expect("x is f32, but w13 is bf16");
}

TEST_F(MoeLayerRefusals, Weights) {
  const MoeLayerWeights good = weights();
  const PackedWeights nothing;
  weights().w13 = nullptr;
  expect("w13 is missing");
  weights().w13 = &nothing;
  expect("w13 is missing");
  weights() = good;
  weights().w2 = nullptr;
  expect("w2 is missing");
  weights().w2 = good.w13;
  expect("w2 is packed as gate and up, expected plain weights");
  weights() = good;
  weights().w13 = good.w2;
  expect("w13 is packed as plain weights, expected gate and up");
  weights() = good;
  weights().w2 = pack({.experts = 2, .n = 6, .k = 4});
  expect("w2 has E = 2, expected 3 (from w13)");
  weights().w2 = pack({.experts = 3, .n = 7, .k = 4});
  expect("w2 has N = 7, expected 6 (from w13)");
  weights().w2 = pack({.experts = 3, .n = 6, .k = 5});
  expect("w2 has K = 5, expected 4 (from w13)");
  weights() = good;
  weights().w13 = pack({.experts = 3, .n = 8, .k = 7, .role = WeightRole::kGateUp});
  expect("x.shape[1] = 6, expected H = 7 (from w13)");
  weights() = good;
  args().out = {static_cast<float*>(const_cast<void*>(good.w2->data())), {5, 6}};
  expect("output out overlaps input w2");
}

TEST_F(MoeLayerRefusals, SharedWeights) {
  make({.S = 2, .Is = 3});
  const MoeLayerWeights good = weights();
  weights().shared_w2 = nullptr;
  expect("shared_w2 is missing");
  weights() = good;
  weights().shared_w13 = nullptr;
  expect("shared_w13 is missing");
  weights() = good;
  weights().shared_w13 = pack({.experts = 2, .n = 6, .k = 5, .role = WeightRole::kGateUp});
  expect("shared_w13 has K = 5, expected 6 (from w13)");
  weights() = good;
  weights().shared_w2 = pack({.experts = 1, .n = 6, .k = 3});
  expect("shared_w2 has S = 1, expected 2 (from shared_w13)");
  weights().shared_w2 = pack({.experts = 2, .n = 5, .k = 3});
  expect("shared_w2 has N = 5, expected 6 (from w13)");
  weights().shared_w2 = pack({.experts = 2, .n = 6, .k = 4});
  expect("shared_w2 has K = 4, expected 3 (from shared_w13)");
  weights().shared_w2 = pack({.dtype = DType::kBf16, .experts = 2, .n = 6, .k = 3});
  expect("shared_w2 is bf16, but w13 is f32");
  // Experts without weights take no memory, so there may be any number of them.
  const int64_t many = int64_t{1} << 40;
  weights().shared_w13 = pack({.experts = many, .n = 0, .k = 6, .role = WeightRole::kGateUp});
  weights().shared_w2 = pack({.experts = many, .n = 6, .k = 0});
  expect("S * T = 1099511627776 * 5 is more than rows can be numbered");
  make({});
  float shared[30];
  args().stages.shared = {shared, {5, 6}};
  expect("stage.shared is given, but shared_w13 is missing");
}

TEST_F(MoeLayerRefusals, ScalesAndQuantisedStages) {
  int8_t bytes[60];
  float floats[60];
  args().stages.x_q = {bytes, {5, 6}};
  expect("stage.x_q is given, but the weights are not s8");
  args().stages = {};
  args().stages.x_scale = {floats, {5}};
  expect("stage.x_scale is given, but the weights are not s8");
  args().stages = {};
  args().stages.h_q = {bytes, {10, 4}};
  expect("stage.h_q is given, but the weights are not s8");
  args().stages = {};
  args().stages.h_scale = {floats, {10}};
  expect("stage.h_scale is given, but the weights are not s8");
  make({.w = DType::kS8, .S = 1, .Is = 3});
  const MoeLayerWeights good = weights();
  weights().w2 = pack({.dtype = DType::kS8, .experts = 3, .n = 6, .k = 4, .scales = false});
  expect("w2 has no scales");
  weights() = good;
  weights().shared_w13 = pack({.dtype = DType::kS8,
                               .experts = 1,
                               .n = 6,
                               .k = 6,
                               .role = WeightRole::kGateUp,
                               .scales = false});
  expect("shared_w13 has no scales");
}

// Sizes that no memory holds end as out_of_memory, not as a size that wrapped.
TEST_F(MoeLayerRefusals, ScratchThatOverflows) {
  PackedWeightsForm w13 = {.experts = 0, .n = 0, .k = 6, .role = WeightRole::kGateUp};
  for (const int64_t I : {int64_t{1} << 44, int64_t{1} << 54}) {
    w13.n = 2 * I;
    weights().w13 = pack(w13);
    weights().w2 = pack({.experts = 0, .n = 6, .k = I});
    args().b13 = args().b2 = {};
    args().allow_masked = true;
    layer_->ids.set_each([] { return -1.0f; });
    const Status status = moe_layer(ctx_, weights(), args());
    EXPECT_EQ(status.code(), StatusCode::kOutOfMemory) << status.message();
  }
}

}  // namespace
}  // namespace moeops

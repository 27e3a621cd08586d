// SPDX-License-Identifier: Apache-2.0
#include <moeops/fused/moe_layer.h>

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <optional>

#include "fused/moe_layer/kernels.h"
#include "fused/moe_layer/phases.h"
#include "ops/core/arg_check.h"
#include "ops/core/carver.h"
#include "ops/core/team.h"
#include "ops/grouped_matmul/gate_up_sink.h"
#include "ops/init_routing/slot_sort.h"
#include "ops/swiglu/check_swiglu.h"
#include "quant/dynamic_quant/kernels.h"

namespace moeops {

using namespace grouped_matmul_internal;  // NOLINT(google-build-using-namespace)
using moe_layer_internal::PhaseClock;
using moe_layer_internal::Phases;

namespace {

// What every part of a call reads.
struct Call {
  const MoeLayerArgs& args;
  const EpilogueKernels& epilogue;
  const dynamic_quant_internal::RowKernels& quantise;
  const moe_layer_internal::Kernels& kernels;
  DType dtype;  // of the weights
  int64_t H, K, E;
  int workers;
  bool streams_y;
  Phases* phases;  // of every worker, or null
};

// Rows of x as the GEMMs read them: x itself, or a copy that was weighted or quantised.
struct Tokens {
  RowFeed feed;              // but for its index
  uint8_t* q = nullptr;      // s8 weights: [T, H]
  float* scale = nullptr;    // [T]
  char* weighted = nullptr;  // weight_on_input with other weights: [T, H] of their dtype
};

// A set of experts and what they compute: the routed ones or the shared ones.
struct Experts {
  const PackedWeights* w13 = nullptr;
  const PackedWeights* w2 = nullptr;
  ConstTensorView b13, b2;
  const Tokens* tokens = nullptr;
  TileDriver gate_up, down;
  void* gate_up_scratch = nullptr;
  void* down_scratch = nullptr;
  int32_t* token_of_row = nullptr;  // null: row i is token i
  char* h = nullptr;                // [rows, I] bf16 for bf16 weights, else f32
  uint8_t* h_q = nullptr;           // [rows, I]
  float* h_scale = nullptr;         // [rows]
  float* y = nullptr;               // [rows, H]

  bool present() const { return w13 != nullptr; }
  int64_t intermediate() const { return w2->k(); }
  DType h_dtype() const { return w2->dtype() == DType::kBf16 ? DType::kBf16 : DType::kF32; }
};

// A row of a stage from s8 + 128.
void copy_u8(const TensorView& stage, int64_t row, const uint8_t* q, int64_t n) {
  if (!stage.present()) return;
  for (int64_t j = 0; j < n; ++j) stage.row<int8_t>(row)[j] = static_cast<int8_t>(q[j] - 128);
}

// The stages of the routed experts' rows, for the sinks below; absent ones cost nothing.
struct RowStages {
  const MoeLayerStages& stages;
  const int32_t* slot_of_row;
  int64_t first_slot;

  int64_t slot(int64_t row) const { return first_slot + slot_of_row[row]; }
};

// The first GEMM's results where stages are wanted.
class StagedGateUpSink final : public GateUpSink {
 public:
  StagedGateUpSink(Context& ctx, const GateUp& gate_up, const RowStages& stages)
      : GateUpSink(ctx, gate_up),
        h_q_(static_cast<const uint8_t*>(gate_up.q)),
        h_scale_(gate_up.scale),
        stages_(stages) {}

  void take(const TileResult& tile) override {
    GateUpSink::take(tile);
    if (!stages_.stages.h.present()) return;
    for (int r = 0; r < tile.rows; ++r) {
      float* h = stages_.stages.h.row<float>(stages_.slot(tile.row + r)) + first_column(tile);
      gate_rows(tile, r, 1, reinterpret_cast<char*>(h), 0, DType::kF32);
    }
  }

  void rows_complete(int64_t row, int64_t rows) override {
    GateUpSink::rows_complete(row, rows);
    if (h_scale_ == nullptr) return;
    for (int64_t i = row; i < row + rows; ++i) {
      const int64_t slot = stages_.slot(i);
      copy_u8(stages_.stages.h_q, slot, h_q_ + i * intermediate(), intermediate());
      if (stages_.stages.h_scale.present()) {
        stages_.stages.h_scale.row<float>(0)[slot] = h_scale_[i];
      }
    }
  }

 private:
  const uint8_t* h_q_;
  const float* h_scale_;
  const RowStages& stages_;
};

// sums -> y, a row for each row.
class OutputSink final : public TileSink {
 public:
  OutputSink(const Call& call, const Experts& experts, const RowStages* stages)
      : call_(call), experts_(experts), stages_(stages) {}

  void take(const TileResult& tile) override {
    const PackedWeights& w = *experts_.w2;
    const int64_t first = tile.panel * kPanelColumns;
    const int columns = static_cast<int>(std::min<int64_t>(call_.H - first, tile.width));
    alignas(64) int32_t room[kPanelColumns];
    const ColumnConstants constants =
        column_constants(w, tile.expert, tile.panel, experts_.b2, room);
    float* y = experts_.y + tile.row * call_.H + first;
    call_.epilogue.store(tile.c, tile.rows, columns, constants,
                         constants.sums != nullptr ? experts_.h_scale + tile.row : nullptr,
                         {.y = reinterpret_cast<char*>(y),
                          .stride = call_.H * int64_t{sizeof(float)},
                          .dtype = DType::kF32,
                          .streams = call_.streams_y});
    if (stages_ != nullptr && stages_->stages.y.present()) {
      for (int r = 0; r < tile.rows; ++r) {
        std::memcpy(stages_->stages.y.row<float>(stages_->slot(tile.row + r)) + first,
                    y + r * call_.H, static_cast<size_t>(columns) * sizeof(float));
      }
    }
  }

 private:
  const Call& call_;
  const Experts& experts_;
  const RowStages* stages_;
};

bool any_stage(const MoeLayerStages& s) {
  return s.x_q.present() || s.x_scale.present() || s.h.present() || s.h_q.present() ||
         s.h_scale.present() || s.y.present() || s.shared.present();
}

// The tokens [first, first + count) of a call, from gather to combine.
class Run {
 public:
  Run(Context& ctx, const Call& call, const MoeLayerWeights& weights, int64_t first, int64_t count)
      : ctx_(ctx), call_(call), first_(first), count_(count), rows_(count * call.K) {
    routed_.w13 = weights.w13;
    routed_.w2 = weights.w2;
    routed_.b13 = call.args.b13;
    routed_.b2 = call.args.b2;
    routed_.tokens = &tokens_;
    if (weights.shared_w13 != nullptr && weights.shared_w13->experts() > 0) {
      shared_.w13 = weights.shared_w13;
      shared_.w2 = weights.shared_w2;
      shared_.tokens = call.args.weight_on_input ? &plain_tokens_ : &tokens_;
    }
    ConstTensorView ids = call.args.expert_ids;
    ids.shape[0] = count;
    ids.data = ids.row<int32_t>(first);
    sort_.emplace(routing_internal::SlotChoices{.expert_ids = ids,
                                                .expert_count = call.E,
                                                .begin = 0,
                                                .end = call.E,
                                                .allow_masked = call.args.allow_masked},
                  1);
  }

  // Kernels and plans; after it, scratch_bytes() holds.
  Status prepare() {
    MOEOPS_RETURN_IF_ERROR(prepare_experts(routed_, rows_, std::min(call_.E, rows_)));
    if (shared_.present()) {
      MOEOPS_RETURN_IF_ERROR(
          prepare_experts(shared_, shared_.w13->experts() * count_, shared_.w13->experts()));
    }
    return {};
  }

  int64_t scratch_bytes() { return carve(nullptr); }

  void sort_slots(void* scratch) {
    carve(scratch);
    sort_->count(Team{});
    sort_->place(Team{}, {.capacity = 0,
                          .rows = sort_->slots(),
                          .row_of_slot = row_of_slot_,
                          .slot_of_row = slot_of_row_});
  }

  void work(const Team& team);
  // After sort_slots, before work.
  void add_groups();

 private:
  Status prepare_experts(Experts& experts, int64_t rows, int64_t groups) {
    MOEOPS_RETURN_IF_ERROR(
        experts.gate_up.prepare(ctx_, *experts.w13, rows, groups, call_.workers, true));
    return experts.down.prepare(ctx_, *experts.w2, rows, groups, call_.workers, false);
  }

  int64_t carve(void* scratch);
  void carve_experts(Carver& carver, Experts& experts, int64_t rows);
  void carve_tokens(Carver& carver, Tokens& tokens, bool weighted);
  void prepare_tokens(const Team& team, Tokens& tokens, bool weighted);
  void clear_stages(const Team& team);
  void combine(const Team& team);

  Context& ctx_;
  const Call& call_;
  const int64_t first_, count_, rows_;
  std::optional<routing_internal::SlotSort> sort_;
  Tokens tokens_, plain_tokens_;
  Experts routed_, shared_;
  int32_t* row_of_slot_ = nullptr;
  int32_t* slot_of_row_ = nullptr;
};

int64_t Run::carve(void* scratch) {
  Carver carver(scratch);
  row_of_slot_ = carver.take<int32_t>(rows_);
  slot_of_row_ = carver.take<int32_t>(rows_);
  char* sort_scratch = carver.take<char>(sort_->scratch_bytes());
  if (scratch != nullptr) sort_->set_scratch(sort_scratch);
  routed_.token_of_row = carver.take<int32_t>(rows_);
  carve_tokens(carver, tokens_, call_.args.weight_on_input);
  carve_experts(carver, routed_, rows_);
  if (shared_.present()) {
    const int64_t S = shared_.w13->experts();
    if (S > 1) shared_.token_of_row = carver.take<int32_t>(S * count_);
    if (call_.args.weight_on_input) carve_tokens(carver, plain_tokens_, false);
    carve_experts(carver, shared_, S * count_);
  }
  return carver.bytes();
}

void Run::carve_tokens(Carver& carver, Tokens& tokens, bool weighted) {
  if (call_.dtype == DType::kS8) {
    tokens.q = carver.take<uint8_t>(count_, call_.H);
    tokens.scale = carver.take<float>(count_);
    tokens.feed = {.data = reinterpret_cast<char*>(tokens.q), .stride = call_.H, .is_u8 = true};
    if (weighted) tokens.weighted = carver.take<char>(call_.workers, call_.H * 4);
  } else if (weighted) {
    const int64_t stride = call_.H * size_of(call_.dtype);
    tokens.weighted = carver.take<char>(count_, stride);
    tokens.feed = {.data = tokens.weighted, .stride = stride};
  } else {
    const ConstTensorView& x = call_.args.x;
    const int64_t stride = x.row_stride * size_of(x.dtype);
    tokens.feed = {.data = offset(static_cast<const char*>(x.data), first_ * stride),
                   .stride = stride};
  }
}

void Run::carve_experts(Carver& carver, Experts& experts, int64_t rows) {
  const int64_t I = experts.intermediate();
  experts.h = carver.take<char>(rows, I * size_of(experts.h_dtype()));
  if (call_.dtype == DType::kS8) {
    experts.h_q = carver.take<uint8_t>(rows, I);
    experts.h_scale = carver.take<float>(rows);
  }
  experts.y = carver.take<float>(rows, call_.H);
  experts.gate_up_scratch = carver.take<char>(experts.gate_up.scratch_bytes());
  experts.down_scratch = carver.take<char>(experts.down.scratch_bytes());
}

void Run::add_groups() {
  GroupStatistics statistics{.rows = sort_->slots()};
  for (int64_t g = 0; g < sort_->groups(); ++g) statistics.active += sort_->count(g) > 0 ? 1 : 0;
  for (TileDriver* driver : {&routed_.gate_up, &routed_.down}) {
    driver->start(driver == &routed_.gate_up ? routed_.gate_up_scratch : routed_.down_scratch,
                  statistics);
    for (int64_t g = 0; g < sort_->groups(); ++g) {
      if (sort_->count(g) > 0)
        driver->add_group(sort_->expert(g), sort_->first(g), sort_->count(g));
    }
    driver->deal();
  }
  if (!shared_.present()) return;
  const int64_t S = shared_.w13->experts();
  shared_.gate_up.start(shared_.gate_up_scratch, {S * count_, S});
  shared_.down.start(shared_.down_scratch, {S * count_, S});
  for (int64_t s = 0; s < S; ++s) {
    shared_.gate_up.add_group(s, s * count_, count_);
    shared_.down.add_group(s, s * count_, count_);
  }
  shared_.gate_up.deal();
  shared_.down.deal();
}

// This worker's share of `count` things.
struct Share {
  Share(const Team& team, int64_t count)
      : begin(count * team.worker / team.size), end(count * (team.worker + 1) / team.size) {}
  int64_t begin, end;
};

void Run::prepare_tokens(const Team& team, Tokens& tokens, bool weighted) {
  if (call_.dtype != DType::kS8 && !weighted) return;
  const ConstTensorView& x = call_.args.x;
  const bool stage = &tokens == &tokens_;
  const MoeLayerStages& stages = call_.args.stages;
  const Share share(team, count_);
  for (int64_t t = share.begin; t < share.end; ++t) {
    const char* row =
        offset(static_cast<const char*>(x.data), (first_ + t) * x.row_stride * size_of(x.dtype));
    DType dtype = x.dtype;
    if (weighted) {
      if (row_of_slot_[t] < 0) continue;  // K is 1; a masked slot's weight is not read
      char* to = call_.dtype == DType::kS8
                     ? tokens.weighted + team.worker * call_.H * int64_t{sizeof(float)}
                     : tokens.weighted + t * call_.H * size_of(call_.dtype);
      const DType to_dtype = call_.dtype == DType::kS8 ? DType::kF32 : call_.dtype;
      call_.kernels.weigh(row, dtype, call_.H, call_.args.weights.row<float>(first_ + t)[0], to,
                          to_dtype);
      row = to;
      dtype = to_dtype;
    }
    if (call_.dtype != DType::kS8) continue;
    uint8_t* q = tokens.q + t * call_.H;
    call_.quantise.u8.of(dtype)(row, nullptr, call_.H, q, tokens.scale + t);
    if (stage) copy_u8(stages.x_q, first_ + t, q, call_.H);
    if (stage && stages.x_scale.present()) {
      stages.x_scale.row<float>(0)[first_ + t] = tokens.scale[t];
    }
  }
}

// Rows of masked slots stay 0.
void Run::clear_stages(const Team& team) {
  const MoeLayerStages& s = call_.args.stages;
  const auto clear = [&](const TensorView& stage, int64_t first, int64_t rows) {
    if (!stage.present()) return;
    const Share share(team, rows);
    const int64_t element = size_of(stage.dtype);
    for (int64_t i = share.begin; i < share.end; ++i) {
      std::fill_n(offset(stage.row<char>(0), (first + i) * stage.row_stride * element),
                  stage.columns() * element, char{0});
    }
  };
  const auto clear_scales = [&](const TensorView& stage, int64_t first, int64_t rows) {
    if (!stage.present()) return;
    const Share share(team, rows);
    std::fill(stage.row<float>(0) + first + share.begin, stage.row<float>(0) + first + share.end,
              0.0f);
  };
  clear(s.x_q, first_, count_);
  clear_scales(s.x_scale, first_, count_);
  clear(s.h, first_ * call_.K, rows_);
  clear(s.h_q, first_ * call_.K, rows_);
  clear_scales(s.h_scale, first_ * call_.K, rows_);
  clear(s.y, first_ * call_.K, rows_);
}

void Run::combine(const Team& team) {
  const MoeLayerArgs& args = call_.args;
  const int64_t S = shared_.present() ? shared_.w13->experts() : 0;
  const Share share(team, count_);
  for (int64_t t = share.begin; t < share.end; ++t) {
    const moe_layer_internal::Combination combination = {
        .y = routed_.y,
        .rows = row_of_slot_ + t * call_.K,
        .next = t + 1 < share.end ? row_of_slot_ + (t + 1) * call_.K : nullptr,
        .weights = args.weight_on_input ? nullptr : args.weights.row<float>(first_ + t),
        .choices = call_.K,
        .shared = shared_.present() ? shared_.y + t * call_.H : nullptr,
        .shared_stride = count_ * call_.H,
        .shared_count = S,
        .columns = call_.H};
    const int64_t row = (first_ + t) * args.out.row_stride;
    call_.kernels.combine(combination, offset(args.out.row<char>(0), row * size_of(args.out.dtype)),
                          args.out.dtype);
    if (args.stages.shared.present()) {
      float* sum = args.stages.shared.row<float>(first_ + t);
      std::fill_n(sum, call_.H, 0.0f);
      for (int64_t s = 0; s < S; ++s) {
        for (int64_t j = 0; j < call_.H; ++j) {
          sum[j] = sum[j] + combination.shared[s * combination.shared_stride + j];
        }
      }
    }
  }
}

// A worker's part of a GEMM.
void multiply(TileDriver& driver, const Team& team, const RowFeed& feed, TileSink& sink,
              PhaseClock& clock, double Phases::*phase, double Phases::*epilogue,
              const TileDriver* source = nullptr) {
  if (!clock.runs()) {
    driver.work(team.worker, feed, sink, source);
    return;
  }
  moe_layer_internal::TimedSink timed(sink);
  driver.work(team.worker, feed, timed, source);
  clock.end(phase);
  clock.move(timed.seconds(), phase, epilogue);
}

void Run::work(const Team& team) {
  PhaseClock clock(call_.phases != nullptr ? call_.phases + team.worker : nullptr);
  const bool staged = any_stage(call_.args.stages);
  if (staged) {
    clear_stages(team);
    team.barrier();
  }
  prepare_tokens(team, tokens_, call_.args.weight_on_input);
  if (shared_.present() && call_.args.weight_on_input) prepare_tokens(team, plain_tokens_, false);
  const Share slots(team, sort_->slots());
  for (int64_t i = slots.begin; i < slots.end; ++i) {
    routed_.token_of_row[i] = static_cast<int32_t>(slot_of_row_[i] / call_.K);
  }
  if (shared_.token_of_row != nullptr) {
    const Share rows(team, shared_.w13->experts() * count_);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      shared_.token_of_row[i] = static_cast<int32_t>(i % count_);
    }
  }
  clock.end(&Phases::prepare);
  team.barrier();
  clock.end(&Phases::waiting);

  const RowStages stages{call_.args.stages, slot_of_row_, first_ * call_.K};
  const auto for_each_experts = [&](const auto& function) {
    function(routed_, staged ? &stages : nullptr);
    if (shared_.present()) function(shared_, nullptr);
  };
  for_each_experts([&](Experts& experts, const RowStages* row_stages) {
    RowFeed feed = experts.tokens->feed;
    feed.index = experts.token_of_row;
    const GateUp gate_up = {.weights = *experts.w13,
                            .bias = experts.b13,
                            .x_scale = experts.tokens->scale,
                            .x_scale_index = experts.token_of_row,
                            .swiglu = call_.args.swiglu,
                            .h = experts.h,
                            .h_dtype = experts.h_dtype(),
                            .q = experts.h_q,
                            .q_stride = experts.intermediate(),
                            .q_is_u8 = true,
                            .scale = experts.h_scale};
    const auto multiply_to = [&](GateUpSink& sink) {
      multiply(experts.gate_up, team, feed, sink, clock, &Phases::gate_up,
               &Phases::gate_up_epilogue);
    };
    if (row_stages != nullptr) {
      StagedGateUpSink sink(ctx_, gate_up, *row_stages);
      multiply_to(sink);
    } else {
      GateUpSink sink(ctx_, gate_up);
      multiply_to(sink);
    }
  });
  for_each_experts([&](Experts& experts, const RowStages* row_stages) {
    OutputSink sink(call_, experts, row_stages);
    const int64_t I = experts.intermediate();
    const RowFeed feed = call_.dtype == DType::kS8
                             ? RowFeed{.data = reinterpret_cast<const char*>(experts.h_q),
                                       .stride = I,
                                       .is_u8 = true}
                             : RowFeed{.data = experts.h, .stride = I * size_of(experts.h_dtype())};
    multiply(experts.down, team, feed, sink, clock, &Phases::down, &Phases::down_epilogue,
             &experts.gate_up);
  });
  call_.epilogue.fence();
  team.barrier();
  clock.end(&Phases::waiting);
  combine(team);
  clock.end(&Phases::combine);
}

void check_pack(ArgCheck& check, const char* name, const PackedWeights* pack, WeightRole role,
                const Gate* gate, DType dtype) {
  check.require(pack != nullptr && pack->packed(), "%s is missing", name);
  if (!check.ok()) return;
  check.require(pack->form().role == role, "%s is packed as %s", name,
                role == WeightRole::kPlain ? "gate and up, expected plain weights"
                                           : "plain weights, expected gate and up");
  check.require(gate == nullptr || pack->form().gate == *gate,
                "%s was packed with another gate layout than swiglu.gate", name);
  check.require(pack->dtype() == dtype, "%s is %s, but w13 is %s", name, to_string(pack->dtype()),
                to_string(dtype));
  check.require(dtype != DType::kS8 || pack->has_scales(), "%s has no scales", name);
  check.memory(name, pack->data(), pack->bytes());
}

void check_equal(ArgCheck& check, const char* pack, const char* what, int64_t size,
                 const Dim& dim) {
  check.require(size == dim.value, "%s has %s = %" PRId64 ", expected %" PRId64 " (from %s)", pack,
                what, size, dim.value, dim.from);
}

Status check_call(const MoeLayerWeights& weights, const MoeLayerArgs& args) {
  ArgCheck check("moe_layer");
  swiglu_internal::check_params(check, args.swiglu);
  const bool has_shared = weights.shared_w13 != nullptr || weights.shared_w2 != nullptr;
  const DType dtype = weights.w13 != nullptr ? weights.w13->dtype() : DType::kNone;
  check_pack(check, "w13", weights.w13, WeightRole::kGateUp, &args.swiglu.gate, dtype);
  check_pack(check, "w2", weights.w2, WeightRole::kPlain, nullptr, dtype);
  if (has_shared) {
    check_pack(check, "shared_w13", weights.shared_w13, WeightRole::kGateUp, &args.swiglu.gate,
               dtype);
    check_pack(check, "shared_w2", weights.shared_w2, WeightRole::kPlain, nullptr, dtype);
  }
  if (!check.ok()) return check.finish();

  Dim T{"T"}, K{"K"};
  Dim H{"H", weights.w13->k(), "w13"}, E{"E", weights.w13->experts(), "w13"};
  Dim width{"2I", weights.w13->n(), "w13"}, I{"I", weights.w13->n() / 2, "w13"};
  check.input("x", args.x, {DType::kF32, DType::kBf16, DType::kF16}, {T, H});
  check.input("expert_ids", args.expert_ids, {DType::kI32}, {T, K});
  check.input("weights", args.weights, {DType::kF32}, {T, K});
  check_equal(check, "w2", "E", weights.w2->experts(), E);
  check_equal(check, "w2", "N", weights.w2->n(), H);
  check_equal(check, "w2", "K", weights.w2->k(), I);
  check.require(dtype == DType::kS8 || args.x.dtype == dtype, "x is %s, but w13 is %s",
                to_string(args.x.dtype), to_string(dtype));
  check.optional_input("b13", args.b13, {DType::kF32}, {E, width});
  check.optional_input("b2", args.b2, {DType::kF32}, {E, H});
  if (has_shared) {
    const Dim S{"S", weights.shared_w13->experts(), "shared_w13"};
    const Dim Is{"Is", weights.shared_w13->n() / 2, "shared_w13"};
    check_equal(check, "shared_w13", "K", weights.shared_w13->k(), H);
    check_equal(check, "shared_w2", "S", weights.shared_w2->experts(), S);
    check_equal(check, "shared_w2", "N", weights.shared_w2->n(), H);
    check_equal(check, "shared_w2", "K", weights.shared_w2->k(), Is);
    int64_t rows = 0;
    check.require(
        !check.ok() || (!__builtin_mul_overflow(S.value, T.value, &rows) && rows <= INT32_MAX),
        "S * T = %" PRId64 " * %" PRId64 " is more than rows can be numbered", S.value, T.value);
    check.optional_output("stage.shared", args.stages.shared, {DType::kF32}, {T, H});
  } else {
    check.absent("stage.shared", args.stages.shared, "shared_w13 is missing");
  }
  check.output("out", args.out, {args.x.dtype}, {T, H});
  Dim N{"N", 0, "expert_ids"};
  if (check.ok()) {
    check.require(!__builtin_mul_overflow(T.value, K.value, &N.value) && N.value <= INT32_MAX,
                  "T * K = %" PRId64 " * %" PRId64 " is more than slots can be numbered", T.value,
                  K.value);
  }
  check.optional_output("stage.h", args.stages.h, {DType::kF32}, {N, I});
  check.optional_output("stage.y", args.stages.y, {DType::kF32}, {N, H});
  if (dtype == DType::kS8) {
    check.optional_output("stage.x_q", args.stages.x_q, {DType::kS8}, {T, H});
    check.optional_output("stage.x_scale", args.stages.x_scale, {DType::kF32}, {T});
    check.optional_output("stage.h_q", args.stages.h_q, {DType::kS8}, {N, I});
    check.optional_output("stage.h_scale", args.stages.h_scale, {DType::kF32}, {N});
  } else {
    check.absent("stage.x_q", args.stages.x_q, "the weights are not s8");
    check.absent("stage.x_scale", args.stages.x_scale, "the weights are not s8");
    check.absent("stage.h_q", args.stages.h_q, "the weights are not s8");
    check.absent("stage.h_scale", args.stages.h_scale, "the weights are not s8");
  }
  check.require(!args.weight_on_input || K.value == 1,
                "weight_on_input is for K = 1, but K = %" PRId64 " (from expert_ids)", K.value);
  check.require(args.scratch_limit >= 0, "scratch_limit = %" PRId64 " is negative",
                args.scratch_limit);
  const int64_t tokens_with_choices = K.value > 0 ? T.value : 0;
  for (int64_t t = 0; check.ok() && t < tokens_with_choices; ++t) {
    const int32_t* ids = args.expert_ids.row<int32_t>(t);
    for (int64_t k = 0; k < K.value; ++k) {
      const int64_t id = ids[k];
      if (static_cast<uint64_t>(id) < static_cast<uint64_t>(E.value)) continue;
      check.require(args.allow_masked && (id == -1 || id == E.value),
                    "expert_ids[%" PRId64 ",%" PRId64 "] = %" PRId64 " is not in [0, %" PRId64
                    ")%s",
                    t, k, id, E.value, args.allow_masked ? ", nor does it mask" : "");
    }
  }
  return check.finish();
}

}  // namespace

Status moe_layer(Context& ctx, const MoeLayerWeights& weights, const MoeLayerArgs& args) {
  return moe_layer_internal::moe_layer_in_phases(ctx, weights, args, nullptr);
}

Status moe_layer_internal::moe_layer_in_phases(Context& ctx, const MoeLayerWeights& weights,
                                               const MoeLayerArgs& args, Phases* phases) {
  PhaseClock clock(phases);
  MOEOPS_RETURN_IF_ERROR(ctx.status());
  MOEOPS_RETURN_IF_ERROR(check_call(weights, args));
  const int64_t T = args.x.dim(0);
  Call call = {.args = args,
               .epilogue = epilogue_kernels(ctx),
               .quantise = dynamic_quant_internal::row_kernels(ctx.isa()),
               .kernels = moe_layer_internal::kernels(ctx.isa()),
               .dtype = weights.w13->dtype(),
               .H = args.x.dim(1),
               .K = args.expert_ids.dim(1),
               .E = weights.w13->experts(),
               .workers = 1,
               .streams_y = outgrows_caches(T * args.expert_ids.dim(1),
                                            args.x.dim(1) * int64_t{sizeof(float)}),
               .phases = phases};
  // Nothing to write: without columns out is empty.
  if (T == 0 || (call.H == 0 && !any_stage(args.stages))) return {};
  const auto team_for_experts = [&](const PackedWeights* w13, const PackedWeights* w2,
                                    int64_t rows) {
    const int64_t bytes = w13->bytes() + w2->bytes();
    return team_for_rows(ctx, rows, bytes / std::max<int64_t>(w13->experts(), 1));
  };
  call.workers = team_for_experts(weights.w13, weights.w2, T * call.K);
  if (weights.shared_w13 != nullptr) {
    const int64_t rows = T * weights.shared_w13->experts();
    call.workers =
        std::max(call.workers, team_for_experts(weights.shared_w13, weights.shared_w2, rows));
  }

  // Halves of halves of the tokens, until a run fits the limit.
  int64_t run_tokens = T;
  for (;;) {
    Run run(ctx, call, weights, 0, run_tokens);
    MOEOPS_RETURN_IF_ERROR(run.prepare());
    const int64_t bytes = run.scratch_bytes();
    if (args.scratch_limit == 0 || bytes <= args.scratch_limit) break;
    if (run_tokens == 1) {
      return {StatusCode::kInvalidArgument,
              "moe_layer: scratch_limit = %" PRId64 " is less than the %" PRId64
              " that one token takes",
              args.scratch_limit, bytes};
    }
    run_tokens = (run_tokens + 1) / 2;
  }
  for (int64_t first = 0; first < T; first += run_tokens) {
    Run run(ctx, call, weights, first, std::min(run_tokens, T - first));
    MOEOPS_RETURN_IF_ERROR(run.prepare());
    void* scratch = nullptr;
    MOEOPS_RETURN_IF_ERROR(ctx.reserve_scratch(run.scratch_bytes(), &scratch));
    run.sort_slots(scratch);
    run.add_groups();
    clock.end(&Phases::routing);
    run_team(call.workers, [&](const Team& team) { run.work(team); });
    clock.restart();
  }
  return {};
}

}  // namespace moeops

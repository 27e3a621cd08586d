// SPDX-License-Identifier: Apache-2.0
#include "bench/opbench/row_bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "bench/opbench/gemm_data.h"
#include "bench/opbench/measure.h"
#include "tools/tensor_file/error.h"

namespace moeops::bench {

using tools::Error;

namespace {

constexpr int64_t kAlign = 64;

void check(const Status& status) {
  if (!status.ok()) throw Error(status.message());
}

double value_of(const ConstTensorView& view, int64_t row, int64_t column) {
  switch (view.dtype) {
    case DType::kF32:
      return static_cast<double>(view.row<float>(row)[column]);
    case DType::kBf16:
      return static_cast<double>(to_f32(view.row<bf16>(row)[column]));
    case DType::kF16:
      return static_cast<double>(to_f32(view.row<f16>(row)[column]));
    case DType::kS8:
      return view.row<int8_t>(row)[column];
    case DType::kI32:
      return view.row<int32_t>(row)[column];
    case DType::kI64:
      return static_cast<double>(view.row<int64_t>(row)[column]);
    default:
      return view.row<bool>(row)[column] ? 1 : 0;
  }
}

bool is_float(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBf16 || dtype == DType::kF16;
}

// Whole when the reference does it in no time, else rows of at least 4,096 outputs in all: the
// first, the last and seeded ones.
std::vector<Rows> samples_of(int64_t rows, int64_t outputs_per_row, uint64_t seed) {
  if (rows <= 64) return {{0, rows}};
  std::vector<Rows> samples = {{0, 1}, {rows - 1, 1}};
  std::mt19937_64 random(seed);
  const int64_t wanted = std::max<int64_t>(64, 4096 / std::max<int64_t>(outputs_per_row, 1) + 1);
  while (static_cast<int64_t>(samples.size()) < std::min(wanted, rows)) {
    samples.push_back({static_cast<int64_t>(random() % static_cast<uint64_t>(rows)), 1});
  }
  return samples;
}

// A mix of small numbers near that of the bytes, for LimitsMeter::copy_gbps.
struct Mix {
  int reads = 1;
  int writes = 1;
};
Mix mix_of(int64_t read_bytes, int64_t written_bytes) {
  const double ratio =
      static_cast<double>(std::max<int64_t>(read_bytes, 1)) / static_cast<double>(written_bytes);
  Mix best;
  double best_error = INFINITY;
  for (int smaller = 1; smaller <= 4; ++smaller) {
    const double other = static_cast<double>(smaller) * std::max(ratio, 1 / ratio);
    const int larger = std::min(static_cast<int>(std::lround(other)), 64);
    const double error = std::fabs(static_cast<double>(larger) - other) / other;
    // A finer mix has to be clearly nearer.
    if (error > best_error - 0.02) continue;
    best_error = error;
    best = ratio >= 1 ? Mix{larger, smaller} : Mix{smaller, larger};
  }
  return best;
}

DType dtype_named(const std::string& name) {
  return name == "bf16" ? DType::kBf16 : name == "f16" ? DType::kF16 : DType::kF32;
}

// What one load's sets and implementations came to.
class RowBench {
 public:
  RowBench(const Options& options, const LimitsMeter& meter, RowCase& the_case)
      : options_(options), meter_(meter), case_(the_case) {
    const int64_t set_bytes = std::max<int64_t>(case_.set_bytes(), 1);
    if (options.cold) sets_ = std::max<int64_t>(sets_, (cold_bytes() + set_bytes - 1) / set_bytes);
    sets_ = std::min(sets_, available_memory() / 5 * 3 / set_bytes);
    if (sets_ < 2) {
      throw Error(fmt::format("not enough memory for two sets of {} bytes", set_bytes));
    }
    cold_ = options.cold && sets_ * set_bytes >= cold_bytes();
    bench::check(HugeBuffer::allocate(sets_ * set_bytes, &buffer_));
    case_.place(buffer_.data(), sets_);
    mix_ = mix_of(case_.read_bytes(), case_.written_bytes());
  }

  void visit(Context* context, bool first_visit, Measured& m) {
    if (first_visit) {
      const double before = seconds_now();
      m.wrong = case_.verify(context, options_.seed);
      if (options_.explain) {
        m.explain.push_back(fmt::format(
            "reads {} bytes and writes {}, hence copies {}:{}; {} sets of {} bytes; two first "
            "calls and their verification {:.1f} ms",
            case_.read_bytes(), case_.written_bytes(), mix_.reads, mix_.writes, sets_,
            case_.set_bytes(), 1e3 * (seconds_now() - before)));
      }
    }
    if (!m.wrong.empty()) return;
    const auto read_limits = [&]() -> std::vector<double> {
      return {meter_.copy_gbps(mix_.reads, mix_.writes)};
    };
    int64_t set = 0;
    const auto timed_call = [&] {
      case_.bind(set, set, {0, case_.rows()});
      if (options_.cold) set = (set + 1) % sets_;
      const double start = seconds_now();
      const Status status = case_.run(context);
      const double seconds = seconds_now() - start;
      bench::check(status);
      return seconds;
    };
    measure(options_, read_limits, timed_call, m);
  }

  void fill_figures(const Measured& m, Result& r) const {
    fill_times(m, r);
    const auto bytes = static_cast<double>(case_.read_bytes() + case_.written_bytes());
    r.read_bytes = case_.read_bytes();
    r.written_bytes = case_.written_bytes();
    r.gbps = 1e-6 * bytes / r.median_ms;
    r.tokens_per_s = 1e3 * static_cast<double>(r.tokens) / r.median_ms;
    r.copy_gbps = m.limit(0);
    r.roofline_ms = 1e-6 * bytes / r.copy_gbps;
    r.roofline_fraction = r.roofline_ms / r.median_ms;
  }

  bool cold() const { return cold_; }

 private:
  const Options& options_;
  const LimitsMeter& meter_;
  RowCase& case_;
  int64_t sets_ = 2;
  bool cold_ = false;
  HugeBuffer buffer_;
  Mix mix_;
};

std::vector<Result> run_rows(const std::string& name, MakeRowCase make, const Options& options,
                             const LimitsMeter& meter, const Progress& progress) {
  const Isa isa = isa_of(options);
  const std::vector<std::string> variants =
      options.variants.empty() ? std::vector<std::string>{""} : options.variants;
  std::vector<Result> results;
  for (const std::string& variant : variants) {
    for (const int64_t tokens : options.tokens) {
      const RowLoad load = {options.problem, tokens, dtype_named(options.dtype), variant,
                            options.routing->expert_ids(tokens, options.problem.experts,
                                                        options.problem.top_k, options.seed)};
      progress(fmt::format("{} {}: {} tokens", name, variant, tokens));
      const std::unique_ptr<RowCase> the_case = make(load);
      RowBench bench(options, meter, *the_case);
      std::vector<Measured> measured(options.impls.size());
      Context context({.threads = options.threads, .isa = options.isa});
      check(context.status());
      visit_forth_and_back(options.impls.size(), [&](size_t i, bool forth) {
        progress(fmt::format("{} {}: {} tokens, {}", name, variant, tokens, options.impls[i]));
        bench.visit(options.impls[i] == "ref" ? nullptr : &context, forth, measured[i]);
      });
      const std::vector<int64_t> counts = load.counts();
      for (size_t i = 0; i < options.impls.size(); ++i) {
        const Measured& m = measured[i];
        Result r;
        r.op = name;
        r.problem = options.problem.name;
        r.tokens = tokens;
        r.rows = the_case->rows();
        r.experts = options.problem.experts;
        r.active_experts =
            std::count_if(counts.begin(), counts.end(), [](int64_t n) { return n > 0; });
        r.dtype = options.dtype;
        r.variant = variant;
        r.routing = options.routing->text();
        r.impl = options.impls[i];
        r.impl_detail = r.impl == "ref" ? "naive, one thread" : to_string(isa);
        r.isa = to_string(isa);
        r.threads = options.threads;
        r.weights = bench.cold() ? "cold" : "warm";
        r.verified = m.wrong.empty();
        r.wrong = m.wrong;
        r.explain = m.explain;
        r.repro = common_repro(options, r);
        if (r.verified) bench.fill_figures(m, r);
        results.push_back(std::move(r));
      }
    }
  }
  return results;
}

}  // namespace

std::vector<int64_t> RowLoad::counts() const {
  std::vector<int64_t> counts(static_cast<size_t>(problem.experts));
  for (const int32_t id : expert_ids) ++counts[static_cast<size_t>(id)];
  return counts;
}

std::vector<int32_t> RowLoad::sorted_rows() const {
  const std::vector<int64_t> counted = counts();
  std::vector<int64_t> next(counted.size());
  std::exclusive_scan(counted.begin(), counted.end(), next.begin(), int64_t{0});
  std::vector<int32_t> rows;
  for (const int32_t id : expert_ids) {
    rows.push_back(static_cast<int32_t>(next[static_cast<size_t>(id)]++));
  }
  return rows;
}

Tolerance rounded_to(DType dtype) {
  // A unit in the last place of the 16-bit types, whose rounding may fall the other way.
  const double relative = dtype == DType::kF32 ? 1e-5 : dtype == DType::kBf16 ? 0x1p-7 : 0x1p-10;
  return {relative, 1e-6};
}

RowCase::Id RowCase::add(const char* name, const TensorLayout& layout, Tolerance tolerance,
                         std::function<void(void*)> fill) {
  Tensor tensor{name, layout, set_bytes_, tolerance, std::move(fill)};
  (tensor.fill ? read_bytes_ : written_bytes_) += tensor.bytes();
  set_bytes_ += (tensor.bytes() + kAlign - 1) / kAlign * kAlign;
  tensors_.push_back(std::move(tensor));
  return tensors_.size() - 1;
}

RowCase::Id RowCase::floats(const char* name, const TensorLayout& layout, float scale) {
  const auto seed = static_cast<uint32_t>(tensors_.size() + 1) * 0x51ED270Bu;
  return add(name, layout, {}, [=](void* to) {
    const int64_t count = layout.rows() * layout.columns();
#pragma omp parallel for
    for (int64_t i = 0; i < count; ++i) {
      const float value = scale * value_at(seed, static_cast<uint32_t>(i));
      if (layout.dtype == DType::kF32) static_cast<float*>(to)[i] = value;
      if (layout.dtype == DType::kBf16) static_cast<bf16*>(to)[i] = to_bf16(value);
      if (layout.dtype == DType::kF16) static_cast<f16*>(to)[i] = to_f16(value);
    }
  });
}

RowCase::Id RowCase::integers(const char* name, const TensorLayout& layout, int32_t scale) {
  const auto seed = static_cast<uint32_t>(tensors_.size() + 1) * 0x51ED270Bu;
  return add(name, layout, {}, [=](void* to) {
    const int64_t count = layout.rows() * layout.columns();
#pragma omp parallel for
    for (int64_t i = 0; i < count; ++i) {
      static_cast<int32_t*>(to)[i] = static_cast<int32_t>(static_cast<float>(scale) *
                                                          value_at(seed, static_cast<uint32_t>(i)));
    }
  });
}

RowCase::Id RowCase::output(const char* name, const TensorLayout& layout, Tolerance tolerance) {
  return add(name, layout, tolerance, nullptr);
}

TensorView RowCase::view(Id tensor, int64_t set) const {
  const Tensor& t = tensors_[tensor];
  return {memory_ + set * set_bytes_ + t.offset, t.layout};
}

TensorView RowCase::view(Id tensor, int64_t set, Rows rows) const {
  const TensorView whole = view(tensor, set);
  const int64_t each = whole.dim(0) / rows_;
  return slice(whole, rows.first * each, rows.count * each);
}

void RowCase::place(void* memory, int64_t sets) {
  memory_ = static_cast<char*>(memory);
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (tensors_[i].fill) tensors_[i].fill(view(i, 0).data);
  }
#pragma omp parallel for schedule(dynamic)
  for (int64_t set = 1; set < sets; ++set) {
    std::memcpy(memory_ + set * set_bytes_, memory_, static_cast<size_t>(set_bytes_));
  }
}

void RowCase::fill_outputs(int64_t set, int byte) {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (tensors_[i].fill) continue;
    std::memset(view(i, set).data, byte, static_cast<size_t>(tensors_[i].bytes()));
  }
}

// The outputs of sets 0 and 1, made from different garbage.
std::string RowCase::unwritten() const {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Tensor& t = tensors_[i];
    if (t.fill) continue;
    const ConstTensorView first = view(i, 0);
    const auto* a = static_cast<const char*>(first.data);
    const auto* b = static_cast<const char*>(view(i, 1).data);
    const int64_t columns = std::max<int64_t>(t.layout.columns(), 1);
    const auto place = [&](int64_t element) {
      return fmt::format("{}[{},{}]", t.name, element / columns, element % columns);
    };
    if (const auto at = std::mismatch(a, a + t.bytes(), b).first; at != a + t.bytes()) {
      return fmt::format("{} is not written, or not the same in two calls",
                         place((at - a) / size_of(t.layout.dtype)));
    }
    if (!is_float(t.layout.dtype)) continue;
    for (int64_t element = 0; element < t.layout.rows() * columns; ++element) {
      if (!std::isfinite(value_of(first, element / columns, element % columns))) {
        return fmt::format("{} is not finite", place(element));
      }
    }
  }
  return {};
}

std::string RowCase::verify(Context* context, uint64_t seed) {
  int64_t outputs = 0;
  for (const Tensor& t : tensors_) {
    if (!t.fill) outputs += t.layout.rows() * t.layout.columns();
  }
  for (const int set : {0, 1}) {
    fill_outputs(set, set == 0 ? 0x55 : 0xAA);
    bind(0, set, {0, rows_});
    if (const Status status = run(context); !status.ok()) return status.message();
  }
  if (std::string wrong = unwritten(); !wrong.empty()) return wrong;
  return check(samples_of(rows_, outputs / rows_, seed));
}

std::string RowCase::check(const std::vector<Rows>& samples) {
  for (const Rows rows : samples) {
    bind(0, 1, rows);
    if (const Status status = run(nullptr); !status.ok()) return status.message();
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const Tensor& t = tensors_[i];
      if (t.fill) continue;
      const std::string wrong =
          compare(t.name, view(i, 0, rows), view(i, 1, rows), t.tolerance, rows.first);
      if (!wrong.empty()) return wrong;
    }
  }
  return {};
}

TensorView slice(TensorView tensor, int64_t first, int64_t count) {
  const int64_t stride = tensor.rank == 1 ? 1 : tensor.row_stride;
  tensor.data = static_cast<char*>(tensor.data) + first * stride * size_of(tensor.dtype);
  tensor.shape[0] = count;
  if (tensor.rank == 1) tensor.row_stride = count;
  return tensor;
}

std::string compare(const std::string& name, const ConstTensorView& got,
                    const ConstTensorView& want, Tolerance tolerance, int64_t first_row) {
  for (int64_t row = 0; row < got.rows(); ++row) {
    for (int64_t column = 0; column < got.columns(); ++column) {
      const double a = value_of(got, row, column);
      const double b = value_of(want, row, column);
      if (std::fabs(a - b) <= tolerance.absolute + tolerance.relative * std::fabs(b)) continue;
      if (got.rank == 1) {
        return fmt::format("{}[{}] = {:.9g}, expected {:.9g}", name, first_row + column, a, b);
      }
      return fmt::format("{}[{},{}] = {:.9g}, expected {:.9g}", name, first_row + row, column, a,
                         b);
    }
  }
  return {};
}

Operator row_operator(const char* name, const std::vector<std::string>& dtypes,
                      const std::vector<std::string>& variants, MakeRowCase make) {
  return {.name = name,
          .dtypes = dtypes,
          .variants = variants,
          .impls =
              [](const std::string&, Isa) {
                return std::vector<std::string>{"moeops", "ref"};
              },
          .tokens = "1,64,4096",
          .run =
              [name = std::string(name), make](const Options& options, const LimitsMeter& meter,
                                               const Progress& progress) {
                return run_rows(name, make, options, meter, progress);
              }};
}

}  // namespace moeops::bench

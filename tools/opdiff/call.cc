// SPDX-License-Identifier: Apache-2.0
#include "tools/opdiff/call.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "tools/tensor_file/error.h"

namespace moeops::tools {

namespace {

// What an output holds before the call. As f32, f16 and bf16 it is NaN and as an integer nothing
// that a result would be by accident, so that an element that was never written is seen.
constexpr std::byte kPattern{0xFF};

TensorLayout layout_of(DType dtype, const std::vector<int64_t>& shape) {
  TensorLayout layout;
  layout.dtype = dtype;
  layout.rank = static_cast<int>(shape.size());
  for (size_t i = 0; i < std::min<size_t>(shape.size(), TensorLayout::kMaxRank); ++i) {
    layout.shape[i] = shape[i];
  }
  if (!shape.empty()) layout.row_stride = shape.back();
  return layout;
}

}  // namespace

Call::Call(const Case& c, Impl impl, Context& context, bool all_outputs)
    : case_(c),
      impl_(impl),
      context_(context),
      params_(c.name, c.params),
      all_outputs_(all_outputs) {}

ConstTensorView Call::in(const char* name) {
  used_inputs_.insert(name);
  const Tensor* tensor = case_.input(name);
  if (tensor == nullptr) return {};
  const DType dtype = to_dtype(tensor->dtype);
  if (dtype == DType::kNone) {
    throw Error(fmt::format("{}: in.{} has dtype {}, which no operator takes", case_.name, name,
                            to_string(tensor->dtype)));
  }
  return {tensor->data.data(), layout_of(dtype, tensor->shape)};
}

int64_t Call::dim(const char* name, int i) const {
  const Tensor* tensor = case_.input(name);
  const auto d = static_cast<size_t>(i);
  return tensor == nullptr || d >= tensor->shape.size() ? 0 : tensor->shape[d];
}

TensorView Call::out(const char* name, DType dtype, std::initializer_list<int64_t> shape) {
  std::vector<int64_t> sizes(shape);
  for (int64_t& size : sizes) size = std::max<int64_t>(size, 0);
  const std::optional<FileDType> file_dtype = to_file_dtype(dtype);
  const std::optional<int64_t> bytes = byte_count(file_dtype.value(), sizes);
  if (!bytes.has_value() || *bytes > int64_t{1} << 40) {
    throw Error(
        fmt::format("{}: out.{} {} would be too large", case_.name, name, shape_text(sizes)));
  }

  Output output;
  output.tensor.dtype = *file_dtype;
  output.tensor.shape = sizes;
  output.tensor.data.assign(static_cast<size_t>(*bytes), kPattern);
  if (const Tensor* before = case_.input(name); before != nullptr) {
    used_inputs_.insert(name);
    if (before->dtype != *file_dtype || before->shape != sizes) {
      throw Error(fmt::format("{}: in.{} is {} {}, but the output it is for is {} {}", case_.name,
                              name, to_string(before->dtype), shape_text(before->shape),
                              to_string(*file_dtype), shape_text(sizes)));
    }
    output.tensor.data = before->data;
  }
  output.before = output.tensor.data;
  outputs_.emplace_back(name, std::move(output));
  return {outputs_.back().second.tensor.data.data(), layout_of(dtype, sizes)};
}

TensorView Call::optional_out(const char* name, DType dtype, std::initializer_list<int64_t> shape) {
  if (all_outputs_ || case_.output(name) != nullptr) return out(name, dtype, shape);
  return {};
}

void Call::set_defined_rows(const char* name, int64_t rows) {
  for (auto& [key, output] : outputs_) {
    if (key == name) output.defined_rows = rows;
  }
}

const Call::Output* Call::output(const std::string& name) const {
  for (const auto& [key, output] : outputs_) {
    if (key == name) return &output;
  }
  return nullptr;
}

void Call::check_all_used() const {
  params_.check_all_used();
  for (const auto& [name, tensor] : case_.inputs) {
    if (!used_inputs_.contains(name)) {
      throw Error(fmt::format("{}: in.{} is not an input of {}", case_.name, name, case_.op));
    }
  }
  for (const auto& [name, tensor] : case_.outputs) {
    if (output(name) == nullptr) {
      throw Error(fmt::format("{}: out.{} is not an output of {}", case_.name, name, case_.op));
    }
  }
}

Maker::Maker(Case& c, std::map<std::string, int64_t> dims, DType dtype, uint64_t seed)
    : case_(c), dims_(std::move(dims)), dtype_(dtype), params_(c.name, c.params), random_(seed) {}

int64_t Maker::dim(const char* name) {
  used_.insert(name);
  const auto it = dims_.find(name);
  if (it == dims_.end()) {
    throw Error(fmt::format("{} needs the size {}: --dims {}=...", case_.op, name, name));
  }
  return it->second;
}

int64_t Maker::dim(const char* name, int64_t fallback) {
  used_.insert(name);
  const auto it = dims_.find(name);
  return it == dims_.end() ? fallback : it->second;
}

int64_t Maker::parameter(const char* name, const char* size) {
  if (!params_.has(name)) {
    const int64_t value = dim(size);
    case_.params[name] = value;
    params_ = Params(case_.name, case_.params);
    return value;
  }
  const int64_t value = params_.integer(name, 0);
  if (const int64_t given = dim(size, value); given != value) {
    throw Error(fmt::format("--dims {}={}, but params.{} = {}", size, given, name, value));
  }
  return value;
}

void Maker::normal(const char* name, DType dtype, std::vector<int64_t> shape, float deviation,
                   float mean) {
  Tensor tensor(to_file_dtype(dtype).value(), std::move(shape));
  std::normal_distribution<float> distribution(mean, deviation);
  const auto fill = [&]<class T>(T* data, auto convert) {
    for (int64_t i = 0; i < tensor.numel(); ++i) data[i] = convert(distribution(random_));
  };
  if (dtype == DType::kF32) {
    fill(reinterpret_cast<float*>(tensor.data.data()), [](float v) { return v; });
  } else if (dtype == DType::kBf16) {
    fill(reinterpret_cast<bf16*>(tensor.data.data()), [](float v) { return to_bf16(v); });
  } else if (dtype == DType::kF16) {
    fill(reinterpret_cast<f16*>(tensor.data.data()), [](float v) { return to_f16(v); });
  } else {
    throw Error(
        fmt::format("{}: --dtype {} is not a floating-point type", case_.op, to_string(dtype)));
  }
  case_.inputs.emplace_back(name, std::move(tensor));
}

void Maker::uniform(const char* name, std::vector<int64_t> shape, float low, float high) {
  Tensor tensor(FileDType::kF32, std::move(shape));
  std::uniform_real_distribution<float> distribution(low, high);
  auto* data = reinterpret_cast<float*>(tensor.data.data());
  for (int64_t i = 0; i < tensor.numel(); ++i) data[i] = distribution(random_);
  case_.inputs.emplace_back(name, std::move(tensor));
}

void Maker::integers(const char* name, DType dtype, std::vector<int64_t> shape, int64_t low,
                     int64_t high) {
  const Tensor sized(to_file_dtype(dtype).value(), shape);
  std::uniform_int_distribution<int64_t> distribution(low, high);
  std::vector<int64_t> drawn(static_cast<size_t>(sized.numel()));
  for (int64_t& value : drawn) value = distribution(random_);
  values(name, dtype, std::move(shape), drawn);
}

void Maker::expert_ids(const char* name, int64_t T, int64_t K, int64_t E) {
  if (K > E) throw Error(fmt::format("{}: K = {} experts of E = {}", case_.op, K, E));
  std::vector<int64_t> experts(static_cast<size_t>(std::max<int64_t>(E, 0)));
  std::iota(experts.begin(), experts.end(), 0);
  std::vector<int64_t> ids;
  for (int64_t t = 0; t < T; ++t) {
    std::shuffle(experts.begin(), experts.end(), random_);
    ids.insert(ids.end(), experts.begin(), experts.begin() + K);
  }
  values(name, DType::kI32, {T, K}, ids);
}

std::vector<int64_t> Maker::counts(int64_t groups, int64_t total) {
  std::vector<int64_t> rows(static_cast<size_t>(std::max<int64_t>(groups, 0)));
  if (rows.empty()) return rows;
  std::uniform_int_distribution<size_t> group(0, rows.size() - 1);
  for (int64_t i = 0; i < total; ++i) ++rows[group(random_)];
  return rows;
}

void Maker::values(const char* name, DType dtype, std::vector<int64_t> shape,
                   const std::vector<int64_t>& values) {
  Tensor tensor(to_file_dtype(dtype).value(), std::move(shape));
  for (size_t i = 0; i < values.size(); ++i) {
    const auto bytes = static_cast<size_t>(size_of(tensor.dtype));
    // Little-endian, as the files are: the low bytes come first.
    std::memcpy(tensor.data.data() + i * bytes, &values[i], bytes);
  }
  case_.inputs.emplace_back(name, std::move(tensor));
}

void Maker::tolerance(const char* name, const Tolerance& tolerance) {
  case_.tolerance.insert_or_assign(name, tolerance);
}

void Maker::check_sizes_used() const {
  for (const auto& [name, size] : dims_) {
    if (!used_.contains(name)) {
      throw Error(fmt::format("--dims {}={}: {} has no such size", name, size, case_.op));
    }
  }
}

}  // namespace moeops::tools

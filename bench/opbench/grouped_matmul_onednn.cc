// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <omp.h>

#include <bit>
#include <dnnl.hpp>
#include <map>
#include <set>

#include "bench/opbench/grouped_matmul_impls.h"
#include "tools/tensor_file/error.h"

namespace moeops::bench {

namespace {

using dnnl::memory;
using tools::Error;
using Tag = memory::format_tag;

dnnl::cpu_isa onednn_isa(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return dnnl::cpu_isa::sse41;  // it has nothing below
    case Isa::kAvx2:
      return dnnl::cpu_isa::avx2;
    case Isa::kAvx512:
      return dnnl::cpu_isa::avx512_core;
    case Isa::kAvx512Vnni:
      return dnnl::cpu_isa::avx512_core_vnni;
    case Isa::kAvx512Bf16:
      return dnnl::cpu_isa::avx512_core_bf16;
    case Isa::kAmx:
      break;
  }
  return dnnl::cpu_isa::all;
}

memory::data_type type_of(DType dtype) {
  return dtype == DType::kF32    ? memory::data_type::f32
         : dtype == DType::kBf16 ? memory::data_type::bf16
                                 : memory::data_type::s8;
}

// to[i] = bf16(scale * from[i]) of finite values, without a branch for NaN: vectors throughout.
__attribute__((always_inline)) inline void scale_row_body(const float* from, float scale, int64_t n,
                                                          bf16* to) {
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = std::bit_cast<uint32_t>(scale * from[i]);
    to[i].bits = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
}
void scale_row(const float* from, float scale, int64_t n, bf16* to) {
  scale_row_body(from, scale, n, to);
}
#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw"))) void scale_row_avx512(const float* from, float scale,
                                                                  int64_t n, bf16* to) {
  scale_row_body(from, scale, n, to);
}
#endif

// What one writes with oneDNN: weights in the layout that it asks for, and a matmul for each
// expert. Scales of the columns are constants of the primitive, since given at run time they lead
// to a slow kernel; for scales of the rows oneDNN has only its reference code, so they take a pass
// of our own. Primitives are made at the first call with a row count.
class OneDnn final : public GroupedMatmulImpl {
 public:
  explicit OneDnn(Isa isa) {
    // Only the first choice of a process counts; detail() says what it is.
    (void)dnnl_set_max_cpu_isa(static_cast<dnnl_cpu_isa_t>(onednn_isa(isa)));
    isa_ = isa;
    engine_ = dnnl::engine(dnnl::engine::kind::cpu, 0);
    stream_ = dnnl::stream(engine_);
  }

  std::string name() const override { return "onednn"; }

  std::string detail() const override {
    const dnnl_version_t* version = dnnl::version();
    return fmt::format(
        "{}.{}.{}, one matmul an expert: {}{}; held to {}", version->major, version->minor,
        version->patch, fmt::join(chosen_, ", "),
        form_.has_value() && form_->has_scales() ? ", then a pass for the row scales" : "",
        to_string(isa_));
  }

  void load(const WeightValues& values, int64_t experts, int threads) override {
    form_.emplace(values.form());
    values_.emplace(values);
    threads_before_ = omp_get_max_threads();
    threads_ = threads;
    omp_set_num_threads(threads);
    const dnnl::matmul::primitive_desc typical(description(64, any_weights()), attributes(),
                                               engine_);
    weights_desc_ = typical.weights_desc();
    expert_bytes_ = (static_cast<int64_t>(weights_desc_.get_size()) + 63) / 64 * 64;
    const Status status = HugeBuffer::allocate(experts * expert_bytes_, &buffer_);
    if (!status.ok()) throw Error(status.message());

    // In memory an expert is [n, k]; to oneDNN weights are [k, n].
    const memory::desc plain_desc({form_->k, form_->n}, type_of(form_->x), Tag::ba);
    std::vector<char> plain(static_cast<size_t>(form_->expert_bytes()));
    memory plain_memory(plain_desc, engine_, plain.data());
    memory packed(weights_desc_, engine_, buffer_.data());
    const dnnl::reorder reorder(plain_memory, packed);
    for (int64_t e = 0; e < experts; ++e) {
      values.fill_expert(e, plain.data());
      packed.set_data_handle(expert(e));
      reorder.execute(stream_, plain_memory, packed);
      stream_.wait();
    }
  }

  void unload() override {
    matmuls_.clear();
    buffer_ = HugeBuffer();
    unscaled_ = {};
    omp_set_num_threads(threads_before_);
  }

  void run(const GemmCall& call) override {
    try {
      const char* x = static_cast<const char*>(call.x);
      char* y = static_cast<char*>(call.y);
      // Rows that wait for their scales: of as many experts as stay in cache until then.
      int64_t waiting = 0;
      int64_t done = 0;
      for (const Group& group : call.groups) {
        if (form_->has_scales()) {
          const auto needed = static_cast<size_t>((waiting + group.rows) * form_->n);
          if (unscaled_.size() < needed) unscaled_.resize(needed);
          multiply(group, x, reinterpret_cast<char*>(unscaled_.data() + waiting * form_->n));
          waiting += group.rows;
          if (waiting * form_->n >= kUnscaled || &group == &call.groups.back()) {
            scale_rows(waiting, call.x_scale + done, static_cast<bf16*>(call.y) + done * form_->n);
            done += waiting;
            waiting = 0;
          }
        } else {
          multiply(group, x, y);
        }
        x += group.rows * form_->k * size_of(form_->x);
        y += group.rows * form_->n * size_of(form_->y);
      }
      stream_.wait();
    } catch (const dnnl::error& error) {
      throw Error(fmt::format("onednn: {}", error.what()));
    }
  }

 private:
  static constexpr int64_t kUnscaled = 1 << 18;   // values, 1 MiB
  static constexpr int64_t kWorthTeam = 1 << 15;  // values, some microseconds of one thread

  struct Matmul {
    dnnl::matmul primitive;
    memory x, weights, y;
  };
  void scale_rows(int64_t rows, const float* scales, bf16* y) const {
    auto* scale_one = scale_row;
#if defined(__x86_64__)
    if (isa_ >= Isa::kAvx512) scale_one = scale_row_avx512;
#endif
    const int64_t n = form_->n;
#pragma omp parallel for num_threads(threads_) if (rows * n >= kWorthTeam)
    for (int64_t row = 0; row < rows; ++row) {
      scale_one(unscaled_.data() + row * n, scales[row], n, y + row * n);
    }
  }

  memory::desc any_weights() const { return {{form_->k, form_->n}, type_of(form_->x), Tag::any}; }
  dnnl::matmul::desc description(int64_t rows, const memory::desc& weights) const {
    const DType y = form_->has_scales() ? DType::kF32 : form_->y;
    return {memory::desc({rows, form_->k}, type_of(form_->x), Tag::ab), weights,
            memory::desc({rows, form_->n}, type_of(y), Tag::ab)};
  }
  dnnl::primitive_attr attributes() const {
    dnnl::primitive_attr attributes;
    if (form_->has_scales()) attributes.set_output_scales(1 << 1, values_->scales());
    return attributes;
  }
  char* expert(int64_t e) const { return static_cast<char*>(buffer_.data()) + e * expert_bytes_; }

  Matmul& matmul_of(int64_t rows) {
    if (const auto it = matmuls_.find(rows); it != matmuls_.end()) return it->second;
    const dnnl::matmul::primitive_desc chosen(description(rows, weights_desc_), attributes(),
                                              engine_);
    chosen_.insert(chosen.impl_info_str());
    Matmul matmul{dnnl::matmul(chosen), memory(chosen.src_desc(), engine_, DNNL_MEMORY_NONE),
                  memory(chosen.weights_desc(), engine_, DNNL_MEMORY_NONE),
                  memory(chosen.dst_desc(), engine_, DNNL_MEMORY_NONE)};
    return matmuls_.emplace(rows, std::move(matmul)).first->second;
  }

  void multiply(const Group& group, const char* x, char* y) {
    Matmul& matmul = matmul_of(group.rows);
    matmul.x.set_data_handle(const_cast<char*>(x));
    matmul.weights.set_data_handle(expert(group.expert));
    matmul.y.set_data_handle(y);
    matmul.primitive.execute(
        stream_,
        {{DNNL_ARG_SRC, matmul.x}, {DNNL_ARG_WEIGHTS, matmul.weights}, {DNNL_ARG_DST, matmul.y}});
  }

  Isa isa_;
  dnnl::engine engine_;
  dnnl::stream stream_;
  std::optional<GemmForm> form_;
  std::optional<WeightValues> values_;
  int threads_ = 1;
  int threads_before_ = 1;
  memory::desc weights_desc_;
  int64_t expert_bytes_ = 0;
  HugeBuffer buffer_;
  std::map<int64_t, Matmul> matmuls_;  // by rows
  std::vector<float> unscaled_;
  std::set<std::string> chosen_;
};

}  // namespace

std::unique_ptr<GroupedMatmulImpl> make_onednn_grouped_matmul(Isa isa) {
  return std::make_unique<OneDnn>(isa);
}

}  // namespace moeops::bench

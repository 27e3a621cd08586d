// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/huge_buffer.h>
#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>

#include <cstdint>

namespace moeops {

// The weights of E experts, [E, N, K], in the order in which the kernels read them; owned.
//
// LAYOUT (version 1), f32
//   Each expert is a row of panels: 64 output columns wide, the last one 32, 48 or 64, whatever
//   holds the rest (columns beyond N are zero). A panel is [K][width]: the weights of one k for
//   all its columns are adjacent, so that a kernel streams it from front to back. The same layout
//   serves every ISA. Experts start on 64-byte boundaries.
//
// Errors: a failed call leaves *out, or the expert, as it was.
// Thread-safety: reading is safe from any number of threads; so is packing different experts at
// once. Nothing else points into the object: replacing an expert needs no more than that no call
// is using it.
class PackedWeights {
 public:
  static constexpr int kLayoutVersion = 1;
  static constexpr int kPanelColumns = 64;

  PackedWeights() = default;

  // All experts zero, to be packed one at a time: a model is loaded without a second copy of it.
  // dtype: f32. invalid_argument: a negative size, or a product that overflows; unsupported: other
  // dtypes; out_of_memory.
  static Status create(DType dtype, int64_t experts, int64_t n, int64_t k, PackedWeights* out);

  // w: f32 [N, K], or [K, N] with transpose_w; rows may be strided.
  Status pack_expert(int64_t expert, const ConstTensorView& w, bool transpose_w = false);

  // create and pack_expert for all experts of w: f32 [E, N, K], or [E, K, N] with transpose_w;
  // on all workers of the context.
  static Status pack(Context& ctx, const ConstTensorView& w, bool transpose_w, PackedWeights* out);

  DType dtype() const { return dtype_; }  // none: nothing is packed here
  int64_t experts() const { return experts_; }
  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  int64_t bytes() const { return buffer_.size(); }

  // --- for kernels ---
  int64_t panels() const { return (n_ + kPanelColumns - 1) / kPanelColumns; }
  // The padded width of a panel; every panel before it is kPanelColumns wide.
  int panel_width(int64_t panel) const;
  const float* panel(int64_t expert, int64_t panel) const {
    return static_cast<const float*>(buffer_.data()) + expert * expert_stride_ +
           panel * kPanelColumns * k_;
  }
  const void* data() const { return buffer_.data(); }

 private:
  void pack_panel(int64_t expert, int64_t panel, const float* w, int64_t column_stride,
                  int64_t k_stride);

  DType dtype_ = DType::kNone;
  int64_t experts_ = 0;
  int64_t n_ = 0;
  int64_t k_ = 0;
  int64_t expert_stride_ = 0;  // in elements
  HugeBuffer buffer_;
};

}  // namespace moeops

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/huge_buffer.h>
#include <moeops/ops/core/params.h>
#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>

#include <array>
#include <cstdint>
#include <utility>

namespace moeops {

class ArgCheck;

// What a pack is for. A gate-and-up pack holds [E, 2I, K], whose output columns pass through SwiGLU
// in pairs; it brings gate and up of the same place into one panel, whatever order they came in.
enum class WeightRole : uint8_t { kPlain = 0, kGateUp = 1 };

// What is packed, and how.
struct PackedWeightsForm {
  DType dtype = DType::kF32;  // f32, bf16 or s8
  int64_t experts = 0;        // E
  int64_t n = 0;              // output channels; 2I with kGateUp
  int64_t k = 0;              // input channels
  WeightRole role = WeightRole::kPlain;
  Gate gate = Gate::kLeft;  // where the gate lies in the source's 2I channels; kGateUp only
  bool scales = true;  // every channel has one; s8 only. Without: products can leave as i32 only
};

// The weights of E experts, [E, N, K], in the order in which the kernels read them; owned.
//
// LAYOUT (version 2), the same for every ISA
//   An expert is a row of panels of kPanelColumns = 64 output columns; the last one is 32, 48 or 64
//   wide, whatever holds the rest (columns beyond N are zero). K is padded with zeros to whole
//   chunks of 64 bytes. A panel is [K / group][width][group], `group` being the elements of 4
//   bytes: 1 f32, 2 bf16 or 4 s8. So the dot instructions of every dtype and ISA find a column's
//   operands side by side, a kernel streams a panel from front to back, and one chunk of a 64-wide
//   panel is 16 rows of 256 bytes = 4 KiB whatever the dtype. kGateUp: a panel holds 32 gate
//   columns, then the 32 up columns that belong to them; the last one 16 + 16 or 32 + 32. s8:
//   behind the panels, in panel order and as wide as the panels: a scale (f32) for each column,
//   then the sum of each column's weights (i32). Columns beyond N have 0; so have all scales of a
//   pack without scales.
//   Experts start on 64-byte boundaries and are alike, so that one is loaded or replaced alone.
//
// QUANTISATION, s8 from a float source, in f32: max = max |w[n]|, scale[n] = max / 127, q =
//   clamp(rint(w * (127 / max)), -127, 127), where a NaN (0 * inf, of a max below 2^-121) becomes
//   0; a zero channel has scale 0 and q 0; one that is not finite has scale NaN and q 0. An s8
//   source brings its scales, and may hold -128. All of it is the same on every ISA, bit for bit.
//
// MEMORY: packing needs no memory beside the pack; a source is read once, a quantised one twice.
//
// ERRORS: a failed call leaves *out, or the expert, as it was. invalid_argument: a malformed view,
//   sizes that disagree or whose product overflows, k > 65536 in s8 (its sums would not be exact),
//   an odd n with kGateUp, a source that the dtype cannot be made from, scales that are missing or
//   that nothing asks for, a source in the expert's own memory, a mapped pack; out_of_memory.
// THREAD-SAFETY: reading is safe from any number of threads; so is packing different experts at
//   once. Nothing else points into the object: replacing an expert needs no more than that no call
//   is using it.
class PackedWeights {
 public:
  static constexpr int kLayoutVersion = 2;
  static constexpr int kPanelColumns = 64;
  static constexpr int kChunkBytes = 64;

  PackedWeights() = default;

  PackedWeights(PackedWeights&& other) noexcept { *this = std::move(other); }
  PackedWeights& operator=(PackedWeights&& other) noexcept;

  // All experts zero, to be packed one at a time: a model is loaded without a second copy of it.
  static Status create(const PackedWeightsForm& form, PackedWeights* out);

  // w: [N, K], or [K, N] with transpose_w; rows may be strided. f32 is made from f32, bf16 or f16;
  // bf16 from the same, rounded; s8 from the same, quantised, or from s8. w_scale: f32 [N], in the
  // order of w's channels, or [1] for all of them; given with an s8 w if the form has scales, and
  // then only. Floats are quantised into a form with scales.
  Status pack_expert(int64_t expert, const ConstTensorView& w, bool transpose_w = false,
                     const ConstTensorView& w_scale = {});

  // The same of gate and up apart, as most model files have them: each [I, K], or [K, I] with
  // transpose_w; scales [I] or [1] each. kGateUp only; form.gate says nothing about them.
  Status pack_expert_halves(int64_t expert, const ConstTensorView& gate, const ConstTensorView& up,
                            bool transpose_w = false, const ConstTensorView& gate_scale = {},
                            const ConstTensorView& up_scale = {});

  // create and pack_expert for all experts, on all workers of the context. w: [E, N, K], or
  // [E, K, N] with transpose_w; w_scale: [E, N], or [1] for all; or all without the E for one
  // expert. form.experts, n and k are taken from w, and form.scales is whether there will be any:
  // an s8 w may come without.
  static Status pack(Context& ctx, PackedWeightsForm form, const ConstTensorView& w,
                     bool transpose_w, const ConstTensorView& w_scale, PackedWeights* out);
  // The same in w's own dtype, plain, without scales.
  static Status pack(Context& ctx, const ConstTensorView& w, bool transpose_w, PackedWeights* out);

  // Writes the pack to a file: beside it first, then renamed, so that `path` is the old file or the
  // whole new one. invalid_argument: nothing is packed, or the file cannot be written.
  Status save(const char* path) const;
  // Maps a saved pack: read-only, shared between processes, paged in on first use; no expert of it
  // can be replaced. The file may be renamed or removed meanwhile, but not be written to or cut.
  // invalid_argument: no such file, not a pack, another layout version, a size that is not right.
  // The weights themselves are not verified.
  static Status map(const char* path, PackedWeights* out);

  const PackedWeightsForm& form() const { return form_; }
  DType dtype() const { return packed() ? form_.dtype : DType::kNone; }  // none: nothing is packed
  int64_t experts() const { return form_.experts; }
  int64_t n() const { return form_.n; }
  int64_t k() const { return form_.k; }
  bool has_scales() const { return form_.scales; }
  int64_t bytes() const { return form_.experts * expert_bytes_; }
  bool packed() const { return panels_ >= 0; }

  // --- for kernels ---
  int64_t panels() const { return panels_; }
  int64_t k_chunks() const { return k_chunks_; }
  // The padded width of a panel; every panel before the last is kPanelColumns wide.
  int panel_width(int64_t panel) const { return panel + 1 < panels_ ? kPanelColumns : last_width_; }
  int64_t panel_bytes() const { return k_chunks_ * kChunkBytes * kPanelColumns; }  // but the last
  const char* panel(int64_t expert, int64_t panel) const {
    return data_ + expert * expert_bytes_ + panel * panel_bytes();
  }
  // [padded N] in panel order, from the first column of `panel` on; s8 only.
  const float* scales(int64_t expert, int64_t panel) const {
    return reinterpret_cast<const float*>(data_ + expert * expert_bytes_ + scales_offset_) +
           panel * kPanelColumns;
  }
  const int32_t* column_sums(int64_t expert, int64_t panel) const {
    return reinterpret_cast<const int32_t*>(data_ + expert * expert_bytes_ + sums_offset_) +
           panel * kPanelColumns;
  }
  const void* data() const { return data_; }

  // Channels of the source that became adjacent columns of a panel.
  struct ChannelRun {
    int column;       // the first one
    int count;        // the panel's columns that no run has are zero
    int64_t channel;  // the first one
    int64_t step;     // from channel to channel
  };
  // Both runs of a panel; the second is empty in a plain one.
  std::array<ChannelRun, 2> channels(int64_t panel) const;

 private:
  struct Source;

  Status lay_out(const PackedWeightsForm& form);  // everything but the memory
  void check_expert(ArgCheck& check, int64_t expert) const;
  void check_matrix(ArgCheck& check, const char* name, const ConstTensorView& w, int64_t channels,
                    bool transposed, const char* scale_name, const ConstTensorView& scale) const;
  void pack_panels(int64_t expert, Source source, Isa isa);
  void pack_panel(int64_t expert, int64_t panel, const Source& source);

  PackedWeightsForm form_;
  int64_t panels_ = -1;
  int64_t k_chunks_ = 0;
  int last_width_ = 0;
  int64_t expert_bytes_ = 0;
  int64_t scales_offset_ = 0;
  int64_t sums_offset_ = 0;
  HugeBuffer buffer_;     // the weights, or a mapped file
  char* data_ = nullptr;  // the weights in buffer_
  bool read_only_ = false;
};

}  // namespace moeops

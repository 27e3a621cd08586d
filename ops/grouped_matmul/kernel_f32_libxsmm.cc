// SPDX-License-Identifier: Apache-2.0
#include <libxsmm.h>

#include <cstdint>
#include <memory>
#include <new>

#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

namespace {

// libxsmm is column-major: its A, m x k, is our panel read as columns of `width`; its B, k x n, is
// rows of x as they lie; its C, m x n, is our tile.
using Gemm = libxsmm_smmfunction_reducebatch_strd;

constexpr int kWidths[] = {32, 48, 64};
constexpr int width_index(int width) { return width / 16 - 2; }

struct Code {
  Gemm units[3][kTileRows + 1];  // a batch of kBlockUnit k's, by width and rows
  Gemm rest[3][kTileRows + 1];   // what is left of K after them
};

Gemm make(int width, int rows, int64_t k, int64_t x_stride) {
  const auto lda = static_cast<libxsmm_blasint>(width);
  const auto ldb = static_cast<libxsmm_blasint>(x_stride);
  const libxsmm_blasint ldc = kTileColumns;
  const float alpha = 1;
  const float beta = 1;
  const int flags = LIBXSMM_GEMM_FLAG_NONE;
  const int prefetch = LIBXSMM_GEMM_PREFETCH_NONE;
  const auto bytes = static_cast<libxsmm_blasint>(k * static_cast<int64_t>(sizeof(float)));
  return libxsmm_smmdispatch_reducebatch_strd(width, rows, static_cast<libxsmm_blasint>(k),
                                              bytes * width, bytes, &lda, &ldb, &ldc, &alpha, &beta,
                                              &flags, &prefetch);
}

bool make_all(const TileForm& form, Code* code) {
  const int64_t rest = form.k % kBlockUnit;
  for (const int width : kWidths) {
    if (width != kTileColumns && width != form.last_width) continue;
    for (int rows = 1; rows <= kTileRows; ++rows) {
      Gemm& units = code->units[width_index(width)][rows];
      Gemm& last = code->rest[width_index(width)][rows];
      // libxsmm refuses rows that lie closer together than they are long.
      if (form.k >= kBlockUnit) units = make(width, rows, kBlockUnit, form.x_stride);
      if (rest > 0) last = make(width, rows, rest, form.x_stride);
      if ((form.k >= kBlockUnit && units == nullptr) || (rest > 0 && last == nullptr)) return false;
    }
  }
  return true;
}

bool prepare(Context& ctx, const TileForm& form, const void** code) {
  // The code holds x_stride, K's rest and the widths, so they are the key; libxsmm's sizes are
  // 32 bits, with which to spare.
  if (form.x_stride >= int64_t{1} << 31) return false;
  // LIBXSMM_TARGET may have lowered the level it generates code for.
  if (libxsmm_get_target_archid() < LIBXSMM_X86_AVX512_CORE) return false;
  const auto key =
      static_cast<uint64_t>(form.x_stride) << 16 | static_cast<uint64_t>(form.k % kBlockUnit) << 8 |
      static_cast<uint64_t>(form.k >= kBlockUnit) << 7 | static_cast<uint64_t>(form.last_width);
  std::shared_ptr<const void>* cached = ctx.cached_code(&kWidths, key);
  if (cached == nullptr) return false;
  if (*cached == nullptr) {
    try {
      auto made = std::make_shared<Code>();
      if (!make_all(form, made.get())) return false;
      *cached = std::move(made);
    } catch (const std::bad_alloc&) {
      return false;
    }
  }
  *code = cached->get();
  return true;
}

void run(const void* code, const Tile& tile) {
  const auto& gemms = *static_cast<const Code*>(code);
  const int width = width_index(tile.width);
  unsigned long long units = static_cast<unsigned long long>(tile.k / kBlockUnit);
  if (units > 0) gemms.units[width][tile.rows](tile.panel, tile.x, tile.c, &units);
  if (tile.k % kBlockUnit != 0) {
    const int64_t done = tile.k / kBlockUnit * kBlockUnit;
    const unsigned long long one = 1;
    gemms.rest[width][tile.rows](tile.panel + done * tile.width, tile.x + done, tile.c, &one);
  }
}

}  // namespace

extern const TileKernel kernel_f32_libxsmm;
const TileKernel kernel_f32_libxsmm = {"libxsmm", Isa::kAvx512, prepare, run};

}  // namespace moeops::grouped_matmul_internal

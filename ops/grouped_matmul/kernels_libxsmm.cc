// SPDX-License-Identifier: Apache-2.0
#include <libxsmm.h>

#include <cstdint>
#include <memory>
#include <new>

#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

namespace {

// libxsmm is column-major: its A, m x k, is a panel's chunk, in groups of 4 bytes as its low
// precision wants them; its B, k x n, is the chunk of a block of rows; its C, m x n, is the tile.
// One batch-reduce call goes through all chunks.
constexpr int kRowBlock = 6;
constexpr int kTileRows = 8 * kRowBlock;
constexpr int kWidths[] = {32, 48, 64};
constexpr int width_index(int width) { return width / 16 - 2; }

// What one dtype calls its functions, and the level that it must generate code for: LIBXSMM_TARGET
// may have lowered it.
struct F32 {
  using Gemm = libxsmm_smmfunction_reducebatch_strd;
  static constexpr int kElements = 16;  // of a chunk
  static constexpr int kFlags = LIBXSMM_GEMM_FLAG_NONE;
  static constexpr int kTarget = LIBXSMM_X86_AVX512_CORE;
  static constexpr auto dispatch = libxsmm_smmdispatch_reducebatch_strd;
  using Scalar = float;
  using A = float;
  using B = float;
  using C = float;
};
struct Bf16 {
  using Gemm = libxsmm_bsmmfunction_reducebatch_strd;
  static constexpr int kElements = 32;
  static constexpr int kFlags = LIBXSMM_GEMM_FLAG_VNNI_A;
  static constexpr int kTarget = LIBXSMM_X86_AVX512_CPX;
  static constexpr auto dispatch = libxsmm_bsmmdispatch_reducebatch_strd;
  using Scalar = float;
  using A = libxsmm_bfloat16;
  using B = libxsmm_bfloat16;
  using C = float;
};
struct S8 {
  using Gemm = libxsmm_subimmfunction_reducebatch_strd;
  static constexpr int kElements = 64;
  static constexpr int kFlags = LIBXSMM_GEMM_FLAG_VNNI_A;
  static constexpr int kTarget = LIBXSMM_X86_AVX512_CLX;
  static constexpr auto dispatch = libxsmm_subimmdispatch_reducebatch_strd;
  using Scalar = int;
  using A = char;
  using B = unsigned char;
  using C = int;
};

template <class Type>
struct Code {
  // By width, accumulate and rows.
  typename Type::Gemm gemms[3][2][kRowBlock + 1];
};

template <class Type>
bool make_all(int last_width, Code<Type>* code) {
  const typename Type::Scalar alpha = 1;
  const libxsmm_blasint ldb = Type::kElements;
  const libxsmm_blasint ldc = kPanelColumns;
  const int flags = Type::kFlags;
  const int prefetch = LIBXSMM_GEMM_PREFETCH_NONE;
  for (const int width : kWidths) {
    if (width != kPanelColumns && width != last_width) continue;
    const libxsmm_blasint lda = width;
    for (int accumulate = 0; accumulate < 2; ++accumulate) {
      const auto beta = static_cast<typename Type::Scalar>(accumulate);
      for (int rows = 1; rows <= kRowBlock; ++rows) {
        typename Type::Gemm& gemm = code->gemms[width_index(width)][accumulate][rows];
        gemm = Type::dispatch(width, rows, Type::kElements, kChunkGroups * width * 4,
                              kRowBlock * kChunkBytes, &lda, &ldb, &ldc, &alpha, &beta, &flags,
                              &prefetch);
        if (gemm == nullptr) return false;
      }
    }
  }
  return true;
}

template <class Type>
bool prepare(Context& ctx, const TileForm& form, const void** code) {
  static const char owner = 0;
  if (libxsmm_get_target_archid() < Type::kTarget) return false;
  std::shared_ptr<const void>* cached =
      ctx.cached_code(&owner, static_cast<uint64_t>(form.last_width));
  if (cached == nullptr) return false;
  if (*cached == nullptr) {
    try {
      auto made = std::make_shared<Code<Type>>();
      if (!make_all(form.last_width, made.get())) return false;
      *cached = std::move(made);
    } catch (const std::bad_alloc&) {
      return false;
    }
  }
  *code = cached->get();
  return true;
}

template <class Type>
void run(const void* code, const Tile& tile) {
  const auto& gemms =
      static_cast<const Code<Type>*>(code)->gemms[width_index(tile.width)][tile.accumulate];
  const auto chunks = static_cast<unsigned long long>(tile.k_chunks);
  auto* c = static_cast<typename Type::C*>(tile.c);
  const char* x = tile.x;
  for (int row = 0; row < tile.rows; row += kRowBlock) {
    const int rows = tile.rows - row < kRowBlock ? tile.rows - row : kRowBlock;
    gemms[rows](reinterpret_cast<const typename Type::A*>(tile.panel),
                reinterpret_cast<const typename Type::B*>(x), c, &chunks);
    x += tile.x_block_bytes;
    c += kRowBlock * kPanelColumns;
  }
}

}  // namespace

#define MOEOPS_LIBXSMM_KERNEL(symbol, Type, of_dtype, at_isa) \
  extern const TileKernel symbol;                             \
  const TileKernel symbol = {.name = "libxsmm",               \
                             .dtype = of_dtype,               \
                             .isa = at_isa,                   \
                             .row_block = kRowBlock,          \
                             .tile_rows = kTileRows,          \
                             .prepare = prepare<Type>,        \
                             .run = run<Type>};

MOEOPS_LIBXSMM_KERNEL(kernel_f32_libxsmm, F32, DType::kF32, Isa::kAvx512)
MOEOPS_LIBXSMM_KERNEL(kernel_bf16_libxsmm, Bf16, DType::kBf16, Isa::kAvx512Bf16)
MOEOPS_LIBXSMM_KERNEL(kernel_s8_libxsmm, S8, DType::kS8, Isa::kAvx512Vnni)

}  // namespace moeops::grouped_matmul_internal

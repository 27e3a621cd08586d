// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "bench/limits/kernels.h"

namespace moeops::limits {

namespace {

constexpr int kRows = 16;
constexpr int kRowBytes = 64;
constexpr int kTileBytes = kRows * kRowBytes;

// Tiles 0 to 5 accumulate, 6 and 7 are the operands. One instruction starts every 16 cycles and
// takes 52: four chains would do.
constexpr int kChains = 6;

// Every tile whole, in the layout of LDTILECFG.
struct alignas(64) Config {
  unsigned char palette = 1;
  unsigned char start_row = 0;
  unsigned char reserved[14] = {};
  unsigned short row_bytes[16] = {kRowBytes, kRowBytes, kRowBytes, kRowBytes,
                                  kRowBytes, kRowBytes, kRowBytes, kRowBytes};
  unsigned char rows[16] = {kRows, kRows, kRows, kRows, kRows, kRows, kRows, kRows};
};
static_assert(sizeof(Config) == 64);

// dot(): one instruction for every chain.
template <class Lane, class Operand, class Dot>
double run(Operand u, Operand s, int64_t steps, const Dot& dot) {
  Config config;
  _tile_loadconfig(&config);
  alignas(64) Operand left[kTileBytes / sizeof(Operand)];
  alignas(64) Operand right[kTileBytes / sizeof(Operand)];
  for (Operand& value : left) value = u;
  for (Operand& value : right) value = s;
  _tile_loadd(6, left, kRowBytes);
  _tile_loadd(7, right, kRowBytes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t step = 0; step < steps; ++step) dot();
  alignas(64) Lane lanes[kChains][kTileBytes / sizeof(Lane)];
  _tile_stored(0, lanes[0], kRowBytes);
  _tile_stored(1, lanes[1], kRowBytes);
  _tile_stored(2, lanes[2], kRowBytes);
  _tile_stored(3, lanes[3], kRowBytes);
  _tile_stored(4, lanes[4], kRowBytes);
  _tile_stored(5, lanes[5], kRowBytes);
  _tile_release();
  double sum = 0;
  for (const auto& chain : lanes) {
    for (const Lane lane : chain) sum += static_cast<double>(lane);
  }
  return sum;
}

double run_bf16(int64_t steps, int u, int s) {
  // A small integer's f32 ends in 16 zero bits, which bf16 leaves out.
  const auto bf16 = [](int value) {
    const auto f32 = static_cast<float>(value);
    unsigned bits;
    __builtin_memcpy(&bits, &f32, sizeof(bits));
    return static_cast<unsigned short>(bits >> 16);
  };
  return run<float>(bf16(u), bf16(s), steps, [] {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  });
}

double run_s8(int64_t steps, int u, int s) {
  return run<int>(static_cast<signed char>(u), static_cast<signed char>(s), steps, [] {
    _tile_dpbssd(0, 6, 7);
    _tile_dpbssd(1, 6, 7);
    _tile_dpbssd(2, 6, 7);
    _tile_dpbssd(3, 6, 7);
    _tile_dpbssd(4, 6, 7);
    _tile_dpbssd(5, 6, 7);
  });
}

}  // namespace

Kernels kernels_amx() {
  constexpr int64_t kLanes = kRows * kRowBytes / 4;
  return {.f32 = {},
          .bf16 = {run_bf16, kChains * kLanes * kRowBytes / 2},
          .s8 = {run_s8, kChains * kLanes * kRowBytes},
          .memory = {}};
}

}  // namespace moeops::limits

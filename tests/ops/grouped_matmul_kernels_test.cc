// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ops/grouped_matmul/kernels.h"
#include "ops/grouped_matmul/pack_rows.h"
#include "tests/support/guarded_buffer.h"
#include "tests/support/seed.h"

namespace moeops::grouped_matmul_internal {
namespace {

using test::GuardedBuffer;
using Side = GuardedBuffer::Against;

class GroupedMatmulKernel : public ::testing::TestWithParam<const TileKernel*> {
 protected:
  void SetUp() override {
    if (kernel().begin != nullptr) kernel().begin();
  }
  void TearDown() override {
    if (kernel().end != nullptr) kernel().end();
  }
  static const TileKernel& kernel() { return *GetParam(); }
  static bool is_s8() { return kernel().dtype == DType::kS8; }
  const void* prepare(int width, int64_t k_chunks) {
    const void* code = nullptr;
    if (kernel().prepare != nullptr) {
      EXPECT_TRUE(kernel().prepare(ctx_, {width, k_chunks}, &code));
    }
    return code;
  }
  Context ctx_;
};

// The kernels that this machine can run; libxsmm may have been told to make none.
std::vector<const TileKernel*> runnable_kernels() {
  std::vector<const TileKernel*> kernels;
  Context ctx;
  for (int i = 0; i < kTileKernelCount; ++i) {
    const TileKernel* kernel = kTileKernels[i];
    const void* code = nullptr;
    if (kernel->isa > machine().isa) continue;
    if (kernel->prepare == nullptr || kernel->prepare(ctx, {64, 1}, &code)) {
      kernels.push_back(kernel);
    }
  }
  return kernels;
}

INSTANTIATE_TEST_SUITE_P(All, GroupedMatmulKernel, ::testing::ValuesIn(runnable_kernels()),
                         [](const auto& info) {
                           return std::string(to_string(info.param->dtype)) + "_" +
                                  info.param->name;
                         });

// A panel and a full tile's rows in the kernel's layout, between guard pages on a random side.
struct Operands {
  Operands(const TileKernel& kernel, int width, int64_t k_chunks, Side side)
      : kernel(kernel),
        width(width),
        k_chunks(k_chunks),
        panel(static_cast<size_t>(k_chunks * kChunkGroups * width * 4), side),
        x(static_cast<size_t>(k_chunks * kChunkBytes * kernel.tile_rows), side) {}

  void fill(std::mt19937_64& random) {
    std::normal_distribution<float> normal;
    std::uniform_int_distribution<int> byte(-128, 127);
    const auto fill_buffer = [&](const GuardedBuffer& buffer) {
      for (size_t i = 0; i < buffer.bytes(); i += 4) {
        char* at = buffer.as<char>() + i;
        if (kernel.dtype == DType::kF32) {
          const float v = normal(random);
          std::memcpy(at, &v, 4);
        } else if (kernel.dtype == DType::kBf16) {
          const bf16 v[2] = {to_bf16(normal(random)), to_bf16(normal(random))};
          std::memcpy(at, v, 4);
        } else {
          for (int j = 0; j < 4; ++j) at[j] = static_cast<char>(byte(random));
        }
      }
    };
    fill_buffer(panel);
    fill_buffer(x);
  }

  template <class T>
  T read(const GuardedBuffer& buffer, int64_t byte) const {
    T v;
    std::memcpy(&v, buffer.as<char>() + byte, sizeof(v));
    return v;
  }
  int64_t k() const { return k_chunks * kChunkBytes / size_of(kernel.dtype); }
  double x_at(int64_t r, int64_t k) const {
    const int64_t size = size_of(kernel.dtype);
    const int64_t byte = k * size;
    const int64_t at = ((r / kernel.row_block * k_chunks + byte / kChunkBytes) * kernel.row_block +
                        r % kernel.row_block) *
                           kChunkBytes +
                       byte % kChunkBytes;
    if (size == 4) return static_cast<double>(read<float>(x, at));
    if (size == 2) return static_cast<double>(to_f32(read<bf16>(x, at)));
    return read<uint8_t>(x, at);
  }
  double w_at(int64_t k, int64_t column) const {
    const int64_t size = size_of(kernel.dtype);
    const int64_t group = 4 / size;
    const int64_t at = (k / group * width + column) * 4 + k % group * size;
    if (size == 4) return static_cast<double>(read<float>(panel, at));
    if (size == 2) return static_cast<double>(to_f32(read<bf16>(panel, at)));
    return read<int8_t>(panel, at);
  }

  Tile tile(int rows, void* c) const {
    Tile tile = {};
    tile.panel = panel.as<char>();
    tile.width = width;
    tile.x = x.as<char>();
    tile.row_block = kernel.row_block;
    tile.x_block_bytes = k_chunks * kernel.row_block * kChunkBytes;
    tile.rows = rows;
    tile.k_chunks = k_chunks;
    tile.c = c;
    return tile;
  }

  const TileKernel& kernel;
  int width;
  int64_t k_chunks;
  GuardedBuffer panel;
  GuardedBuffer x;
};

// The results of a call: room for whole blocks and nothing beyond.
struct Results {
  Results(const TileKernel& kernel, int rows, Side side)
      : c(static_cast<size_t>((rows + kernel.row_block - 1) / kernel.row_block * kernel.row_block *
                              kPanelColumns * 4),
          side) {
    std::memset(c.as<char>(), 0x5A, c.bytes());
  }
  template <class T>
  T at(int64_t r, int64_t j) const {
    return c.as<T>()[r * kPanelColumns + j];
  }
  GuardedBuffer c;
};

Side random_side(std::mt19937_64& random) { return random() % 2 == 0 ? Side::kFront : Side::kBack; }

// Calls body(width, k_chunks, random) for every width of a panel.
template <class Body>
void for_each_form(std::initializer_list<int64_t> k_chunks, const Body& body) {
  uint64_t round = 0;
  for (const int width : {32, 48, 64}) {
    for (const int64_t chunks : k_chunks) {
      const uint64_t seed = test::seed_of(round++);
      SCOPED_TRACE(test::replay_hint(seed) + " width " + std::to_string(width) + " chunks " +
                   std::to_string(chunks));
      std::mt19937_64 random(seed);
      body(width, chunks, random);
    }
  }
}

TEST_P(GroupedMatmulKernel, MatchesTheDefinition) {
  for_each_form({1, 2, 3, 17}, [&](int width, int64_t k_chunks, std::mt19937_64& random) {
    Operands operands(kernel(), width, k_chunks, random_side(random));
    operands.fill(random);
    const int rows = kernel().tile_rows;
    const bool accumulate = random() % 2 == 0;
    const Results results(kernel(), rows, random_side(random));
    std::vector<double> start(static_cast<size_t>(rows * width));
    for (int r = 0; r < rows && accumulate; ++r) {
      for (int j = 0; j < width; ++j) {
        const auto v = static_cast<int32_t>(random() % 256);
        start[static_cast<size_t>(r * width + j)] = v;
        if (is_s8()) {
          results.c.as<int32_t>()[r * kPanelColumns + j] = v;
        } else {
          results.c.as<float>()[r * kPanelColumns + j] = static_cast<float>(v);
        }
      }
    }
    Tile tile = operands.tile(rows, results.c.as<char>());
    tile.accumulate = accumulate;
    kernel().run(prepare(width, k_chunks), tile);
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < width; ++j) {
        double sum = start[static_cast<size_t>(r * width + j)];
        double magnitude = std::fabs(sum);
        for (int64_t k = 0; k < operands.k(); ++k) {
          const double product = operands.x_at(r, k) * operands.w_at(k, j);
          sum += product;
          magnitude += std::fabs(product);
        }
        if (is_s8()) {
          ASSERT_EQ(results.at<int32_t>(r, j), sum) << r << "," << j;
        } else {
          // K additions and, below fma, K products, each of half a unit.
          const double bound = 2 * static_cast<double>(operands.k() + 1) * 0x1p-24 * magnitude;
          ASSERT_NEAR(results.at<float>(r, j), sum, bound) << r << "," << j;
        }
      }
    }
  });
}

// Neither the rows beside it, nor a cut of K into calls, nor a request to fetch the next panel,
// changes a row's bits, and nothing is written beyond the rows' blocks.
TEST_P(GroupedMatmulKernel, RowsHaveTheirBits) {
  for_each_form({2, 5, 17}, [&](int width, int64_t k_chunks, std::mt19937_64& random) {
    Operands operands(kernel(), width, k_chunks, random_side(random));
    operands.fill(random);
    const void* code = prepare(width, k_chunks);
    const int most = kernel().tile_rows;
    const Results whole(kernel(), most, Side::kBack);
    kernel().run(code, operands.tile(most, whole.c.as<char>()));
    for (int rows = 1; rows <= most; ++rows) {
      const Results results(kernel(), rows, random_side(random));
      Tile tile = operands.tile(rows, results.c.as<char>());
      // Lines asked for may be many, few, none, or not there.
      tile.prefetch = rows % 5 == 0 ? nullptr : tile.panel;
      tile.prefetch_lines = static_cast<int64_t>(random() % 3) * k_chunks * 40;
      const int64_t cut = static_cast<int64_t>(random() % static_cast<uint64_t>(k_chunks));
      if (cut > 0) {
        tile.k_chunks = cut;
        kernel().run(code, tile);
        tile.panel += cut * kChunkGroups * width * 4;
        tile.x += cut * kChunkBytes * kernel().row_block;
        tile.k_chunks = k_chunks - cut;
        tile.accumulate = true;
      }
      kernel().run(code, tile);
      for (int r = 0; r < rows; ++r) {
        ASSERT_EQ(0, std::memcmp(results.c.as<char>() + r * kPanelColumns * 4,
                                 whole.c.as<char>() + r * kPanelColumns * 4,
                                 static_cast<size_t>(width) * 4))
            << "row " << r << " of " << rows << ", cut at " << cut;
      }
    }
  });
}

// Rows in blocks of fewer have the bits that they have in whole blocks.
TEST_P(GroupedMatmulKernel, EvenBlocksGiveTheSameBits) {
  if (!kernel().even_blocks) return;
  for_each_form({3, 130}, [&](int width, int64_t k_chunks, std::mt19937_64& random) {
    Operands operands(kernel(), width, k_chunks, random_side(random));
    operands.fill(random);
    const void* code = prepare(width, k_chunks);
    const int whole_block = kernel().row_block;
    const int blocks = kernel().tile_rows / whole_block;
    const Results whole(kernel(), kernel().tile_rows, Side::kBack);
    kernel().run(code, operands.tile(kernel().tile_rows, whole.c.as<char>()));
    for (int block = 1; block <= whole_block; ++block) {
      const int rows =
          (blocks - 1) * block + 1 + static_cast<int>(random() % static_cast<uint64_t>(block));
      const GuardedBuffer x(static_cast<size_t>(blocks * block * k_chunks * kChunkBytes),
                            random_side(random));
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t chunk = 0; chunk < k_chunks; ++chunk) {
          const int64_t from = (r / whole_block * k_chunks + chunk) * whole_block + r % whole_block;
          const int64_t to = (r / block * k_chunks + chunk) * block + r % block;
          std::memcpy(x.as<char>() + to * kChunkBytes, operands.x.as<char>() + from * kChunkBytes,
                      kChunkBytes);
        }
      }
      const GuardedBuffer c(static_cast<size_t>(rows * kPanelColumns * 4), Side::kBack);
      Tile tile = operands.tile(rows, c.as<char>());
      tile.x = x.as<char>();
      tile.row_block = block;
      tile.x_block_bytes = k_chunks * block * kChunkBytes;
      kernel().run(code, tile);
      for (int r = 0; r < rows; ++r) {
        ASSERT_EQ(0, std::memcmp(c.as<char>() + r * kPanelColumns * 4,
                                 whole.c.as<char>() + r * kPanelColumns * 4,
                                 static_cast<size_t>(width) * 4))
            << "row " << r << " in blocks of " << block;
      }
    }
  });
}

// The largest products that bytes make: nothing saturates, not even on the way.
TEST_P(GroupedMatmulKernel, ExtremeBytesAreExact) {
  if (!is_s8()) return;
  const int64_t k_chunks = 1024;  // K = 65536
  for (const int u : {0, 1, 255}) {
    for (const int s : {-128, -127, 127}) {
      const Operands operands(kernel(), 32, k_chunks, Side::kBack);
      std::memset(operands.panel.as<char>(), s, operands.panel.bytes());
      std::memset(operands.x.as<char>(), u, operands.x.bytes());
      const int rows = kernel().row_block;
      const Results results(kernel(), rows, Side::kBack);
      kernel().run(prepare(32, k_chunks), operands.tile(rows, results.c.as<char>()));
      for (int r = 0; r < rows; ++r) {
        for (int j = 0; j < 32; ++j) {
          ASSERT_EQ(results.at<int32_t>(r, j), u * s * 65536) << u << " x " << s;
        }
      }
    }
  }
}

// What is not a number stays in its row and its column.
TEST_P(GroupedMatmulKernel, NanStaysWhereItIs) {
  if (is_s8()) return;
  std::mt19937_64 random(3);
  Operands operands(kernel(), 48, 3, Side::kBack);
  operands.fill(random);
  const int rows = kernel().tile_rows;
  const void* code = prepare(48, 3);
  const Results clean(kernel(), rows, Side::kBack);
  kernel().run(code, operands.tile(rows, clean.c.as<char>()));
  const int poisoned_row = rows / 2;
  const int poisoned_column = 33;
  const uint32_t nans = 0x7FC07FC0;  // one f32 or two bf16
  char* x = operands.x.as<char>() + (poisoned_row / kernel().row_block * 3 * kernel().row_block +
                                     poisoned_row % kernel().row_block) *
                                        kChunkBytes;
  std::memcpy(x + 8, &nans, 4);
  std::memcpy(operands.panel.as<char>() + (20 * 48 + poisoned_column) * 4, &nans, 4);
  const Results poisoned(kernel(), rows, Side::kBack);
  kernel().run(code, operands.tile(rows, poisoned.c.as<char>()));
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < 48; ++j) {
      if (r == poisoned_row || j == poisoned_column) {
        EXPECT_TRUE(std::isnan(poisoned.at<float>(r, j))) << r << "," << j;
      } else {
        EXPECT_EQ(poisoned.at<float>(r, j), clean.at<float>(r, j)) << r << "," << j;
      }
    }
  }
}

// Every dtype has a kernel on every rung.
TEST(GroupedMatmulKernels, EachRungHasOnePerDtype) {
  for (int isa = 0; isa <= static_cast<int>(machine().isa); ++isa) {
    Context ctx({.threads = 1, .isa = static_cast<Isa>(isa)});
    for (const DType dtype : {DType::kF32, DType::kBf16, DType::kS8}) {
      const TileKernel* chosen = nullptr;
      const void* code = nullptr;
      ASSERT_TRUE(choose_kernel(ctx, dtype, {64, 10}, &chosen, &code).ok());
      EXPECT_EQ(chosen->dtype, dtype);
      EXPECT_LE(static_cast<int>(chosen->isa), isa);
      EXPECT_EQ(chosen->tile_rows % chosen->row_block, 0);
    }
  }
}

TEST(GroupedMatmulPackRows, EveryByteHasItsPlace) {
  for (uint64_t round = 0; round < 200; ++round) {
    const uint64_t seed = test::seed_of(round);
    SCOPED_TRACE(test::replay_hint(seed));
    std::mt19937_64 random(seed);
    const int row_block = std::vector<int>{1, 4, 6, 16}[random() % 4];
    const auto rows = static_cast<int64_t>(random() % 40 + 1);
    const auto bytes = static_cast<int64_t>(random() % 300);
    const int64_t k_chunks = (bytes + kChunkBytes - 1) / kChunkBytes;
    const auto first = static_cast<int64_t>(random() % 3);
    const int64_t stride = bytes + static_cast<int64_t>(random() % 70);
    const bool indexed = random() % 2 == 0;
    const int64_t source_rows = first + rows;
    const GuardedBuffer x(static_cast<size_t>(stride * (source_rows - 1) + bytes),
                          random_side(random));
    for (size_t i = 0; i < x.bytes(); ++i) x.as<char>()[i] = static_cast<char>(random());
    std::vector<int32_t> index(static_cast<size_t>(source_rows));
    for (int32_t& i : index) {
      i = static_cast<int32_t>(random() % static_cast<uint64_t>(source_rows));
    }
    SourceRows source;
    source.base = x.as<char>();
    source.stride = stride;
    source.index = indexed ? index.data() : nullptr;
    source.bytes = bytes;
    source.add_128 = random() % 2 == 0;
    const int64_t blocks = (rows + row_block - 1) / row_block;
    const GuardedBuffer packed(static_cast<size_t>(blocks * row_block * k_chunks * kChunkBytes),
                               random_side(random));
    std::memset(packed.as<char>(), 0x5A, packed.bytes());
    pack_rows(source, first, rows, row_block, k_chunks, packed.as<char>());
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < k_chunks * kChunkBytes; ++k) {
        const int got =
            packed.as<uint8_t>()[((r / row_block * k_chunks + k / kChunkBytes) * row_block +
                                  r % row_block) *
                                     kChunkBytes +
                                 k % kChunkBytes];
        if (k < bytes) {
          const int64_t row = indexed ? index[static_cast<size_t>(first + r)] : first + r;
          const int expected = x.as<uint8_t>()[row * stride + k] ^ (source.add_128 ? 0x80 : 0);
          ASSERT_EQ(got, expected) << r << "," << k;
        } else if (!source.add_128) {
          ASSERT_EQ(got, 0) << r << "," << k;
        }
      }
    }
  }
}

}  // namespace
}  // namespace moeops::grouped_matmul_internal

// SPDX-License-Identifier: Apache-2.0
#include "tools/tensor_file/npy.h"

#include "tests/tools/test_support.h"

namespace moeops::tools {
namespace {

using Shape = std::vector<int64_t>;

std::string make_file(std::string_view header, std::string_view data = {}, char version = 1) {
  std::string file = "\x93NUMPY";
  file += version;
  file += '\0';
  for (int i = 0; i < (version == 1 ? 2 : 4); ++i)
    file += static_cast<char>(header.size() >> 8 * i);
  return file.append(header).append(data);
}

std::string dict(std::string_view descr, std::string_view shape, std::string_view order = "False") {
  return "{'descr': " + std::string(descr) + ", 'fortran_order': " + std::string(order) +
         ", 'shape': " + std::string(shape) + ", }\n";
}

void expect_refused(std::string_view file, std::initializer_list<std::string_view> parts) {
  expect_error([&] { NpyFile::parse("x.npy", as_bytes(file)); }, {"x.npy: "});
  expect_error([&] { NpyFile::parse("x.npy", as_bytes(file)); }, parts);
}

TEST(Npy, RoundTripOfAllDtypes) {
  const TempDir dir;
  for (const Tensor& tensor : tensors_of_all_dtypes()) {
    if (tensor.dtype == FileDType::kBf16) continue;
    write_npy(dir / "a.npy", tensor.ref());
    expect_same(NpyFile::open(dir / "a.npy").tensor(), tensor.ref());
  }
}

TEST(Npy, RoundTripOfAllRanks) {
  const TempDir dir;
  for (const Shape& shape : {Shape{}, Shape{3}, Shape{0}, Shape{1, 2, 3, 4}}) {
    const Tensor tensor(FileDType::kI16, shape);
    write_npy(dir / "a.npy", tensor.ref());
    expect_same(NpyFile::open(dir / "a.npy").tensor(), tensor.ref());
  }
}

TEST(Npy, WritesTheBytesOfNumpy) {
  const TempDir dir;
  const Tensor tensor = make_tensor<float>(FileDType::kF32, {3}, {0, 0, 0});
  write_npy(dir / "a.npy", tensor.ref());
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }";
  header.resize(128 - 10 - 1, ' ');
  EXPECT_EQ(read_text(dir / "a.npy"), make_file(header + "\n", std::string(12, '\0')));
}

TEST(Npy, RefusesToWriteBf16) {
  const TempDir dir;
  expect_error([&] { write_npy(dir / "a.npy", Tensor(FileDType::kBf16, {1}).ref()); },
               {"a.npy", "BF16", ".safetensors"});
  EXPECT_TRUE(dir.files().empty());
}

TEST(Npy, RefusesToWriteAHeaderBeyondTheFormat) {
  const TempDir dir;
  const Tensor tensor(FileDType::kU8, Shape(30'000, 1));
  expect_error([&] { write_npy(dir / "a.npy", tensor.ref()); }, {"a.npy", "30000 dimensions"});
  EXPECT_TRUE(dir.files().empty());
}

TEST(Npy, ReadsFormats1To3) {
  for (char version : {'\1', '\2', '\3'}) {
    const std::string bytes = make_file(dict("'<i2'", "(2,)"), "\x01\x02\x03\x04", version);
    const auto file = NpyFile::parse("f", as_bytes(bytes));
    EXPECT_EQ(file.tensor().dtype, FileDType::kI16);
    EXPECT_EQ(file.tensor().shape, Shape{2});
    EXPECT_EQ(element(file.tensor(), 1), 0x0403);
  }
}

TEST(Npy, ReadsEverySpelling) {
  const auto read = [](std::string_view header, std::string_view data) {
    return NpyFile::parse("f", as_bytes(make_file(header, data))).tensor();
  };
  EXPECT_EQ(read(dict("'|b1'", "(1,)"), "\1").dtype, FileDType::kBool);
  EXPECT_EQ(read(dict("'<b1'", "(1,)"), "\1").dtype, FileDType::kBool);
  EXPECT_EQ(read(dict("'|i1'", "(1,)"), "1").dtype, FileDType::kI8);
  EXPECT_EQ(read(dict("'<i1'", "(1,)"), "1").dtype, FileDType::kI8);
  EXPECT_EQ(read(dict("\"<u1\"", "(1,)"), "1").dtype, FileDType::kU8);
  EXPECT_EQ(read("{'shape':(2,1),'fortran_order':False,'descr':'|u1'}", "12").shape, (Shape{2, 1}));
  EXPECT_EQ(read(dict("'|u1'", "( 1 , 2 , )"), "12").shape, (Shape{1, 2}));
  EXPECT_EQ(read(dict("'|u1'", "()"), "1").shape, Shape{});
  // One dimension lies the same in either order.
  EXPECT_EQ(read(dict("'|u1'", "(2,)", "True"), "12").shape, Shape{2});
}

TEST(Npy, RefusesFilesOfAnotherKind) {
  expect_refused("", {"starts with ''", "NUMPY"});
  expect_refused("PK\3\4", {"starts with 'PK\\x03\\x04'", "NUMPY"});
  expect_refused("\x93NUMPY", {"preamble"});
  expect_refused("\x93NUMPY\x01", {"preamble"});
  expect_refused(make_file("").substr(0, 9), {"preamble"});
  expect_refused(make_file("", "", 2).substr(0, 11), {"preamble"});
  expect_refused(make_file("", "", 4), {"version is 4.0", "3.0"});
  std::string minor = make_file("");
  minor[7] = 1;
  expect_refused(minor, {"version is 1.1"});
  std::string longer = make_file("{}");
  longer[8] = 3;
  expect_refused(longer, {"header length is 3", "2 bytes follow"});
}

TEST(Npy, RefusesArraysItDoesNotRead) {
  expect_refused(make_file(dict("'>f4'", "(1,)"), "1234"), {"descr is '>f4'", "big-endian"});
  expect_refused(make_file(dict("'|O'", "(1,)"), "1234"), {"descr is '|O'", "objects"});
  expect_refused(make_file(dict("[('a', '<f4')]", "(1,)"), "1234"), {"descr", "structured"});
  expect_refused(make_file(dict("'<c8'", "(1,)"), "12345678"), {"descr is '<c8'", "<f4"});
  expect_refused(make_file(dict("'|V2'", "(1,)"), "12"), {"descr is '|V2'", "<f4"});
  expect_refused(make_file(dict("'|f4'", "(1,)"), "1234"), {"descr is '|f4'", "<f4"});
  expect_refused(make_file(dict("'<f4'", "(1,1)", "True"), "1234"), {"fortran_order is True"});
}

TEST(Npy, RefusesHeadersOfTheWrongForm) {
  expect_refused(make_file(""), {"at byte 0", "it ends", "'{'"});
  expect_refused(make_file("[]"), {"at byte 0", "'[]'", "'{'"});
  expect_refused(make_file("{"), {"it ends", "a string"});
  expect_refused(make_file("{}"), {"descr is missing"});
  expect_refused(make_file("{'descr': '<f4'}"), {"fortran_order is missing"});
  expect_refused(make_file("{'descr': '<f4', 'fortran_order': False}"), {"shape is missing"});
  expect_refused(make_file("{'descr': '<f4"), {"a string that ends"});
  expect_refused(make_file("{'descr' '<f4'}"), {"at byte 9", "':'"});
  expect_refused(make_file("{'descr': 4}"), {"at byte 10", "a string"});
  expect_refused(make_file("{'descr': '<f4' 'shape': ()}"), {"at byte 16", "',' or '}'"});
  expect_refused(make_file("{'descr': '<f4', 'descr': '<f4'}"), {"duplicate key 'descr'"});
  expect_refused(make_file("{'order': 'C'}"), {"unknown", "'order'"});
  expect_refused(make_file("{'fortran_order': 0}"), {"at byte 18", "True or False"});
  expect_refused(make_file(dict("'<f4'", "()") + "x"), {"'x'", "the end of the header"});
}

TEST(Npy, RefusesShapesThatAreNone) {
  const auto shape = [](std::string_view text) { return make_file(dict("'<f4'", text), "1234"); };
  expect_refused(shape("1"), {"'1, }", "'('"});
  expect_refused(shape("[1]"), {"'[1]", "'('"});
  expect_refused(shape("(1)"), {"',' in the tuple"});
  expect_refused(shape("(1 1)"), {"',' in the tuple"});
  expect_refused(shape("(,)"), {"a size in [0, 2^63)"});
  expect_refused(shape("(-1,)"), {"'-1,)", "a size in [0, 2^63)"});
  expect_refused(shape("(1.5,)"), {"',' in the tuple"});
  expect_refused(shape("(9223372036854775808,)"), {"'9223372036854775808", "[0, 2^63)"});
  expect_refused(shape("(4294967296, 4294967296)"), {"[4294967296,4294967296] of F32 overflows"});
  expect_refused(shape("(2,)"), {"4 bytes of data", "[2] of F32 takes 8"});
  expect_refused(shape("(0,)"), {"4 bytes of data", "[0] of F32 takes 0"});
}

TEST(Npy, RefusesABoolThatIsNone) {
  expect_refused(make_file(dict("'|b1'", "(3,)"), "\1\1\2"), {"BOOL element 2 is 2"});
}

}  // namespace
}  // namespace moeops::tools

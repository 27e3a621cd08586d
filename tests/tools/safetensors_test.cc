// SPDX-License-Identifier: Apache-2.0
#include "tools/tensor_file/safetensors.h"

#include <cstdint>
#include <limits>

#include "tests/tools/test_support.h"

namespace moeops::tools {
namespace {

std::string with_length(uint64_t length, std::string_view rest) {
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>(length >> 8 * i);
  return file.append(rest);
}

std::string make_file(std::string_view header, std::string_view data = {}) {
  return with_length(header.size(), std::string(header).append(data));
}

void expect_refused(std::string_view file, std::initializer_list<std::string_view> parts) {
  expect_error([&] { SafetensorsFile::parse("x.safetensors", as_bytes(file)); },
               {"x.safetensors: "});
  expect_error([&] { SafetensorsFile::parse("x.safetensors", as_bytes(file)); }, parts);
}

// One tensor 'a' whose fields are `fields`, with four bytes of data.
void expect_entry_refused(std::string_view fields, std::initializer_list<std::string_view> parts) {
  const std::string file = make_file("{\"a\":" + std::string(fields) + "}", "1234");
  expect_refused(file, {"'a'"});
  expect_refused(file, parts);
}

TEST(Safetensors, RoundTripOfAllDtypes) {
  const TempDir dir;
  const std::vector<Tensor> written = tensors_of_all_dtypes();
  std::vector<NamedTensor> named;
  for (const Tensor& tensor : written) {
    named.push_back({"in." + std::string(to_string(tensor.dtype)), tensor.ref()});
  }
  const SafetensorsFile::Metadata metadata = {{"op", "init_routing"}, {"params", "{\"k\": 2}"}};
  write_safetensors(dir / "all.safetensors", metadata, named);

  const auto file = SafetensorsFile::open(dir / "all.safetensors");
  EXPECT_EQ(file.metadata(), metadata);
  ASSERT_EQ(file.tensors().size(), named.size());
  for (size_t i = 0; i < named.size(); ++i) {
    EXPECT_EQ(file.tensors()[i].name, named[i].name);
    expect_same(file.tensors()[i].tensor, named[i].tensor);
    EXPECT_EQ(file.find(named[i].name), &file.tensors()[i].tensor);
  }
  EXPECT_EQ(file.find("in.F8"), nullptr);
  const uint64_t header_bytes = static_cast<uint8_t>(read_text(dir / "all.safetensors")[0]);
  EXPECT_EQ(header_bytes % 8, 0u);
}

TEST(Safetensors, RoundTripOfScalarsAndEmptyTensors) {
  const TempDir dir;
  const Tensor scalar = make_tensor<float>(FileDType::kF32, {}, {1.5f});
  const Tensor none = Tensor(FileDType::kBf16, {0, 64});
  write_safetensors(dir / "f", {},
                    std::vector<NamedTensor>{
                        {"none", none.ref()}, {"scalar", scalar.ref()}, {"none too", none.ref()}});
  const auto file = SafetensorsFile::open(dir / "f");
  expect_same(*file.find("scalar"), scalar.ref());
  expect_same(*file.find("none"), none.ref());
  expect_same(*file.find("none too"), none.ref());
}

TEST(Safetensors, NothingButAHeader) {
  EXPECT_TRUE(SafetensorsFile::parse("f", as_bytes(make_file("{}"))).tensors().empty());
}

// As NumPy writes a case: Python's spaces in the JSON, data that lies misaligned.
TEST(Safetensors, ReadsWhatPythonWrites) {
  std::string header = R"({"__metadata__": {"op": "swiglu", "params": "{}", "source": "\u00e9"}, )"
                       R"("in.mask": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}, )"
                       R"("in.x": {"dtype": "F32", "shape": [1, 2], "data_offsets": [1, 9]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  using namespace std::string_view_literals;
  const std::string bytes = make_file(header, "\x01\0\0\x80\x3f\0\0\0\xc0"sv);
  const auto file = SafetensorsFile::parse("case", as_bytes(bytes));
  EXPECT_EQ(file.metadata().at("op"), "swiglu");
  EXPECT_EQ(file.metadata().at("source"), "\u00e9");
  const TensorRef& x = *file.find("in.x");
  EXPECT_EQ(x.shape, (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(element(x, 0), 1.0);
  EXPECT_EQ(element(x, 1), -2.0);
}

TEST(Safetensors, EntriesNeedNotBeInTheOrderOfTheirBytes) {
  const std::string bytes = make_file(R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},)"
                                      R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                                      "ab");
  const auto file = SafetensorsFile::parse("f", as_bytes(bytes));
  EXPECT_EQ(file.tensors()[0].name, "b");
  EXPECT_EQ(element(file.tensors()[0].tensor, 0), 'b');
}

TEST(Safetensors, RefusesTruncatedFiles) {
  expect_refused("", {"0 bytes", "at least the 8"});
  expect_refused("1234567", {"7 bytes", "at least the 8"});
  expect_refused(with_length(3, "{}"), {"header length is 3", "2 bytes follow"});
  expect_refused(with_length(100'000'001, "{}"), {"header length is 100000001", "100000000"});
  expect_refused(with_length(UINT64_MAX, "{}"), {"header length is 18446744073709551615"});
  expect_entry_refused(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})",
                       {"data_offsets are [0,8]", "4 bytes of data"});
}

TEST(Safetensors, RefusesHeadersThatAreNoJsonObject) {
  using namespace std::string_view_literals;
  expect_refused(make_file(""), {"header", "expected the '{'"});
  expect_refused(make_file("[]"), {"header", "starts with '['"});
  expect_refused(make_file(" {}"), {"header", "starts with ' '"});
  expect_refused(make_file("\xEF\xBB\xBF{}"), {"header", "starts with '\\xef'"});
  expect_refused(make_file("{"), {"header: not JSON at byte 2", "near '{'"});
  expect_refused(make_file("{}{}"), {"header: not JSON at byte 3"});
  expect_refused(make_file("{}\0"sv), {"header: not JSON at byte 2", "NUL"});
  expect_refused(make_file("{\"\xFF\":1}"), {"header: not JSON at byte 3"});
  expect_refused(make_file("{'a':1}"), {"header: not JSON at byte 2"});
  expect_refused(make_file("{\"a\":{\"dtype\":\"F32\",}}"),
                 {"not JSON at byte 21", "near '\"F32\",}'"});
}

TEST(Safetensors, RefusesDuplicateKeys) {
  expect_refused(make_file(R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)"
                           R"("a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})"),
                 {"duplicate entry 'a'"});
  expect_refused(make_file(R"({"__metadata__":{},"__metadata__":{}})"),
                 {"duplicate entry '__metadata__'"});
  expect_refused(make_file(R"({"__metadata__":{"op":"a","op":"b"}})"),
                 {"__metadata__", "'op'", "duplicate"});
  expect_entry_refused(R"({"dtype":"U8","shape":[1],"dtype":"F32","data_offsets":[0,4]})",
                       {"'dtype'", "duplicate"});
}

TEST(Safetensors, RefusesEntriesOfTheWrongForm) {
  expect_entry_refused("5", {"is 5", "expected an object"});
  expect_entry_refused("null", {"is null", "expected an object"});
  expect_entry_refused("[]", {"is an array", "expected an object"});
  expect_entry_refused("{}", {"'dtype'", "missing"});
  expect_entry_refused(R"({"dtype":"F32","data_offsets":[0,4]})", {"'shape'", "missing"});
  expect_entry_refused(R"({"dtype":"F32","shape":[1]})", {"'data_offsets'", "missing"});
  expect_entry_refused(R"({"dtype":"F32","strides":[1]})", {"'strides'", "unknown field"});
  expect_entry_refused(R"({"dtype":4})", {"'dtype'", "is 4", "expected F64"});
  expect_entry_refused(R"({"dtype":["F32"]})", {"'dtype'", "is an array", "expected F64"});
  expect_entry_refused(R"({"dtype":"F8_E4M3"})", {"'dtype'", "'F8_E4M3'", "expected F64"});
  expect_entry_refused(R"({"dtype":"f32"})", {"'dtype'", "'f32'"});
  expect_entry_refused(R"({"shape":1})", {"'shape'", "is 1", "expected an array"});
  expect_entry_refused(R"({"shape":{"0":1}})", {"'shape'", "is an object", "expected an array"});
  expect_entry_refused(R"({"shape":[[1]]})", {"'shape'", "is an array"});
  expect_entry_refused(R"({"shape":["1"]})", {"'shape'", "is '1'"});
  expect_entry_refused(R"({"shape":[true]})", {"'shape'", "is true"});
  expect_entry_refused(R"({"data_offsets":[0]})", {"'data_offsets'", "is [0]", "two"});
  expect_entry_refused(R"({"data_offsets":[0,1,4]})", {"'data_offsets'", "is [0,1,4]", "two"});
}

TEST(Safetensors, RefusesSizesThatAreNone) {
  expect_entry_refused(R"({"shape":[-1]})", {"'shape'", "is -1", "[0, 2^63)"});
  expect_entry_refused(R"({"shape":[1.5]})", {"'shape'", "is 1.5", "[0, 2^63)"});
  expect_entry_refused(R"({"shape":[1e3]})", {"'shape'", "is 1e3", "[0, 2^63)"});
  expect_entry_refused(R"({"shape":[9223372036854775808]})", {"'shape'", "is 9223372036854775808"});
  expect_entry_refused(R"({"shape":[99999999999999999999]})",
                       {"'shape'", "is 99999999999999999999"});
  expect_entry_refused(R"({"data_offsets":[0,-4]})", {"'data_offsets'", "is -4"});
}

TEST(Safetensors, RefusesShapesThatDoNotFitTheirBytes) {
  expect_entry_refused(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})",
                       {"data_offsets [0,4] span 4 bytes", "[2] of F32 takes 8"});
  expect_entry_refused(R"({"dtype":"F32","shape":[0],"data_offsets":[0,4]})",
                       {"data_offsets [0,4] span 4 bytes", "[0] of F32 takes 0"});
  expect_entry_refused(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]})",
                       {"shape [4294967296,4294967296] of F32 overflows"});
  expect_entry_refused(R"({"dtype":"F64","shape":[9223372036854775807],"data_offsets":[0,4]})",
                       {"shape [9223372036854775807] of F64 overflows"});
  expect_entry_refused(R"({"dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0]})",
                       {"shape [0,4294967296,4294967296] of F32 overflows"});
  expect_entry_refused(R"({"dtype":"F32","shape":[1],"data_offsets":[4,0]})",
                       {"data_offsets are [4,0]", "begin <= end"});
}

TEST(Safetensors, RefusesHolesAndSharedBytes) {
  const auto two = [](std::string_view a, std::string_view b) {
    return make_file(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":)" + std::string(a) +
                         R"(},"b":{"dtype":"U8","shape":[2],"data_offsets":)" + std::string(b) +
                         "}}",
                     "12345");
  };
  expect_refused(two("[0,2]", "[1,3]"), {"'b'", "[1,3]", "begin at 2", "overlaps"});
  expect_refused(two("[0,2]", "[0,2]"), {"[0,2]", "begin at 2", "overlaps"});
  expect_refused(two("[0,2]", "[3,5]"), {"'b'", "[3,5]", "begin at 2", "no tensor"});
  expect_refused(two("[1,3]", "[3,5]"), {"'a'", "[1,3]", "begin at 0", "no tensor"});
  expect_refused(two("[0,2]", "[2,4]"), {"5 bytes of data", "expected 4", "no tensor"});
}

TEST(Safetensors, RefusesMetadataThatAreNoStrings) {
  expect_refused(make_file(R"({"__metadata__":{"op":1}})"), {"__metadata__", "'op'", "is 1"});
  expect_refused(make_file(R"({"__metadata__":{"op":null}})"), {"__metadata__", "'op'", "is null"});
  expect_refused(make_file(R"({"__metadata__":{"op":{"a":"b"}}})"),
                 {"__metadata__", "'op'", "is an object", "expected a string"});
  expect_refused(make_file(R"({"__metadata__":{"op":["a"]}})"),
                 {"__metadata__", "'op'", "is an array", "expected a string"});
  expect_refused(make_file(R"({"__metadata__":"op"})"),
                 {"'__metadata__' is 'op'", "expected an object of strings"});
}

TEST(Safetensors, RefusesDeepNesting) {
  expect_entry_refused(std::string(1'000'000, '['), {"is an array"});
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"shape\":";
  expect_entry_refused(objects, {"'shape'", "is an object"});
}

TEST(Safetensors, RefusesABoolThatIsNone) {
  expect_entry_refused(R"({"dtype":"BOOL","shape":[4],"data_offsets":[0,4]})",
                       {"BOOL element 0 is 49"});
}

TEST(Safetensors, KeepsMessagesShortAndPrintable) {
  const std::string name = "\\u0007" + std::string(100'000, 'n');
  try {
    SafetensorsFile::parse("f", as_bytes(make_file("{\"" + name + "\":1}")));
    FAIL();
  } catch (const Error& error) {
    EXPECT_LT(std::string(error.what()).size(), 400u);
    EXPECT_NE(std::string(error.what()).find("\\x07nnn"), std::string::npos) << error.what();
  }
}

TEST(Safetensors, OpenNamesTheFile) {
  const TempDir dir;
  write_text(dir / "bad", "12");
  expect_error([&] { SafetensorsFile::open(dir / "bad"); }, {(dir / "bad").string(), "2 bytes"});
  write_text(dir / "empty", "");
  expect_error([&] { SafetensorsFile::open(dir / "empty"); },
               {(dir / "empty").string(), "0 bytes"});
}

TEST(Safetensors, WriterRefusesWhatItsReaderWould) {
  const TempDir dir;
  const Tensor tensor(FileDType::kF32, {1});
  const auto write = [&](const std::vector<NamedTensor>& tensors) {
    write_text(dir / "f", "old");
    write_safetensors(dir / "f", {}, tensors);
  };
  expect_error([&] { write({{"a", tensor.ref()}, {"a", tensor.ref()}}); }, {"'a'", "twice"});
  expect_error([&] { write({{"__metadata__", tensor.ref()}}); }, {"'__metadata__'", "reserves"});
  expect_error([&] { write({{"\xFF", tensor.ref()}}); }, {"header", "UTF-8"});
  TensorRef cut = tensor.ref();
  cut.bytes = 3;
  expect_error([&] { write({{"a", cut}}); }, {"'a'", "3 bytes", "F32 [1]"});
  expect_error(
      [&] {
        write_safetensors(dir / "f", {{"k", std::string(100'000'000, ' ')}}, {});
      },
      {"header of", "at most 100000000"});
  EXPECT_EQ(read_text(dir / "f"), "old");
}

TEST(Tensor, RefusesImpossibleShapes) {
  expect_error([] { Tensor(FileDType::kF32, {2, -1}); }, {"F32 [2,-1]"});
  const int64_t huge = std::numeric_limits<int64_t>::max();
  expect_error([&] { Tensor(FileDType::kF32, {huge, 0}); }, {"F32 [9223372036854775807,0]"});
}

TEST(Tensor, SpellsDtypesBothWays) {
  for (const FileDTypeInfo& type : kFileDTypes) {
    EXPECT_EQ(parse_file_dtype(type.name), type.id);
    if (type.dtype != DType::kNone) {
      EXPECT_EQ(to_file_dtype(type.dtype), type.id);
      EXPECT_EQ(size_of(type.dtype), type.size);
    }
  }
  EXPECT_EQ(to_dtype(FileDType::kI8), DType::kS8);
  EXPECT_EQ(to_dtype(FileDType::kU8), DType::kNone);
  EXPECT_EQ(to_file_dtype(DType::kNone), std::nullopt);
}

TEST(Tensor, ElementsAsNumbersAndText) {
  const Tensor big = make_tensor<int64_t>(FileDType::kI64, {1}, {(int64_t{1} << 53) + 1});
  EXPECT_EQ(big.numel(), 1);
  EXPECT_EQ(element_text(big.ref(), 0), "9007199254740993");
  const Tensor half = make_tensor<uint16_t>(FileDType::kF16, {2}, {0x3C00, 0x7E00});
  EXPECT_EQ(element(half.ref(), 0), 1.0);
  EXPECT_EQ(element_text(half.ref(), 1), "nan");
  const Tensor brain = make_tensor<uint16_t>(FileDType::kBf16, {1}, {0xC020});
  EXPECT_EQ(element(brain.ref(), 0), -2.5);
  const Tensor tenth = make_tensor<float>(FileDType::kF32, {1}, {0.1f});
  EXPECT_EQ(element_text(tenth.ref(), 0), "0.1");
  const Tensor byte = make_tensor<int8_t>(FileDType::kI8, {1}, {-128});
  EXPECT_EQ(element_text(byte.ref(), 0), "-128");
}

}  // namespace
}  // namespace moeops::tools

// SPDX-License-Identifier: Apache-2.0
#include "tools/tensor_file/npy.h"

#include <fmt/format.h>

#include <charconv>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "tools/tensor_file/check_tensor.h"
#include "tools/tensor_file/error.h"
#include "tools/tensor_file/write_file.h"

namespace moeops::tools {
namespace {

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr size_t kVersionBytes = 2;
constexpr size_t kAlignment = 64;  // of the data in the files we write, as NumPy has it

struct Descr {
  std::string_view text;
  FileDType dtype;
};

// The first of a dtype is the one we write. A single byte has no order, which NumPy writes as '|'.
constexpr Descr kDescrs[] = {
    {"<f8", FileDType::kF64}, {"<f4", FileDType::kF32}, {"<f2", FileDType::kF16},
    {"<i8", FileDType::kI64}, {"<i4", FileDType::kI32}, {"<i2", FileDType::kI16},
    {"|i1", FileDType::kI8},  {"|u1", FileDType::kU8},  {"|b1", FileDType::kBool},
    {"<i1", FileDType::kI8},  {"<u1", FileDType::kU8},  {"<b1", FileDType::kBool},
};

// Reads the header, the literal of a Python dict with exactly the keys descr, fortran_order and
// shape.
class HeaderReader {
 public:
  HeaderReader(std::string_view file, std::string_view text) : file_(file), text_(text) {}

  struct Header {
    FileDType dtype;
    std::vector<int64_t> shape;
  };

  Header read() {
    std::optional<FileDType> dtype;
    std::optional<bool> fortran_order;
    std::optional<std::vector<int64_t>> shape;
    expect('{');
    while (!accept('}')) {
      const std::string_view key = string();
      expect(':');
      if (key == "descr" && !dtype) {
        dtype = descr();
      } else if (key == "fortran_order" && !fortran_order) {
        fortran_order = boolean();
      } else if (key == "shape" && !shape) {
        shape = tuple();
      } else {
        fail(
            fmt::format("unknown or duplicate key {}, expected each of descr, fortran_order and "
                        "shape once",
                        in_quotes(key)));
      }
      if (!accept(',') && !at('}')) unexpected("',' or '}'");
    }
    skip_spaces();
    if (at_ != text_.size()) unexpected("the end of the header");
    if (!dtype) fail("descr is missing");
    if (!fortran_order) fail("fortran_order is missing");
    if (!shape) fail("shape is missing");
    if (*fortran_order && shape->size() > 1) {
      fail("fortran_order is True, expected False: column-major arrays are not read");
    }
    return {*dtype, std::move(*shape)};
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(fmt::format("{}: header: {}", file_, what));
  }
  [[noreturn]] void unexpected(std::string_view expected) const {
    const std::string found = at_ == text_.size() ? "it ends" : in_quotes(text_.substr(at_, 20));
    fail(fmt::format("at byte {}: {}, expected {}", at_, found, expected));
  }

  void skip_spaces() { at_ = std::min(text_.find_first_not_of(" \t\r\n", at_), text_.size()); }
  bool at(char c) {
    skip_spaces();
    return at_ < text_.size() && text_[at_] == c;
  }
  bool accept(char c) {
    const bool found = at(c);
    if (found) ++at_;
    return found;
  }
  void expect(char c) {
    if (!accept(c)) unexpected(fmt::format("'{}'", c));
  }

  std::string_view string() {
    const char quote = at('"') ? '"' : '\'';
    if (!at(quote)) unexpected("a string");
    const size_t end = text_.find(quote, at_ + 1);
    if (end == text_.npos) unexpected("a string that ends");
    const std::string_view value = text_.substr(at_ + 1, end - at_ - 1);
    at_ = end + 1;
    return value;
  }

  bool boolean() {
    skip_spaces();
    for (const auto& [word, value] :
         {std::pair{std::string_view("True"), true}, std::pair{std::string_view("False"), false}}) {
      if (text_.substr(at_, word.size()) == word) {
        at_ += word.size();
        return value;
      }
    }
    unexpected("True or False for fortran_order");
  }

  int64_t size() {
    skip_spaces();
    int64_t value = 0;
    const char* const begin = text_.data() + at_;
    const auto [end, error] = std::from_chars(begin, text_.data() + text_.size(), value);
    if (error != std::errc{} || value < 0) unexpected("a size in [0, 2^63) for shape");
    at_ += static_cast<size_t>(end - begin);
    return value;
  }

  std::vector<int64_t> tuple() {
    std::vector<int64_t> sizes;
    expect('(');
    while (!accept(')')) {
      sizes.push_back(size());
      // (3) is a number in brackets, (3,) a tuple.
      if (!accept(',') && (sizes.size() == 1 || !at(')'))) unexpected("',' in the tuple of shape");
    }
    return sizes;
  }

  FileDType descr() {
    if (at('[')) fail("descr is a list: structured arrays are not read");
    const std::string_view text = string();
    for (const Descr& known : kDescrs) {
      if (known.text == text) return known.dtype;
    }
    std::string why;
    if (text.starts_with('>')) why = ": big-endian arrays are not read";
    if (text.find('O') != text.npos) why = ": arrays of Python objects are not read";
    fail(fmt::format("descr is {}, expected <f8, <f4, <f2, <i8, <i4, <i2, |i1, |u1 or |b1{}",
                     in_quotes(text), why));
  }

  std::string_view file_;
  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

NpyFile NpyFile::open(const std::filesystem::path& path) {
  MappedFile mapped = MappedFile::open(path);
  NpyFile file = parse(path.string(), mapped.bytes());
  file.file_ = std::move(mapped);
  return file;
}

NpyFile NpyFile::parse(std::string_view name, std::span<const std::byte> bytes) {
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (!text.starts_with(kMagic)) {
    throw Error(fmt::format("{}: starts with {}, expected {}", name,
                            in_quotes(text.substr(0, kMagic.size())), in_quotes(kMagic)));
  }
  const auto byte_at = [&](size_t i) {
    if (i >= bytes.size()) throw Error(fmt::format("{}: ends inside its preamble", name));
    return std::to_integer<size_t>(bytes[i]);
  };
  const size_t major = byte_at(kMagic.size());
  const size_t minor = byte_at(kMagic.size() + 1);
  if (major < 1 || major > 3 || minor != 0) {
    throw Error(
        fmt::format("{}: format version is {}.{}, expected 1.0, 2.0 or 3.0", name, major, minor));
  }
  const size_t length_bytes = major == 1 ? 2 : 4;
  const size_t header_at = kMagic.size() + kVersionBytes + length_bytes;
  size_t length = 0;
  for (size_t i = 1; i <= length_bytes; ++i) length = length << 8 | byte_at(header_at - i);
  if (length > bytes.size() - header_at) {
    throw Error(fmt::format("{}: header length is {}, but only {} bytes follow", name, length,
                            bytes.size() - header_at));
  }
  HeaderReader::Header header = HeaderReader(name, text.substr(header_at, length)).read();

  const std::span<const std::byte> data = bytes.subspan(header_at + length);
  const std::optional<int64_t> expected = byte_count(header.dtype, header.shape);
  if (!expected) {
    throw Error(fmt::format("{}: shape {} of {} overflows, expected less than 2^63 bytes", name,
                            shape_text(header.shape), to_string(header.dtype)));
  }
  if (static_cast<size_t>(*expected) != data.size()) {
    throw Error(fmt::format("{}: {} bytes of data, but shape {} of {} takes {}", name, data.size(),
                            shape_text(header.shape), to_string(header.dtype), *expected));
  }
  NpyFile file;
  file.tensor_ = {header.dtype, std::move(header.shape), data.data(), data.size()};
  check_bools(name, file.tensor_);
  return file;
}

void write_npy(const std::filesystem::path& path, const TensorRef& tensor) {
  std::string_view descr;
  for (const Descr& known : kDescrs) {
    if (known.dtype == tensor.dtype && descr.empty()) descr = known.text;
  }
  if (descr.empty()) {
    throw Error(fmt::format("{}: .npy has no spelling for {}: write a .safetensors file",
                            path.string(), to_string(tensor.dtype)));
  }
  check_bytes(path.string(), tensor);

  const char* const comma = tensor.shape.size() == 1 ? "," : "";
  std::string header = fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}{}), }}",
                                   descr, fmt::join(tensor.shape, ", "), comma);
  constexpr size_t kBefore = kMagic.size() + kVersionBytes + 2;
  const size_t data_at = (kBefore + header.size() + kAlignment) / kAlignment * kAlignment;
  header.resize(data_at - kBefore - 1, ' ');
  header += '\n';
  if (header.size() > 0xFFFF) {
    throw Error(fmt::format("{}: a shape of {} dimensions does not fit the header of .npy",
                            path.string(), tensor.shape.size()));
  }

  write_file_atomically(path, [&](std::ostream& out) {
    out << kMagic << '\x01' << '\0';
    out.put(static_cast<char>(header.size())).put(static_cast<char>(header.size() >> 8));
    out << header;
    out.write(reinterpret_cast<const char*>(tensor.data),
              static_cast<std::streamsize>(tensor.bytes));
  });
}

}  // namespace moeops::tools

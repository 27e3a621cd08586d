// SPDX-License-Identifier: Apache-2.0
#include "tools/tensor_file/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <ostream>
#include <set>
#include <utility>

#include "tools/tensor_file/check_tensor.h"
#include "tools/tensor_file/error.h"
#include "tools/tensor_file/write_file.h"

namespace moeops::tools {
namespace {

constexpr size_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr std::string_view kMetadataKey = "__metadata__";

struct Entry {
  std::string name;
  std::optional<FileDType> dtype;
  std::optional<std::vector<int64_t>> shape;
  std::optional<std::vector<int64_t>> data_offsets;
};

struct Header {
  SafetensorsFile::Metadata metadata;
  std::vector<Entry> entries;
};

// Takes the header apart event by event: a document tree would hide duplicate keys and grow with
// whatever nesting the file holds. The format has one legal shape, three levels deep, so all the
// state is where in it we are.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderReader(std::string_view file) : file_(file) {}

  Header take() { return std::move(header_); }

  bool null() override { return reject("null"); }
  bool boolean(bool value) override { return reject(value ? "true" : "false"); }
  bool binary(binary_t&) override { return reject("binary data"); }
  bool number_float(double, const std::string& text) override { return reject(text); }
  bool number_integer(int64_t value) override {
    return value < 0 ? reject(std::to_string(value)) : size(value);  // -0 is 0
  }
  bool number_unsigned(uint64_t value) override {
    if (value > static_cast<uint64_t>(INT64_MAX)) return reject(std::to_string(value));
    return size(static_cast<int64_t>(value));
  }

  bool string(std::string& value) override {
    if (at_ == At::kMetadata) {
      header_.metadata[field_] = std::move(value);
    } else if (at_ == At::kEntry && field_ == "dtype") {
      entry().dtype = parse_file_dtype(value);
      if (!entry().dtype) return reject(in_quotes(value));
    } else {
      return reject(in_quotes(value));
    }
    return true;
  }

  bool start_object(size_t) override {
    switch (at_) {
      case At::kStart:
        at_ = At::kTop;
        return true;
      case At::kTop:
        at_ = name_ == kMetadataKey ? At::kMetadata : At::kEntry;
        fields_.clear();
        if (at_ == At::kEntry) header_.entries.push_back({name_, {}, {}, {}});
        return true;
      default:
        return reject("an object");
    }
  }

  bool key(std::string& name) override {
    if (at_ == At::kTop) {
      if (!names_.insert(name).second) fail(fmt::format("duplicate entry {}", in_quotes(name)));
      name_ = std::move(name);
      return true;
    }
    field_ = std::move(name);
    if (at_ == At::kEntry && field_ != "dtype" && field_ != "shape" && field_ != "data_offsets") {
      fail("unknown field, expected dtype, shape and data_offsets");
    }
    if (!fields_.insert(field_).second) fail("duplicate field");
    return true;
  }

  bool end_object() override {
    if (at_ == At::kEntry) {
      for (const char* field : {"dtype", "shape", "data_offsets"}) {
        field_ = field;
        if (!fields_.contains(field)) fail("missing");
      }
    }
    at_ = At::kTop;
    return true;
  }

  bool start_array(size_t) override {
    if (at_ != At::kEntry || field_ == "dtype") return reject("an array");
    at_ = At::kSizes;
    sizes().emplace();
    return true;
  }

  bool end_array() override {
    at_ = At::kEntry;
    if (field_ == "data_offsets" && sizes()->size() != 2) {
      return reject(shape_text(*sizes()));
    }
    return true;
  }

  bool parse_error(size_t position, const std::string& token,
                   const nlohmann::json::exception&) override {
    throw Error(
        fmt::format("{}: header: not JSON at byte {}, near {}", file_, position, in_quotes(token)));
  }

 private:
  enum class At { kStart, kTop, kMetadata, kEntry, kSizes };

  Entry& entry() { return header_.entries.back(); }
  std::optional<std::vector<int64_t>>& sizes() {
    return field_ == "shape" ? entry().shape : entry().data_offsets;
  }

  bool size(int64_t value) {
    if (at_ != At::kSizes) return reject(std::to_string(value));
    sizes()->push_back(value);
    return true;
  }

  const char* expected() const {
    if (at_ == At::kTop && name_ == kMetadataKey) return "an object of strings";
    if (at_ == At::kTop) return "an object with dtype, shape and data_offsets";
    if (at_ == At::kMetadata) return "a string";
    if (field_ == "dtype") return "F64, F32, F16, BF16, I64, I32, I16, I8, U8 or BOOL";
    if (field_ == "shape") return "an array of integers in [0, 2^63)";
    return "an array of two integers in [0, 2^63)";
  }

  [[noreturn]] void fail(const std::string& what) const {
    std::string where;
    if (at_ == At::kMetadata) {
      where = fmt::format("{} field {}: ", kMetadataKey, in_quotes(field_));
    } else if (at_ == At::kEntry || at_ == At::kSizes) {
      where = fmt::format("tensor {}: field {}: ", in_quotes(name_), in_quotes(field_));
    }
    throw Error(fmt::format("{}: header: {}{}", file_, where, what));
  }

  // Never returns; the bool is for callbacks to hand on.
  bool reject(std::string_view value) const {
    const std::string named = at_ == At::kTop ? in_quotes(name_) + " " : "";
    fail(fmt::format("{}is {}, expected {}", named, value, expected()));
  }

  std::string_view file_;
  Header header_;
  At at_ = At::kStart;
  std::string name_;              // the top-level key we are in
  std::string field_;             // the key inside it
  std::set<std::string> names_;   // top-level keys seen
  std::set<std::string> fields_;  // keys seen inside name_
};

Header read_header(std::string_view file, std::string_view text) {
  // Both are quirks of the parser: it skips what comes before, and takes a NUL for the end.
  if (text.empty() || text.front() != '{') {
    throw Error(fmt::format("{}: header: starts with {}, expected the '{{' of an object", file,
                            in_quotes(text.substr(0, 1))));
  }
  if (const size_t nul = text.find('\0'); nul != text.npos) {
    throw Error(fmt::format("{}: header: not JSON at byte {}: a NUL", file, nul));
  }
  HeaderReader reader(file);
  nlohmann::json::sax_parse(text, &reader);
  return reader.take();
}

TensorRef locate(const std::string& what, const Entry& entry, std::span<const std::byte> data) {
  const int64_t begin = entry.data_offsets->front();
  const int64_t end = entry.data_offsets->back();
  const std::string offsets = shape_text(*entry.data_offsets);
  if (begin > end) {
    throw Error(fmt::format("{}: data_offsets are {}, expected begin <= end", what, offsets));
  }
  if (static_cast<uint64_t>(end) > data.size()) {
    throw Error(fmt::format("{}: data_offsets are {}, but the file holds {} bytes of data", what,
                            offsets, data.size()));
  }
  const std::optional<int64_t> bytes = byte_count(*entry.dtype, *entry.shape);
  if (!bytes) {
    throw Error(fmt::format("{}: shape {} of {} overflows, expected less than 2^63 bytes", what,
                            shape_text(*entry.shape), to_string(*entry.dtype)));
  }
  if (end - begin != *bytes) {
    throw Error(fmt::format("{}: data_offsets {} span {} bytes, but shape {} of {} takes {}", what,
                            offsets, end - begin, shape_text(*entry.shape), to_string(*entry.dtype),
                            *bytes));
  }
  const TensorRef tensor{*entry.dtype, *entry.shape, data.data() + begin,
                         static_cast<size_t>(*bytes)};
  check_bools(what, tensor);
  return tensor;
}

// The format forbids holes and shared bytes: no file hides data or says one thing to one reader
// and another to the next.
void check_cover(std::string_view file, const std::vector<Entry>& entries, size_t data_bytes) {
  std::vector<const Entry*> sorted;
  for (const Entry& entry : entries) sorted.push_back(&entry);
  std::sort(sorted.begin(), sorted.end(),
            [](const Entry* a, const Entry* b) { return *a->data_offsets < *b->data_offsets; });
  int64_t covered = 0;
  for (const Entry* entry : sorted) {
    const int64_t begin = entry->data_offsets->front();
    if (begin != covered) {
      throw Error(fmt::format("{}: tensor {}: data_offsets are {}, expected to begin at {}: {}",
                              file, in_quotes(entry->name), shape_text(*entry->data_offsets),
                              covered,
                              begin < covered ? "it overlaps the tensor before"
                                              : "the bytes between belong to no tensor"));
    }
    covered = entry->data_offsets->back();
  }
  if (static_cast<uint64_t>(covered) != data_bytes) {
    throw Error(fmt::format("{}: {} bytes of data, expected {}: the rest belongs to no tensor",
                            file, data_bytes, covered));
  }
}

}  // namespace

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
  MappedFile mapped = MappedFile::open(path);
  SafetensorsFile file = parse(path.string(), mapped.bytes());
  file.file_ = std::move(mapped);
  return file;
}

SafetensorsFile SafetensorsFile::parse(std::string_view name, std::span<const std::byte> bytes) {
  if (bytes.size() < kLengthBytes) {
    throw Error(fmt::format("{}: {} bytes, expected at least the 8 of the header length", name,
                            bytes.size()));
  }
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) length |= std::to_integer<uint64_t>(bytes[i]) << 8 * i;
  const std::span<const std::byte> rest = bytes.subspan(kLengthBytes);
  if (length > kMaxHeaderBytes) {
    throw Error(
        fmt::format("{}: header length is {}, expected at most {}", name, length, kMaxHeaderBytes));
  }
  if (length > rest.size()) {
    throw Error(fmt::format("{}: header length is {}, but only {} bytes follow", name, length,
                            rest.size()));
  }
  Header header =
      read_header(name, {reinterpret_cast<const char*>(rest.data()), static_cast<size_t>(length)});
  const std::span<const std::byte> data = rest.subspan(static_cast<size_t>(length));

  SafetensorsFile file;
  file.metadata_ = std::move(header.metadata);
  for (const Entry& entry : header.entries) {
    const std::string what = fmt::format("{}: tensor {}", name, in_quotes(entry.name));
    file.index_.emplace(entry.name, file.tensors_.size());
    file.tensors_.push_back({entry.name, locate(what, entry, data)});
  }
  check_cover(name, header.entries, data.size());
  return file;
}

const TensorRef* SafetensorsFile::find(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &tensors_[it->second].tensor;
}

void write_safetensors(const std::filesystem::path& path, const SafetensorsFile::Metadata& metadata,
                       std::span<const NamedTensor> tensors) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[std::string(kMetadataKey)] = metadata;
  size_t at = 0;
  for (const auto& [name, tensor] : tensors) {
    const std::string what = fmt::format("{}: tensor {}", path.string(), in_quotes(name));
    if (name == kMetadataKey) throw Error(what + ": the format reserves this name");
    if (header.contains(name)) throw Error(what + ": given twice");
    check_bytes(what, tensor);
    header[name] = {{"dtype", to_string(tensor.dtype)},
                    {"shape", tensor.shape},
                    {"data_offsets", {at, at + tensor.bytes}}};
    at += tensor.bytes;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception& error) {  // a string that is not UTF-8
    throw Error(fmt::format("{}: cannot write the header: {}", path.string(), error.what()));
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');
  if (text.size() > kMaxHeaderBytes) {
    throw Error(fmt::format("{}: a header of {} bytes, expected at most {}", path.string(),
                            text.size(), kMaxHeaderBytes));
  }

  write_file_atomically(path, [&](std::ostream& out) {
    for (size_t i = 0; i < kLengthBytes; ++i) out.put(static_cast<char>(text.size() >> 8 * i));
    out << text;
    for (const auto& [name, tensor] : tensors) {
      out.write(reinterpret_cast<const char*>(tensor.data),
                static_cast<std::streamsize>(tensor.bytes));
    }
  });
}

}  // namespace moeops::tools

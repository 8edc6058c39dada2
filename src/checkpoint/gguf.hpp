#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/output.hpp"
#include "checkpoint/safetensors.hpp"
#include "checkpoint/weight_file.hpp"
#include "container/gguf_types.hpp"

namespace bitwright {

/// What a metadata value of GGUF is; the numbers are those of the file.
enum class GgufValueType : uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

/// A key and its value, still as the file has them.
struct GgufEntry {
  std::string_view key;
  GgufValueType type;  ///< of an array: that of its elements, never `array`
  bool is_array;
  uint64_t count;                  ///< 1 unless an array
  std::span<const std::byte> raw;  ///< the values; a string is 8 bytes of length, then its bytes
};

/// A GGUF file, read and checked.
struct GgufContents {
  uint32_t version;
  uint64_t alignment;
  std::vector<GgufEntry> metadata;  ///< in file order
  std::vector<StoredArray> arrays;  ///< in file order, which is that of their data
};

/// Reads the header of a GGUF file, version 2 or 3, little-endian (ggml d99724f, docs/gguf.md and src/gguf.cpp).
/// Checked: counts and lengths against the file's size; keys and names (UTF-8, once each); value and tensor types;
/// shapes; rows made of whole blocks; each offset the padded end of the tensor before; data within the file.
/// Throws Error{"bad-gguf"}, {"unsupported-gguf"} (another version or byte order) or {"tensor-outside-file"}.
GgufContents parse_gguf(std::span<const std::byte> file, const std::string& where);
/// A value as JSON: a number, a string (any bytes), true, false, or an array of them.
Json to_json(const GgufEntry& entry);

/// Metadata to be written, in the order of adding.
class GgufMetadata {
 public:
  void add(std::string_view key, uint16_t value);
  void add(std::string_view key, int32_t value);
  void add(std::string_view key, uint32_t value);
  void add(std::string_view key, float value);
  void add(std::string_view key, bool value);
  void add(std::string_view key, std::string_view value);
  void add(std::string_view key, const char* value) { add(key, std::string_view(value)); }
  void add(std::string_view key, std::span<const std::string> values);
  void add(std::string_view key, std::span<const float> values);
  void add(std::string_view key, std::span<const int32_t> values);
  void add(const GgufEntry& entry);  ///< as it is

  uint64_t count() const { return count_; }
  uint64_t alignment() const { return alignment_; }  ///< general.alignment, else 32
  std::string_view bytes() const { return bytes_; }

 private:
  void add_raw(std::string_view key, GgufValueType type, bool is_array, uint64_t count, std::span<const std::byte> raw);
  std::string bytes_;
  uint64_t count_ = 0, alignment_ = 32;
};

/// Files of version 3 for ShardWriter: `arrays` of each tensor in their order in "model.gguf"; where their data is more
/// than `most_bytes`, in "model-00001-of-00003.gguf" and so on as llama.cpp's gguf-split does it, the metadata in the
/// first, each of at most so much data, or of one tensor. Throws Error{"no-gguf"} for a type, a name or a shape that
/// GGUF has not.
ShardPlan plan_gguf(std::span<const std::vector<ArraySpec>> tensors, const GgufMetadata& metadata,
                    std::optional<uint64_t> most_bytes = {});

/// Writes a GGUF file of version 3 front to back; arrays must be added in the order of `specs`, whose types are all
/// GGUF's and whose rows are whole blocks. A file that was read is written to the same bytes.
class GgufWriter {
 public:
  GgufWriter(const std::filesystem::path& path, const GgufMetadata& metadata, std::vector<ArraySpec> specs);
  void add(std::span<const std::byte> data);
  void finish();

 private:
  void pad(uint64_t written);  ///< zeros to the next multiple of the alignment
  OutputFile file_;
  std::vector<ArraySpec> specs_;
  uint64_t alignment_;
  size_t next_ = 0;
};

}  // namespace bitwright

#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.hpp"
#include "base/output.hpp"
#include "checkpoint/weight_file.hpp"
#include "container/container.hpp"

namespace bitwright {

/// Reads the header of a safetensors file: 8 bytes little-endian length, JSON, data
/// (https://github.com/huggingface/safetensors, README "Format").
/// Checked: the header's length and JSON; each dtype, shape and offset; size = shape x dtype; no overlap, no gap, no
/// byte left over. Throws Error{"bad-safetensors"} or {"tensor-outside-file"} naming `where`, the tensor and the
/// numbers. Arrays are returned in the order of their data.
std::vector<StoredArray> parse_safetensors(std::span<const std::byte> file, const std::string& where);

/// Writes a safetensors file front to back; arrays must be added in the order of `specs`. Data starts at a
/// multiple of 64 bytes.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const std::filesystem::path& path, std::vector<ArraySpec> specs);
  void add(std::span<const std::byte> data);
  void finish();

 private:
  OutputFile file_;
  std::vector<ArraySpec> specs_;
  size_t next_ = 0;
};

}  // namespace bitwright

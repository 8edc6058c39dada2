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
#include "base/json.hpp"
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

/// Which file of a model holds which array, and where.
struct ShardPlan {
  struct File {
    std::string name;  ///< "model.safetensors" if there is one, else "model-00001-of-00003.safetensors"
    std::vector<ArraySpec> arrays;
    std::string header;  ///< all before the data
    uint64_t bytes;      ///< header and data
  };
  struct Place {
    size_t file;
    uint64_t offset;  ///< from the start of the file
  };
  std::vector<File> files;
  std::vector<std::vector<Place>> places;  ///< of each tensor's arrays
  bool has_index = false;                  ///< beside several files, as safetensors has it
  uint64_t bytes() const;                  ///< of all files
};
/// Tensors in their order; a new file where the data of one would grow over `most_bytes` (a larger tensor gets one of
/// its own), as transformers does it. A tensor's arrays stay in one file: those of a length that is a multiple of 8 in
/// their order, then the others, wide elements first, so that each begins at a multiple of its element's size.
/// format: what the metadata of the files says ("pt", "mlx").
ShardPlan plan_shards(std::span<const std::vector<ArraySpec>> tensors, uint64_t most_bytes,
                      std::string_view format = "pt");

/// Writes the files of a plan, at any place and from several threads, and the index of several.
class ShardWriter {
 public:
  /// Existing files keep what they hold: what was written before an interruption. The files' names are on stable
  /// storage when this returns.
  ShardWriter(const std::filesystem::path& directory, ShardPlan plan);
  const ShardPlan& plan() const { return plan_; }
  void write(size_t tensor, size_t array, uint64_t offset, std::span<const std::byte> data);
  void sync_data();  ///< all that was written before is on stable storage when this returns
  void finish();     ///< likewise, with sizes and the index

 private:
  std::filesystem::path directory_;
  ShardPlan plan_;
  std::vector<OutputFile> files_;
};

/// Writes a safetensors file front to back; arrays must be added in the order of `specs`. Data starts at a
/// multiple of 64 bytes.
class SafetensorsWriter {
 public:
  /// documents: by name, the JSON files of a model that is to be this file alone; they become texts of its metadata.
  SafetensorsWriter(const std::filesystem::path& path, std::vector<ArraySpec> specs,
                    const std::map<std::string, OrderedJson>& documents = {}, std::string_view format = "pt");
  void add(std::span<const std::byte> data);
  void finish();

 private:
  OutputFile file_;
  std::vector<ArraySpec> specs_;
  size_t next_ = 0;
};

}  // namespace bitwright

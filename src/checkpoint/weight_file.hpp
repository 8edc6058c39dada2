#pragma once

#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.hpp"
#include "base/json.hpp"
#include "base/mapped_file.hpp"
#include "container/container.hpp"

namespace bitwright {

/// An array as a file stores it.
struct StoredArray {
  std::string name;
  DType dtype;
  Shape shape;
  std::span<const std::byte> data;   ///< in the mapped file, or in WeightContents::owned
  const BlockType* block = nullptr;  ///< as in ArraySpec
};

/// What the header of a weight file says, read and checked.
struct WeightContents {
  std::vector<StoredArray> arrays;            ///< in the order of their data
  std::vector<std::vector<std::byte>> owned;  ///< arrays that the file does not hold in row-major order
  std::shared_ptr<const Json> facts;          ///< what it says of the model beside its tensors; null: nothing
  /// By name, what stands beside an array in a dict: a number, a short text, a short list of numbers; null: nothing.
  std::shared_ptr<const Json> values{};
  /// By name, JSON files of a model that it carries itself ("config.json", objects alone); null: nothing.
  std::shared_ptr<const Json> documents{};
};

/// One kind of weight file: a row of a table (weight_formats.def, the preferred first).
struct WeightFormat {
  std::string_view name;    ///< "safetensors"
  std::string_view suffix;  ///< ".safetensors"
  std::vector<std::string_view> other_suffixes{};
  std::string_view usual_name;  ///< of a model's only file: "model.safetensors"; ".index.json" after it names the index
  std::string_view source;      ///< the specification followed
  /// Does a file that begins with these bytes (at most 512) belong to it?
  bool (*detect)(std::span<const std::byte> start);
  /// Every length, offset, count and name is checked; data is not read. Throws Error naming `where`, the tensor and the
  /// numbers. Arrays point into `file`.
  WeightContents (*parse)(std::span<const std::byte> file, const std::string& where);

  /// Does the file's name end as those of this kind do?
  bool may_be(const std::filesystem::path& path) const;
};
std::span<const WeightFormat* const> all_weight_formats();

/// A mapped weight file of any kind, told by its contents.
class WeightFile {
 public:
  explicit WeightFile(const std::filesystem::path& path);
  const WeightFormat& format() const { return *format_; }
  std::span<const StoredArray> arrays() const { return contents_.arrays; }
  const Json* facts() const { return contents_.facts.get(); }
  const Json* values() const { return contents_.values.get(); }
  const Json* documents() const { return contents_.documents.get(); }
  std::span<const std::byte> bytes() const { return file_.bytes(); }
  const MappedFile& file() const { return file_; }

 private:
  MappedFile file_;
  const WeightFormat* format_;
  WeightContents contents_;
};

}  // namespace bitwright

#include "checkpoint/weight_file.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace bitwright {

#define WEIGHT_FORMAT(name) extern const WeightFormat name##_format;
#include "checkpoint/weight_formats.def"

namespace {

constexpr size_t kStart = 512;  // an archive is known by the name of its first file

/// By its contents; a damaged one by its name, so that the error says what is wrong with it.
const WeightFormat& format_of(std::span<const std::byte> file, const std::filesystem::path& path) {
  for (const WeightFormat* format : all_weight_formats())
    if (format->detect(file.first(std::min(kStart, file.size())))) return *format;
  std::string known;
  for (const WeightFormat* format : all_weight_formats()) {
    if (format->may_be(path)) return *format;
    known += (known.empty() ? "" : ", ") + std::string(format->name);
  }
  throw Error({.code = "unknown-format",
               .what = "cannot read model",
               .where = path.string(),
               .why = fmt::format("it begins like no file of weights that is known ({})", known),
               .fix = "give a model directory or a file of weights"});
}

}  // namespace

bool WeightFormat::may_be(const std::filesystem::path& path) const {
  const std::string extension = path.extension().string();
  return extension == suffix || std::ranges::find(other_suffixes, extension) != other_suffixes.end();
}

std::span<const WeightFormat* const> all_weight_formats() {
#define WEIGHT_FORMAT(name) &name##_format,
  static constexpr auto all = std::to_array<const WeightFormat*>({
#include "checkpoint/weight_formats.def"
  });
  return all;
}

WeightFile::WeightFile(const std::filesystem::path& path)
    : file_(path), format_(&format_of(file_.bytes(), path)), contents_(format_->parse(file_.bytes(), path.string())) {}

}  // namespace bitwright

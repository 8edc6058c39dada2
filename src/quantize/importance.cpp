#include "quantize/importance.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/mapped_file.hpp"

namespace bitwright {
namespace {

constexpr const char* kEmbedding = "token_embd.weight";
/// llama-imatrix leaves it out unless it is asked for.
constexpr const char* kOutput = "output.weight";

int64_t matrices_of(const Shape& shape) { return shape.size() == 3 ? shape[0] : 1; }

}  // namespace

Importance::Importance(const std::filesystem::path& file)
    : path_(file.string()), digest_(MappedFile(file).digest()), imatrix_(read_imatrix(file)) {}

void Importance::fail(const std::string& why) const {
  throw Error({.code = "bad-imatrix",
               .what = "cannot use the statistics",
               .where = path_,
               .why = why,
               .fix = "make them of this model: `bitwright calibrate`"});
}

void Importance::check(const Recipe& recipe, std::span<const TensorFacts> tensors,
                       std::vector<Warning>& warnings) const {
  size_t weighted = 0, known = 0;
  std::vector<std::string> missing;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto& [name, shape] = std::tie(tensors[i].name, tensors[i].shape);
    const TensorPlan& plan = recipe.tensors[i];
    if (!plan.scheme || plan.scheme->is_plain() || !plan.algorithm->weighted) continue;
    ++weighted;
    const auto found = imatrix_.entries.find(name);
    if (found == imatrix_.entries.end()) {
      if (name != kEmbedding && name != kOutput) missing.push_back(printable(name));
      continue;
    }
    ++known;
    const auto matrices = static_cast<size_t>(matrices_of(shape)), counts = found->second.counts.size();
    if (counts != 1 && counts != matrices)
      fail(fmt::format("tensor '{}' has {} matrices, the file has counts for {}", printable(name), matrices, counts));
    const auto length = static_cast<int64_t>(found->second.sums.size()), wanted = matrices_of(shape) * shape.back();
    if (length != wanted && name != kEmbedding)
      fail(fmt::format("tensor '{}' has {} columns, the file has numbers for {}", printable(name), wanted, length));
  }
  if (weighted == 0)
    warnings.push_back(
        {"STATS_UNUSED", fmt::format("nothing of {} is used: no weight is quantized by importance", printable(path_))});
  if (weighted > 0 && known == 0) fail("it knows none of the model's tensors");
  if (missing.empty()) return;
  constexpr size_t kNamed = 3;
  const size_t count = missing.size();
  missing.resize(std::min(count, kNamed));
  warnings.push_back(
      {"NO_IMPORTANCE", fmt::format("{} tensors are not in {} and are quantized as if all columns "
                                    "counted alike: {}{}",
                                    count, printable(path_), fmt::join(missing, ", "), count > kNamed ? ", …" : "")});
}

std::vector<float> Importance::of(const std::string& tensor, const Shape& shape, int64_t index) const {
  const auto found = imatrix_.entries.find(tensor);
  const auto columns = static_cast<size_t>(shape.back()), matrices = static_cast<size_t>(matrices_of(shape));
  if (found == imatrix_.entries.end() || found->second.sums.size() != matrices * columns) return {};
  return mean_squares(found->second, static_cast<size_t>(index) * columns, columns);
}

uint64_t Importance::memory_bytes() const {
  uint64_t bytes = 0;
  for (const auto& [name, entry] : imatrix_.entries)
    bytes += entry.sums.size() * sizeof(float) + entry.counts.size() * sizeof(int64_t);
  return bytes;
}

OrderedJson Importance::to_json() const {
  OrderedJson json = {{"file", printable(path_)},           {"sha256", digest_},
                      {"entries", imatrix_.entries.size()}, {"chunks", imatrix_.chunks},
                      {"chunk_size", imatrix_.chunk_size},  {"datasets", OrderedJson::array()}};
  for (const std::string& dataset : imatrix_.datasets) json["datasets"].push_back(printable(dataset));
  return json;
}

void Importance::add_to(GgufMetadata& metadata) const {
  metadata.add("quantize.imatrix.file", printable(path_));
  if (!imatrix_.datasets.empty()) metadata.add("quantize.imatrix.dataset", imatrix_.datasets.front());
  metadata.add("quantize.imatrix.entries_count", static_cast<uint32_t>(imatrix_.entries.size()));
  if (imatrix_.chunks > 0) metadata.add("quantize.imatrix.chunks_count", imatrix_.chunks);
}

}  // namespace bitwright

#include "quantize/model_files.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <vector>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "base/output.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

/// Written anew or made of weights.
bool is_rewritten(const std::string& name) {
  return name == "config.json" || name == "quantization_metadata.json" || name.ends_with(".index.json");
}

bool is_side_file(const fs::path& path) {
  constexpr std::array<std::string_view, 5> kKinds = {".json", ".model", ".jinja", ".tiktoken", ".vocab"};
  const std::string name = path.filename().string();
  if (name == "merges.txt" || name == "vocab.txt") return true;
  return std::ranges::find(kKinds, path.extension().string()) != kKinds.end() && !is_rewritten(name);
}

/// Absolute, links resolved as far as the path exists, no slash at the end.
fs::path resolved(const fs::path& path) {
  const fs::path canonical = fs::weakly_canonical(fs::absolute(path));
  return canonical.has_filename() ? canonical : canonical.parent_path();
}

bool is_inside(const fs::path& inner, const fs::path& outer) {
  const auto [end, unused] = std::mismatch(outer.begin(), outer.end(), inner.begin(), inner.end());
  return end == outer.end();
}

}  // namespace

fs::path model_directory(const Checkpoint& model) {
  if (fs::is_directory(model.path())) return model.path();
  return model.path().has_parent_path() ? model.path().parent_path() : fs::path(".");
}

OrderedJson read_config(const Checkpoint& model) {
  const fs::path path = model_directory(model) / "config.json";
  return fs::exists(path) ? parse_ordered_json(read_text_file(path), path.string()) : OrderedJson::object();
}

void copy_side_files(const Checkpoint& model, const fs::path& to) {
  std::vector<fs::path> files;
  for (const fs::directory_entry& entry : fs::directory_iterator(model_directory(model)))
    if (entry.is_regular_file() && is_side_file(entry.path())) files.push_back(entry.path());
  for (const fs::path& file : files) write_text_file(to / file.filename(), MappedFile(file).text());
}

void check_apart(const Checkpoint& model, const fs::path& output) {
  const fs::path target = resolved(output), source = resolved(model_directory(model));
  if (is_inside(target, source) || is_inside(source, target))
    throw Error({.code = "output-is-input",
                 .what = "cannot write output",
                 .where = output.string(),
                 .why = fmt::format("it is, holds or lies in the model {}", model.path().string()),
                 .fix = "choose a directory beside it",
                 .status = ExitStatus::usage});
}

}  // namespace bitwright

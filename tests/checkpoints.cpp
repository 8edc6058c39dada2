#include "tests/checkpoints.hpp"

#include <nlohmann/json.hpp>
#include <vector>

#include "checkpoint/safetensors.hpp"
#include "container/container.hpp"
#include "tests/support.hpp"

namespace bitwright::test {

void write_checkpoint(const std::filesystem::path& dir, const Json& config, const Tensors& tensors) {
  const Container& native = *find_container("native");
  std::vector<StoredTensor> stored;
  std::vector<NamedArray> arrays;
  for (const auto& [name, t] : tensors) {
    if (t.scheme.is_plain()) {
      arrays.push_back({{name, dtype_of(*t.scheme.element).value(), t.shape}, t.codes});
      continue;
    }
    stored.push_back({.name = name, .shape = t.shape, .scheme = t.scheme});
    for (NamedArray& array : native.pack(stored.back(), t)) arrays.push_back(std::move(array));
  }
  std::vector<ArraySpec> specs;
  for (const NamedArray& array : arrays) specs.push_back(array.spec);
  SafetensorsWriter writer(dir / "model.safetensors", specs);
  for (const NamedArray& array : arrays) writer.add(array.data);
  writer.finish();
  OrderedJson written = config;
  std::map<std::string, OrderedJson> files;
  if (!stored.empty()) native.write_metadata({stored, {}, OrderedJson::object()}, {written, files});
  write_file(dir / "config.json", written.dump());
  for (const auto& [name, json] : files) write_file(dir / name, json.dump());
}

}  // namespace bitwright::test

// Every kind of quantized model to every container: really written, read back through the other container's own
// reading, and compared value by value. What comes of it is the table of docs/conversions.md.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"
#include "base/progress.hpp"
#include "checkpoint/safetensors.hpp"
#include "model/open_model.hpp"
#include "quantize/quantize.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;
using test::TemporaryDirectory;

/// A model to convert: what `quantize` makes for these settings.
struct Source {
  const Container* container;
  QuantizationSettings settings;
};

/// What each container writes, by its table of choices; for native, which leaves all open, the usual methods.
std::vector<Source> all_sources() {
  std::vector<Source> all;
  for (const Container* container : all_containers()) {
    if (container->write_metadata == nullptr) continue;
    if (container->choices.empty())
      for (const char* method : {"int8", "int4", "int2", "nf4", "fp8", "mxfp4"})
        all.push_back({container, {.method = method}});
    for (const SchemeChoice& choice : container->choices) {
      QuantizationSettings settings = {.granularity = std::string(choice.granularity),
                                       .quant_type = std::string(choice.quant_type),
                                       .weight_only = choice.weight_only};
      if (choice.quant_type == "int") {
        settings.bits = choice.bits;
        settings.symmetric = choice.symmetric;
      }
      all.push_back({container, settings});
    }
  }
  return all;
}

/// The first layer of the example, with some of its tokens; experts in one tensor for those who take nothing else.
void write_model(const fs::path& directory, bool experts) {
  constexpr int64_t kTokens = 256;
  const Checkpoint example(test::example_model());
  Json config = example.config();
  config["num_hidden_layers"] = 1;
  config["vocab_size"] = kTokens;
  if (experts)
    config.update(Json{{"architectures", {"Qwen3MoeForCausalLM"}},
                       {"model_type", "qwen3_moe"},
                       {"num_experts", 2},
                       {"num_experts_per_tok", 1},
                       {"moe_intermediate_size", 768},
                       {"norm_topk_prob", true},
                       {"decoder_sparse_step", 1},
                       {"mlp_only_layers", Json::array()}});
  std::vector<ArraySpec> specs;
  std::vector<std::vector<float>> values;
  const auto add = [&](const std::string& name, const Shape& shape, std::vector<float> numbers) {
    numbers.resize(static_cast<size_t>(element_count(shape)));
    specs.push_back({name, DType::bf16, shape});
    values.push_back(std::move(numbers));
  };
  const auto read = [&](const std::string& name) { return example.read_f32(*example.find(name)); };
  const std::string mlp = "model.layers.0.mlp.";
  for (const TensorEntry& entry : example.tensors()) {
    const bool layer = entry.name.starts_with("model.layers.");
    if (layer && !entry.name.starts_with("model.layers.0.")) continue;
    if (experts && entry.name.starts_with(mlp)) continue;
    Shape shape = entry.shape;
    if (entry.name == "model.embed_tokens.weight") shape[0] = kTokens;
    add(entry.name, shape, read(entry.name));
  }
  if (experts) {
    std::vector<float> both = read(mlp + "gate_proj.weight"), down = read(mlp + "down_proj.weight");
    const std::vector<float> up = read(mlp + "up_proj.weight");
    both.insert(both.end(), up.begin(), up.end());
    const auto twice = [](std::vector<float> v) {
      const size_t n = v.size();
      for (size_t i = 0; i < n; ++i) v.push_back(-0.5f * v[n - 1 - i]);
      return v;
    };
    add(mlp + "experts.gate_up_proj", {2, 1536, 256}, twice(both));
    add(mlp + "experts.down_proj", {2, 256, 768}, twice(down));
    add(mlp + "gate.weight", {2, 256}, std::vector<float>(down.begin(), down.begin() + 512));
    for (const char* norm : {"q_norm", "k_norm"})
      add(fmt::format("model.layers.0.self_attn.{}.weight", norm), {32}, std::vector<float>(32, 1.0f));
  }
  fs::create_directory(directory);
  test::write_file(directory / "config.json", config.dump());
  SafetensorsWriter writer(directory / "model.safetensors", specs);
  for (const std::vector<float>& numbers : values) {
    std::vector<std::byte> bytes(numbers.size() * 2);
    from_f32(DType::bf16, numbers, bytes);
    writer.add(bytes);
  }
  writer.finish();
}

std::string kind_of(const Scheme& scheme) {
  return scheme.element->kind == ElementKind::integer ? fmt::format("int{}", scheme.element->bits)
                                                      : std::string(scheme.element->name);
}

/// A model that was written, read as its container reads it.
class Written {
 public:
  explicit Written(const fs::path& path) : model_(open_model(path)) {
    for (const TensorEntry& entry : model_.tensors()) values_[entry.name] = model_.read_f32(entry);
  }
  const Checkpoint& model() const { return model_; }
  const std::map<std::string, std::vector<float>>& values() const { return values_; }

  /// The most that a value of a quantized tensor differs; of others nothing may.
  double difference(const Written& other) const {
    double most = 0;
    EXPECT_EQ(values_.size(), other.values_.size());
    for (const auto& [name, mine] : values_) {
      const auto found = other.values_.find(name);
      if (found == other.values_.end() || found->second.size() != mine.size()) {
        ADD_FAILURE() << name << " is missing, or of another size";
        continue;
      }
      double here = 0;
      for (size_t i = 0; i < mine.size(); ++i)
        here = std::max(here, std::fabs(double{mine[i]} - double{found->second[i]}));
      if (!model_.find(name)->quantized()) {
        EXPECT_EQ(here, 0) << name;
      }
      most = std::max(most, here);
    }
    return most;
  }
  double largest() const {
    double most = 0;
    for (const auto& [name, values] : values_)
      if (model_.find(name)->quantized())
        for (const float v : values) most = std::max(most, std::fabs(double{v}));
    return most;
  }
  /// By how many tensors: what codes they are.
  std::string kind() const {
    std::map<std::string, size_t> counts;
    for (const TensorEntry& entry : model_.tensors())
      if (entry.quantized()) ++counts[kind_of(entry.scheme)];
    const auto most = std::ranges::max_element(counts, {}, [](const auto& item) { return item.second; });
    return most == counts.end() ? "floats" : most->first;
  }

 private:
  Checkpoint model_;
  std::map<std::string, std::vector<float>> values_;
};

/// One model and what becomes of it.
class Cell {
 public:
  Cell(const Written& source, const Container& target, const fs::path& output)
      : source_(source), target_(target), output_(output) {}

  std::string run() {
    try {
      OrderedJson result;
      try {
        result = convert({});
      } catch (const Error& error) {
        if (error.code() != "does-not-fit") throw;
        result = convert({.requantize = true});
      }
      return check(result);
    } catch (const Error& error) {
      const std::set<std::string> expected = {"does-not-fit", "no-gguf"};
      EXPECT_TRUE(expected.contains(error.code())) << error.what();
      EXPECT_FALSE(fs::exists(output_));
      return "–";
    }
  }

 private:
  OrderedJson convert(ConversionRequest request, bool dry_run = false) const {
    request.container = &target_;
    std::vector<Warning> warnings;
    return bitwright::convert(source_.model(), {.output = {.output = output_}, .request = request, .dry_run = dry_run},
                              warnings);
  }

  std::string check(const OrderedJson& result) const {
    const Written written(output_);
    const double difference = source_.difference(written);
    const std::string verdict = result["verdict"];
    EXPECT_EQ(result["exact"].get<bool>(), difference == 0 && verdict != "requantized");
    EXPECT_EQ(result["max_abs_difference"].get<double>(), difference);
    const std::string kind = written.kind(), as = kind == source_.kind() ? "" : " " + kind;
    if (verdict == "requantized") return "~ " + kind;
    bool floats = false;
    double most = 0;
    for (const OrderedJson& tensor : result["tensors"]) {
      const bool is_float = dtype_from_name(tensor["scheme"].get<std::string>()).has_value();
      floats = floats || is_float;
      if (!is_float) most = std::max(most, tensor["max_abs_difference"].get<double>());
    }
    const std::string mark = floats ? " †" : "";
    if (most == 0) return "=" + as + mark;
    return fmt::format("≈{} {:.1g} %{}{}", as, 100 * most / source_.largest(), exactly(kind), mark);
  }

  /// What `--exact` makes of it.
  std::string exactly(const std::string& kind) const {
    const OrderedJson result = convert({.exact = true}, true);
    if (!result["exact"].get<bool>()) return "";
    for (const OrderedJson& tensor : result["tensors"]) {
      const std::string scheme = tensor["scheme"];
      if (dtype_from_name(scheme)) continue;
      const std::string as = scheme.substr(0, scheme.find_first_of(" ,"));
      return as != kind ? " (= " + as + ")" : " (= float32)";
    }
    return "";
  }

  const Written& source_;
  const Container& target_;
  fs::path output_;
};

std::string name_of(const Source& source, const Checkpoint& model) {
  if (source.container->model_file == "gguf" && *source.settings.quant_type != "int") {
    std::string name = *source.settings.quant_type;
    std::ranges::transform(name, name.begin(), [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
    return name;
  }
  std::map<std::string, size_t> counts;
  bool activations = false;
  for (const TensorEntry& entry : model.tensors()) {
    if (!entry.quantized()) continue;
    ++counts[describe(entry.scheme)];
    activations = activations || entry.linear.input;
  }
  const auto most = std::ranges::max_element(counts, {}, [](const auto& item) { return item.second; });
  return most->first + (activations ? ", activations" : "");
}

class Matrix {
 public:
  Matrix() {
    write_model(dir_ / "dense", false);
    write_model(dir_ / "experts", true);
    for (const Container* container : all_containers())
      if (container->write_metadata != nullptr) targets_.push_back(container);
  }

  std::string run() {
    const Container* last = nullptr;
    for (const Source& source : all_sources()) {
      const std::string row = make_row(source);
      if (row.empty()) continue;
      if (source.container != last) add_head(*(last = source.container));
      table_ += row;
    }
    return table_;
  }
  size_t cells() const { return cells_; }

 private:
  void add_head(const Container& container) {
    table_ += fmt::format("\n### From {}\n\n| |", container.name);
    for (const Container* target : targets_) table_ += fmt::format(" {} |", target->name);
    table_ += "\n|---|";
    for (size_t i = 0; i < targets_.size(); ++i) table_ += "---|";
    table_ += "\n";
  }

  /// Empty: nothing is written so, or the same as before.
  std::string make_row(const Source& source) {
    const fs::path path = dir_ / "source";
    fs::remove_all(path);
    const bool experts = source.container->name == "mxfp4";
    try {
      std::vector<Warning> warnings;
      QuantizationRequest request;
      request.settings = source.settings;
      request.skip_modules = {"lm_head"};
      quantize(Checkpoint(dir_ / (experts ? "experts" : "dense")), request,
               {.output = {.output = path}, .verify = false, .container = source.container}, warnings);
    } catch (const Error& error) {
      const std::set<std::string> expected = {"does-not-fit", "needs-calibration", "bad-value"};
      EXPECT_TRUE(expected.contains(error.code())) << error.what();
      return "";
    }
    const Written model(path);
    if (model.kind() == "floats") return "";  // a file type of GGUF, or nothing for this container
    const std::string name = name_of(source, model.model());
    if (!seen_.insert(fmt::format("{} {}", source.container->name, name)).second) return "";
    std::string row = fmt::format("| {} |", name);
    for (const Container* target : targets_) {
      SCOPED_TRACE(fmt::format("{} {} -> {}", source.container->name, name, target->name));
      const fs::path output = dir_ / "output";
      fs::remove_all(output);
      row += fmt::format(" {} |", Cell(model, *target, output).run());
      ++cells_;
    }
    return row + "\n";
  }

  const TemporaryDirectory dir_;
  std::vector<const Container*> targets_;
  std::set<std::string> seen_;
  std::string table_;
  size_t cells_ = 0;
};

TEST(ConversionMatrix, EveryCellIsWhatTheDocumentationSays) {
  set_verbosity(Verbosity::quiet);
  Matrix matrix;
  const std::string table = matrix.run();
  std::cout << "cells: " << matrix.cells() << '\n';
  const fs::path path = "docs/conversions.md";
  const std::string page = test::read_file(path), begin = "<!-- table conversions -->\n", end = "<!-- /table -->\n";
  const size_t from = page.find(begin) + begin.size(), to = page.find(end);
  ASSERT_LE(from, to);
  if (std::getenv("BITWRIGHT_WRITE_DOCS") != nullptr)
    test::write_file(path, page.substr(0, from) + table + page.substr(to));
  else
    EXPECT_EQ(page.substr(from, to - from), table) << "scripts/docs_tables.sh writes it anew";
}

}  // namespace
}  // namespace bitwright

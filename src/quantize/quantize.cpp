#include "quantize/quantize.hpp"

#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "base/mapped_file.hpp"
#include "base/output.hpp"
#include "base/progress.hpp"
#include "base/threads.hpp"
#include "checkpoint/safetensors.hpp"
#include "kernels/decode.hpp"
#include "quantize/model_card.hpp"
#include "quantize/model_files.hpp"
#include "quantize/verify.hpp"

namespace bitwright {
namespace {

constexpr const char* kWeights = "model.safetensors";

/// Figures in files: more digits than anyone uses, fewer than differences between machines' mathematical libraries.
double rounded(double value) { return std::strtod(fmt::format("{:.7g}", value).c_str(), nullptr); }

/// Size and digest of each file so far: weights and what belongs to them. Hidden files are ours.
OrderedJson digests_of(const std::filesystem::path& directory) {
  std::map<std::string, OrderedJson> sorted;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(".")) continue;
    const MappedFile file(entry.path());
    sorted[name] = {{"bytes", file.bytes().size()}, {"sha256", sha256(file.bytes())}};
  }
  return sorted;
}

std::vector<TensorFacts> facts_of(const Checkpoint& source) {
  std::vector<TensorFacts> facts;
  for (const TensorEntry& entry : source.tensors())
    facts.push_back({.name = entry.name, .shape = entry.shape, .is_float = info(entry.dtype).is_float});
  return facts;
}

void check_not_quantized(const Checkpoint& source) {
  if (source.container() == nullptr) return;
  throw Error({.code = "already-quantized",
               .what = "cannot quantize",
               .where = source.path().string(),
               .why = fmt::format("the model is quantized already ({})", source.container()->name),
               .fix = "take the original, or `bitwright dequantize` it first"});
}

class Pipeline {
 public:
  Pipeline(const Checkpoint& source, const QuantizationRequest& request, const QuantizeOptions& options)
      : source_(source),
        options_(options),
        recipe_(resolve(request, facts_of(source))),
        output_((check_apart(source, options.output), options.output), options.force) {}

  OrderedJson run(std::vector<Warning>& warnings) {
    const auto start = std::chrono::steady_clock::now();
    warnings.insert(warnings.end(), recipe_.warnings.begin(), recipe_.warnings.end());
    write_weights();
    warn_of_lost_layers(warnings);
    copy_side_files(source_, output_.staging());
    OrderedJson record = make_record();
    write_metadata(record);  // the written model must open before it can be judged
    record["verification"] = verify(warnings);
    write_metadata(record);
    write_text_file(output_.staging() / "README.md", model_card(record));
    output_.commit();
    OrderedJson result = {{"output", options_.output.string()}, {"format", options_.container->name}};
    for (const char* key : {"algorithm", "scheme", "bytes_in", "bytes_out", "bits_per_weight"})
      result[key] = record[key];
    result["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    result["verification"] = record["verification"];
    result["layers"] = record["layers"];
    return result;
  }

 private:
  StoredTensor stored(size_t i) const {
    const TensorEntry& entry = source_.tensors()[i];
    return {.name = entry.name, .shape = entry.shape, .scheme = *recipe_.tensors[i].scheme, .value_dtype = entry.dtype};
  }

  std::vector<ArraySpec> specs() const {
    std::vector<ArraySpec> specs;
    for (size_t i = 0; i < recipe_.tensors.size(); ++i) {
      const TensorEntry& entry = source_.tensors()[i];
      if (!recipe_.tensors[i].scheme) {
        specs.push_back({entry.name, entry.dtype, entry.shape});
        continue;
      }
      const StoredTensor tensor = stored(i);
      const Fit fit = options_.container->fit(tensor.scheme, tensor.shape);
      if (fit.verdict == Verdict::impossible)
        throw Error(
            {.code = "does-not-fit",
             .what = "cannot quantize",
             .where = entry.name,
             .why = fmt::format("{} cannot hold {}: {}", options_.container->name, describe(tensor.scheme), fit.reason),
             .fix = "choose another scheme or --format"});
      for (ArraySpec& spec : options_.container->layout(tensor)) specs.push_back(std::move(spec));
    }
    std::set<std::string> names;
    for (const ArraySpec& spec : specs)
      if (!names.insert(spec.name).second)
        throw Error({.code = "name-clash",
                     .what = "cannot quantize",
                     .where = spec.name,
                     .why = "two arrays of the output would have this name",
                     .fix = "skip the module"});
    return specs;
  }

  void write_weights() {
    uint64_t total = 0;
    for (const TensorEntry& entry : source_.tensors()) total += entry.stored_bytes;
    Progress progress("quantizing", total);
    SafetensorsWriter writer(output_.staging() / kWeights, specs());
    for (size_t i = 0; i < recipe_.tensors.size(); ++i) {
      throw_if_interrupted();
      const TensorEntry& entry = source_.tensors()[i];
      if (recipe_.tensors[i].scheme) {
        write_quantized(i, writer);
      } else {
        check_kept(entry);
        writer.add(source_.plain_bytes(entry));
      }
      progress.advance(entry.stored_bytes);
    }
    writer.finish();
  }

  WeightView weight(const TensorEntry& entry) const { return {entry.dtype, source_.plain_bytes(entry)}; }

  /// A damaged tensor would make the whole model useless, kept or quantized.
  void check_kept(const TensorEntry& entry) const {
    if (!info(entry.dtype).is_float) return;
    try {
      check_finite(weight(entry));
    } catch (const Error& error) {
      throw error.at(fmt::format("tensor '{}'", printable(entry.name)));
    }
  }

  void write_quantized(size_t i, SafetensorsWriter& writer) {
    const TensorPlan& plan = recipe_.tensors[i];
    const TensorEntry& entry = source_.tensors()[i];
    try {
      const QuantizedTensor t = plan.algorithm->quantize(*plan.scheme, entry.shape, weight(entry), plan.options);
      uint64_t bytes = 0;
      for (const NamedArray& array : options_.container->pack(stored(i), t)) {
        writer.add(array.data);
        bytes += array.data.size();
      }
      layers_.push_back({.name = entry.name,
                         .scheme = *plan.scheme,
                         .algorithm = std::string(plan.algorithm->name),
                         .relative_error = relative_error(weight(entry), t),
                         .bytes = bytes});
      if (verbosity() == Verbosity::verbose)
        fmt::print(stderr, "{}: {}, relative error {:.5f}\n", printable(entry.name), describe(*plan.scheme),
                   layers_.back().relative_error);
    } catch (const Error& error) {
      throw error.at(fmt::format("tensor '{}'", printable(entry.name)));
    }
  }

  void warn_of_lost_layers(std::vector<Warning>& warnings) const {
    constexpr double kLost = 0.5;
    for (const LayerResult& layer : layers_)
      if (layer.relative_error > kLost)
        warnings.push_back(
            {"HIGH_ERROR", fmt::format("tensor '{}' has a relative error of {:.2f}: too few bits, or scales too "
                                       "small for their type (then use --scale-dtype float32)",
                                       printable(layer.name), layer.relative_error)});
  }

  OrderedJson make_record() const {
    uint64_t elements = 0, bytes = 0;
    for (const TensorEntry& entry : source_.tensors()) {
      elements += static_cast<uint64_t>(element_count(entry.shape));
      bytes += entry.stored_bytes;
    }
    for (const LayerResult& layer : layers_) bytes = bytes - source_.find(layer.name)->stored_bytes + layer.bytes;
    OrderedJson record = {{"tool", {{"name", "bitwright"}, {"version", BITWRIGHT_VERSION}}},
                          {"algorithm", common_value([](const LayerResult& l) { return l.algorithm; })},
                          {"scheme", common_value([](const LayerResult& l) { return describe(l.scheme); })},
                          {"recipe", recipe_.settings},
                          {"bytes_in", source_.weight_bytes()},
                          {"bytes_out", std::filesystem::file_size(output_.staging() / kWeights)},
                          {"bits_per_weight", 8.0 * static_cast<double>(bytes) / static_cast<double>(elements)},
                          {"tensor_count", source_.tensors().size()},
                          {"files", digests_of(output_.staging())},
                          {"verification", OrderedJson::object()}};
    OrderedJson& layers = record["layers"] = OrderedJson::array();
    for (const LayerResult& layer : layers_) layers.push_back(layer_json(layer));
    OrderedJson& skipped = record["skipped_layers"] = OrderedJson::array();
    for (const TensorPlan& plan : recipe_.tensors)
      if (!plan.scheme && plan.reason != "not a matrix")
        skipped.push_back({{"name", plan.name}, {"reason", plan.reason}});
    return record;
  }

  OrderedJson layer_json(const LayerResult& layer) const {
    const auto elements = static_cast<double>(element_count(source_.find(layer.name)->shape));
    return {{"name", layer.name},
            {"scheme", describe(layer.scheme)},
            {"algorithm", layer.algorithm},
            {"relative_error", layer.relative_error},
            {"bits_per_weight", 8.0 * static_cast<double>(layer.bytes) / elements}};
  }

  /// The value most layers share; others are in `layers`.
  template <class Get>
  std::string common_value(const Get& get) const {
    std::map<std::string, size_t> counts;
    for (const LayerResult& layer : layers_) ++counts[get(layer)];
    const auto most = std::ranges::max_element(counts, {}, [](const auto& item) { return item.second; });
    return counts.size() == 1 ? most->first : fmt::format("mixed, mostly {}", most->first);
  }

  void write_metadata(const OrderedJson& record) const {
    OrderedJson config = read_config(source_);
    std::map<std::string, OrderedJson> files;
    std::vector<StoredTensor> tensors;
    for (size_t i = 0; i < recipe_.tensors.size(); ++i)
      if (recipe_.tensors[i].scheme) tensors.push_back(stored(i));
    options_.container->write_metadata(tensors, record, {.config = config, .files = files});
    write_text_file(output_.staging() / "config.json", config.dump(2) + "\n");
    for (const auto& [name, json] : files) write_text_file(output_.staging() / name, json.dump(2) + "\n");
  }

  OrderedJson verify(std::vector<Warning>& warnings) const {
    if (!options_.verify) return {{"read_back", false}, {"reason", "verification was switched off"}};
    const Checkpoint written(output_.staging());
    verify_tensors(source_, written, layers_);
    std::string reason;
    const std::optional<Judgement> judgement = judge(source_, written, reason);
    if (!judgement) {
      if (options_.max_kl || options_.max_perplexity_increase_percent)
        throw Error({.code = "not-judged",
                     .what = "cannot hold a limit on the loss",
                     .why = reason,
                     .fix = "leave --max-kl and --max-perplexity-increase out"});
      warnings.push_back({"NOT_JUDGED", reason});
      return {{"read_back", true}, {"reason", reason}};
    }
    check_limits(judgement->quality);
    const Divergence& d = *judgement->quality.reference;
    return {{"read_back", true},
            {"perplexity", rounded(judgement->quality.perplexity)},
            {"reference_perplexity", rounded(d.reference_perplexity)},
            {"kl_mean", rounded(d.kl_mean)},
            {"kl_p99", rounded(d.kl_p99)},
            {"kl_max", rounded(d.kl_max)},
            {"top1_agreement", rounded(d.top1_agreement)},
            {"tokens", judgement->quality.tokens},
            {"protocol", to_json(judgement->protocol, bundled_text(), judgement->quality.windows)}};
  }

  void check_limits(const Quality& quality) const {
    const auto refuse = [](const std::string& why) {
      throw Error({.code = "quality-limit",
                   .what = "the quantized model is worse than allowed",
                   .why = why,
                   .fix = "use more bits, smaller groups or --range mse; nothing was written"});
    };
    const Divergence& d = *quality.reference;
    const double increase = 100 * (quality.perplexity / d.reference_perplexity - 1);
    if (options_.max_kl && !(d.kl_mean <= *options_.max_kl))
      refuse(fmt::format("mean KL divergence {:.6f} is over --max-kl {}", d.kl_mean, *options_.max_kl));
    if (options_.max_perplexity_increase_percent && !(increase <= *options_.max_perplexity_increase_percent))
      refuse(fmt::format("perplexity rose by {:.3f} %, over --max-perplexity-increase {}", increase,
                         *options_.max_perplexity_increase_percent));
  }

  const Checkpoint& source_;
  const QuantizeOptions& options_;
  Recipe recipe_;
  OutputDirectory output_;
  std::vector<LayerResult> layers_;
};

}  // namespace

OrderedJson quantize(const Checkpoint& source, const QuantizationRequest& request, const QuantizeOptions& options,
                     std::vector<Warning>& warnings) {
  check_not_quantized(source);
  return Pipeline(source, request, options).run(warnings);
}

}  // namespace bitwright

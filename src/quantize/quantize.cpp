#include "quantize/quantize.hpp"

#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/mapped_file.hpp"
#include "base/output.hpp"
#include "base/progress.hpp"
#include "base/size.hpp"
#include "base/threads.hpp"
#include "checkpoint/safetensors.hpp"
#include "container/rows.hpp"
#include "kernels/decode.hpp"
#include "kernels/encode.hpp"
#include "model/open_model.hpp"
#include "quantize/fused.hpp"
#include "quantize/gguf_output.hpp"
#include "quantize/importance.hpp"
#include "quantize/model_card.hpp"
#include "quantize/model_files.hpp"
#include "quantize/output_layout.hpp"
#include "quantize/stream.hpp"
#include "quantize/verify.hpp"
#include "quantize/write_output.hpp"
#include "scheme/transposed.hpp"

namespace bitwright {
namespace {

/// Figures in files: more digits than anyone uses, fewer than differences between machines' mathematical libraries.
double rounded(double value) { return std::strtod(fmt::format("{:.7g}", value).c_str(), nullptr); }

// Rates of estimates, on one thread of a common machine; the search for ranges is what takes time.
constexpr double kSecondsAByte = 1 / 0.5e9, kSecondsAByteSearching = 1 / 0.4e9;

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
  /// source: `model`, or under the names of the file that is written, as `gguf` has arranged it.
  Pipeline(const Checkpoint& model, const Checkpoint& source, const GgufOutput* gguf,
           const QuantizationRequest& request, const QuantizeOptions& options)
      : model_(model), source_(source), facts_(facts_of(source)), gguf_(gguf), options_(options) {
    if (request.has_statistics) importance_.emplace(options.stats);
    const std::optional<ForeignNames> names = gguf == nullptr ? std::nullopt : std::optional(gguf->names());
    OutputLayout layout =
        lay_out(facts_, request, *options.container, options.output.shard_bytes(), names ? &*names : nullptr);
    recipe_ = std::move(layout.recipe);
    job_.arrays = std::move(layout.arrays);
    check_importance();
    shards_ = gguf == nullptr ? std::move(layout.shards)
                              : plan_gguf(job_.arrays,
                                          gguf->metadata(job_.arrays, recipe_.settings.value("gguf_type", ""),
                                                         any_weighted() ? &*importance_ : nullptr),
                                          options.output.max_shard_bytes);
    check_apart(model, options.output.output);
    plan();
    if (find_sizes(job_, options.output.max_memory))
      shards_ = plan_shards(job_.arrays, options.output.shard_bytes(), options.container->weights_format);
    bytes_out_ = shards_.bytes();
    const bool searches = std::ranges::any_of(
        recipe_.tensors, [](const TensorPlan& p) { return p.scheme && p.options.range == RangeRule::mse; });
    estimate_ = estimate(job_, bytes_out_, source.tensors().size(), searches ? kSecondsAByteSearching : kSecondsAByte,
                         options.output.max_memory);
    if (options.verify) not_judged_ = why_not_judged(model);
    if (!not_judged_.empty()) check_no_limits(not_judged_);
  }

  OrderedJson run(std::vector<Warning>& warnings) {
    const auto start = std::chrono::steady_clock::now();
    warnings.insert(warnings.end(), recipe_.warnings.begin(), recipe_.warnings.end());
    warn_of_notes(warnings);
    if (gguf_ != nullptr && !importance_) warn_of_importance(job_.arrays, warnings);
    OrderedJson record;
    const auto finish = [&](const std::filesystem::path& staging, std::span<const SquaredError> errors) {
      staging_ = staging;
      add_layers(errors);
      warn_of_lost_layers(warnings);
      write_metadata(OrderedJson::object());  // the written model must open before it can be verified
      record = make_record();
      if (gguf_ == nullptr) record["files"] = digests_of(staging_);  // the file itself has no place for its digest
      record["verification"] = verify(warnings);
      engines_ = engines_json(write_metadata(record));
      write_text_file(staging_ / "README.md", model_card(record));
    };
    write_output(source_, job_, shards_, estimate_, options_.output,
                 {.begin = [this] { largest_ = fused_magnitudes(source_, recipe_); },
                  .finish = finish,
                  .side_files = gguf_ == nullptr});
    OrderedJson result = {{"output", options_.output.output.string()}, {"format", options_.container->name}};
    for (const char* key : {"algorithm", "scheme", "bytes_in", "bytes_out", "bits_per_weight"})
      result[key] = record[key];
    result["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    result["estimate"] = to_json(estimate_);
    result["peak_memory_bytes"] = peak_memory();
    result["verification"] = record["verification"];
    result["layers"] = record["layers"];
    result["engines"] = engines_;
    return result;
  }

 private:
  StoredTensor stored(size_t i) const { return stored_tensor(facts_[i], recipe_.tensors[i], *options_.container); }
  bool is_transposed(size_t i) const {
    return recipe_.tensors[i].scheme && is_stored_transposed(facts_[i], *options_.container);
  }

  void check_importance() {
    const auto weighted =
        std::ranges::find_if(recipe_.tensors, [](const TensorPlan& p) { return p.scheme && p.algorithm->weighted; });
    if (importance_) {
      importance_->check(recipe_, facts_, recipe_.warnings);
      job_.memory = importance_->memory_bytes();
    } else if (weighted != recipe_.tensors.end()) {
      throw Error({.code = "no-stats",
                   .what = "cannot quantize",
                   .where = "quantization.algorithm",
                   .why = fmt::format("{} needs to know how much each column counts", weighted->algorithm->name),
                   .fix = "run `bitwright calibrate MODEL --text FILE -o STATS` and give --stats STATS",
                   .status = ExitStatus::usage});
    }
  }

  /// What is done to which part of which tensor, and what comes of it.
  void plan() {
    job_.label = "quantizing";
    job_.produce = [this](const Piece& piece) { return produce(piece); };
    job_.prefetch = [this](const Piece& piece) {
      source_.prefetch(source_.tensors()[piece.tensor], input_offset(piece), piece.bytes);
    };
    std::string decisions;
    for (size_t i = 0; i < recipe_.tensors.size(); ++i) {
      const TensorEntry& entry = source_.tensors()[i];
      const TensorPlan& tensor = recipe_.tensors[i];
      add_pieces(i);
      decisions += fmt::format("{} {} {}\n", entry.name, tensor.scheme ? to_json(*tensor.scheme).dump() : "kept",
                               tensor.scheme ? tensor.algorithm->name : "");
    }
    metadata(OrderedJson::object());  // what cannot be written is refused before there is any work
    const std::string recipe = decisions + recipe_.settings.dump() + std::string(options_.container->name);
    job_.identity = {{"command", "quantize"}, {"recipe", sha256(recipe)}};
    job_.identity["statistics"] = importance_ ? importance_->digest() : "none";
  }

  void add_pieces(size_t i) {
    const TensorEntry& entry = source_.tensors()[i];
    const bool quantized = recipe_.tensors[i].scheme.has_value();
    std::vector<RowRange> parts = {{0, row_count(entry.shape)}};
    if (!is_transposed(i)) parts = quantized ? row_pieces(*options_.container, stored(i)) : element_pieces(entry.shape);
    if (is_weighted(i)) parts = within_matrices(parts, entry.shape);
    for (const RowRange rows : parts) {
      Piece piece = {.tensor = i, .rows = rows, .bytes = 0, .memory = 0};
      piece.bytes = static_cast<uint64_t>((rows.end - rows.begin) * width(piece)) * size_bytes(entry.dtype);
      piece.memory = quantized ? quantized_piece_memory((rows.end - rows.begin) * width(piece), entry.dtype)
                               : 2 * piece.bytes;  // the original's and the copy's, while they are compared
      if (is_transposed(i)) piece.memory += piece.bytes;
      job_.pieces.push_back(piece);
    }
  }

  bool any_weighted() const {
    for (size_t i = 0; i < recipe_.tensors.size(); ++i)
      if (is_weighted(i)) return true;
    return false;
  }
  bool is_weighted(size_t i) const {
    const TensorPlan& plan = recipe_.tensors[i];
    return importance_ && plan.scheme && !plan.scheme->is_plain() && plan.algorithm->weighted;
  }

  /// Elements of a row; a kept tensor's pieces are ranges of elements.
  int64_t width(const Piece& piece) const {
    const Shape& shape = source_.tensors()[piece.tensor].shape;
    return recipe_.tensors[piece.tensor].scheme && !shape.empty() ? shape.back() : 1;
  }
  uint64_t input_offset(const Piece& piece) const {
    return static_cast<uint64_t>(piece.rows.begin * width(piece)) * size_bytes(source_.tensors()[piece.tensor].dtype);
  }

  void add_layers(std::span<const SquaredError> errors) {
    size_t piece = 0;
    for (size_t i = 0; i < recipe_.tensors.size(); ++i) {
      SquaredError sums;
      for (; piece < job_.pieces.size() && job_.pieces[piece].tensor == i; ++piece) sums += errors[piece];
      if (recipe_.tensors[i].scheme) add_layer(i, sums.relative());
    }
  }

  void add_layer(size_t i, double error) {
    const TensorPlan& plan = recipe_.tensors[i];
    uint64_t bytes = 0;
    notes_[plan.name] = plan.note;
    for (const ArraySpec& array : job_.arrays[i]) bytes += array.bytes();
    layers_.push_back({.name = plan.name,
                       .scheme = *plan.scheme,
                       .algorithm = std::string(plan.algorithm->name),
                       .relative_error = error,
                       .bytes = bytes});
    if (verbosity() == Verbosity::verbose)
      fmt::print(stderr, "{}: {}, relative error {:.5f}\n", printable(plan.name), describe(*plan.scheme), error);
  }

  Produced produce(const Piece& piece) const {
    const TensorEntry& entry = source_.tensors()[piece.tensor];
    const bool quantizes = recipe_.tensors[piece.tensor].scheme.has_value();
    Slice kept = {.array = 0, .offset = input_offset(piece), .data = {}};
    if (!quantizes) kept.data.resize(piece.bytes);
    // Not cleared first: it is read over at once.
    const auto stored = quantizes ? std::make_unique_for_overwrite<std::byte[]>(piece.bytes) : nullptr;
    const std::span<std::byte> bytes = quantizes ? std::span(stored.get(), piece.bytes) : std::span(kept.data);
    source_.read_bytes(entry, input_offset(piece), bytes);
    try {
      // One damaged value would make the whole model useless, kept or quantized.
      if (info(entry.dtype).is_float) check_finite({entry.dtype, bytes}, piece.rows.begin * width(piece));
      if (is_transposed(piece.tensor))
        return quantized(piece, transposed(bytes, entry.shape[0], entry.shape[1], size_bytes(entry.dtype)));
      if (quantizes) return quantized(piece, bytes);
    } catch (const Error& error) {
      throw error.at(fmt::format("tensor '{}'", printable(entry.name)));
    }
    Produced produced;
    produced.slices.push_back(std::move(kept));
    return produced;
  }

  Produced quantized(const Piece& piece, std::span<const std::byte> bytes) const {
    const TensorPlan& plan = recipe_.tensors[piece.tensor];
    const TensorEntry& entry = source_.tensors()[piece.tensor];
    const bool whole = piece.rows.begin == 0 && piece.rows.end == row_count(entry.shape);
    const StoredTensor all = stored(piece.tensor);
    const StoredTensor part = whole ? all : rows_of(all, piece.rows.begin, piece.rows.end);
    AlgorithmOptions options = plan.options;
    if (!largest_.empty()) options.largest = largest_[piece.tensor];
    std::vector<float> importance;
    if (is_weighted(piece.tensor))
      importance = importance_->of(entry.name, entry.shape, piece.rows.begin / entry.shape[entry.shape.size() - 2]);
    options.importance = importance;
    const QuantizedTensor t = plan.algorithm->quantize(*plan.scheme, part.shape, {entry.dtype, bytes}, options);
    return {.slices = packed_rows(*options_.container, all, job_.arrays[piece.tensor],
                                  whole ? RowRange{0, row_count(all.shape)} : piece.rows, t),
            .error = squared_error({entry.dtype, bytes}, t)};
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
                          {"bytes_out", bytes_out_},
                          {"bits_per_weight", 8.0 * static_cast<double>(bytes) / static_cast<double>(elements)},
                          {"tensor_count", source_.tensors().size()},
                          {"files", OrderedJson::object()},
                          {"verification", OrderedJson::object()}};
    if (importance_) record["statistics"] = importance_->to_json();
    OrderedJson& layers = record["layers"] = OrderedJson::array();
    for (const LayerResult& layer : layers_) layers.push_back(layer_json(layer));
    OrderedJson& skipped = record["skipped_layers"] = OrderedJson::array();
    for (const TensorPlan& plan : recipe_.tensors)
      if (!plan.scheme && plan.reason != kNotMatrix) skipped.push_back({{"name", plan.name}, {"reason", plan.reason}});
    return record;
  }

  OrderedJson layer_json(const LayerResult& layer) const {
    const auto elements = static_cast<double>(element_count(source_.find(layer.name)->shape));
    OrderedJson json = {{"name", layer.name},
                        {"scheme", describe(layer.scheme)},
                        {"algorithm", layer.algorithm},
                        {"relative_error", layer.relative_error},
                        {"bits_per_weight", 8.0 * static_cast<double>(layer.bytes) / elements}};
    if (const std::string& note = notes_.at(layer.name); !note.empty()) json["note"] = note;
    return json;
  }

  void warn_of_notes(std::vector<Warning>& warnings) const {
    const auto noted = [](const TensorPlan& plan) { return !plan.note.empty(); };
    const auto first = std::ranges::find_if(recipe_.tensors, noted);
    if (first == recipe_.tensors.end()) return;
    const auto count = std::ranges::count_if(recipe_.tensors, noted);
    warnings.push_back({"OTHER_TYPE", fmt::format("{} of {} tensors get another type, first '{}': {}", count,
                                                  recipe_.tensors.size(), printable(first->name), first->note)});
  }

  /// The value most layers share; others are in `layers`.
  template <class Get>
  std::string common_value(const Get& get) const {
    std::map<std::string, size_t> counts;
    for (const LayerResult& layer : layers_) ++counts[get(layer)];
    if (counts.empty()) return "none";  // a file of floats
    const auto most = std::ranges::max_element(counts, {}, [](const auto& item) { return item.second; });
    return counts.size() == 1 ? most->first : fmt::format("mixed, mostly {}", most->first);
  }

  std::map<std::string, OrderedJson> metadata(const OrderedJson& record) const {
    return metadata_of(facts_, recipe_, *options_.container, read_config(model_), record);
  }

  /// Returns what was written, by name.
  std::map<std::string, OrderedJson> write_metadata(const OrderedJson& record) const {
    std::map<std::string, OrderedJson> files = metadata(record);
    if (gguf_ == nullptr)
      for (const auto& [name, json] : files) write_text_file(staging_ / name, json.dump(2) + "\n");
    return files;
  }

  OrderedJson verify(std::vector<Warning>& warnings) const {
    if (!options_.verify) return {{"read_back", false}, {"reason", "verification was switched off"}};
    const Checkpoint written(staging_, nullptr, Checkpoint::Unfinished::allow);
    verify_tensors(source_, written, layers_, estimate_.piece_memory);
    std::string reason = not_judged_;
    std::optional<Judgement> judgement;
    if (reason.empty()) {
      const uint64_t memory = options_.output.max_memory.value_or(available_memory());
      judgement = gguf_ == nullptr
                      ? judge(model_, written, memory, reason)
                      : judge(model_, open_model(staging_, Checkpoint::Foreign::refuse, Checkpoint::Unfinished::allow),
                              memory, reason);
    }
    if (!judgement) {
      check_no_limits(reason);
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

  /// Of a model that is not judged.
  void check_no_limits(const std::string& reason) const {
    if (options_.max_kl || options_.max_perplexity_increase_percent)
      throw Error({.code = "not-judged",
                   .what = "cannot hold a limit on the loss",
                   .why = reason,
                   .fix = "leave --max-kl and --max-perplexity-increase out"});
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

  const Checkpoint &model_, &source_;
  std::vector<TensorFacts> facts_;
  const GgufOutput* gguf_;  ///< null: the names are the model's own
  const QuantizeOptions& options_;
  Recipe recipe_;
  Job job_;
  ShardPlan shards_;
  Estimate estimate_{};
  uint64_t bytes_out_ = 0;
  std::filesystem::path staging_;
  std::vector<std::optional<float>> largest_;  ///< see fused_magnitudes
  std::optional<Importance> importance_;
  std::string not_judged_;  ///< why, if it is known beforehand
  std::vector<LayerResult> layers_;
  std::map<std::string, std::string> notes_;  ///< of them, by name
  OrderedJson engines_;
};

}  // namespace

OrderedJson quantize(const Checkpoint& source, const QuantizationRequest& request, const QuantizeOptions& options,
                     std::vector<Warning>& warnings) {
  check_not_quantized(source);
  QuantizationRequest knowing = request;
  knowing.has_statistics = !options.stats.empty();
  if (options.container->model_file.empty()) return Pipeline(source, source, nullptr, knowing, options).run(warnings);
  const GgufOutput gguf(source, warnings);
  return Pipeline(source, gguf.arranged(), &gguf, knowing, options).run(warnings);
}

}  // namespace bitwright

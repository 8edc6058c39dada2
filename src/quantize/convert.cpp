#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <mutex>
#include <nlohmann/json.hpp>

#include "base/mapped_file.hpp"
#include "base/output.hpp"
#include "base/progress.hpp"
#include "base/size.hpp"
#include "base/threads.hpp"
#include "quantize/conversion.hpp"
#include "quantize/model_files.hpp"
#include "quantize/output_layout.hpp"
#include "quantize/quantize.hpp"
#include "quantize/stream.hpp"
#include "quantize/verify.hpp"
#include "scheme/regrid.hpp"

namespace bitwright {
namespace {

constexpr double kSecondsAByte = 1 / 0.3e9;  ///< of elements, on one thread of a common machine
constexpr uint64_t kBytesAnElement = 8;      ///< codes, packed and not, on both sides, and their parameters

[[noreturn]] void fail(const std::string& where, const std::string& why) {
  throw Error({.code = "verification-failed",
               .what = "the written model is not what was meant",
               .where = where,
               .why = why,
               .fix = "nothing was kept; check the disk and memory, and report this"});
}

/// The most that any of them costs.
ConversionVerdict worst_of(const std::vector<TensorConversion>& tensors) {
  return std::ranges::max(tensors, {}, &TensorConversion::verdict).verdict;
}

/// A model to another container, piece by piece.
class Converter {
 public:
  Converter(const Checkpoint& source, const ConvertOptions& options)
      : source_(source), options_(options), container_(*options.request.container), facts_(facts_of(source)) {
    tensors_ = plan_conversion(source, options.request, options.output.max_memory);
  }

  void check_allowed() const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const TensorConversion& t = tensors_[i];
      if (t.verdict == ConversionVerdict::impossible)
        throw Error({.code = "does-not-fit",
                     .what = fmt::format("cannot convert to {}", container_.name),
                     .where = fmt::format("tensor '{}'", printable(t.plan.name)),
                     .why = t.reason,
                     .fix = options_.request.requantize ? "choose another --format"
                                                        : "choose another --format, or allow --requantize"});
      if (options_.request.exact && t.verdict != ConversionVerdict::exact)
        throw Error({.code = "not-exact",
                     .what = fmt::format("cannot convert to {} exactly", container_.name),
                     .where = fmt::format("tensor '{}'", printable(t.plan.name)),
                     .why = t.verdict == ConversionVerdict::bounded
                                ? fmt::format("a value would be off by {:.3g}", *t.max_abs_difference)
                                : fmt::format("it would be quantized anew: {}", t.reason),
                     .fix = "choose another --format, or leave --exact out"});
    }
  }

  void run() {
    check_apart(source_, options_.output.output);
    prepare();
    OutputDirectory output(options_.output.output, options_.output.existing);
    staging_ = output.staging();
    announce(estimate_, staging_, allocated_bytes(staging_));
    const OrderedJson files = source_identity(source_);
    job_.identity["max_shard_size"] = std::to_string(options_.output.shard_bytes());
    job_.identity["model"] = files;
    Journal journal(output.journal(), job_.identity);
    check_resumable(journal, job_, shards_, staging_);
    copy_side_files(source_, staging_);  // first: one that cannot be read does not cost the work on the weights
    resumable(output, [&] {
      ShardWriter writer(staging_, shards_);
      stream(job_, estimate_.piece_memory, writer, journal);
      writer.finish();
      check_unchanged(source_, files);
      write_metadata(OrderedJson::object());  // the written model must open before it can be verified
      if (options_.verify) verify();
      OrderedJson record = {{"tool", {{"name", "bitwright"}, {"version", BITWRIGHT_VERSION}}},
                            {"conversion", report()}};
      record["files"] = digests_of(staging_);
      engines_ = engines_json(write_metadata(record));
      output.commit();
    });
  }

  OrderedJson report() const {
    const ConversionVerdict worst = worst_of(tensors_);
    std::optional<double> most = 0;
    for (const TensorConversion& t : tensors_) {
      if (!source_.find(t.plan.name)->quantized()) continue;
      most = most && t.max_abs_difference ? std::optional(std::max(*most, *t.max_abs_difference)) : std::nullopt;
    }
    OrderedJson json = {{"converted_from", source_.container()->name},
                        {"format", container_.name},
                        {"exact", worst == ConversionVerdict::exact},
                        {"verdict", name_of(worst)},
                        {"max_abs_difference", most ? OrderedJson(*most) : OrderedJson()},
                        {"tensors", OrderedJson::array()}};
    for (size_t i = 0; i < tensors_.size(); ++i)
      if (source_.tensors()[i].quantized()) json["tensors"].push_back(tensor_json(i));
    return json;
  }

  OrderedJson result() const {
    OrderedJson json = report();
    json["bytes_in"] = source_.weight_bytes();
    json["bytes_out"] = shards_.bytes();
    json["estimate"] = to_json(estimate_);
    json["peak_memory_bytes"] = peak_memory();
    json["verification"] = {{"read_back", options_.verify}};
    json["engines"] = engines_;
    return json;
  }

  void warn(std::vector<Warning>& warnings) const {
    const auto has_activations = [&](const TensorEntry& entry) { return entry.linear.input || entry.linear.output; };
    if (source_.container() != &container_ && std::ranges::any_of(source_.tensors(), has_activations))
      warnings.push_back(
          {"ACTIVATIONS_DROPPED", "the model's activations are quantized too; the conversion keeps the weights alone"});
    if (source_.quantized_model().kv_cache)
      warnings.push_back({"KV_CACHE_DROPPED", "the scales of the KV cache are not converted"});
  }

 private:
  OrderedJson tensor_json(size_t i) const {
    const TensorConversion& t = tensors_[i];
    OrderedJson json = {{"name", t.plan.name}, {"verdict", name_of(t.verdict)}};
    json["max_abs_difference"] = t.max_abs_difference ? OrderedJson(*t.max_abs_difference) : OrderedJson();
    json["from"] = describe(source_.tensors()[i].scheme);
    if (t.plan.scheme) json["scheme"] = describe(*t.plan.scheme);
    if (t.verdict > ConversionVerdict::bounded) json["reason"] = t.reason;
    return json;
  }

  StoredTensor stored(size_t i) const { return stored_tensor(facts_[i], tensors_[i].plan, container_); }

  /// What goes to which place, and what it takes.
  void prepare() {
    Recipe recipe;
    std::string decisions;
    for (const TensorConversion& t : tensors_) {
      recipe.tensors.push_back(t.plan);
      decisions += fmt::format("{} {} {}\n", t.plan.name, t.plan.scheme ? to_json(*t.plan.scheme).dump() : "kept",
                               name_of(t.verdict));
    }
    OutputLayout layout = lay_out(facts_, std::move(recipe), container_, options_.output.shard_bytes());
    recipe_ = std::move(layout.recipe);
    job_.arrays = std::move(layout.arrays);
    shards_ = std::move(layout.shards);
    metadata(OrderedJson::object());  // what cannot be written is refused before there is any work
    job_.label = "converting";
    job_.produce = [this](const Piece& piece) { return produce(piece); };
    job_.prefetch = [](const Piece&) {};
    job_.identity = {{"tool", BITWRIGHT_VERSION},
                     {"command", "convert"},
                     {"recipe", sha256(decisions + std::string(container_.name))}};
    for (size_t i = 0; i < tensors_.size(); ++i) add_pieces(i);
    if (find_sizes(job_, options_.output.max_memory))
      shards_ = plan_shards(job_.arrays, options_.output.shard_bytes(), container_.weights_format);
    estimate_ = estimate(job_, shards_.bytes(), tensors_.size(), kSecondsAByte, options_.output.max_memory);
  }

  void add_pieces(size_t i) {
    const TensorEntry& entry = source_.tensors()[i];
    if (!tensors_[i].plan.scheme) {
      for (const RowRange range : element_pieces(entry.shape)) {
        const uint64_t bytes = static_cast<uint64_t>(range.end - range.begin) * size_bytes(entry.dtype);
        job_.pieces.push_back({.tensor = i, .rows = range, .bytes = bytes, .memory = 2 * bytes});
      }
      return;
    }
    const StoredTensor target = stored(i);
    for (const RowRange rows : conversion_pieces(source_, entry, container_, target, tensors_[i].turned)) {
      const auto elements = static_cast<uint64_t>((rows.end - rows.begin) * target.shape.back());
      uint64_t memory = elements * kBytesAnElement;
      if (tensors_[i].plan.algorithm != nullptr)
        memory += quantized_piece_memory(static_cast<int64_t>(elements), DType::f32);
      job_.pieces.push_back({.tensor = i, .rows = rows, .bytes = elements, .memory = memory});
    }
  }

  Produced produce(const Piece& piece) const {
    const TensorEntry& entry = source_.tensors()[piece.tensor];
    Produced produced;
    if (!tensors_[piece.tensor].plan.scheme) {
      const uint64_t offset = static_cast<uint64_t>(piece.rows.begin) * size_bytes(entry.dtype);
      std::vector<std::byte> bytes(piece.bytes);
      source_.read_bytes(entry, offset, bytes);
      produced.slices.push_back({.array = 0, .offset = offset, .data = std::move(bytes)});
      return produced;
    }
    try {
      produced.slices = packed_rows(container_, stored(piece.tensor), job_.arrays[piece.tensor], piece.rows,
                                    converted(piece.tensor, piece.rows));
    } catch (const Error& error) {
      throw error.at(fmt::format("tensor '{}'", printable(entry.name)));
    }
    return produced;
  }

  QuantizedTensor converted(size_t i, RowRange rows) const {
    const TensorPlan& plan = tensors_[i].plan;
    const QuantizedTensor from = read_piece(source_, source_.tensors()[i], tensors_[i].turned, rows);
    if (plan.algorithm != nullptr) {
      std::vector<float> values(static_cast<size_t>(element_count(from.shape)));
      decode(from, values);
      return plan.algorithm->quantize(*plan.scheme, from.shape, {DType::f32, std::as_bytes(std::span(values))},
                                      plan.options);
    }
    Regridded to = regrid(from, *plan.scheme);
    if (!to.tensor) fail(plan.name, fmt::format("it was found to fit, and now: {}", to.reason));
    return std::move(*to.tensor);
  }

  std::map<std::string, OrderedJson> metadata(const OrderedJson& record) const {
    OrderedJson config = read_config(source_);
    drop_quantization(config);
    return metadata_of(facts_, recipe_, container_, std::move(config), record);
  }

  std::map<std::string, OrderedJson> write_metadata(const OrderedJson& record) const {
    std::map<std::string, OrderedJson> files = metadata(record);
    for (const auto& [name, json] : files) write_text_file(staging_ / name, json.dump(2) + "\n");
    return files;
  }

  /// Every value of what was written against what it was, by the decoding of both containers.
  void verify() {
    const Checkpoint written(staging_, nullptr, Checkpoint::Unfinished::allow);
    std::vector<double> most(tensors_.size());
    std::mutex mutex;
    Progress progress("verifying", job_.pieces.size());
    parallel_within(
        job_.pieces.size(), estimate_.piece_memory, [&](size_t p) { return 2 * job_.pieces[p].memory; },
        [&](size_t p) {
          throw_if_interrupted();
          const Piece& piece = job_.pieces[p];
          const double difference = difference_of(written, piece);
          const std::lock_guard lock(mutex);
          most[piece.tensor] = std::max(most[piece.tensor], difference);
          progress.advance(1);
        });
    for (size_t i = 0; i < tensors_.size(); ++i) {
      TensorConversion& t = tensors_[i];
      if (t.verdict == ConversionVerdict::requantized && std::isfinite(most[i])) t.max_abs_difference = most[i];
      if (!(most[i] == t.max_abs_difference.value_or(0)))
        fail(t.plan.name, fmt::format("it reads back with a difference of {}", most[i]));
    }
  }

  double difference_of(const Checkpoint& written, const Piece& piece) const {
    const TensorEntry& entry = source_.tensors()[piece.tensor];
    const TensorEntry* const found = written.find(entry.name);
    const bool quantized = tensors_[piece.tensor].plan.scheme.has_value();
    if (found == nullptr || found->quantized() != quantized) fail(entry.name, "missing, or of another kind");
    if (quantized)
      return max_abs_difference(read_piece(source_, entry, tensors_[piece.tensor].turned, piece.rows),
                                read_piece(written, *found, false, piece.rows));
    if (found->dtype != entry.dtype || found->shape != entry.shape) fail(entry.name, "kept, but of another type");
    const uint64_t offset = static_cast<uint64_t>(piece.rows.begin) * size_bytes(entry.dtype);
    std::vector<std::byte> before(piece.bytes), after(piece.bytes);
    source_.read_bytes(entry, offset, before);
    written.read_bytes(*found, offset, after);
    if (before != after) fail(entry.name, "its bytes differ from the original's");
    return 0;
  }

  const Checkpoint& source_;
  const ConvertOptions& options_;
  const Container& container_;
  std::vector<TensorFacts> facts_;
  std::vector<TensorConversion> tensors_;
  Recipe recipe_;
  Job job_;
  ShardPlan shards_;
  Estimate estimate_{};
  std::filesystem::path staging_;
  OrderedJson engines_;
};

}  // namespace

OrderedJson convert(const Checkpoint& source, const ConvertOptions& options, std::vector<Warning>& warnings) {
  Converter converter(source, options);
  converter.warn(warnings);
  if (options.dry_run) return converter.report();
  converter.check_allowed();
  const auto start = std::chrono::steady_clock::now();
  converter.run();
  OrderedJson result = {{"output", options.output.output.string()}};
  result.update(converter.result());
  result["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace bitwright

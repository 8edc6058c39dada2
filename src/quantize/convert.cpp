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
#include "checkpoint/gguf.hpp"
#include "engine/model_summary.hpp"
#include "quantize/arranged.hpp"
#include "quantize/conversion.hpp"
#include "quantize/gguf_output.hpp"
#include "quantize/model_card.hpp"
#include "quantize/model_files.hpp"
#include "quantize/output_layout.hpp"
#include "quantize/quantize.hpp"
#include "quantize/stream.hpp"
#include "quantize/verify.hpp"
#include "quantize/write_output.hpp"
#include "scheme/regrid.hpp"

namespace bitwright {
namespace {

constexpr double kSecondsAByte = 1 / 0.3e9;  ///< of elements, on one thread of a common machine
constexpr uint64_t kBytesAnElement = 8;      ///< codes, packed and not, on both sides, and their parameters

/// The most that any of them costs.
ConversionVerdict worst_of(const std::vector<TensorConversion>& tensors) {
  return std::ranges::max(tensors, {}, &TensorConversion::verdict).verdict;
}

Arranged arrange(const Checkpoint& source, const GgufOutput* gguf) {
  if (gguf == nullptr) return Arranged(source);
  return gguf->is_gguf() ? Arranged(gguf->arranged()) : Arranged(source, gguf->model().arrays);
}

/// A model to another container, piece by piece.
class Converter {
 public:
  /// gguf: null where the names are the model's own.
  Converter(const Checkpoint& source, const GgufOutput* gguf, const ConvertOptions& options)
      : source_(source),
        gguf_(gguf),
        arranged_(arrange(source, gguf)),
        options_(options),
        container_(*options.request.container),
        facts_(arranged_.facts()) {
    const std::optional<ForeignNames> names = gguf == nullptr ? std::nullopt : std::optional(gguf->names());
    tensors_ = plan_conversion(arranged_, options.request, names ? &*names : nullptr, options.output.max_memory);
    for (size_t i = 0; i < tensors_.size(); ++i)
      if (tensors_[i].floats) facts_[i].dtype = *tensors_[i].floats;
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
    const auto finish = [&](const std::filesystem::path& staging, std::span<const SquaredError> /*errors*/) {
      staging_ = staging;
      write_metadata(OrderedJson::object());  // the written model must open before it can be verified
      if (options_.verify) verify();
      OrderedJson record = {{"tool", {{"name", "bitwright"}, {"version", BITWRIGHT_VERSION}}},
                            {"bytes_in", source_.weight_bytes()},
                            {"bytes_out", shards_.bytes()},
                            {"conversion", report()}};
      record["files"] = digests_of(staging);
      engines_ = engines_json(write_metadata(record));
      write_text_file(staging / "README.md", model_card(record));
    };
    write_output(source_, job_, shards_, estimate_, options_.output,
                 {.finish = finish, .side_files = gguf_ == nullptr});
  }

  OrderedJson report() const {
    const ConversionVerdict worst = worst_of(tensors_);
    std::optional<double> most = 0;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const TensorConversion& t = tensors_[i];
      if (!is_reported(i)) continue;
      most = most && t.max_abs_difference ? std::optional(std::max(*most, *t.max_abs_difference)) : std::nullopt;
    }
    OrderedJson json = {{"converted_from", source_.container()->name},
                        {"format", container_.name},
                        {"exact", worst == ConversionVerdict::exact},
                        {"verdict", name_of(worst)},
                        {"max_abs_difference", most ? OrderedJson(*most) : OrderedJson()},
                        {"tensors", OrderedJson::array()}};
    for (size_t i = 0; i < tensors_.size(); ++i)
      if (is_reported(i)) json["tensors"].push_back(tensor_json(i));
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
    if (source_.facts() != nullptr && gguf_ == nullptr &&
        !std::filesystem::exists(model_directory(source_) / "tokenizer.json"))
      warnings.push_back(no_tokenizer_written());
    if (source_.quantized_model().kv_cache)
      warnings.push_back({"KV_CACHE_DROPPED", "the scales of the KV cache are not converted"});
  }

 private:
  const TensorEntry& part(size_t i) const { return *arranged_.tensors()[i].parts.front(); }
  bool is_reported(size_t i) const {
    return arranged_.tensors()[i].quantized() || tensors_[i].verdict != ConversionVerdict::exact;
  }

  OrderedJson tensor_json(size_t i) const {
    const TensorConversion& t = tensors_[i];
    OrderedJson json = {{"name", t.plan.name}, {"verdict", name_of(t.verdict)}};
    json["max_abs_difference"] = t.max_abs_difference ? OrderedJson(*t.max_abs_difference) : OrderedJson();
    json["from"] = type_of(part(i));
    if (t.plan.scheme || t.floats)
      json["scheme"] = t.floats ? std::string(info(*t.floats).name) : describe(*t.plan.scheme);
    if (t.plan.scheme && gguf_ != nullptr) json["type"] = container_.layout(stored(i)).front().block->name;
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
      decisions += fmt::format("{} {} {}\n", t.plan.name,
                               t.plan.scheme ? to_json(*t.plan.scheme).dump()
                               : t.floats    ? info(*t.floats).name
                                             : "kept",
                               name_of(t.verdict));
    }
    OutputLayout layout = lay_out(facts_, std::move(recipe), container_, options_.output.shard_bytes());
    recipe_ = std::move(layout.recipe);
    job_.arrays = std::move(layout.arrays);
    shards_ = gguf_ == nullptr
                  ? std::move(layout.shards)
                  : plan_gguf(job_.arrays, gguf_->metadata(job_.arrays, ""), options_.output.max_shard_bytes);
    metadata(OrderedJson::object());  // what cannot be written is refused before there is any work
    job_.label = "converting";
    job_.produce = [this](const Piece& piece) { return produce(piece); };
    job_.prefetch = [](const Piece&) {};
    job_.identity = {{"command", "convert"}, {"recipe", sha256(decisions + std::string(container_.name))}};
    for (size_t i = 0; i < tensors_.size(); ++i) add_pieces(i);
    if (find_sizes(job_, options_.output.max_memory))
      shards_ = plan_shards(job_.arrays, options_.output.shard_bytes(), container_.weights_format);
    estimate_ = estimate(job_, shards_.bytes(), tensors_.size(), kSecondsAByte, options_.output.max_memory);
  }

  bool is_copied(size_t i) const { return !tensors_[i].plan.scheme && !tensors_[i].floats; }

  void add_pieces(size_t i) {
    const TensorConversion& t = tensors_[i];
    if (is_copied(i)) {
      for (const RowRange range : arranged_.plain_pieces(i)) {
        const uint64_t bytes = static_cast<uint64_t>(range.end - range.begin) * size_bytes(facts_[i].dtype);
        job_.pieces.push_back({.tensor = i, .rows = range, .bytes = bytes, .memory = 2 * bytes});
      }
      return;
    }
    const std::vector<RowRange> pieces =
        t.floats ? arranged_.pieces(i, t.turned) : arranged_.pieces(i, container_, stored(i), t.turned);
    const int64_t width = t.floats ? facts_[i].shape.back() : stored(i).shape.back();
    for (const RowRange rows : pieces) {
      const auto elements = static_cast<uint64_t>((rows.end - rows.begin) * width);
      uint64_t memory = elements * kBytesAnElement;
      if (t.plan.algorithm != nullptr) memory += quantized_piece_memory(static_cast<int64_t>(elements), DType::f32);
      job_.pieces.push_back({.tensor = i, .rows = rows, .bytes = elements, .memory = memory});
    }
  }

  Produced produce(const Piece& piece) const {
    const size_t i = piece.tensor;
    Produced produced;
    try {
      if (!is_copied(i) && !tensors_[i].floats) {
        produced.slices = packed_rows(container_, stored(i), job_.arrays[i], piece.rows, converted(i, piece.rows));
        return produced;
      }
      const uint64_t width = is_copied(i) ? 1 : static_cast<uint64_t>(facts_[i].shape.back());
      produced.slices.push_back(
          {.array = 0,
           .offset = static_cast<uint64_t>(piece.rows.begin) * width * size_bytes(facts_[i].dtype),
           .data = plain_bytes(i, piece.rows)});
    } catch (const Error& error) {
      throw error.at(fmt::format("tensor '{}'", printable(tensors_[i].plan.name)));
    }
    return produced;
  }

  std::vector<std::byte> plain_bytes(size_t i, RowRange rows) const {
    if (is_copied(i)) return arranged_.read_plain(i, rows);
    const std::vector<float> values = arranged_.decoded(i, tensors_[i].turned, rows);
    std::vector<std::byte> bytes(values.size() * size_bytes(facts_[i].dtype));
    from_f32(facts_[i].dtype, values, bytes);
    return bytes;
  }

  QuantizedTensor converted(size_t i, RowRange rows) const {
    const TensorPlan& plan = tensors_[i].plan;
    const bool turned = tensors_[i].turned;
    if (plan.algorithm != nullptr) {
      const std::vector<float> values = arranged_.decoded(i, turned, rows);
      const StoredTensor whole = stored(i);
      const bool all = rows.begin == 0 && rows.end == row_count(whole.shape);
      return plan.algorithm->quantize(*plan.scheme, all ? whole.shape : rows_of(whole, rows.begin, rows.end).shape,
                                      {DType::f32, std::as_bytes(std::span(values))}, plan.options);
    }
    Regridded to = regrid(arranged_.read(i, turned, rows), *plan.scheme);
    if (!to.tensor) verification_failed(plan.name, fmt::format("it was found to fit, and now: {}", to.reason));
    return std::move(*to.tensor);
  }

  std::map<std::string, OrderedJson> metadata(const OrderedJson& record) const {
    OrderedJson config = read_config(source_);
    drop_quantization(config);
    return metadata_of(facts_, recipe_, container_, std::move(config), record);
  }

  std::map<std::string, OrderedJson> write_metadata(const OrderedJson& record) const {
    std::map<std::string, OrderedJson> files = metadata(record);
    if (gguf_ == nullptr)
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
        verification_failed(t.plan.name, fmt::format("it reads back with a difference of {}", most[i]));
    }
  }

  double difference_of(const Checkpoint& written, const Piece& piece) const {
    const size_t i = piece.tensor;
    const TensorConversion& t = tensors_[i];
    const TensorEntry* const found = written.find(t.plan.name);
    if (found == nullptr || found->quantized() != t.plan.scheme.has_value())
      verification_failed(t.plan.name, "missing, or of another kind");
    if (t.plan.scheme) {
      const bool whole = piece.rows.begin == 0 && piece.rows.end == row_count(found->shape);
      return max_abs_difference(
          arranged_.decoded(i, t.turned, piece.rows),
          whole ? written.read(*found) : written.read_rows(*found, piece.rows.begin, piece.rows.end));
    }
    if (found->dtype != facts_[i].dtype || found->shape != facts_[i].shape)
      verification_failed(t.plan.name, "plain, but of another type or shape");
    const uint64_t width = is_copied(i) ? 1 : static_cast<uint64_t>(facts_[i].shape.back());
    const uint64_t offset = static_cast<uint64_t>(piece.rows.begin) * width * size_bytes(found->dtype);
    const std::vector<std::byte> before = plain_bytes(i, piece.rows);
    std::vector<std::byte> after(before.size());
    written.read_bytes(*found, offset, after);
    if (before != after) verification_failed(t.plan.name, "its bytes differ from the original's");
    return t.max_abs_difference.value_or(0);
  }

  const Checkpoint& source_;
  const GgufOutput* gguf_;  ///< null: the names are the model's own
  const Arranged arranged_;
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
  std::optional<GgufOutput> gguf;
  if (!options.request.container->model_file.empty()) gguf.emplace(source, warnings);
  Converter converter(source, gguf ? &*gguf : nullptr, options);
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

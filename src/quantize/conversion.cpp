#include "quantize/conversion.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <set>
#include <utility>

#include "base/error.hpp"
#include "base/progress.hpp"
#include "base/threads.hpp"
#include "container/rows.hpp"
#include "kernels/decode.hpp"
#include "quantize/output_layout.hpp"
#include "scheme/regrid.hpp"
#include "scheme/transposed.hpp"

namespace bitwright {
namespace {

using Filter = std::function<bool(const Scheme& scheme)>;

/// Codes, those of the target and what they are packed to; parameters beside them, decoded ones too.
constexpr uint64_t kBytesAnElement = 8;

bool is_sized(const SchemeChoice& choice) {
  return choice.granularity == "group" || choice.granularity == "flat" || choice.granularity == "block";
}

bool can_transpose(const Scheme& scheme) {
  if (scheme.element->kind == ElementKind::block_code) return false;
  return std::ranges::all_of(std::array{&scheme.scale, &scheme.offset}, [](const std::optional<Parameter>* p) {
    if (!p->has_value()) return true;
    const Grouping::Kind kind = (*p)->grouping.kind;
    return (kind == Grouping::Kind::tensor || kind == Grouping::Kind::axis) && can_transpose(*(*p)->scheme);
  });
}

/// Group sizes to try for a choice: the container's own, the source's, and the usual ones.
std::set<int64_t> sizes_for(const Container& container, const SchemeChoice& choice, const Scheme& from,
                            const Shape& shape) {
  if (!is_sized(choice)) return {choice.group_size};
  std::set<int64_t> sizes = {16, 32, 64, 128, 256};
  if (choice.granularity == "block") sizes.clear();
  if (choice.group_size > 0) sizes.insert(choice.group_size);
  if (container.group_size != nullptr) sizes.insert(container.group_size(choice, shape));
  if (from.scale && from.scale->grouping.size > 0) sizes.insert(from.scale->grouping.size);
  if (from.scale && from.scale->grouping.block_rows > 0) sizes.insert(from.scale->grouping.block_rows);
  return sizes;
}

/// As which types scales and offsets of a choice are tried.
std::vector<std::string_view> scale_types(const SchemeChoice& choice, const ConversionRequest& request) {
  const bool open = choice.scale_dtype == SchemeChoice::kWeightDtype;
  const std::string_view wanted = request.scale_dtype ? info(*request.scale_dtype).name : std::string_view();
  if (request.scale_dtype && choice.quant_type == "int") {
    if (open || wanted == choice.scale_dtype) return {wanted};
    return {};
  }
  if (open && request.exact) return {choice.scale_dtype, info(DType::f32).name};
  return {choice.scale_dtype};
}

/// Plans one model.
class Planner {
 public:
  Planner(const Checkpoint& source, const ConversionRequest& request, std::optional<uint64_t> most_memory)
      : source_(source),
        request_(request),
        container_(*request.container),
        facts_(facts_of(source)),
        memory_(most_memory.value_or(thread_count() * (uint64_t{64} << 20))) {}

  std::vector<TensorConversion> run() {
    std::vector<TensorConversion> first = plan_all([](const Scheme&) { return true; });
    if (is_whole(first)) return first;
    // Some containers hold each tensor, and not all of them in one model: then alike.
    for (const Filter& filter : filters(first)) {
      std::vector<TensorConversion> other = plan_all(filter);
      if (is_whole(other)) return other;
    }
    if (request_.requantize) {
      requantize_all(first, [](const TensorConversion& t) { return t.verdict == ConversionVerdict::impossible; });
      if (!is_whole(first)) requantize_all(first, [](const TensorConversion&) { return true; });
    }
    refuse_together(first);
    return first;
  }

 private:
  const TensorEntry& entry(size_t i) const { return source_.tensors()[i]; }

  StoredTensor stored(size_t i, const Scheme& scheme) const {
    const TensorPlan plan = {.name = entry(i).name, .scheme = scheme, .linear = linear_of(i)};
    return stored_tensor(facts_[i], plan, container_);
  }
  /// What is done to activations goes along within a container.
  QuantizedLinear linear_of(size_t i) const {
    return source_.container() == &container_ ? entry(i).linear : QuantizedLinear{};
  }

  /// Empty: the container holds this tensor by itself in this way.
  std::string why_not(size_t i, const StoredTensor& tensor) const {
    if (container_.takes != nullptr && !container_.takes(tensor.name, facts_[i].shape))
      return fmt::format("{} leaves it in floats", container_.name);
    if (Fit fit = fit_of(facts_[i], tensor, container_); fit.verdict == Verdict::impossible) return fit.reason;
    if (container_.fit_model != nullptr)
      if (Fit fit = container_.fit_model(std::span(&tensor, 1)); fit.verdict == Verdict::impossible) return fit.reason;
    return {};
  }

  struct Candidates {
    std::vector<Scheme> schemes{};  ///< fewest bits and bytes first
    std::string reason{};           ///< of the last that is none
  };
  Candidates candidates(size_t i) const {
    Candidates all;
    if (turned(i) && !can_transpose(entry(i).scheme)) {
      all.reason = fmt::format("{} stores its transpose, which its groups do not allow", container_.name);
      return all;
    }
    const Scheme from = source_scheme(i);
    const auto add = [&](const Scheme& scheme) {
      if (std::ranges::find(all.schemes, scheme) != all.schemes.end()) return;
      const StoredTensor tensor = stored(i, scheme);
      std::string reason = why_not(i, tensor);
      if (reason.empty()) reason = why_not_regrid(from, scheme);
      if (reason.empty())
        all.schemes.push_back(scheme);
      else
        all.reason = std::move(reason);
    };
    for (const SchemeChoice& choice : container_.choices)
      for (const int64_t size : sizes_for(container_, choice, from, facts_[i].shape))
        for (const std::string_view scales : scale_types(choice, request_)) {
          SchemeChoice sized = choice;
          sized.group_size = size;
          sized.scale_dtype = scales;
          add(scheme_of(sized, container_, facts_[i].dtype));
        }
    std::ranges::stable_sort(all.schemes, {}, [&](const Scheme& s) { return std::pair(s.element->bits, bytes(i, s)); });
    if (!request_.scale_dtype) {  // the same is best
      std::vector<Scheme> others = std::move(all.schemes);
      all.schemes.clear();
      add(from);
      std::ranges::copy_if(others, std::back_inserter(all.schemes), [&](const Scheme& s) { return s != from; });
    }
    return all;
  }

  uint64_t bytes(size_t i, const Scheme& scheme) const {
    uint64_t sum = 0;
    for (const ArraySpec& array : container_.layout(stored(i, scheme))) sum += array.bytes();
    return sum;
  }

  bool turned(size_t i) const { return entry(i).transposed != is_stored_transposed(facts_[i], container_); }
  /// As the target has its rows and columns.
  Scheme source_scheme(size_t i) const { return turned(i) ? transposed(entry(i).scheme) : entry(i).scheme; }

  uint64_t memory(size_t i) const {
    if (!entry(i).quantized()) return 0;
    const auto all = static_cast<uint64_t>(element_count(entry(i).shape));
    if (!container_.by_rows || turned(i)) return all * kBytesAnElement;
    uint64_t most = 0;
    for (const RowRange rows : source_.row_pieces(entry(i)))
      most = std::max(most, static_cast<uint64_t>((rows.end - rows.begin) * entry(i).shape.back()));
    return most * kBytesAnElement;
  }

  std::vector<TensorConversion> plan_all(const Filter& filter) const {
    std::vector<TensorConversion> all(facts_.size());
    parallel_within(
        facts_.size(), memory_, [&](size_t i) { return memory(i); },
        [&](size_t i) {
          all[i] = entry(i).quantized() ? plan(i, filter)
                                        : TensorConversion{.plan = {.name = entry(i).name, .reason = "not quantized"}};
        });
    return all;
  }

  TensorConversion plan(size_t i, const Filter& filter) const {
    const Candidates tried = candidates(i);
    TensorConversion best = {
        .verdict = ConversionVerdict::impossible, .plan = {.name = entry(i).name}, .reason = tried.reason};
    bool tried_one = false;
    for (const Scheme& scheme : tried.schemes) {
      const bool possible = best.plan.scheme.has_value();
      if (possible && !request_.exact && scheme.element->bits > best.plan.scheme->element->bits) break;
      if (!filter(scheme)) continue;
      TensorConversion found = trial(i, scheme);
      if (found.verdict < best.verdict) best = std::move(found);
      // Of what is impossible the way that takes the fewest bytes says why.
      if (!std::exchange(tried_one, true) && !best.plan.scheme) best.reason = std::move(found.reason);
      if (best.verdict == ConversionVerdict::exact) break;
    }
    return best;
  }

  TensorConversion trial(size_t i, const Scheme& scheme) const {
    TensorConversion result = {.turned = turned(i), .plan = {.name = entry(i).name}};
    const StoredTensor target = stored(i, scheme);
    double difference = 0;
    for (const RowRange rows : conversion_pieces(source_, entry(i), container_, target, turned(i))) {
      throw_if_interrupted();
      const QuantizedTensor from = read_piece(source_, entry(i), turned(i), rows);
      Regridded to = regrid(from, scheme);
      if (!to.tensor) {
        result.verdict = ConversionVerdict::impossible;
        result.reason = fmt::format("{}: {}", describe(scheme), to.reason);
        return result;
      }
      difference = std::max(difference, bitwright::max_abs_difference(from, *to.tensor));
    }
    result.verdict = difference == 0 ? ConversionVerdict::exact : ConversionVerdict::bounded;
    result.max_abs_difference = difference;
    result.plan.scheme = scheme;
    result.plan.linear = linear_of(i);
    return result;
  }

  std::vector<StoredTensor> quantized(const std::vector<TensorConversion>& all) const {
    std::vector<StoredTensor> tensors;
    for (size_t i = 0; i < all.size(); ++i)
      if (all[i].plan.scheme) tensors.push_back(stored_tensor(facts_[i], all[i].plan, container_));
    return tensors;
  }

  Fit fit_together(const std::vector<TensorConversion>& all) const {
    const std::vector<StoredTensor> tensors = quantized(all);
    return container_.fit_model == nullptr || tensors.empty() ? Fit{Verdict::exact} : container_.fit_model(tensors);
  }

  bool is_whole(const std::vector<TensorConversion>& all) const {
    return std::ranges::find(all, ConversionVerdict::impossible, &TensorConversion::verdict) == all.end() &&
           fit_together(all).verdict != Verdict::impossible;
  }

  /// Ways of being alike: none where a tensor has no place by itself.
  std::vector<Filter> filters(const std::vector<TensorConversion>& first) const {
    if (std::ranges::find(first, ConversionVerdict::impossible, &TensorConversion::verdict) != first.end()) return {};
    std::vector<Filter> all = {[](const Scheme& scheme) { return scheme.offset.has_value(); }};
    for (size_t i = 0; i < first.size(); ++i)
      if (first[i].plan.scheme) {
        for (const Scheme& one : candidates(i).schemes)
          all.emplace_back([one](const Scheme& scheme) { return scheme == one; });
        break;
      }
    return all;
  }

  void refuse_together(std::vector<TensorConversion>& all) const {
    const Fit fit = fit_together(all);
    if (fit.verdict != Verdict::impossible) return;
    for (TensorConversion& tensor : all)
      if (tensor.plan.scheme)
        tensor = {.verdict = ConversionVerdict::impossible, .plan = {.name = tensor.plan.name}, .reason = fit.reason};
  }

  /// As `quantize` would for this container, with as many bits as it has now or more.
  QuantizationRequest request_for(const Scheme& from) const {
    QuantizationRequest request;
    request.skip_embeddings = false;
    const bool integers = from.element->kind == ElementKind::integer;
    const auto kind = std::ranges::find(container_.choices, from.element->name, &SchemeChoice::quant_type);
    if (!integers && kind != container_.choices.end()) request.settings.quant_type = std::string(kind->quant_type);
    if (request.settings.quant_type) return request;
    int best = 0;
    for (const SchemeChoice& choice : container_.choices) {
      if (choice.quant_type != "int") continue;
      const bool enough = choice.bits >= from.element->bits;
      if (best == 0 || (enough ? best < from.element->bits || choice.bits < best : choice.bits > best))
        best = choice.bits;
    }
    if (container_.choices.empty()) best = std::min(from.element->bits, 8);
    if (best != 0) {
      request.settings.quant_type = "int";
      request.settings.bits = best;
    }
    if (request_.scale_dtype) request.settings.scale_dtype = std::string(info(*request_.scale_dtype).name);
    return request;
  }

  template <class Which>
  void requantize_all(std::vector<TensorConversion>& all, const Which& which) const {
    for (size_t i = 0; i < all.size(); ++i)
      if (entry(i).quantized() && which(all[i])) all[i] = requantized(i, all[i].reason);
  }

  TensorConversion requantized(size_t i, const std::string& why) const {
    TensorConversion result = {
        .verdict = ConversionVerdict::requantized, .turned = turned(i), .plan = {}, .reason = why};
    const auto impossible = [&](std::string reason) {
      result = {.verdict = ConversionVerdict::impossible, .plan = {.name = entry(i).name}, .reason = std::move(reason)};
      return result;
    };
    if (entry(i).scheme.element->kind == ElementKind::block_code && entry(i).undecoded != nullptr)
      return impossible("it cannot be decoded here");
    try {
      result.plan = resolve(request_for(entry(i).scheme), std::span(&facts_[i], 1), &container_).tensors.at(0);
    } catch (const Error& error) {
      return impossible(error.report().why);
    }
    if (!result.plan.scheme) return impossible(result.plan.reason);
    // One scale for all the layers that an engine fuses is found from plain weights alone (fused_magnitudes).
    const std::optional<Parameter>& scale = result.plan.scheme->scale;
    if (result.plan.options.fused != nullptr && scale && scale->scheme->scale)
      return impossible("NVFP4 is quantized from floats: `bitwright dequantize`, then `quantize`");
    if (std::string reason = why_not(i, stored_tensor(facts_[i], result.plan, container_)); !reason.empty())
      return impossible(std::move(reason));
    return result;
  }

  const Checkpoint& source_;
  const ConversionRequest& request_;
  const Container& container_;
  std::vector<TensorFacts> facts_;
  uint64_t memory_;
};

}  // namespace

std::string_view name_of(ConversionVerdict verdict) {
  constexpr std::array<std::string_view, 4> kNames = {"exact", "bounded", "requantized", "impossible"};
  return kNames.at(static_cast<size_t>(verdict));
}

double max_abs_difference(const QuantizedTensor& a, const QuantizedTensor& b) {
  const RangeDecoder first(a), second(b);
  const int64_t elements = element_count(a.shape);
  std::array<float, 4096> x, y;
  double most = 0;
  for (int64_t begin = 0; begin < elements; begin += static_cast<int64_t>(x.size())) {
    const auto count = static_cast<size_t>(std::min(static_cast<int64_t>(x.size()), elements - begin));
    first.decode(begin, std::span(x).first(count));
    second.decode(begin, std::span(y).first(count));
    for (size_t i = 0; i < count; ++i) {
      if (x[i] == y[i] || (std::isnan(x[i]) && std::isnan(y[i]))) continue;
      const double difference = std::fabs(double{x[i]} - double{y[i]});
      if (!std::isfinite(difference)) return std::numeric_limits<double>::infinity();
      most = std::max(most, difference);
    }
  }
  return most;
}

std::vector<RowRange> conversion_pieces(const Checkpoint& source, const TensorEntry& entry, const Container& container,
                                        const StoredTensor& target, bool turned) {
  const std::vector<RowRange> pieces = source.row_pieces(entry);
  const auto step = container.by_rows ? row_step(target.scheme, target.shape) : std::nullopt;
  if (!step || turned || pieces.size() == 1) return {{0, row_count(target.shape)}};
  std::vector<RowRange> common = {pieces.front()};
  for (const RowRange piece : std::span(pieces).subspan(1)) {
    if (piece.begin % *step == 0)
      common.push_back(piece);
    else
      common.back().end = piece.end;
  }
  return common;
}

QuantizedTensor read_piece(const Checkpoint& source, const TensorEntry& entry, bool turned, RowRange rows) {
  if (turned) return transposed(source.read(entry));
  const bool whole = rows.begin == 0 && rows.end == row_count(entry.shape);
  return whole ? source.read(entry) : source.read_rows(entry, rows.begin, rows.end);
}

std::vector<TensorConversion> plan_conversion(const Checkpoint& source, const ConversionRequest& request,
                                              std::optional<uint64_t> most_memory) {
  if (std::ranges::none_of(source.tensors(), &TensorEntry::quantized))
    throw Error({.code = "not-quantized",
                 .what = "nothing to convert",
                 .where = source.path().string(),
                 .why = "the model is not quantized",
                 .fix = "use `bitwright quantize`"});
  for (const TensorEntry& entry : source.tensors()) source.require_decoded(entry);
  return Planner(source, request, most_memory).run();
}

}  // namespace bitwright

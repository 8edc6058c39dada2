#include "quantize/conversion.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <utility>

#include "base/error.hpp"
#include "base/progress.hpp"
#include "base/threads.hpp"
#include "kernels/decode.hpp"
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

/// As which types scales and offsets of a choice are tried: as the owner has them, else as the source has them.
std::vector<std::string_view> scale_types(const SchemeChoice& choice, const ConversionRequest& request,
                                          const Scheme& from) {
  const bool open = choice.scale_dtype == SchemeChoice::kWeightDtype;
  const std::string_view wanted = request.scale_dtype ? info(*request.scale_dtype).name : std::string_view();
  if (request.scale_dtype && choice.quant_type == "int") {
    if (open || wanted == choice.scale_dtype) return {wanted};
    return {};
  }
  std::vector<std::string_view> types = {choice.scale_dtype};
  if (!open) return types;
  if (const auto own = from.scale ? dtype_of(*from.scale->scheme->element) : std::nullopt)
    if (from.scale->scheme->is_plain() && size_bytes(*own) == 2) types.push_back(info(*own).name);
  if (request.exact) types.push_back(info(DType::f32).name);
  return types;
}

double largest_difference(std::span<const float> a, std::span<const float> b) {
  double most = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i]))) continue;
    const double difference = std::fabs(double{a[i]} - double{b[i]});
    if (!std::isfinite(difference)) return std::numeric_limits<double>::infinity();
    most = std::max(most, difference);
  }
  return most;
}

/// The most that a value moves when it becomes one of this type; infinite: one leaves its range.
double rounding(std::span<const float> values, DType type) {
  std::array<std::byte, 4096 * sizeof(float)> stored;
  std::array<float, 4096> back;
  double most = 0;
  for (size_t begin = 0; begin < values.size(); begin += back.size()) {
    const std::span<const float> some = values.subspan(begin, std::min(back.size(), values.size() - begin));
    const std::span<std::byte> bytes = std::span(stored).first(some.size() * size_bytes(type));
    from_f32(type, some, bytes);
    to_f32(type, bytes, std::span(back).first(some.size()));
    most = std::max(most, largest_difference(some, std::span(back).first(some.size())));
  }
  return most;
}

/// Plans one model.
class Planner {
 public:
  Planner(const Arranged& source, const ConversionRequest& request, const ForeignNames* names,
          std::optional<uint64_t> most_memory)
      : source_(source),
        request_(request),
        container_(*request.container),
        facts_(source.facts()),
        known_(names == nullptr ? facts_ : renamed(facts_, *names)),
        memory_(most_memory.value_or(thread_count() * (uint64_t{64} << 20))) {}

  std::vector<TensorConversion> run() {
    std::vector<TensorConversion> first = plan_all([](const Scheme&) { return true; });
    if (refuse_nothing(first) || is_whole(first)) return first;
    // Some containers hold each tensor, and not all of them in one model: then alike.
    for (const Filter& filter : filters(first)) {
      std::vector<TensorConversion> other = plan_all(filter);
      if (is_whole(other)) return other;
    }
    if (request_.requantize) {
      requantize_all(first, [](const TensorConversion& t) { return t.verdict == ConversionVerdict::impossible; });
      if (!is_whole(first)) requantize_all(first, [](const TensorConversion&) { return true; });
      if (!is_whole(first)) {
        common_bits_ = most_common_bits();
        requantize_all(first, [](const TensorConversion&) { return true; });
      }
    }
    refuse_together(first);
    return first;
  }

 private:
  const ArrangedTensor& entry(size_t i) const { return source_.tensors()[i]; }
  const TensorEntry& part(size_t i) const { return *entry(i).parts.front(); }

  StoredTensor stored(size_t i, const Scheme& scheme) const {
    const TensorPlan plan = {.name = entry(i).name, .scheme = scheme, .linear = linear_of(i)};
    return stored_tensor(facts_[i], plan, container_);
  }
  bool is_same_container() const { return source_.source().container() == &container_; }
  /// What is done to activations goes along within a container.
  QuantizedLinear linear_of(size_t i) const { return is_same_container() ? part(i).linear : QuantizedLinear{}; }

  /// Empty: the container holds this tensor by itself in this way.
  std::string why_not(size_t i, const StoredTensor& tensor) const {
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
    if (!entry(i).scheme) {
      all.reason = "rows in another order would cut its groups";
      return all;
    }
    if (turned(i) && !can_transpose(*entry(i).scheme)) {
      all.reason = fmt::format("{} stores its transpose, which its groups do not allow", container_.name);
      return all;
    }
    const Scheme from = source_scheme(i);
    const auto add = [&](const Scheme& scheme) {
      if (scheme.is_plain() || std::ranges::find(all.schemes, scheme) != all.schemes.end()) return;
      const StoredTensor tensor = stored(i, scheme);
      std::string reason = why_not(i, tensor);
      if (reason.empty()) reason = why_not_regrid(from, scheme);
      if (reason.empty())
        all.schemes.push_back(scheme);
      else
        all.reason = std::move(reason);
    };
    for (const SchemeChoice& choice : container_.choices) {
      if (container_.scheme_for != nullptr) {
        add(container_.scheme_for(choice, {}, facts_[i].shape));
        continue;
      }
      for (const int64_t size : sizes_for(container_, choice, from, facts_[i].shape))
        for (const std::string_view scales : scale_types(choice, request_, from)) {
          SchemeChoice sized = choice;
          sized.group_size = size;
          sized.scale_dtype = scales;
          add(scheme_of(sized, container_, facts_[i].dtype));
        }
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
  Scheme source_scheme(size_t i) const { return turned(i) ? transposed(*entry(i).scheme) : *entry(i).scheme; }

  /// Such tensors are floats in each model of the owner's.
  bool is_for_floats(size_t i) const {
    if (entry(i).as_f32) return true;
    if (is_same_container()) return false;
    return (container_.takes != nullptr && !container_.takes(known_[i].name, facts_[i].shape)) ||
           (!container_.embeddings && is_embedding(known_[i].name));
  }

  uint64_t memory(size_t i) const {
    if (!entry(i).quantized()) return 0;
    const auto all = static_cast<uint64_t>(element_count(entry(i).shape));
    if (!container_.by_rows || turned(i)) return all * kBytesAnElement;
    uint64_t most = 0;
    for (const RowRange rows : source_.pieces(i, turned(i)))
      most = std::max(most, static_cast<uint64_t>((rows.end - rows.begin) * entry(i).shape.back()));
    return most * kBytesAnElement;
  }

  std::vector<TensorConversion> plan_all(const Filter& filter) const {
    std::vector<TensorConversion> all(facts_.size());
    parallel_within(
        facts_.size(), memory_, [&](size_t i) { return memory(i); },
        [&](size_t i) { all[i] = entry(i).quantized() ? plan(i, filter) : kept(i); });
    return all;
  }

  /// The most that doubles lose as f32.
  double loss_as_f32(const TensorEntry& tensor) const {
    std::vector<double> values(static_cast<size_t>(element_count(tensor.shape)));
    source_.source().read_bytes(tensor, 0, std::as_writable_bytes(std::span(values)));
    double most = 0;
    for (const double v : values)
      if (std::isfinite(v)) most = std::max(most, std::fabs(double{static_cast<float>(v)} - v));
    return most;
  }

  /// A plain one: it moves where the owner adds to it (Gemma's norms), or rounds it.
  TensorConversion kept(size_t i) const {
    TensorConversion result = {.plan = {.name = entry(i).name, .reason = "not quantized"}};
    if (entry(i).as_f32 && part(i).dtype == DType::f64) {
      const double most = loss_as_f32(part(i));
      if (most > 0) result.verdict = ConversionVerdict::bounded;
      result.max_abs_difference = most;
      return result;
    }
    if (entry(i).added == 0) return result;
    const std::vector<float> before = source_.source().read_f32(part(i));
    std::vector<float> after(before.size());
    to_f32(DType::f32, source_.read_plain(i, {0, static_cast<int64_t>(before.size())}), after);
    double most = 0;
    for (size_t j = 0; j < before.size(); ++j)
      most = std::max(most, std::fabs(double{after[j]} - double{entry(i).added} - double{before[j]}));
    if (most > 0) result.verdict = ConversionVerdict::bounded;
    result.max_abs_difference = most;
    return result;
  }

  /// As floats, of the smallest type that holds them, or of that which the model has.
  TensorConversion in_floats(size_t i) const {
    if (entry(i).as_f32 || facts_[i].dtype == DType::f32) return in_floats(i, {DType::f32});
    return in_floats(i, {facts_[i].dtype, DType::f32});
  }
  TensorConversion in_floats(size_t i, const std::vector<DType>& types) const {
    TensorConversion result = {.turned = entry(i).transposed, .plan = {.name = entry(i).name}};
    for (const DType type : types) {
      double difference = 0;
      for (const RowRange rows : source_.pieces(i, result.turned)) {
        throw_if_interrupted();
        difference = std::max(difference, rounding(source_.decoded(i, result.turned, rows), type));
      }
      result.floats = type;
      result.max_abs_difference = difference;
      result.verdict = difference == 0 ? ConversionVerdict::exact : ConversionVerdict::bounded;
      if (difference == 0 || (!request_.exact && std::isfinite(difference))) break;
    }
    return result;
  }

  TensorConversion plan(size_t i, const Filter& filter) const {
    if (is_for_floats(i)) return in_floats(i);
    TensorConversion best = on_a_grid(i, filter);
    // The two that owners mostly have in floats stand so wherever they cannot be what they were.
    const bool may_be_floats = is_head(known_[i].name) || is_embedding(known_[i].name);
    return best.verdict == ConversionVerdict::impossible && may_be_floats ? in_floats(i) : best;
  }

  TensorConversion on_a_grid(size_t i, const Filter& filter) const {
    const Candidates tried = candidates(i);
    TensorConversion best = {
        .verdict = ConversionVerdict::impossible, .plan = {.name = entry(i).name}, .reason = tried.reason};
    bool says_why = false;
    for (const Scheme& scheme : tried.schemes) {
      const bool possible = best.plan.scheme.has_value();
      if (possible && !request_.exact && scheme.element->bits > best.plan.scheme->element->bits) break;
      if (!filter(scheme)) continue;
      TensorConversion found = trial(i, scheme);
      const bool moves_less = possible && found.verdict == best.verdict &&
                              found.max_abs_difference < best.max_abs_difference &&
                              bytes(i, scheme) == bytes(i, *best.plan.scheme);
      if (found.verdict < best.verdict || moves_less) {
        best = std::move(found);
      } else if (!says_why && !best.plan.scheme && !found.reason.empty()) {
        // Of what is impossible the smallest that has as many bits says why.
        says_why = scheme.element->bits >= entry(i).scheme->element->bits;
        best.reason = std::move(found.reason);
      }
      if (best.verdict == ConversionVerdict::exact) break;
    }
    return best;
  }

  TensorConversion trial(size_t i, const Scheme& scheme) const {
    TensorConversion result = {.turned = turned(i), .plan = {.name = entry(i).name}};
    const StoredTensor target = stored(i, scheme);
    double difference = 0;
    for (const RowRange rows : source_.pieces(i, container_, target, turned(i))) {
      throw_if_interrupted();
      const QuantizedTensor from = source_.read(i, turned(i), rows);
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

  /// A container that would hold nothing of the model is none for it.
  bool refuse_nothing(std::vector<TensorConversion>& all) const {
    const auto is_kept = [](const TensorConversion& t) {
      return t.floats.has_value() || (t.verdict != ConversionVerdict::impossible && !t.plan.scheme);
    };
    if (!std::ranges::all_of(all, is_kept)) return false;
    for (TensorConversion& tensor : all)
      if (tensor.floats)
        tensor = {.verdict = ConversionVerdict::impossible,
                  .plan = {.name = tensor.plan.name},
                  .reason = fmt::format("{} has all such tensors in floats", container_.name)};
    return true;
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
    const int bits = common_bits_.value_or(from.element->bits);
    request.skip_embeddings = false;
    if (request_.scale_dtype) request.settings.scale_dtype = std::string(info(*request_.scale_dtype).name);
    if (!request_.gguf_type.empty()) request.settings.gguf_type = request_.gguf_type;
    if (!request_.method.empty()) request.settings.method = request_.method;
    if (request.settings.method || request.settings.gguf_type) return request;
    const bool integers = from.element->kind == ElementKind::integer;
    const auto kind = std::ranges::find(container_.choices, from.element->name, &SchemeChoice::quant_type);
    if (!integers && kind != container_.choices.end()) request.settings.quant_type = std::string(kind->quant_type);
    if (request.settings.quant_type) return request;
    int best = 0;
    for (const SchemeChoice& choice : container_.choices) {
      if (choice.quant_type != "int") continue;
      const bool enough = choice.bits >= bits;
      if (best == 0 || (enough ? best < bits || choice.bits < best : choice.bits > best)) best = choice.bits;
    }
    if (container_.choices.empty()) best = std::min(bits, 8);
    if (best != 0) {
      request.settings.quant_type = "int";
      request.settings.bits = best;
    }
    return request;
  }

  /// Of the weights that are numbers on a grid.
  int most_common_bits() const {
    std::map<int, int64_t> elements;
    for (size_t i = 0; i < facts_.size(); ++i)
      if (entry(i).quantized() && !is_for_floats(i))
        elements[part(i).scheme.element->bits] += element_count(entry(i).shape);
    const auto most = std::ranges::max_element(elements, {}, [](const auto& item) { return item.second; });
    return most == elements.end() ? 8 : most->first;
  }

  template <class Which>
  void requantize_all(std::vector<TensorConversion>& all, const Which& which) const {
    for (size_t i = 0; i < all.size(); ++i)
      if (entry(i).quantized() && !all[i].floats && which(all[i])) all[i] = requantized(i, all[i].reason);
  }

  TensorConversion requantized(size_t i, const std::string& why) const {
    TensorConversion result = {
        .verdict = ConversionVerdict::requantized, .turned = turned(i), .plan = {}, .reason = why};
    const auto impossible = [&](std::string reason) {
      result = {.verdict = ConversionVerdict::impossible, .plan = {.name = entry(i).name}, .reason = std::move(reason)};
      return result;
    };
    try {
      result.plan = resolve(request_for(part(i).scheme), std::span(&known_[i], 1), &container_).tensors.at(0);
      result.plan.name = entry(i).name;
    } catch (const Error& error) {
      return impossible(error.report().why);
    }
    if (!result.plan.scheme) return impossible(result.plan.reason);
    if (result.plan.scheme->is_plain()) return in_floats(i, {*dtype_of(*result.plan.scheme->element)});
    // One scale for all the layers that an engine fuses is found from plain weights alone (fused_magnitudes).
    const std::optional<Parameter>& scale = result.plan.scheme->scale;
    if (result.plan.options.fused != nullptr && scale && scale->scheme->scale)
      return impossible("NVFP4 is quantized from floats: `bitwright dequantize`, then `quantize`");
    if (std::string reason = why_not(i, stored_tensor(facts_[i], result.plan, container_)); !reason.empty())
      return impossible(std::move(reason));
    return result;
  }

  const Arranged& source_;
  const ConversionRequest& request_;
  const Container& container_;
  const std::vector<TensorFacts>& facts_;
  const std::vector<TensorFacts> known_;  ///< by the names that the model has
  std::optional<int> common_bits_{};      ///< that all are requantized with, where they must be alike
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
    most = std::max(most, largest_difference(std::span(x).first(count), std::span(y).first(count)));
  }
  return most;
}

double max_abs_difference(std::span<const float> values, const QuantizedTensor& b) {
  const RangeDecoder second(b);
  std::array<float, 4096> y;
  double most = 0;
  for (size_t begin = 0; begin < values.size(); begin += y.size()) {
    const std::span<const float> some = values.subspan(begin, std::min(y.size(), values.size() - begin));
    second.decode(static_cast<int64_t>(begin), std::span(y).first(some.size()));
    most = std::max(most, largest_difference(some, std::span(y).first(some.size())));
  }
  return most;
}

std::vector<TensorConversion> plan_conversion(const Arranged& source, const ConversionRequest& request,
                                              const ForeignNames* names, std::optional<uint64_t> most_memory) {
  const Checkpoint& model = source.source();
  if (std::ranges::none_of(model.tensors(), &TensorEntry::quantized))
    throw Error({.code = "not-quantized",
                 .what = "nothing to convert",
                 .where = model.path().string(),
                 .why = "the model is not quantized",
                 .fix = "use `bitwright quantize`"});
  for (const TensorEntry& entry : model.tensors()) model.require_decoded(entry);
  return Planner(source, request, names, most_memory).run();
}

}  // namespace bitwright

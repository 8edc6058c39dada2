// Definitions as in the papers named below; keys and defaults as in Hugging Face transformers, modeling_rope_utils.
#include "model/rope.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>
#include <string_view>

namespace bitwright {
namespace {

constexpr double kLargest = 1e12;  // of bases and factors
constexpr int64_t kLongest = int64_t{1} << 40;

/// What all types start from.
struct Plain {
  const ConfigReader& config;  ///< of the model
  double theta;
  int64_t size;     ///< elements of a head that turn, even
  int64_t context;  ///< max_position_embeddings
};

std::vector<double> frequencies(double theta, int64_t size) {
  std::vector<double> out;
  for (int64_t i = 0; i < size; i += 2)
    out.push_back(std::pow(theta, -static_cast<double>(i) / static_cast<double>(size)));
  return out;
}

double factor_of(const ConfigReader& p) { return p.positive("factor", kLargest); }

/// original_max_position_embeddings, wherever it stands; nothing if nowhere.
std::optional<int64_t> original_context(const ConfigReader& p, const Plain& plain) {
  constexpr const char* kKey = "original_max_position_embeddings";
  for (const ConfigReader* from : {&p, &plain.config})
    if (from->find(kKey) != nullptr) return from->integer(kKey, 2, kLongest);
  return std::nullopt;
}

int64_t stretched_to(int64_t original, double factor) {
  return static_cast<int64_t>(std::min(static_cast<double>(original) * factor, static_cast<double>(kLongest)));
}

void keep(const ConfigReader&, const Plain&, Rope&) {}

/// Position interpolation (arXiv:2306.15595).
void linear(const ConfigReader& p, const Plain&, Rope& rope) {
  const double factor = factor_of(p);
  for (double& f : rope.frequencies) f /= factor;
}

/// "Dynamic NTK": the base grows with the sequence.
void dynamic(const ConfigReader& p, const Plain& plain, Rope& rope) {
  p.only("alpha", nullptr);
  p.only("original_max_position_embeddings", plain.context);
  const double factor = factor_of(p), context = static_cast<double>(plain.context);
  if (plain.size <= 2) p.unsupported("rope_type", "which needs more than 2 elements of a head to turn");
  rope.trained = plain.context;
  rope.reach = stretched_to(plain.context, factor);
  rope.stretched = [theta = plain.theta, size = plain.size, factor, context](int64_t length) {
    const double stretch = factor * static_cast<double>(length) / context - (factor - 1);
    return frequencies(theta * std::pow(stretch, static_cast<double>(size) / static_cast<double>(size - 2)), size);
  };
}

/// Llama 3.1: long wavelengths are interpolated, short ones kept, those between blended.
void llama3(const ConfigReader& p, const Plain&, Rope& rope) {
  const double factor = factor_of(p);
  const double low = p.positive("low_freq_factor", kLargest), high = p.positive("high_freq_factor", kLargest);
  const auto original = static_cast<double>(p.integer("original_max_position_embeddings", 1, kLongest));
  if (high <= low) p.fail("high_freq_factor", "not above low_freq_factor");
  for (double& f : rope.frequencies) {
    const double turns = original * f / (2 * std::numbers::pi);  // within the original context
    const double kept = std::clamp((turns - low) / (high - low), 0.0, 1.0);
    f *= kept + (1 - kept) / factor;
  }
}

/// YaRN (arXiv:2309.00071): interpolated or kept by how often a pair turns within the original context.
void yarn(const ConfigReader& p, const Plain& plain, Rope& rope) {
  p.only("short_factor", nullptr);
  const int64_t original = original_context(p, plain).value_or(plain.context);
  const double factor =
      p.positive("factor", kLargest, static_cast<double>(plain.context) / static_cast<double>(original));
  const auto magnitude = [&](double scale) { return factor <= 1 ? 1 : 0.1 * scale * std::log(factor) + 1; };
  const bool both = p.find("mscale") != nullptr && p.find("mscale_all_dim") != nullptr;
  rope.magnitude =
      p.positive("attention_factor", kLargest,
                 both ? magnitude(p.positive("mscale", kLargest)) / magnitude(p.positive("mscale_all_dim", kLargest))
                      : magnitude(1));
  rope.reach = stretched_to(original, factor);
  const auto size = static_cast<double>(plain.size);
  const auto pair_of_turns = [&](double turns) {
    const double wavelengths = static_cast<double>(original) / (turns * 2 * std::numbers::pi);
    return size * std::log(wavelengths) / (2 * std::log(plain.theta));
  };
  double low = pair_of_turns(p.positive("beta_fast", kLargest, 32)),
         high = pair_of_turns(p.positive("beta_slow", kLargest, 1));
  if (p.boolean("truncate", true)) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, size - 1);
  if (low == high) high += 0.001;
  for (size_t i = 0; i < rope.frequencies.size(); ++i) {
    const double interpolated = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    rope.frequencies[i] *= (1 - interpolated) + interpolated / factor;
  }
}

/// LongRoPE (arXiv:2402.13753): one factor a pair, other ones for long sequences.
void longrope(const ConfigReader& p, const Plain& plain, Rope& rope) {
  for (const char* key : {"short_mscale", "long_mscale"}) p.only(key, nullptr);
  const std::optional<int64_t> given = original_context(p, plain);
  const int64_t original = given.value_or(plain.context);
  const double factor =
      given ? static_cast<double>(plain.context) / static_cast<double>(original) : p.positive("factor", kLargest, 1);
  rope.magnitude =
      p.positive("attention_factor", kLargest,
                 factor <= 1 ? 1 : std::sqrt(1 + std::log(factor) / std::log(static_cast<double>(original))));
  const auto divided = [&](const char* key) {
    const std::vector<double> factors = p.positives(key, rope.frequencies.size(), kLargest);
    std::vector<double> out = rope.frequencies;
    for (size_t i = 0; i < out.size(); ++i) out[i] /= factors[i];
    return out;
  };
  rope.trained = original;
  rope.stretched = [longer = divided("long_factor")](int64_t) { return longer; };
  rope.frequencies = divided("short_factor");
}

struct RopeType {
  std::string_view name;
  void (*apply)(const ConfigReader& parameters, const Plain& plain, Rope& rope);
};
constexpr RopeType kTypes[] = {
    {"default", keep}, {"linear", linear},     {"dynamic", dynamic}, {"llama3", llama3},
    {"yarn", yarn},    {"longrope", longrope}, {"su", longrope}};  // its name in the first Phi-3 checkpoints

/// rope_parameters, of one kind of layer where it has kinds; else rope_scaling.
std::optional<ConfigReader> find_parameters(const ConfigReader& config, const RopeKeys& keys) {
  const std::optional<ConfigReader> parameters = config.object("rope_parameters");
  if (!parameters) return keys.scaled ? config.object("rope_scaling") : std::nullopt;
  if (keys.kind != nullptr && parameters->find(keys.kind) != nullptr) return parameters->object(keys.kind);
  for (const char* kind : {"full_attention", "sliding_attention"})
    if (keys.kind == nullptr) parameters->only(kind, nullptr);
  return keys.scaled ? parameters : std::nullopt;
}

/// A number that stands in `parameters`, or else in `config` under its older name.
double number_of(const std::optional<ConfigReader>& parameters, const char* key, const ConfigReader& config,
                 const char* old_key, double fallback) {
  const double older = config.positive(old_key, kLargest, fallback);
  return parameters ? parameters->positive(key, kLargest, older) : older;
}

}  // namespace

Rope read_rope(const ConfigReader& config, int64_t head_size, int64_t context, const RopeKeys& keys) {
  const std::optional<ConfigReader> parameters = find_parameters(config, keys);
  constexpr const char* kPartial = "partial_rotary_factor";
  double partial = 1;
  if (keys.partial != nullptr) {
    partial = number_of(parameters, kPartial, config, keys.partial, keys.partial_default);
  } else {
    config.only(kPartial, 1.0);
    if (parameters) parameters->only(kPartial, 1.0);
  }
  const auto size = static_cast<int64_t>(static_cast<double>(head_size) * partial);
  if (size < 2 || size % 2 != 0 || size > head_size)
    config.fail(keys.partial != nullptr ? keys.partial : "head_dim",
                "must give an even number of elements of a head that turn, at most all " + std::to_string(head_size));
  const Plain plain = {config, number_of(parameters, "rope_theta", config, keys.theta, keys.theta_default), size,
                       context};
  Rope rope = {.frequencies = frequencies(plain.theta, size)};
  if (!parameters) return rope;
  const char* const key = parameters->find("rope_type") != nullptr ? "rope_type" : "type";
  const std::string name = parameters->text(key, "default");
  const auto* const type = std::ranges::find(kTypes, name, &RopeType::name);
  if (type == std::end(kTypes)) parameters->unsupported(key, "which is not supported");
  type->apply(*parameters, plain, rope);
  return rope;
}

}  // namespace bitwright

#include "bitwright/torch/training_config.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <span>
#include <variant>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "base/nearest.hpp"
#include "container/container.hpp"
#include "recipe/config.hpp"

namespace bitwright {
namespace {

using Field = std::variant<std::string*, int64_t*, double*, bool*, std::vector<std::string>*, std::vector<double>*>;

/// A key of the file, declared once. What a text may be, or a number's range.
struct Key {
  std::string_view path;
  Field (*field)(TrainingConfig& config);
  std::vector<std::string> values{};
  double least = 0, most = 0;
  bool section = false;     ///< the value may be a mapping, which is kept as its text
  bool changeable = false;  ///< between a checkpoint and a run that goes on from it
};

constexpr double kMost = 1e15;

std::vector<std::string> container_names() {
  std::vector<std::string> names;
  for (const Container* container : all_containers())
    if (container->write_metadata != nullptr) names.emplace_back(container->name);
  return names;
}

std::vector<Key> make_keys() {
  using C = TrainingConfig;
#define FIELD(member) [](C& c) -> Field { return &c.member; }
  return {
      {.path = "model", .field = FIELD(model)},
      {.path = "architecture", .field = FIELD(architecture), .section = true},
      {.path = "tokenizer", .field = FIELD(tokenizer)},
      {.path = "data.text", .field = FIELD(data.text)},
      {.path = "data.validation", .field = FIELD(data.validation), .changeable = true},
      {.path = "data.validation_fraction", .field = FIELD(data.validation_fraction), .least = 0, .most = 0.9},
      {.path = "data.split", .field = FIELD(data.split)},
      {.path = "data.bos", .field = FIELD(data.bos), .values = {"auto", "document", "none"}},
      {.path = "data.sequence_length", .field = FIELD(data.sequence_length), .least = 0, .most = 1 << 24},
      {.path = "quantization_mode", .field = FIELD(quantization_mode), .values = {"none", "ptq", "qat"}},
      {.path = "quantization_bits", .field = FIELD(quantization_bits), .values = {"8", "4"}},
      {.path = "quantization_type", .field = FIELD(quantization_type), .values = {"static", "dynamic"}},
      {.path = "enable_quantized_finetuning", .field = FIELD(enable_quantized_finetuning)},
      {.path = "quantization", .field = FIELD(quantization), .section = true},
      {.path = "container", .field = FIELD(container), .values = container_names(), .changeable = true},
      {.path = "export_dtype",
       .field = FIELD(export_dtype),
       .values = {"float32", "bfloat16", "float16"},
       .changeable = true},
      {.path = "qat.scales", .field = FIELD(qat.scales), .values = {"auto", "learned", "computed"}},
      {.path = "qat.initial_scales", .field = FIELD(qat.initial_scales), .values = {"search", "lsq"}},
      {.path = "qat.scale_lr", .field = FIELD(qat.scale_lr), .least = 0, .most = 1e6, .changeable = true},
      {.path = "qat.distill", .field = FIELD(qat.distill)},
      {.path = "qat.activation_type", .field = FIELD(qat.activation_type), .values = {"int8", "int4", "e4m3", "e5m2"}},
      {.path = "qat.symmetric_activations", .field = FIELD(qat.symmetric_activations)},
      {.path = "qat.activation_ranges",
       .field = FIELD(qat.activation_ranges),
       .values = {"minmax", "moving_average", "percentile", "learned"}},
      {.path = "qat.averaging", .field = FIELD(qat.averaging), .least = 1e-9, .most = 1},
      {.path = "qat.percentile", .field = FIELD(qat.percentile), .least = 50.001, .most = 100},
      {.path = "lora.r", .field = FIELD(lora.r), .least = 0, .most = 4096},
      {.path = "lora.alpha", .field = FIELD(lora.alpha), .least = 0, .most = 1e6},
      {.path = "lora.dropout", .field = FIELD(lora.dropout), .least = 0, .most = 0.99},
      {.path = "lora.target_modules", .field = FIELD(lora.target_modules)},
      {.path = "lora.init", .field = FIELD(lora.init), .values = {"default", "gaussian", "loftq"}},
      {.path = "lora.merge",
       .field = FIELD(lora.merge),
       .values = {"none", "floats", "requantize"},
       .changeable = true},
      {.path = "max_steps", .field = FIELD(max_steps), .least = 0, .most = kMost, .changeable = true},
      {.path = "epochs", .field = FIELD(epochs), .least = 0, .most = 1e9, .changeable = true},
      {.path = "batch_size", .field = FIELD(batch_size), .least = 1, .most = 1 << 20, .changeable = true},
      {.path = "gradient_accumulation_steps",
       .field = FIELD(gradient_accumulation_steps),
       .least = 1,
       .most = 1 << 20,
       .changeable = true},
      {.path = "optimizer", .field = FIELD(optimizer), .values = {"adamw", "adamw8bit"}},
      {.path = "learning_rate", .field = FIELD(learning_rate), .least = 0, .most = 1e6, .changeable = true},
      {.path = "weight_decay", .field = FIELD(weight_decay), .least = 0, .most = 1e6, .changeable = true},
      {.path = "betas", .field = FIELD(betas), .least = 0, .most = 0.999999999, .changeable = true},
      {.path = "epsilon", .field = FIELD(epsilon), .least = 0, .most = 1, .changeable = true},
      {.path = "warmup_steps", .field = FIELD(warmup_steps), .least = 0, .most = kMost, .changeable = true},
      {.path = "schedule", .field = FIELD(schedule), .values = {"cosine", "constant"}, .changeable = true},
      {.path = "min_learning_rate", .field = FIELD(min_learning_rate), .least = 0, .most = 1, .changeable = true},
      {.path = "max_grad_norm", .field = FIELD(max_grad_norm), .least = 0, .most = 1e9, .changeable = true},
      {.path = "dtype", .field = FIELD(dtype), .values = {"float32", "bfloat16"}, .changeable = true},
      {.path = "activation_checkpointing", .field = FIELD(activation_checkpointing), .changeable = true},
      {.path = "sharding", .field = FIELD(sharding), .values = {"none", "parameters"}, .changeable = true},
      {.path = "seed", .field = FIELD(seed), .least = 0, .most = kMost},
      {.path = "eval_every", .field = FIELD(eval_every), .least = 0, .most = kMost, .changeable = true},
      {.path = "eval_windows", .field = FIELD(eval_windows), .least = 0, .most = kMost, .changeable = true},
      {.path = "sample_every", .field = FIELD(sample_every), .least = 0, .most = kMost, .changeable = true},
      {.path = "sample_prompt", .field = FIELD(sample_prompt), .changeable = true},
      {.path = "sample_tokens", .field = FIELD(sample_tokens), .least = 1, .most = 1 << 20, .changeable = true},
      {.path = "sample_temperature", .field = FIELD(sample_temperature), .least = 0, .most = 100, .changeable = true},
      {.path = "checkpoint_every", .field = FIELD(checkpoint_every), .least = 0, .most = kMost, .changeable = true},
      {.path = "keep_checkpoints", .field = FIELD(keep_checkpoints), .least = 1, .most = kMost, .changeable = true},
      {.path = "log_every", .field = FIELD(log_every), .least = 1, .most = kMost, .changeable = true},
      {.path = "output", .field = FIELD(output), .changeable = true},
  };
#undef FIELD
}

std::span<const Key> keys() {
  static const std::vector<Key> all = make_keys();
  return all;
}

[[noreturn]] void fail(const std::string& where, const std::string& why, const std::string& fix = "") {
  throw Error({.code = "bad-value",
               .what = "bad configuration",
               .where = where,
               .why = why,
               .fix = fix,
               .status = ExitStatus::usage});
}

std::string shown(const OrderedJson& value) {
  return value.is_string() ? value.get<std::string>()
                           : value.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

/// One value into its member.
class Setter {
 public:
  Setter(const Key& key, const OrderedJson& value, const std::string& where)
      : key_(key), value_(value), where_(where) {}

  void operator()(std::string* text) const {
    if (!value_.is_string() && !(key_.section && value_.is_object()))
      bad(key_.section ? "is no section" : "is no text");
    *text = shown(value_);
    check_known();
  }
  void operator()(int64_t* number) const {
    if (!value_.is_number_integer()) bad("is no whole number");
    *number = value_.get<int64_t>();
    if (key_.values.empty()) check_range(static_cast<double>(*number));
    check_known();
  }
  void operator()(double* number) const {
    if (!value_.is_number()) bad("is no number");
    check_range(*number = value_.get<double>());
  }
  void operator()(bool* flag) const {
    if (!value_.is_boolean()) bad("is neither true nor false");
    *flag = value_.get<bool>();
  }
  void operator()(std::vector<std::string>* names) const {
    const auto is_text = [](const OrderedJson& item) { return item.is_string(); };
    if (value_.is_string()) {
      *names = {value_.get<std::string>()};
    } else if (!value_.is_array() || value_.empty() || !std::ranges::all_of(value_, is_text)) {
      bad("is no list of names");
    } else {
      *names = value_.get<std::vector<std::string>>();
    }
  }
  void operator()(std::vector<double>* numbers) const {
    const auto is_number = [](const OrderedJson& item) { return item.is_number(); };
    if (!value_.is_array() || value_.size() != numbers->size() || !std::ranges::all_of(value_, is_number))
      bad(fmt::format("is no list of {} numbers", numbers->size()));
    *numbers = value_.get<std::vector<double>>();
    for (const double number : *numbers) check_range(number);
  }

 private:
  [[noreturn]] void bad(const std::string& why) const {
    fail(where_, fmt::format("{}: '{}' {}", key_.path, printable(shown(value_)), why));
  }
  void check_range(double number) const {  // NaN is in none
    if (!(number >= key_.least && number <= key_.most))
      bad(fmt::format("is not between {} and {}", key_.least, key_.most));
  }
  void check_known() const {
    if (!key_.values.empty() && std::ranges::find(key_.values, shown(value_)) == key_.values.end())
      bad(fmt::format("is not known; valid: {}", fmt::join(key_.values, ", ")));
  }

  const Key& key_;
  const OrderedJson& value_;
  const std::string& where_;
};

[[noreturn]] void unknown_key(const std::string& path, const std::string& where) {
  std::vector<std::string> siblings;  // names at this depth
  const std::string prefix = path.substr(0, path.rfind('.') == std::string::npos ? 0 : path.rfind('.') + 1);
  for (const Key& key : keys()) {
    if (!key.path.starts_with(prefix)) continue;
    const std::string_view rest = key.path.substr(prefix.size());
    siblings.emplace_back(rest.substr(0, rest.find('.')));
  }
  siblings.erase(std::unique(siblings.begin(), siblings.end()), siblings.end());
  throw Error({.code = "unknown-key",
               .what = "bad configuration",
               .where = where,
               .why = fmt::format("unknown key '{}'", printable(path)),
               .fix = suggest(path.substr(prefix.size()), siblings),
               .status = ExitStatus::usage});
}

void read_object(TrainingConfig& config, const OrderedJson& object, const std::string& prefix,
                 const std::string& where) {
  for (const auto& [name, value] : object.items()) {
    const std::string path = prefix + name;
    const auto key = std::ranges::find(keys(), path, &Key::path);
    const bool is_section =
        std::ranges::any_of(keys(), [&](const Key& other) { return other.path.starts_with(path + "."); });
    if (key == keys().end() && !is_section) unknown_key(path, where);
    if (value.is_null()) continue;  // as if it were not there
    if (key != keys().end()) {
      std::visit(Setter(*key, value, where), key->field(config));
    } else if (value.is_object()) {
      read_object(config, value, path + ".", where);
    } else {
      fail(where, fmt::format("{}: '{}' is no section of keys", path, printable(shown(value))));
    }
  }
}

void check_quantization(const TrainingConfig& config, const std::string& where) {
  OrderedJson section = {{"quantization", parse_ordered_json(config.quantization, where)}};
  if (!section["quantization"].is_object())
    fail(where, fmt::format("quantization: '{}' is no section", printable(config.quantization)));
  check_config(section, where);
}

}  // namespace

TrainingConfig TrainingConfig::read(const std::filesystem::path& path, const std::vector<std::string>& set) {
  OrderedJson config = read_config_file(path);
  for (const std::string& assignment : set) {
    const size_t equals = assignment.find('=');
    if (equals == std::string::npos || equals == 0)
      fail("--set", fmt::format("'{}' is not KEY=VALUE", printable(assignment)));
    set_config_value(config, assignment.substr(0, equals), parse_config_value(assignment.substr(equals + 1), "--set"));
  }
  return from_json(config, set.empty() ? path.string() : path.string() + " with --set");
}

TrainingConfig TrainingConfig::from_json(const OrderedJson& json, const std::string& where) {
  if (!json.is_object()) fail(where, "it is no mapping of keys to values");
  TrainingConfig config;
  read_object(config, json, "", where);
  config.check(where);
  return config;
}

OrderedJson TrainingConfig::to_json() const {
  TrainingConfig copy = *this, defaults;
  OrderedJson json = OrderedJson::object();
  for (const Key& key : keys()) {
    OrderedJson value = std::visit([](auto* field) { return OrderedJson(*field); }, key.field(copy));
    if (key.section && shown(value).starts_with('{')) value = parse_ordered_json(shown(value), std::string(key.path));
    // A text that is not there is left out, unless it would be another one then.
    const bool absent = value == "" && std::visit([](auto* f) { return OrderedJson(*f); }, key.field(defaults)) == "";
    if (!absent) set_config_value(json, key.path, value);
  }
  return json;
}

std::string TrainingConfig::hash() const { return sha256(to_json().dump()).substr(0, 16); }

void TrainingConfig::check(const std::string& where) const {
  if (!model.empty() && !architecture.empty())
    fail(where, "both 'model' and 'architecture' are given",
         "'model' goes on from its weights, 'architecture' begins "
         "with random ones: leave one out");
  const bool learns_rounded = quantization_mode == "qat", ptq = quantization_mode == "ptq", adapters = lora.r > 0;
  if (enable_quantized_finetuning && learns_rounded)
    fail(where, "enable_quantized_finetuning and quantization_mode qat contradict each other",
         "the one has integer weights, the other learns floats: leave one out");
  if (enable_quantized_finetuning && ptq)
    fail(where, "enable_quantized_finetuning and quantization_mode ptq contradict each other",
         "the one learns while it is quantized, the other is quantized afterwards: leave one out");
  if (adapters && (learns_rounded || ptq || enable_quantized_finetuning))
    fail(where,
         fmt::format(
             "lora.r {} and {} contradict each other", lora.r,
             enable_quantized_finetuning ? "enable_quantized_finetuning" : "quantization_mode " + quantization_mode),
         "with adapters the base is frozen; its scheme is in the section 'quantization'");
  if (lora.init == "loftq" && adapters && quantization.empty())
    fail(where, "lora.init loftq needs a section 'quantization'", "it chooses codes and adapters together");
  if (learns_rounded && qat.distill && model.empty())
    fail(where, "qat.distill needs a 'model', whose predictions are learned", "name one, or leave qat.distill out");
  if (max_steps == 0 && epochs == 0) fail(where, "both max_steps and epochs are 0", "give one of them");
  if (!quantization.empty()) check_quantization(*this, where);
}

std::string incompatible_key(const TrainingConfig& before, const TrainingConfig& now) {
  const OrderedJson a = before.to_json(), b = now.to_json();
  for (const Key& key : keys()) {
    if (key.changeable) continue;
    const OrderedJson *one = find_config(a, key.path), *other = find_config(b, key.path);
    if ((one == nullptr) != (other == nullptr) || (one != nullptr && *one != *other)) return std::string(key.path);
  }
  return "";
}

}  // namespace bitwright

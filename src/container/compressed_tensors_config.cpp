#include "container/compressed_tensors_config.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace bitwright {
namespace {

constexpr std::string_view kMethod = "compressed-tensors";
constexpr std::string_view kRegex = "re:";
constexpr std::string_view kVersion = "0.15.0";  ///< of the library whose configuration is written
constexpr std::array<std::string_view, 7> kFormats = {"pack-quantized",  "int-quantized",        "float-quantized",
                                                      "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
                                                      "mxfp8-quantized"};
constexpr std::array<std::string_view, 6> kStrategies = {"tensor", "channel",      "token",
                                                         "group",  "tensor_group", "block"};
constexpr std::string_view kPowers = "torch.uint8", kFloat8 = "torch.float8_e4m3fn";

[[noreturn]] void bad_config(const CheckpointView& checkpoint, const std::string& why) {
  throw Error({.code = "bad-container",
               .what = "cannot read model",
               .where = checkpoint.where,
               .why = "quantization_config: " + why,
               .fix = "the checkpoint is incomplete or damaged, fetch it again"});
}
[[noreturn]] void unsupported(const CheckpointView& checkpoint, const std::string& why) {
  throw Error({.code = "unsupported-container",
               .what = "cannot read model",
               .where = checkpoint.where,
               .why = "quantization_config: " + why,
               .fix = "see `bitwright formats`"});
}

/// Reads the fields of one QuantizationArgs; absent and null ones have their defaults.
class ArgumentsReader {
 public:
  ArgumentsReader(const CheckpointView& checkpoint, const Json& json, std::string where)
      : checkpoint_(checkpoint), json_(json), where_(std::move(where)) {
    if (!json.is_object()) bad_config(checkpoint, printable(where_) + " is no object");
  }

  CompressedArguments read() const {
    CompressedArguments a;
    a.bits = static_cast<int>(integer("num_bits", 8, 1, 8));
    const std::string type = text("type", "int");
    if (type != "int" && type != "float") fail("type", type);
    a.is_float = type == "float";
    if (a.is_float && a.bits != 4 && a.bits != 8) fail("num_bits", std::to_string(a.bits) + " of a float");
    a.symmetric = boolean("symmetric", true);
    if (a.is_float && !a.symmetric) fail("symmetric", "false, of a float");
    a.group_size = integer("group_size", 0, -1, int64_t{1} << 20);
    read_block(a);
    a.strategy = text("strategy", a.block_rows > 0    ? "block"
                                  : a.group_size > 0  ? "group"
                                  : a.group_size == 0 ? "tensor"
                                                      : "channel");
    check_strategy(a);
    a.indexed = text("actorder", "") == "group" || text("actorder", "") == "dynamic";
    const Json& dynamic = field("dynamic");
    if (dynamic == "local")
      a.dynamic = CompressedArguments::Dynamic::local;
    else if (boolean("dynamic", false))
      a.dynamic = CompressedArguments::Dynamic::yes;
    a.power_scales = text("scale_dtype", "") == kPowers;
    return a;
  }

 private:
  const Json& field(const char* key) const {
    static const Json nothing;
    const auto found = json_.find(key);
    return found == json_.end() ? nothing : *found;
  }
  [[noreturn]] void fail(const char* key, const std::string& value) const {
    bad_config(checkpoint_, fmt::format("{}: '{}' cannot be {}", printable(where_), key, printable(value)));
  }
  int64_t integer(const char* key, int64_t fallback, int64_t least, int64_t most) const {
    const Json& value = field(key);
    if (value.is_null()) return fallback;
    if (!value.is_number_integer() || value < least || value > most) fail(key, value.dump(-1, ' ', true));
    return value.get<int64_t>();
  }
  bool boolean(const char* key, bool fallback) const {
    const Json& value = field(key);
    if (value.is_null()) return fallback;
    if (!value.is_boolean()) fail(key, value.dump(-1, ' ', true));
    return value.get<bool>();
  }
  std::string text(const char* key, const std::string& fallback) const {
    const Json& value = field(key);
    if (value.is_null() || value.is_boolean()) return fallback;
    if (!value.is_string()) fail(key, value.dump(-1, ' ', true));
    return value.get<std::string>();
  }

  /// [rows, columns], in older files "128x128".
  void read_block(CompressedArguments& a) const {
    const Json& block = field("block_structure");
    if (block.is_null()) return;
    constexpr int64_t kMost = int64_t{1} << 20;
    int rows = 0, columns = 0;
    char rest = 0;
    if (block.is_string()) {
      if (std::sscanf(block.get_ref<const std::string&>().c_str(), "%6dx%6d%c", &rows, &columns, &rest) != 2)
        fail("block_structure", block.get<std::string>());
      a.block_rows = rows;
      a.block_columns = columns;
    } else if (block.is_array() && block.size() == 2 && block[0].is_number_unsigned() && block[0] <= kMost &&
               block[1].is_number_unsigned() && block[1] <= kMost) {
      a.block_rows = block[0].get<int64_t>();
      a.block_columns = block[1].get<int64_t>();
    }
    if (a.block_rows <= 0 || a.block_columns <= 0) fail("block_structure", block.dump(-1, ' ', true));
  }

  void check_strategy(const CompressedArguments& a) const {
    if (std::ranges::find(kStrategies, a.strategy) == kStrategies.end()) fail("strategy", a.strategy);
    const bool grouped = a.strategy == "group" || a.strategy == "tensor_group";
    if (grouped && a.group_size <= 0) fail("group_size", std::to_string(a.group_size));
    if (a.strategy == "block" && a.block_rows == 0) fail("block_structure", "missing");
  }

  const CheckpointView& checkpoint_;
  const Json& json_;
  std::string where_;
};

const Json& member(const Json& object, const char* key) {
  static const Json nothing;
  const auto found = object.find(key);
  return found == object.end() ? nothing : *found;
}

std::vector<std::string> read_names(const CheckpointView& checkpoint, const Json& json, const std::string& where) {
  std::vector<std::string> names;
  if (json.is_null()) return names;
  if (!json.is_array()) bad_config(checkpoint, printable(where) + " is no list");
  for (const Json& name : json) {
    if (!name.is_string()) bad_config(checkpoint, printable(where) + " is no list of names");
    names.push_back(name.get<std::string>());
  }
  return names;
}

CompressedGroup read_group(const CheckpointView& checkpoint, const std::string& name, const Json& json,
                           const std::string& format) {
  if (!json.is_object()) unsupported(checkpoint, fmt::format("group '{}' is no scheme", printable(name)));
  CompressedGroup group = {.targets = read_names(checkpoint, member(json, "targets"), name + ".targets")};
  const auto read = [&](const char* key, std::optional<CompressedArguments>& to) {
    const Json& arguments = member(json, key);
    if (!arguments.is_null()) to = ArgumentsReader(checkpoint, arguments, name + "." + key).read();
  };
  read("weights", group.weights);
  read("input_activations", group.input);
  read("output_activations", group.output);
  const Json& own = member(json, "format");
  if (!own.is_null() && !own.is_string()) bad_config(checkpoint, printable(name) + ".format is no text");
  group.format = own.is_null() ? format : own.get<std::string>();
  const bool is_known = std::ranges::find(kFormats, group.format) != kFormats.end();
  if (group.weights && !is_known)
    unsupported(checkpoint, fmt::format("format '{}' is not known, known are {}", printable(group.format),
                                        fmt::join(kFormats, ", ")));
  return group;
}

/// Python's re.match: from the start of the name on.
class Regex {
 public:
  Regex(const CheckpointView& checkpoint, std::string_view pattern) {
    int error = 0;
    size_t offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), PCRE2_ANCHORED, &error,
                              &offset, nullptr));
    if (code_ == nullptr)
      unsupported(checkpoint, fmt::format("'re:{}' is no expression that is understood", printable(pattern)));
  }
  bool matches(const CheckpointView& checkpoint, std::string_view name) const {
    constexpr uint32_t kMostSteps = 1'000'000;
    const std::unique_ptr<pcre2_match_data, Free> data(pcre2_match_data_create(1, nullptr));
    const std::unique_ptr<pcre2_match_context, Free> context(pcre2_match_context_create(nullptr));
    BW_ASSERT(data != nullptr && context != nullptr);
    pcre2_set_match_limit(context.get(), kMostSteps);
    const int result = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(name.data()), name.size(), 0, 0,
                                   data.get(), context.get());
    if (result < 0 && result != PCRE2_ERROR_NOMATCH)
      unsupported(checkpoint, "an expression takes too many steps for a module's name");
    return result >= 0;
  }

 private:
  struct Free {
    void operator()(pcre2_code* p) const { pcre2_code_free(p); }
    void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
    void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
  };
  std::unique_ptr<pcre2_code, Free> code_;
};

// ---- the inverse ----

OrderedJson arguments_json(const Scheme& scheme, CompressedArguments::Dynamic dynamic, bool activations) {
  using Dynamic = CompressedArguments::Dynamic;
  const Grouping& grouping = scheme.scale->grouping;
  const bool nested = !scheme.scale->scheme->is_plain(), is_float = scheme.element->kind == ElementKind::floating;
  const bool powers = scheme.scale->scheme->element == &float_element(DType::f8_e8m0);
  const bool indexed = grouping.kind == Grouping::Kind::index;
  const bool symmetric = scheme.offset_kind == OffsetKind::none;
  std::string strategy = "group";
  if (nested) strategy = "tensor_group";
  if (grouping.kind == Grouping::Kind::tensor) strategy = "tensor";
  if (grouping.kind == Grouping::Kind::block) strategy = "block";
  if (grouping.kind == Grouping::Kind::axis && grouping.size == 0) strategy = activations ? "token" : "channel";
  OrderedJson json = {{"actorder", nullptr}, {"block_structure", nullptr}};
  if (indexed) json["actorder"] = "group";
  if (strategy == "block") json["block_structure"] = {grouping.block_rows, grouping.block_columns};
  json["dynamic"] = dynamic != Dynamic::no;
  if (dynamic == Dynamic::local) json["dynamic"] = "local";
  json["group_size"] = nullptr;
  if (grouping.size > 0) json["group_size"] = grouping.size;
  json["num_bits"] = scheme.element->bits;
  json["observer"] = nullptr;
  if (dynamic == Dynamic::no) json["observer"] = "memoryless_minmax";
  if (dynamic == Dynamic::local) json["observer"] = "static_minmax";
  json["observer_kwargs"] = OrderedJson::object();
  json["scale_dtype"] = nullptr;
  if (nested) json["scale_dtype"] = kFloat8;
  if (powers) json["scale_dtype"] = kPowers;
  json["strategy"] = strategy;
  json["symmetric"] = symmetric;
  json["type"] = is_float ? "float" : "int";
  json["zp_dtype"] = nullptr;
  if (!symmetric) json["zp_dtype"] = "torch.int8";
  return json;
}

OrderedJson activation_json(const std::optional<ActivationScheme>& activation) {
  using Dynamic = CompressedArguments::Dynamic;
  if (!activation) return nullptr;
  const bool local = activation->dynamic && !activation->scheme.scale->scheme->is_plain();
  return arguments_json(activation->scheme,
                        local                 ? Dynamic::local
                        : activation->dynamic ? Dynamic::yes
                                              : Dynamic::no,
                        true);
}

}  // namespace

Scheme CompressedArguments::scheme(DType scales) const {
  Grouping grouping = Grouping::tensor();
  if (strategy == "channel" || strategy == "token") grouping = Grouping::channel();
  if (strategy == "group" || strategy == "tensor_group") grouping = Grouping::along(group_size);
  if (strategy == "block")
    grouping = {.kind = Grouping::Kind::block, .block_rows = block_rows, .block_columns = block_columns};
  if (indexed) grouping = {.kind = Grouping::Kind::index, .size = group_size};
  Scheme stored;
  if (strategy == "tensor_group") {
    stored = {.element = &float_element(DType::f8_e4m3), .scale = parameter(Grouping::tensor(), plain(DType::f32))};
    stored.scale->divides = true;
  } else {
    stored = plain(power_scales ? DType::f8_e8m0 : scales);
  }
  Scheme scheme = {.scale = parameter(grouping, std::move(stored))};
  if (is_float) {
    scheme.element = bits == 4 ? find_element("float4_e2m1") : &float_element(DType::f8_e4m3);
    return scheme;
  }
  scheme.element = &integer_element(bits, symmetric);
  if (symmetric) return scheme;
  scheme.offset_kind = OffsetKind::zero_point;
  scheme.offset = parameter(grouping, {.element = scheme.element});
  return scheme;
}

const CompressedGroup* CompressedConfig::find(const CheckpointView& checkpoint, const std::string& module) const {
  for (const CompressedGroup& group : groups)
    if (std::ranges::find(group.targets, module) != group.targets.end()) return &group;
  if (groups.size() > 1)
    for (const CompressedGroup& group : groups)
      for (const std::string& target : group.targets)
        if (target.starts_with(kRegex) &&
            Regex(checkpoint, std::string_view(target).substr(kRegex.size())).matches(checkpoint, module))
          return &group;
  const auto names_class = [](const CompressedGroup& group) {
    return std::ranges::any_of(group.targets, [](const std::string& target) {
      return !target.empty() && target[0] >= 'A' && target[0] <= 'Z';  // which no module's name begins with
    });
  };
  const auto found = std::ranges::find_if(groups, names_class);
  if (found != groups.end()) return &*found;
  return groups.size() == 1 ? groups.data() : nullptr;
}

const Json* find_compressed_config(const Json& config) {
  const auto of = [](const Json& json) -> const Json* {
    if (!json.is_object()) return nullptr;
    const Json& inner = member(json, "quantization_config");  // beside a sparsity_config, in older files
    if (inner.is_object() && member(json, "config_groups").is_null()) return &inner;
    return member(json, "quant_method") == kMethod ? &json : nullptr;
  };
  const Json& declared = member(config, "quantization_config");
  if (declared.is_object()) return member(declared, "quant_method") == kMethod ? of(declared) : nullptr;
  return of(member(config, "compression_config"));
}

CompressedConfig read_compressed_config(const CheckpointView& checkpoint) {
  const Json& json = *find_compressed_config(checkpoint.config);
  const Json& transforms = member(json, "transform_config");
  if (transforms.is_object() && !member(transforms, "config_groups").empty())
    unsupported(checkpoint, "it has transforms of activations (transform_config)");
  const Json& sparsity = member(json, "sparsity_config");
  if (sparsity.is_object() && !member(sparsity, "format").is_null() && member(sparsity, "format") != "dense")
    unsupported(checkpoint, "its weights are stored sparse (sparsity_config)");
  const Json& format = member(json, "format");
  if (!format.is_null() && !format.is_string()) bad_config(checkpoint, "'format' is no text");
  CompressedConfig config;
  config.ignore = read_names(checkpoint, member(json, "ignore"), "ignore");
  const Json& kv_cache = member(json, "kv_cache_scheme");
  if (!kv_cache.is_null()) config.kv_cache = ArgumentsReader(checkpoint, kv_cache, "kv_cache_scheme").read();
  const Json& groups = member(json, "config_groups");
  if (groups.is_null()) return config;
  if (!groups.is_object()) bad_config(checkpoint, "'config_groups' is no object");
  for (const auto& [name, group] : groups.items())
    config.groups.push_back(
        read_group(checkpoint, name, group, format.is_null() ? std::string() : format.get<std::string>()));
  return config;
}

OrderedJson write_compressed_config(std::span<const StoredTensor> tensors, std::span<const std::string> kept,
                                    std::string_view (*format_of)(const StoredTensor& tensor)) {
  constexpr std::string_view kWeight = ".weight";
  std::vector<OrderedJson> groups;
  std::vector<std::vector<std::string>> targets;
  std::vector<std::string_view> formats;
  for (const StoredTensor& tensor : tensors) {
    const std::string_view format = format_of(tensor);
    OrderedJson group = {{"format", format},
                         {"input_activations", activation_json(tensor.linear.input)},
                         {"output_activations", activation_json(tensor.linear.output)},
                         {"targets", OrderedJson::array()},
                         {"weights", arguments_json(tensor.scheme, CompressedArguments::Dynamic::no, false)}};
    const auto found = std::ranges::find(groups, group);
    const auto at = static_cast<size_t>(found - groups.begin());
    if (found == groups.end()) {
      groups.push_back(std::move(group));
      targets.emplace_back();
    }
    targets[at].push_back(tensor.name.substr(0, tensor.name.size() - kWeight.size()));
    if (std::ranges::find(formats, format) == formats.end()) formats.push_back(format);
  }
  OrderedJson config_groups = OrderedJson::object();
  for (size_t i = 0; i < groups.size(); ++i) {
    // Of several each names its modules: for some loaders a class counts before the parts of a fused module.
    groups[i]["targets"] = groups.size() == 1 ? OrderedJson{"Linear"} : OrderedJson(targets[i]);
    config_groups[fmt::format("group_{}", i)] = std::move(groups[i]);
  }
  OrderedJson ignore = OrderedJson::array();
  for (const std::string& name : kept) ignore.push_back(name);
  return {{"config_groups", std::move(config_groups)},
          {"format", formats.size() == 1 ? formats.front() : "mixed-precision"},
          {"global_compression_ratio", nullptr},
          {"ignore", std::move(ignore)},
          {"kv_cache_scheme", nullptr},
          {"quant_method", kMethod},
          {"quantization_status", "compressed"},
          {"sparsity_config", OrderedJson::object()},
          {"transform_config", OrderedJson::object()},
          {"version", kVersion}};
}

}  // namespace bitwright

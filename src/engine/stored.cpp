#include "engine/stored.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <map>
#include <optional>
#include <unordered_map>

#include "engine/model_facts.hpp"

namespace bitwright {
namespace {

constexpr int64_t kMostSize = int64_t{1} << 40;  // of a dimension: more is nonsense, and products stay in range

/// The arrays by name; a reader asks for those beside the one it is given.
class Arrays {
 public:
  explicit Arrays(std::span<const StoredArray> arrays) {
    by_name_.reserve(arrays.size());
    for (const StoredArray& array : arrays) by_name_.emplace(array.name, &array);
    for (const StoredArray& array : arrays)
      if (array.shape.size() == 2 && array.name.ends_with("embed_tokens.weight")) hidden_ = array.shape[1];
  }
  const StoredArray* find(std::string_view base, std::string_view suffix) const {
    name_.assign(base).append(suffix);
    const auto found = by_name_.find(name_);
    return found == by_name_.end() ? nullptr : found->second;
  }
  const StoredArray* matrix(std::string_view base, std::string_view suffix) const {
    const StoredArray* array = find(base, suffix);
    return array != nullptr && array->shape.size() == 2 && array->shape[0] > 0 && array->shape[1] > 0 ? array : nullptr;
  }
  /// The model's width, 0 if no array tells.
  int64_t hidden() const { return hidden_; }

 private:
  std::unordered_map<std::string_view, const StoredArray*> by_name_;
  mutable std::string name_;  ///< the one that is looked for; a model asks some hundred thousand times
  int64_t hidden_ = 0;
};

struct Reading {
  std::string_view method{};  ///< empty: these arrays are something else
  std::string scheme{};
  LinearModule module{};
};

/// Little-endian numbers of a small integer array; empty if its bytes are not there.
std::vector<int64_t> numbers(const StoredArray* array) {
  std::vector<int64_t> values;
  if (array == nullptr || (array->dtype != DType::i64 && array->dtype != DType::i32)) return values;
  const size_t width = size_bytes(array->dtype);
  for (size_t at = 0; at < array->data.size() && values.size() < 4; at += width) {
    if (array->data.size() - at < width) break;
    int64_t value = 0;
    std::memcpy(&value, array->data.data() + at, width);
    values.push_back(value);
  }
  return values;
}

void set_size(LinearModule& module, int64_t rows, int64_t columns) {
  if (rows <= 0 || columns <= 0 || rows > kMostSize || columns > kMostSize) return;
  module.rows = rows;
  module.columns = columns;
}

/// How many inputs share one of `groups` scales; -1: all.
int64_t group_of(int64_t columns, int64_t groups) { return groups <= 1 ? -1 : (columns + groups - 1) / groups; }

/// GPTQ packs 32-bit words along the inputs, AWQ along the outputs; zero points lie along the outputs in both.
Reading read_qweight(const Arrays& arrays, std::string_view base, const StoredArray& codes) {
  const StoredArray *scales = arrays.matrix(base, ".scales"), *zeros = arrays.matrix(base, ".qzeros");
  if (codes.dtype != DType::i32 || scales == nullptr || zeros == nullptr || codes.shape.size() != 2) return {};
  const int64_t rows = scales->shape[1], groups = scales->shape[0], words = zeros->shape[1];
  if (rows <= 0 || rows > kMostSize || words > kMostSize || codes.shape[0] > kMostSize) return {};
  const int64_t bits = (32 * words + rows / 2) / rows;
  if (bits < 1 || bits > 8) return {};
  const bool awq = codes.shape[1] != rows && codes.shape[1] == words;
  if (!awq && codes.shape[1] != rows) return {};
  Reading reading{.method = awq ? "awq" : "gptq", .scheme = "int"};
  const int64_t columns = awq ? codes.shape[0] : codes.shape[0] * 32 / bits;
  set_size(reading.module, rows, columns);
  reading.module.form =
      WeightForm{.bits = static_cast<int>(bits), .group = group_of(columns, groups), .symmetric = !awq};
  return reading;
}

/// compressed-tensors: words along the inputs, whose number a small array tells.
Reading read_weight_packed(const Arrays& arrays, std::string_view base, const StoredArray& codes) {
  const StoredArray* scales = arrays.matrix(base, ".weight_scale");
  if (scales == nullptr || codes.shape.size() != 2 || codes.shape[1] <= 0 || codes.shape[1] > kMostSize) return {};
  Reading reading{.method = "compressed-tensors"};
  if (codes.dtype == DType::u8) {  // two 4-bit floats a byte
    const int64_t columns = 2 * codes.shape[1];
    reading.scheme = arrays.find(base, ".weight_global_scale") != nullptr ? "w4a16_nvfp4" : "w4a16_mxfp4";
    set_size(reading.module, codes.shape[0], columns);
    reading.module.form = WeightForm{.type = "float", .bits = 4, .group = group_of(columns, scales->shape[1])};
    return reading;
  }
  if (codes.dtype != DType::i32) return {};
  reading.scheme = "wNa16";
  const auto shape = numbers(arrays.find(base, ".weight_shape"));
  int64_t columns = shape.size() == 2 ? shape[1] : 0;
  for (int64_t bits = 2; columns == 0 && bits <= 8; ++bits)  // layers that read the hidden state
    if (codes.shape[1] == (arrays.hidden() * bits + 31) / 32 && arrays.hidden() > 0) columns = arrays.hidden();
  WeightForm form{.bits = 0, .group = 0, .symmetric = arrays.find(base, ".weight_zero_point") == nullptr};
  if (columns > 0 && columns <= kMostSize) {
    set_size(reading.module, codes.shape[0], columns);
    const int64_t per_word = (columns + codes.shape[1] - 1) / codes.shape[1];
    form.bits = per_word > 0 && per_word <= 32 ? static_cast<int>(32 / per_word) : 0;
    form.group = group_of(columns, scales->shape[1]);
  }
  form.act_order = arrays.find(base, ".weight_g_idx") != nullptr;
  reading.module.form = form;
  return reading;
}

Reading read_hqq(const Arrays& arrays, std::string_view base, const StoredArray&) {
  if (arrays.find(base, ".scale") == nullptr && arrays.find(base, ".meta") == nullptr) return {};
  Reading reading{.method = "hqq", .scheme = "int"};
  const auto shape = numbers(arrays.find(base, ".shape")), bits = numbers(arrays.find(base, ".nbits")),
             group = numbers(arrays.find(base, ".group_size"));
  if (shape.size() == 2) set_size(reading.module, shape[0], shape[1]);
  WeightForm form{.bits = 0, .symmetric = false};
  if (bits.size() == 1 && bits[0] > 0 && bits[0] <= 8) form.bits = static_cast<int>(bits[0]);
  if (group.size() == 1 && group[0] > 0 && group[0] < kMostSize) form.group = group[0];
  reading.module.form = form;
  return reading;
}

Reading read_quanto(const Arrays& arrays, std::string_view base, const StoredArray& codes) {
  const StoredArray* scales = arrays.find(base, ".weight._scale");
  if (scales == nullptr || codes.shape.size() != 2) return {};
  Reading reading{.method = "quanto", .scheme = codes.dtype == DType::i8 ? "qint8" : "qint4"};
  // an output's inputs, in groups one below the other
  const int64_t groups = scales->shape.empty() ? 1 : scales->shape[0];
  const int bits = codes.dtype == DType::i8 || codes.dtype == DType::f8_e4m3 ? 8 : 0;
  reading.module.form =
      WeightForm{.bits = bits, .group = groups > 1 && codes.shape[1] <= kMostSize ? codes.shape[1] : 0};
  return reading;
}

/// gpt-oss: [experts, outputs, groups, 16 bytes].
Reading read_mxfp4(const Arrays& arrays, std::string_view base, const StoredArray& codes) {
  if (arrays.find(base, "_scales") == nullptr || codes.dtype != DType::u8 || codes.shape.size() != 4) return {};
  Reading reading{.method = "mxfp4", .scheme = "mxfp4"};
  constexpr int64_t kGroup = 32;
  if (codes.shape[2] <= kMostSize) set_size(reading.module, codes.shape[1], codes.shape[2] * kGroup);
  reading.module.form = WeightForm{.type = "float", .bits = 4, .group = kGroup};
  return reading;
}

Reading read_aqlm(const Arrays& arrays, std::string_view base, const StoredArray&) {
  if (arrays.find(base, ".codebooks") == nullptr) return {};
  Reading reading{.method = "aqlm", .scheme = "codebook"};
  reading.module.form = WeightForm{.type = "codebook", .bits = 0};
  return reading;
}

/// bitsandbytes' 4 bits: a flat array; a small one beside it holds its shape as JSON.
Reading read_bitsandbytes4(const Arrays& arrays, std::string_view base, const StoredArray& codes) {
  if (codes.shape.size() == 2 && codes.shape[0] != 1 && codes.shape[1] != 1) return {};
  for (const char* type : {"nf4", "fp4"}) {
    const StoredArray* state = arrays.find(base, fmt::format(".weight.quant_state.bitsandbytes__{}", type));
    if (state == nullptr) continue;
    Reading reading{.method = "bitsandbytes", .scheme = type};
    reading.module.form = WeightForm{.type = type, .bits = 4, .group = 64};
    constexpr size_t kMost = 4096;
    if (state->data.size() > kMost) return reading;
    const auto* text = reinterpret_cast<const char*>(state->data.data());
    const Json said = Json::parse(text, text + state->data.size(), nullptr, false);
    if (!said.is_object()) return reading;
    const auto is_size = [](const Json& v) { return v.is_number_unsigned() && v.get<uint64_t>() < (1ULL << 40); };
    if (const Json shape = said.value("shape", Json()); shape.is_array() && shape.size() == 2)
      if (is_size(shape[0]) && is_size(shape[1]))
        set_size(reading.module, shape[0].get<int64_t>(), shape[1].get<int64_t>());
    if (const Json block = said.value("blocksize", Json()); is_size(block))
      reading.module.form->group = block.get<int64_t>();
    return reading;
  }
  return {};
}

/// MLX: 32-bit words along the inputs. Bits times inputs is known, groups times their size too; the model's width or
/// the usual group tells them apart.
Reading read_mlx(const Arrays& arrays, std::string_view base, const StoredArray& codes) {
  if (codes.dtype != DType::u32 || codes.shape.size() != 2) return {};
  const StoredArray* scales = arrays.matrix(base, ".scales");
  if (scales == nullptr) return {};
  const bool affine = arrays.find(base, ".biases") != nullptr;
  Reading reading{.method = "mlx", .scheme = affine ? "affine" : "mxfp4"};
  const int64_t words = codes.shape[1], groups = scales->shape[1];
  WeightForm form{
      .type = affine ? "int" : "float", .bits = affine ? 0 : 4, .group = affine ? 0 : 32, .symmetric = !affine};
  int64_t columns = 0;
  for (const int64_t bits : {4, 8, 6, 5, 3, 2}) {
    if (words > kMostSize || words * 32 % bits != 0) continue;
    const int64_t inputs = words * 32 / bits;
    if (form.bits == bits || (inputs == arrays.hidden() && form.bits == 0)) {
      columns = inputs;
      form.bits = static_cast<int>(bits);
      form.group = group_of(columns, groups);
      break;
    }
  }
  set_size(reading.module, codes.shape[0], columns);
  reading.module.form = form;
  return reading;
}

/// 8-bit codes under their own name, told by what scales them; NVFP4 of ModelOpt too.
Reading read_scaled(const Arrays& arrays, std::string_view base, const StoredArray& codes) {
  if (codes.shape.size() != 2 || size_bytes(codes.dtype) != 1) return {};
  const int64_t rows = codes.shape[0], columns = codes.shape[1];
  const StoredArray *inverse = arrays.matrix(base, ".weight_scale_inv"), *scale = arrays.find(base, ".weight_scale");
  Reading reading;
  set_size(reading.module, rows, columns);
  if (codes.dtype == DType::i8 && arrays.find(base, ".SCB") != nullptr) {
    reading.method = "bitsandbytes";
    reading.scheme = "int";
    reading.module.form = WeightForm{.bits = 8, .group = -1};
  } else if (codes.dtype == DType::u8 && scale != nullptr && arrays.find(base, ".weight_scale_2") != nullptr) {
    reading.method = "modelopt";
    reading.scheme = "NVFP4";
    if (columns <= kMostSize) set_size(reading.module, rows, 2 * columns);
    reading.module.form = WeightForm{.type = "float", .bits = 4, .group = 16};
  } else if (codes.dtype == DType::f8_e4m3 || codes.dtype == DType::f8_e5m2) {
    reading.method = "fp8";
    reading.scheme = "fp8";
    WeightForm form{.type = "float", .bits = 8};
    if (inverse != nullptr) {
      const auto block = [](int64_t size, int64_t blocks) {  // 7168 in 56: 128; the last one may be smaller
        return blocks <= 1 ? size
                           : static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>((size + blocks - 1) / blocks)));
      };
      form.block_rows = block(rows, inverse->shape[0]);
      form.block_columns = block(columns, inverse->shape[1]);
    } else if (scale != nullptr && !scale->shape.empty() && scale->shape[0] == rows && rows > 1) {
      form.group = -1;  // as compressed-tensors has it; other fp8 has one scale
      reading.method = "compressed-tensors";
      reading.scheme = "w8a8_fp8";
    }
    reading.module.form = form;
  } else if (codes.dtype == DType::i8 && scale != nullptr) {
    reading.method = "compressed-tensors";
    reading.scheme = "w8a8_int8";
    reading.module.form = WeightForm{.bits = 8, .group = scale->shape.empty() || scale->shape[0] != rows ? 0 : -1};
  } else {
    return {};
  }
  return reading;
}

/// Names that only quantized weights have; where several rows share a name the first that recognizes its arrays counts.
struct Layout {
  std::string_view suffix;  ///< of the array that holds the codes
  Reading (*read)(const Arrays& arrays, std::string_view base, const StoredArray& codes);
};
constexpr std::array<Layout, 9> kLayouts = {{
    {".qweight", read_qweight},
    {".weight_packed", read_weight_packed},
    {".W_q", read_hqq},
    {".weight._data", read_quanto},
    {"_blocks", read_mxfp4},
    {".codes", read_aqlm},
    {".weight", read_bitsandbytes4},
    {".weight", read_mlx},
    {".weight", read_scaled},
}};

/// What llama.cpp calls the mixture of types of a file: general.file_type (include/llama.h).
constexpr std::array<std::string_view, 41> kFileTypes = {
    "F32",    "F16",     "Q4_0",   "Q4_1",   "",       "",          "",       "Q8_0",  "Q5_0",    "Q5_1",   "Q2_K",
    "Q3_K_S", "Q3_K_M",  "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S",    "Q5_K_M", "Q6_K",  "IQ2_XXS", "IQ2_XS", "Q2_K_S",
    "IQ3_XS", "IQ3_XXS", "IQ1_S",  "IQ4_NL", "IQ3_S",  "IQ3_M",     "IQ2_S",  "IQ2_M", "IQ4_XS",  "IQ1_M",  "BF16",
    "",       "",        "",       "TQ1_0",  "TQ2_0",  "MXFP4_MOE", "NVFP4",  "Q1_0"};

/// A block's elements and bytes give the bits of a weight; plain types their own.
double bits_of(const StoredArray& array) {
  if (array.block == nullptr) return 8.0 * static_cast<double>(size_bytes(array.dtype));
  return 8.0 * static_cast<double>(array.block->bytes) / static_cast<double>(array.block->elements);
}

void read_gguf(std::span<const StoredArray> arrays, const Json& metadata, StoredWeights& stored) {
  DetectedQuantization& found = stored.quantization;
  found.method = "gguf";
  found.evidence = "GGUF header";
  double bits = 0, weights = 0;
  std::map<std::string, double> types;
  for (const StoredArray& array : arrays) {
    if (array.shape.size() < 2) continue;
    const auto count = static_cast<double>(element_count(array.shape));
    bits += bits_of(array) * count;
    weights += count;
    types[std::string(array.block != nullptr ? array.block->name : info(array.dtype).name)] += count;
  }
  if (weights > 0) found.bits = bits / weights;
  const auto type = metadata.find("general.file_type");
  if (type != metadata.end() && type->is_number_unsigned() && type->get<uint64_t>() < kFileTypes.size())
    found.scheme = kFileTypes[type->get<size_t>()];
  if (found.scheme.empty() && !types.empty())
    found.scheme = std::ranges::max_element(types, {}, [](const auto& t) { return t.second; })->first;
  found.facts["bits"] = found.bits;
  found.facts["scheme"] = found.scheme;
  stored.model = gguf_model_facts(metadata);
}

/// Layers that are stored alike: how many, and the first of them.
struct Kind {
  size_t count = 0;
  Reading first;
  std::string array;
};

/// The method of most layers is the model's.
void conclude(const std::map<std::string, Kind>& kinds, StoredWeights& stored) {
  const auto most = std::ranges::max_element(kinds, {}, [](const auto& item) { return item.second.count; });
  if (most == kinds.end()) return;
  const auto& [count, reading, example] = most->second;
  DetectedQuantization& found = stored.quantization;
  found.method = reading.method;
  found.scheme = reading.scheme;
  found.evidence = fmt::format("tensor names: {}", example);
  const WeightForm& form = *reading.module.form;
  found.bits = form.bits;
  found.group_size = form.block_columns > 0 ? form.block_columns : form.group;
  if (form.block_rows > 0) {
    found.scheme = fmt::format("fp8 block {}x{}", form.block_rows, form.block_columns);
    found.facts["weight_block_size"] = {form.block_rows, form.block_columns};
  }
  if (form.bits > 0) found.facts["bits"] = form.bits;
  if (form.group != 0) found.facts["group_size"] = form.group;
  if (reading.method == "compressed-tensors") found.facts["scheme"] = found.scheme;
  if (reading.method == "modelopt") found.facts["quant_algo"] = found.scheme;
  if (reading.method == "bitsandbytes") found.facts["load_in_8bit"] = form.bits == 8;
}

Reading read_array(const Arrays& index, const StoredArray& array) {
  for (const Layout& layout : kLayouts) {
    if (!array.name.ends_with(layout.suffix)) continue;
    const auto base = std::string_view(array.name).substr(0, array.name.size() - layout.suffix.size());
    Reading reading = layout.read(index, base, array);
    reading.module.name = std::string(base);
    if (!reading.method.empty()) return reading;
  }
  return {};
}

void add_plain(const StoredArray& array, StoredWeights& stored) {
  const bool weight = array.name.ends_with(".weight");
  if (array.shape.size() >= 2 || weight) stored.parameters += static_cast<double>(element_count(array.shape));
  auto module = weight ? linear_module(array.name, array.shape, nullptr) : std::nullopt;
  if (!module) return;
  if (array.block != nullptr) module->form = WeightForm{.type = "block", .bits = static_cast<int>(bits_of(array))};
  stored.modules.push_back(std::move(*module));
}

}  // namespace

StoredWeights read_stored(std::span<const StoredArray> arrays, const Json* metadata) {
  StoredWeights stored;
  const Arrays index(arrays);
  std::map<std::string, Kind> kinds;
  for (const StoredArray& array : arrays) {
    stored.bytes += static_cast<double>(array.data.size());
    Reading reading = read_array(index, array);
    if (reading.method.empty()) {
      add_plain(array, stored);
      continue;
    }
    stored.parameters += static_cast<double>(reading.module.rows) * static_cast<double>(reading.module.columns);
    stored.modules.push_back(reading.module);
    Kind& kind = kinds[fmt::format("{} {}", reading.method, reading.scheme)];
    if (++kind.count == 1) kind = {.count = 1, .first = std::move(reading), .array = array.name};
  }
  if (metadata != nullptr)
    read_gguf(arrays, *metadata, stored);
  else
    conclude(kinds, stored);
  return stored;
}

StoredWeights read_stored(const std::vector<std::filesystem::path>& files) {
  std::vector<WeightFile> opened;  // the arrays point into them
  std::vector<StoredArray> arrays;
  const Json* metadata = nullptr;
  opened.reserve(files.size());
  for (const std::filesystem::path& file : files) {
    const WeightFile& weights = opened.emplace_back(file);
    arrays.insert(arrays.end(), weights.arrays().begin(), weights.arrays().end());
    if (metadata == nullptr) metadata = weights.facts();
  }
  return read_stored(arrays, metadata);
}

void apply_declared(const DetectedQuantization& declared, std::vector<LinearModule>& modules) {
  const auto flag = [&](const char* name) {
    const auto found = declared.facts.find(name);
    return found != declared.facts.end() && found->is_boolean() ? std::optional(found->get<bool>()) : std::nullopt;
  };
  const auto symmetric = flag("sym"), ordered = flag("desc_act");
  for (LinearModule& module : modules) {
    if (!module.form || module.form->type != "int") continue;
    if (symmetric) module.form->symmetric = *symmetric;
    if (ordered && module.form->group > 0) module.form->act_order = *ordered;  // one group has no order
  }
}

Json gguf_model_facts(const Json& metadata) {
  Json facts = Json::object();
  const auto name = metadata.find("general.architecture");
  if (name == metadata.end() || !name->is_string()) return facts;
  const auto architecture = name->get<std::string>();
  const auto find = [&](std::string_view key) -> const Json* {
    const auto found = metadata.find(fmt::format("{}.{}", architecture, key));
    return found == metadata.end() ? nullptr : &*found;
  };
  const auto is_count = [](const Json& v) {
    return v.is_number_unsigned() && v.get<uint64_t>() > 0 && v.get<uint64_t>() < (1ULL << 31);
  };
  struct Key {
    const char *gguf, *fact;
  };
  constexpr std::array<Key, 14> kKeys = {{{"block_count", "layers"},
                                          {"embedding_length", "hidden_size"},
                                          {"attention.head_count", "heads"},
                                          {"attention.head_count_kv", "kv_heads"},
                                          {"attention.key_length", "head_dim"},
                                          {"attention.sliding_window", "sliding_window"},
                                          {"attention.kv_lora_rank", "kv_lora_rank"},
                                          {"attention.q_lora_rank", "q_lora_rank"},
                                          {"context_length", "context"},
                                          {"feed_forward_length", "intermediate_size"},
                                          {"expert_count", "experts"},
                                          {"expert_feed_forward_length", "moe_intermediate_size"},
                                          {"expert_shared_count", "shared_experts"},
                                          {"leading_dense_block_count", "dense_layers"}}};
  facts["arch"] = facts["model_type"] = architecture;
  for (const Key& key : kKeys) {
    const Json* value = find(key.gguf);
    if (value == nullptr) continue;
    if (is_count(*value)) facts[key.fact] = *value;
    if (!value->is_array()) continue;  // one for each layer
    uint64_t largest = 0;
    for (const Json& one : *value)
      if (is_count(one)) largest = std::max(largest, one.get<uint64_t>());
    if (largest > 0) facts[key.fact] = largest;
    if (const auto none = std::ranges::count(*value, Json(0)); none > 0 && std::string_view(key.fact) == "kv_heads")
      facts["linear_layers"] = none;
  }
  if (const Json* pattern = find("attention.sliding_window_pattern"); pattern != nullptr && pattern->is_array())
    facts["sliding_layers"] = std::ranges::count(*pattern, Json(true));
  if (const auto tokens = metadata.find("tokenizer.ggml.tokens"); tokens != metadata.end() && tokens->is_array())
    facts["vocabulary"] = tokens->size();
  if (const Json* rope = find("rope.dimension_count"); rope != nullptr && facts.contains("kv_lora_rank"))
    if (is_count(*rope)) facts["qk_rope_head_dim"] = *rope;
  add_derived_facts(facts);
  return facts;
}

}  // namespace bitwright

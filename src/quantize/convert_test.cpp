// Conversions of models that are laid out in ways of their own.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <random>

#include "base/error.hpp"
#include "checkpoint/safetensors.hpp"
#include "model/open_model.hpp"
#include "quantize/quantize.hpp"
#include "recipe/config.hpp"
#include "scheme/transposed.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;
using test::TemporaryDirectory;

constexpr const char* kMixtral = R"({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
  "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
  "num_key_value_heads": 1, "vocab_size": 64, "hidden_act": "silu", "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 2, "num_experts_per_tok": 1,
  "tie_word_embeddings": false})";
const std::map<std::string, Shape> kMixtralTensors = {
    {"model.embed_tokens.weight", {64, 64}},
    {"model.layers.0.input_layernorm.weight", {64}},
    {"model.layers.0.self_attn.q_proj.weight", {64, 64}},
    {"model.layers.0.self_attn.k_proj.weight", {32, 64}},
    {"model.layers.0.self_attn.v_proj.weight", {32, 64}},
    {"model.layers.0.self_attn.o_proj.weight", {64, 64}},
    {"model.layers.0.post_attention_layernorm.weight", {64}},
    {"model.layers.0.block_sparse_moe.gate.weight", {2, 64}},
    {"model.layers.0.block_sparse_moe.experts.0.w1.weight", {128, 64}},
    {"model.layers.0.block_sparse_moe.experts.0.w2.weight", {64, 128}},
    {"model.layers.0.block_sparse_moe.experts.0.w3.weight", {128, 64}},
    {"model.layers.0.block_sparse_moe.experts.1.w1.weight", {128, 64}},
    {"model.layers.0.block_sparse_moe.experts.1.w2.weight", {64, 128}},
    {"model.layers.0.block_sparse_moe.experts.1.w3.weight", {128, 64}},
    {"model.norm.weight", {64}},
    {"lm_head.weight", {64, 64}}};

constexpr const char* kGpt2 = R"({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_head": 2,
  "n_layer": 1, "n_positions": 64, "n_ctx": 64, "vocab_size": 64, "activation_function": "gelu_new",
  "layer_norm_epsilon": 1e-5, "tie_word_embeddings": true})";
const std::map<std::string, Shape> kGpt2Tensors = {{"transformer.wte.weight", {64, 64}},
                                                   {"transformer.wpe.weight", {64, 64}},
                                                   {"transformer.h.0.ln_1.weight", {64}},
                                                   {"transformer.h.0.ln_1.bias", {64}},
                                                   {"transformer.h.0.attn.c_attn.weight", {64, 192}},
                                                   {"transformer.h.0.attn.c_attn.bias", {192}},
                                                   {"transformer.h.0.attn.c_proj.weight", {64, 64}},
                                                   {"transformer.h.0.attn.c_proj.bias", {64}},
                                                   {"transformer.h.0.ln_2.weight", {64}},
                                                   {"transformer.h.0.ln_2.bias", {64}},
                                                   {"transformer.h.0.mlp.c_fc.weight", {64, 256}},
                                                   {"transformer.h.0.mlp.c_fc.bias", {256}},
                                                   {"transformer.h.0.mlp.c_proj.weight", {256, 64}},
                                                   {"transformer.h.0.mlp.c_proj.bias", {64}},
                                                   {"transformer.ln_f.weight", {64}},
                                                   {"transformer.ln_f.bias", {64}}};

class Convert : public ::testing::Test {
 protected:
  void write_model(const char* config, const std::map<std::string, Shape>& tensors) const {
    fs::create_directory(dir / "model");
    test::write_file(dir / "model" / "config.json", config);
    std::vector<ArraySpec> specs;
    for (const auto& [name, shape] : tensors) specs.push_back({name, DType::f16, shape});
    SafetensorsWriter writer(dir / "model" / "model.safetensors", specs);
    std::mt19937 random(5);
    std::normal_distribution<float> normal(0, 0.05f);
    for (const ArraySpec& spec : specs) {
      std::vector<float> values(static_cast<size_t>(element_count(spec.shape)));
      for (float& value : values) value = normal(random);
      std::vector<std::byte> bytes(spec.bytes());
      from_f32(DType::f16, values, bytes);
      writer.add(bytes);
    }
    writer.finish();
  }

  void quantize_to(const std::string& container, const std::string& yaml) const {
    fs::remove_all(dir / "source");
    std::vector<Warning> warnings;
    quantize(Checkpoint(dir / "model"), read_request(parse_config_value(yaml, "test")),
             {.output = {.output = dir / "source"}, .verify = false, .container = find_container(container)}, warnings);
  }

  OrderedJson convert_to(const std::string& container, ConversionRequest request = {}) const {
    fs::remove_all(dir / "out");
    request.container = find_container(container);
    std::vector<Warning> warnings;
    return convert(open_model(dir / "source"), {.output = {.output = dir / "out"}, .request = request}, warnings);
  }
  std::string code_of(const std::string& container) const {
    try {
      convert_to(container);
    } catch (const Error& error) {
      EXPECT_FALSE(fs::exists(dir / "out"));
      return error.code();
    }
    return "none";
  }

  static std::map<std::string, std::vector<float>> values_of(const fs::path& path) {
    const Checkpoint model = open_model(path);
    std::map<std::string, std::vector<float>> all;
    for (const TensorEntry& entry : model.tensors()) {
      std::vector<float>& values = all[entry.name] = model.read_f32(entry);
      if (!entry.transposed) continue;
      const std::vector<std::byte> bytes =
          transposed(std::as_bytes(std::span(values)), entry.shape[0], entry.shape[1], sizeof(float));
      std::ranges::copy(bytes, std::as_writable_bytes(std::span(values)).begin());
    }
    return all;
  }

  /// The most that a value of what was written differs from the source's.
  double difference() const {
    const auto before = values_of(dir / "source"), after = values_of(dir / "out");
    EXPECT_EQ(before.size(), after.size());
    double most = 0;
    for (const auto& [name, values] : before) {
      const auto found = after.find(name);
      if (found == after.end() || found->second.size() != values.size()) {
        ADD_FAILURE() << name;
        continue;
      }
      for (size_t i = 0; i < values.size(); ++i)
        most = std::max(most, std::fabs(double{values[i]} - double{found->second[i]}));
    }
    return most;
  }
  const TemporaryDirectory dir;
};

TEST_F(Convert, ExpertsAreStackedAndTakenApartAgain) {
  write_model(kMixtral, kMixtralTensors);
  for (const char* container : {"native", "gptq", "compressed-tensors", "hqq", "quanto", "mlx"}) {
    SCOPED_TRACE(container);
    quantize_to(container, std::string(container) == "quanto"
                               ? "quantization: {method: int8}"
                               : "quantization: {method: int4, scheme: {group_size: 32, scale_dtype: float16}}");
    const OrderedJson result = convert_to("gguf");
    EXPECT_EQ(result["tensors"].size(), 7u);  // of q, k, v, o and three stacks
    EXPECT_EQ(result["max_abs_difference"].get<double>(), difference());
    EXPECT_LT(difference(), 1e-3);
    EXPECT_EQ(convert_to("gguf", {.exact = true})["exact"], true);
    EXPECT_EQ(difference(), 0);
    fs::remove_all(dir / "source");
    fs::rename(dir / "out", dir / "source");
    EXPECT_EQ(convert_to("native")["exact"], true);
    EXPECT_EQ(difference(), 0);
  }
}

TEST_F(Convert, Gpt2IsTurnedWhereOneOwnerTransposesIt) {
  write_model(kGpt2, kGpt2Tensors);
  quantize_to("gptq", "quantization: {method: int4, scheme: {group_size: 32, symmetric: true}}");
  EXPECT_EQ(convert_to("gguf")["exact"], true);  // rows are outputs on both sides
  EXPECT_EQ(difference(), 0);
  EXPECT_EQ(convert_to("native")["exact"], true);  // it has them as the model does
  EXPECT_EQ(difference(), 0);
  quantize_to("native", "quantization: {method: int4, scheme: {group_size: 32}}");
  EXPECT_EQ(code_of("gguf"), "does-not-fit");  // groups along the outputs
  const OrderedJson anew = convert_to("gguf", {.requantize = true, .method = "q8_0"});
  EXPECT_EQ(anew["verdict"], "requantized");
  EXPECT_EQ(anew["max_abs_difference"].get<double>(), difference());
  EXPECT_LT(difference(), 1e-2);
}

/// Columns in the order of their importance, as `desc_act` has them.
void shuffle_groups(const fs::path& model) {
  std::vector<ArraySpec> specs;
  std::vector<std::vector<std::byte>> data;
  {
    const Checkpoint source(model);
    for (const StoredArray& array : source.stored_arrays()) {
      specs.push_back({array.name, array.dtype, array.shape});
      data.emplace_back(array.data.begin(), array.data.end());
      if (!array.name.ends_with("g_idx")) continue;
      const size_t columns = data.back().size() / 4, groups = columns / 32;
      std::vector<int32_t> index(columns);
      for (size_t k = 0; k < columns; ++k) index[k] = static_cast<int32_t>(k * 7 % groups);
      std::ranges::copy(std::as_bytes(std::span(index)), data.back().begin());
    }
  }
  fs::remove(model / "model.safetensors");
  SafetensorsWriter writer(model / "model.safetensors", specs);
  for (const std::vector<std::byte>& bytes : data) writer.add(bytes);
  writer.finish();
  fs::remove(model / "quantization_metadata.json");  // its digests
  const auto edit = [](std::string& text) {
    const std::string was = "\"desc_act\": false";
    for (size_t at = text.find(was); at != std::string::npos; at = text.find(was, at))
      text.replace(at, was.size(), "\"desc_act\": true");
  };
  for (const char* name : {"config.json", "quantize_config.json"}) {
    if (!fs::exists(model / name)) continue;
    std::string text = test::read_file(model / name);
    edit(text);
    test::write_file(model / name, text);
  }
}

TEST_F(Convert, ColumnsOfGroupsInAnyOrder) {
  write_model(kMixtral, kMixtralTensors);
  quantize_to("gptq", "quantization: {method: int4, scheme: {group_size: 32}}");
  shuffle_groups(dir / "source");
  EXPECT_EQ(convert_to("gptq")["exact"], true);
  EXPECT_EQ(difference(), 0);
  EXPECT_EQ(convert_to("native")["exact"], true);
  EXPECT_EQ(difference(), 0);
  for (const char* container : {"gguf", "mlx"}) {
    SCOPED_TRACE(container);
    EXPECT_EQ(code_of(container), "does-not-fit");  // neighbours do not share their scale
    const OrderedJson anew = convert_to(container, {.requantize = true});
    EXPECT_EQ(anew["verdict"], "requantized");
    EXPECT_EQ(anew["max_abs_difference"].get<double>(), difference());
  }
}

TEST_F(Convert, SeveralWidthsEachFindTheirs) {
  write_model(kMixtral, kMixtralTensors);
  quantize_to("compressed-tensors",
              "quantization: {method: int4, scheme: {group_size: 32, scale_dtype: float16}, layer_configs: "
              "{'*o_proj': {method: int8, group_size: 32}, '*q_proj': {method: none}}}");
  const OrderedJson result = convert_to("gguf");
  EXPECT_EQ(difference(), 0);
  std::map<std::string, std::string> types;
  for (const OrderedJson& tensor : result["tensors"]) types[tensor["name"]] = tensor["type"];
  EXPECT_EQ(types["blk.0.attn_output.weight"], "Q8_0");
  EXPECT_EQ(types["blk.0.attn_k.weight"], "Q4_0");
  EXPECT_EQ(types["blk.0.ffn_down_exps.weight"], "Q4_0");
  EXPECT_EQ(types.count("blk.0.attn_q.weight"), 0u);
}

TEST_F(Convert, NothingIsWrittenInAContainerThatWouldHoldNoneOfIt) {
  write_model(kMixtral, kMixtralTensors);
  quantize_to("native", "quantization: {method: int4}");
  EXPECT_EQ(code_of("mxfp4"), "does-not-fit");
}

}  // namespace
}  // namespace bitwright

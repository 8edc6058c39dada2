#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <iostream>

#include "base/error.hpp"
#include "bitwright/torch/adapter.hpp"
#include "checkpoint/checkpoint.hpp"
#include "model/model.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

namespace nn = torch::nn;

/// The bundled model as anybody would write it with libtorch; its head is a layer of its own here, so that it is
/// quantized, too.
constexpr int64_t kHidden = 256, kWide = 768, kHeads = 8, kKeys = 4, kHead = 32, kVocabulary = 4096, kLayers = 4;

nn::Linear linear(int64_t in, int64_t out) { return nn::Linear(nn::LinearOptions(in, out).bias(false)); }

struct Norm : nn::Module {
  Norm() { weight = register_parameter("weight", torch::ones(kHidden)); }
  torch::Tensor forward(const torch::Tensor& x) { return x * torch::rsqrt(x.square().mean(-1, true) + 1e-5) * weight; }
  torch::Tensor weight;
};

/// x: [heads, tokens, 32]
torch::Tensor rotated(const torch::Tensor& x) {
  const torch::Tensor frequencies = torch::pow(10000.0, -torch::arange(0, kHead, 2, torch::kDouble) / kHead);
  const torch::Tensor angles = torch::outer(torch::arange(x.size(1), torch::kDouble), frequencies).repeat({1, 2});
  const torch::Tensor turned = torch::cat({-x.slice(-1, kHead / 2), x.slice(-1, 0, kHead / 2)}, -1);
  return x * angles.cos().to(torch::kFloat) + turned * angles.sin().to(torch::kFloat);
}

struct Attention : nn::Module {
  Attention() {
    q_proj = register_module("q_proj", linear(kHidden, kHeads * kHead));
    k_proj = register_module("k_proj", linear(kHidden, kKeys * kHead));
    v_proj = register_module("v_proj", linear(kHidden, kKeys * kHead));
    o_proj = register_module("o_proj", linear(kHeads * kHead, kHidden));
  }
  torch::Tensor forward(const torch::Tensor& x) {
    const auto heads = [&](nn::Linear& layer, int64_t count) {
      return layer(x).reshape({x.size(0), count, kHead}).transpose(0, 1);
    };
    const torch::Tensor q = rotated(heads(q_proj, kHeads));
    const torch::Tensor k = rotated(heads(k_proj, kKeys)).repeat_interleave(kHeads / kKeys, 0);
    const torch::Tensor v = heads(v_proj, kKeys).repeat_interleave(kHeads / kKeys, 0);
    const torch::Tensor later = torch::ones({x.size(0), x.size(0)}, torch::kBool).triu(1);
    const torch::Tensor scores = (torch::matmul(q, k.transpose(1, 2)) / std::sqrt(32.0)).masked_fill(later, -1e30);
    return o_proj(torch::matmul(scores.softmax(-1), v).transpose(0, 1).reshape({x.size(0), kHeads * kHead}));
  }
  nn::Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, o_proj{nullptr};
};

struct FeedForward : nn::Module {
  FeedForward() {
    gate_proj = register_module("gate_proj", linear(kHidden, kWide));
    up_proj = register_module("up_proj", linear(kHidden, kWide));
    down_proj = register_module("down_proj", linear(kWide, kHidden));
  }
  torch::Tensor forward(const torch::Tensor& x) { return down_proj(torch::silu(gate_proj(x)) * up_proj(x)); }
  nn::Linear gate_proj{nullptr}, up_proj{nullptr}, down_proj{nullptr};
};

struct Layer : nn::Module {
  Layer() {
    input_layernorm = register_module("input_layernorm", std::make_shared<Norm>());
    self_attn = register_module("self_attn", std::make_shared<Attention>());
    post_attention_layernorm = register_module("post_attention_layernorm", std::make_shared<Norm>());
    mlp = register_module("mlp", std::make_shared<FeedForward>());
  }
  torch::Tensor forward(torch::Tensor x) {
    x = x + self_attn->forward(input_layernorm->forward(x));
    return x + mlp->forward(post_attention_layernorm->forward(x));
  }
  std::shared_ptr<Norm> input_layernorm, post_attention_layernorm;
  std::shared_ptr<Attention> self_attn;
  std::shared_ptr<FeedForward> mlp;
};

struct Decoder : nn::Module {
  Decoder() {
    embed_tokens = register_module("embed_tokens", nn::Embedding(kVocabulary, kHidden));
    layers = register_module("layers", nn::ModuleList());
    for (int64_t i = 0; i < kLayers; ++i) layers->push_back(std::make_shared<Layer>());
    norm = register_module("norm", std::make_shared<Norm>());
  }
  torch::Tensor forward(const torch::Tensor& tokens) {
    torch::Tensor x = embed_tokens(tokens);
    for (const auto& layer : *layers) x = layer->as<Layer>()->forward(x);
    return norm->forward(x);
  }
  nn::Embedding embed_tokens{nullptr};
  nn::ModuleList layers{nullptr};
  std::shared_ptr<Norm> norm;
};

struct Llama : nn::Module {
  Llama() {
    model = register_module("model", std::make_shared<Decoder>());
    load_quantized_model(*this, test::example_model());
    lm_head = register_module("lm_head", linear(kHidden, kVocabulary));
    const torch::NoGradGuard no_gradients;
    lm_head->weight.copy_(model->embed_tokens->weight);
  }
  torch::Tensor forward(const torch::Tensor& tokens) { return lm_head(model->forward(tokens)); }
  std::shared_ptr<Decoder> model;
  nn::Linear lm_head{nullptr};
};

OrderedJson config() {
  std::ifstream file(test::example_model() / "config.json");
  OrderedJson json = OrderedJson::parse(file);
  json["tie_word_embeddings"] = false;
  return json;
}

torch::Tensor tokens(int64_t first, int64_t count = 24) {
  return (torch::arange(count) * 37 + first * 101) % kVocabulary;
}

/// The native runtime on a saved model.
class Runtime {
 public:
  explicit Runtime(const std::filesystem::path& path) : checkpoint_(path), model_(checkpoint_) {}
  torch::Tensor logits(const torch::Tensor& text) const {
    KvCache cache(model_.config(), text.size(0));
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < text.size(0); ++i) ids.push_back(text[i].item<int32_t>());
    return torch::tensor(model_.forward(ids, cache)).reshape({text.size(0), kVocabulary});
  }

 private:
  Checkpoint checkpoint_;
  Model model_;
};

/// The quantized module, and what the runtime makes of its file, on texts that neither was calibrated with. The two add
/// in different orders, so now and then an input that lies between two codes becomes the other one, which is far more
/// than 1e-3: the texts are short and several, and half of them must have none.
void expect_same_logits(const PtqConfig& how, const std::string& format) {
  SCOPED_TRACE(how.type + " " + how.quant_type + " " + std::to_string(how.bits) + " " + format);
  const torch::NoGradGuard no_gradients;
  const test::TemporaryDirectory dir;
  Llama llama;
  const torch::Tensor text = tokens(5), floats = llama.forward(text);
  const QuantizationInfo info = how.type == "static"
                                    ? quantize_model_ptq(llama, how, std::vector{tokens(1), tokens(2), tokens(3)})
                                    : quantize_model_ptq(llama, how);
  EXPECT_EQ(info.affected.size(), static_cast<size_t>(7 * kLayers + 1));  // the head, too
  EXPECT_GT(compare_outputs(floats, llama.forward(text)).relative, 1e-3);
  EXPECT_LT(compare_outputs(floats, llama.forward(text)).relative, 0.2);
  save_quantized_model(llama, dir / "model", format, {.config = config()});
  const Runtime runtime(dir / "model");
  constexpr int kTexts = 12;
  int same = 0;
  for (int i = 0; i < kTexts; ++i) {
    const torch::Tensor few = tokens(10 + i, 3);
    const OutputDifference difference = compare_outputs(llama.forward(few), runtime.logits(few));
    same += difference.largest < 1e-3 ? 1 : 0;
    EXPECT_LT(difference.relative, 0.1);
  }
  std::cout << info.mode << ' ' << info.affected[0].scheme << ": " << same << " of " << kTexts << " texts the same\n";
  EXPECT_GE(same, how.type == "weight_only" ? kTexts : kTexts / 2);
}

TEST(SpecificationC, C1_TheRuntimeHasTheSameLogitsInFloats) {
  const torch::NoGradGuard no_gradients;
  Llama llama;
  EXPECT_LT(compare_outputs(llama.forward(tokens(5)), Runtime(test::example_model()).logits(tokens(5))).largest, 1e-3);
}

TEST(SpecificationC, C1_TheRuntimeHasTheSameLogitsStatic) {
  expect_same_logits({.type = "static"}, "native");
  expect_same_logits({.type = "static", .symmetric_inputs = false, .observer = "percentile"}, "native");
  expect_same_logits({.type = "static", .quant_type = "e4m3"}, "native");
  expect_same_logits({.type = "static", .format = "compressed-tensors"}, "compressed-tensors");
}

TEST(SpecificationC, C1_TheRuntimeHasTheSameLogitsDynamic) {
  expect_same_logits({.type = "dynamic"}, "native");
  expect_same_logits({.type = "dynamic", .quant_type = "e4m3"}, "native");
  expect_same_logits({.type = "dynamic", .bits = 4}, "native");
  expect_same_logits({.type = "dynamic", .format = "compressed-tensors"}, "compressed-tensors");
}

TEST(SpecificationC, C1_TheRuntimeHasTheSameLogitsWeightOnly) {
  expect_same_logits({.type = "weight_only", .bits = 4}, "native");
}

TEST(SpecificationC, C6_CheckpointsCarryMetadataAndComeBack) {
  const torch::NoGradGuard no_gradients;
  const test::TemporaryDirectory dir;
  Llama llama, again;
  quantize_model_ptq(llama, {.type = "static"}, std::vector{tokens(1)});
  save_quantized_model(llama, dir / "model", "native", {.config = config(), .directory = test::example_model()});
  EXPECT_TRUE(std::filesystem::exists(dir / "model" / "tokenizer.json"));
  const Checkpoint written(dir / "model");
  written.verify_digests();
  EXPECT_EQ(written.quantization_metadata()["format_version"], "1.1");
  EXPECT_EQ(written.quantization_metadata()["tensors"]["lm_head.weight"]["input"]["dynamic"], false);
  const QuantizationInfo info = load_quantized_model(again, dir / "model");
  EXPECT_EQ(info.mode, "static");
  EXPECT_TRUE(info.warnings.empty());
  EXPECT_TRUE(torch::equal(again.forward(tokens(5)), llama.forward(tokens(5))));
  // A newer major version is refused with a clear line.
  std::ifstream in(dir / "model" / "quantization_metadata.json");
  OrderedJson metadata = OrderedJson::parse(in);
  metadata["format_version"] = "2.0";
  test::write_file(dir / "model" / "quantization_metadata.json", metadata.dump());
  EXPECT_THROW(load_quantized_model(again, dir / "model"), Error);
}

}  // namespace
}  // namespace bitwright

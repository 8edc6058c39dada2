#include "cli/plan_diff.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "cli/page.hpp"
#include "cli/tensor_groups.hpp"

namespace bitwright {
namespace {

OrderedJson tensor(const std::string& name, const std::string& scheme, int bytes) {
  return {{"name", name}, {"scheme", scheme}, {"algorithm", scheme == "int4" ? "rtn" : ""}, {"bytes", bytes}};
}

OrderedJson model(const std::string& down_proj) {
  OrderedJson tensors = OrderedJson::array({tensor("model.embed_tokens.weight", "bfloat16", 100)});
  for (int layer = 0; layer < 3; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer);
    tensors.push_back(tensor(prefix + ".self_attn.q_proj.weight", "int4", 10));
    tensors.push_back(tensor(prefix + ".mlp.down_proj.weight", layer == 0 ? "int8" : down_proj, 20));
    tensors.push_back(tensor(prefix + ".mlp.experts.7.up_proj.weight", "int4", 5));
  }
  return tensors;
}

OrderedJson plan(const OrderedJson& tensors, int bytes) {
  return {{"quant_config", "Preset: default"},
          {"tensors", tensors},
          {"predicted", {{"bytes", bytes}}},
          {"engine",
           {{"name", "vllm"},
            {"outcome", "ok"},
            {"explained", OrderedJson::array({{{"flag", "--a"}, {"value", "1"}, {"place", "cli"}},
                                              {{"flag", "dtype"}, {"value", "x"}, {"place", "config"}}})},
            {"config_file", {{"dtype", "x"}}},
            {"command", "vllm serve"}}},
          {"warnings", OrderedJson::array()}};
}

TEST(TensorGroups, AKindIsThePathBelowTheLayer) {
  EXPECT_EQ(tensor_kind("model.layers.3.self_attn.q_proj.weight"), "self_attn.q_proj");
  EXPECT_EQ(tensor_kind("model.layers.3.mlp.experts.12.up_proj.weight"), "experts.up_proj");
  EXPECT_EQ(tensor_kind("model.embed_tokens.weight"), "embed_tokens");
  EXPECT_EQ(tensor_kind("blk.0.attn_q.weight"), "attn_q");
  EXPECT_EQ(tensor_kind("h.11.attn.c_attn.bias"), "attn.c_attn.bias");
  EXPECT_EQ(tensor_kind("lm_head.bias"), "lm_head.bias");
  EXPECT_EQ(tensor_kind("adapter.4"), "4");
  EXPECT_EQ(tensor_kind("weight"), "weight");
  EXPECT_EQ(tensor_kind(""), "");
}

TEST(TensorGroups, WhatIsAlikeIsOneRow) {
  const auto groups = group_tensors(model("int4"));
  ASSERT_EQ(groups.size(), 4U);
  EXPECT_EQ(groups[0].names, (std::vector<std::string>{"embed_tokens"}));
  EXPECT_EQ(groups[1].names, (std::vector<std::string>{"q_proj", "experts.up_proj"}));
  EXPECT_EQ(groups[1].count, 3U);
  EXPECT_EQ(groups[1].bytes, 45);
  EXPECT_EQ(groups[2].scheme, "int8");
  EXPECT_EQ(groups[3].count, 2U);
  EXPECT_EQ(groups[3].bytes, 40);
}

TEST(TensorGroups, AWordThatTwoModulesEndWithIsNotEnough) {
  const OrderedJson tensors =
      OrderedJson::array({tensor("h.0.attn.c_proj.weight", "int4", 1), tensor("h.0.mlp.c_proj.weight", "int4", 1)});
  const auto groups = group_tensors(tensors);
  ASSERT_EQ(groups.size(), 1U);
  EXPECT_EQ(groups[0].names, (std::vector<std::string>{"attn.c_proj", "mlp.c_proj"}));
}

TEST(PlanDiff, EqualPlansDoNotDiffer) {
  EXPECT_TRUE(diff_plans(plan(model("int4"), 1), plan(model("int4"), 1)).empty());
}

TEST(PlanDiff, EachDifferenceHasAPathAndBothValues) {
  const OrderedJson before = plan(model("int4"), 1);
  OrderedJson after = plan(model("bfloat16"), 2);
  after["engine"]["explained"][0] = {{"flag", "--b"}, {"value", true}, {"place", "cli"}};
  after["engine"]["config_file"]["dtype"] = "y";
  after["warnings"].push_back({{"code", "W"}, {"message", "first"}});
  after["warnings"].push_back({{"code", "W"}, {"message", "second"}});
  const OrderedJson expected = OrderedJson::parse(R"([
    {"path": "tensors.mlp.down_proj", "before": "int8 x1, int4 by rtn x2", "after": "int8 x1, bfloat16 x2"},
    {"path": "predicted.bytes", "before": 1, "after": 2},
    {"path": "engine.config_file.dtype", "before": "x", "after": "y"},
    {"path": "engine.args.--a", "before": "1", "after": null},
    {"path": "engine.args.--b", "before": null, "after": true},
    {"path": "warnings.W", "before": null, "after": "first"},
    {"path": "warnings.W 2", "before": null, "after": "second"}])");
  EXPECT_EQ(diff_plans(before, after), expected);
}

TEST(PlanDiff, SeveralPlansAreComparedInTheirOrder) {
  const OrderedJson one = plan(model("int4"), 1), two = plan(model("int4"), 2);
  const OrderedJson diff = diff_plans({{"plans", {one, one}}}, {{"plans", {one, two, one}}});
  const OrderedJson expected = OrderedJson::parse(R"([
    {"path": "plans.1.predicted.bytes", "before": 1, "after": 2},
    {"path": "plans.2", "before": null, "after": "vllm, Preset: default"}])");
  EXPECT_EQ(diff, expected);
}

/// A kept plan is a file that anyone may have written.
TEST(PlanDiff, AnyDocumentIsCompared) {
  const OrderedJson ours = plan(model("int4"), 1);
  for (const char* text :
       {"null", "3", "[]", "{}", R"({"plans": 1})", R"({"plans": [1, null, {}]})",
        R"({"engine": 3, "tensors": {"a": 1}, "warnings": [1, {"code": 2}], "errors": "x"})",
        R"({"engine": {"explained": [null, 1, {"place": "cli"}], "answers": 1}, "tensors": [1, {}]})"}) {
    const OrderedJson theirs = OrderedJson::parse(text);
    EXPECT_FALSE(diff_plans(theirs, ours).empty()) << text;
    EXPECT_FALSE(diff_plans(ours, theirs).empty()) << text;
  }
}

TEST(PlanDiff, AConfigurationIsNoPlan) {
  EXPECT_TRUE(is_plan(plan(model("int4"), 1)));
  EXPECT_TRUE(is_plan({{"plans", OrderedJson::array()}}));
  EXPECT_FALSE(is_plan({{"engine", {{"name", "vllm"}}}, {"quant_config", {{"preset", "default"}}}}));
  EXPECT_FALSE(is_plan(OrderedJson::array()));
}

TEST(Page, ColumnsAreAsWideAsTheirWidestCell) {
  EXPECT_EQ(columns({{"a", "bcd", "e"}, {"fgh", "i", ""}}, 1), " a    bcd  e\n fgh  i\n");
}

TEST(Page, LongTextIsBrokenAtBlanks) {
  const std::string word(50, 'x');
  EXPECT_EQ(wrapped(word + " " + word + " " + word, 4), word + " " + word + "\n    " + word);
  EXPECT_EQ(wrapped(std::string(200, 'y'), 4), std::string(200, 'y'));
  EXPECT_EQ(wrapped("", 4), "");
}

TEST(Page, ColoursAreForTerminals) { EXPECT_EQ(coloured("ok", Colour::green), "ok"); }

TEST(Page, SizesHaveTheirUnit) {
  EXPECT_EQ(size_text(8397648), "8.40 MB");
  EXPECT_EQ(size_text(80.0 * (1 << 30)), "80.00 GiB");
}

}  // namespace
}  // namespace bitwright

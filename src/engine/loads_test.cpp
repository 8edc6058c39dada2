#include "engine/loads.hpp"

#include <gtest/gtest.h>

#include <algorithm>

namespace bitwright {
namespace {

Loads answer_of(const std::vector<Loads>& answers, const std::string& engine) {
  const auto found = std::ranges::find(answers, engine, &Loads::engine);
  return found == answers.end() ? Loads{.engine = "none", .yes = false} : *found;
}

TEST(Loads, EveryEngineAnswers) {
  EXPECT_EQ(engines_that_load("gptq").size(), Facts::standard().all("engines").size());
  for (const Loads& answer : engines_that_load("no-such-method")) {
    EXPECT_FALSE(answer.yes) << answer.engine;
    EXPECT_FALSE(answer.reason.empty()) << answer.engine;
  }
}

TEST(Loads, ByMethodAndByDocuments) {
  EXPECT_TRUE(answer_of(engines_that_load("bitsandbytes"), "transformers").yes);
  EXPECT_FALSE(answer_of(engines_that_load("bitsandbytes"), "mlx").yes);
  EXPECT_TRUE(answer_of(engines_that_load("bitwright"), "native").yes);
  EXPECT_FALSE(answer_of(engines_that_load("bitwright"), "vllm").yes);
  const auto gptq = [](bool sym) {
    const Json config = {
        {"quantization_config",
         {{"quant_method", "gptq"}, {"bits", 4}, {"group_size", 128}, {"sym", sym}, {"desc_act", false}}}};
    return answer_of(engines_that_load(ModelDocuments{{"config.json", config}}), "vllm");
  };
  EXPECT_TRUE(gptq(true).yes);
  EXPECT_FALSE(gptq(false).yes);
  EXPECT_NE(gptq(false).reason.find("symmetric"), std::string::npos);
}

}  // namespace
}  // namespace bitwright

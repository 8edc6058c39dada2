#include "engine/loads.hpp"

#include <gtest/gtest.h>

#include <algorithm>

namespace bitwright {
namespace {

Loads answer_of(const std::vector<Loads>& answers, const std::string& engine) {
  const auto found = std::ranges::find(answers, engine, &Loads::engine);
  return found == answers.end() ? Loads{.engine = "none", .yes = false} : *found;
}

std::vector<Loads> answers_for(const Json& quantization) {
  return engines_that_load(ModelDocuments{{"config.json", {{"quantization_config", quantization}}}});
}

TEST(Loads, EveryEngineAnswers) {
  const std::vector<Loads> answers = answers_for({{"quant_method", "no-such-method"}});
  EXPECT_EQ(answers.size(), Facts::standard().all("engines").size());
  for (const Loads& answer : answers) {
    EXPECT_FALSE(answer.yes) << answer.engine;
    EXPECT_FALSE(answer.reason.empty()) << answer.engine;
  }
}

TEST(Loads, ByWhatTheDocumentsSay) {
  const Json bitsandbytes = {{"quant_method", "bitsandbytes"}, {"load_in_4bit", true}, {"bnb_4bit_quant_type", "nf4"}};
  EXPECT_TRUE(answer_of(answers_for(bitsandbytes), "transformers").yes);
  EXPECT_FALSE(answer_of(answers_for(bitsandbytes), "mlx").yes);
  const auto gptq = [](bool sym) {
    return answer_of(
        answers_for({{"quant_method", "gptq"}, {"bits", 4}, {"group_size", 128}, {"sym", sym}, {"desc_act", false}}),
        "vllm");
  };
  EXPECT_TRUE(gptq(true).yes);
  EXPECT_FALSE(gptq(false).yes);
  EXPECT_NE(gptq(false).reason.find("symmetric"), std::string::npos);
}

}  // namespace
}  // namespace bitwright

#include "engine/describe.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "container/container.hpp"
#include "engine/plan.hpp"

namespace bitwright {
namespace {

TEST(DescribeEngine, TakesWhatAPlanTakes) {
  EXPECT_TRUE(takes_checkpoint("llamacpp", "gguf").taken);
  EXPECT_FALSE(takes_checkpoint("llamacpp", "awq").taken);
  EXPECT_FALSE(takes_checkpoint("vllm", "no-such-method").taken);
  const Takes fp8 = takes_checkpoint("lmdeploy", "fp8");
  EXPECT_TRUE(fp8.taken);
  EXPECT_EQ(fp8.min_sm, 89);
  EXPECT_EQ(capability_text(fp8.min_sm), "8.9");
  for (const int sm : {80, 89}) {
    PlanRequest request{.engine = "lmdeploy", .checkpoint = "fp8"};
    request.hardware = {{"vendor", "nvidia"}, {"sm", sm}};
    EXPECT_EQ(plan_engine(request).outcome == "error", sm < fp8.min_sm) << sm;
  }
}

/// Everything of the facts that `engines NAME` promises is there, for every engine.
TEST(DescribeEngine, HoldsAllFlagsOfEveryEngine) {
  for (const Json* engine : Facts::standard().all("engines")) {
    const OrderedJson described = describe_engine((*engine)["name"].get<std::string>());
    SCOPED_TRACE(described["name"].get<std::string>());
    ASSERT_EQ(described["flags"].size(), (*engine)["flags"].size());
    for (size_t i = 0; i < described["flags"].size(); ++i) {
      EXPECT_EQ(described["flags"][i]["flag"], OrderedJson((*engine)["flags"][i]["flag"]));
      EXPECT_FALSE(described["flags"][i]["file"].get<std::string>().empty());
    }
    EXPECT_EQ(described["methods"].size(), (*engine)["methods"].size());
    EXPECT_EQ(described["conflicts"].size(), (*engine)["checks"].size());
    EXPECT_FALSE(described["checkpoints"].empty());
  }
}

/// The native engine is this program: its facts name what it reads, no more and no less. FBGEMM's files are fp8's.
TEST(DescribeEngine, TheNativeEngineLoadsWhatContainersAreThere) {
  std::set<std::string> containers = {"fbgemm_fp8"}, facts;
  for (const Container* container : all_containers()) containers.insert(std::string(method_of(*container)));
  const OrderedJson native = describe_engine("native");
  for (const OrderedJson& checkpoint : native["checkpoints"]) facts.insert(checkpoint["format"].get<std::string>());
  EXPECT_EQ(facts, containers) << "data/engines/native.json";
}

}  // namespace
}  // namespace bitwright

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/error.hpp"
#include "model/model.hpp"

namespace bitwright {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();

std::vector<int> draw(const Sampling& settings, const std::vector<float>& logits, int count) {
  Sampler sampler(settings);
  std::vector<int> counts(logits.size());
  for (int i = 0; i < count; ++i) ++counts[static_cast<size_t>(sampler.next(logits))];
  return counts;
}

TEST(ModelSampler, GreedyTakesTheLowestOfEquals) {
  Sampler sampler({});
  EXPECT_EQ(sampler.next(std::vector<float>{1, 3, 3, 2}), 1);
  EXPECT_EQ(sampler.next(std::vector<float>{kNan, -kInfinity, -5}), 2);
  EXPECT_EQ(sampler.next(std::vector<float>{kNan, kNan}), 0);
}

TEST(ModelSampler, FollowsTheProbabilities) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.2f), std::log(0.3f)};
  const std::vector<int> counts = draw({.temperature = 1, .seed = 3}, logits, 20000);
  EXPECT_NEAR(counts[0], 10000, 300);
  EXPECT_NEAR(counts[1], 4000, 300);
  EXPECT_NEAR(counts[2], 6000, 300);
  EXPECT_EQ(draw({.temperature = 1, .top_k = 2, .seed = 3}, logits, 1000)[1], 0);
  EXPECT_EQ(draw({.temperature = 1, .top_p = 0.75f, .seed = 3}, logits, 1000)[1], 0);
  EXPECT_EQ(draw({.temperature = 1, .top_p = 0.1f, .seed = 3}, logits, 1000)[0], 1000);
  EXPECT_GT(draw({.temperature = 0.1f, .seed = 3}, logits, 1000)[0], 980);
}

/// The same on every machine.
TEST(ModelSampler, KnownSequence) {
  Sampler sampler({.temperature = 1, .seed = 42});
  std::vector<int32_t> ids;
  for (int i = 0; i < 12; ++i) ids.push_back(sampler.next(std::vector<float>(10, 0.0f)));
  // The leading digits of splitmix64's first numbers / 2^64 from seed 42.
  EXPECT_EQ(ids, (std::vector<int32_t>{7, 1, 2, 3, 0, 8, 2, 8, 3, 6, 2, 4}));
}

TEST(ModelSampler, RefusesBadSettings) {
  for (const Sampling& settings :
       {Sampling{.temperature = -1}, Sampling{.temperature = kNan}, Sampling{.temperature = kInfinity},
        Sampling{.top_k = -1}, Sampling{.top_p = 0}, Sampling{.top_p = 1.5f}, Sampling{.top_p = kNan}}) {
    try {
      const Sampler sampler(settings);
      ADD_FAILURE() << "accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), "bad-sampling");
      EXPECT_EQ(e.status(), ExitStatus::usage);
    }
  }
}

}  // namespace
}  // namespace bitwright

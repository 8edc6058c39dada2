#include "model/end_tokens.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using Ids = std::vector<int32_t>;

TEST(ModelEndTokens, NumberListOrNone) {
  const test::TemporaryDirectory dir;
  EXPECT_EQ(end_tokens(Json::object(), dir.path()), Ids());
  EXPECT_EQ(end_tokens({{"eos_token_id", nullptr}}, dir.path()), Ids());
  EXPECT_EQ(end_tokens({{"eos_token_id", 2}}, dir.path()), Ids({2}));
  EXPECT_EQ(end_tokens({{"eos_token_id", {1, 106}}}, dir.path()), Ids({1, 106}));
  for (const Json& bad : Json{-1, "2", 2.5, {1, "x"}, 1e12, Json::object()})
    EXPECT_THROW(end_tokens({{"eos_token_id", bad}}, dir.path()), Error) << bad;
}

TEST(ModelEndTokens, GenerationConfigWins) {
  const test::TemporaryDirectory dir;
  const Json config = {{"eos_token_id", 2}};
  test::write_file(dir / "generation_config.json", R"({"max_length": 20})");
  EXPECT_EQ(end_tokens(config, dir.path()), Ids({2}));
  test::write_file(dir / "generation_config.json", R"({"eos_token_id": [128001, 128009]})");
  EXPECT_EQ(end_tokens(config, dir.path()), Ids({128001, 128009}));
  EXPECT_EQ(end_tokens(config, ""), Ids({2}));
  test::write_file(dir / "generation_config.json", "{");
  EXPECT_THROW(end_tokens(config, dir.path()), Error);
}

}  // namespace
}  // namespace bitwright

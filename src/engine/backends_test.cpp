#include "engine/backends.hpp"

#include <gtest/gtest.h>

#include "base/error.hpp"
#include "container/container.hpp"

namespace bitwright {
namespace {

std::string recommended(std::string_view backend, double billions, double gigabytes) {
  const OrderedJson config = get_recommended_config(backend, billions, gigabytes);
  return config["method"].get<std::string>() + " " + std::to_string(config["bits"].get<int>());
}

TEST(Backends, MatrixIsTheSpecifications) {
  // CUDA: all but MLX; MPS: HQQ, MLX, Quanto; MLX: HQQ, MLX; CPU: HQQ, Quanto
  for (const AdapterMethod& method : adapter_methods()) {
    const bool none = method.name == "none", hqq = method.name == "hqq", mlx = method.library == "mlx";
    const bool quanto = method.library == "optimum-quanto", bnb = method.library == "bitsandbytes";
    EXPECT_EQ(backend_runs("cuda", method.name), none || hqq || quanto || bnb) << method.name;
    EXPECT_EQ(backend_runs("mps", method.name), none || hqq || quanto || mlx) << method.name;
    EXPECT_EQ(backend_runs("mlx", method.name), none || hqq || mlx) << method.name;
    EXPECT_EQ(backend_runs("cpu", method.name), none || hqq || quanto) << method.name;
  }
}

TEST(Backends, RecommendationsFollowTheSimpleRule) {
  EXPECT_EQ(recommended("mps", 7, 16), "mlx_int4 4");  // the documented example
  EXPECT_EQ(recommended("cuda", 7, 16.8), "none 16");
  EXPECT_EQ(recommended("cuda", 7, 16.7), "bnb_int8 8");
  EXPECT_EQ(recommended("cuda", 7, 10.5), "bnb_int8 8");
  EXPECT_EQ(recommended("cuda", 7, 10.4), "bnb_nf4 4");
  EXPECT_EQ(recommended("cpu", 7, 13), "hqq 8");
  EXPECT_EQ(recommended("cpu", 7, 8), "hqq 8");
  EXPECT_EQ(recommended("cpu", 7, 6), "hqq 4");
  EXPECT_EQ(recommended("mlx", 70, 512), "none 16");
}

TEST(Backends, ConfigurationsAreJudged) {
  const auto codes = [](const OrderedJson& config, std::string_view backend) {
    std::string all;
    for (const Diagnostic& d : validate_quantization_config(config, backend)) all += d.code + " ";
    return all;
  };
  EXPECT_EQ(codes({{"method", "bnb_nf4"}}, "cuda"), "");
  EXPECT_EQ(codes({{"method", "bnb_nf4"}}, "cpu"), "BACKEND_UNSUPPORTED ");
  EXPECT_EQ(codes({{"method", "mlx_int4"}, {"compute_dtype", "bfloat16"}}, "mps"), "DTYPE_CONFLICT ");
  EXPECT_EQ(codes({{"method", "quanto_int4"}, {"compute_dtype", "float16"}}, "mps"), "NOT_OPTIMIZED ");
  EXPECT_EQ(codes({{"method", "mlx_int4"}, {"group_size", 48}}, "mlx"), "INVALID_VALUE ");
  EXPECT_EQ(codes({{"method", "bnb_int8"}, {"bits", 4}}, "cuda"), "INVALID_VALUE ");
  EXPECT_EQ(codes({{"method", "hqq"}, {"bits", 5}}, "cuda"), "INVALID_VALUE ");
  EXPECT_EQ(codes({{"method", "hqq"}, {"compute_dtype", "float16"}, {"bits", 4}}, "mps"), "NOT_OPTIMIZED ");
  EXPECT_EQ(codes({{"method", "quanto_int8"}, {"compute_dtype", "float16"}}, "mps"), "");
  const OrderedJson whole = {{"method", "bnb_nf4"},
                             {"bits", 4},
                             {"group_size", 64},
                             {"compute_dtype", "bfloat16"},
                             {"storage_dtype", "uint8"},
                             {"double_quant", true},
                             {"quant_type", "nf4"},
                             {"skip_modules", {"lm_head"}},
                             {"layer_configs", {{"x", {{"bits", 8}}}}},
                             {"backend_options", OrderedJson::object()}};
  EXPECT_EQ(codes(whole, "cuda"), "");
  for (const auto& [name, value] : whole.items()) {
    if (name == "method") continue;
    OrderedJson wrong = whole;
    wrong[name] = OrderedJson::array({1.5});
    EXPECT_EQ(codes(wrong, "cuda"), "INVALID_VALUE ") << name;
  }
  EXPECT_EQ(codes({{"method", "hqq"}, {"bits", "4"}, {"group_size", -1}}, "cuda"), "INVALID_VALUE INVALID_VALUE ");
  const auto unknown = validate_quantization_config({{"metod", "hqq"}}, "cuda");
  ASSERT_EQ(unknown.size(), 1U);
  EXPECT_EQ(unknown[0].code, "UNKNOWN_KEY");
  EXPECT_EQ(unknown[0].instead[0], "did you mean 'method'?");
  const auto unsupported = validate_quantization_config({{"method", "bnb_nf4"}}, "cpu");
  ASSERT_EQ(unsupported.size(), 1U);  // what to fall back to is one that the backend runs
  EXPECT_TRUE(backend_runs("cpu", unsupported[0].instead[0]));
  EXPECT_THROW(validate_quantization_config({{"method", "bnb_int9"}}, "cuda"), Error);
  EXPECT_THROW(validate_quantization_config({{"method", "hqq"}}, "tpu"), Error);
}

TEST(Backends, BytesCountTheScales) {
  EXPECT_EQ(adapter_bytes("none", 1e9), 2e9);
  EXPECT_EQ(adapter_bytes("bnb_int8", 1e9), 1e9);
  EXPECT_NEAR(adapter_bytes("bnb_nf4", 1e9), 0.5159e9, 1e6);              // 4.127 bits
  EXPECT_NEAR(adapter_bytes("bnb_nf4", 1e9, 4, 64, false), 0.5625e9, 1);  // 4.5 bits
  EXPECT_NEAR(adapter_bytes("mlx_int4", 1e9), 0.5625e9, 1);               // 4.5 bits
}

TEST(Backends, StatusSaysWhyNot) {
  const OrderedJson status = report_import_status();
  ASSERT_EQ(status.size(), adapter_methods().size());
  EXPECT_EQ(status[0]["method"], "bnb_nf4");
  EXPECT_EQ(status[0]["backends"]["cuda"]["usable"], true);
  for (size_t i = 0; i < status.size(); ++i) {
    const AdapterMethod method = adapter_methods()[i];
    const bool reads = method.name == "none" || find_container(method.container) != nullptr;
    EXPECT_EQ(status[i]["usable"], reads) << method.name;
    EXPECT_EQ(status[i]["why"] == "", reads) << method.name;
    EXPECT_LE(status[i]["writes"].get<bool>(), reads) << method.name;
  }
  EXPECT_EQ(status[0]["backends"]["mlx"]["why"], "bitsandbytes has no mlx back end");
}

}  // namespace
}  // namespace bitwright

#include "engine/facts.hpp"

#include <gtest/gtest.h>

#include "base/error.hpp"
#include "engine/condition.hpp"
#include "engine/matrix.hpp"
#include "engine/precision.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

TEST(Facts, EveryFileHasTheFormItsKindNeeds) {
  size_t documents = 0;
  for (const EmbeddedFile& file : embedded_files()) {
    SCOPED_TRACE(file.name);
    const Json parsed = parse_json(file.text, std::string(file.name));
    for (const Json& document : parsed.is_array() ? parsed : Json::array({parsed})) {
      const auto problems = check_facts(file.name.substr(0, file.name.find('/')), document);
      EXPECT_TRUE(problems.empty()) << problems.front();
      ++documents;
    }
  }
  EXPECT_GT(documents, 8U);
}

TEST(Facts, EmbeddedFilesAreTheFolder) {
  for (const EmbeddedFile& file : embedded_files())
    EXPECT_EQ(file.text, test::read_file(std::filesystem::path("data") / file.name)) << file.name;
}

TEST(Facts, EnginesAndHardwareNameTheirSource) {
  for (const char* kind : {"engines", "hardware"})
    for (const Json* document : Facts::standard().all(kind)) EXPECT_TRUE(document->contains("source")) << *document;
}

TEST(Facts, NamesAndAliasesAreUnique) {
  for (const char* kind : {"engines", "hardware", "presets"}) {
    std::map<std::string, std::string> seen;
    for (const Json* document : Facts::standard().all(kind)) {
      const std::string name = (*document)["name"];
      std::set<std::string> own = {plain_name(name)};
      if (document->contains("aliases"))
        for (const Json& alias : (*document)["aliases"]) own.insert(plain_name(alias.get<std::string>()));
      for (const std::string& one : own)
        EXPECT_TRUE(seen.emplace(one, name).second) << one << ": " << name << ", " << seen[one];
    }
  }
}

TEST(Facts, NamesAreFoundHoweverTheyAreWritten) {
  for (const char* name : {"tensorrt_llm", "tensorrt-llm", "TRTLLM", "TensorRT-LLM"})
    EXPECT_EQ(Facts::standard().get("engines", name)["name"], "tensorrt_llm") << name;
  try {
    Facts::standard().get("engines", "vlm");
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), "unknown-engine");
    EXPECT_NE(std::string(e.what()).find("did you mean 'vllm'?"), std::string::npos) << e.what();
  }
}

TEST(Facts, AUsersDirectoryAddsAndReplaces) {
  const test::TemporaryDirectory directory;
  std::filesystem::create_directories(directory / "hardware");
  std::filesystem::create_directories(directory / "engines");
  test::write_file(directory / "hardware/mine.json",
                   R"({"name": "mine", "vendor": "cpu", "kind": "cpu", "dtypes": ["float32"], "source": "me"})");
  const Json native = Facts::standard().get("engines", "native");
  Json changed = native;
  changed["summary"] = "changed";
  test::write_file(directory / "engines/native.json", changed.dump());
  const Facts facts(directory.path());
  EXPECT_EQ(facts.get("hardware", "mine")["source"], "me");
  EXPECT_EQ(facts.get("engines", "native")["summary"], "changed");
  EXPECT_EQ(facts.all("engines").size(), Facts::standard().all("engines").size());
}

TEST(Facts, AnEngineAndADeviceAreAFileEach) {
  const test::TemporaryDirectory directory;
  for (const char* kind : {"engines", "hardware", "presets"}) std::filesystem::create_directories(directory / kind);
  test::write_file(directory / "hardware/zz.json", R"([
    {"name": "x1", "vendor": "nvidia", "kind": "gpu", "sm": 75, "memory_gib": 10, "bandwidth_gbps": 500,
     "dtypes": ["float16"], "source": "its data sheet"},
    {"name": "H100", "vendor": "nvidia", "kind": "gpu", "sm": 90, "memory_gib": 1, "bandwidth_gbps": 1,
     "dtypes": ["float16"], "source": "ours has less"}])");
  test::write_file(directory / "presets/small.json", R"({"name": "small", "kvcache_dtype": "int8"})");
  test::write_file(directory / "engines/my_engine.json", R"({
    "name": "mine", "aliases": ["my-engine"], "summary": "an engine of our own", "source": {"repo": "here"},
    "version": "1.0", "entries": {"serve": "mine serve {model}"}, "entry": "serve", "method_flag": "--weights",
    "flags": [{"flag": "--kv", "values": ["f16", "i8"], "file": "kv.cpp"},
              {"flag": "--weights", "values": ["w8"], "file": "weights.cpp"}],
    "methods": {"w8": {"mode": ["online"], "min_sm": 80, "file": "weights.cpp"}},
    "checkpoints": [], "checks": [],
    "map": {"kvcache_dtype": {"int8": [{"args": {"--kv": "i8"}, "file": "kv.cpp"}]},
            "gemm_dtype": {"int8": [{"args": {"--weights": "w8"}, "file": "weights.cpp"}]}}})");
  const Facts facts(directory.path());
  const auto plan = [&](const char* device, const OrderedJson& quant_config, const OrderedJson& parameters = {}) {
    return get_runtime_args("My_Engine", quant_config, parameters, {}, {.hardware = facts.get("hardware", device)},
                            facts);
  };
  EXPECT_EQ(engine_command(plan("x1", {{"preset", "small"}}), "M", facts), "mine serve M --kv i8");
  EXPECT_EQ(plan("x1", {{"preset", "small"}}).outcome, "ok");
  EXPECT_EQ(plan("x1", {{"gemm_dtype", "int8"}}).outcome, "error");  // its GPU is older than the method
  EXPECT_EQ(plan("h100", {{"gemm_dtype", "int8"}}).outcome, "ok");
  EXPECT_EQ(plan("x1", {}, {{"kv", "i4"}}).diagnostics.at(0).code, "INVALID_VALUE");
  EXPECT_EQ(facts.get("hardware", "h100")["memory_gib"], 1);  // ours, although "zz" comes last
  EXPECT_EQ(facts.all("hardware").size(), Facts::standard().all("hardware").size() + 1);
  EXPECT_NE(precision_matrix("x1", facts).find(" mine |"), std::string::npos);
}

TEST(Facts, ABadFileSaysWhatIsWrongWithIt) {
  const test::TemporaryDirectory directory;
  std::filesystem::create_directories(directory / "hardware");
  test::write_file(directory / "hardware/bad.json",
                   R"({"name": "bad", "vendor": "nvidia", "kind": "gpu", "memry": 4})");
  try {
    const Facts facts(directory.path());
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), "bad-facts");
    for (const char* part : {"hardware/bad.json", "'memry'", "'dtypes' is missing", "'source' is missing"})
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << part << ": " << e.what();
  }
}

TEST(Conditions, SayWhatTheyMean) {
  const Json facts = Json::parse(R"({"sm": 89, "model": {"moe": true, "head_dim": 80}, "version": "1.3.0rc27",
      "user": {"attention-config": {"backend": "X"}, "a.b": 8}, "kinds": ["fp8", "int8"], "kv": "fp8_e5m2"})");
  struct Case {
    const char* condition;
    bool holds;
  };
  for (const auto& [condition, expected] : std::initializer_list<Case>{
           {R"({})", true},
           {R"({"sm": {">=": 89}})", true},
           {R"({"sm": {">": 89}})", false},
           {R"({"sm": {">=": 80, "<": 89}})", false},
           {R"({"gone": {">=": 0}})", false},
           {R"({"gone": {"<": 0}})", false},
           {R"({"gone": null})", true},
           {R"({"sm": null})", false},
           {R"({"gone": {"not": true}})", true},
           {R"({"model.moe": true})", true},
           {R"({"model.moe": {"not": true}})", false},
           {R"({"user.attention-config.backend": "X"})", true},
           {R"({"user.a.b": "8"})", true},
           {R"({"kinds": "int8"})", true},
           {R"({"kinds": ["int4", "fp8"]})", true},
           {R"({"kinds": {"not": ["int4", "fp8"]}})", false},
           {R"({"kv": {"starts": "fp8"}})", true},
           {R"({"kv": {"has": "e4m3"}})", false},
           {R"({"model.head_dim": {"multiple_of": 32}})", false},
           {R"({"model.head_dim": {"multiple_of": 16}})", true},
           {R"({"version": {">=": "1.3.0rc7", "<": "1.3.0"}})", true},
           {R"({"any": [{"sm": 75}, {"model.moe": true}]})", true},
           {R"({"all": [{"sm": 89}, {"sm": 90}]})", false},
           {R"({"not": {"sm": 90}, "sm": 89})", true},
           {R"({"sm": "$model.head_dim"})", false},
       })
    EXPECT_EQ(holds(Json::parse(condition), facts), expected) << condition;
}

TEST(Conditions, VersionsAreOrdered) {
  const char* const ascending[] = {"0.9",        "0.27.0", "0.28.0.dev1", "0.28.0rc2",
                                   "0.28.0rc10", "0.28.0", "0.28.1",      "1.0"};
  for (size_t i = 0; i + 1 < std::size(ascending); ++i) {
    EXPECT_LT(compare_versions(ascending[i], ascending[i + 1]), 0) << ascending[i];
    EXPECT_GT(compare_versions(ascending[i + 1], ascending[i]), 0) << ascending[i];
  }
  EXPECT_EQ(compare_versions("b10573", "b10573"), 0);
  EXPECT_LT(compare_versions("b9000", "b10573"), 0);
  EXPECT_LT(compare_versions("3.3.6-dev0", "3.3.6"), 0);
}

TEST(Conditions, TemplatesTakeTheirValuesFromTheFacts) {
  const Json facts = {{"sm", 89}, {"model", {{"arch", "X"}}}};
  EXPECT_EQ(fill(Json::parse(R"({"a": ["$model.arch", 1], "b": "$gone"})"), facts),
            Json::parse(R"({"a": ["X", 1], "b": null})"));
  EXPECT_EQ(fill_text("sm {sm} of {model.arch}, {gone} {", facts), "sm 89 of X, unknown {");
}

}  // namespace
}  // namespace bitwright

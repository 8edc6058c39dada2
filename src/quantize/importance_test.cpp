#include "quantize/importance.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>
#include <random>

#include "container/gguf_rounding.hpp"
#include "kernels/decode.hpp"
#include "model/gguf_export.hpp"
#include "quantize/quantize.hpp"
#include "recipe/config.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using test::TemporaryDirectory;
namespace fs = std::filesystem;

OrderedJson quantize_to(const fs::path& model, const fs::path& out, const std::string& settings, const fs::path& stats,
                        std::vector<Warning>& warnings, const char* format = "gguf") {
  return quantize(Checkpoint(model), read_request(parse_config_value("quantization: {" + settings + "}", "test")),
                  {.output = {.output = out, .existing = Existing::replace},
                   .verify = false,
                   .container = find_container(format),
                   .stats = stats},
                  warnings);
}

/// Numbers of no meaning for every matrix of the layers.
Imatrix random_importance(const Checkpoint& arranged) {
  std::mt19937 random(11);
  std::uniform_real_distribution<float> uniform(0.01f, 10);
  Imatrix out = {.datasets = {"text"}, .chunks = 1, .chunk_size = 7};
  for (const TensorEntry& tensor : arranged.tensors()) {
    if (tensor.shape.size() < 2 || !tensor.name.starts_with("blk.")) continue;
    const int64_t matrices = tensor.shape.size() == 3 ? tensor.shape[0] : 1;
    InputSquares& entry = out.entries[tensor.name];
    entry.counts.assign(static_cast<size_t>(matrices), 7);
    if (matrices > 1) entry.counts[1] = 0;
    entry.sums.resize(static_cast<size_t>(matrices * tensor.shape.back()));
    for (float& v : entry.sums) v = uniform(random);
  }
  return out;
}

/// A tensor of the written file is what ggml's rounding makes of each matrix with that matrix's importance.
void check_tensor(const TensorEntry& tensor, const Checkpoint& written, const Checkpoint& arranged,
                  const Imatrix& imatrix) {
  const auto found = imatrix.entries.find(tensor.name);
  const std::vector<float> values = arranged.read_f32(*arranged.find(tensor.name)), now = written.read_f32(tensor);
  const int64_t rows = tensor.shape[tensor.shape.size() - 2], columns = tensor.shape.back();
  const auto size = static_cast<size_t>(rows * columns);
  for (size_t at = 0; at < values.size(); at += size) {
    const std::span matrix = std::span(values).subspan(at, size);
    std::vector<float> importance;
    if (found != imatrix.entries.end())
      importance = mean_squares(found->second, at / static_cast<size_t>(rows), static_cast<size_t>(columns));
    const QuantizedTensor expected =
        round_to_gguf(tensor.scheme, {rows, columns}, {DType::f32, std::as_bytes(matrix)}, importance);
    const std::span got = std::span(now).subspan(at, size);
    EXPECT_TRUE(std::ranges::equal(got, decode(expected))) << tensor.name << " matrix " << at / size;
  }
}

TEST(ModelReference, EachMatrixIsRoundedByItsOwnImportance) {
  if (!fs::is_directory(BITWRIGHT_REFERENCES)) GTEST_SKIP() << "tools/reference has written no cases (ctest runs it)";
  size_t stacks = 0, cases = 0;
  for (const auto& directory : fs::directory_iterator(BITWRIGHT_REFERENCES)) {
    SCOPED_TRACE(directory.path().filename());
    const fs::path path = directory.path() / "model";
    const Checkpoint model(path);
    const TemporaryDirectory dir;
    std::optional<Checkpoint> arranged;
    std::vector<Warning> warnings;
    try {
      arranged.emplace(open_as_gguf(model, gguf_model(model)));
      write_imatrix(random_importance(*arranged), dir / "stats", ImatrixForm::gguf);
      quantize_to(path, dir / "out", "method: q5_1", dir / "stats", warnings);
    } catch (const Error& error) {
      EXPECT_TRUE(error.code() == "no-gguf" || error.code() == "already-quantized") << error.what();
      continue;  // llama.cpp has no such model
    }
    const Checkpoint written(dir / "out");
    const Imatrix imatrix = read_imatrix(dir / "stats");
    for (const TensorEntry& tensor : written.tensors()) {
      if (!tensor.quantized() || tensor.scheme.offset_kind != OffsetKind::bias) continue;
      stacks += tensor.shape.size() == 3 ? 1 : 0;
      check_tensor(tensor, written, *arranged, imatrix);
      ++cases;
    }
  }
  EXPECT_GT(stacks, 0u);
  std::cout << "cases: " << cases << ", stacks: " << stacks << '\n';
}

class StatsOfExample : public ::testing::Test {
 protected:
  StatsOfExample() : imatrix(read_imatrix("tests/golden/imatrix/tinystories-4m.gguf")) {}
  OrderedJson run(const std::string& settings, const char* format = "gguf") {
    write_imatrix(imatrix, dir / "stats.gguf", ImatrixForm::gguf);
    return quantize_to(test::example_model(), dir / "out", settings, dir / "stats.gguf", warnings, format);
  }
  /// The code and the text of the error.
  std::pair<std::string, std::string> failure(const std::string& settings, const char* format = "gguf") {
    try {
      run(settings, format);
    } catch (const Error& error) {
      return {error.code(), error.what()};
    }
    return {"none", ""};
  }
  const TemporaryDirectory dir;
  Imatrix imatrix;
  std::vector<Warning> warnings;
};

TEST_F(StatsOfExample, AreNamedInTheFile) {
  EXPECT_EQ(run("method: q4_k_m")["algorithm"], "imatrix");
  EXPECT_TRUE(warnings.empty());
  const Checkpoint written(dir / "out");
  const Json& facts = *written.facts();
  EXPECT_EQ(facts["quantize.imatrix.file"], (dir / "stats.gguf").string());
  EXPECT_EQ(facts["quantize.imatrix.dataset"], imatrix.datasets.front());
  EXPECT_EQ(facts["quantize.imatrix.entries_count"], 28);
  EXPECT_EQ(facts["quantize.imatrix.chunks_count"], 20);
}

TEST_F(StatsOfExample, ThatLackATensorWarn) {
  imatrix.entries.erase("blk.1.ffn_up.weight");
  run("method: q4_0");
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_EQ(warnings[0].code, "NO_IMPORTANCE");
  EXPECT_NE(warnings[0].message.find("blk.1.ffn_up.weight"), std::string::npos) << warnings[0].message;
}

TEST_F(StatsOfExample, OfAnotherModelAreRefused) {
  imatrix.entries["blk.1.ffn_up.weight"].sums.push_back(1);
  auto [code, message] = failure("method: q4_0");
  EXPECT_EQ(code, "bad-imatrix");
  EXPECT_NE(message.find("tensor 'blk.1.ffn_up.weight' has 256 columns"), std::string::npos) << message;
  imatrix.entries.clear();
  imatrix.entries["blk.99.ffn_up.weight"] = {.sums = {1}, .counts = {1}};
  EXPECT_EQ(failure("method: q4_0").first, "bad-imatrix");
}

TEST_F(StatsOfExample, WithoutUseWarn) {
  EXPECT_EQ(run("method: q4_0, algorithm: rtn")["algorithm"], "rtn");
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_EQ(warnings[0].code, "STATS_UNUSED");
  warnings.clear();
  run("method: int4", "mlx");
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_EQ(warnings[0].code, "STATS_UNUSED");
  EXPECT_EQ(failure("method: int4, algorithm: imatrix", "mlx").first, "bad-value");
}

}  // namespace
}  // namespace bitwright

#include "evaluate/calibrate.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "base/threads.hpp"
#include "model/open_model.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

fs::path golden(const char* end) { return fs::path("tests/golden/imatrix") / (std::string("tinystories-4m") + end); }

Calibration of_example(const Checkpoint& checkpoint) {
  const Model model(checkpoint);
  const Tokenizer tokenizer(test::example_model());
  const Protocol protocol = {.context = 256, .stride = 256, .bos = Protocol::Bos::window, .max_windows = 20};
  const MappedFile text(test::example_model() / "tinystories_valid.txt");
  return calibrate(model, token_stream(tokenizer, text.text(), protocol), protocol, tokenizer.bos_id());
}

// llama-imatrix's own file of this model and text: the same names, in the same order, and its sums.
TEST(Calibrate, SumsAreLlamaCpps) {
  const Checkpoint checkpoint = open_model(test::example_model());
  const Calibration calibration = of_example(checkpoint);
  EXPECT_EQ(calibration.tokens, 20 * 256);
  const Imatrix ours = importance_of(calibration, gguf_matrices(checkpoint)), theirs = read_imatrix(golden(".gguf"));
  ASSERT_EQ(ours.entries.size(), theirs.entries.size());
  double worst = 0;
  for (const auto& [name, entry] : theirs.entries) {
    const auto found = ours.entries.find(name);
    ASSERT_NE(found, ours.entries.end()) << name;
    EXPECT_EQ(found->second.counts, entry.counts);
    ASSERT_EQ(found->second.sums.size(), entry.sums.size());
    for (size_t i = 0; i < entry.sums.size(); ++i)
      worst = std::max(worst,
                       std::abs(static_cast<double>(found->second.sums[i]) / static_cast<double>(entry.sums[i]) - 1));
  }
  EXPECT_LT(worst, 1e-4);  // it sums in f32
  std::cout << "largest relative difference: " << worst << '\n';
}

TEST(Calibrate, LlamaCppsFilesAreWrittenAgainByteForByte) {
  const test::TemporaryDirectory dir;
  for (const auto& [end, form] : {std::pair(".gguf", ImatrixForm::gguf), std::pair(".dat", ImatrixForm::dat)}) {
    write_imatrix(read_imatrix(golden(end)), dir / "file", form);
    EXPECT_EQ(test::read_file(dir / "file"), test::read_file(golden(end))) << end;
  }
}

TEST(Calibrate, BothFormsOfLlamaCppsFileSayTheSame) {
  const Imatrix now = read_imatrix(golden(".gguf")), before = read_imatrix(golden(".dat"));
  ASSERT_EQ(now.entries.size(), before.entries.size());
  for (const auto& [name, entry] : now.entries) {
    const std::vector<float> a = mean_squares(entry, 0, entry.sums.size()),
                             b = mean_squares(before.entries.find(name)->second, 0, entry.sums.size());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 1e-6f * a[i]) << name;
  }
}

TEST(Calibrate, ThreadsDoNotMatter) {
  const Checkpoint checkpoint = open_model(test::example_model());
  set_thread_count(1);
  const Calibration one = of_example(checkpoint);
  set_thread_count(3);
  const Calibration three = of_example(checkpoint);
  set_thread_count(0);
  ASSERT_EQ(one.inputs.size(), three.inputs.size());
  for (const auto& [matrix, squares] : one.inputs) EXPECT_EQ(squares.sums, three.inputs.at(matrix).sums);
}

// Every matrix of the layers of every architecture has an entry of llama.cpp's name and of its length; each token is
// counted once, or once for each expert that it is sent to.
TEST(ModelReference, CalibrationKnowsEveryMatrix) {
  if (!fs::is_directory(BITWRIGHT_REFERENCES)) GTEST_SKIP() << "tools/reference has written no cases (ctest runs it)";
  size_t cases = 0, stacks = 0;
  for (const auto& directory : fs::directory_iterator(BITWRIGHT_REFERENCES)) {
    SCOPED_TRACE(directory.path().filename());
    const Checkpoint checkpoint(directory.path() / "model");
    std::multimap<MatrixName, GgufMatrix> names;
    try {
      names = gguf_matrices(checkpoint);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), "no-gguf") << error.what();
      continue;
    }
    const Model model(checkpoint);
    std::vector<int32_t> tokens;
    for (int32_t i = 0; i < 49; ++i) tokens.push_back(i * 7 % static_cast<int32_t>(model.config().vocabulary));
    const Protocol protocol = {.context = 12, .stride = 12};
    const Imatrix imatrix = importance_of(calibrate(model, tokens, protocol, std::nullopt), names);
    std::set<std::string> expected;
    for (const auto& [matrix, place] : names)
      if (place.tensor.starts_with("blk.")) expected.insert(place.tensor);
    std::set<std::string> found;
    for (const auto& [name, entry] : imatrix.entries) {
      found.insert(name);
      int64_t count = 0;
      for (const int64_t n : entry.counts) count += n;
      const bool stack = name.find("_exps.") != std::string::npos;
      stacks += stack ? 1 : 0;
      EXPECT_EQ(count, 48 * (stack ? model.config().experts_used : 1)) << name;
      EXPECT_EQ(entry.counts.size(), stack ? static_cast<size_t>(model.config().experts) : 1) << name;
    }
    EXPECT_EQ(found, expected);
    ++cases;
  }
  EXPECT_GE(cases, 10u);
  EXPECT_GT(stacks, 0u);
  std::cout << "cases: " << cases << ", stacks: " << stacks << '\n';
}

}  // namespace
}  // namespace bitwright

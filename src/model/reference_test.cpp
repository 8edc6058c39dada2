// Against the logits of a second implementation: tools/reference writes the cases when the tests run.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"
#include "base/output.hpp"
#include "base/threads.hpp"
#include "checkpoint/safetensors.hpp"
#include "kernels/kernel_level.hpp"
#include "model/model.hpp"
#include "tests/checkpoints.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

struct ReferenceCase {
  fs::path path;
  std::vector<int32_t> tokens;
  std::vector<float> logits;
};

template <class T>
std::vector<T> array_of(const WeightFile& file, const std::string& name) {
  for (const StoredArray& array : file.arrays())
    if (array.name == name) {
      std::vector<T> values(array.data.size() / sizeof(T));
      std::memcpy(values.data(), array.data.data(), array.data.size());
      return values;
    }
  throw std::runtime_error("no array " + name);
}

/// The cases whose names begin with `prefix`.
std::vector<ReferenceCase> reference_cases(const std::string& prefix = "") {
  std::vector<ReferenceCase> cases;
  if (!fs::is_directory(BITWRIGHT_REFERENCES)) return cases;
  for (const auto& entry : fs::directory_iterator(BITWRIGHT_REFERENCES)) {
    if (!entry.path().filename().string().starts_with(prefix)) continue;
    const WeightFile expected(entry.path() / "expected.safetensors");
    cases.push_back({entry.path(), array_of<int32_t>(expected, "tokens"), array_of<float>(expected, "logits")});
  }
  std::ranges::sort(cases, {}, &ReferenceCase::path);
  return cases;
}

/// check(case) for each, or skips.
template <class Check>
void for_each_case(const std::string& prefix, Check check) {
  const std::vector<ReferenceCase> cases = reference_cases(prefix);
  if (cases.empty()) GTEST_SKIP() << "tools/reference has written no cases (ctest runs it)";
  for (const ReferenceCase& c : cases) {
    SCOPED_TRACE(c.path.filename().string());
    check(c);
  }
  std::cout << "cases: " << cases.size() << '\n';
}

/// The logits of every token, `step` tokens at a time.
std::vector<float> logits_of(const fs::path& dir, const std::vector<int32_t>& tokens, size_t step) {
  const Checkpoint checkpoint(dir);
  const Model model(checkpoint);
  KvCache cache(model.config(), static_cast<int64_t>(tokens.size()));
  std::vector<float> all;
  for (size_t begin = 0; begin < tokens.size(); begin += step) {
    const auto piece = std::span(tokens).subspan(begin, std::min(step, tokens.size() - begin));
    const std::vector<float> logits = model.forward(piece, cache);
    all.insert(all.end(), logits.begin(), logits.end());
  }
  return all;
}

float largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  float worst = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    EXPECT_TRUE(std::isfinite(a[i])) << i;
    worst = std::max(worst, std::abs(a[i] - b[i]));
  }
  return worst;
}

TEST(ModelReference, Logits) {
  for_each_case("", [](const ReferenceCase& c) {
    const std::vector<float> logits = logits_of(c.path / "model", c.tokens, c.tokens.size());
    const float worst = largest_difference(logits, c.logits);
    EXPECT_LE(worst, 1e-3f);
    std::cout << c.path.filename().string() << ": largest difference " << worst << '\n';
    for (const size_t step : {size_t{1}, size_t{7}}) EXPECT_EQ(logits_of(c.path / "model", c.tokens, step), logits);
  });
}

TEST(ModelReference, EveryArchitectureHasACase) {
  std::set<std::string> tested;
  for_each_case("", [&](const ReferenceCase& c) {
    tested.emplace(find_architecture(Checkpoint(c.path / "model").config())->name);
  });
  if (tested.empty()) return;
  for (const Architecture* row : all_architectures()) EXPECT_TRUE(tested.contains(std::string(row->name))) << row->name;
}

/// Of the logits of all cases.
std::string digest() {
  std::vector<float> all;
  for (const ReferenceCase& c : reference_cases()) {
    const std::vector<float> logits = logits_of(c.path / "model", c.tokens, 9);
    all.insert(all.end(), logits.begin(), logits.end());
  }
  return sha256(std::as_bytes(std::span(all)));
}

/// Run by the next test in processes of their own: the level is chosen once a process.
TEST(ModelReference, DISABLED_PrintDigest) { std::cout << "digest=" << digest() << '\n'; }

TEST(ModelReference, LevelsAndThreadsGiveTheSameBits) {
  if (reference_cases().empty()) GTEST_SKIP() << "tools/reference has written no cases (ctest runs it)";
  const size_t before = thread_count();
  set_thread_count(1);
  const std::string expected = digest();
  set_thread_count(2);
  EXPECT_EQ(digest(), expected);
  set_thread_count(before);
  for (const KernelLevel& level : kernel_levels()) {
    if (!level.usable()) continue;
    const std::string command = fmt::format(
        "BITWRIGHT_KERNEL={} {} --gtest_also_run_disabled_tests --gtest_filter=ModelReference.DISABLED_PrintDigest",
        level.name, fs::read_symlink("/proc/self/exe").string());
    std::string output;
    std::array<char, 4096> buffer;
    FILE* const pipe = popen(command.c_str(), "r");
    ASSERT_NE(pipe, nullptr);
    while (std::fgets(buffer.data(), buffer.size(), pipe) != nullptr) output += buffer.data();
    EXPECT_EQ(pclose(pipe), 0);
    EXPECT_NE(output.find("digest=" + expected), std::string::npos) << level.name << '\n' << output;
  }
}

TEST(ModelReference, NoPositionBeyondThoseLearned) {
  for_each_case("gpt2-plain", [](const ReferenceCase& c) {
    const Checkpoint checkpoint(c.path / "model");
    const Model model(checkpoint);
    EXPECT_NO_THROW(KvCache(model.config(), 50));
    try {
      const KvCache cache(model.config(), 51);
      FAIL() << "accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), "context-full");
    }
  });
}

QuantizedTensor as_f32(const std::vector<float>& values, const Shape& shape) {
  const auto bytes = std::as_bytes(std::span(values));
  return {.scheme = plain(DType::f32), .shape = shape, .codes = {bytes.begin(), bytes.end()}};
}

/// Every float matrix (and stack of them) of a model by `scheme`, the rest as f32; `decoded`: all as the floats that
/// these stand for.
test::Tensors quantized(const fs::path& model, const Scheme& scheme, test::Tensors& decoded) {
  const Checkpoint checkpoint(model);
  test::Tensors tensors;
  for (const TensorEntry& entry : checkpoint.tensors()) {
    if (!info(entry.dtype).is_float) continue;
    const std::vector<float> values = checkpoint.read_f32(entry);
    const bool matrix = entry.shape.size() == 2 || entry.shape.size() == 3;
    tensors[entry.name] = matrix ? encode(scheme, entry.shape, values) : as_f32(values, entry.shape);
    decoded[entry.name] = as_f32(decode(tensors[entry.name]), entry.shape);
  }
  return tensors;
}

/// Rows of fused tensors, experts of a stack and transposed matrices are what they stand for.
TEST(ModelReference, QuantizedIsTheModelOfTheDecodedWeights) {
  const auto along = [](int64_t size, DType dtype) { return parameter(Grouping::along(size), plain(dtype)); };
  const std::array<Scheme, 3> schemes = {
      Scheme{.element = &integer_element(8, true), .scale = along(0, DType::f32)},
      Scheme{.element = &integer_element(4, true), .scale = along(16, DType::f16)},
      Scheme{.element = find_element("nf4"), .scale = parameter(Grouping::flat(20), plain(DType::f32))}};
  for_each_case("", [&](const ReferenceCase& c) {
    const Json config = parse_json(test::read_file(c.path / "model/config.json"), "config.json");
    for (const Scheme& scheme : schemes) {
      SCOPED_TRACE(describe(scheme));
      const test::TemporaryDirectory packed, floats;
      test::Tensors decoded;
      test::write_checkpoint(packed.path(), config, quantized(c.path / "model", scheme, decoded));
      test::write_checkpoint(floats.path(), config, decoded);
      const std::vector<float> logits = logits_of(packed.path(), c.tokens, 16);
      EXPECT_EQ(logits, logits_of(floats.path(), c.tokens, 16));
      // Not so coarse that everything would pass.
      EXPECT_GT(largest_difference(logits, c.logits), 0);
    }
  });
}

}  // namespace
}  // namespace bitwright

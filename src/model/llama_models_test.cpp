// Against logits and greedy continuations that PyTorch computed (reference/ beside each model).
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iostream>
#include <nlohmann/json.hpp>

#include "model/model.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

/// The numbers of a .npy file (numpy.lib.format, version 1.0) of exactly this type and shape.
template <class T>
std::vector<T> read_npy(const std::filesystem::path& path, const std::string& type, const std::string& shape) {
  const std::string bytes = test::read_file(path);
  const std::string header = fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}), }}", type, shape);
  uint16_t header_size = 0;
  if (bytes.size() >= 10) std::memcpy(&header_size, bytes.data() + 8, 2);
  const size_t begin = size_t{10} + header_size;
  if (!bytes.starts_with(std::string("\x93NUMPY\x01\0", 8)) || bytes.size() < begin ||
      !std::string_view(bytes).substr(10).starts_with(header) || (bytes.size() - begin) % sizeof(T) != 0)
    throw std::runtime_error(path.string() + " is not " + header);
  std::vector<T> values((bytes.size() - begin) / sizeof(T));
  std::memcpy(values.data(), bytes.data() + begin, bytes.size() - begin);
  return values;
}

struct ModelCase {
  std::filesystem::path path;
  Json reference;
  std::vector<int32_t> prompt;
};

/// Folders that hold a model (hf/) and what it must give (reference/).
std::vector<ModelCase> model_cases() {
  std::vector<ModelCase> cases;
  const std::filesystem::path folder = test::shared_dir() / "data/models";
  if (!std::filesystem::is_directory(folder)) return cases;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::filesystem::path reference = entry.path() / "reference/reference.json";
    if (!std::filesystem::exists(entry.path() / "hf/config.json") || !std::filesystem::exists(reference)) continue;
    ModelCase c = {entry.path(), parse_json(test::read_file(reference), reference.string()), {}};
    c.reference.at("prompt_ids").get_to(c.prompt);
    cases.push_back(std::move(c));
  }
  std::ranges::sort(cases, {}, &ModelCase::path);
  return cases;
}

struct Greedy {
  size_t given;  ///< how many of the ids are not generated
  std::vector<int32_t> ids;
};

std::vector<Greedy> greedy_continuations(const ModelCase& c) {
  const Json& r = c.reference;
  std::vector<Greedy> all;
  if (r.contains("greedy")) all.push_back({c.prompt.size(), r.at("greedy").at("ids").get<std::vector<int32_t>>()});
  if (r.contains("greedy_from_prompt_ids"))
    all.push_back({c.prompt.size(), r.at("greedy_from_prompt_ids").get<std::vector<int32_t>>()});
  if (r.contains("greedy_from_bos_ids")) all.push_back({1, r.at("greedy_from_bos_ids").get<std::vector<int32_t>>()});
  return all;
}

template <class Check>
void for_each_model(Check check) {
  const std::vector<ModelCase> cases = model_cases();
  if (cases.empty()) GTEST_SKIP() << "no models here";
  for (const ModelCase& c : cases) {
    SCOPED_TRACE(c.path.filename().string());
    const Checkpoint checkpoint(c.path / "hf");
    check(c, Model(checkpoint));
  }
  std::cout << "cases: " << cases.size() << '\n';
}

TEST(ModelsLlama, LogitsOfThePrompt) {
  for_each_model([](const ModelCase& c, const Model& model) {
    const std::string count = std::to_string(c.prompt.size());
    const auto prompt = read_npy<int32_t>(c.path / "reference/prompt_ids.npy", "<i4", count + ",");
    ASSERT_EQ(prompt, c.prompt);
    const auto expected = read_npy<float>(c.path / "reference/prompt_logits_f32.npy", "<f4",
                                          fmt::format("{}, {}", count, model.config().vocabulary));
    KvCache cache(model.config(), model.config().context);
    const std::vector<float> logits = model.forward(prompt, cache);
    ASSERT_EQ(logits.size(), expected.size());
    float worst = 0;
    for (size_t i = 0; i < logits.size(); ++i) {
      ASSERT_TRUE(std::isfinite(logits[i])) << i;  // std::max would pass over a NaN
      worst = std::max(worst, std::abs(logits[i] - expected[i]));
    }
    EXPECT_LE(worst, 1e-3f);
    std::cout << c.path.filename().string() << ": largest difference " << worst << '\n';
  });
}

TEST(ModelsLlama, OneTokenAtATimeGivesTheSameBits) {
  for_each_model([](const ModelCase& c, const Model& model) {
    KvCache cache(model.config(), model.config().context), other(model.config(), model.config().context);
    const std::vector<float> all = model.forward(c.prompt, cache);
    std::vector<float> one_by_one;
    for (const int32_t token : c.prompt) {
      const std::vector<float> logits = model.forward({&token, 1}, other, Model::Logits::last);
      one_by_one.insert(one_by_one.end(), logits.begin(), logits.end());
    }
    EXPECT_EQ(all, one_by_one);
    other.clear();
    const std::vector<float> last = model.forward(c.prompt, other, Model::Logits::last);
    EXPECT_EQ(last, std::vector<float>(all.end() - static_cast<std::ptrdiff_t>(last.size()), all.end()));
  });
}

TEST(ModelsLlama, GreedyContinuations) {
  for_each_model([](const ModelCase& c, const Model& model) {
    const std::vector<Greedy> continuations = greedy_continuations(c);
    EXPECT_FALSE(continuations.empty());
    for (const Greedy& greedy : continuations) {
      std::vector<int32_t> ids(greedy.ids.begin(), greedy.ids.begin() + static_cast<std::ptrdiff_t>(greedy.given));
      KvCache cache(model.config(), model.config().context);
      Sampler sampler({});
      std::vector<float> logits = model.forward(ids, cache, Model::Logits::last);
      while (ids.size() < greedy.ids.size()) {
        ids.push_back(sampler.next(logits));
        logits = model.forward({&ids.back(), 1}, cache, Model::Logits::last);
      }
      EXPECT_EQ(ids, greedy.ids);
    }
  });
}

}  // namespace
}  // namespace bitwright

#include "kernels/codebook_search.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <vector>

namespace bitwright {
namespace {

/// A codebook of entries drawn at random, as a whole and in halves.
struct Drawn {
  std::vector<float> levels;
  std::vector<std::vector<uint32_t>> entries;  ///< levels of the neighbours
  std::vector<Codebook::Run> runs;
  std::vector<uint8_t> second;
  Codebook book;

  uint32_t half(const std::vector<uint32_t>& entry, size_t first) const {
    uint32_t number = 0;
    for (size_t j = entry.size() / 2; j-- > 0;)
      number = number * static_cast<uint32_t>(levels.size()) + entry[first + j];
    return number;
  }
  Drawn(size_t neighbours, Codebook::Signs signs, std::vector<float> of, size_t count, std::mt19937& random)
      : levels(std::move(of)) {
    std::set<std::vector<uint32_t>> all;
    while (all.size() < count) {
      std::vector<uint32_t> entry(neighbours);
      for (uint32_t& level : entry) level = static_cast<uint32_t>(random() % levels.size());
      all.insert(entry);
    }
    entries.assign(all.begin(), all.end());
    std::map<uint32_t, std::vector<uint8_t>> by_first;
    for (const auto& entry : entries)
      by_first[half(entry, 0)].push_back(static_cast<uint8_t>(half(entry, neighbours / 2)));
    for (auto& [first, of_run] : by_first) {
      if (of_run.size() % 2 == 1) of_run.push_back(of_run.back());
      const auto begin = static_cast<uint16_t>(second.size());
      second.insert(second.end(), of_run.begin(), of_run.end());
      runs.push_back({static_cast<uint16_t>(first), begin, static_cast<uint16_t>(second.size())});
    }
    book = {.neighbours = neighbours, .signs = signs, .levels = levels, .runs = runs, .second = second};
  }
  Drawn(const Drawn&) = delete;
};

constexpr size_t kSize = 32;

/// Groups whose magnitudes are spread out, some of no weight; `odd`: a value of each eight is negative in every other
/// lane.
struct Groups {
  std::vector<float> values = std::vector<float>(kSize * kPanel), weights = values;
  Groups(bool odd, std::mt19937& random) {
    std::normal_distribution<float> normal(0, 1);
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = std::fabs(normal(random)) * (i % 7 == 0 ? 4.0f : 1.0f);
      weights[i] = i % 11 == 0 ? 0.0f : std::exp(normal(random));
    }
    for (size_t eight = 0; odd && eight < kSize; eight += 8)
      for (size_t lane = 0; lane < kPanel; lane += 2) values[(eight + random() % 8) * kPanel + lane] *= -1;
  }
  MagnitudePanel panel() const { return {values.data(), weights.data(), kSize}; }
  bool odd(size_t at, size_t lane) const {
    const size_t eight = at / 8 * 8;
    for (size_t j = 0; j < 8; ++j)
      if (values[(eight + j) * kPanel + lane] < 0) return true;
    return false;
  }
  /// Of the vector at `at` with an entry, less the sum of w x^2 and divided by a. turn: with the sign turned over that
  /// costs least; else values are what `value` makes of them.
  template <class Value>
  double cost(const Drawn& d, size_t at, size_t lane, const std::vector<uint32_t>& entry, double a, bool turn,
              Value value) const {
    double sum = 0, least = std::numeric_limits<double>::infinity();
    for (size_t j = 0; j < entry.size(); ++j) {
      const size_t i = (at + j) * kPanel + lane;
      const double g = d.levels[entry[j]], w = weights[i], x = value(static_cast<double>(values[i]));
      sum += w * g * (a * g - 2 * x);
      least = std::min(least, 4 * w * x * g);
    }
    return turn ? sum + least : sum;
  }
  template <class Value>
  double best(const Drawn& d, size_t at, size_t lane, double a, bool turn, Value value) const {
    double least = std::numeric_limits<double>::infinity();
    for (const auto& entry : d.entries) least = std::min(least, cost(d, at, lane, entry, a, turn, value));
    return least;
  }
};

double as_is(double x) { return x; }
double magnitude(double x) { return std::fabs(x); }

class CodebookSearches : public ::testing::Test {
 protected:
  std::mt19937 random{11};
  const Drawn any8{8, Codebook::Signs::any, {8, 25, 43}, 300, random};
  const Drawn even8{8, Codebook::Signs::even, {8, 25, 43}, 77, random};
  const Drawn any4{4, Codebook::Signs::any, {1, 3, 5, 7, 9, 11, 13, 15}, 200, random};
  const Drawn even4{4, Codebook::Signs::even, {4, 12, 20, 28, 36, 44, 52, 62}, 101, random};
  const std::vector<const Drawn*> all = {&any8, &even8, &any4, &even4};

  template <class Check>
  void at_every_level(Check check) {
    for (const Drawn* d : all)
      for (const KernelLevel& level : kernel_levels()) {
        if (!level.usable()) continue;
        SCOPED_TRACE(std::string(level.name) + ", neighbours " + std::to_string(d->book.neighbours));
        const bool odd = d->book.signs == Codebook::Signs::even;
        check(*d, Groups(odd, random), codebook_search(level));
      }
  }
};

TEST_F(CodebookSearches, ErrorsAreThoseOfTheBestEntries) {
  at_every_level([](const Drawn& d, const Groups& groups, const CodebookSearch& loops) {
    std::vector<float> scales(CodebookSearch::kAtOnce * kPanel), errors = scales;
    for (size_t i = 0; i < scales.size(); ++i) scales[i] = (0.5f + 0.03f * static_cast<float>(i)) * 2 / d.levels.back();
    loops.errors(groups.panel(), d.book, scales.data(), errors.data());
    for (size_t i = 0; i < scales.size(); ++i) {
      double sum = 0, size = 0;
      for (size_t at = 0; at < kSize; at += d.book.neighbours) {
        const double is = groups.best(d, at, i % kPanel, static_cast<double>(scales[i]), false, as_is);
        sum += is;
        size += std::fabs(is);
      }
      EXPECT_NEAR(errors[i], sum * static_cast<double>(scales[i]), 1e-5 * size * static_cast<double>(scales[i]));
    }
  });
}

TEST_F(CodebookSearches, ChoosesTheBestEntriesAndSigns) {
  at_every_level([](const Drawn& d, const Groups& groups, const CodebookSearch& loops) {
    const size_t n = d.book.neighbours, vectors = kSize / n, together = 8 / n;
    std::vector<float> scales(kPanel);
    for (size_t i = 0; i < kPanel; ++i) scales[i] = (0.5f + 0.1f * static_cast<float>(i)) * 2 / d.levels.back();
    std::vector<uint8_t> first(vectors * kPanel), second = first, turned = first;
    loops.choose(groups.panel(), d.book, scales.data(), {first.data(), second.data(), turned.data()});
    for (size_t lane = 0; lane < kPanel; ++lane)
      for (size_t v = 0; v < vectors; v += together) {
        const auto a = static_cast<double>(scales[lane]);
        const bool odd = groups.odd(v * n, lane);
        double is = 0, size = 0, best = odd ? std::numeric_limits<double>::infinity() : 0;
        unsigned turns = 0;
        for (size_t k = 0; k < together; ++k) {
          const size_t to = (v + k) * kPanel + lane;
          const auto entry = std::ranges::find_if(
              d.entries, [&](const auto& e) { return d.half(e, 0) == first[to] && d.half(e, n / 2) == second[to]; });
          ASSERT_NE(entry, d.entries.end());
          turns += turned[to];
          is += groups.cost(d, (v + k) * n, lane, *entry, a, turned[to] != 0, magnitude);
          // One of them is turned over, whichever is cheaper.
          double with = 0;
          for (size_t other = 0; other < together; ++other) {
            const double cost = groups.best(d, (v + other) * n, lane, a, odd && other == k, magnitude);
            with += cost;
            size += std::fabs(cost);
          }
          best = odd ? std::min(best, with) : with;
        }
        EXPECT_EQ(turns, odd ? 1u : 0u);
        EXPECT_NEAR(is, best, size / (1 << 15));  // halves are told apart by their last bits
      }
  });
}

}  // namespace
}  // namespace bitwright

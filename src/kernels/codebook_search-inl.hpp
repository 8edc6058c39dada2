// Part of group_search.cpp, as group_search-inl.hpp is. At scale a the levels g of an entry have the error, less the sum
// of w x^2 and divided by a, sum of a w g^2 - 2 w x g. It is the sum of what its two halves have, so that each half is
// computed once, and an entry costs one comparison: the least of the second halves that go with the same first.
template <class L>
struct CodebookLoops {
  using V = typename L::V;
  static constexpr size_t kStep = L::kCount, kAtOnce = CodebookSearch::kAtOnce;
  static constexpr size_t kAlignment = 64;

  static V infinity() { return L::set(std::numeric_limits<float>::infinity()); }
  static V load(const float* from, size_t i) { return L::load(from + i * kStep); }
  static void store(V v, float* to, size_t i) { L::store(v, to + i * kStep); }

  /// What each half costs: [half][kStep].
  struct Costs {
    alignas(kAlignment) float of[Codebook::kMostHalves * kStep];
  };

  /// Of the half whose neighbours begin at x and w, at each of the scales.
  static void fill(const Codebook& book, const float* x, const float* w, const V (&a)[kAtOnce],
                   Costs (&costs)[kAtOnce]) {
    for (size_t c = 0; c < kAtOnce; ++c) store(L::set(0), costs[c].of, 0);
    size_t count = 1;
    for (size_t j = 0; j < book.neighbours / 2; ++j, count *= book.levels.size()) {
      const V weight = L::load(w + j * kPanel), product = L::mul(weight, L::load(x + j * kPanel));
      for (size_t l = book.levels.size(); l-- > 0;) {
        const float level = book.levels[l];
        const V square = L::mul(weight, L::set(level * level)), twice = L::mul(product, L::set(-2 * level));
        V more[kAtOnce];
        for (size_t c = 0; c < kAtOnce; ++c) more[c] = L::mul_add(a[c], square, twice);
        for (size_t i = 0; i < count; ++i)
          for (size_t c = 0; c < kAtOnce; ++c)
            store(L::add(load(costs[c].of, i), more[c]), costs[c].of, l * count + i);
      }
    }
  }

  // ---- errors at a few scales

  static void errors(const MagnitudePanel& p, const Codebook& book, const float* scales, float* errors) {
    Costs first[kAtOnce], second[kAtOnce];
    const size_t half = book.neighbours / 2 * kPanel;
    for (size_t lane = 0; lane < kPanel; lane += kStep) {
      V a[kAtOnce], sum[kAtOnce];
      for (size_t c = 0; c < kAtOnce; ++c) {
        a[c] = L::load(scales + c * kPanel + lane);
        sum[c] = L::set(0);
      }
      for (size_t at = lane; at < p.size * kPanel; at += 2 * half) {
        fill(book, p.values + at, p.weights + at, a, first);
        fill(book, p.values + at + half, p.weights + at + half, a, second);
        add_least(book, first, second, sum);
      }
      for (size_t c = 0; c < kAtOnce; ++c) L::store(L::mul(a[c], sum[c]), errors + c * kPanel + lane);
    }
  }

  static void add_least(const Codebook& book, const Costs (&first)[kAtOnce], const Costs (&second)[kAtOnce],
                        V (&sum)[kAtOnce]) {
    V best[kAtOnce];
    for (size_t c = 0; c < kAtOnce; ++c) best[c] = infinity();
    for (const Codebook::Run& run : book.runs) {
      V even[kAtOnce], odd[kAtOnce];  // two, so that one need not wait for the other
      for (size_t c = 0; c < kAtOnce; ++c) {
        even[c] = load(second[c].of, book.second[run.begin]);
        odd[c] = load(second[c].of, book.second[run.begin + 1]);
      }
      for (size_t e = run.begin + 2; e < run.end; e += 2)
        for (size_t c = 0; c < kAtOnce; ++c) {
          even[c] = L::min(even[c], load(second[c].of, book.second[e]));
          odd[c] = L::min(odd[c], load(second[c].of, book.second[e + 1]));
        }
      for (size_t c = 0; c < kAtOnce; ++c)
        best[c] = L::min(best[c], L::add(load(first[c].of, run.first), L::min(even[c], odd[c])));
    }
    for (size_t c = 0; c < kAtOnce; ++c) sum[c] = L::add(sum[c], best[c]);
  }

  // ---- the entries at one scale

  /// What each half costs, and with one sign turned over where that costs least.
  struct BothCosts {
    Costs plain, flipped;
  };

  /// turn: what turning over costs is multiplied by this, 0 or 1. Without kEven nothing is turned over.
  template <bool kEven>
  static void fill_both(const Codebook& book, const float* x, const float* w, V a, V turn, BothCosts& costs) {
    store(L::set(0), costs.plain.of, 0);
    if constexpr (kEven) store(infinity(), costs.flipped.of, 0);
    size_t count = 1;
    for (size_t j = 0; j < book.neighbours / 2; ++j, count *= book.levels.size()) {
      const V weight = L::load(w + j * kPanel), value = L::load(x + j * kPanel);
      const V product = L::mul(weight, L::max(value, L::sub(L::set(0), value)));
      for (size_t l = book.levels.size(); l-- > 0;) {
        const float level = book.levels[l];
        const V square = L::mul(weight, L::set(level * level)), twice = L::mul(product, L::set(2 * level));
        const V more = L::sub(L::mul(a, square), twice), turned = L::mul_add(turn, L::add(twice, twice), more);
        for (size_t i = 0; i < count; ++i) {
          const V plain = load(costs.plain.of, i);
          if constexpr (kEven)
            store(L::min(L::add(load(costs.flipped.of, i), more), L::add(plain, turned)), costs.flipped.of,
                  l * count + i);
          store(L::add(plain, more), costs.plain.of, l * count + i);
        }
      }
    }
  }

  /// A vector's halves, and the least cost and the run that has it, as a number: without and with a sign turned over.
  struct Choice {
    BothCosts first, second;
    V cost[2], run[2];
  };

  static void take(V cost, float run, size_t flip, Choice& choice) {
    const auto better = L::less(cost, choice.cost[flip]);
    choice.cost[flip] = L::select(better, cost, choice.cost[flip]);
    choice.run[flip] = L::select(better, L::set(run), choice.run[flip]);
  }

  template <bool kEven>
  static void search(const Codebook& book, const float* x, const float* w, V a, V turn, Choice& choice) {
    const size_t half = book.neighbours / 2 * kPanel;
    fill_both<kEven>(book, x, w, a, turn, choice.first);
    fill_both<kEven>(book, x + half, w + half, a, turn, choice.second);
    for (size_t flip = 0; flip < 2; ++flip) {
      choice.cost[flip] = infinity();
      choice.run[flip] = L::set(0);
    }
    float number = 0;
    for (const Codebook::Run& run : book.runs) {
      V plain = infinity(), flipped = plain;
      for (size_t e = run.begin; e < run.end; e += 2) {
        const size_t even = book.second[e], odd = book.second[e + 1];
        plain = L::min(plain, L::min(load(choice.second.plain.of, even), load(choice.second.plain.of, odd)));
        if constexpr (kEven)
          flipped = L::min(flipped, L::min(load(choice.second.flipped.of, even), load(choice.second.flipped.of, odd)));
      }
      const V first = load(choice.first.plain.of, run.first);
      take(L::add(first, plain), number, 0, choice);
      if constexpr (kEven)
        take(L::min(L::add(first, flipped), L::add(load(choice.first.flipped.of, run.first), plain)), number, 1,
             choice);
      ++number;
    }
  }

  /// The entry of lane `lane`, in the run that is known to have it.
  static uint16_t entry_of(const Codebook& book, const Choice& choice, const Codebook::Run& run, bool flip,
                           size_t lane) {
    const float plain = choice.first.plain.of[run.first * kStep + lane];
    const float flipped = flip ? choice.first.flipped.of[run.first * kStep + lane] : 0;
    size_t best = run.begin;
    float least = std::numeric_limits<float>::infinity();
    for (size_t e = run.begin; e < run.end; ++e) {
      const size_t at = book.second[e] * kStep + lane;
      const float other = choice.second.plain.of[at];
      const float cost = flip ? std::min(plain + choice.second.flipped.of[at], flipped + other) : plain + other;
      if (cost < least) {
        least = cost;
        best = e;
      }
    }
    return static_cast<uint16_t>(best);
  }

  /// flips: null where signs may be any.
  static void write(const Codebook& book, const Choice& choice, V flip, uint16_t* entries, uint8_t* flips) {
    alignas(kAlignment) float flipped[kStep], runs[kStep];
    const auto is_flipped = L::less(L::set(0), flip);
    L::store(flip, flipped);
    L::store(L::select(is_flipped, choice.run[1], choice.run[0]), runs);
    for (size_t lane = 0; lane < kStep; ++lane) {
      const bool turned = flipped[lane] > 0;
      entries[lane] = entry_of(book, choice, book.runs[static_cast<size_t>(runs[lane])], turned, lane);
      flips[lane] = turned ? 1 : 0;
    }
  }

  static void choose(const MagnitudePanel& p, const Codebook& book, const float* scales, uint16_t* entries,
                     uint8_t* flips) {
    const size_t together = book.signs == Codebook::Signs::any ? book.neighbours : 8;
    for (size_t lane = 0; lane < kPanel; lane += kStep) {
      const V a = L::load(scales + lane);
      for (size_t at = 0; at < p.size; at += together) {
        const float *const x = p.values + at * kPanel + lane, *const w = p.weights + at * kPanel + lane;
        const size_t to = at / book.neighbours * kPanel + lane;
        if (book.signs == Codebook::Signs::any) {
          Choice choice;
          search<false>(book, x, w, a, L::set(0), choice);
          write(book, choice, L::set(0), entries + to, flips + to);
        } else {
          choose_even(x, w, book, a, entries + to, flips + to);
        }
      }
    }
  }

  /// One vector, or two that share their signs: one of them is turned over where the other need not be.
  static void choose_even(const float* x, const float* w, const Codebook& book, V a, uint16_t* entries,
                          uint8_t* flips) {
    const V zero = L::set(0), one = L::set(1);
    V odd = zero;
    for (size_t j = 0; j < 8; ++j) odd = L::select(L::less(L::load(x + j * kPanel), zero), one, odd);
    Choice choices[2];
    search<true>(book, x, w, a, odd, choices[0]);
    if (book.neighbours == 8) return write(book, choices[0], odd, entries, flips);
    search<true>(book, x + 4 * kPanel, w + 4 * kPanel, a, odd, choices[1]);
    const auto in_second = L::less(L::add(choices[0].cost[0], choices[1].cost[1]),
                                   L::add(choices[0].cost[1], choices[1].cost[0]));
    const V first = L::select(in_second, zero, odd);
    write(book, choices[0], first, entries, flips);
    write(book, choices[1], L::sub(odd, first), entries + kPanel, flips + kPanel);
  }

  static constexpr CodebookSearch row(std::string_view name) {
    return {.name = name, .errors = errors, .choose = choose};
  }
};

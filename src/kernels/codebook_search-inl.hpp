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
      V least[kAtOnce];
      for (size_t c = 0; c < kAtOnce; ++c) least[c] = infinity();
      for (size_t e = run.begin; e < run.end; ++e)
        for (size_t c = 0; c < kAtOnce; ++c) least[c] = L::min(least[c], load(second[c].of, book.second[e]));
      for (size_t c = 0; c < kAtOnce; ++c)
        best[c] = L::min(best[c], L::add(load(first[c].of, run.first), least[c]));
    }
    for (size_t c = 0; c < kAtOnce; ++c) sum[c] = L::add(sum[c], best[c]);
  }

  // ---- the entries at one scale

  /// What each half costs, and with one sign turned over where it costs least.
  struct BothCosts {
    Costs plain, flipped;
  };

  /// flip: what turning over costs is multiplied by this, 0 or 1.
  static void fill_both(const Codebook& book, const float* x, const float* w, V a, V flip, BothCosts& costs) {
    store(L::set(0), costs.plain.of, 0);
    store(infinity(), costs.flipped.of, 0);
    size_t count = 1;
    for (size_t j = 0; j < book.neighbours / 2; ++j, count *= book.levels.size()) {
      const V weight = L::load(w + j * kPanel), value = L::load(x + j * kPanel);
      const V product = L::mul(weight, L::max(value, L::sub(L::set(0), value)));
      for (size_t l = book.levels.size(); l-- > 0;) {
        const float level = book.levels[l];
        const V square = L::mul(weight, L::set(level * level)), twice = L::mul(product, L::set(2 * level));
        const V more = L::sub(L::mul(a, square), twice), turned = L::mul_add(flip, L::add(twice, twice), more);
        for (size_t i = 0; i < count; ++i) {
          const V plain = load(costs.plain.of, i);
          store(L::min(L::add(load(costs.flipped.of, i), more), L::add(plain, turned)), costs.flipped.of,
                l * count + i);
          store(L::add(plain, more), costs.plain.of, l * count + i);
        }
      }
    }
  }

  /// Of each lane the run that has the best entry, as a number.
  struct Best {
    V cost, run;
  };
  static Best none() { return {infinity(), L::set(0)}; }
  static void take(V cost, float run, Best& best) {
    const auto better = L::less(cost, best.cost);
    best.cost = L::select(better, cost, best.cost);
    best.run = L::select(better, L::set(run), best.run);
  }

  /// A vector's halves, and the best runs without and with a sign turned over.
  struct Choice {
    BothCosts first, second;
    Best plain, flipped;
  };

  static void search(const Codebook& book, const float* x, const float* w, V a, V flip, Choice& choice) {
    const size_t half = book.neighbours / 2 * kPanel;
    fill_both(book, x, w, a, flip, choice.first);
    fill_both(book, x + half, w + half, a, flip, choice.second);
    choice.plain = choice.flipped = none();
    float number = 0;
    for (const Codebook::Run& run : book.runs) {
      V plain = infinity(), flipped = plain;
      for (size_t e = run.begin; e < run.end; ++e) {
        plain = L::min(plain, load(choice.second.plain.of, book.second[e]));
        flipped = L::min(flipped, load(choice.second.flipped.of, book.second[e]));
      }
      const V first = load(choice.first.plain.of, run.first);
      take(L::add(first, plain), number, choice.plain);
      take(L::min(L::add(first, flipped), L::add(load(choice.first.flipped.of, run.first), plain)), number,
           choice.flipped);
      ++number;
    }
  }

  /// The entry of lane `lane`, in the run that is known to have it.
  static uint16_t entry_of(const Codebook& book, const Choice& choice, bool flip, size_t lane) {
    alignas(kAlignment) float runs[kStep];
    L::store(flip ? choice.flipped.run : choice.plain.run, runs);
    const Codebook::Run& run = book.runs[static_cast<size_t>(runs[lane])];
    const float plain = choice.first.plain.of[run.first * kStep + lane];
    const float flipped = choice.first.flipped.of[run.first * kStep + lane];
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

  static void choose(const MagnitudePanel& p, const Codebook& book, const float* scales, uint16_t* entries,
                     uint8_t* flips) {
    const size_t together = 8 / book.neighbours, a_vector = book.neighbours * kPanel;
    for (size_t lane = 0; lane < kPanel; lane += kStep) {
      const V a = L::load(scales + lane);
      for (size_t at = 0; at < p.size * kPanel; at += together * a_vector)
        choose_eight(p.values + at + lane, p.weights + at + lane, book, a, entries + at / book.neighbours + lane,
                     flips + at / book.neighbours + lane);
    }
  }

  /// One vector, or two that share their signs: one of them is turned over where the other need not be.
  static void choose_eight(const float* x, const float* w, const Codebook& book, V a, uint16_t* entries,
                           uint8_t* flips) {
    alignas(kAlignment) float odd[kStep], in_first[kStep];
    const V zero = L::set(0), one = L::set(1);
    V is_odd = zero;
    for (size_t j = 0; j < 8; ++j) is_odd = L::select(L::less(L::load(x + j * kPanel), zero), one, is_odd);
    L::store(is_odd, odd);
    Choice choices[2];
    search(book, x, w, a, is_odd, choices[0]);
    V first = one;
    if (book.neighbours == 4) {
      search(book, x + 4 * kPanel, w + 4 * kPanel, a, is_odd, choices[1]);
      first = L::select(L::less(L::add(choices[0].plain.cost, choices[1].flipped.cost),
                                L::add(choices[0].flipped.cost, choices[1].plain.cost)),
                        zero, one);
    }
    L::store(first, in_first);
    for (size_t lane = 0; lane < kStep; ++lane)
      for (size_t k = 0; k < 8 / book.neighbours; ++k) {
        const bool flip = odd[lane] > 0 && (in_first[lane] > 0) == (k == 0);
        entries[k * kPanel + lane] = entry_of(book, choices[k], flip, lane);
        flips[k * kPanel + lane] = flip;
      }
  }

  static constexpr CodebookSearch row(std::string_view name) {
    return {.name = name, .errors = errors, .choose = choose};
  }
};

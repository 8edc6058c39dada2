// Part of group_search.cpp, as group_search-inl.hpp is. At scale a the levels g of an entry have the error, less the
// sum of w x^2 and divided by a, sum of a w g^2 - 2 w x g. It is the sum of what its two halves have, so that each half
// is computed once, and an entry costs one comparison: the least of the second halves that go with the same first.
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
          for (size_t c = 0; c < kAtOnce; ++c) store(L::add(load(costs[c].of, i), more[c]), costs[c].of, l * count + i);
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
    Costs plain, turned;
  };

  /// turn: what turning over costs is multiplied by this, 0 or 1. Without kEven nothing is turned over.
  template <bool kEven>
  static void fill_both(const Codebook& book, const float* x, const float* w, V a, V turn, BothCosts& costs) {
    store(L::set(0), costs.plain.of, 0);
    if constexpr (kEven) store(infinity(), costs.turned.of, 0);
    size_t count = 1;
    for (size_t j = 0; j < book.neighbours / 2; ++j, count *= book.levels.size()) {
      const V weight = L::load(w + j * kPanel), value = L::load(x + j * kPanel);
      const V product = L::mul(weight, L::max(value, L::sub(L::set(0), value)));
      for (size_t l = book.levels.size(); l-- > 0;) {
        const float level = book.levels[l];
        const V square = L::mul(weight, L::set(level * level)), twice = L::mul(product, L::set(2 * level));
        const V more = L::sub(L::mul(a, square), twice), other = L::mul_add(turn, L::add(twice, twice), more);
        for (size_t i = 0; i < count; ++i) {
          const V plain = load(costs.plain.of, i);
          if constexpr (kEven)
            store(L::min(L::add(load(costs.turned.of, i), more), L::add(plain, other)), costs.turned.of, l * count + i);
          store(L::add(plain, more), costs.plain.of, l * count + i);
        }
      }
    }
  }

  /// The least cost, and its halves, as numbers.
  struct Best {
    V cost, first, second;
  };
  static Best none() { return {infinity(), L::set(0), L::set(0)}; }
  static void take(V cost, V first, V second, Best& best) {
    const auto better = L::less(cost, best.cost);
    best = {L::select(better, cost, best.cost), L::select(better, first, best.first),
            L::select(better, second, best.second)};
  }

  /// A vector's best without and with a sign turned over.
  struct Choice {
    Best plain, turned;
  };

  template <bool kEven>
  static Choice search(const Codebook& book, const float* x, const float* w, V a, V turn) {
    const size_t half = book.neighbours / 2 * kPanel;
    BothCosts first, second;
    fill_both<kEven>(book, x, w, a, turn, first);
    fill_both<kEven>(book, x + half, w + half, a, turn, second);
    tag(book, second.plain);
    if constexpr (kEven) tag(book, second.turned);
    Choice choice = {none(), none()};
    for (const Codebook::Run& run : book.runs) {
      V plain = infinity(), turned = plain;
      for (size_t e = run.begin; e < run.end; e += 2) {
        const size_t even = book.second[e], odd = book.second[e + 1];
        plain = L::min(plain, L::min(load(second.plain.of, even), load(second.plain.of, odd)));
        if constexpr (kEven) turned = L::min(turned, L::min(load(second.turned.of, even), load(second.turned.of, odd)));
      }
      const V first_plain = load(first.plain.of, run.first), number = L::set(static_cast<float>(run.first));
      take(L::add(first_plain, plain), number, plain, choice.plain);
      if constexpr (kEven) {
        take(L::add(first_plain, turned), number, turned, choice.turned);
        take(L::add(load(first.turned.of, run.first), plain), number, plain, choice.turned);
      }
    }
    return choice;
  }

  /// Of each half its number in the lowest bits of its cost, so that the least one says which it is.
  static void tag(const Codebook& book, Costs& costs) {
    size_t count = 1;
    for (size_t j = 0; j < book.neighbours / 2; ++j) count *= book.levels.size();
    for (size_t i = 0; i < count; ++i) store(L::tag(load(costs.of, i), static_cast<uint32_t>(i)), costs.of, i);
  }

  static void choose(const MagnitudePanel& p, const Codebook& book, const float* scales, const ChosenHalves& to) {
    const size_t together = book.signs == Codebook::Signs::any ? book.neighbours : 8;
    for (size_t lane = 0; lane < kPanel; lane += kStep) {
      const V a = L::load(scales + lane);
      for (size_t at = 0; at < p.size; at += together) {
        const float *const x = p.values + at * kPanel + lane, *const w = p.weights + at * kPanel + lane;
        const size_t vector = at / book.neighbours * kPanel + lane;
        const ChosenHalves part = {to.first + vector, to.second + vector, to.turned + vector};
        if (book.signs == Codebook::Signs::any) {
          write(search<false>(book, x, w, a, L::set(0)), L::set(0), part);
        } else {
          choose_even(x, w, book, a, part);
        }
      }
    }
  }

  /// turn: 1 or 0.
  static void write(const Choice& choice, V turn, const ChosenHalves& to) {
    const auto turned = L::less(L::set(0), turn);
    L::store_code(L::select(turned, choice.turned.first, choice.plain.first), to.first);
    L::store_code(L::tag_of(L::select(turned, choice.turned.second, choice.plain.second)), to.second);
    L::store_code(turn, to.turned);
  }

  /// One vector, or two that share their signs: one of them is turned over where the other need not be.
  static void choose_even(const float* x, const float* w, const Codebook& book, V a, const ChosenHalves& to) {
    const V zero = L::set(0), one = L::set(1);
    V odd = zero;
    for (size_t j = 0; j < 8; ++j) odd = L::select(L::less(L::load(x + j * kPanel), zero), one, odd);
    const Choice choice = search<true>(book, x, w, a, odd);
    if (book.neighbours == 8) return write(choice, odd, to);
    const Choice next = search<true>(book, x + 4 * kPanel, w + 4 * kPanel, a, odd);
    const auto in_next =
        L::less(L::add(choice.plain.cost, next.turned.cost), L::add(choice.turned.cost, next.plain.cost));
    const V turn = L::select(in_next, zero, odd);
    write(choice, turn, to);
    write(next, L::sub(odd, turn), {to.first + kPanel, to.second + kPanel, to.turned + kPanel});
  }

  static constexpr CodebookSearch row(std::string_view name) {
    return {.name = name, .errors = errors, .choose = choose};
  }
};

// Part of group_search.cpp, included once per instruction set; L says how a few lanes are added and compared, so that
// one source gives the same bits with one lane and with many.
template <class L>
struct GroupLoops {
  using V = typename L::V;
  static constexpr size_t kStep = L::kCount;
  static constexpr int kAtOnce = 4;  ///< candidates: enough that the adders are never idle
  static constexpr float kSame = 1e-6f;
  static constexpr float kFlat = 1e-30f;  ///< what is smaller is 0 to an f16, and its inverse nearly infinite

  static V infinity() { return L::set(std::numeric_limits<float>::infinity()); }

  /// 1 / x, 0 for 0.
  static V inverse(V x) { return L::select(L::equal(x, L::set(0)), L::set(0), L::div(L::set(1), x)); }

  /// Adding it rounds to a whole number, up to 2^22, and taking it away leaves that: 1.5 * 2^23.
  static V rounder() { return L::set(12582912.0f); }

  /// The value of the grid nearest to x * inverse.
  template <bool kTable>
  struct Nearest {
    V low, high, magic = rounder();
    const CodeGrid& grid;
    explicit Nearest(const CodeGrid& g) : low(L::set(g.low)), high(L::set(g.high)), grid(g) {}
    V operator()(V x, V inverse) const {
      if constexpr (kTable) return L::lookup(grid.table, find(L::mul(x, inverse)));
      return L::min(L::max(L::sub(L::mul_add(x, inverse, magic), magic), low), high);
    }
    /// From 0 on.
    V code(V x, V inverse) const {
      if constexpr (kTable) return L::to_float(find(L::mul(x, inverse)));
      return L::sub((*this)(x, inverse), low);
    }

    /// How many of the points between neighbours lie below v.
    typename L::I find(V v) const {
      typename L::I at = L::zero_index();
      for (const int step : {8, 4, 2, 1}) at = L::advance(at, step, grid.midpoints, v);
      return at;
    }
  };

  /// What is done with weights, and without: all are 1, and the bits are the same.
  template <bool kWeighted>
  struct Weighing {
    static V load(const GroupPanel& p, size_t i) {
      if constexpr (kWeighted) return L::load(p.weights + i * kPanel);
      return L::set(1);
    }
    static V times(V w, V x) {
      if constexpr (kWeighted) return L::mul(w, x);
      return x;
    }
  };

  static GroupPanel from_lane(const GroupPanel& p, size_t lane) {
    return {p.values + lane, p.weights == nullptr ? nullptr : p.weights + lane, p.size};
  }

  static void gather(const float* groups, size_t size, float* panel) {
    for (size_t lane = 0; lane < kPanel; lane += kStep) {
      const typename L::I at = L::multiples(size);
      for (size_t i = 0; i < size; ++i) L::store(L::gather(groups + lane * size + i, at), panel + i * kPanel + lane);
    }
  }

  static void fit_affine(const GroupPanel& p, float levels, const RangeGrid& grid, float* scale, float* minimum) {
    const auto fit = p.weights == nullptr ? fit_affine_lanes<false> : fit_affine_lanes<true>;
    for (size_t lane = 0; lane < kPanel; lane += kStep)
      fit(from_lane(p, lane), levels, grid, scale + lane, minimum + lane);
  }

  template <bool kWeighted>
  static void fit_affine_lanes(const GroupPanel& p, float levels, const RangeGrid& grid, float* scale, float* minimum) {
    using W = Weighing<kWeighted>;
    V low = L::set(0), high = infinity(), sw = low, sx = low, sxx = low;
    high = L::sub(low, high);
    for (size_t i = 0; i < p.size; ++i) {
      const V x = L::load(p.values + i * kPanel), w = W::load(p, i), wx = W::times(w, x);
      low = L::min(low, x);
      high = L::max(high, x);
      sw = L::add(sw, w);
      sx = L::add(sx, wx);
      sxx = L::mul_add(wx, x, sxx);
    }
    const V span = L::sub(high, low), zero = L::set(0), top = L::set(levels), magic = rounder();
    const auto flat = L::less_equal(span, L::set(kFlat));
    V best = infinity(), best_scale = zero, best_minimum = L::sub(zero, low);
    for (int k = 0; k < grid.bases * grid.steps; k += kAtOnce) {
      const int base_number = k / grid.steps;
      const float half_levels = 0.5f * static_cast<float>(base_number);
      const V base = L::add(low, L::mul(span, L::set(half_levels / levels))), above_base = L::sub(high, base);
      V inv[kAtOnce], se[kAtOnce], see[kAtOnce], sxe[kAtOnce];
      for (int c = 0; c < kAtOnce; ++c) {
        const float stretch = grid.first + static_cast<float>(k % grid.steps + c) * grid.step;
        inv[c] = L::select(flat, zero, L::div(L::set(levels + stretch), above_base));
        se[c] = see[c] = sxe[c] = zero;
      }
      for (size_t i = 0; i < p.size; ++i) {
        const V x = L::load(p.values + i * kPanel), w = W::load(p, i), above = L::sub(x, base);
        for (int c = 0; c < kAtOnce; ++c) {
          const V e = L::min(L::max(L::sub(L::mul_add(above, inv[c], magic), magic), zero), top);
          const V we = W::times(w, e);
          se[c] = L::add(se[c], we);
          see[c] = L::mul_add(we, e, see[c]);
          sxe[c] = L::mul_add(we, x, sxe[c]);
        }
      }
      for (int c = 0; c < kAtOnce; ++c) {
        const V d = L::sub(L::mul(sw, see[c]), L::mul(se[c], se[c])), id = inverse(d);
        V a = L::mul(L::sub(L::mul(sw, sxe[c]), L::mul(sx, se[c])), id);
        V m = L::mul(L::sub(L::mul(se[c], sxe[c]), L::mul(see[c], sx)), id);
        // Where all codes are the same, d is noise: no minimum then.
        m = L::select(L::less(L::mul(L::set(kSame), L::mul(sw, see[c])), d), m, L::set(-1));
        const auto above = L::less(m, zero);
        a = L::select(above, L::mul(sxe[c], inverse(see[c])), a);
        m = L::select(above, zero, m);
        // sum of w (a e - m - x)^2
        const V squares = L::mul_add(L::mul(a, a), see[c], L::mul_add(L::mul(m, m), sw, sxx));
        const V products = L::sub(L::mul(m, sx), L::mul_add(a, sxe[c], L::mul(L::mul(a, m), se[c])));
        const V error = L::mul_add(L::set(2), products, squares);
        const auto better = L::both(L::less(error, best), L::less(zero, see[c]));
        best = L::select(better, error, best);
        best_scale = L::select(better, a, best_scale);
        best_minimum = L::select(better, m, best_minimum);
      }
    }
    L::store(best_scale, scale);
    L::store(best_minimum, minimum);
  }

  static void fit_scale(const GroupPanel& p, const CodeGrid& grid, float first, float step, int steps, float* scale) {
    const bool table = grid.table != nullptr;
    const auto fit = p.weights == nullptr ? (table ? fit_scale_lanes<false, true> : fit_scale_lanes<false, false>)
                                          : (table ? fit_scale_lanes<true, true> : fit_scale_lanes<true, false>);
    for (size_t lane = 0; lane < kPanel; lane += kStep) fit(from_lane(p, lane), grid, first, step, steps, scale + lane);
  }

  template <bool kWeighted, bool kTable>
  static void fit_scale_lanes(const GroupPanel& p, const CodeGrid& grid, float first, float step, int steps,
                              float* scale) {
    using W = Weighing<kWeighted>;
    const V zero = L::set(0);
    V low = zero, high = zero;
    for (size_t i = 0; i < p.size; ++i) {
      const V x = L::load(p.values + i * kPanel);
      low = L::min(low, x);
      high = L::max(high, x);
    }
    const V extreme = L::select(L::less(high, L::sub(zero, low)), low, high);
    const auto flat = L::less_equal(L::max(high, L::sub(zero, low)), L::set(kFlat));
    const V id = L::select(flat, zero, inverse(extreme));
    const Nearest<kTable> nearest(grid);
    V best = zero, best_scale = zero;
    for (const float end : {grid.low, grid.high})
      for (int k = 0; k < steps; k += kAtOnce) {
        V inv[kAtOnce], see[kAtOnce], sxe[kAtOnce];
        for (int c = 0; c < kAtOnce; ++c) {
          const float stretch = first + static_cast<float>(k + c) * step;
          inv[c] = L::mul(L::set(end + (end < 0 ? -stretch : stretch)), id);
          see[c] = sxe[c] = zero;
        }
        for (size_t i = 0; i < p.size; ++i) {
          const V x = L::load(p.values + i * kPanel), w = W::load(p, i), wx = W::times(w, x);
          for (int c = 0; c < kAtOnce; ++c) {
            const V e = nearest(x, inv[c]);
            see[c] = L::mul_add(W::times(w, e), e, see[c]);
            sxe[c] = L::mul_add(wx, e, sxe[c]);
          }
        }
        for (int c = 0; c < kAtOnce; ++c) {
          const V a = L::mul(sxe[c], inverse(see[c])), gain = L::mul(a, sxe[c]);
          const auto better = L::less(best, gain);
          best = L::select(better, gain, best);
          best_scale = L::select(better, a, best_scale);
        }
      }
    L::store(best_scale, scale);
  }

  static void sum_up(const GroupPanel& p, const CodeGrid& grid, const float* scale, const float* minimum,
                     GroupSums& sums) {
    const bool table = grid.table != nullptr;
    const auto sum = p.weights == nullptr ? (table ? sum_up_lanes<false, true> : sum_up_lanes<false, false>)
                                          : (table ? sum_up_lanes<true, true> : sum_up_lanes<true, false>);
    for (size_t lane = 0; lane < kPanel; lane += kStep)
      sum(from_lane(p, lane), grid, scale + lane, minimum + lane, lane, sums);
  }

  template <bool kWeighted, bool kTable>
  static void sum_up_lanes(const GroupPanel& p, const CodeGrid& grid, const float* scale, const float* minimum,
                           size_t lane, GroupSums& sums) {
    using W = Weighing<kWeighted>;
    const Nearest<kTable> nearest(grid);
    const V m = L::load(minimum), inv = inverse(L::load(scale));
    V sw = L::set(0), sx = sw, se = sw, see = sw, sxe = sw;
    for (size_t i = 0; i < p.size; ++i) {
      const V x = L::load(p.values + i * kPanel), w = W::load(p, i);
      const V e = nearest(L::add(x, m), inv), we = W::times(w, e);
      sw = L::add(sw, w);
      sx = L::mul_add(w, x, sx);
      se = L::add(se, we);
      see = L::mul_add(we, e, see);
      sxe = L::mul_add(we, x, sxe);
    }
    L::store(sw, sums.w + lane);
    L::store(sx, sums.x + lane);
    L::store(se, sums.e + lane);
    L::store(see, sums.ee + lane);
    L::store(sxe, sums.xe + lane);
  }

  static void improve(const GroupPanel& p, const CodeGrid& grid, float low, float high, int rounds, ScaleCodes& codes) {
    const bool weighted = p.weights != nullptr;
    auto run = weighted ? improve_lanes<true, false, true> : improve_lanes<false, false, true>;
    if (grid.table != nullptr)
      run = weighted ? improve_lanes<true, true, false> : improve_lanes<false, true, false>;
    else if (rounds == 0)
      run = weighted ? improve_lanes<true, false, false> : improve_lanes<false, false, false>;
    for (size_t lane = 0; lane < kPanel; lane += kStep) run(from_lane(p, lane), grid, low, high, rounds, lane, codes);
  }

  template <bool kWeighted, bool kTable, bool kMinimum>
  static void improve_lanes(const GroupPanel& p, const CodeGrid& grid, float low, float high, int rounds, size_t lane,
                            ScaleCodes& codes) {
    using W = Weighing<kWeighted>;
    constexpr int kTried = 3;
    const Nearest<kTable> nearest(grid);
    const V zero = L::set(0), scale_unit = L::load(codes.scale_unit + lane);
    const V minimum_unit = L::load(codes.minimum_unit + lane), minimum_inverse = inverse(minimum_unit);
    const V start = L::load(codes.scale + lane), lowest = L::set(low), highest = L::set(high);
    V best = infinity(), best_scale = start, best_minimum = L::load(codes.minimum + lane);
    V s[kTried], n[kTried], ideal[kTried], a[kTried], inv[kTried], sw = zero, sx = zero;
    for (int c = 0; c < kTried; ++c) {
      s[c] = L::min(L::max(L::add(start, L::set(static_cast<float>(c - 1))), lowest), highest);
      n[c] = best_minimum;
      a[c] = L::mul(s[c], scale_unit);
      inv[c] = inverse(a[c]);
    }
    for (int r = 0; r < std::max(rounds, 1); ++r) {
      V m[kTried], se[kTried], error[kTried];
      for (int c = 0; c < kTried; ++c) {
        m[c] = L::mul(n[c], minimum_unit);
        se[c] = error[c] = zero;
      }
      for (size_t i = 0; i < p.size; ++i) {
        const V x = L::load(p.values + i * kPanel), w = W::load(p, i);
        if (kMinimum && r == 0) {
          sw = L::add(sw, w);
          sx = L::mul_add(w, x, sx);
        }
        for (int c = 0; c < kTried; ++c) {
          const V above = kMinimum ? L::add(x, m[c]) : x, e = nearest(above, inv[c]);
          const V off = L::mul_sub(a[c], e, above);
          if (kMinimum) se[c] = L::mul_add(w, e, se[c]);
          error[c] = L::mul_add(W::times(w, off), off, error[c]);
        }
      }
      const V per_weight = inverse(sw);
      for (int c = 0; c < kTried; ++c) {
        const auto better = L::less(error[c], best);
        best = L::select(better, error[c], best);
        best_scale = L::select(better, s[c], best_scale);
        best_minimum = L::select(better, n[c], best_minimum);
        if (!kMinimum) continue;
        if (r == 0) {
          const V least = L::mul(L::mul(L::sub(L::mul(a[c], se[c]), sx), per_weight), minimum_inverse);
          ideal[c] = L::round(least);
        }
        // The best for these codes, then one more and one less, for which the codes are others.
        const float away = r == 0 ? 0.0f : r == 1 ? 1.0f : -1.0f;
        n[c] = L::min(L::max(L::add(ideal[c], L::set(away)), zero), highest);
      }
    }
    L::store(best, codes.error + lane);
    L::store(best_scale, codes.scale + lane);
    L::store(best_minimum, codes.minimum + lane);
  }

  static void codes(const float* groups, size_t size, size_t count, const CodeGrid& grid, const float* scale,
                    const float* minimum, uint8_t* out) {
    const auto run = grid.table == nullptr ? codes_of<false> : codes_of<true>;
    for (size_t g = 0; g < count; ++g) run(groups + g * size, size, grid, scale[g], minimum[g], out + g * size);
  }

  template <bool kTable>
  static void codes_of(const float* values, size_t size, const CodeGrid& grid, float scale, float minimum,
                       uint8_t* out) {
    const Nearest<kTable> nearest(grid);
    const V m = L::set(minimum), inv = inverse(L::set(scale));
    for (size_t i = 0; i < size; i += kStep) L::store_code(nearest.code(L::add(L::load(values + i), m), inv), out + i);
  }

  static constexpr GroupSearch row(std::string_view name) {
    return {.name = name,
            .gather = gather,
            .fit_affine = fit_affine,
            .fit_scale = fit_scale,
            .improve = improve,
            .sum_up = sum_up,
            .codes = codes};
  }
};

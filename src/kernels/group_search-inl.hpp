// Part of group_search.cpp, included once per instruction set; L says how a few lanes are added and compared, so that
// one source gives the same bits with one lane and with many.
template <class L>
struct GroupLoops {
  using V = typename L::V;
  static constexpr size_t kStep = L::kCount;
  static constexpr int kAtOnce = 4;  ///< candidates: enough that the adders are never idle

  static V infinity() { return L::set(std::numeric_limits<float>::infinity()); }

  /// 1 / x, 0 for 0.
  static V inverse(V x) { return L::select(L::equal(x, L::set(0)), L::set(0), L::div(L::set(1), x)); }

  /// The value of the grid nearest to v.
  struct Nearest {
    V low, high;
    const CodeGrid& grid;
    explicit Nearest(const CodeGrid& g) : low(L::set(g.low)), high(L::set(g.high)), grid(g) {}
    V operator()(V v) const {
      return grid.table == nullptr ? L::min(L::max(L::round(v), low), high) : L::lookup(grid.table, find(v));
    }
    /// From 0 on.
    V code(V v) const { return grid.table == nullptr ? L::sub((*this)(v), low) : L::to_float(find(v)); }

    /// How many of the points between neighbours lie below v.
    typename L::I find(V v) const {
      typename L::I at = L::zero_index();
      for (const int step : {8, 4, 2, 1}) at = L::advance(at, step, grid.midpoints, v);
      return at;
    }
  };

  static void fit_affine(const GroupPanel& p, float levels, float first, float step, int steps, float* scale,
                         float* minimum) {
    for (size_t lane = 0; lane < kPanel; lane += kStep)
      fit_affine_lanes({p.values + lane, p.weights + lane, p.size}, levels, first, step, steps, scale + lane,
                       minimum + lane);
  }

  static void fit_affine_lanes(const GroupPanel& p, float levels, float first, float step, int steps, float* scale,
                               float* minimum) {
    V low = L::set(0), high = infinity(), sw = low, sx = low, sxx = low;
    high = L::sub(low, high);
    for (size_t i = 0; i < p.size; ++i) {
      const V x = L::load(p.values + i * kPanel), w = L::load(p.weights + i * kPanel), wx = L::mul(w, x);
      low = L::min(low, x);
      high = L::max(high, x);
      sw = L::add(sw, w);
      sx = L::add(sx, wx);
      sxx = L::mul_add(wx, x, sxx);
    }
    const V span = L::sub(high, low), zero = L::set(0), top = L::set(levels);
    const auto flat = L::less_equal(span, zero);
    V best = infinity(), best_scale = zero, best_minimum = L::sub(zero, low);
    const V down = L::sub(zero, low);
    for (int k = 0; k < steps; k += kAtOnce) {
      V inv[kAtOnce], shift[kAtOnce], se[kAtOnce], see[kAtOnce], sxe[kAtOnce];
      for (int c = 0; c < kAtOnce; ++c) {
        inv[c] = L::select(flat, zero, L::div(L::set(levels + first + static_cast<float>(k + c) * step), span));
        shift[c] = L::mul(down, inv[c]);
        se[c] = see[c] = sxe[c] = zero;
      }
      for (size_t i = 0; i < p.size; ++i) {
        const V x = L::load(p.values + i * kPanel), w = L::load(p.weights + i * kPanel);
        for (int c = 0; c < kAtOnce; ++c) {
          const V e = L::min(L::max(L::round(L::mul_add(x, inv[c], shift[c])), zero), top), we = L::mul(w, e);
          se[c] = L::add(se[c], we);
          see[c] = L::mul_add(we, e, see[c]);
          sxe[c] = L::mul_add(we, x, sxe[c]);
        }
      }
      for (int c = 0; c < kAtOnce; ++c) {
        const V d = L::sub(L::mul(sw, see[c]), L::mul(se[c], se[c])), id = inverse(d);
        V a = L::mul(L::sub(L::mul(sw, sxe[c]), L::mul(sx, se[c])), id);
        V m = L::mul(L::sub(L::mul(se[c], sxe[c]), L::mul(see[c], sx)), id);
        const auto above = L::less(m, zero);
        a = L::select(above, L::mul(sxe[c], inverse(see[c])), a);
        m = L::select(above, zero, m);
        // sum of w (a e - m - x)^2
        const V squares = L::mul_add(L::mul(a, a), see[c], L::mul_add(L::mul(m, m), sw, sxx));
        const V products = L::sub(L::mul(m, sx), L::mul_add(a, sxe[c], L::mul(L::mul(a, m), se[c])));
        const V error = L::mul_add(L::set(2), products, squares);
        const auto better = L::both(L::less(error, best), L::less(zero, d));
        best = L::select(better, error, best);
        best_scale = L::select(better, a, best_scale);
        best_minimum = L::select(better, m, best_minimum);
      }
    }
    L::store(best_scale, scale);
    L::store(best_minimum, minimum);
  }

  static void fit_scale(const GroupPanel& p, const CodeGrid& grid, float first, float step, int steps, float* scale) {
    for (size_t lane = 0; lane < kPanel; lane += kStep)
      fit_scale_lanes({p.values + lane, p.weights + lane, p.size}, grid, first, step, steps, scale + lane);
  }

  static void fit_scale_lanes(const GroupPanel& p, const CodeGrid& grid, float first, float step, int steps,
                              float* scale) {
    const V zero = L::set(0);
    V low = zero, high = zero;
    for (size_t i = 0; i < p.size; ++i) {
      const V x = L::load(p.values + i * kPanel);
      low = L::min(low, x);
      high = L::max(high, x);
    }
    const V extreme = L::select(L::less(high, L::sub(zero, low)), low, high), id = inverse(extreme);
    const Nearest nearest(grid);
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
          const V x = L::load(p.values + i * kPanel), w = L::load(p.weights + i * kPanel), wx = L::mul(w, x);
          for (int c = 0; c < kAtOnce; ++c) {
            const V e = nearest(L::mul(x, inv[c]));
            see[c] = L::mul_add(L::mul(w, e), e, see[c]);
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
    const Nearest nearest(grid);
    for (size_t lane = 0; lane < kPanel; lane += kStep) {
      const V a = L::load(scale + lane), m = L::load(minimum + lane), inv = inverse(a), shift = L::mul(m, inv);
      V sw = L::set(0), sx = sw, se = sw, see = sw, sxe = sw;
      for (size_t i = 0; i < p.size; ++i) {
        const V x = L::load(p.values + i * kPanel + lane), w = L::load(p.weights + i * kPanel + lane);
        const V e = nearest(L::mul_add(x, inv, shift)), we = L::mul(w, e);
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
  }

  static void improve(const GroupPanel& p, const CodeGrid& grid, float low, float high, int rounds, ScaleCodes& codes) {
    for (size_t lane = 0; lane < kPanel; lane += kStep)
      improve_lanes({p.values + lane, p.weights + lane, p.size}, grid, low, high, rounds, lane, codes);
  }

  static void improve_lanes(const GroupPanel& p, const CodeGrid& grid, float low, float high, int rounds, size_t lane,
                            ScaleCodes& codes) {
    constexpr int kTried = 3;
    const Nearest nearest(grid);
    const V zero = L::set(0), scale_unit = L::load(codes.scale_unit + lane);
    const V minimum_unit = L::load(codes.minimum_unit + lane), minimum_inverse = inverse(minimum_unit);
    const V start = L::load(codes.scale + lane), lowest = L::set(low), highest = L::set(high);
    V best = infinity(), best_scale = start, best_minimum = L::load(codes.minimum + lane);
    V s[kTried], n[kTried], a[kTried], inv[kTried], sw = zero, sx = zero;
    for (int c = 0; c < kTried; ++c) {
      s[c] = L::min(L::max(L::add(start, L::set(static_cast<float>(c - 1))), lowest), highest);
      n[c] = best_minimum;
      a[c] = L::mul(s[c], scale_unit);
      inv[c] = inverse(a[c]);
    }
    for (int r = 0; r < rounds; ++r) {
      V m[kTried], shift[kTried], se[kTried], error[kTried];
      for (int c = 0; c < kTried; ++c) {
        m[c] = L::mul(n[c], minimum_unit);
        shift[c] = L::mul(m[c], inv[c]);
        se[c] = error[c] = zero;
      }
      for (size_t i = 0; i < p.size; ++i) {
        const V x = L::load(p.values + i * kPanel), w = L::load(p.weights + i * kPanel);
        if (r == 0) {
          sw = L::add(sw, w);
          sx = L::mul_add(w, x, sx);
        }
        for (int c = 0; c < kTried; ++c) {
          const V e = nearest(L::mul_add(x, inv[c], shift[c]));
          const V off = L::sub(L::mul_add(a[c], e, L::sub(zero, m[c])), x);
          se[c] = L::mul_add(w, e, se[c]);
          error[c] = L::mul_add(L::mul(w, off), off, error[c]);
        }
      }
      const V per_weight = inverse(sw);
      for (int c = 0; c < kTried; ++c) {
        const auto better = L::less(error[c], best);
        best = L::select(better, error[c], best);
        best_scale = L::select(better, s[c], best_scale);
        best_minimum = L::select(better, n[c], best_minimum);
        const V ideal = L::mul(L::mul(L::sub(L::mul(a[c], se[c]), sx), per_weight), minimum_inverse);
        n[c] = L::min(L::max(L::round(ideal), zero), highest);
      }
    }
    L::store(best, codes.error + lane);
    L::store(best_scale, codes.scale + lane);
    L::store(best_minimum, codes.minimum + lane);
  }

  static void codes(const GroupPanel& p, const CodeGrid& grid, const float* scale, const float* minimum, uint8_t* out) {
    const Nearest nearest(grid);
    for (size_t lane = 0; lane < kPanel; lane += kStep) {
      const V a = L::load(scale + lane), m = L::load(minimum + lane), inv = inverse(a), shift = L::mul(m, inv);
      for (size_t i = 0; i < p.size; ++i) {
        const V x = L::load(p.values + i * kPanel + lane);
        L::store_code(nearest.code(L::mul_add(x, inv, shift)), out + i * kPanel + lane);
      }
    }
  }

  static constexpr GroupSearch row(std::string_view name) {
    return {.name = name,
            .fit_affine = fit_affine,
            .fit_scale = fit_scale,
            .improve = improve,
            .sum_up = sum_up,
            .codes = codes};
  }
};

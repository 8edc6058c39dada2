// Part of group_search.cpp, included once per instruction set; L says how a few lanes are added and compared, so that
// one source gives the same bits with one lane and with many.
template <class L>
struct GroupLoops {
  using V = typename L::V;
  static constexpr size_t kStep = L::kCount;

  static V infinity() { return L::set(std::numeric_limits<float>::infinity()); }

  /// 1 / x, 0 for 0.
  static V inverse(V x) {
    return L::select(L::equal(x, L::set(0)), L::set(0), L::div(L::set(1), x));
  }

  /// The value of the grid nearest to v.
  struct Nearest {
    V low, high;
    const CodeGrid& grid;
    explicit Nearest(const CodeGrid& g) : low(L::set(g.low)), high(L::set(g.high)), grid(g) {}
    V operator()(V v) const {
      if (grid.table == nullptr) return L::min(L::max(L::round(v), low), high);
      V e = L::set(grid.table[0]);
      for (size_t i = 0; i < 15; ++i)
        e = L::select(L::less(L::set(grid.midpoints[i]), v), L::set(grid.table[i + 1]), e);
      return e;
    }
    /// From 0 on.
    V code(V v) const {
      if (grid.table == nullptr) return L::sub((*this)(v), low);
      V code = L::set(0);
      for (size_t i = 0; i < 15; ++i)
        code = L::select(L::less(L::set(grid.midpoints[i]), v), L::set(static_cast<float>(i + 1)), code);
      return code;
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
    for (int k = 0; k < steps; ++k) {
      const V inv = L::select(flat, zero, L::div(L::set(levels + first + static_cast<float>(k) * step), span));
      V se = zero, see = zero, sxe = zero;
      const V shift = L::mul(L::sub(zero, low), inv);
      for (size_t i = 0; i < p.size; ++i) {
        const V x = L::load(p.values + i * kPanel), w = L::load(p.weights + i * kPanel);
        const V e = L::min(L::max(L::round(L::mul_add(x, inv, shift)), zero), top), we = L::mul(w, e);
        se = L::add(se, we);
        see = L::mul_add(we, e, see);
        sxe = L::mul_add(we, x, sxe);
      }
      const V d = L::sub(L::mul(sw, see), L::mul(se, se)), id = inverse(d);
      V a = L::mul(L::sub(L::mul(sw, sxe), L::mul(sx, se)), id);
      V m = L::mul(L::sub(L::mul(se, sxe), L::mul(see, sx)), id);
      const auto above = L::less(m, zero);
      a = L::select(above, L::mul(sxe, inverse(see)), a);
      m = L::select(above, zero, m);
      // sum of w (a e - m - x)^2
      const V squares = L::mul_add(L::mul(a, a), see, L::mul_add(L::mul(m, m), sw, sxx));
      const V products = L::sub(L::mul(m, sx), L::mul_add(a, sxe, L::mul(L::mul(a, m), se)));
      const V error = L::mul_add(L::set(2), products, squares);
      const auto better = L::both(L::less(error, best), L::less(zero, d));
      best = L::select(better, error, best);
      best_scale = L::select(better, a, best_scale);
      best_minimum = L::select(better, m, best_minimum);
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
      for (int k = 0; k < steps; ++k) {
        const float stretch = first + static_cast<float>(k) * step;
        const V inv = L::mul(L::set(end + (end < 0 ? -stretch : stretch)), id);
        V see = zero, sxe = zero;
        for (size_t i = 0; i < p.size; ++i) {
          const V x = L::load(p.values + i * kPanel), w = L::load(p.weights + i * kPanel);
          const V e = nearest(L::mul(x, inv)), we = L::mul(w, e);
          see = L::mul_add(we, e, see);
          sxe = L::mul_add(we, x, sxe);
        }
        const V a = L::mul(sxe, inverse(see)), gain = L::mul(a, sxe);
        const auto better = L::less(best, gain);
        best = L::select(better, gain, best);
        best_scale = L::select(better, a, best_scale);
      }
    L::store(best_scale, scale);
  }

  static void evaluate(const GroupPanel& p, const CodeGrid& grid, const float* scale, const float* minimum,
                       GroupSums& sums) {
    const Nearest nearest(grid);
    for (size_t lane = 0; lane < kPanel; lane += kStep) {
      const V a = L::load(scale + lane), m = L::load(minimum + lane), inv = inverse(a), shift = L::mul(m, inv);
      V se = L::set(0), see = se, sxe = se, error = se;
      for (size_t i = 0; i < p.size; ++i) {
        const V x = L::load(p.values + i * kPanel + lane), w = L::load(p.weights + i * kPanel + lane);
        const V e = nearest(L::mul_add(x, inv, shift)), we = L::mul(w, e);
        const V off = L::sub(L::sub(L::mul(a, e), m), x);
        se = L::add(se, we);
        see = L::mul_add(we, e, see);
        sxe = L::mul_add(we, x, sxe);
        error = L::mul_add(L::mul(w, off), off, error);
      }
      L::store(se, sums.e + lane);
      L::store(see, sums.ee + lane);
      L::store(sxe, sums.xe + lane);
      L::store(error, sums.error + lane);
    }
  }

  static void codes(const GroupPanel& p, const CodeGrid& grid, const float* scale, const float* minimum,
                    uint8_t* out) {
    const Nearest nearest(grid);
    float lanes[kPanel];
    for (size_t i = 0; i < p.size; ++i) {
      for (size_t lane = 0; lane < kPanel; lane += kStep) {
        const V a = L::load(scale + lane), m = L::load(minimum + lane), inv = inverse(a), shift = L::mul(m, inv);
        L::store(nearest.code(L::mul_add(L::load(p.values + i * kPanel + lane), inv, shift)), lanes + lane);
      }
      for (size_t lane = 0; lane < kPanel; ++lane) out[i * kPanel + lane] = static_cast<uint8_t>(lanes[lane]);
    }
  }

  static constexpr GroupSearch row(std::string_view name) {
    return {.name = name, .fit_affine = fit_affine, .fit_scale = fit_scale, .evaluate = evaluate, .codes = codes};
  }
};

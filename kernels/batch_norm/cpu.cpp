// Batch norm by its own statistics on a CPU, float32: of images [B C P], whose numbers of a channel lie together ("planes"), or of
// rows [R C], of which a mask may count some, and which images are too that lie channels last.
//
// Sums run over chunks that fit a cache, in float32, and chunks are combined in double precision and in order: no result depends on
// how many threads there are, and a mean of 10^6 equal numbers is off by a rounding or ten.
#include <cmath>
#include <cstdint>
#include <vector>

#include "../lanes.h"
#include "../parallel.h"

namespace {

using Floats = Vector<float>;
constexpr int64_t kLanes = Lanes<float>::n;
constexpr int64_t kNumbers = 2048;      // of a channel that are added up in float32
constexpr int64_t kRows = 64;           // likewise, one after the other
constexpr int64_t kUnit = 1 << 15;      // floats of rows that one thread takes at a time
constexpr int64_t kOfThread = 1 << 15;  // floats for which another thread pays

int64_t threads_for(int64_t floats, int64_t threads) { return std::min(threads, 1 + floats / kOfThread); }

inline Floats first(Floats x, int64_t count) {
  for (int64_t l = count; l < kLanes; ++l) x[l] = 0;
  return x;
}

inline double sum_of(const Floats (&x)[4]) {
  const Floats four = (x[0] + x[1]) + (x[2] + x[3]);
  float sum = 0;
  for (int64_t l = 0; l < kLanes; ++l) sum += four[l];
  return sum;
}

// f(where, how many, k) for the vectors of `count` numbers, the last of which may be cut; k: 0 .. 3 in turns.
template <class F>
inline void vectors(int64_t count, F f) {
  int64_t at = 0;
  for (; at + 4 * kLanes <= count; at += 4 * kLanes)
    for (int k = 0; k < 4; ++k) f(at + k * kLanes, kLanes, k);
  for (; at < count; at += kLanes) f(at, std::min(kLanes, count - at), 0);
}

// Number, mean, and sum of squares around it, of what there was so far (Chan, Golub & LeVeque 1979).
inline void add(double n, double mean, double squares, double count, double& all_mean, double& all_squares) {
  const double far = mean - all_mean, all = count + n;
  all_mean += far * n / all;
  all_squares += squares + far * far * count * n / all;
}

// What becomes of a channel's numbers: y = (x - mean) scale + bias.
struct Channel {
  float mean, scale, bias;
};
inline Channel channel(float mean, float var, float weight, float bias, float eps) {
  return {mean, weight / std::sqrt(var + eps), bias};
}
inline Floats normalised(Floats x, Floats mean, Floats scale, Floats bias) { return fused<float>(x - mean, scale, bias); }
inline Floats relu(Floats y) { return y < 0.0f ? Floats{} : y; }  // NaN stays
inline Floats let_through(Floats grad, Floats y) { return y <= 0.0f ? Floats{} : grad; }

// One call: x is [B C P], or [R C] with R = B P where `rows`. mask [R] float or null.
struct Call {
  const float *x, *weight, *bias, *mask;
  int64_t B, C, P, rows, relu;
  float eps;
  int64_t threads;

  int64_t numbers() const { return B * C * P; }
  int64_t height() const { return std::max<int64_t>(1, kUnit / C); }  // rows of a unit
  int64_t units() const { return (B * P + height() - 1) / height(); }
  bool counts(int64_t row) const { return mask == nullptr || mask[row] != 0; }
};

// ---------------------------------------------------------------------------------------------------------------- planes

void moments_of_planes(const Call& call, float* mean, float* var) {
  parallel(call.C, threads_for(call.numbers(), call.threads), [&](int64_t c) {
    double count = 0, all_mean = 0, all_squares = 0;
    for (int64_t b = 0; b < call.B; ++b)
      for (int64_t from = 0; from < call.P; from += kNumbers) {
        const int64_t n = std::min(kNumbers, call.P - from);
        const float* x = call.x + (b * call.C + c) * call.P + from;
        Floats sums[4] = {}, squares[4] = {};
        vectors(n, [&](int64_t at, int64_t some, int k) { sums[k] += load<float>(x + at, some); });
        const double own = sum_of(sums) / double(n);
        const Floats middle = all(float(own));
        vectors(n, [&](int64_t at, int64_t some, int k) {
          const Floats far = first(load<float>(x + at, some) - middle, some);
          squares[k] = fused<float>(far, far, squares[k]);
        });
        add(n, own, sum_of(squares), count, all_mean, all_squares);
        count += n;
      }
    mean[c] = all_mean;
    var[c] = all_squares / std::max(count, 1.0);
  });
}

void normalise_planes(const Call& call, const float* mean, const float* var, float* y) {
  parallel(call.B * call.C, threads_for(call.numbers(), call.threads), [&](int64_t plane) {
    const int64_t c = plane % call.C;
    const Channel of = channel(mean[c], var[c], call.weight[c], call.bias[c], call.eps);
    const Floats middle = all(of.mean), scale = all(of.scale), bias = all(of.bias);
    const float* x = call.x + plane * call.P;
    vectors(call.P, [&](int64_t at, int64_t some, int) {
      const Floats made = normalised(load<float>(x + at, some), middle, scale, bias);
      store<float>(y + plane * call.P + at, call.relu ? relu(made) : made, some);
    });
  });
}

void gradients_of_planes(const Call& call, const float* mean, const float* var, const float* grad, float* of_x,
                         float* of_weight, float* of_bias) {
  parallel(call.C, threads_for(call.numbers(), call.threads), [&](int64_t c) {
    const Channel of = channel(mean[c], var[c], call.weight[c], call.relu ? call.bias[c] : 0, call.eps);
    const float rstd = 1 / std::sqrt(var[c] + call.eps);
    const Floats middle = all(of.mean), scale = all(of.scale), bias = all(of.bias), by = all(rstd);
    auto slope = [&](const float* x, const float* dy, int64_t some, Floats& h) {
      const Floats far = load<float>(x, some) - middle, g = load<float>(dy, some);
      h = far * by;
      return call.relu ? let_through(g, fused<float>(far, scale, bias)) : g;
    };
    double sum = 0, product = 0;
    for (int64_t b = 0; b < call.B; ++b)
      for (int64_t from = 0; from < call.P; from += kNumbers) {
        const int64_t start = (b * call.C + c) * call.P + from;
        Floats sums[4] = {}, products[4] = {}, h;
        vectors(std::min(kNumbers, call.P - from), [&](int64_t at, int64_t some, int k) {
          const Floats g = slope(call.x + start + at, grad + start + at, some, h);
          sums[k] += g;  // 0 beyond the last number, as the gradient is loaded
          products[k] = fused<float>(g, h, products[k]);
        });
        sum += sum_of(sums);
        product += sum_of(products);
      }
    of_bias[c] = sum;
    of_weight[c] = product;
    const double count = std::max<double>(call.B * call.P, 1);
    const Floats level = all(float(sum / count)), tilt = all(float(product / count));
    for (int64_t b = 0; b < call.B; ++b) {
      const int64_t start = (b * call.C + c) * call.P;
      Floats h;
      vectors(call.P, [&](int64_t at, int64_t some, int) {
        const Floats g = slope(call.x + start + at, grad + start + at, some, h);
        store<float>(of_x + start + at, fused<float>(-h, tilt, g - level) * scale, some);
      });
    }
  });
}

// ------------------------------------------------------------------------------------------------------------------ rows

// Two numbers a channel of every unit, in double precision: work(unit, its first row, the row behind its last, numbers [2 C]); then
// join(unit, numbers) in order.
template <class Work, class Join>
void reduce_rows(const Call& call, Work work, Join join) {
  std::vector<double> made(call.units() * 2 * call.C);
  parallel(call.units(), threads_for(call.numbers(), call.threads), [&](int64_t unit) {
    const int64_t from = unit * call.height();
    work(unit, from, std::min(from + call.height(), call.B * call.P), made.data() + unit * 2 * call.C);
  });
  for (int64_t unit = 0; unit < call.units(); ++unit) join(unit, made.data() + unit * 2 * call.C);
}

// f(rows that count, their number, at most kRows) of rows from .. end.
template <class F>
void counted(const Call& call, int64_t from, int64_t end, F f) {
  int64_t some[kRows], n = 0;
  for (int64_t row = from; row < end; ++row) {
    if (call.counts(row)) some[n++] = row;
    if (n == kRows || (n > 0 && row + 1 == end)) {
      f(some, n);
      n = 0;
    }
  }
}

void moments_of_rows(const Call& call, float* mean, float* var) {
  const int64_t C = call.C;
  std::vector<double> counts(call.units()), means(C), squares(C);
  auto work = [&](int64_t unit, int64_t from, int64_t end, double* made) {
    counted(call, from, end, [&](const int64_t* some, int64_t n) {
      vectors(C, [&](int64_t c, int64_t lanes, int) {
        Floats sum = {}, square = {};
        for (int64_t i = 0; i < n; ++i) sum += load<float>(call.x + some[i] * C + c, lanes);
        const Floats own = sum / float(n);
        for (int64_t i = 0; i < n; ++i) {
          const Floats far = load<float>(call.x + some[i] * C + c, lanes) - own;
          square = fused<float>(far, far, square);
        }
        for (int64_t l = 0; l < lanes; ++l)
          add(n, double(sum[l]) / n, square[l], counts[unit], made[c + l], made[C + c + l]);
      });
      counts[unit] += n;
    });
  };
  double count = 0;
  reduce_rows(call, work, [&](int64_t unit, const double* made) {
    if (counts[unit] == 0) return;
    for (int64_t c = 0; c < C; ++c) add(counts[unit], made[c], made[C + c], count, means[c], squares[c]);
    count += counts[unit];
  });
  for (int64_t c = 0; c < C; ++c) {
    mean[c] = means[c];
    var[c] = squares[c] / std::max(count, 1.0);
  }
}

// f(row, whether it counts) for all rows.
template <class F>
void every_row(const Call& call, F f) {
  parallel(call.units(), threads_for(call.numbers(), call.threads), [&](int64_t unit) {
    const int64_t from = unit * call.height(), end = std::min(from + call.height(), call.B * call.P);
    for (int64_t row = from; row < end; ++row) f(row, call.counts(row));
  });
}

std::vector<float> of_channels(const Call& call, const float* var, bool weighted) {
  std::vector<float> made(call.C);
  for (int64_t c = 0; c < call.C; ++c) made[c] = (weighted ? call.weight[c] : 1.0f) / std::sqrt(var[c] + call.eps);
  return made;
}

void normalise_rows(const Call& call, const float* mean, const float* var, float* y) {
  const std::vector<float> scale = of_channels(call, var, true);
  every_row(call, [&](int64_t row, bool counts) {
    vectors(call.C, [&](int64_t c, int64_t some, int) {
      const Floats x = load<float>(call.x + row * call.C + c, some);
      const Floats made = normalised(x, load<float>(mean + c, some), load<float>(scale.data() + c, some),
                                     load<float>(call.bias + c, some));
      store<float>(y + row * call.C + c, !counts ? Floats{} : call.relu ? relu(made) : made, some);
    });
  });
}

void gradients_of_rows(const Call& call, const float* mean, const float* var, const float* grad, float* of_x,
                       float* of_weight, float* of_bias) {
  const int64_t C = call.C;
  const std::vector<float> scale = of_channels(call, var, true), rstd = of_channels(call, var, false);
  auto slope = [&](int64_t row, int64_t c, int64_t some, Floats& h) {
    const Floats far = load<float>(call.x + row * C + c, some) - load<float>(mean + c, some);
    const Floats g = load<float>(grad + row * C + c, some);
    h = far * load<float>(rstd.data() + c, some);
    if (!call.relu) return g;
    return let_through(g, fused<float>(far, load<float>(scale.data() + c, some), load<float>(call.bias + c, some)));
  };
  std::vector<double> sums(C), products(C), counts(call.units());
  auto work = [&](int64_t unit, int64_t from, int64_t end, double* made) {
    counted(call, from, end, [&](const int64_t* some, int64_t n) {
      vectors(C, [&](int64_t c, int64_t lanes, int) {
        Floats sum = {}, product = {}, h;
        for (int64_t i = 0; i < n; ++i) {
          const Floats g = slope(some[i], c, lanes, h);
          sum += g;
          product = fused<float>(g, h, product);
        }
        for (int64_t l = 0; l < lanes; ++l) made[c + l] += sum[l], made[C + c + l] += product[l];
      });
      counts[unit] += n;
    });
  };
  double count = 0;
  reduce_rows(call, work, [&](int64_t unit, const double* made) {
    for (int64_t c = 0; c < C; ++c) sums[c] += made[c], products[c] += made[C + c];
    count += counts[unit];
  });
  std::vector<float> level(C), tilt(C);
  for (int64_t c = 0; c < C; ++c) {
    of_bias[c] = sums[c];
    of_weight[c] = products[c];
    level[c] = sums[c] / std::max(count, 1.0);
    tilt[c] = products[c] / std::max(count, 1.0);
  }
  every_row(call, [&](int64_t row, bool counts) {
    vectors(C, [&](int64_t c, int64_t some, int) {
      Floats h;
      const Floats g = slope(row, c, some, h);
      const Floats made =
          fused<float>(-h, load<float>(tilt.data() + c, some), g - load<float>(level.data() + c, some));
      store<float>(of_x + row * C + c, counts ? made * load<float>(scale.data() + c, some) : Floats{}, some);
    });
  });
}

}  // namespace

// x [B C P] or, where `rows`, [B P C]; mask [B P] or null; weight, bias, mean and var [C], bias null in a gradient without ReLU.
// Sizes: B, C, P, rows, relu.
extern "C" int64_t batch_norm_forward(const float* x, const float* weight, const float* bias, const float* mask,
                                      const float* eps, const int64_t* sizes, float* y, float* mean, float* var, int64_t threads) try {
  const Call call = {x, weight, bias, mask, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], *eps, threads};
  (call.rows ? moments_of_rows : moments_of_planes)(call, mean, var);
  (call.rows ? normalise_rows : normalise_planes)(call, mean, var, y);
  return 0;
}
CATCH_OUT_OF_MEMORY

extern "C" int64_t batch_norm_backward(const float* grad, const float* x, const float* weight, const float* mean,
                                       const float* var, const float* bias, const float* mask, const float* eps,
                                       const int64_t* sizes, float* of_x, float* of_weight, float* of_bias,
                                       int64_t threads) try {
  const Call call = {x, weight, bias, mask, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], *eps, threads};
  (call.rows ? gradients_of_rows : gradients_of_planes)(call, mean, var, grad, of_x, of_weight, of_bias);
  return 0;
}
CATCH_OUT_OF_MEMORY

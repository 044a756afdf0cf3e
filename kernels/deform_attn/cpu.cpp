// deform_attn on a CPU: weighted bilinear samples per query and head, and their gradient.
//
// The pixels of one image and head are copied into a plane of whole vectors, each level with a border of zeros: a sample
// is then four aligned reads without a branch, and one outside reads the zeros behind the last level.
//
// Forward, a piece of work is a block of queries. Backward, it is one image and head, whose plane of gradients belongs to
// one thread: a pixel's gradient is summed in one order (query, level, point), whatever the number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "../parallel.h"

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kMost = 4;  // of a vector; vectors of a sample that are summed in registers
#elif defined(__AVX__)
constexpr int kBytes = 32, kMost = 3;
#else
constexpr int kBytes = 16, kMost = 4;
#endif
constexpr int64_t kBlock = 64;  // queries

template <class T>
struct Lanes {
  static constexpr int64_t n = kBytes / int64_t(sizeof(T));
  typedef T Vector __attribute__((vector_size(kBytes)));
  typedef T Unaligned __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
  struct Line {  // one aligned vector, as an element of an array
    Vector v;
  };
};
template <class T>
using Vector = typename Lanes<T>::Vector;
template <class T>
using Line = typename Lanes<T>::Line;
template <class T>
using Lines = std::unique_ptr<Line<T>[]>;

template <class T>
inline Vector<T> all(T x) {
  return x - Vector<T>{};
}
template <class T>
inline void store(T* to, Vector<T> x) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(to) = x;
}

// a * b + c; the shared flags forbid the compiler to fuse it, since positions must round as torch's do.
template <class T>
inline Vector<T> fused(Vector<T> a, Vector<T> b, Vector<T> c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return (Vector<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  if constexpr (std::is_same_v<T, float>) return (Vector<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
  return a * b + c;
}

// to[i] += sum of the lanes of x[i], four at once.
template <class T>
inline void add_sums(const Vector<T>* x, T* to) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    const auto pairs = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
    const __m512d p = (__m512d)pairs((__m512)x[0], (__m512)x[1]), q = (__m512d)pairs((__m512)x[2], (__m512)x[3]);
    const __m512 each = _mm512_add_ps((__m512)_mm512_unpacklo_pd(p, q), (__m512)_mm512_unpackhi_pd(p, q));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(each), (__m256)_mm512_extractf64x4_pd((__m512d)each, 1));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sums));
    return;
  }
#elif defined(__AVX__)
  if constexpr (std::is_same_v<T, float>) {
    const __m256 p = _mm256_hadd_ps((__m256)x[0], (__m256)x[1]), q = _mm256_hadd_ps((__m256)x[2], (__m256)x[3]);
    const __m256 each = _mm256_hadd_ps(p, q);
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(each), _mm256_extractf128_ps(each, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sums));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i)
    for (int64_t l = 0; l < Lanes<T>::n; ++l) to[i] += x[i][l];
}

struct Level {
  int64_t height, width;
  int64_t pixel;  // its first one in value
  int64_t place;  // its first one, of the border, in a plane
  int64_t row() const { return width + 2; }
};

struct Size {  // as cpu.py passes it
  int64_t B, Q, h, d, P;
  std::vector<Level> levels;
  int64_t S = 0, pixels = 0;  // of value and of a plane
  int64_t nowhere = 0;        // in a plane: zeros for a sample outside

  explicit Size(const int64_t* numbers) : B(numbers[0]), Q(numbers[1]), h(numbers[2]), d(numbers[3]), P(numbers[4]) {
    int64_t widest = 0;
    for (int64_t l = 0; l < numbers[5]; ++l) {
      const int64_t height = numbers[6 + 2 * l], width = numbers[7 + 2 * l];
      levels.push_back({height, width, S, nowhere});
      S += height * width;
      nowhere += (height + 2) * (width + 2);
      widest = std::max(widest, width);
    }
    pixels = nowhere + widest + 4;
  }
  int64_t taps() const { return int64_t(levels.size()) * P; }
  int64_t blocks() const { return (Q + kBlock - 1) / kBlock; }
  template <class T>
  int64_t vectors() const { return (d + Lanes<T>::n - 1) / Lanes<T>::n; }
  template <class T>
  int64_t plane() const { return pixels * vectors<T>(); }
};

// The samples of one query and head.
template <class T>
struct Taps {
  std::vector<int32_t> place;  // in a plane, of the pixel above and to the left
  std::vector<T> y, x;         // how far the sample is from it
  std::vector<T> share[4];     // (y0 x0), (y0 x1), (y1 x0), (y1 x1): bilinear weight times the sample's own

  explicit Taps(const Size& s) : place(s.taps()), y(s.taps()), x(s.taps()) {
    for (auto& part : share) part.resize(s.taps());
  }

  // False if all of them are outside.
  bool read(const Size& s, const T* locations, const T* weights) {
    int32_t any = 0;
    for (size_t l = 0; l < s.levels.size(); ++l)
      any |= read_level(s.levels[l], int32_t(s.nowhere), s.P, l * s.P, locations + 2 * l * s.P, weights + l * s.P);
    return any;
  }

 private:
  // Two loops without a branch, so that the compiler makes vectors of them.
  int32_t read_level(const Level& level, int32_t nowhere, int64_t P, int64_t first, const T* locations, const T* weights) {
    int32_t *to_place = place.data() + first, any = 0;
    T *to_y = y.data() + first, *to_x = x.data() + first;
    T *a = share[0].data() + first, *b = share[1].data() + first;
    T *c = share[2].data() + first, *e = share[3].data() + first;
    const T height = T(level.height), width = T(level.width);
    const int32_t row_step = int32_t(level.row()), origin = int32_t(level.place) + row_step + 1;
#pragma GCC ivdep
    for (int64_t t = 0; t < P; ++t) {
      const T px = locations[2 * t] * width - T(0.5), py = locations[2 * t + 1] * height - T(0.5);
      const int32_t here = (px > -1) & (px < width) & (py > -1) & (py < height);  // 0 for NaN
      to_x[t] = here ? px : T(0);  // an integer can hold it
      to_y[t] = here ? py : T(0);
      to_place[t] = here;
      any |= here;
    }
#pragma GCC ivdep
    for (int64_t t = 0; t < P; ++t) {
      int32_t column = int32_t(to_x[t]), row = int32_t(to_y[t]);
      column -= T(column) > to_x[t];
      row -= T(row) > to_y[t];
      const T x = to_x[t] - T(column), y = to_y[t] - T(row), own = weights[t];
      const int32_t at = origin + row * row_step + column;
      to_place[t] = to_place[t] ? at : nowhere;
      to_x[t] = x;
      to_y[t] = y;
      a[t] = (1 - y) * (1 - x) * own;
      b[t] = (1 - y) * x * own;
      c[t] = y * (1 - x) * own;
      e[t] = y * x * own;
    }
    return any;
  }
};

// One image and head of value [S][h][d] -> plane [pixels][vectors], of which the caller has cleared what is not a pixel.
template <class T>
void read_plane(const Size& s, const T* value, Line<T>* plane) {
  const int64_t padded = s.vectors<T>() * Lanes<T>::n;
  for (const Level& level : s.levels)
    for (int64_t row = 0; row < level.height; ++row) {
      const T* from = value + (level.pixel + row * level.width) * s.h * s.d;
      T* to = reinterpret_cast<T*>(plane) + (level.place + (row + 1) * level.row() + 1) * padded;
      for (int64_t column = 0; column < level.width; ++column, from += s.h * s.d, to += padded) std::copy_n(from, s.d, to);
    }
}

template <class T>
void write_plane(const Size& s, const Line<T>* plane, T* value) {
  const int64_t padded = s.vectors<T>() * Lanes<T>::n;
  for (const Level& level : s.levels)
    for (int64_t row = 0; row < level.height; ++row) {
      const T* from = reinterpret_cast<const T*>(plane) + (level.place + (row + 1) * level.row() + 1) * padded;
      T* to = value + (level.pixel + row * level.width) * s.h * s.d;
      for (int64_t column = 0; column < level.width; ++column, from += padded, to += s.h * s.d) std::copy_n(from, s.d, to);
    }
}

template <class T>
void clear(const Size& s, Line<T>* plane) {
  std::memset(static_cast<void*>(plane), 0, size_t(s.plane<T>()) * sizeof(Line<T>));
}

// ---------------------------------------------------------------------------------------------------------- forward

// Overwrites NV vectors of out with the sum of the samples' vectors first .. first + NV - 1.
template <class T, int NV>
void sum_samples(const Size& s, const Line<T>* plane, const Taps<T>& taps, int64_t first, T* out) {
  const int64_t vectors = s.vectors<T>();
  Vector<T> upper[NV] = {}, lower[NV] = {};
  for (size_t l = 0; l < s.levels.size(); ++l) {
    const int64_t below = s.levels[l].row() * vectors, end = int64_t(l + 1) * s.P;
    for (int64_t t = end - s.P; t < end; ++t) {
      const Line<T>* a = plane + taps.place[t] * vectors + first;
      const Line<T>*b = a + vectors, *c = a + below, *e = c + vectors;
      const Vector<T> wa = all(taps.share[0][t]), wb = all(taps.share[1][t]);
      const Vector<T> wc = all(taps.share[2][t]), we = all(taps.share[3][t]);
      for (int v = 0; v < NV; ++v) {
        upper[v] = fused<T>(wb, b[v].v, fused<T>(wa, a[v].v, upper[v]));
        lower[v] = fused<T>(we, e[v].v, fused<T>(wc, c[v].v, lower[v]));
      }
    }
  }
  for (int v = 0; v < NV; ++v) store<T>(out + v * Lanes<T>::n, upper[v] + lower[v]);
}

// --------------------------------------------------------------------------------------------------------- backward

// Adds to the samples' vectors first .. first + NV - 1 of grad_plane, and to dots [taps][4] what these vectors' corners
// times grad, the gradient of the query's result, come to.
template <class T, int NV>
void spread_samples(const Size& s, const Line<T>* plane, const Taps<T>& taps, int64_t first, const Line<T>* grad,
                    Line<T>* grad_plane, T* dots) {
  const int64_t vectors = s.vectors<T>();
  Vector<T> g[NV];
  for (int v = 0; v < NV; ++v) g[v] = grad[first + v].v;
  for (size_t l = 0; l < s.levels.size(); ++l) {
    const int64_t below = s.levels[l].row() * vectors, corner[4] = {0, vectors, below, below + vectors};
    const int64_t end = int64_t(l + 1) * s.P;
    for (int64_t t = end - s.P; t < end; ++t) {
      const int64_t at = taps.place[t] * vectors + first;
      Vector<T> product[4];
      for (int i = 0; i < 4; ++i) {
        const Line<T>* from = plane + at + corner[i];
        Line<T>* to = grad_plane + at + corner[i];
        const Vector<T> share = all(taps.share[i][t]);
        product[i] = g[0] * from[0].v;
        for (int v = 1; v < NV; ++v) product[i] = fused<T>(g[v], from[v].v, product[i]);
        for (int v = 0; v < NV; ++v) to[v].v = fused<T>(share, g[v], to[v].v);
      }
      add_sums<T>(product, dots + 4 * t);
    }
  }
}

// dots [taps][4] -> gradients of the locations [taps][2] and weights [taps].
template <class T>
void finish(const Size& s, const Taps<T>& taps, const T* dots, const T* weights, T* __restrict grad_locations,
            T* __restrict grad_weights) {
  for (size_t l = 0; l < s.levels.size(); ++l) {
    const T height = T(s.levels[l].height), width = T(s.levels[l].width);
    const int64_t end = int64_t(l + 1) * s.P;
    const T *ys = taps.y.data(), *xs = taps.x.data();
    for (int64_t t = end - s.P; t < end; ++t) {
      const T a = dots[4 * t], b = dots[4 * t + 1], c = dots[4 * t + 2], e = dots[4 * t + 3], y = ys[t], x = xs[t];
      const T upper = a * (1 - x) + b * x, lower = c * (1 - x) + e * x, right = (b - a) * (1 - y) + (e - c) * y;
      grad_weights[t] = upper * (1 - y) + lower * y;
      grad_locations[2 * t] = right * weights[t] * width;
      grad_locations[2 * t + 1] = (lower - upper) * weights[t] * height;
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------

// work(first, the same as a type) for runs of at most kMost of the vectors of a sample.
template <class T, class Work>
inline void for_runs(const Size& s, Work work) {
  for (int64_t first = 0, vectors = s.vectors<T>(); first < vectors; first += kMost) switch (vectors - first) {
      case 1: work(first, std::integral_constant<int, 1>{}); break;
      case 2: work(first, std::integral_constant<int, 2>{}); break;
      case 3: work(first, std::integral_constant<int, 3>{}); break;
      default: work(first, std::integral_constant<int, kMost>{});
    }
}

template <class T>
void forward(const T* value, const T* locations, const T* weights, const bool* mask, T* out, const Size& s, int64_t threads) {
  const int64_t plane = s.plane<T>(), width = s.h * s.d, taps_of_row = s.h * s.taps();
  const Lines<T> planes(new Line<T>[s.B * s.h * plane]);
  parallel(s.B * s.h, threads, [&](int64_t unit) {
    Line<T>* to = planes.get() + unit * plane;
    clear<T>(s, to);
    read_plane<T>(s, value + unit / s.h * s.S * width + unit % s.h * s.d, to);
  });
  parallel_workers(s.B * s.blocks(), threads, [&] {
    // A head's last vector reaches into the next head's, which is written after it.
    return [&, taps = Taps<T>(s), row = std::vector<T>(width + kMost * Lanes<T>::n)](int64_t unit) mutable {
      const int64_t b = unit / s.blocks(), first = unit % s.blocks() * kBlock;
      for (int64_t q = b * s.Q + first; q < b * s.Q + std::min(first + kBlock, s.Q); ++q) {
        if (mask && !mask[q]) {
          std::fill_n(out + q * width, width, T(0));
          continue;
        }
        for (int64_t h = 0; h < s.h; ++h) {
          const int64_t at = q * taps_of_row + h * s.taps();
          if (!taps.read(s, locations + 2 * at, weights + at)) {
            std::fill_n(row.data() + h * s.d, s.d, T(0));
            continue;
          }
          for_runs<T>(s, [&](int64_t v, auto count) {
            sum_samples<T, count>(s, planes.get() + (b * s.h + h) * plane, taps, v, row.data() + h * s.d + v * Lanes<T>::n);
          });
        }
        std::copy_n(row.data(), width, out + q * width);
      }
    };
  });
}

template <class T>
void backward(const T* grad, const T* value, const T* locations, const T* weights, const bool* mask, T* grad_value,
              T* grad_locations, T* grad_weights, const Size& s, int64_t threads) {
  const int64_t plane = s.plane<T>(), width = s.h * s.d, taps_of_row = s.h * s.taps();
  if (mask)
    parallel(s.B * s.blocks(), threads, [&](int64_t unit) {
      const int64_t b = unit / s.blocks(), first = unit % s.blocks() * kBlock;
      for (int64_t q = b * s.Q + first; q < b * s.Q + std::min(first + kBlock, s.Q); ++q)
        if (!mask[q]) {
          std::fill_n(grad_locations + q * taps_of_row * 2, taps_of_row * 2, T(0));
          std::fill_n(grad_weights + q * taps_of_row, taps_of_row, T(0));
        }
    });
  parallel_workers(s.B * s.h, threads, [&] {
    struct Own {
      Taps<T> taps;
      Lines<T> pixels, sums, slope;
      std::vector<T> dots;
    };
    auto own = std::make_shared<Own>(Own{Taps<T>(s), Lines<T>(new Line<T>[plane]), Lines<T>(new Line<T>[plane]),
                                         Lines<T>(new Line<T>[s.vectors<T>()]()), std::vector<T>(4 * s.taps())});
    clear<T>(s, own->pixels.get());
    return [&, own](int64_t unit) {
      const int64_t b = unit % s.B, h = unit / s.B;  // neighbouring threads write to other images: to no common line
      const int64_t at_value = b * s.S * width + h * s.d;
      read_plane<T>(s, value + at_value, own->pixels.get());
      clear<T>(s, own->sums.get());
      for (int64_t q = b * s.Q; q < (b + 1) * s.Q; ++q) {
        if (mask && !mask[q]) continue;
        const int64_t at = q * taps_of_row + h * s.taps();
        std::fill(own->dots.begin(), own->dots.end(), T(0));
        if (own->taps.read(s, locations + 2 * at, weights + at)) {
          std::copy_n(grad + q * width + h * s.d, s.d, reinterpret_cast<T*>(own->slope.get()));
          for_runs<T>(s, [&](int64_t v, auto count) {
            spread_samples<T, count>(s, own->pixels.get(), own->taps, v, own->slope.get(), own->sums.get(), own->dots.data());
          });
        }
        finish<T>(s, own->taps, own->dots.data(), weights + at, grad_locations + 2 * at, grad_weights + at);
      }
      write_plane<T>(s, own->sums.get(), grad_value + at_value);
    };
  });
}

}  // namespace

// value [B][S][h][d], locations [B][Q][h][L][P][2], weights [B][Q][h][L][P], mask [B][Q] or null, out [B][Q][h][d];
// numbers: B Q h d P L, then height and width of each level.
#define ENTRY_POINTS(T)                                                                                              \
  extern "C" void deform_attn_forward_##T(const T* value, const T* locations, const T* weights, const bool* mask,    \
                                          T* out, const int64_t* numbers, int64_t threads) {                         \
    forward<T>(value, locations, weights, mask, out, Size(numbers), threads);                                        \
  }                                                                                                                  \
  extern "C" void deform_attn_backward_##T(const T* grad, const T* value, const T* locations, const T* weights,      \
                                           const bool* mask, T* grad_value, T* grad_locations, T* grad_weights,      \
                                           const int64_t* numbers, int64_t threads) {                                \
    backward<T>(grad, value, locations, weights, mask, grad_value, grad_locations, grad_weights, Size(numbers),      \
                threads);                                                                                            \
  }
ENTRY_POINTS(float)
ENTRY_POINTS(double)

// deform_attn on a CPU: weighted bilinear samples per query and head, and their gradient.
//
// The pixels of one image and head are copied into a plane of whole vectors, with a border of zeros around each level: a
// sample is then four aligned reads without a branch, and one outside reads the zeros behind the last level.
//
// Forward, a piece of work is a run of queries. Backward, it is one image and head, whose plane of gradients belongs to
// one thread: a pixel's gradient is summed in one order (query, level, point), whatever the number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "../lanes.h"
#include "../parallel.h"

namespace {

#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int kMost = 3;  // vectors of a sample that are summed in registers, of which there are 16
#else
constexpr int kMost = 4;  // of 32; SSE's few hold smaller ones
#endif
constexpr int64_t kBlock = 64;  // queries
constexpr int64_t kTaps = 16;   // samples whose places are computed at once

template <class T>
struct Line {  // one aligned vector, as an element of an array
  Vector<T> v;
};
template <class T>
using Lines = std::unique_ptr<Line<T>[]>;

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
  template <class T>
  int64_t vectors() const { return (d + Lanes<T>::n - 1) / Lanes<T>::n; }
  template <class T>
  int64_t plane() const { return pixels * vectors<T>(); }
};

// Some samples of one query, head and level.
template <class T>
struct Taps {
  int32_t place[kTaps];  // in a plane, of the pixel above and to the left
  T y[kTaps], x[kTaps];  // how far the sample is from it
  T share[4][kTaps];     // (y0 x0), (y0 x1), (y1 x0), (y1 x1): bilinear weight times the sample's own

  // False if all of them are outside. Two loops without a branch, so that the compiler makes vectors of them.
  bool read(const Level& level, int32_t nowhere, int64_t count, const T* locations, const T* weights) {
    int32_t any = 0;
    const T height = T(level.height), width = T(level.width);
    const int32_t row_step = int32_t(level.row()), origin = int32_t(level.place) + row_step + 1;
#pragma GCC ivdep
    for (int64_t t = 0; t < count; ++t) {
      const T px = locations[2 * t] * width - T(0.5), py = locations[2 * t + 1] * height - T(0.5);
      const int32_t here = (px > -1) & (px < width) & (py > -1) & (py < height);  // 0 for NaN
      x[t] = here ? px : T(0);  // an integer can hold it
      y[t] = here ? py : T(0);
      place[t] = here;
      any |= here;
    }
#pragma GCC ivdep
    for (int64_t t = 0; t < count; ++t) {
      int32_t column = int32_t(x[t]), row = int32_t(y[t]);
      column -= T(column) > x[t];
      row -= T(row) > y[t];
      const T right = x[t] - T(column), down = y[t] - T(row), own = weights[t];
      place[t] = place[t] ? origin + row * row_step + column : nowhere;
      x[t] = right;
      y[t] = down;
      share[0][t] = (1 - down) * (1 - right) * own;
      share[1][t] = (1 - down) * right * own;
      share[2][t] = down * (1 - right) * own;
      share[3][t] = down * right * own;
    }
    return any;
  }
};

// work(level, number of a first sample, samples) for the samples of a query and head, at most kTaps at once.
template <class Work>
inline void for_taps(const Size& s, Work work) {
  for (size_t l = 0; l < s.levels.size(); ++l)
    for (int64_t p = 0; p < s.P; p += kTaps) work(s.levels[l], l * s.P + p, std::min(kTaps, s.P - p));
}

// work(pixel of value, pixel of a plane) for all pixels.
template <class Work>
inline void for_pixels(const Size& s, Work work) {
  for (const Level& level : s.levels)
    for (int64_t row = 0; row < level.height; ++row)
      for (int64_t column = 0; column < level.width; ++column)
        work(level.pixel + row * level.width + column, level.place + (row + 1) * level.row() + column + 1);
}

// One image and head of value [S][h][d] -> the pixels of plane [pixels][vectors].
template <class T>
void read_plane(const Size& s, const T* value, Line<T>* plane) {
  for_pixels(s, [&, vectors = s.vectors<T>(), step = s.h * s.d](int64_t from, int64_t to) {
    for (int64_t v = 0, c = 0; v < vectors; ++v, c += Lanes<T>::n)
      plane[to * vectors + v].v = load<T>(value + from * step + c, std::min(s.d - c, Lanes<T>::n));
  });
}

template <class T>
void write_plane(const Size& s, const Line<T>* plane, T* value) {
  for_pixels(s, [&, vectors = s.vectors<T>(), step = s.h * s.d](int64_t to, int64_t from) {
    for (int64_t v = 0, c = 0; v < vectors; ++v, c += Lanes<T>::n)
      store<T>(value + to * step + c, plane[from * vectors + v].v, std::min(s.d - c, Lanes<T>::n));
  });
}

template <class T>
void clear(const Size& s, Line<T>* plane) {
  std::memset(static_cast<void*>(plane), 0, size_t(s.plane<T>()) * sizeof(Line<T>));
}

// Zeros in the rows of x [B][Q][width] that do not attend.
template <class T>
void clear_others(const Size& s, const bool* mask, int64_t width, T* x, int64_t threads) {
  if (!mask) return;
  const int64_t rows = s.B * s.Q;
  parallel((rows + kBlock - 1) / kBlock, threads, [&](int64_t block) {
    for (int64_t q = block * kBlock; q < std::min(rows, (block + 1) * kBlock); ++q)
      if (!mask[q]) std::fill_n(x + q * width, width, T(0));
  });
}

// work(first, the number as a type) for runs of at most kMost of a sample's vectors.
template <class T, class Work>
inline void for_vectors(const Size& s, Work work) {
  for (int64_t first = 0, vectors = s.vectors<T>(); first < vectors; first += kMost) switch (vectors - first) {
      case 1: work(first, std::integral_constant<int, 1>{}); break;
      case 2: work(first, std::integral_constant<int, 2>{}); break;
      case 3: work(first, std::integral_constant<int, 3>{}); break;
      default: work(first, std::integral_constant<int, kMost>{});
    }
}

// ---------------------------------------------------------------------------------------------------------- forward

// Overwrites out [d] from its vector `first` on with NV vectors of the sum of a query's samples.
template <class T, int NV>
void sum_samples(const Size& s, const Line<T>* plane, const T* locations, const T* weights, int64_t first, T* out) {
  const int64_t vectors = s.vectors<T>();
  Vector<T> upper[NV] = {}, lower[NV] = {};
  Taps<T> taps;
  for_taps(s, [&](const Level& level, int64_t p, int64_t count) {
    if (!taps.read(level, s.nowhere, count, locations + 2 * p, weights + p)) return;
    const int64_t below = level.row() * vectors;
    for (int64_t t = 0; t < count; ++t) {
      const Line<T>* a = plane + taps.place[t] * vectors + first;
      const Line<T>*b = a + vectors, *c = a + below, *e = c + vectors;
      const Vector<T> wa = all(taps.share[0][t]), wb = all(taps.share[1][t]);
      const Vector<T> wc = all(taps.share[2][t]), we = all(taps.share[3][t]);
      for (int v = 0; v < NV; ++v) {
        upper[v] = fused<T>(wb, b[v].v, fused<T>(wa, a[v].v, upper[v]));
        lower[v] = fused<T>(we, e[v].v, fused<T>(wc, c[v].v, lower[v]));
      }
    }
  });
  for (int64_t v = 0, c = first * Lanes<T>::n; v < NV; ++v, c += Lanes<T>::n)
    store<T>(out + c, upper[v] + lower[v], std::min(s.d - c, Lanes<T>::n));
}

template <class T>
void forward(const T* value, const T* locations, const T* weights, const bool* mask, T* out, const Size& s, int64_t threads) {
  const int64_t width = s.h * s.d, plane = s.plane<T>(), blocks = (s.Q + kBlock - 1) / kBlock;
  const Lines<T> planes(new Line<T>[s.B * s.h * plane]);
  parallel(s.B * s.h, threads, [&](int64_t unit) {
    clear<T>(s, planes.get() + unit * plane);
    read_plane<T>(s, value + unit / s.h * s.S * width + unit % s.h * s.d, planes.get() + unit * plane);
  });
  parallel(s.B * blocks, threads, [&](int64_t unit) {
    const int64_t b = unit / blocks, begin = b * s.Q + unit % blocks * kBlock;
    for (int64_t q = begin; q < std::min(begin + kBlock, (b + 1) * s.Q); ++q) {
      if (mask && !mask[q]) {
        std::fill_n(out + q * width, width, T(0));
        continue;
      }
      for (int64_t h = 0; h < s.h; ++h) {
        const int64_t at = (q * s.h + h) * s.taps();
        for_vectors<T>(s, [&](int64_t first, auto n) {
          const Line<T>* pixels = planes.get() + (b * s.h + h) * plane;
          sum_samples<T, n>(s, pixels, locations + 2 * at, weights + at, first, out + q * width + h * s.d);
        });
      }
    }
  });
}

// --------------------------------------------------------------------------------------------------------- backward

// What a thread needs for one image and head.
template <class T>
struct Slopes {
  Lines<T> pixels, sums, grad;

  explicit Slopes(const Size& s)
      : pixels(new Line<T>[s.plane<T>()]), sums(new Line<T>[s.plane<T>()]), grad(new Line<T>[s.vectors<T>()]()) {
    clear<T>(s, pixels.get());
  }
};

// Adds to the samples' vectors first .. first + NV - 1 of sums, and to dots what these vectors' corners times grad, the
// gradient of the query's result, come to.
template <class T, int NV>
void spread_samples(const Slopes<T>& own, const Taps<T>& taps, int64_t count, int64_t vectors, int64_t below,
                    int64_t first, T (*dots)[4]) {
  Vector<T> g[NV];
  for (int v = 0; v < NV; ++v) g[v] = own.grad[first + v].v;
  const Line<T>* pixels = own.pixels.get() + first;
  Line<T>* sums = own.sums.get() + first;
  const int64_t corner[4] = {0, vectors, below, below + vectors};
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = taps.place[t] * vectors;
    Vector<T> product[4];
    for (int i = 0; i < 4; ++i) {
      const Line<T>* from = pixels + at + corner[i];
      Line<T>* to = sums + at + corner[i];
      const Vector<T> share = all(taps.share[i][t]);
      product[i] = g[0] * from[0].v;
      for (int v = 1; v < NV; ++v) product[i] = fused<T>(g[v], from[v].v, product[i]);
      for (int v = 0; v < NV; ++v) to[v].v = fused<T>(share, g[v], to[v].v);
    }
    add_sums<T>(product, dots[t]);
  }
}

// dots -> gradients of the locations and weights.
template <class T>
void finish(const Level& level, const Taps<T>& taps, int64_t count, const T (*dots)[4], const T* weights,
            T* __restrict grad_locations, T* __restrict grad_weights) {
  const T height = T(level.height), width = T(level.width);
  for (int64_t t = 0; t < count; ++t) {
    const T a = dots[t][0], b = dots[t][1], c = dots[t][2], e = dots[t][3], y = taps.y[t], x = taps.x[t];
    const T upper = a * (1 - x) + b * x, lower = c * (1 - x) + e * x, right = (b - a) * (1 - y) + (e - c) * y;
    grad_weights[t] = upper * (1 - y) + lower * y;
    grad_locations[2 * t] = right * weights[t] * width;
    grad_locations[2 * t + 1] = (lower - upper) * weights[t] * height;
  }
}

template <class T>
void backward(const T* grad, const T* value, const T* locations, const T* weights, const bool* mask, T* grad_value,
              T* grad_locations, T* grad_weights, const Size& s, int64_t threads) {
  const int64_t width = s.h * s.d, samples = s.h * s.taps();
  clear_others(s, mask, 2 * samples, grad_locations, threads);
  clear_others(s, mask, samples, grad_weights, threads);
  parallel_workers(s.B * s.h, threads, [&] {
    return [&, kept = std::make_shared<Slopes<T>>(s)](int64_t unit) {
      const int64_t b = unit % s.B, h = unit / s.B;  // neighbouring threads write to other images: to no common line
      const Slopes<T>& own = *kept;
      read_plane<T>(s, value + b * s.S * width + h * s.d, own.pixels.get());
      clear<T>(s, own.sums.get());
      for (int64_t q = b * s.Q; q < (b + 1) * s.Q; ++q) {
        if (mask && !mask[q]) continue;
        std::copy_n(grad + q * width + h * s.d, s.d, reinterpret_cast<T*>(own.grad.get()));
        for_taps(s, [&](const Level& level, int64_t p, int64_t count) {
          const int64_t at = q * samples + h * s.taps() + p;
          Taps<T> taps;
          T dots[kTaps][4] = {};
          if (taps.read(level, s.nowhere, count, locations + 2 * at, weights + at))
            for_vectors<T>(s, [&](int64_t first, auto n) {
              spread_samples<T, n>(own, taps, count, s.vectors<T>(), level.row() * s.vectors<T>(), first, dots);
            });
          finish<T>(level, taps, count, dots, weights + at, grad_locations + 2 * at, grad_weights + at);
        });
      }
      write_plane<T>(s, own.sums.get(), grad_value + b * s.S * width + h * s.d);
    };
  });
}

}  // namespace

// value [B][S][h][d], locations [B][Q][h][L][P][2], weights [B][Q][h][L][P], mask [B][Q] or null, out [B][Q][h][d];
// numbers: B Q h d P L, then height and width of each level.
#define ENTRY_POINTS(T)                                                                                              \
  extern "C" int64_t deform_attn_forward_##T(const T* value, const T* locations, const T* weights, const bool* mask, \
                                             T* out, const int64_t* numbers, int64_t threads) try {                  \
    forward<T>(value, locations, weights, mask, out, Size(numbers), threads);                                        \
    return 0;                                                                                                        \
  } CATCH_OUT_OF_MEMORY                                                                                              \
  extern "C" int64_t deform_attn_backward_##T(const T* grad, const T* value, const T* locations, const T* weights,   \
                                              const bool* mask, T* grad_value, T* grad_locations, T* grad_weights,   \
                                              const int64_t* numbers, int64_t threads) try {                         \
    backward<T>(grad, value, locations, weights, mask, grad_value, grad_locations, grad_weights, Size(numbers),      \
                threads);                                                                                            \
    return 0;                                                                                                        \
  } CATCH_OUT_OF_MEMORY
ENTRY_POINTS(float)
ENTRY_POINTS(double)

// deform_conv on a CPU: the bilinear samples of one image as columns for a matrix product, and their gradient.
//
// Pixels are channels-last, so that a sample is four rows of memory. A piece of work is a run of channels that share
// their group and their deformable group: it reads and writes these channels only, so the gradient of a pixel is summed
// by one thread in one order (position, tap, corner), whatever the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// Products and sums may fuse here: sampling positions are sums and floors only.
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

#include "../lanes.h"
#include "../parallel.h"

namespace {

constexpr int64_t kRun = 128;  // channels per piece of work at most: one group of BEVDepth's

struct Size {  // as cpu.py passes it
  int64_t C, H, W, height, width, kh, kw, stride, padding, dilation, groups, deform_groups;
  int64_t K() const { return kh * kw; }
  int64_t P() const { return height * width; }
  int64_t I() const { return C / groups; }
};

template <class T>
struct Tap {
  int32_t pixel[4];  // (y0 x0), (y0 x1), (y1 x0), (y1 x1); -1 outside
  T y, x;            // fractions
  T mask;
  bool inside;
};

struct Run {  // channels [begin, begin + count) of group g and deformable group d
  int64_t begin, count, g, d;
};

std::vector<Run> runs_of(const Size& s) {
  std::vector<Run> runs;
  const int64_t I = s.I(), c = s.C / s.deform_groups;
  for (int64_t begin = 0; begin < s.C;) {
    const int64_t end = std::min({begin + kRun, (begin / I + 1) * I, (begin / c + 1) * c});
    runs.push_back({begin, end - begin, begin / I, begin / c});
    begin = end;
  }
  return runs;
}

// [D][P][K]
template <class T>
std::vector<Tap<T>> taps_of(const Size& s, const T* offset, const T* mask) {
  std::vector<Tap<T>> taps(s.deform_groups * s.P() * s.K());
  for (int64_t d = 0; d < s.deform_groups; ++d)
    for (int64_t k = 0; k < s.K(); ++k) {
      const int64_t plane = d * s.K() + k;
      const T *down = offset + 2 * plane * s.P(), *right = down + s.P();
      for (int64_t p = 0; p < s.P(); ++p) {
        Tap<T>& tap = taps[(d * s.P() + p) * s.K() + k];
        const T y = T(p / s.width * s.stride - s.padding + k / s.kw * s.dilation) + down[p];
        const T x = T(p % s.width * s.stride - s.padding + k % s.kw * s.dilation) + right[p];
        tap.inside = y > -1 && y < T(s.H) && x > -1 && x < T(s.W);  // false for NaN
        tap.mask = mask ? mask[plane * s.P() + p] : T(1);
        if (!tap.inside) continue;
        const int64_t y0 = int64_t(std::floor(y)), x0 = int64_t(std::floor(x));
        tap.y = y - T(y0);
        tap.x = x - T(x0);
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t row = y0 + i / 2, column = x0 + i % 2;
          const bool there = row >= 0 && row < s.H && column >= 0 && column < s.W;
          tap.pixel[i] = there ? int32_t(row * s.W + column) : -1;
        }
      }
    }
  return taps;
}

template <class T>
void shares_of(const Tap<T>& tap, T* share) {
  share[0] = (1 - tap.y) * (1 - tap.x);
  share[1] = (1 - tap.y) * tap.x;
  share[2] = tap.y * (1 - tap.x);
  share[3] = tap.y * tap.x;
}

// Bilinear samples of one run of channels, times the mask -> columns [G][P][K][I].
template <class T>
void sample_run(const Size& s, const Run& run, const T* pixels, const Tap<T>* taps, int64_t first, int64_t last, T* columns) {
  const T zeros[kRun] = {};
  for (int64_t p = first; p < last; ++p)
    for (int64_t k = 0; k < s.K(); ++k) {
      const Tap<T>& tap = taps[(run.d * s.P() + p) * s.K() + k];
      T* __restrict out = columns + ((run.g * s.P() + p) * s.K() + k) * s.I() + run.begin % s.I();
      if (!tap.inside) {
        std::fill_n(out, run.count, T(0));
        continue;
      }
      T share[4];
      shares_of(tap, share);
      const T* from[4];
      for (int i = 0; i < 4; ++i) {
        from[i] = tap.pixel[i] < 0 ? zeros : pixels + tap.pixel[i] * s.C + run.begin;
        share[i] *= tap.mask;
      }
      const T *a = from[0], *b = from[1], *c = from[2], *e = from[3];
      for (int64_t i = 0; i < run.count; ++i)
        out[i] = share[0] * a[i] + share[1] * b[i] + share[2] * c[i] + share[3] * e[i];
    }
}

// Gradient of sample_run: adds to the run's channels of grad_pixels, overwrites slopes [P][K][3] with the derivatives
// with respect to y, x and mask that these channels contribute.
template <class T>
void spread_run(const Size& s, const Run& run, const T* pixels, const Tap<T>* taps, const T* grad_columns,
                T* grad_pixels, T* slopes) {
  constexpr int64_t kLanes = Lanes<T>::n, kVectors = 64 / kVectorBytes;  // 64 bytes together: one order of sums on every machine
  const T zeros[kRun] = {};
  T nowhere[kRun];
  for (int64_t p = 0; p < s.P(); ++p)
    for (int64_t k = 0; k < s.K(); ++k, slopes += 3) {
      const Tap<T>& tap = taps[(run.d * s.P() + p) * s.K() + k];
      if (!tap.inside) {
        slopes[0] = slopes[1] = slopes[2] = 0;
        continue;
      }
      const T* grad = grad_columns + ((run.g * s.P() + p) * s.K() + k) * s.I() + run.begin % s.I();
      T share[4], dot[4];
      shares_of(tap, share);
      for (int i = 0; i < 4; ++i) {
        const bool there = tap.pixel[i] >= 0;
        const T* from = there ? pixels + tap.pixel[i] * s.C + run.begin : zeros;
        T* to = there ? grad_pixels + tap.pixel[i] * s.C + run.begin : nowhere;
        const T weight = share[i] * tap.mask;
        Vector<T> sum[kVectors] = {};
        int64_t c = 0;
        while (c + kVectors * kLanes <= run.count)
          for (int64_t v = 0; v < kVectors; ++v, c += kLanes) {
            const Vector<T> g = load(grad + c);
            sum[v] = fused<T>(g, load(from + c), sum[v]);
            store<T>(to + c, fused<T>(all(weight), g, load(to + c)));
          }
        T total = 0;
        for (const Vector<T>& part : sum)
          for (int64_t l = 0; l < kLanes; ++l) total += part[l];
        for (; c < run.count; ++c) {
          total += grad[c] * from[c];
          to[c] += weight * grad[c];
        }
        dot[i] = total;
      }
      slopes[0] = tap.mask * ((dot[2] - dot[0]) * (1 - tap.x) + (dot[3] - dot[1]) * tap.x);
      slopes[1] = tap.mask * ((dot[1] - dot[0]) * (1 - tap.y) + (dot[3] - dot[2]) * tap.y);
      slopes[2] = share[0] * dot[0] + share[1] * dot[1] + share[2] * dot[2] + share[3] * dot[3];
    }
}

template <class T>
void sample(const T* pixels, const T* offset, const T* mask, T* columns, const Size& s, int64_t threads) {
  constexpr int64_t kBlock = 64;  // positions
  const std::vector<Tap<T>> taps = taps_of(s, offset, mask);
  const std::vector<Run> runs = runs_of(s);
  const int64_t blocks = (s.P() + kBlock - 1) / kBlock;
  parallel(int64_t(runs.size()) * blocks, threads, [&](int64_t unit) {
    const int64_t first = unit % blocks * kBlock;
    sample_run(s, runs[unit / blocks], pixels, taps.data(), first, std::min(first + kBlock, s.P()), columns);
  });
}

template <class T>
void spread(const T* pixels, const T* offset, const T* mask, const T* grad_columns, T* grad_pixels, T* grad_offset,
            T* grad_mask, const Size& s, int64_t threads) {
  const std::vector<Tap<T>> taps = taps_of(s, offset, mask);
  const std::vector<Run> runs = runs_of(s);
  const int64_t n = s.P() * s.K() * 3;
  std::vector<T> slopes(runs.size() * n);
  parallel(runs.size(), threads, [&](int64_t r) {
    spread_run(s, runs[r], pixels, taps.data(), grad_columns, grad_pixels, slopes.data() + r * n);
  });
  std::fill_n(grad_offset, 2 * s.deform_groups * s.K() * s.P(), T(0));
  if (grad_mask) std::fill_n(grad_mask, s.deform_groups * s.K() * s.P(), T(0));
  const T* slope = slopes.data();
  for (const Run& run : runs)
    for (int64_t p = 0; p < s.P(); ++p)
      for (int64_t k = 0; k < s.K(); ++k, slope += 3) {
        const int64_t plane = run.d * s.K() + k;
        grad_offset[2 * plane * s.P() + p] += slope[0];
        grad_offset[(2 * plane + 1) * s.P() + p] += slope[1];
        if (grad_mask) grad_mask[plane * s.P() + p] += slope[2];
      }
}

}  // namespace

// One image: pixels [H][W][C], offset [D][K][2][P], mask [D][K][P] or null, columns [G][P][K][I].
#define ENTRY_POINTS(T)                                                                                              \
  extern "C" int64_t deform_sample_##T(const T* pixels, const T* offset, const T* mask, T* columns, const Size* size, \
                                       int64_t threads) try {                                                        \
    sample(pixels, offset, mask, columns, *size, threads);                                                           \
    return 0;                                                                                                        \
  } CATCH_OUT_OF_MEMORY                                                                                              \
  extern "C" int64_t deform_spread_##T(const T* pixels, const T* offset, const T* mask, const T* grad_columns,       \
                                       T* grad_pixels, T* grad_offset, T* grad_mask, const Size* size,               \
                                       int64_t threads) try {                                                        \
    spread(pixels, offset, mask, grad_columns, grad_pixels, grad_offset, grad_mask, *size, threads);                 \
    return 0;                                                                                                        \
  } CATCH_OUT_OF_MEMORY
ENTRY_POINTS(float)
ENTRY_POINTS(double)

// voxel_pool on a CPU, float32.
//
// An upright camera projects the pixels of one image column at one depth onto one or two BEV cells: along h the cell
// changes rarely. So the forward pass sums such a run in registers and touches the output once per run, not once per
// point. depth and cell are [.. H W]: tiles of image columns are transposed on the way in, which also keeps the context
// rows of a column in the first cache level while all its depths are done.
//
// Every thread owns a range of cells and meets the points in the same order (image, tile, depths, column, depth, row),
// so no sum depends on how many threads there are.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../lanes.h"
#include "../parallel.h"

namespace {

using Floats = Vector<float>;
constexpr int64_t kLanes = Lanes<float>::n;
constexpr int64_t kVectors = 8;                // vectors per channel block, in registers: 128 channels with AVX-512
constexpr int64_t kBlock = kVectors * kLanes;
constexpr int64_t kTile = 16;                  // image columns per tile: whole cache lines of depth and cell
constexpr int64_t kDepths = 32;                // depth bins per step: their output rows stay in the caches
constexpr int64_t kAhead = 6;                  // bins between asking for an output row and adding to it

struct Size {
  int64_t M, D, H, W, C, cells;
  int64_t tiles() const { return (W + kTile - 1) / kTile; }
  int64_t steps() const { return (D + kDepths - 1) / kDepths; }
  int64_t line() const { return (H + kLanes - 1) / kLanes * kLanes; }  // rows of a transposed column, padded
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> aligned(int64_t n) {
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (std::max<int64_t>(n, 1) * sizeof(T) + 63) / 64 * 64)));
}

// A large result lies on fresh pages. To let the system clear them huge page by huge page in one call costs a fraction
// of faults on first touch; on pages already there it costs nothing. `advise` is best effort.
void advise(float* data, int64_t floats, int advice) {
#if defined(__linux__)
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t(4095);
  const uintptr_t end = reinterpret_cast<uintptr_t>(data + floats) & ~uintptr_t(4095);
  if (end > first + (1 << 20)) madvise(reinterpret_cast<void*>(first), end - first, advice);
#endif
}
#if !defined(MADV_HUGEPAGE)
#define MADV_HUGEPAGE 14  // unknown advice is refused without effect
#endif
#if !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23  // since Linux 5.14
#endif

inline float sum_lanes(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX__)
  __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
#else
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) x[i] += x[i + step];
  return x[0];
#endif
}

#if defined(__AVX512F__)
// to[j * to_stride + i] = from[i * from_stride + j], 16 x 16. Only `rows` rows and the lanes of `columns` are read (the
// last row stands in for the missing ones); everything is written.
inline void transpose_block(const float* from, int64_t from_stride, int64_t rows, __mmask16 columns, float* to,
                            int64_t to_stride) {
  __m512 a[16], b[16];
  if (rows >= 16)
    for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_ps(columns, from + i * from_stride);
  else
    for (int i = 0; i < 16; ++i)
      a[i] = _mm512_maskz_loadu_ps(columns, from + std::min<int64_t>(i, rows - 1) * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = (__m512)_mm512_unpacklo_pd((__m512d)b[i], (__m512d)b[i + 2]);
    a[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)b[i], (__m512d)b[i + 2]);
    a[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)b[i + 1], (__m512d)b[i + 3]);
    a[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)b[i + 1], (__m512d)b[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 p = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), q = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 r = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 t = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(p, r, 0x88));
    _mm512_storeu_ps(to + (4 + j) * to_stride, _mm512_shuffle_f32x4(q, t, 0x88));
    _mm512_storeu_ps(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(p, r, 0xdd));
    _mm512_storeu_ps(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(q, t, 0xdd));
  }
}
#endif

// One depth bin of a tile, to[w * to_stride + h] = from[h * from_stride + w]; `to` has room for 16 columns of line() rows.
template <class T>
void transpose_in(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
#if defined(__AVX512F__)
  for (int64_t h = 0; h < rows; h += 16)
    transpose_block(reinterpret_cast<const float*>(from + h * from_stride), from_stride, rows - h, (1u << columns) - 1,
                    reinterpret_cast<float*>(to + h), to_stride);
#else
  for (int64_t w = 0; w < columns; ++w)
    for (int64_t h = 0; h < rows; ++h) to[w * to_stride + h] = from[h * from_stride + w];
#endif
}

// A tile's part of the inputs, transposed: [column][bin][line()] and the context [column][H][padded], zeros behind n.
struct Tile {
  int64_t m, w0, columns, line, stride;  // stride: floats per column of depth and cell
  Buffer<float> depth, context;
  Buffer<int32_t> cell;

  Tile(const Size& s, int64_t padded)
      : line(s.line()), stride(kDepths * line), depth(aligned<float>(kTile * stride)),
        context(aligned<float>(kTile * s.H * padded)), cell(aligned<int32_t>(kTile * stride)) {}

  void move_to(const Size& s, int64_t t) {
    m = t / s.tiles();
    w0 = t % s.tiles() * kTile;
    columns = std::min(kTile, s.W - w0);
  }
  void read_context(const Size& s, const float* from, int64_t c0, int64_t n, int64_t padded) {
    for (int64_t h = 0; h < s.H; ++h)
      for (int64_t w = 0; w < columns; ++w) {
        const float* row = from + ((m * s.H + h) * s.W + w0 + w) * s.C + c0;
        float* to = context.get() + (w * s.H + h) * padded;
        for (int64_t c = 0; c < padded; c += kLanes)
          store(to + c, load(row + c, std::min(n - c, kLanes)));
      }
  }
  void read_depths(const Size& s, const float* depths, const int32_t* cells, int64_t d0, int64_t bins) {
    for (int64_t d = 0; d < bins; ++d) {
      const int64_t at = (m * s.D + d0 + d) * s.H * s.W + w0;
      transpose_in(depths + at, s.W, s.H, columns, depth.get() + d * line, stride);
      transpose_in(cells + at, s.W, s.H, columns, cell.get() + d * line, stride);
    }
  }
};

inline void prefetch_row(const float* row, int64_t vectors) {
  for (int64_t at = 0; at < vectors * kLanes; at += 16) __builtin_prefetch(row + at, 0, 2);  // by cache lines
}

// ---------------------------------------------------------------------------------------------------------- forward

// What the threads share out: the cells each tile and step can reach, and where to cut the cells for equal work.
struct Plan {
  std::vector<int32_t> low, high;  // [M][steps][tiles], inclusive; high < low if nothing is inside
  std::vector<int64_t> cut;        // thread t owns the cells cut[t] .. cut[t + 1] - 1
};

Plan make_plan(const int32_t* cell, const Size& s, int64_t threads) {
  const int64_t tiles = s.tiles(), steps = s.steps();
  int shift = 0;
  while (s.cells >> shift > 4096) ++shift;
  const int64_t buckets = ((s.cells - 1) >> shift) + 1;
  std::vector<std::vector<int64_t>> samples(threads, std::vector<int64_t>(buckets, 0));
  Plan plan;
  plan.low.assign(s.M * steps * tiles, INT32_MAX);
  plan.high.assign(s.M * steps * tiles, -1);
  parallel(threads, threads, [&](int64_t thread) {
    std::vector<uint32_t> low(s.W);
    std::vector<int32_t> high(s.W);
    for (int64_t t = s.M * steps * thread / threads; t < s.M * steps * (thread + 1) / threads; ++t) {
      const int64_t m = t / steps, d0 = t % steps * kDepths;
      std::fill(low.begin(), low.end(), INT32_MAX);
      std::fill(high.begin(), high.end(), -1);
      for (int64_t d = d0; d < std::min(s.D, d0 + kDepths); ++d)
        for (int64_t h = 0; h < s.H; ++h) {
          const int32_t* line = cell + ((m * s.D + d) * s.H + h) * s.W;
          for (int64_t w = 0; w < s.W; ++w) {
            low[w] = std::min(low[w], uint32_t(line[w]));  // a negative cell is large here
            high[w] = std::max(high[w], line[w]);
          }
          if (h % 4 == 0)  // every 16th point is enough to balance the work
            for (int64_t w = 0; w < s.W; w += 4)
              if (line[w] >= 0 && line[w] < s.cells) ++samples[thread][line[w] >> shift];
        }
      for (int64_t w = 0; w < s.W; ++w) {
        int32_t& least = plan.low[t * tiles + w / kTile];
        least = std::min(least, int32_t(low[w]));
        plan.high[t * tiles + w / kTile] = std::max(plan.high[t * tiles + w / kTile], high[w]);
      }
    }
  });
  std::vector<int64_t> work(buckets, int64_t(1) << shift);  // clearing a row costs about as much as a point
  for (auto& seen : samples)
    for (int64_t b = 0; b < buckets; ++b) work[b] += 16 * seen[b];
  int64_t total = 0, done = 0;
  for (int64_t x : work) total += x;
  plan.cut.push_back(0);
  for (int64_t b = 0; b < buckets; ++b) {
    done += work[b];
    while (int64_t(plan.cut.size()) < threads && done * threads >= total * int64_t(plan.cut.size()))
      plan.cut.push_back(std::min(s.cells, (b + 1) << shift));
  }
  plan.cut.resize(threads, s.cells);
  plan.cut.push_back(s.cells);
  return plan;
}

// Adds depth * context of one image column and depth bin to the cells low .. low + size - 1, run by run.
template <int NV>
inline void pool_line(const int32_t* cell, const float* depth, const float* context, int64_t rows, int64_t low,
                      uint32_t size, int64_t last, float* out, int64_t out_stride, char* touched) {
  alignas(64) static constexpr float zeros[kBlock] = {};
  for (int64_t h = 0; h < rows;) {
    const int32_t here = cell[h];
    const uint32_t mine = uint32_t(here) - uint32_t(low);
    if (mine >= size) {
      ++h;
      continue;
    }
    Floats sum[NV];
    for (int v = 0; v < NV; ++v) sum[v] = depth[h] * load(context + (h * NV + v) * kLanes);
    for (++h; h < rows && cell[h] == here; ++h)
      for (int v = 0; v < NV; ++v)
        sum[v] = fused<float>(all(depth[h]), load(context + (h * NV + v) * kLanes), sum[v]);
    float* row = out + mine * out_stride;
    const float* before = touched[mine] ? row : zeros;  // a select: cheaper than a branch or clearing beforehand
    touched[mine] = 1;
    for (int v = 0; v + 1 < NV; ++v) store(row + v * kLanes, load(before + v * kLanes) + sum[v]);
    const int64_t at = (NV - 1) * kLanes;
    store(row + at, load(before + at, last) + sum[NV - 1], last);
  }
}

// Pools channels c0 .. c0 + n into the cells low .. high - 1.
template <int NV>
void pool_range(const float* depth, const float* context, const int32_t* cell, const Size& s, const Plan& plan,
                int64_t c0, int64_t n, int64_t low, int64_t high, float* out) {
  constexpr int64_t padded = NV * kLanes;
  const int64_t last = n - (NV - 1) * kLanes;
  const uint32_t size = uint32_t(high - low);
  if (size == 0) return;
  float* rows = out + low * s.C + c0;
  std::vector<char> touched(size, 0);
  Tile tile(s, padded);
  for (int64_t t = 0; t < s.M * s.tiles(); ++t) {
    tile.move_to(s, t);
    bool read = false;
    for (int64_t step = 0; step < s.steps(); ++step) {
      const int64_t reach = (tile.m * s.steps() + step) * s.tiles() + t % s.tiles();
      if (plan.high[reach] < low || plan.low[reach] >= high) continue;
      if (!read) tile.read_context(s, context, c0, n, padded);
      read = true;
      const int64_t bins = std::min(kDepths, s.D - step * kDepths);
      tile.read_depths(s, depth, cell, step * kDepths, bins);
      for (int64_t w = 0; w < tile.columns; ++w)
        for (int64_t d = 0; d < bins; ++d) {
          const int32_t* line = tile.cell.get() + w * tile.stride + d * tile.line;
          if (d + kAhead < bins)  // most columns meet only the cells of their first and last row
            for (int64_t h : {int64_t(0), s.H - 1}) {
              const uint32_t next = uint32_t(line[kAhead * tile.line + h]) - uint32_t(low);
              prefetch_row(rows + std::min(next, size - 1) * s.C, NV);
            }
          pool_line<NV>(line, tile.depth.get() + w * tile.stride + d * tile.line, tile.context.get() + w * s.H * padded,
                        s.H, low, size, last, rows, s.C, touched.data());
        }
    }
  }
  for (uint32_t i = 0; i < size; ++i)
    if (!touched[i]) std::fill_n(rows + i * s.C, n, 0.0f);
}

using PoolRange = void (*)(const float*, const float*, const int32_t*, const Size&, const Plan&, int64_t, int64_t,
                           int64_t, int64_t, float*);
constexpr PoolRange kPoolRange[kVectors] = {pool_range<1>, pool_range<2>, pool_range<3>, pool_range<4>,
                                            pool_range<5>, pool_range<6>, pool_range<7>, pool_range<8>};

// --------------------------------------------------------------------------------------------------------- backward

// One image column and kDepths bins: grad_context += sum_d depth * grad[cell], and in place of each depth its gradient
// dot(grad[cell], context).
template <int NV>
inline void line_gradient(const float* grad, const Size& s, int64_t last, int64_t bins, int64_t line,
                          const int32_t* cell, float* depth, const float* context, float* grad_context) {
  for (int64_t h = 0; h < s.H; ++h) {
    Floats feature[NV], sum[NV];
    for (int v = 0; v < NV; ++v) {
      feature[v] = load(context + (h * NV + v) * kLanes);
      sum[v] = load(grad_context + (h * NV + v) * kLanes);
    }
    for (int64_t d = 0; d < bins; ++d) {
      const int32_t here = cell[d * line + h];
      float& weight = depth[d * line + h];
      if (here < 0 || here >= s.cells) {
        weight = 0;
        continue;
      }
      const float* row = grad + here * s.C;
      Floats product = {};
      for (int v = 0; v < NV; ++v) {
        const Floats g = v + 1 < NV ? load(row + v * kLanes) : load(row + v * kLanes, last);
        product = fused<float>(g, feature[v], product);
        sum[v] = fused<float>(all(weight), g, sum[v]);
      }
      weight = sum_lanes(product);
    }
    for (int v = 0; v < NV; ++v) store(grad_context + (h * NV + v) * kLanes, sum[v]);
  }
}

// Gradients of one tile, channels c0 .. c0 + n; grad_depth adds up over the channel blocks.
template <int NV>
void tile_gradient(const float* grad, const float* depth, const float* context, const int32_t* cell, const Size& s,
                   int64_t t, int64_t c0, int64_t n, float* grad_depth, float* grad_context) {
  constexpr int64_t padded = NV * kLanes;
  const int64_t last = n - (NV - 1) * kLanes;
  Tile tile(s, padded);
  tile.move_to(s, t);
  tile.read_context(s, context, c0, n, padded);
  Buffer<float> sums = aligned<float>(tile.columns * s.H * padded);
  std::fill_n(sums.get(), tile.columns * s.H * padded, 0.0f);
  for (int64_t d0 = 0; d0 < s.D; d0 += kDepths) {
    const int64_t bins = std::min(kDepths, s.D - d0);
    tile.read_depths(s, depth, cell, d0, bins);
    for (int64_t w = 0; w < tile.columns; ++w) {
      if (w + 1 < tile.columns)  // rows of the gradient that the next column will meet
        for (int64_t d = 0; d < bins; ++d) {
          const uint32_t next = tile.cell[(w + 1) * tile.stride + d * tile.line + s.H / 2];
          prefetch_row(grad + std::min<int64_t>(next, s.cells - 1) * s.C + c0, NV);
        }
      line_gradient<NV>(grad + c0, s, last, bins, tile.line, tile.cell.get() + w * tile.stride,
                        tile.depth.get() + w * tile.stride, tile.context.get() + w * s.H * padded,
                        sums.get() + w * s.H * padded);
    }
    for (int64_t d = 0; d < bins; ++d)
      for (int64_t h = 0; h < s.H; ++h) {
        float* to = grad_depth + ((tile.m * s.D + d0 + d) * s.H + h) * s.W + tile.w0;
        const float* from = tile.depth.get() + d * tile.line + h;
        for (int64_t w = 0; w < tile.columns; ++w) to[w] = (c0 > 0 ? to[w] : 0.0f) + from[w * tile.stride];
      }
  }
  for (int64_t h = 0; h < s.H; ++h)
    for (int64_t w = 0; w < tile.columns; ++w)
      std::copy_n(sums.get() + (w * s.H + h) * padded, n,
                  grad_context + ((tile.m * s.H + h) * s.W + tile.w0 + w) * s.C + c0);
}

using TileGradient = void (*)(const float*, const float*, const float*, const int32_t*, const Size&, int64_t, int64_t,
                              int64_t, float*, float*);
constexpr TileGradient kTileGradient[kVectors] = {tile_gradient<1>, tile_gradient<2>, tile_gradient<3>,
                                                  tile_gradient<4>, tile_gradient<5>, tile_gradient<6>,
                                                  tile_gradient<7>, tile_gradient<8>};

template <class Work>
void for_channel_blocks(int64_t C, Work work) {  // work(c0, n, index of the instance for n channels)
  for (int64_t c0 = 0; c0 < C; c0 += kBlock) {
    const int64_t n = std::min(kBlock, C - c0);
    work(c0, n, (n + kLanes - 1) / kLanes - 1);
  }
}

}  // namespace

extern "C" int64_t voxel_pool_forward(const float* depth, const float* context, const int32_t* cell, float* out, int64_t M,
                                      int64_t D, int64_t H, int64_t W, int64_t C, int64_t cells, int64_t threads) try {
  const Size s{M, D, H, W, C, cells};
  advise(out, cells * C, MADV_HUGEPAGE);
  const Plan plan = make_plan(cell, s, threads);
  parallel(threads, threads, [&](int64_t thread) {
    const int64_t low = plan.cut[thread], high = plan.cut[thread + 1];
    advise(out + low * C, (high - low) * C, MADV_POPULATE_WRITE);
    for_channel_blocks(C, [&](int64_t c0, int64_t n, int64_t i) {
      kPoolRange[i](depth, context, cell, s, plan, c0, n, low, high, out);
    });
  });
  return 0;
} CATCH_OUT_OF_MEMORY

extern "C" int64_t voxel_pool_backward(const float* grad, const float* depth, const float* context, const int32_t* cell,
                                       float* grad_depth, float* grad_context, int64_t M, int64_t D, int64_t H, int64_t W,
                                       int64_t C, int64_t cells, int64_t threads) try {
  const Size s{M, D, H, W, C, cells};
  const int64_t tiles = M * s.tiles();
  parallel(threads, threads, [&](int64_t thread) {
    for (int64_t t = tiles * thread / threads; t < tiles * (thread + 1) / threads; ++t)
      for_channel_blocks(C, [&](int64_t c0, int64_t n, int64_t i) {
        kTileGradient[i](grad, depth, context, cell, s, t, c0, n, grad_depth, grad_context);
      });
  });
  return 0;
} CATCH_OUT_OF_MEMORY

// Points of every cell in intervals of `length`, see intervals.py: counted, then put in their places, ascending. A sample a unit.
extern "C" int64_t voxel_pool_intervals(const int32_t* cell, int32_t* points, int32_t* cells, int64_t B, int64_t N, int64_t D,
                                        int64_t pixels, int64_t per_sample, int64_t count, int64_t length, int64_t threads) try {
  parallel(B, threads, [&](int64_t b) {
    const int32_t* own = cell + b * N * D * pixels;
    const int64_t first = b * per_sample;
    std::vector<int64_t> place(per_sample, 0);  // points of each cell, then where its next one goes
    for (int64_t i = 0; i < N * D * pixels; ++i) {
      const int64_t c = own[i] - first;
      if (c >= 0 && c < per_sample) ++place[c];
    }
    int32_t* to = points + b * count * length;
    int32_t* of = cells + b * count;
    int64_t used = 0;
    for (int64_t c = 0; c < per_sample; ++c) {
      const int64_t start = used;
      used += (place[c] + length - 1) / length;
      std::fill(of + start, of + used, static_cast<int32_t>(c));
      place[c] = start * length;
    }
    std::fill(of + used, of + count, -1);
    for (int64_t i = 0; i < count * length; ++i) to[i] = static_cast<int32_t>(D * pixels + i % pixels);  // many rows, not one
    for (int64_t n = 0, i = 0; n < N; ++n)
      for (int64_t d = 0; d < D; ++d)
        for (int64_t p = 0; p < pixels; ++p, ++i) {
          const int64_t c = own[i] - first;
          if (c >= 0 && c < per_sample) to[place[c]++] = static_cast<int32_t>((n * (D + 1) + d) * pixels + p);
        }
  });
  return 0;
} CATCH_OUT_OF_MEMORY

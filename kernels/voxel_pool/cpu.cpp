// voxel_pool on a CPU, float32.
//
// An upright camera projects the pixels of one image column at one depth onto one or two BEV cells. So along h the
// cell changes rarely: forward adds up such a run in registers and touches the output once per run instead of once per
// point. Images are [.. H W], hence tiles of kTile columns are transposed first.
//
// Every thread owns a range of cells and sees all runs in the same order (image, column, depth, row), so a sum does not
// depend on how many threads there are.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Sums of products may fuse here: no index depends on them.
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

namespace {

constexpr int kLanes = 16;                  // float32 per vector: one cache line
constexpr int kTile = 16;                   // image columns per tile: one cache line of depth and cell
constexpr int kVectors = 8;                 // channel block: 128 channels in registers
constexpr int kBlock = kVectors * kLanes;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

struct Size {
  int64_t M, D, H, W, C, cells;
};

// Points h .. h + count - 1 of one column and depth that share a cell.
struct Run {
  int32_t cell, start, count;  // start = d * H + h
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer aligned_floats(int64_t n) {
  const int64_t bytes = (std::max<int64_t>(n, 1) * sizeof(float) + 63) / 64 * 64;
  return Buffer(static_cast<float*>(std::aligned_alloc(64, bytes)));
}

template <class Work>
void parallel(int64_t threads, Work work) {  // work(thread), thread 0 being the caller
  std::vector<std::thread> pool;
  for (int64_t t = 1; t < threads; ++t) pool.emplace_back(work, t);
  work(0);
  for (auto& t : pool) t.join();
}

// Fresh pages of a large result come zeroed by the kernel, 4 KiB at a time; huge pages make that several times faster.
void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 1 << 21, begin = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t(4095);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t(4095);
  if (end > begin && end - begin >= 2 * page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Rows [H][padded] of one image column, channels c0 .. c0 + n, zeros behind them.
void load_column(const float* context, const Size& s, int64_t m, int64_t w, int64_t c0, int64_t n, int64_t padded,
                 float* rows) {
  for (int64_t h = 0; h < s.H; ++h) {
    const float* from = context + ((m * s.H + h) * s.W + w) * s.C + c0;
    std::memcpy(rows + h * padded, from, n * sizeof(float));
    std::memset(rows + h * padded + n, 0, (padded - n) * sizeof(float));
  }
}

// ---------------------------------------------------------------------------------------------- forward

struct Tile {
  std::vector<Run> runs;                   // of all columns of the tile, ordered by (column, depth, row)
  std::vector<int64_t> first;              // first run of each column; one more entry at the end
};

// Transposes the depth of one tile to [column][D H] and lists its runs.
Tile scan_tile(const float* depth, const int32_t* cell, const Size& s, int64_t m, int64_t w0, float* transposed) {
  const int64_t columns = std::min<int64_t>(kTile, s.W - w0), points = s.D * s.H;
  std::vector<int32_t> cells(kTile * s.H);
  std::vector<std::vector<Run>> runs(columns);
  for (int64_t d = 0; d < s.D; ++d) {
    for (int64_t h = 0; h < s.H; ++h) {
      const int64_t at = ((m * s.D + d) * s.H + h) * s.W + w0;
      for (int64_t w = 0; w < columns; ++w) {
        transposed[w * points + d * s.H + h] = depth[at + w];
        cells[w * s.H + h] = cell[at + w];
      }
    }
    for (int64_t w = 0; w < columns; ++w) {
      const int32_t* line = cells.data() + w * s.H;
      for (int64_t h = 0; h < s.H;) {
        int64_t end = h + 1;
        while (end < s.H && line[end] == line[h]) ++end;
        if (line[h] >= 0 && line[h] < s.cells)
          runs[w].push_back({line[h], int32_t(d * s.H + h), int32_t(end - h)});
        h = end;
      }
    }
  }
  Tile tile;
  for (auto& column : runs) {
    tile.first.push_back(tile.runs.size());
    tile.runs.insert(tile.runs.end(), column.begin(), column.end());
  }
  tile.first.push_back(tile.runs.size());
  return tile;
}

// Sum over a run of depth * context row, NV vectors of channels; two chains hide the latency of the adds.
template <int NV>
inline void sum_run(const float* depth, const float* rows, int64_t count, Vector* sum) {
  Vector even[NV], odd[NV];
  for (int v = 0; v < NV; ++v) even[v] = odd[v] = Vector{};
  int64_t i = 0;
  for (; i + 1 < count; i += 2) {
    const Vector* a = reinterpret_cast<const Vector*>(rows + i * NV * kLanes);
    const Vector* b = a + NV;
    for (int v = 0; v < NV; ++v) even[v] += depth[i] * a[v];
    for (int v = 0; v < NV; ++v) odd[v] += depth[i + 1] * b[v];
  }
  if (i < count) {
    const Vector* a = reinterpret_cast<const Vector*>(rows + i * NV * kLanes);
    for (int v = 0; v < NV; ++v) even[v] += depth[i] * a[v];
  }
  for (int v = 0; v < NV; ++v) sum[v] = even[v] + odd[v];
}

// Pools channels c0 .. c0 + n into the cells low .. high - 1.
template <int NV>
void pool_range(const float* transposed, const float* context, const std::vector<Tile>& tiles, const Size& s,
                int64_t c0, int64_t n, int64_t low, int64_t high, float* out) {
  const int64_t tiles_per_image = (s.W + kTile - 1) / kTile, points = s.D * s.H, padded = NV * kLanes;
  Buffer rows = aligned_floats(s.H * padded);
  std::vector<char> touched(high - low, 0);
  for (int64_t t = 0; t < int64_t(tiles.size()); ++t) {
    const int64_t m = t / tiles_per_image, w0 = t % tiles_per_image * kTile;
    for (int64_t w = 0; w + 1 < int64_t(tiles[t].first.size()); ++w) {
      const float* depth = transposed + (m * s.W + w0 + w) * points;
      bool loaded = false;
      for (int64_t r = tiles[t].first[w]; r < tiles[t].first[w + 1]; ++r) {
        const Run run = tiles[t].runs[r];
        if (run.cell < low || run.cell >= high) continue;
        if (!loaded) load_column(context, s, m, w0 + w, c0, n, padded, rows.get());
        loaded = true;
        alignas(64) Vector sum[NV];
        sum_run<NV>(depth + run.start, rows.get() + run.start % s.H * padded, run.count, sum);
        float* row = out + run.cell * s.C + c0;
        const bool add = touched[run.cell - low];
        touched[run.cell - low] = 1;
        int64_t v = 0;
        for (; (v + 1) * kLanes <= n; ++v) {
          Unaligned* to = reinterpret_cast<Unaligned*>(row + v * kLanes);
          *to = add ? *to + sum[v] : sum[v];
        }
        for (int64_t c = v * kLanes; c < n; ++c) row[c] = add ? row[c] + sum[v][c % kLanes] : sum[v][c % kLanes];
      }
    }
  }
  for (int64_t i = low; i < high; ++i)
    if (!touched[i - low]) std::memset(out + i * s.C + c0, 0, n * sizeof(float));
}

using PoolRange = void (*)(const float*, const float*, const std::vector<Tile>&, const Size&, int64_t, int64_t, int64_t,
                           int64_t, float*);
constexpr PoolRange kPoolRange[kVectors] = {pool_range<1>, pool_range<2>, pool_range<3>, pool_range<4>,
                                            pool_range<5>, pool_range<6>, pool_range<7>, pool_range<8>};

// Ranges of cells with about equal work: cells near the cameras collect most points.
std::vector<int64_t> split_cells(const std::vector<Tile>& tiles, int64_t cells, int64_t threads) {
  const int64_t bucket = std::max<int64_t>(1, cells / 4096), buckets = (cells + bucket - 1) / bucket;
  std::vector<int64_t> work(buckets, bucket);
  for (auto& tile : tiles)
    for (auto& run : tile.runs) work[run.cell / bucket] += run.count + 8;
  int64_t total = 0, seen = 0;
  for (int64_t x : work) total += x;
  std::vector<int64_t> bounds{0};
  for (int64_t b = 0; b < buckets; ++b) {
    seen += work[b];
    while (int64_t(bounds.size()) < threads && seen * threads >= total * int64_t(bounds.size()))
      bounds.push_back(std::min(cells, (b + 1) * bucket));
  }
  bounds.resize(threads, cells);
  bounds.push_back(cells);
  return bounds;
}

}  // namespace

extern "C" void voxel_pool_forward(const float* depth, const float* context, const int32_t* cell, float* out, int64_t M,
                                   int64_t D, int64_t H, int64_t W, int64_t C, int64_t cells, int64_t threads) {
  const Size s{M, D, H, W, C, cells};
  prefer_huge_pages(out, cells * C * sizeof(float));
  const int64_t tiles_per_image = (W + kTile - 1) / kTile, count = M * tiles_per_image;
  Buffer transposed = aligned_floats(M * D * H * W);
  std::vector<Tile> tiles(count);
  parallel(threads, [&](int64_t thread) {
    for (int64_t t = count * thread / threads; t < count * (thread + 1) / threads; ++t) {
      const int64_t m = t / tiles_per_image, w0 = t % tiles_per_image * kTile;
      tiles[t] = scan_tile(depth, cell, s, m, w0, transposed.get() + (m * W + w0) * D * H);
    }
  });
  const std::vector<int64_t> bounds = split_cells(tiles, cells, threads);
  parallel(threads, [&](int64_t thread) {
    for (int64_t c0 = 0; c0 < C; c0 += kBlock) {
      const int64_t n = std::min<int64_t>(kBlock, C - c0);
      kPoolRange[(n + kLanes - 1) / kLanes - 1](transposed.get(), context, tiles, s, c0, n, bounds[thread],
                                                bounds[thread + 1], out);
    }
  });
}

// ---------------------------------------------------------------------------------------------- backward

namespace {

constexpr int64_t kDepths = 32;  // bins per pass: their rows of the gradient stay in the first cache level

inline float sum_lanes(Vector v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// One tile of columns, channels c0 .. c0 + n. Adds to grad_depth of earlier channel blocks if c0 > 0.
template <int NV>
void tile_gradient(const float* grad, const float* depth, const float* context, const int32_t* cell, const Size& s,
                   int64_t m, int64_t w0, int64_t c0, int64_t n, float* grad_depth, float* grad_context) {
  const int64_t columns = std::min<int64_t>(kTile, s.W - w0), padded = NV * kLanes;
  Buffer rows = aligned_floats(s.H * padded), sums = aligned_floats(s.H * padded), padded_row = aligned_floats(padded);
  std::fill_n(padded_row.get(), padded, 0.0f);
  for (int64_t w = w0; w < w0 + columns; ++w) {
    load_column(context, s, m, w, c0, n, padded, rows.get());
    std::fill_n(sums.get(), s.H * padded, 0.0f);
    for (int64_t d0 = 0; d0 < s.D; d0 += kDepths) {
      for (int64_t h = 0; h < s.H; ++h) {
        Vector feature[NV], sum[NV];
        for (int v = 0; v < NV; ++v) {
          feature[v] = reinterpret_cast<Vector*>(rows.get() + h * padded)[v];
          sum[v] = reinterpret_cast<Vector*>(sums.get() + h * padded)[v];
        }
        for (int64_t d = d0; d < std::min(s.D, d0 + kDepths); ++d) {
          const int64_t at = ((m * s.D + d) * s.H + h) * s.W + w;
          const int32_t row = cell[at];
          float dot = 0;
          if (row >= 0 && row < s.cells) {
            const float* from = grad + row * s.C + c0;
            if (n != padded) from = static_cast<float*>(std::memcpy(padded_row.get(), from, n * sizeof(float)));
            Vector product = Vector{};
            for (int v = 0; v < NV; ++v) {
              const Vector g = *reinterpret_cast<const Unaligned*>(from + v * kLanes);
              product += g * feature[v];
              sum[v] += depth[at] * g;
            }
            dot = sum_lanes(product);
          }
          grad_depth[at] = c0 > 0 ? grad_depth[at] + dot : dot;
        }
        for (int v = 0; v < NV; ++v) reinterpret_cast<Vector*>(sums.get() + h * padded)[v] = sum[v];
      }
    }
    for (int64_t h = 0; h < s.H; ++h)
      std::memcpy(grad_context + ((m * s.H + h) * s.W + w) * s.C + c0, sums.get() + h * padded, n * sizeof(float));
  }
}

using TileGradient = void (*)(const float*, const float*, const float*, const int32_t*, const Size&, int64_t, int64_t,
                              int64_t, int64_t, float*, float*);
constexpr TileGradient kTileGradient[kVectors] = {tile_gradient<1>, tile_gradient<2>, tile_gradient<3>,
                                                  tile_gradient<4>, tile_gradient<5>, tile_gradient<6>,
                                                  tile_gradient<7>, tile_gradient<8>};

}  // namespace

extern "C" void voxel_pool_backward(const float* grad, const float* depth, const float* context, const int32_t* cell,
                                    float* grad_depth, float* grad_context, int64_t M, int64_t D, int64_t H, int64_t W,
                                    int64_t C, int64_t cells, int64_t threads) {
  const Size s{M, D, H, W, C, cells};
  const int64_t tiles_per_image = (W + kTile - 1) / kTile, count = M * tiles_per_image;
  parallel(threads, [&](int64_t thread) {
    for (int64_t t = count * thread / threads; t < count * (thread + 1) / threads; ++t)
      for (int64_t c0 = 0; c0 < C; c0 += kBlock) {
        const int64_t n = std::min<int64_t>(kBlock, C - c0);
        kTileGradient[(n + kLanes - 1) / kLanes - 1](grad, depth, context, cell, s, t / tiles_per_image,
                                                     t % tiles_per_image * kTile, c0, n, grad_depth, grad_context);
      }
  });
}

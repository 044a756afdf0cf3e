// Sparse convolution on the host: register tiles of gathered rows times one offset's weights.
//
// For a block of output rows and one kernel offset the table is compressed into (input, output) pairs. Up to ROWS pairs
// times VECS vectors of output channels are kept in registers while the input channels are summed, so that a pair costs
// no more memory traffic than its own two rows. A block's outputs and one offset's weights stay in the L2 cache.
// Every output element is summed in the order (offset, input channel) whatever the block size or number of threads.

#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")  // multiply-adds are wanted here; the shared flags forbid them
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "../lanes.h"
#include "../parallel.h"

namespace {

#if defined(__AVX512F__)
constexpr int MAX_VECS = 4;  // 32 registers of 16 floats
constexpr int rows_of(int vecs) { return vecs == 1 ? 12 : vecs == 2 ? 10 : vecs == 3 ? 8 : 6; }
#elif defined(__AVX__)
constexpr int MAX_VECS = 2;  // 16 registers of 8
constexpr int rows_of(int vecs) { return vecs == 1 ? 8 : 6; }
#else
constexpr int MAX_VECS = 4;  // NEON: 32 registers of 4
constexpr int rows_of(int vecs) { return vecs <= 2 ? 8 : 5; }
#endif
constexpr int MAX_ROWS = 12;
constexpr int64_t LANES = Lanes<float>::n, PANEL = MAX_VECS * LANES;

typedef Lanes<float>::Unaligned Vec;

// Fused in every tile or in none, or the sums would depend on how pairs fall into tiles, which the number of threads decides.
inline Vec multiply_add(float scale, Vec row, Vec sum) { return fused<float>(all(scale), row, sum); }

struct Buffer {  // cache-line aligned floats
    float* data;
    explicit Buffer(int64_t n) : data(static_cast<float*>(::operator new(size_t(n + 16) * 4, std::align_val_t(64)))) {}
    ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Pairs (entry, position) of the non-negative table entries; sets *bad if an entry is not below `limit`.
int64_t compress(const int32_t* table, int64_t n, int64_t limit, int32_t* in, int32_t* out, std::atomic<int>* bad) {
    int64_t count = 0, i = 0;
    int32_t largest = -1;
#if defined(__AVX512F__)
    __m512i position = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i top = _mm512_set1_epi32(-1);
    for (; i + 16 <= n; i += 16, position = _mm512_add_epi32(position, _mm512_set1_epi32(16))) {
        const __m512i entry = _mm512_loadu_si512(table + i);
        const __mmask16 there = _mm512_cmpge_epi32_mask(entry, _mm512_setzero_si512());
        if (!there) continue;
        top = _mm512_max_epi32(top, entry);
        // Full stores: the arrays have 16 spare entries, and a masked compressing store is slow.
        _mm512_storeu_si512(in + count, _mm512_maskz_compress_epi32(there, entry));
        _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(there, position));
        count += __builtin_popcount(there);
    }
    largest = _mm512_reduce_max_epi32(top);
#endif
    for (; i < n; ++i) {
        in[count] = table[i];
        out[count] = int32_t(i);
        count += table[i] >= 0;
        largest = std::max(largest, table[i]);
    }
    if (largest >= limit) {
        bad->store(1);
        return 0;
    }
    return count;
}

// y[out[r]] += x[in[r]] @ w for ROWS pairs and one panel of VECS vectors. w is [C_in][VECS * LANES].
template <int ROWS, int VECS>
void tile(const float* x, int64_t channels_in, const float* w, float* y, int64_t stride_y, const int32_t* in, const int32_t* out) {
    const float* source[ROWS];
    Vec sum[ROWS][VECS];
    for (int r = 0; r < ROWS; ++r) {
        source[r] = x + in[r] * channels_in;
        const Vec* target = reinterpret_cast<const Vec*>(y + out[r] * stride_y);
        for (int v = 0; v < VECS; ++v) sum[r][v] = target[v];
    }
    for (int64_t c = 0; c < channels_in; ++c, w += VECS * LANES) {
        const Vec* weight = reinterpret_cast<const Vec*>(w);
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECS; ++v) sum[r][v] = multiply_add(source[r][c], weight[v], sum[r][v]);
    }
    for (int r = 0; r < ROWS; ++r) {
        Vec* target = reinterpret_cast<Vec*>(y + out[r] * stride_y);
        for (int v = 0; v < VECS; ++v) target[v] = sum[r][v];
    }
}

// g[c][:] += x[c] * y[:] summed over `n` pairs, for ROWS input channels and VECS vectors of output channels.
template <int ROWS, int VECS>
void outer_tile(const float* const* x, const float* const* y, int64_t n, int64_t c, int64_t o, float* g, int64_t stride_g) {
    Vec sum[ROWS][VECS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECS; ++v) sum[r][v] = reinterpret_cast<const Vec*>(g + r * stride_g)[v];
    for (int64_t p = 0; p < n; ++p) {
        const float* row = x[p] + c;
        const Vec* grad = reinterpret_cast<const Vec*>(y[p] + o);
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECS; ++v) sum[r][v] = multiply_add(row[r], grad[v], sum[r][v]);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECS; ++v) reinterpret_cast<Vec*>(g + r * stride_g)[v] = sum[r][v];
}

using Tile = void (*)(const float*, int64_t, const float*, float*, int64_t, const int32_t*, const int32_t*);
using OuterTile = void (*)(const float* const*, const float* const*, int64_t, int64_t, int64_t, float*, int64_t);

template <int VECS, int... R>
Tile pick_tile(int rows, std::integer_sequence<int, R...>) {
    static constexpr Tile tiles[] = {tile<(R < rows_of(VECS) ? R + 1 : 1), VECS>...};
    return tiles[rows - 1];
}
template <int VECS, int... R>
OuterTile pick_outer(int rows, std::integer_sequence<int, R...>) {
    static constexpr OuterTile tiles[] = {outer_tile<(R < rows_of(VECS) ? R + 1 : 1), VECS>...};
    return tiles[rows - 1];
}
Tile tile_of(int rows, int vecs) {
    constexpr auto all = std::make_integer_sequence<int, MAX_ROWS>{};
    if (vecs == 1) return pick_tile<1>(rows, all);
    if (vecs == 2) return pick_tile<2>(rows, all);
    if (vecs == 3) return pick_tile<std::min(3, MAX_VECS)>(rows, all);
    return pick_tile<MAX_VECS>(rows, all);
}
OuterTile outer_tile_of(int rows, int vecs) {
    constexpr auto all = std::make_integer_sequence<int, MAX_ROWS>{};
    if (vecs == 1) return pick_outer<1>(rows, all);
    if (vecs == 2) return pick_outer<2>(rows, all);
    if (vecs == 3) return pick_outer<std::min(3, MAX_VECS)>(rows, all);
    return pick_outer<MAX_VECS>(rows, all);
}

// Splits n into the fewest groups of at most `most`, sizes differing by at most one: no nearly empty tile at the end.
template <class Body>
void even_groups(int64_t n, int64_t most, Body body) {
    for (int64_t begin = 0, left = (n + most - 1) / most; left > 0; --left) {
        const int64_t size = (n - begin + left - 1) / left;
        body(begin, size);
        begin += size;
    }
}

// [K][panel][C_in][panel width] from any strides; channels beyond C_out are 0.
void pack(const float* w, const int64_t* stride, int64_t K, int64_t channels_in, int64_t channels_out, float* packed) {
    const int64_t padded = round_up(channels_out, LANES);
    for (int64_t k = 0; k < K; ++k)
        for (int64_t begin = 0; begin < padded; begin += PANEL) {
            const int64_t width = std::min(PANEL, padded - begin), real = std::min(PANEL, channels_out - begin);
            float* panel = packed + k * channels_in * padded + channels_in * begin;
            for (int64_t c = 0; c < channels_in; ++c) {
                const float* row = w + k * stride[0] + c * stride[1] + begin * stride[2];
                for (int64_t o = 0; o < real; ++o) panel[c * width + o] = row[o * stride[2]];
                for (int64_t o = real; o < width; ++o) panel[c * width + o] = 0;
            }
        }
}

}  // namespace

// x [V C_in], w [K C_in C_out] with strides, table [K W] -> y [W C_out]. Returns 1 if a table entry is >= V.
extern "C" int64_t sparse_conv(const float* x, const float* w, const int64_t* w_stride, const int32_t* table, int64_t K, int64_t V,
                           int64_t W, int64_t channels_in, int64_t channels_out, float* y, int64_t threads) try {
    const int64_t padded = round_up(channels_out, LANES);
    Buffer weights(K * channels_in * padded);
    pack(w, w_stride, K, channels_in, channels_out, weights.data);
    // A quarter of a megabyte of outputs, but enough blocks to balance the threads.
    int64_t block = std::max<int64_t>(64, (1 << 18) / (4 * padded));
    block = std::min(block, std::max<int64_t>(64, (W + 4 * threads - 1) / (4 * threads)));
    std::atomic<int> bad{0};

    parallel_workers((W + block - 1) / block, threads, [&] {
        return [&, sums = std::make_shared<Buffer>(block * padded), in = std::vector<int32_t>(block + 16),
                out = std::vector<int32_t>(block + 16)](int64_t unit) mutable {
            const int64_t begin = unit * block, rows = std::min(block, W - begin);
            float* sum = sums->data;
            std::memset(sum, 0, size_t(rows * padded) * 4);
            for (int64_t k = 0; k < K; ++k) {
                const int64_t pairs = compress(table + k * W + begin, rows, V, in.data(), out.data(), &bad);
                for (int64_t o = 0; o < padded; o += PANEL) {
                    const int vecs = int(std::min(PANEL, padded - o) / LANES);
                    const float* panel = weights.data + k * channels_in * padded + channels_in * o;
                    even_groups(pairs, rows_of(vecs), [&](int64_t p, int64_t n) {
                        tile_of(int(n), vecs)(x, channels_in, panel, sum + o, padded, &in[p], &out[p]);
                    });
                }
            }
            for (int64_t r = 0; r < rows; ++r)
                std::memcpy(y + (begin + r) * channels_out, sum + r * padded, size_t(channels_out) * 4);
        };
    });
    return bad.load();
} CATCH_OUT_OF_MEMORY

// x [V C_in], grad [W C_out], table [K W] -> g [K C_in C_out]. Returns 1 if a table entry is >= V.
extern "C" int64_t sparse_conv_weight_grad(const float* x, const float* grad, const int32_t* table, int64_t K, int64_t V, int64_t W,
                                       int64_t channels_in, int64_t channels_out, float* g, int64_t threads) try {
    const int64_t padded = round_up(channels_out, LANES);
    constexpr int64_t CHUNK = 64, STRIP = 4096;
    std::atomic<int> bad{0};

    parallel_workers(K, threads, [&] {
        return [&, sums = std::make_shared<Buffer>(channels_in * padded), copies = std::make_shared<Buffer>(CHUNK * padded),
                in = std::vector<int32_t>(STRIP + 16), out = std::vector<int32_t>(STRIP + 16)](int64_t k) mutable {
            float* sum = sums->data;
            std::memset(sum, 0, size_t(channels_in * padded) * 4);
            for (int64_t begin = 0; begin < W; begin += STRIP) {
                const int64_t pairs =
                    compress(table + k * W + begin, std::min(STRIP, W - begin), V, in.data(), out.data(), &bad);
                for (int64_t first = 0; first < pairs; first += CHUNK) {
                    const int64_t n = std::min(CHUNK, pairs - first);
                    const float *from[CHUNK], *to[CHUNK];
                    for (int64_t p = 0; p < n; ++p) {
                        from[p] = x + in[first + p] * channels_in;
                        to[p] = grad + (begin + out[first + p]) * channels_out;
                        if (padded != channels_out) {  // whole vectors would read past the row
                            float* copy = copies->data + p * padded;
                            std::memset(copy, 0, size_t(padded) * 4);
                            to[p] = static_cast<float*>(std::memcpy(copy, to[p], size_t(channels_out) * 4));
                        }
                    }
                    for (int64_t o = 0; o < padded; o += PANEL) {
                        const int vecs = int(std::min(PANEL, padded - o) / LANES);
                        even_groups(channels_in, rows_of(vecs), [&](int64_t c, int64_t size) {
                            outer_tile_of(int(size), vecs)(from, to, n, c, o, sum + c * padded + o, padded);
                        });
                    }
                }
            }
            for (int64_t c = 0; c < channels_in; ++c)
                std::memcpy(g + (k * channels_in + c) * channels_out, sum + c * padded, size_t(channels_out) * 4);
        };
    });
    return bad.load();
} CATCH_OUT_OF_MEMORY

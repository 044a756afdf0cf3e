// Neighbour tables on the host. Active cells live in a hashed bitmap: 64 consecutive cells (along z, then y, then x) share
// a word, so the three z neighbours of a column cost one look-up, and ranks come from counting bits.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "../parallel.h"

namespace {

constexpr int64_t CHUNK = 256;  // rows per unit of work: their table entries for 27 offsets fit the L1 cache
constexpr int64_t MAX_BATCH = 1 << 13;  // keys stay below 2^62 for any grid that the contract allows

struct Word {
    int64_t index = -1;  // cell number / 64; -1: free slot
    uint64_t bits = 0;   // active cells
    int64_t base = 0;    // rank of the first of them
};

class CellSet {
    std::vector<Word> slots;
    size_t words = 0, last = 0;  // number of words; slot of the latest insertion

    size_t slot_of(int64_t index) const {
        const size_t mask = slots.size() - 1;
        size_t slot = (uint64_t(index) * 0x9E3779B97F4A7C15u >> 20) & mask;
        while (slots[slot].index >= 0 && slots[slot].index != index) slot = (slot + 1) & mask;
        return slot;
    }
    void grow() {
        std::vector<Word> old(4 * slots.size());
        old.swap(slots);
        for (const Word& word : old)
            if (word.index >= 0) slots[slot_of(word.index)] = word;
        last = 0;
    }

public:
    explicit CellSet(int64_t expected) {
        size_t size = 64;
        while (size < 2 * size_t(expected)) size *= 2;
        slots.resize(size);
    }
    void insert(int64_t cell) {
        const int64_t index = cell >> 6;
        if (slots[last].index != index) last = slot_of(index);
        Word& word = slots[last];
        word.bits |= uint64_t(1) << (cell & 63);
        if (word.index < 0) {
            word.index = index;
            if (2 * ++words > slots.size()) grow();
        }
    }
    // Ranks the cells in ascending order; returns the active words, ascending.
    std::vector<Word> rank_ascending() {
        std::vector<std::pair<int64_t, size_t>> order;
        order.reserve(words);
        for (size_t slot = 0; slot < slots.size(); ++slot)
            if (slots[slot].index >= 0) order.emplace_back(slots[slot].index, slot);
        std::sort(order.begin(), order.end());
        std::vector<Word> ranked;
        ranked.reserve(words);
        int64_t base = 0;
        for (const auto& [index, slot] : order) {
            slots[slot].base = base;
            base += __builtin_popcountll(slots[slot].bits);
            ranked.push_back(slots[slot]);
        }
        return ranked;
    }
    void rank_any_order() {
        int64_t base = 0;
        for (Word& word : slots) {
            word.base = base;
            base += __builtin_popcountll(word.bits);
        }
    }
    int64_t rank(int64_t cell) const {  // -1 if not active
        const Word& word = slots[slot_of(cell >> 6)];  // a free slot has no bits set
        const uint64_t bit = uint64_t(1) << (cell & 63);
        return word.bits & bit ? word.base + __builtin_popcountll(word.bits & (bit - 1)) : -1;
    }
    // Calls visit(i, rank) for the active cells among cell + i, i < count.
    template <class Visit>
    void for_active(int64_t cell, int64_t count, Visit visit) const {
        for (int64_t i = 0; i < count;) {
            const int64_t shift = (cell + i) & 63, span = std::min(count - i, 64 - shift);
            const Word& word = slots[slot_of((cell + i) >> 6)];
            const uint64_t window = (span == 64 ? ~uint64_t(0) : (uint64_t(1) << span) - 1) << shift;
            for (uint64_t bits = word.bits & window; bits; bits &= bits - 1) {
                const int64_t bit = __builtin_ctzll(bits);
                visit(i + bit - shift, word.base + __builtin_popcountll(word.bits & ((uint64_t(1) << bit) - 1)));
            }
            i += span;
        }
    }
};

int64_t cell_of(int64_t b, const int64_t* p, const int64_t* grid) {
    return ((b * grid[0] + p[0]) * grid[1] + p[1]) * grid[2] + p[2];
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// First valid row outside the grid or the batch, or -1.
int64_t misplaced(const int32_t* coords, const uint8_t* valid, int64_t V, const int64_t* grid, int64_t batch) {
    for (int64_t v = 0; v < V; ++v) {
        if (!valid[v]) continue;
        const int32_t* c = coords + 4 * v;
        bool in = c[0] >= 0 && c[0] < batch;
        for (int a = 0; a < 3; ++a) in &= c[1 + a] >= 0 && c[1 + a] < grid[a];
        if (!in) return v;
    }
    return -1;
}

int64_t count_valid(const uint8_t* valid, int64_t V) {
    int64_t n = 0;
    for (int64_t v = 0; v < V; ++v) n += valid[v];
    return n;
}

}  // namespace

// coords [V 4], valid [V] -> table [K V]. Returns the first valid row outside the grid, or -1 if all are fine.
extern "C" int64_t submanifold(const int32_t* coords, const uint8_t* valid, int64_t V, const int64_t* kernel,
                               const int64_t* grid, int32_t* table, int64_t threads) try {
    const int64_t wrong = misplaced(coords, valid, V, grid, MAX_BATCH);
    if (wrong >= 0) return wrong;
    const int64_t active = count_valid(valid, V), K = kernel[0] * kernel[1] * kernel[2];
    auto site = [&](int64_t v, int64_t* p) {
        for (int a = 0; a < 3; ++a) p[a] = coords[4 * v + 1 + a];
        return cell_of(coords[4 * v], p, grid);
    };
    CellSet cells(active);
    int64_t p[3];
    for (int64_t v = 0; v < V; ++v)
        if (valid[v]) cells.insert(site(v, p));
    cells.rank_any_order();
    std::vector<int32_t> row(active);
    for (int64_t v = 0; v < V; ++v)
        if (valid[v]) row[cells.rank(site(v, p))] = int32_t(v);

    parallel((V + CHUNK - 1) / CHUNK, threads, [&](int64_t unit) {
        const int64_t begin = unit * CHUNK, end = std::min(V, begin + CHUNK);
        for (int64_t k = 0; k < K; ++k) std::memset(table + k * V + begin, 0xff, size_t(end - begin) * 4);  // -1
        for (int64_t v = begin; v < end; ++v) {
            if (!valid[v]) continue;
            int64_t p[3];
            site(v, p);
            int64_t k = 0;
            for (int64_t kx = 0; kx < kernel[0]; ++kx)
                for (int64_t ky = 0; ky < kernel[1]; ++ky, k += kernel[2]) {
                    int64_t q[3] = {p[0] - kernel[0] / 2 + kx, p[1] - kernel[1] / 2 + ky, 0};
                    if (q[0] < 0 || q[0] >= grid[0] || q[1] < 0 || q[1] >= grid[1]) continue;
                    const int64_t low = p[2] - kernel[2] / 2, first = std::max<int64_t>(0, -low);
                    q[2] = low + first;
                    cells.for_active(cell_of(coords[4 * v], q, grid), std::min(kernel[2], grid[2] - low) - first,
                                     [&](int64_t i, int64_t rank) { table[(k + first + i) * V + v] = row[rank]; });
                }
        }
    });
    return -1;
} CATCH_OUT_OF_MEMORY

// coords [V 4], valid [V] -> out_coords [W 4], out_valid [W], table [K W], inverse [K V], found. Returns as submanifold.
extern "C" int64_t strided(const int32_t* coords, const uint8_t* valid, int64_t V, const int64_t* kernel, const int64_t* stride,
                           const int64_t* padding, const int64_t* grid, const int64_t* out_grid, int64_t W, int64_t batch,
                           int32_t* out_coords, uint8_t* out_valid, int32_t* table, int32_t* inverse, int32_t* found,
                           int64_t threads) try {
    const int64_t wrong = misplaced(coords, valid, V, grid, batch);
    if (wrong >= 0) return wrong;
    const int64_t K = kernel[0] * kernel[1] * kernel[2];

    // Calls visit(k, output cell) for every output that row v feeds: offset k = position + padding - output * stride.
    auto for_outputs = [&](int64_t v, auto visit) {
        int64_t first[3], last[3], shifted[3];
        for (int a = 0; a < 3; ++a) {
            shifted[a] = coords[4 * v + 1 + a] + padding[a];
            first[a] = std::max<int64_t>(0, floor_div(shifted[a] - kernel[a], stride[a]) + 1);
            last[a] = std::min(out_grid[a] - 1, shifted[a] / stride[a]);
        }
        int64_t q[3];
        for (q[0] = first[0]; q[0] <= last[0]; ++q[0])
            for (q[1] = first[1]; q[1] <= last[1]; ++q[1])
                for (q[2] = first[2]; q[2] <= last[2]; ++q[2]) {
                    int64_t k = 0;
                    for (int a = 0; a < 3; ++a) k = k * kernel[a] + shifted[a] - q[a] * stride[a];
                    visit(k, cell_of(coords[4 * v], q, out_grid));
                }
    };
    CellSet cells(count_valid(valid, V));
    for (int64_t v = 0; v < V; ++v)
        if (valid[v]) for_outputs(v, [&](int64_t, int64_t cell) { cells.insert(cell); });

    std::memset(out_coords, 0xff, size_t(W) * 16);  // -1
    std::memset(out_valid, 0, size_t(W));
    int64_t outputs = 0;
    for (const Word& word : cells.rank_ascending())
        for (uint64_t bits = word.bits; bits; bits &= bits - 1, ++outputs) {
            if (outputs >= W) continue;  // only counted
            int64_t cell = word.index * 64 + __builtin_ctzll(bits);
            out_valid[outputs] = 1;
            for (int a = 2; a >= 0; --a, cell /= out_grid[a + 1]) out_coords[4 * outputs + 1 + a] = int32_t(cell % out_grid[a]);
            out_coords[4 * outputs] = int32_t(cell);
        }
    *found = int32_t(outputs);

    parallel(K, threads, [&](int64_t k) { std::memset(table + k * W, 0xff, size_t(W) * 4); });
    parallel((V + CHUNK - 1) / CHUNK, threads, [&](int64_t unit) {
        const int64_t begin = unit * CHUNK, end = std::min(V, begin + CHUNK);
        for (int64_t k = 0; k < K; ++k) std::memset(inverse + k * V + begin, 0xff, size_t(end - begin) * 4);
        for (int64_t v = begin; v < end; ++v)
            if (valid[v])
                for_outputs(v, [&](int64_t k, int64_t cell) {
                    const int64_t rank = cells.rank(cell);
                    if (rank >= W) return;
                    inverse[k * V + v] = int32_t(rank);
                    table[k * W + rank] = int32_t(v);
                });
    });
    return -1;
} CATCH_OUT_OF_MEMORY

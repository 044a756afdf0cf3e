// Hard voxelization on the host: one pass over the points with a hash table from cell to voxel number.
// Compiled with -ffp-contract=off: the cell index must round after the subtraction and after the division.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../parallel.h"

namespace {

struct Setting {
    float lower[3], size[3];
    int64_t grid[3];
    int64_t points, columns, max_points, max_voxels;
};

// Number of the point's cell in the grid, or -1 if the point is to be ignored.
int64_t cell_of(const float* point, const Setting& s, int32_t* cell) {
    float sum = 0;  // of zeros, unless a column is NaN or infinite
    for (int64_t c = 0; c < s.columns; ++c) sum += point[c] * 0.0f;
    bool inside = sum == 0;
    for (int a = 0; a < 3; ++a) {
        const float index = std::floor((point[a] - s.lower[a]) / s.size[a]);
        const bool in = index >= 0 && index < float(s.grid[a]);
        cell[a] = in ? int32_t(index) : 0;
        inside &= in;
    }
    return inside ? (cell[0] * s.grid[1] + cell[1]) * s.grid[2] + cell[2] : -1;
}

// Cell -> number in the order of insertion. Open addressing; the slots hold numbers, the cells lie densely beside them.
class Numbering {
    std::vector<int32_t> slots = std::vector<int32_t>(1 << 12, -1);
    std::vector<int64_t> cells;

    size_t slot_of(int64_t cell) const {
        const size_t mask = slots.size() - 1;
        size_t slot = (uint64_t(cell) * 0x9E3779B97F4A7C15u >> 20) & mask;
        while (slots[slot] >= 0 && cells[slots[slot]] != cell) slot = (slot + 1) & mask;
        return slot;
    }

public:
    int64_t size() const { return int64_t(cells.size()); }

    int32_t number(int64_t cell) {
        const size_t slot = slot_of(cell);
        if (slots[slot] >= 0) return slots[slot];
        const int32_t fresh = slots[slot] = int32_t(cells.size());
        cells.push_back(cell);
        if (2 * cells.size() > slots.size()) {
            slots.assign(4 * slots.size(), -1);
            for (size_t n = 0; n < cells.size(); ++n) slots[slot_of(cells[n])] = int32_t(n);
        }
        return fresh;
    }
};

void voxelize_sample(const float* points, const uint8_t* valid, const Setting& s, float* features, int32_t* coords,
                     int32_t* count, int32_t* found) {
    std::memset(features, 0, size_t(s.max_voxels * s.columns) * 4);
    std::memset(coords, 0xff, size_t(s.max_voxels) * 3 * 4);  // -1
    std::memset(count, 0, size_t(s.max_voxels) * 4);
    Numbering numbering;
    int32_t cell[3];
    for (int64_t p = 0; p < s.points; ++p) {
        const float* point = points + p * s.columns;
        const int64_t key = valid[p] ? cell_of(point, s, cell) : -1;
        if (key < 0) continue;
        const int32_t voxel = numbering.number(key);
        if (voxel >= s.max_voxels || count[voxel] >= s.max_points) continue;
        if (count[voxel]++ == 0) std::memcpy(coords + 3 * int64_t(voxel), cell, sizeof cell);
        for (int64_t c = 0; c < s.columns; ++c) features[voxel * s.columns + c] += point[c];
    }
    *found = int32_t(numbering.size());
    for (int64_t v = 0; v < s.max_voxels && count[v] > 0; ++v)
        for (int64_t c = 0; c < s.columns; ++c) features[v * s.columns + c] /= float(count[v]);
}

}  // namespace

// points [B P C], valid [B P] -> features [B V C], coords [B V 3], count [B V], found [B]; grid, lower, size per axis.
extern "C" int64_t voxelize(const float* points, const uint8_t* valid, int64_t B, int64_t P, int64_t C, const float* lower,
                            const float* size, const int64_t* grid, int64_t max_points, int64_t V, float* features,
                            int32_t* coords, int32_t* count, int32_t* found, int64_t threads) try {
    Setting s;
    std::memcpy(s.lower, lower, sizeof s.lower);
    std::memcpy(s.size, size, sizeof s.size);
    std::memcpy(s.grid, grid, sizeof s.grid);
    s.points = P, s.columns = C, s.max_points = max_points, s.max_voxels = V;

    parallel(B, threads, [&](int64_t b) {  // samples share nothing
        voxelize_sample(points + b * P * C, valid + b * P, s, features + b * V * C, coords + b * V * 3, count + b * V, found + b);
    });
    return 0;
} CATCH_OUT_OF_MEMORY

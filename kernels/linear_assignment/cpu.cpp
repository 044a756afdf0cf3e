// linear_assignment on a CPU: shortest augmenting paths with dual prices, float64, O(rows^2 columns) per sample.
//
// Source: Jonker & Volgenant 1987 ("A shortest augmenting path algorithm for dense and sparse linear assignment
// problems"); the rectangular form as in Crouse 2016 ("On implementing 2D rectangular assignment algorithms").
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../parallel.h"

namespace {

constexpr double kLimit = 1e300;  // larger magnitudes count as infinite
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Storage for one problem of at most `rows` x `columns`, reused by a thread for its samples.
struct Workspace {
  std::vector<double> cost, row_price, column_price, distance;
  std::vector<int64_t> row_of, column_of, previous, open, boxes;
};

// Least-cost assignment of every row to a column of its own; rows <= columns. w.cost is [rows][columns], all finite.
//
// Prices satisfy cost[r][c] - row_price[r] - column_price[c] >= 0, with equality for assigned pairs, and a column that
// was never assigned has price 0: such an assignment is optimal. Each row that is still free is brought in along the
// path of least reduced cost to a free column (Dijkstra over columns), and prices follow the distances.
void assign(Workspace& w, int64_t rows, int64_t columns) {
  w.row_price.assign(rows, 0.0);
  w.column_price.assign(columns, 0.0);
  w.row_of.assign(columns, -1);
  w.column_of.assign(rows, -1);
  w.distance.resize(columns);
  w.previous.resize(columns);
  w.open.resize(columns);
  for (int64_t r = 0; r < rows; ++r) {  // start: rows whose cheapest column is still free take it
    const double* line = w.cost.data() + r * columns;
    const int64_t best = std::min_element(line, line + columns) - line;
    w.row_price[r] = line[best];
    if (w.row_of[best] < 0) {
      w.row_of[best] = r;
      w.column_of[r] = best;
    }
  }
  for (int64_t free = 0; free < rows; ++free) {
    if (w.column_of[free] >= 0) continue;
    std::fill(w.distance.begin(), w.distance.end(), kInfinity);
    for (int64_t c = 0; c < columns; ++c) w.open[c] = c;
    int64_t remaining = columns, row = free, sink = -1;
    double reached = 0;
    while (sink < 0) {  // close the nearest open column
      const double* line = w.cost.data() + row * columns;
      const double base = reached - w.row_price[row];
      int64_t nearest = -1;
      double least = kInfinity;
      for (int64_t i = 0; i < remaining; ++i) {
        const int64_t c = w.open[i];
        const double through = base + line[c] - w.column_price[c];
        if (through < w.distance[c]) {
          w.distance[c] = through;
          w.previous[c] = row;
        }
        // Among equals a free column ends the search.
        if (w.distance[c] < least || (w.distance[c] == least && w.row_of[c] < 0 && w.row_of[w.open[nearest]] >= 0)) {
          least = w.distance[c];
          nearest = i;
        }
      }
      reached = least;
      const int64_t column = w.open[nearest];
      std::swap(w.open[nearest], w.open[--remaining]);
      if (w.row_of[column] < 0) sink = column;
      else row = w.row_of[column];
    }
    w.row_price[free] += reached;
    for (int64_t i = remaining; i < columns; ++i) {  // closed columns; the sink's own change is zero
      const int64_t c = w.open[i];
      w.column_price[c] -= reached - w.distance[c];
      if (w.row_of[c] >= 0) w.row_price[w.row_of[c]] += reached - w.distance[c];
    }
    for (int64_t c = sink;;) {  // flip the path
      const int64_t r = w.previous[c], next = w.column_of[r];
      w.row_of[c] = r;
      w.column_of[r] = c;
      if (r == free) break;
      c = next;
    }
  }
}

// NaN and infinities become a number that no set of finite costs can outweigh.
void make_finite(std::vector<double>& cost, int64_t rows) {
  double low = kInfinity, high = -kInfinity;
  bool all = true;
  for (double x : cost) {
    if (!(std::fabs(x) <= kLimit)) {
      all = false;
      continue;
    }
    low = std::min(low, x);
    high = std::max(high, x);
  }
  if (all) return;
  if (low > high) low = high = 0;
  const double large = high + double(rows + 1) * (high - low + 1);
  for (double& x : cost)
    if (!(std::fabs(x) <= kLimit)) x = large;
}

// cost [Q][G], valid [G] -> match [G]
void solve(Workspace& w, const double* cost, const uint8_t* valid, int64_t Q, int64_t G, int64_t* match) {
  std::fill(match, match + G, int64_t(-1));
  w.boxes.clear();
  for (int64_t g = 0; g < G; ++g)
    if (valid[g]) w.boxes.push_back(g);
  const int64_t count = w.boxes.size();
  if (count == 0 || Q == 0) return;
  const bool boxes_are_rows = count <= Q;
  const int64_t rows = std::min(count, Q), columns = std::max(count, Q);
  w.cost.resize(rows * columns);
  for (int64_t q = 0; q < Q; ++q)
    for (int64_t i = 0; i < count; ++i) w.cost[boxes_are_rows ? i * Q + q : q * count + i] = cost[q * G + w.boxes[i]];
  make_finite(w.cost, rows);
  assign(w, rows, columns);
  for (int64_t r = 0; r < rows; ++r) {
    if (boxes_are_rows) match[w.boxes[r]] = w.column_of[r];
    else match[w.boxes[w.column_of[r]]] = r;
  }
}

}  // namespace

extern "C" int64_t linear_assignment(const double* cost, const uint8_t* valid, int64_t* match, int64_t B, int64_t Q,
                                     int64_t G, int64_t threads) try {
  parallel_workers(B, threads, [&] {
    return [&, w = Workspace()](int64_t b) mutable { solve(w, cost + b * Q * G, valid + b * G, Q, G, match + b * G); };
  });
  return 0;
} CATCH_OUT_OF_MEMORY

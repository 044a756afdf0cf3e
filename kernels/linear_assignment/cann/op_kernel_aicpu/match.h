// The AI CPU kernel without CANN: plain buffers in and out, so that any C++17 compiler builds and tests it.
#ifndef BEVFN_LINEAR_ASSIGNMENT_MATCH_H_
#define BEVFN_LINEAR_ASSIGNMENT_MATCH_H_

#include <cstdint>
#include <vector>

#include "cpu.cpp"  // kernels/linear_assignment/cpu.cpp itself; build.sh puts a copy beside this file

namespace bevfn {
// cost [B][Q][G] float or double, valid [B][G] -> match [B][G]; solved in double, on the calling thread.
template <class T>
void match(const T* cost, const uint8_t* valid, int64_t* match, int64_t B, int64_t Q, int64_t G) {
  const std::vector<double> wide(cost, cost + B * Q * G);
  linear_assignment(wide.data(), valid, match, B, Q, G, 1);
}
}  // namespace bevfn

#endif  // BEVFN_LINEAR_ASSIGNMENT_MATCH_H_

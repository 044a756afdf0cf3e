// Vectors as wide as the machine's registers: of wider ones a compiler keeps the parts in memory instead (voxel_pool with
// 64 bytes on AVX2: a quarter of the speed).
#pragma once

#include <cstdint>
#include <type_traits>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;  // SSE, NEON
#endif

template <class T>
struct Lanes {
  static constexpr int64_t n = kVectorBytes / int64_t(sizeof(T));
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename Lanes<T>::Vector;

template <class T>
inline Vector<T> all(T x) {
  return x - Vector<T>{};
}

template <class T>
inline Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(from);
}
template <class T>
inline void store(T* to, Vector<T> x) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(to) = x;
}

// The first `count` lanes, 1 .. all, the others 0: what lies behind a row is neither read nor written.
template <class T>
inline Vector<T> load(const T* from, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return (Vector<T>)_mm512_maskz_loadu_ps((1u << count) - 1, from);
#endif
  if (count == Lanes<T>::n) return load(from);
  Vector<T> x = {};
  for (int64_t l = 0; l < count; ++l) x[l] = from[l];
  return x;
}
template <class T>
inline void store(T* to, Vector<T> x, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)x);
#endif
  if (count == Lanes<T>::n) return store(to, x);
  for (int64_t l = 0; l < count; ++l) to[l] = x[l];
}

// a * b + c, float32 in one rounding where the machine has that. Written out, since the shared flags forbid the compiler to
// fuse, and where a source allows it again, a compiler may do so in some places and not in others (g++ for Zen 3).
template <class T>
inline Vector<T> fused(Vector<T> a, Vector<T> b, Vector<T> c) {
  if constexpr (std::is_same_v<T, float>) {
#if defined(__AVX512F__)
    return (Vector<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
    return (Vector<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Vector<T>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
  }
  return a * b + c;
}

}  // namespace

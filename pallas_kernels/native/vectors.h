// Float32 vectors as wide as this CPU's registers, and loops whose length the compiler knows.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HVec __attribute__((vector_size(2 * kLanes)));

struct BF16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BF16 x) {
  uint32_t bits = uint32_t{x.bits} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, BF16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline Vec load(const BF16* p) {
  HVec half;
  std::memcpy(&half, p, sizeof(half));
  return (Vec)(__builtin_convertvector(half, UVec) << 16);
}
template <typename T>
inline Vec load_first(const T* p, int64_t n) {
  Vec v{};
  for (int64_t i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
inline Vec splat(float x) { return x - Vec{}; }

template <int... I>
constexpr IVec lane_indices(std::integer_sequence<int, I...>) {
  return IVec{I...};
}
constexpr IVec kLaneIndex = lane_indices(std::make_integer_sequence<int, kLanes>{});

// Lane j of a and b, for j from `from` on, as neighbours: a0 b0 a1 b1 ...
template <int from, int... I>
inline Vec interleave(Vec a, Vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (from + I / 2 + (I % 2) * kLanes)...);
#else
  return __builtin_shuffle(a, b, IVec{(from + I / 2 + (I % 2) * kLanes)...});
#endif
}

// Each stage is a perfect shuffle, which rotates the bits of (row, column); log2(kLanes) of them swap the two.
inline void transpose(Vec (&rows)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2], lanes);
      next[2 * i + 1] = interleave<kLanes / 2>(rows[i], rows[i + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

inline Vec rotate_lanes(Vec v, int by) {
#if defined(__clang__)
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = v[(i + by) % kLanes];
  return out;
#else
  return __builtin_shuffle(v, (kLaneIndex + by) & (kLanes - 1));
#endif
}

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

inline float max_lane(Vec v) {
#pragma GCC unroll 4
  for (int by = kLanes / 2; by > 0; by /= 2) v = maximum(v, rotate_lanes(v, by));
  return v[0];
}

inline float sum_lanes(Vec v) {
  for (int by = kLanes / 2; by > 0; by /= 2) v += rotate_lanes(v, by);
  return v[0];
}

// 2^x for x <= 0, to about one unit in the last place; exactly 1 at 0, and about 0 below -125.
inline Vec exp2(Vec x) {
  x = maximum(x, splat(-125.0f));
  const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits of the sum are the nearest integer
  const Vec f = x - (shifted - 12582912.0f);
  Vec p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  return (Vec)((IVec)p + ((IVec)shifted << 23));
}
inline float exp2(float x) { return exp2(splat(x))[0]; }

// Lane i of the result is the sum of the lanes of v[i]. Each stage halves the vectors: two become one that holds both
// sums by turns.
inline Vec sum_each(Vec (&v)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      v[i] = interleave<0>(v[i], v[i + half], lanes) + interleave<kLanes / 2>(v[i], v[i + half], lanes);
  return v[0];
}

// ---------------------------------------------------------------- compile-time loops

template <int N>
using Int = std::integral_constant<int, N>;

template <int N, typename F>
inline void with_constant(int n, F&& f) {
  if constexpr (N > 0) {
    if (n == N) return f(Int<N>{});
    with_constant<N - 1>(n, f);
  }
}

// Rows in groups of at most kMost and nearly equal size: f(first row, Int<rows>).
template <int kMost, typename F>
inline void by_rows(int begin, int end, F&& f) {
  for (int groups = (end - begin + kMost - 1) / kMost; groups > 0; --groups) {
    const int rows = (end - begin + groups - 1) / groups;
    with_constant<kMost>(rows, [&](auto n) { f(begin, n); });
    begin += rows;
  }
}

}  // namespace

// y[rows, outs] = x[rows, ins] · weight[outs, ins] in float32, as an XLA FFI handler. Rows from `live` on are padding:
// they are not computed, and come out as zeros.
//
// A decode step has so few rows that all which counts is to read the weights once, in order and ahead of time. General
// products first copy them into another layout; here they are used as they lie. A tile of R rows and O outputs keeps
// its R x O dot products in registers, and fetches the next O rows of the weight meanwhile.
//
// Each dot product is summed in the same order whatever the tile, the number of rows or the threads, so a row's result
// is the same bits in any batch.

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace {

constexpr int kMaxRows = kLanes == 8 ? 4 : 8;   // of a tile
constexpr int kSums = kLanes == 8 ? 12 : 24;    // registers that hold a tile's sums, beside its operands
constexpr int kMaxOuts = 8;                     // of a tile
constexpr int64_t kBlockOuts = 24;              // that the groups of rows take turns at, while they are in the cache
constexpr int64_t kMinBytes = 1 << 17;          // of weights that are worth a thread's wake-up
constexpr int64_t kItemsPerThread = 4;          // so that a slow thread leaves work to the others

constexpr int outs_of_tile(int rows) { return std::min(kMaxOuts, kSums / rows); }

struct Problem {
  const float *x, *weight;
  float* y;
  int64_t rows, ins, outs;

  int64_t padded_ins() const { return (ins + kLanes - 1) / kLanes * kLanes; }
};

// The rows of a group side by side, one vector of each by turns, so that a tile reads one stream; padded with zeros.
void pack_group(const Problem& p, int first, int rows, float* packed) {
  for (int64_t k = 0; k < p.ins; k += kLanes)
    for (int r = 0; r < rows; ++r, packed += kLanes) {
      const float* from = p.x + (first + r) * p.ins + k;
      store(packed, k + kLanes <= p.ins ? load(from) : load_first(from, p.ins - k));
    }
}

template <int R, int O>
inline void add_products(const float* x, const Vec (&w)[O], Vec (&sums)[R][O]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Vec row = load(x + r * kLanes);
#if defined(__x86_64__)
    asm("" : "+v"(row));  // keeps it in a register: compilers would rather load it again for each product
#endif
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) sums[r][o] += row * w[o];
  }
}

template <int R, int O>
inline void write_sums(const Vec (&sums)[R][O], float* y, int64_t outs) {
#pragma GCC unroll 32
  for (int begin = 0; begin < R * O; begin += kLanes) {
    Vec part[kLanes] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (begin + i < R * O) part[i] = sums[(begin + i) / O][(begin + i) % O];
    const Vec totals = sum_each(part);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (begin + i < R * O) y[(begin + i) / O * outs + (begin + i) % O] = totals[i];
  }
}

template <int R, int O, bool kFetch>
void tile(const float* packed, const float* weight, const Problem& p, float* y) {
  Vec sums[R][O] = {}, w[O];
  const int64_t whole = p.ins / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes, packed += R * kLanes) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      w[o] = load(weight + o * p.ins + k);
      if constexpr (kFetch) __builtin_prefetch(weight + (O + o) * p.ins + k, 0, 2);
    }
    add_products<R, O>(packed, w, sums);
  }
  if (whole < p.ins) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) w[o] = load_first(weight + o * p.ins + whole, p.ins - whole);
    add_products<R, O>(packed, w, sums);
  }
  write_sums<R, O>(sums, y, p.outs);
}

template <int R, bool kFetch>
void group(const Problem& p, const float* packed, int first, int64_t begin, int64_t end) {
  constexpr int kOuts = outs_of_tile(R);
  int64_t o = begin;
  for (; o + kOuts <= end; o += kOuts)
    tile<R, kOuts, kFetch>(packed, p.weight + o * p.ins, p, p.y + first * p.outs + o);
  for (; o < end; ++o) tile<R, 1, kFetch>(packed, p.weight + o * p.ins, p, p.y + first * p.outs + o);
}

ffi::Error matmul(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::F32> weight,
                  ffi::BufferR0<ffi::S32> live, ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t all_rows = x.dimensions()[0], rows = std::clamp<int64_t>(*live.typed_data(), 0, all_rows);
  const Problem p{x.typed_data(), weight.typed_data(), y->typed_data(), rows, x.dimensions()[1],
                  weight.dimensions()[0]};
  if (weight.dimensions()[1] != p.ins)
    return ffi::Error::InvalidArgument("matmul: x has " + std::to_string(p.ins) + " columns, the weight " +
                                       std::to_string(weight.dimensions()[1]));
  std::memset(p.y + rows * p.outs, 0, (all_rows - rows) * p.outs * sizeof(float));
  thread_local std::vector<Vec> memory;  // aligned, so that no load crosses a cache line
  memory.resize(rows * p.padded_ins() / kLanes);
  float* const packed = reinterpret_cast<float*>(memory.data());
  const auto groups = [&](auto&& f) { by_rows<kMaxRows>(0, int(rows), f); };
  groups([&](int first, auto n) { pack_group(p, first, n.value, packed + first * p.padded_ins()); });

  const int64_t blocks = (p.outs + kBlockOuts - 1) / kBlockOuts, bytes = p.outs * p.ins * int64_t{sizeof(float)};
  const int64_t most = std::min({bytes / kMinBytes, pool.num_threads() * kItemsPerThread, blocks});
  const int64_t items = std::max<int64_t>(most, 1);
  parallel_for(pool, int(items), [&](int item) {
    const int64_t last = blocks * (item + 1) / items;
    for (int64_t block = blocks * item / items; block < last; ++block) {
      const int64_t begin = block * kBlockOuts, end = std::min(begin + kBlockOuts, p.outs);
      groups([&](int first, auto n) {
        const float* from = packed + first * p.padded_ins();
        if (first == 0)  // brings the weights into the cache for the others
          group<n.value, true>(p, from, first, begin, end);
        else
          group<n.value, false>(p, from, first, begin, end);
      });
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JserveMatmul, matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());
#pragma GCC visibility pop

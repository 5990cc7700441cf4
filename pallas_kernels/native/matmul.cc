// y[rows, outs] = x[rows, ins] · weight[outs, ins] in float32, as an XLA FFI handler. Rows from `live` on are padding:
// they are not computed, and come out as zeros.
//
// A decode step has so few rows that all which counts is to read the weights once, in order and ahead of time. General
// products first copy them into another layout; here they are used as they lie. A tile of R rows and O outputs keeps
// its R x O dot products in registers. Meanwhile it fetches its share of the weights that this thread needs next, so
// that memory is busy all the time, however many groups of rows take their turns at the weights that are here.
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
constexpr int kBlockOuts = 24;                  // that the groups of rows take turns at, while they are in the cache
constexpr int64_t kMinBytes = 1 << 17;          // of weights that are worth a thread's wake-up
static_assert(kBlockOuts % kMaxOuts == 0 && kBlockOuts % kSums == 0);

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

// Fetches P rows of the weight from `ahead` on.
template <int R, int O, int P>
void tile(const float* packed, const float* weight, const float* ahead, const Problem& p, float* y) {
  Vec sums[R][O] = {}, w[O];
  const int64_t whole = p.ins / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes, packed += R * kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) __builtin_prefetch(ahead + i * p.ins + k, 0, 2);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) w[o] = load(weight + o * p.ins + k);
    add_products<R, O>(packed, w, sums);
  }
  if (whole < p.ins) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) w[o] = load_first(weight + o * p.ins + whole, p.ins - whole);
    add_products<R, O>(packed, w, sums);
  }
  write_sums<R, O>(sums, y, p.outs);
}

// What one thread does with a block of outputs: all groups of rows, tile by tile.
class Block {
 public:
  // `next`: the block that this thread will probably have after it.
  Block(const Problem& p, const float* packed, int64_t block, int64_t next)
      : p(p), packed(packed), begin(block * kBlockOuts), end(std::min(begin + kBlockOuts, p.outs)),
        next(next * kBlockOuts) {
    for_each_group([&](int, auto n) { ++groups, tiles += kBlockOuts / outs_of_tile(n.value); });
  }

  void compute() {
    for_each_group([&](int first, auto n) { group<n.value>(first); });
  }

 private:
  template <typename F>
  void for_each_group(F&& f) const {
    by_rows<kMaxRows>(0, int(p.rows), f);
  }

  template <int R>
  void group(int first) {
    constexpr int kOuts = outs_of_tile(R);
    const float* from = packed + first * p.padded_ins();
    float* to = p.y + first * p.outs;
    int64_t o = begin;
    for (; o + kOuts <= end; o += kOuts) {
      const int fetch = kBlockOuts * done / tiles, rows = kBlockOuts * (done + 1) / tiles - fetch;
      ++done;
      with_constant<kMaxOuts>(rows, [&](auto fetched) {
        tile<R, kOuts, fetched.value>(from, p.weight + o * p.ins, ahead(fetch, kOuts), p, to + o);
      });
      if (rows == 0) tile<R, kOuts, 0>(from, p.weight + o * p.ins, nullptr, p, to + o);
    }
    for (; o < end; ++o) tile<R, 1, 0>(from, p.weight + o * p.ins, nullptr, p, to + o);
  }

  // The fetches of a block go to the block after it; with a single group, which is at each weight only once, they
  // stay one tile ahead.
  const float* ahead(int fetch, int outs) const {
    const int row = groups == 1 ? fetch + outs : fetch + kBlockOuts;
    return p.weight + (row < kBlockOuts ? begin + row : next + row - kBlockOuts) * p.ins;
  }

  const Problem& p;
  const float* packed;
  const int64_t begin, end, next;
  int groups = 0, tiles = 0, done = 0;
};

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
  by_rows<kMaxRows>(0, int(rows), [&](int first, auto n) {
    pack_group(p, first, n.value, packed + first * p.padded_ins());
  });

  const int64_t blocks = (p.outs + kBlockOuts - 1) / kBlockOuts, bytes = p.outs * p.ins * int64_t{sizeof(float)};
  const int64_t threads = bytes < 2 * kMinBytes ? 1 : pool.num_threads();
  const auto compute = [&](int block) { Block(p, packed, block, block + threads).compute(); };
  if (threads == 1)
    for (int block = 0; block < blocks; ++block) compute(block);
  else
    parallel_for(pool, int(blocks), compute);
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

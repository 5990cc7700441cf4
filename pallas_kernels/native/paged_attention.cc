// Paged attention and KV write for CPUs, as XLA FFI handlers. Compiled on first use by native/__init__.py.
//
// The work is cut into tiles (a few queries of one row, with all their heads), kv heads, and splits of kSplit KV
// tokens counted from position 0. A (tile, head, split) is computed by one thread, block of kBlock tokens by block,
// as a small matrix product with an online softmax; the splits of a query are merged in order. Where a split begins
// and in which order anything is summed depends on positions alone, never on batch mates, threads or how the prompt
// was chunked, so a query's result is the same bits in any batch.
//
// Tokens past a query's position are excluded by loop bounds and lane selects, so what they hold, NaN included, never
// enters a sum.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace {

// kRows x kVectors accumulators must fit the register file beside their operands.
constexpr int kVectors = kLanes == 8 ? 2 : 4, kRows = 6;
constexpr int kBlock = 64;    // KV tokens of one online-softmax step
constexpr int kSplit = 256;   // KV tokens of one partial result
constexpr int kTileRows = 96; // (query, head of the group) pairs that share a block while it is in the L1 cache
static_assert(kBlock % (kLanes * kVectors) == 0 && kSplit % kBlock == 0);

// ---------------------------------------------------------------- the problem

template <typename T>
struct Problem {
  const T *q, *keys, *values;
  const int32_t *query_start, *context_len, *block_table;
  T* out;
  int64_t tokens, heads, kv_heads, dim, pages, page_size, rows, table_width;
  float scale;

  int group() const { return int(heads / kv_heads); }
  int64_t stride() const { return kv_heads * dim; }  // between the KV of neighbouring tokens
  int64_t padded_dim() const { return (dim + kLanes - 1) / kLanes * kLanes; }
};

// Some consecutive queries of one row.
struct Tile {
  int64_t row, token, position;  // of the first query
  int queries;

  int64_t end() const { return position + queries; }  // positions that its last query sees
  int splits() const { return int((end() + kSplit - 1) / kSplit); }
  // The first of its queries that sees position `at`.
  int first_query(int64_t at) const { return int(std::max<int64_t>(0, at - position)); }
};

// The unnormalised result of some KV tokens for the rows (query, head of the group) of a tile.
struct Partial {
  float *o, *max, *sum;
};

inline Partial partial_at(float* memory, int64_t rows, int64_t padded_dim) {
  return {memory, memory + rows * padded_dim, memory + rows * padded_dim + rows};
}
inline int64_t partial_size(int64_t rows, int64_t padded_dim) {
  const int64_t floats = rows * (padded_dim + 2);
  return (floats + kLanes - 1) / kLanes * kLanes;
}

// One thread's working memory.
struct Scratch {
  std::unique_ptr<float[]> memory;
  int64_t size = 0;
  int64_t offsets[kSplit + kBlock];  // of a split's tokens, and of those after it that are worth fetching ahead
  int64_t padded_offsets[kBlock];

  float* reserve(int64_t floats) {
    if (floats + kLanes > size) {
      size = floats + kLanes;
      memory.reset(new float[size]);
    }
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    return memory.get() + (-address / sizeof(float)) % kLanes;
  }
};

// ---------------------------------------------------------------- kernels

// keys_t[d][t] = the key of token t in dimension d, so that scores of neighbouring tokens are neighbouring lanes.
template <typename T>
void pack_keys(const T* keys, const int64_t* offsets, int n, int64_t dim, float* keys_t) {
  for (int t = 0; t < n; t += kLanes) {
    const int tokens = std::min(kLanes, n - t);
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, dim - d);
      Vec rows[kLanes];
      if (tokens == kLanes && width == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = load(keys + offsets[t + i] + d);
      } else {
        for (int i = 0; i < kLanes; ++i)
          rows[i] = i < tokens ? load_first(keys + offsets[t + i] + d, width) : Vec{};
      }
      transpose(rows);
      for (int64_t i = 0; i < width; ++i) store(keys_t + (d + i) * kBlock + t, rows[i]);
    }
  }
}

// scores[m][t] = q[m] . key[t] for R rows; lanes at or after n hold anything.
template <int R>
void score(const float* q, int64_t dim, const float* keys_t, int n, float* scores) {
  for (int t = 0; t < n; t += kVectors * kLanes) {
    Vec acc[R][kVectors] = {};
    for (int64_t d = 0; d < dim; ++d) {
      Vec key[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) key[v] = load(keys_t + d * kBlock + t + v * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const Vec x = splat(q[r * dim + d]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[r][v] += x * key[v];
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(scores + r * kBlock + t + v * kLanes, acc[r][v]);
  }
}

// Turns one row's scores into weights 2^(score - max), 0 from token `visible` on, and moves its running maximum and
// sum; returns by what the row's earlier weights shrink.
inline float soften(float* scores, int visible, bool first, float* running_max, float* lane_sums) {
  constexpr int kParts = kBlock / kLanes;
  const Vec none = splat(-__builtin_inff());
  Vec s[kParts], top = none;
#pragma GCC unroll 16
  for (int v = 0; v < kParts; ++v) {
    const IVec seen = kLaneIndex < visible - v * kLanes;
    s[v] = seen ? load(scores + v * kLanes) : none;
    top = maximum(top, s[v]);
  }
  const float block_max = max_lane(top);
  const float new_max = first ? block_max : std::max(*running_max, block_max);
  const float shrink = first ? 0.0f : exp2(*running_max - new_max);
  Vec sums = first ? Vec{} : load(lane_sums) * shrink;
#pragma GCC unroll 16
  for (int v = 0; v < kParts; ++v) {
    const IVec seen = kLaneIndex < visible - v * kLanes;
    const Vec weight = seen ? exp2(s[v] - new_max) : Vec{};
    store(scores + v * kLanes, weight);
    sums += weight;
  }
  store(lane_sums, sums);
  *running_max = new_max;
  return shrink;
}

// o[m] = o[m] * shrink[m] + sum over the n tokens of weights[m][t] * value[t], for R rows and V vectors of dimensions.
template <int R, int V, typename T>
void accumulate(const float* weights, const T* values, const int64_t* offsets, int n, const float* shrink, bool first,
                float* o, int64_t stride) {
  Vec acc[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = first ? Vec{} : load(o + r * stride + v * kLanes) * shrink[r];
  for (int t = 0; t < n; ++t) {
    const T* value = values + offsets[t];
    Vec x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(value + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Vec w = splat(weights[r * kBlock + t]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += w * x[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(o + r * stride + v * kLanes, acc[r][v]);
}

// What one thread needs to attend for one tile.
template <typename T>
struct Worker {
  const Problem<T>& p;
  const Tile& tile;
  Scratch& scratch;
  int group, rows;
  int64_t dim, padded;
  bool cold = true;  // nothing of the KV was fetched yet
  float *keys_t, *padded_values, *scores, *shrink, *lane_sums, *queries;

  static int64_t floats(const Problem<T>& p, int rows) {
    return kBlock * (p.dim + p.padded_dim()) + rows * (kBlock + p.kv_heads * (kLanes + p.dim)) + rows + kLanes;
  }

  Worker(const Problem<T>& p, const Tile& tile, Scratch& scratch, float* memory)
      : p(p), tile(tile), scratch(scratch), group(p.group()), rows(tile.queries * p.group()), dim(p.dim),
        padded(p.padded_dim()) {
    keys_t = memory;
    padded_values = keys_t + kBlock * dim;
    scores = padded_values + kBlock * padded;
    lane_sums = scores + rows * kBlock;
    queries = lane_sums + p.kv_heads * rows * kLanes;
    shrink = queries + p.kv_heads * rows * dim;
    for (int t = 0; t < kBlock; ++t) scratch.padded_offsets[t] = t * padded;
  }

  // Scaled so that weights are powers of two rather than of e.
  void take_queries(int head) {
    const float scale = p.scale * 1.4426950408889634f;
    for (int i = 0; i < tile.queries; ++i) {
      const T* from = p.q + ((tile.token + i) * p.heads + int64_t{head} * group) * dim;
      float* to = queries + (int64_t{head} * rows + int64_t{i} * group) * dim;
      for (int64_t j = 0; j < group * dim; ++j) to[j] = to_float(from[j]) * scale;
    }
  }

  void locate(int split) {
    const int32_t* table = p.block_table + tile.row * p.table_width;
    const int64_t begin = int64_t{split} * kSplit, end = std::min<int64_t>(begin + kSplit + kBlock, tile.end());
    int64_t page = begin / p.page_size, slot = begin % p.page_size;
    for (int64_t t = begin; t < end; ++t) {
      scratch.offsets[t - begin] = (int64_t{table[page]} * p.page_size + slot) * p.stride();
      if (++slot == p.page_size) slot = 0, ++page;
    }
  }

  // The KV of some tokens and one head.
  struct Stretch {
    const int64_t* offsets;
    int tokens, head;
  };

  void fetch(const T* cache, Stretch s) const {
    for (int t = 0; t < s.tokens; ++t)
      for (int64_t d = 0; d < dim; d += 64 / int64_t{sizeof(T)})
        __builtin_prefetch(cache + s.offsets[t] + s.head * dim + d, 0, 2);
  }

  // The partial results of a split, result(head), for the rows that see it. Heads take turns at each block, so that
  // memory is read in the order in which it lies, and what comes next is fetched meanwhile.
  template <typename Result>
  void attend(int split, int first_head, int last_head, Result result) {
    const int64_t begin = int64_t{split} * kSplit, end = std::min<int64_t>(begin + kSplit, tile.end());
    locate(split);
    const auto stretch = [&](int64_t at, int head) {
      return Stretch{scratch.offsets + (at - begin), int(std::clamp<int64_t>(tile.end() - at, 0, kBlock)), head};
    };
    if (cold) {
      fetch(p.keys, stretch(begin, first_head));
      fetch(p.values, stretch(begin, first_head));
      cold = false;
    }
    for (int64_t at = begin; at < end; at += kBlock)
      for (int h = first_head; h < last_head; ++h) {
        const Stretch next = h + 1 < last_head ? stretch(at, h + 1) : stretch(at + kBlock, first_head);
        attend_block(at, at == begin, stretch(at, h), next, result(h));
      }
    for (int h = first_head; h < last_head; ++h)
      for (int m = tile.first_query(begin) * group; m < rows; ++m)
        result(h).sum[m] = sum_lanes(load(lane_sums + (int64_t{h} * rows + m) * kLanes));
  }

  // The tokens of `now`, at positions `at` and up.
  void attend_block(int64_t at, bool first, Stretch now, Stretch next, Partial result) {
    const int64_t* offsets = now.offsets;
    const int n = now.tokens, head = now.head;
    const float* q = queries + int64_t{head} * rows * dim;
    float* sums = lane_sums + int64_t{head} * rows * kLanes;
    const int begin = tile.first_query(at) * group;
    const auto visible = [&](int m) { return int(std::min<int64_t>(n, tile.position + m / group + 1 - at)); };
    pack_keys(p.keys + head * dim, offsets, n, dim, keys_t);
    fetch(p.keys, next);
    by_rows<kRows>(begin, rows, [&](int m, auto r) { score<r.value>(q + m * dim, dim, keys_t, n, scores + m * kBlock); });
    for (int m = begin; m < rows; ++m)
      shrink[m] = soften(scores + m * kBlock, visible(m), first, result.max + m, sums + m * kLanes);
    fetch(p.values, next);
    if (padded == dim) {
      weigh(p.values + head * dim, offsets, begin, first, visible, result);
    } else {
      for (int t = 0; t < n; ++t)
        for (int64_t d = 0; d < padded; d += kLanes)
          store(padded_values + t * padded + d,
                load_first(p.values + offsets[t] + head * dim + d, std::min<int64_t>(kLanes, dim - d)));
      weigh(padded_values, scratch.padded_offsets, begin, first, visible, result);
    }
  }

  template <typename V, typename Visible>
  void weigh(const V* values, const int64_t* offsets, int begin, bool first, Visible visible, Partial result) {
    for (int64_t d = 0; d < padded; d += kVectors * kLanes) {
      const int vectors = int(std::min<int64_t>(kVectors, (padded - d) / kLanes));
      with_constant<kVectors>(vectors, [&](auto v) {
        by_rows<kRows>(begin, rows, [&](int m, auto r) {
          accumulate<r.value, v.value>(scores + m * kBlock, values + d, offsets, visible(m + r.value - 1), shrink + m,
                                       first, result.o + m * padded + d, padded);
        });
      });
    }
  }

  // Adds a later split's partial result to `state`.
  void merge(int split, Partial next, Partial state) {
    for (int m = tile.first_query(int64_t{split} * kSplit) * group; m < rows; ++m) {
      const float max = std::max(state.max[m], next.max[m]);
      const float a = exp2(state.max[m] - max), b = exp2(next.max[m] - max);
      state.max[m] = max;
      state.sum[m] = state.sum[m] * a + next.sum[m] * b;
      for (int64_t d = m * padded; d < (m + 1) * padded; d += kLanes)
        store(state.o + d, load(state.o + d) * a + load(next.o + d) * b);
    }
  }

  void finish(int head, Partial state) {
    for (int m = 0; m < rows; ++m) {
      const float scale = 1.0f / state.sum[m];
      T* to = p.out + ((tile.token + m / group) * p.heads + int64_t{head} * group + m % group) * dim;
      for (int64_t d = 0; d < dim; ++d) from_float(state.o[m * padded + d] * scale, to + d);
    }
  }
};

// ---------------------------------------------------------------- the plan

// The heads and splits of a tile that one thread computes.
struct Item {
  int tile, head, heads, split, splits;
  double cost;
};

struct Plan {
  std::vector<Tile> tiles;
  std::vector<Item> items;
  std::vector<int64_t> partials;  // per tile: where its splits' partial results begin, or -1 when one item has them all
  int64_t partial_floats = 0;
  int max_rows = 0;
};

// Threads are worth their wake-up above this many multiply-adds, some 10 us.
constexpr double kMinCost = 5e5;

inline int portion(double target, double cost, int n) {
  return std::clamp(int(target / std::max(cost, 1.0)), 1, n);
}

inline void add_items(Plan& plan, int index, int kv_heads, double tile_cost, int rows, double target) {
  const int splits = plan.tiles[index].splits();
  int heads = kv_heads, run = splits;
  if (tile_cost > target) {
    // A few rows read far more than they compute: cut along the context first, so that a thread reads whole pages.
    if (rows <= kRows) {
      run = portion(target, tile_cost / splits, splits);
      if (run == 1) heads = portion(target, tile_cost / splits / kv_heads, kv_heads);
    } else {
      heads = portion(target, tile_cost / kv_heads, kv_heads);
      if (heads == 1) run = portion(target, tile_cost / kv_heads / splits, splits);
    }
  }
  for (int s = 0; s < splits; s += run)
    for (int h = 0; h < kv_heads; h += heads) {
      const int item_heads = std::min(heads, kv_heads - h), item_splits = std::min(run, splits - s);
      const double share = double(item_heads * item_splits) / (kv_heads * splits);
      plan.items.push_back({index, h, item_heads, s, item_splits, tile_cost * share});
    }
  plan.partials.push_back(run < splits ? plan.partial_floats : -1);
}

template <typename T>
Plan make_plan(const Problem<T>& p, int64_t threads) {
  Plan plan;
  const int tile_queries = std::max(1, kTileRows / p.group());
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t begin = p.query_start[r], queries = p.query_start[r + 1] - begin;
    for (int64_t i = 0; i < queries; i += tile_queries) {
      const int n = int(std::min<int64_t>(tile_queries, queries - i));
      plan.tiles.push_back({r, begin + i, p.context_len[r] - queries + i, n});
    }
  }
  // Reading and packing a token costs about as much as 4 rows' arithmetic on it.
  const auto cost = [&](const Tile& t) {
    return double(t.end()) * (4 + t.queries * p.group()) * p.kv_heads * p.dim * 2;
  };
  double total = 0;
  for (const Tile& t : plan.tiles) total += cost(t);
  const double target = threads > 1 && total > 2 * kMinCost ? std::max(total / double(threads * 6), kMinCost) : total;
  for (int i = 0; i < int(plan.tiles.size()); ++i) {
    const int rows = plan.tiles[i].queries * p.group();
    plan.max_rows = std::max(plan.max_rows, rows);
    add_items(plan, i, int(p.kv_heads), cost(plan.tiles[i]), rows, target);
    if (plan.partials[i] >= 0)
      plan.partial_floats += plan.tiles[i].splits() * p.kv_heads * partial_size(rows, p.padded_dim());
  }
  if (threads > 1)
    std::stable_sort(plan.items.begin(), plan.items.end(),
                     [](const Item& a, const Item& b) { return a.cost > b.cost; });
  return plan;
}

// Metadata comes from a scheduler, so it is checked before it becomes an address.
template <typename T>
ffi::Error check(const Problem<T>& p) {
  const auto wrong = [](const std::string& what) { return ffi::Error::InvalidArgument("paged_attention: " + what); };
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t begin = p.query_start[r], end = p.query_start[r + 1], context = p.context_len[r];
    const std::string row = "row " + std::to_string(r);
    if (begin < 0 || end < begin || end > p.tokens)
      return wrong(row + " has queries " + std::to_string(begin) + ":" + std::to_string(end) + " of " +
                   std::to_string(p.tokens) + " tokens; query_start must rise from 0 to at most the number of tokens");
    if (begin == end) continue;
    if (context < end - begin || context > p.table_width * p.page_size)
      return wrong(row + " has context_len " + std::to_string(context) + " with " + std::to_string(end - begin) +
                   " queries and " + std::to_string(p.table_width) + " blocks of " + std::to_string(p.page_size) +
                   "; it must count the queries and fit the block table");
    for (int64_t j = 0; j * p.page_size < context; ++j) {
      const int32_t block = p.block_table[r * p.table_width + j];
      if (block < 0 || block >= p.pages)
        return wrong(row + " names block " + std::to_string(block) + " of a pool of " + std::to_string(p.pages));
    }
  }
  return ffi::Error::Success();
}

template <typename T>
void run_item(const Problem<T>& p, const Plan& plan, const Item& item, float* partials, std::atomic<int>& left) {
  thread_local Scratch scratch;
  const Tile& tile = plan.tiles[item.tile];
  const int64_t padded = p.padded_dim(), rows = tile.queries * p.group(), size = partial_size(rows, padded);
  const int64_t work = Worker<T>::floats(p, int(rows)) + 2 * kLanes;
  float* memory = scratch.reserve(work + 2 * p.kv_heads * size);
  Worker<T> worker(p, tile, scratch, memory);
  const auto local = [&](int i) { return partial_at(memory + work / kLanes * kLanes + i * size, rows, padded); };
  const auto shared = [&](int split, int head) {
    const int64_t index = split * p.kv_heads + head;
    return partial_at(partials + plan.partials[item.tile] + index * size, rows, padded);
  };
  const bool alone = plan.partials[item.tile] < 0;
  for (int h = item.head; h < item.head + item.heads; ++h) worker.take_queries(h);
  for (int s = item.split; s < item.split + item.splits; ++s) {
    worker.attend(s, item.head, item.head + item.heads, [&](int h) {
      return alone ? local(s == 0 ? h : int(p.kv_heads) + h) : shared(s, h);
    });
    if (alone && s > 0)
      for (int h = item.head; h < item.head + item.heads; ++h) worker.merge(s, local(int(p.kv_heads) + h), local(h));
  }
  if (alone) {
    for (int h = item.head; h < item.head + item.heads; ++h) worker.finish(h, local(h));
  } else if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    for (int h = 0; h < p.kv_heads; ++h) {
      for (int s = 1; s < tile.splits(); ++s) worker.merge(s, shared(s, h), shared(0, h));
      worker.finish(h, shared(0, h));
    }
  }
}

template <typename T>
ffi::Error attend_all(const Problem<T>& p, ffi::ThreadPool& pool) {
  if (ffi::Error error = check(p); error.failure()) return error;
  const int64_t used = p.rows > 0 ? p.query_start[p.rows] : 0, first = p.rows > 0 ? p.query_start[0] : 0;
  std::memset(p.out, 0, first * p.heads * p.dim * sizeof(T));
  std::memset(p.out + used * p.heads * p.dim, 0, (p.tokens - used) * p.heads * p.dim * sizeof(T));
  const Plan plan = make_plan(p, pool.num_threads());
  if (plan.items.empty()) return ffi::Error::Success();
  const std::unique_ptr<float[]> partials(new float[plan.partial_floats + 1]);
  const std::unique_ptr<std::atomic<int>[]> left(new std::atomic<int>[plan.tiles.size()]);
  for (size_t i = 0; i < plan.tiles.size(); ++i) left[i] = 0;
  for (const Item& item : plan.items) ++left[item.tile];
  parallel_for(pool, int(plan.items.size()), [&](int i) {
    const Item& item = plan.items[i];
    run_item(p, plan, item, partials.get(), left[item.tile]);
  });
  return ffi::Error::Success();
}

template <typename T>
ffi::Error attend_typed(ffi::ThreadPool& pool, const ffi::AnyBuffer& q, const ffi::AnyBuffer& k_cache,
                        const ffi::AnyBuffer& v_cache, const int32_t* query_start, const int32_t* context_len,
                        const ffi::BufferR2<ffi::S32>& block_table, void* out, float scale) {
  const auto qs = q.dimensions(), ks = k_cache.dimensions(), bs = block_table.dimensions();
  return attend_all(
      Problem<T>{static_cast<const T*>(q.untyped_data()), static_cast<const T*>(k_cache.untyped_data()),
                 static_cast<const T*>(v_cache.untyped_data()), query_start, context_len, block_table.typed_data(),
                 static_cast<T*>(out), qs[0], qs[1], ks[2], qs[2], ks[0], ks[1], bs[0], bs[1], scale},
      pool);
}

// ---------------------------------------------------------------- handlers

ffi::Error paged_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k_cache, ffi::AnyBuffer v_cache,
                           ffi::BufferR1<ffi::S32> query_start, ffi::BufferR1<ffi::S32> context_len,
                           ffi::BufferR2<ffi::S32> block_table, ffi::Result<ffi::AnyBuffer> out, float scale) {
  const auto run = [&](auto zero) {
    return attend_typed<decltype(zero)>(pool, q, k_cache, v_cache, query_start.typed_data(), context_len.typed_data(),
                                        block_table, out->untyped_data(), scale);
  };
  if (q.element_type() == ffi::F32) return run(float{});
  if (q.element_type() == ffi::BF16) return run(BF16{});
  return ffi::Error::InvalidArgument("paged_attention: the native backend takes float32 and bfloat16");
}

ffi::Error kv_write(ffi::ThreadPool pool, ffi::AnyBuffer k_cache, ffi::AnyBuffer v_cache, ffi::AnyBuffer k,
                    ffi::AnyBuffer v, ffi::BufferR1<ffi::S32> kv_slot, ffi::Result<ffi::AnyBuffer> k_out,
                    ffi::Result<ffi::AnyBuffer> v_out) {
  const auto shape = k_cache.dimensions();
  const int64_t slots = shape[0] * shape[1], tokens = kv_slot.element_count();
  const size_t bytes = slots ? k_cache.size_bytes() / slots : 0;
  const int32_t* slot = kv_slot.typed_data();
  const std::pair<const void*, void*> copies[] = {{k.untyped_data(), k_out->untyped_data()},
                                                  {v.untyped_data(), v_out->untyped_data()}};
  if (k_out->untyped_data() != k_cache.untyped_data() || v_out->untyped_data() != v_cache.untyped_data())
    return ffi::Error::Internal("kv_write: XLA did not alias the cache to its result");
  constexpr int64_t kTokens = 64;  // of one item
  parallel_for(pool, int((tokens + kTokens - 1) / kTokens), [&](int item) {
    const int64_t end = std::min<int64_t>(tokens, (item + 1) * kTokens);
    for (const auto& [from, to] : copies)
      for (int64_t t = item * kTokens; t < end; ++t)
        if (slot[t] >= 0 && slot[t] < slots)
          std::memcpy(static_cast<char*>(to) + slot[t] * bytes, static_cast<const char*>(from) + t * bytes, bytes);
  });
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JservePagedAttention, paged_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR2<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JserveKvWrite, kv_write,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
#pragma GCC visibility pop

// Copies of whole blocks between the KV pools of all layers and one buffer, or any host memory, as XLA FFI handlers.
//
// A block outside the pools is [layers, 2, block_size, kv_heads, head_dim]: the keys of layer 0, its values, the keys of
// layer 1, and so on. Pools come as all keys, then all values. Ids outside the pool are padding: gathered as anything,
// and never scattered.
//
// Host memory comes as addresses, which XLA knows nothing of: whoever gives them keeps the memory, and keeps others
// from it, until the copy has ended. Of what XLA knows, the pools, the copy has its turn like any other program.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "parallel.h"

namespace {

constexpr int64_t kMinBytes = 1 << 18;  // that are worth a thread's wake-up

// The pool of keys or values that holds part `part` of a block.
inline int64_t pool_of(int64_t part, int64_t layers) { return part / 2 + part % 2 * layers; }

// copy(block, part, id) for each part of each block.
template <typename Copy>
void for_each_part(ffi::ThreadPool& pool, int64_t blocks, int64_t parts, int64_t bytes, const int32_t* ids, Copy copy) {
  const int64_t most = pool.num_threads() * 4, total = blocks * parts;
  const int64_t items = std::clamp<int64_t>(total * bytes / kMinBytes, 1, std::max<int64_t>(std::min(most, total), 1));
  parallel_for(pool, int(items), [&](int item) {
    for (int64_t i = total * item / items; i < total * (item + 1) / items; ++i) copy(i / parts, i % parts, ids[i / parts]);
  });
}

ffi::Error gather_blocks(ffi::ThreadPool pool, ffi::BufferR1<ffi::S32> ids, ffi::RemainingArgs pools,
                         ffi::Result<ffi::AnyBuffer> buffer) {
  const int64_t parts = int64_t(pools.size());
  const auto first = pools.get<ffi::AnyBuffer>(0);
  if (!first.has_value()) return ffi::Error::InvalidArgument("gather_blocks: there are no pools");
  const int64_t held = first->dimensions()[0], bytes = held ? int64_t(first->size_bytes()) / held : 0;
  char* const to = static_cast<char*>(buffer->untyped_data());
  for_each_part(pool, ids.element_count(), parts, bytes, ids.typed_data(), [&](int64_t block, int64_t part, int32_t id) {
    if (id < 0 || id >= held) return;
    const auto from = pools.get<ffi::AnyBuffer>(pool_of(part, parts / 2));
    std::memcpy(to + (block * parts + part) * bytes, static_cast<const char*>(from->untyped_data()) + id * bytes, bytes);
  });
  return ffi::Error::Success();
}

ffi::Error scatter_blocks(ffi::ThreadPool pool, ffi::BufferR1<ffi::S32> ids, ffi::AnyBuffer buffer,
                          ffi::RemainingArgs pools, ffi::RemainingRets written) {
  const int64_t parts = int64_t(written.size());
  for (int64_t i = 0; i < parts; ++i) {
    const auto before = pools.get<ffi::AnyBuffer>(i);
    auto after = written.get<ffi::AnyBuffer>(i);
    if (!before.has_value() || !after.has_value() || before->untyped_data() != (*after)->untyped_data())
      return ffi::Error::Internal("scatter_blocks: XLA did not alias pool " + std::to_string(i) + " to its result");
  }
  if (!parts) return ffi::Error::InvalidArgument("scatter_blocks: there are no pools");
  const auto first = pools.get<ffi::AnyBuffer>(0);
  const int64_t held = first->dimensions()[0], bytes = held ? int64_t(first->size_bytes()) / held : 0;
  const char* const from = static_cast<const char*>(buffer.untyped_data());
  for_each_part(pool, ids.element_count(), parts, bytes, ids.typed_data(), [&](int64_t block, int64_t part, int32_t id) {
    if (id < 0 || id >= held) return;
    auto to = written.get<ffi::AnyBuffer>(pool_of(part, parts / 2));
    std::memcpy(static_cast<char*>((*to)->untyped_data()) + id * bytes, from + (block * parts + part) * bytes, bytes);
  });
  return ffi::Error::Success();
}

// Blocks with an address each: rows of [id, address's low half, its high half].
struct Places {
  const int32_t* words;
  int64_t count;

  explicit Places(const ffi::BufferR2<ffi::S32>& rows) : words(rows.typed_data()), count(rows.dimensions()[0]) {}
  int32_t id(int64_t i) const { return words[3 * i]; }
  char* address(int64_t i) const {
    return reinterpret_cast<char*>(uint64_t(uint32_t(words[3 * i + 2])) << 32 | uint32_t(words[3 * i + 1]));
  }
};

// As memcpy, past the caches: where much comes in at once, it would only drive out what the caches hold, and each line
// of the target would be read before it is written.
void stream(char* to, const char* from, int64_t bytes) {
#if defined(__AVX__)
  constexpr int64_t kLine = 64, kAhead = 8 * kLine;
  if (bytes % kLine == 0 && reinterpret_cast<uintptr_t>(to) % sizeof(__m256i) == 0) {
    for (int64_t i = 0; i < bytes; i += kLine) {
      _mm_prefetch(from + i + kAhead, _MM_HINT_T0);
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + kLine / 2));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), a);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + kLine / 2), b);
    }
    _mm_sfence();
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

float seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<float>(std::chrono::steady_clock::now() - start).count();
}

// copy(in host memory, in the pool) for each part of the blocks before the first padding.
template <typename Pools, typename Copy>
void for_each_place(ffi::ThreadPool& threads, const Places& places, int64_t held, int64_t bytes, int64_t parts,
                    Pools data_of, Copy copy) {
  int64_t count = 0;
  while (count < places.count && places.id(count) >= 0 && places.id(count) < held) ++count;
  const int64_t most = threads.num_threads() * 4, total = count * parts;
  if (!total) return;
  const int64_t items = std::clamp<int64_t>(total * bytes / kMinBytes, 1, std::min(most, total));
  parallel_for(threads, int(items), [&](int item) {
    for (int64_t i = total * item / items; i < total * (item + 1) / items; ++i) {
      const int64_t block = i / parts, part = i % parts;
      copy(places.address(block) + part * bytes, data_of(pool_of(part, parts / 2)) + places.id(block) * bytes);
    }
  });
}

ffi::Error copy_blocks_out(ffi::ThreadPool threads, ffi::BufferR2<ffi::S32> rows, ffi::RemainingArgs pools,
                           ffi::ResultBufferR0<ffi::F32> seconds) {
  const auto start = std::chrono::steady_clock::now();
  const auto first = pools.get<ffi::AnyBuffer>(0);
  if (!first.has_value()) return ffi::Error::InvalidArgument("copy_blocks_out: there are no pools");
  const int64_t held = first->dimensions()[0], bytes = held ? int64_t(first->size_bytes()) / held : 0;
  const auto data_of = [&](int64_t i) { return static_cast<const char*>(pools.get<ffi::AnyBuffer>(i)->untyped_data()); };
  for_each_place(threads, Places(rows), held, bytes, int64_t(pools.size()), data_of,
                 [&](char* host, const char* pool) { stream(host, pool, bytes); });
  *seconds->typed_data() = seconds_since(start);
  return ffi::Error::Success();
}

ffi::Error copy_blocks_in(ffi::ThreadPool threads, ffi::BufferR2<ffi::S32> rows, ffi::RemainingArgs pools,
                          ffi::ResultBufferR0<ffi::F32> seconds, ffi::RemainingRets written) {
  const auto start = std::chrono::steady_clock::now();
  const int64_t parts = int64_t(written.size());
  for (int64_t i = 0; i < parts; ++i) {
    const auto before = pools.get<ffi::AnyBuffer>(i);
    auto after = written.get<ffi::AnyBuffer>(i);
    if (!before.has_value() || !after.has_value() || before->untyped_data() != (*after)->untyped_data())
      return ffi::Error::Internal("copy_blocks_in: XLA did not alias pool " + std::to_string(i) + " to its result");
  }
  const auto first = pools.get<ffi::AnyBuffer>(0);
  if (!first.has_value()) return ffi::Error::InvalidArgument("copy_blocks_in: there are no pools");
  const int64_t held = first->dimensions()[0], bytes = held ? int64_t(first->size_bytes()) / held : 0;
  const auto data_of = [&](int64_t i) {
    auto to = written.get<ffi::AnyBuffer>(i);
    return static_cast<char*>((*to)->untyped_data());
  };
  for_each_place(threads, Places(rows), held, bytes, parts, data_of,
                 [&](const char* host, char* pool) { stream(pool, host, bytes); });
  *seconds->typed_data() = seconds_since(start);
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JserveGatherBlocks, gather_blocks,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JserveScatterBlocks, scatter_blocks,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JserveCopyBlocksOut, copy_blocks_out,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::BufferR0<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JserveCopyBlocksIn, copy_blocks_in,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::BufferR0<ffi::F32>>()
                                  .RemainingRets());
#pragma GCC visibility pop

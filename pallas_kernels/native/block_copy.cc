// Copies of whole blocks between the KV pools of all layers and one buffer, as XLA FFI handlers.
//
// A block in the buffer is [layers, 2, block_size, kv_heads, head_dim]: the keys of layer 0, its values, the keys of
// layer 1, and so on. Pools come as all keys, then all values. Ids outside the pool are padding: gathered as anything,
// and never scattered.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

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
#pragma GCC visibility pop

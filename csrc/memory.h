// Memory for results. A SIREN step of width 256 and 65,536 rows makes some twenty tensors of 64 MB; from the C library each
// is mapped, faulted in and unmapped again, which costs more than the arithmetic. So blocks that a result gives back are
// kept, up to a limit, for the next result of about their size, in huge pages where the system grants them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <cstdint>
#include <cstdlib>
#include <list>
#include <mutex>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fused_inr {

class BlockCache {
 public:
  static BlockCache& instance() {
    static BlockCache* cache = new BlockCache;  // never destroyed: tensors may outlive static destructors
    return *cache;
  }

  void* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      // the smallest block that fits and wastes at most a quarter
      auto best = blocks_.end();
      for (auto it = blocks_.begin(); it != blocks_.end(); ++it) {
        if (it->bytes >= bytes && it->bytes - bytes <= bytes / 4 && (best == blocks_.end() || it->bytes < best->bytes)) best = it;
      }
      if (best != blocks_.end()) {
        void* pointer = best->pointer;
        in_use_.push_front(*best);
        cached_ -= best->bytes;
        blocks_.erase(best);
        return pointer;
      }
    }
    void* pointer = aligned_alloc(kHuge, bytes);
    if (pointer == nullptr) {
      clear();
      pointer = aligned_alloc(kHuge, bytes);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, pointer != nullptr, "fused_inr: no memory for a result of ", bytes, " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(pointer, bytes, MADV_HUGEPAGE);  // only advice: no check
#endif
    const std::lock_guard<std::mutex> guard(mutex_);
    in_use_.push_front({pointer, bytes});
    return pointer;
  }

  void give_back(void* pointer) {
    const std::lock_guard<std::mutex> guard(mutex_);
    for (auto it = in_use_.begin(); it != in_use_.end(); ++it) {
      if (it->pointer != pointer) continue;
      blocks_.push_front(*it);
      cached_ += it->bytes;
      in_use_.erase(it);
      break;
    }
    shrink(limit_);
  }

  // Frees what is cached; the number of bytes.
  int64_t clear() {
    const std::lock_guard<std::mutex> guard(mutex_);
    const size_t before = cached_;
    shrink(0);
    return static_cast<int64_t>(before);
  }

  // Sets how many bytes are kept; the previous limit.
  int64_t set_limit(int64_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const size_t before = limit_;
    limit_ = static_cast<size_t>(bytes);
    shrink(limit_);
    return static_cast<int64_t>(before);
  }

  int64_t cached() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return static_cast<int64_t>(cached_);
  }

  static constexpr size_t kHuge = size_t{2} << 20;

 private:
  struct Block {
    void* pointer;
    size_t bytes;
  };

  BlockCache() : limit_(default_limit()) {}

  static size_t default_limit() {
#ifdef __linux__
    const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    if (pages > 0 && size > 0) return static_cast<size_t>(pages) * static_cast<size_t>(size) / 8;
#endif
    return size_t{1} << 30;
  }

  void shrink(size_t limit) {  // the blocks that have waited longest go first
    while (cached_ > limit && !blocks_.empty()) {
      cached_ -= blocks_.back().bytes;
      std::free(blocks_.back().pointer);
      blocks_.pop_back();
    }
  }

  std::mutex mutex_;
  std::list<Block> blocks_, in_use_;  // a few dozen at most
  size_t cached_ = 0, limit_;
};

// An uninitialised tensor: small ones as at::empty makes them, large ones from the cache.
inline at::Tensor fresh(at::IntArrayRef sizes, at::ScalarType type) {
  const auto options = at::TensorOptions().dtype(type);
  int64_t count = 1;
  for (const int64_t n : sizes) count *= n;
  const size_t bytes = static_cast<size_t>(count) * c10::elementSize(type);
  if (bytes < 2 * BlockCache::kHuge) return at::empty(sizes, options);
  const size_t rounded = (bytes + BlockCache::kHuge - 1) / BlockCache::kHuge * BlockCache::kHuge;
  void* pointer = BlockCache::instance().take(rounded);
  return at::from_blob(pointer, sizes, [](void* p) { BlockCache::instance().give_back(p); }, options);
}

}  // namespace fused_inr

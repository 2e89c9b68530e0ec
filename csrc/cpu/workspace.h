// Memory: huge pages, the scratch memory of passes that run together, and the blocks that Python
// holds for one step of training, or a call in half precision for its floats.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace fastlstm {

constexpr int64_t kHuge = 2 << 20;  // bytes of a huge page

// Asks for huge pages for memory that is about to be written for the first time, as NumPy does for
// arrays of 4 MiB: the system then zeroes 512 pages in one fault. Only whole huge pages inside.
inline void prefer_huge_pages(void* memory, int64_t size) {
  if (!memory || size < 2 * kHuge) return;
  constexpr uintptr_t kInside = kHuge - 1;
  const uintptr_t from = (uintptr_t(memory) + kInside) & ~kInside;
  const uintptr_t past = (uintptr_t(memory) + uintptr_t(size)) & ~kInside;
  madvise(reinterpret_cast<void*>(from), past - from, MADV_HUGEPAGE);
}

// Memory that a thread keeps for its next call: the system zeroes fresh pages one fault at a time,
// which costs more than a small step. Large blocks ask for huge pages.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  char* get(int64_t size) {
    if (size > size_) {
      release();
      if (size < kKept / 2) size += size / 2;  // untouched, and room for a longer sequence
      align_ = std::align_val_t(size < kHuge ? kLine : kHuge);
      memory_ = static_cast<char*>(::operator new(size_t(size), align_));
      size_ = size;
      if (size >= kHuge) madvise(memory_, size_t(size), MADV_HUGEPAGE);
    }
    return memory_;
  }
  void done() {
    if (size_ > kKept) release();
  }

  static constexpr int64_t kLine = 64;

 private:
  void release() {
    ::operator delete(memory_, align_);
    memory_ = nullptr;
    size_ = 0;
  }

  static constexpr int64_t kKept = 64 << 20;
  char* memory_ = nullptr;
  int64_t size_ = 0;
  std::align_val_t align_{kLine};
};

// First every piece is asked for (`reserve` returns its place), then the memory is taken once, then
// `at` gives the pieces. Each starts on a cache line, so threads never share one. A thread has one
// workspace at a time.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { scratch().done(); }

  template <class T>
  int64_t reserve(int64_t count) {
    const int64_t place = size_;
    int64_t bytes;
    if (__builtin_mul_overflow(count, int64_t(sizeof(T)), &bytes) ||
        __builtin_add_overflow(bytes, place + Scratch::kLine, &size_))
      throw std::bad_alloc();
    size_ -= size_ % Scratch::kLine;
    return place;
  }
  void allocate() { memory_ = scratch().get(size_); }
  template <class T>
  T* at(int64_t place) const {
    return reinterpret_cast<T*>(memory_ + place);
  }

 private:
  static Scratch& scratch() {
    static thread_local Scratch own;
    return own;
  }

  char* memory_ = nullptr;
  int64_t size_ = 0;
};

// A large block of memory, from those that were given back where one fits: a training step then
// writes the pages of the step before, not fresh ones that the system has to find and zero. Of
// those kept, what is beyond kUnmarked is marked as free to take where the system runs short of
// memory: to mark it, and to write it again, costs some 10 us a block.
class Block {
 public:
  explicit Block(int64_t size) : size_(size), room_(rounded(size)) {
    if (!pool().take(&memory_, &room_)) {
      memory_ = ::operator new(size_t(room_), alignment(room_));
      prefer_huge_pages(memory_, room_);
    }
  }
  ~Block() {
    if (!pool().give(memory_, room_)) release(memory_, room_);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void* data() const { return memory_; }
  int64_t size() const { return size_; }

  static constexpr int64_t kLarge = 320 << 10;  // smaller memory is as well from malloc

 private:
  // Blocks nobody holds, the longest unused first. It never waits: where another thread is at it,
  // or was when this process forked, there is memory without it.
  class Pool {
   public:
    Pool() { free_.reserve(kMostFree); }  // give() comes from a destructor and must not throw
    // A block of the room asked for or up to a quarter more.
    bool take(void** memory, int64_t* room) {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (!lock) return false;
      auto best = free_.end();
      for (auto it = free_.begin(); it != free_.end(); ++it)
        if (it->room >= *room && it->room - *room <= *room / 4 &&
            (best == free_.end() || it->room <= best->room))
          best = it;
      if (best == free_.end()) return false;
      *memory = best->memory;
      *room = best->room;
      total_ -= best->room;
      free_.erase(best);
      return true;
    }
    bool give(void* memory, int64_t room) {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (!lock || room > kKept) return false;
      while (total_ + room > kKept || free_.size() == kMostFree) {
        total_ -= free_.front().room;
        release(free_.front().memory, free_.front().room);
        free_.erase(free_.begin());
      }
      if (total_ + room > kUnmarked) madvise(memory, size_t(room), MADV_FREE);
      free_.push_back({memory, room});
      total_ += room;
      return true;
    }

   private:
    struct Free {
      void* memory;
      int64_t room;
    };
    static constexpr int64_t kKept = 256 << 20;
    static constexpr int64_t kUnmarked = 64 << 20;
    static constexpr size_t kMostFree = 1024;
    std::mutex mutex_;
    std::vector<Free> free_;
    int64_t total_ = 0;
  };
  // Never destroyed: arrays may live longer than the statics of this library.
  static Pool& pool() {
    static Pool& one = *new Pool;
    return one;
  }

  // Huge pages where rounding up to them adds less than a half.
  static int64_t granularity(int64_t size) { return size < kHuge * 2 ? kPage : kHuge; }
  static std::align_val_t alignment(int64_t room) { return std::align_val_t(granularity(room)); }
  static int64_t rounded(int64_t size) {
    if (size <= 0 || size > kMost) throw std::bad_alloc();
    int64_t unit = granularity(size);
    while (unit < size / 8) unit *= 2;  // so that steps of other lengths find room in it
    return (size + unit - 1) / unit * unit;
  }
  static void release(void* memory, int64_t room) { ::operator delete(memory, alignment(room)); }

  static constexpr int64_t kPage = 4096;
  static constexpr int64_t kMost = int64_t(1) << 48;  // no process has so many addresses
  int64_t size_, room_;
  void* memory_ = nullptr;
};

}  // namespace fastlstm

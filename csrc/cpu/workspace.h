// One allocation for the scratch memory of passes that run together, handed out piece by piece.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace fastlstm {

// Asks for huge pages for memory that is about to be written for the first time, as NumPy does for
// arrays of 4 MiB: the system then zeroes 512 pages in one fault. Only whole huge pages inside.
inline void prefer_huge_pages(void* memory, int64_t size) {
  constexpr uintptr_t kHuge = 2 << 20;
  if (!memory || size < int64_t(2 * kHuge)) return;
  const uintptr_t from = (uintptr_t(memory) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t past = (uintptr_t(memory) + uintptr_t(size)) & ~(kHuge - 1);
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

  static constexpr int64_t kHuge = 2 << 20;
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

}  // namespace fastlstm

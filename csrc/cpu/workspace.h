// One allocation for all the scratch memory of a call, handed out piece by piece.
#pragma once

#include <cstdint>
#include <new>

namespace fastlstm {

// First every piece is asked for (`reserve` returns its place), then the memory is taken once, then
// `at` gives the pieces. Each starts on a cache line, so threads never share one.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { ::operator delete(memory_, std::align_val_t(kLine)); }

  template <class T>
  int64_t reserve(int64_t count) {
    const int64_t place = size_;
    int64_t bytes;
    if (__builtin_mul_overflow(count, int64_t(sizeof(T)), &bytes) ||
        __builtin_add_overflow(bytes, place + kLine, &size_))
      throw std::bad_alloc();
    size_ -= size_ % kLine;
    return place;
  }
  void allocate() {
    if (size_ > 0)
      memory_ = static_cast<char*>(::operator new(size_t(size_), std::align_val_t(kLine)));
  }
  template <class T>
  T* at(int64_t place) const {
    return reinterpret_cast<T*>(memory_ + place);
  }

 private:
  static constexpr int64_t kLine = 64;
  char* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace fastlstm

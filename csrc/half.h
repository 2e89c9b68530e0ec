// Arrays in half precision: the kernels compute in float32, so such an array is converted before a
// pass reads it or after a pass has written it. Matrices are not: the kernels read them as they
// are. Included only by bindings.cpp.
#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "arrays.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "plan.h"

namespace fastlstm {

inline Element element_of(const Array& array) {
  return !array.half() ? Element::full : array.bfloat16 ? Element::bfloat16 : Element::float16;
}

class InFloat32 {
 public:
  explicit InFloat32(int threads) : threads_(threads) {}

  // Put arrays of floats in the place of those in half precision.
  void input(Array* array) { replace(array, &inputs_); }
  void output(Array* array) { replace(array, &outputs_); }

  // After the last input().
  void read() const {
    convert(inputs_, [](const Copy& copy, void* half, float* floats, int64_t count) {
      kernels<float>().widen(half, element_of(copy.half), count, floats);
    });
  }
  // Once the outputs are written.
  void write() const {
    convert(outputs_, [](const Copy& copy, void* half, float* floats, int64_t count) {
      kernels<float>().narrow(floats, count, element_of(copy.half), half);
    });
  }

 private:
  struct Copy {
    Array half;
    float* floats;
    int64_t count, pieces;  // what is contiguous is cut anywhere, the rest row by row
  };
  static constexpr int64_t kPiece = 4096;
  static constexpr int64_t kOneThread = 32768;  // so few elements

  void replace(Array* array, std::vector<Copy>* copies) {
    if (!array->data || !array->half()) return;
    Copy copy{*array, nullptr, 1, 0};
    for (int d = 0; d < array->dims; ++d) copy.count *= array->shape[d];
    array->itemsize = sizeof(float);
    array->bfloat16 = false;
    int64_t step = 1;
    for (int d = array->dims - 1; d >= 0; step *= array->shape[d--]) array->step[d] = step;
    if (!copy.count) return;
    const int64_t columns = copy.half.shape[copy.half.dims - 1];
    copy.pieces = copy.half.packed() ? ceil_div(copy.count, kPiece) : copy.count / columns;
    array->data = memory_.emplace_back(copy.count * int64_t(sizeof(float))).data();
    copy.floats = static_cast<float*>(array->data);
    copies->push_back(copy);
  }

  // f(copy, halves, floats, count) for every piece.
  template <class F>
  void convert(const std::vector<Copy>& copies, F&& f) const {
    if (copies.empty()) return;
    int64_t total = 0;
    for (const Copy& copy : copies) total += copy.count;
    const int most = total < kOneThread ? 1 : threads_;
    const auto work = [&](int threads, int id) {
      for (const Copy& copy : copies) {
        const auto [from, past] = share(copy.pieces, threads, id);
        for (int64_t i = from; i < past; ++i) convert_piece(copy, i, f);
      }
    };
    if (!parallel(most, [&](int id) { work(most, id); })) work(1, 0);
  }
  template <class F>
  static void convert_piece(const Copy& copy, int64_t i, F&& f) {
    const Array& half = copy.half;
    const int last = half.dims - 1;
    int64_t place = i * kPiece, first = place, count = std::min(kPiece, copy.count - first);
    if (!half.packed()) {
      count = half.shape[last];
      first = i * count;
      place = 0;
      for (int d = last - 1; d >= 0; i /= half.shape[d--])
        place += i % half.shape[d] * half.step[d];
    }
    f(copy, static_cast<char*>(half.data) + place * half.itemsize, copy.floats + first, count);
  }

  const int threads_;
  std::vector<Copy> inputs_, outputs_;
  std::deque<Block> memory_;
};

}  // namespace fastlstm

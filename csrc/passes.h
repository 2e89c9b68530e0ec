// What the forward and the backward pass have in common: zeros for a missing state, and directions
// that run one after the other or at the same time. Included by forward.cpp and backward.cpp.
#pragma once

#include <algorithm>
#include <deque>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "lstm.h"
#include "plan.h"

namespace fastlstm {

// h0 and c0: (N, H), or one row of zeros for every row of the batch where missing.
template <class T>
class InitialState {
 public:
  InitialState(const T* h0, const T* c0, const Sizes& sizes, Workspace* workspace)
      : h0_(h0), c0_(c0), sizes_(sizes) {
    place_ = workspace->reserve<T>(h0 && c0 ? 0 : sizes.hidden);
  }
  void bind(const Workspace& workspace) {
    zeros_ = workspace.at<T>(place_);
    if (!h0_ || !c0_) std::fill_n(zeros_, sizes_.hidden, T(0));
  }
  Rows<const T> h0() const { return rows(h0_); }
  Rows<const T> c0() const { return rows(c0_); }

 private:
  Rows<const T> rows(const T* given) const {
    return given ? Rows<const T>{given, 0, sizes_.hidden, sizes_.batch}
                 : Rows<const T>{zeros_, 0, 0, sizes_.batch};
  }

  const T *h0_, *c0_;
  Sizes sizes_;
  int64_t place_;
  T* zeros_ = nullptr;
};

// Runs `count` directions at the same time, on as many threads each as `plan` has. False, with
// nothing run, where so many threads are not to be had.
template <class Pass, class Args, class T>
bool run_together(const Args* directions, int count, const Plan& plan, const Kernels<T>& kernel) {
  Workspace workspace;
  std::deque<Pass> passes;
  for (int d = 0; d < count; ++d) passes.emplace_back(directions[d], plan, kernel, &workspace);
  workspace.allocate();
  for (Pass& pass : passes) pass.bind(workspace);
  const int threads = plan.threads();
  return parallel(threads * count, [&](int id) { passes[id / threads].work(id % threads); });
}

// `make_plan(threads)` plans one direction.
template <class Pass, class Args, class T, class MakePlan>
void run_directions(const Args* directions, int count, int threads, const Kernels<T>& kernel,
                    MakePlan&& make_plan) {
  if (count == 2 && threads % 2 == 0 && make_plan(threads).threads() > 1 &&
      run_together<Pass>(directions, 2, make_plan(threads / 2), kernel))
    return;
  for (int d = 0; d < count; ++d)
    if (!run_together<Pass>(directions + d, 1, make_plan(threads), kernel))
      run_together<Pass>(directions + d, 1, make_plan(1), kernel);
}

}  // namespace fastlstm

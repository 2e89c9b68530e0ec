// What the forward and the backward pass have in common: the shape of panels, zeros for a missing
// state, arrays in order of computation, who takes part in a step of a ragged batch, and passes
// that run one after the other or at the same time. Included by forward.cpp and backward.cpp.
#pragma once

#include <algorithm>
#include <deque>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "lstm.h"
#include "plan.h"

namespace fastlstm {

// Panels of four vectors of columns, the last one as narrow as whole vectors allow. Where a quarter
// of the last vector or less would be used, and `edges` are allowed, these columns are an edge.
struct PanelShape {
  int64_t columns;        // of the matrix
  int64_t width;          // columns of a full panel
  int64_t count, full;    // panels; those of full width
  int64_t row, tail_row;  // elements of a row in memory, of a full panel and of the tail
  int64_t edge;           // columns of an edge
  int64_t rounded_to;     // rows that a panel holds a multiple of

  template <class T>
  PanelShape(int64_t columns, const Kernels<T>& kernel, bool edges = true)
      : columns(columns),
        width(kPanelVectors * kernel.lanes),
        count(ceil_div(columns, width)),
        full(columns / width),
        row(kernel.panel_row),
        edge(edges && kernel.narrow_end && columns % kernel.lanes <= kernel.lanes / 4
                 ? columns % kernel.lanes
                 : 0),
        rounded_to(kernel.panel_depth) {
    tail_row = ceil_div(columns % width - edge, kernel.lanes) * (row / kPanelVectors);
  }

  // Part `index` of `parts`, of nearly equal width: its first panel and past its last one.
  std::pair<int64_t, int64_t> part(int64_t parts, int64_t index) const {
    const auto cut = [&](int64_t k) {
      return k == parts ? count : (columns * k / parts + width / 2) / width;
    };
    return {cut(index), cut(index + 1)};
  }
  int64_t rows(int64_t depth) const { return ceil_div(depth, rounded_to) * rounded_to; }
  int64_t tail_size(int64_t depth) const { return rows(depth) * (tail_row + edge); }
  int64_t packed_size(int64_t depth) const { return rows(depth) * full * row + tail_size(depth); }
  template <class T>
  Panels<T> packed(const T* data, int64_t depth) const {
    const int64_t step = rows(depth) * row;
    return panels(data, step, row, data + full * step, depth);
  }
  // A row-major matrix as it stands; only its tail panel has been packed.
  template <class T>
  Panels<T> in_place(const T* matrix, int64_t depth, const T* tail) const {
    return panels(matrix, row, columns, tail, depth);
  }

 private:
  template <class T>
  Panels<T> panels(const T* data, int64_t step, int64_t row_step, const T* tail,
                   int64_t depth) const {
    return {data,        step, row_step, full, tail, tail_row, tail + rows(depth) * tail_row,
            rows(depth), edge};
  }
};

// h0 (N, P) and c0 (N, H), or one row of zeros for every row of the batch where missing.
template <class T>
class InitialState {
 public:
  InitialState(const T* h0, const T* c0, const Sizes& sizes, Workspace* workspace)
      : h0_(h0), c0_(c0), sizes_(sizes) {
    place_ = workspace->reserve<T>(h0 && c0 ? 0 : width());
  }
  void bind(const Workspace& workspace) {
    zeros_ = workspace.at<T>(place_);
    if (!h0_ || !c0_) std::fill_n(zeros_, width(), T(0));
  }
  Rows<const T> h0() const { return rows(h0_, sizes_.output); }
  Rows<const T> c0() const { return rows(c0_, sizes_.hidden); }

 private:
  int64_t width() const { return std::max(sizes_.hidden, sizes_.output); }
  Rows<const T> rows(const T* given, int64_t columns) const {
    return given ? Rows<const T>{given, 0, columns, sizes_.batch}
                 : Rows<const T>{zeros_, 0, 0, sizes_.batch};
  }

  const T *h0_, *c0_;
  Sizes sizes_;
  int64_t place_;
  T* zeros_ = nullptr;
};

// An array over time as the recurrence sees it: step s is the s-th in order of computation.
template <class T>
class Series {
 public:
  template <class Args>
  Series(Rows<T> rows, const Args& in)
      : rows_(in.layer.reverse && !in.ragged.rows ? rows.flipped(in.sizes.steps) : rows),
        first_(in.ragged.first) {}
  // Rows n, n + 1, ... of the batch at step s; and of the steps after it where not ragged.
  Rows<T> block(int64_t s, int64_t n, int64_t count) const {
    if (!first_) return rows_.block(s, n, count);
    return {rows_.data + (first_[s] + n) * rows_.step_n, 0, rows_.step_n, count};
  }

 private:
  Rows<T> rows_;
  const int64_t* first_;
};

// How many sequences take part in a step.
class Active {
 public:
  template <class Args>
  explicit Active(const Args& in) : rows_(in.ragged.rows), sizes_(in.sizes) {}

  bool ragged() const { return rows_; }
  int64_t at(int64_t s) const {
    return s < 0 || s >= sizes_.steps ? 0 : rows_ ? rows_[s] : sizes_.batch;
  }
  // Sequences that take part in step s and in the one before or after it.
  int64_t with_before(int64_t s) const { return std::min(at(s), at(s - 1)); }
  int64_t with_after(int64_t s) const { return std::min(at(s), at(s + 1)); }
  int64_t total(int64_t s0, int64_t s1) const {
    if (!rows_) return (s1 - s0) * sizes_.batch;
    return std::accumulate(rows_ + s0, rows_ + s1, int64_t(0));
  }
  // The first sequence of each of some groups, then the batch: nearly the same work for all.
  std::vector<int64_t> groups(int count) const {
    std::vector<int64_t> first(size_t(count) + 1, sizes_.batch);
    for (int k = 0; k < count; ++k)
      first[size_t(k)] = rows_ ? cut(count, k) : share(sizes_.batch, count, k).first;
    return first;
  }

 private:
  // The fewest sequences, from the longest, with index/groups of all rows.
  int64_t cut(int groups, int index) const {
    const int64_t wanted = total(0, sizes_.steps) * index / groups;
    int64_t low = 0, high = sizes_.batch;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      int64_t rows = 0;
      for (int64_t s = 0; s < sizes_.steps; ++s) rows += std::min(rows_[s], middle);
      if (rows >= wanted)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  const int64_t* rows_;
  Sizes sizes_;
};

// Whether an array over time has a NaN, if it is there.
template <class T, class Args>
bool has_nan(const Rows<T>& rows, int64_t columns, const Args& in, const Kernels<T>& kernel) {
  const Active active(in);
  const Series<T> series(rows, in);
  const bool evenly = rows.step_n == columns;
  for (int64_t s = 0; rows.data && s < in.sizes.steps; ++s)
    for (int64_t n = 0; n < active.at(s); n += evenly ? active.at(s) : 1)
      if (kernel.has_nan(series.block(s, n, 1).data, evenly ? active.at(s) * columns : columns))
        return true;
  return false;
}

// Calls run(kernels, ...) for `count` passes, with those for each use. Where some multiply sums of
// terms, an infinite number times another can be a NaN (inf * 1 + inf * 0) that should be infinite;
// so where spoiled(pass, kernels) then, run() is called again, with those for any use.
template <class T, class Args, class Run, class... Uses>
void run_with_kernels(const Args* in, int count, Run&& run,
                      bool (*spoiled)(const Args&, const Kernels<T>&), Uses... uses) {
  const Kernels<T>& plain = kernels<T>();
  run(kernels<T>(uses)...);
  const bool in_terms = ((&kernels<T>(uses) != &plain) || ...);
  const auto is_spoiled = [&](const Args& pass) { return spoiled(pass, plain); };
  if (!in_terms || std::none_of(in, in + count, is_spoiled)) return;
  ++passes_run_again;
  run(kernels<T>((void(uses), Use::any))...);
}

// C = A B for `count` rows, or C += A B: the panels of B that are this member's share of the
// threads of a row group.
template <class T>
void product_of_group(const Kernels<T>& kernel, const Plan& plan, int member, Rows<const T> a,
                      int64_t depth, const PanelShape& shape, const Panels<T>& b, Rows<T> c,
                      int64_t columns, int64_t count, T* scratch, bool accumulate = false) {
  Product<T> product;
  product.a = a;
  product.depth = depth;
  product.b = b;
  product.c = c;
  product.columns = {columns, false};
  product.accumulate = accumulate;
  product.scratch = scratch;
  const auto [from, past] = shape.part(plan.panel_groups, member);
  kernel.product(product, 0, count, from, past);
}

// Runs `count` passes at the same time, on as many threads each as its plan has. False, with
// nothing run, where so many threads are not to be had.
template <class Pass, class Args, class PlanOf, class... Tables>
bool run_together(const Args* in, int count, PlanOf&& plan_of, const Tables&... kernels) {
  Workspace workspace;
  std::deque<Pass> passes;
  int threads = 0;
  for (int k = 0; k < count; ++k) {
    const Plan plan = plan_of(k);
    passes.emplace_back(in[k], plan, &workspace, kernels...);
    threads += plan.threads();
  }
  workspace.allocate();
  for (Pass& pass : passes) pass.bind(workspace);
  return parallel(threads, [&](int id) {
    auto pass = passes.begin();
    for (; id >= pass->threads(); ++pass) id -= pass->threads();
    pass->work(id);
  });
}

// `make_plan(threads)` plans one direction.
template <class Pass, class Args, class MakePlan, class... Tables>
void run_directions(const Args* directions, int count, int threads, MakePlan&& make_plan,
                    const Tables&... kernels) {
  const auto run = [&](int first, int together, int most) {
    const auto plan_of = [&](int) { return make_plan(most); };
    return run_together<Pass>(directions + first, together, plan_of, kernels...);
  };
  if (count == 2 && threads % 2 == 0 && make_plan(threads).threads() > 1 && run(0, 2, threads / 2))
    return;
  for (int d = 0; d < count; ++d)
    if (!run(d, 1, threads)) run(d, 1, 1);
}

}  // namespace fastlstm

// The backward pass through time: from the last step to the first, block by block. Within a block
// the steps give dz; then dx, dW and db of the block are large products, while dz is still in
// cache.
#include <algorithm>
#include <vector>

#include "passes.h"

namespace fastlstm {
namespace {

// A weight matrix (depth, columns) as the right-hand side of dz W, or of dh W_hr; with `direct`
// read where it is, if it is of T.
template <class T>
struct Right {
  const Kernels<T>& kernel;
  const Matrix<T> matrix;
  const int64_t depth, columns;
  const PanelShape shape;
  const bool in_place;
  Panels<T> panels{};
  int64_t place;

  Right(Matrix<T> w, int64_t depth, int64_t columns, const Kernels<T>& kernel, bool direct,
        Workspace* workspace)
      : kernel(kernel),
        matrix(w),
        depth(depth),
        columns(columns),
        shape(columns, kernel),
        in_place(direct && w.element == Element::full) {
    place = workspace->reserve<T>(in_place ? shape.tail_size(depth) : shape.packed_size(depth));
  }
  void bind(const Workspace& workspace) {
    const T* memory = workspace.at<T>(place);
    panels = in_place ? shape.in_place(matrix.full(), depth, memory) : shape.packed(memory, depth);
  }
  void pack(int threads, int id) const {
    const auto [p0, p1] = shape.part(threads, id);
    kernel.pack_matrix(matrix, depth, columns, in_place ? std::max(p0, shape.full) : p0, p1,
                       panels);
  }
};

// So few rows of a single step are multiplied as they are: at H=256 16 rows took longer so, 12 did
// not.
constexpr int64_t kOuterRows = 12;

// A task of dx has about so many rows or more: W_ih is read for each.
constexpr int64_t kProductRows = 128;

template <class T>
class BackwardPass {
 public:
  BackwardPass(const Backward<T>& in, const Plan& plan, Workspace* workspace,
               const Kernels<T>& step_kernels, const Kernels<T>& product_kernels)
      : in_(in),
        plan_(plan),
        steps_(step_kernels),
        products_(product_kernels),
        state_(in.h0, in.c0, in.sizes, workspace),
        w_hh_(in.layer.w_hh, 4 * in.sizes.hidden, needs_w_hh(in) ? in.sizes.output : 0,
              step_kernels, plan.direct, workspace),
        w_hr_(in.layer.w_hr, in.sizes.output, in.layer.w_hr ? in.sizes.hidden : 0, step_kernels,
              plan.direct, workspace),
        // dx of a ragged batch comes step by step.
        w_ih_(in.layer.w_ih, 4 * in.sizes.hidden, in.dx.data ? in.sizes.input : 0,
              in.ragged.rows ? step_kernels : product_kernels, plan.direct, workspace),
        x_shape_(in.dw_ih ? in.sizes.input : 0, product_kernels),
        h_shape_(in.dw_hh && !times_zeros(in) ? in.sizes.output : 0, product_kernels),
        raw_shape_(in.dw_hr ? in.sizes.hidden : 0, product_kernels),
        step_shape_(in.sizes.hidden, step_kernels),
        weights_(in.dw_ih || in.dw_hh || in.dw_hr || in.db),
        strip_size_(product_kernels.strip_size),
        groups_(Active(in).groups(plan.row_groups)),
        chains_(plan.threads()),
        of_gates_(plan.threads()),
        of_outputs_(plan.threads()),
        row_group_(size_t(plan.row_groups)) {
    const auto [steps, batch, input, hidden, output] = in.sizes;
    x_place_ = workspace->reserve<T>(x_shape_.packed_size(plan.block * batch));
    h_place_ = workspace->reserve<T>(h_shape_.packed_size(plan.block * batch));
    raw_place_ = workspace->reserve<T>(raw_shape_.packed_size(plan.block * batch));
    dh_place_ = workspace->reserve<T>(in.layer.w_hr ? plan.block * batch * output : 0);
    dc_place_ = workspace->reserve<T>(in.dc0 ? 0 : batch * hidden);
    // Where there are several blocks, slot `block` carries the dz of the step after the block.
    const int64_t dz_steps = in.dz ? 0 : plan.block + (plan.block < steps);
    dz_place_ = workspace->reserve<T>(dz_steps * batch * 4 * hidden);
    strips_place_ = workspace->reserve<T>(weights_ ? plan.threads() * strip_size_ : 0);
    // For dz, or dh, of as many rows as a product takes.
    scratch_size_ = std::max(step_kernels.scratch_size(plan.block * batch, 4 * hidden),
                             product_kernels.scratch_size(plan.block * batch, 4 * hidden));
    scratch_place_ = workspace->reserve<T>(plan.threads() * scratch_size_);
  }

  void bind(const Workspace& workspace) {
    state_.bind(workspace);
    for (Right<T>* w : {&w_hh_, &w_ih_, &w_hr_}) w->bind(workspace);
    x_ = workspace.at<T>(x_place_);
    h_ = workspace.at<T>(h_place_);
    raw_ = workspace.at<T>(raw_place_);
    dh_ = workspace.at<T>(dh_place_);
    dc_ = workspace.at<T>(dc_place_);
    dz_ = in_.dz ? in_.dz : workspace.at<T>(dz_place_);
    strips_ = workspace.at<T>(strips_place_);
    scratch_ = workspace.at<T>(scratch_place_);
  }

  int threads() const { return plan_.threads(); }
  // The part of thread `id` of threads().
  void work(int id) {
    const auto [steps, batch, input, hidden, output] = in_.sizes;
    const Backward<T>& in = in_;
    const Plan& plan = plan_;
    const int64_t gates = 4 * hidden;
    const int threads = plan.threads();

    const Active active(in);
    const Series<const T> x(in.x, in);
    const Series<const T> y(in.y, in);
    const Series<const T> kept_gates({in.gates, batch * gates, gates, batch}, in);
    const Series<const Float16> half_gates({in.half_gates, batch * gates, gates, batch}, in);
    const Series<const T> kept_cells({in.cells, batch * hidden, hidden, batch}, in);
    const Series<const T> grad_y(in.grad_y, in);
    const Series<T> dx(in.dx, in);
    const Series<const T> raw({in.raw, batch * hidden, hidden, batch}, in);
    const Rows<const T> grad_h{in.grad_h, 0, output, batch};
    const Rows<T> dc{in.dc0 ? in.dc0 : dc_, 0, hidden, batch};
    const Panels<T> x_panels = x_shape_.packed(x_, plan.block * batch);
    const Panels<T> h_panels = h_shape_.packed(h_, plan.block * batch);
    const Panels<T> raw_panels = raw_shape_.packed(raw_, plan.block * batch);

    T* const strip = strips_ + id * strip_size_;
    const int64_t strip_depth = products_.strip_depth;
    T* const scratch = scratch_ + id * scratch_size_;
    for (const Right<T>* w : {&w_hh_, &w_ih_, &w_hr_}) w->pack(threads, id);
    all_.wait(threads);

    // dw rows m.. += strip times rows k.. of packed x or h.
    const auto accumulate = [&](T* dw, int64_t columns, const PanelShape& shape,
                                const Panels<T>& right, int64_t m, int64_t count, int64_t k,
                                int64_t depth, bool first) {
      if (!dw) return;
      Product<T> product;
      product.a = {strip, strip_depth, 0, 1};
      product.depth = depth;
      product.b = right.from_row(k);
      product.c = {dw + m * columns, columns, 0, 1};
      product.columns = {columns, false};
      product.accumulate = !first;
      product.strip = true;
      product.scratch = scratch;
      products_.product(product, 0, count, 0, shape.count);
    };
    // C = dz W for `count` rows of both, the panels cut among the row group.
    const auto through = [&](int member, const Right<T>& right, Rows<const T> from, Rows<T> to,
                             int64_t count) {
      product_of_group(right.kernel, plan, member, from, gates, right.shape, right.panels, to,
                       right.columns, count, scratch);
    };
    // dz of the rows n, n + 1, ... of the batch, `row` rows into the block.
    const auto dz_at = [&, batch = batch](int64_t row, int64_t n, int64_t count) {
      return Rows<T>{dz_ + (row + n) * gates, batch * gates, gates, count};
    };
    const int64_t carried = plan.block * batch;  // where dz of the step after the block stands

    // Tasks of each thread's rows and panels: for each block its steps, some at a time, and dx of
    // some steps each, but for ragged batches, where it comes step by step.
    const bool has_dz = !in.gates && !in.half_gates;
    Chains::Place place{size_t(id)};
    int64_t tasks = 0;
    const int64_t dx_task = std::max(plan.task, kProductRows * plan.row_groups / batch);
    for (int64_t s1 = steps; s1 > 0; s1 -= std::min(plan.block, s1)) {
      const int64_t s0 = s1 - std::min(plan.block, s1);
      const int64_t rows = active.total(s0, s1);
      const bool last = s1 == steps;
      const int64_t first_task = tasks, of_steps = has_dz ? 0 : ceil_div(s1 - s0, plan.task);
      tasks += of_steps + (in.dx.data && !active.ragged() ? ceil_div(s1 - s0, dx_task) : 0);
      for (int64_t task; (task = chains_.take(&place, tasks) - first_task) >= 0;
           chains_.done(&place)) {
        const int group = int(place.chain) / plan.panel_groups;
        const int member = int(place.chain) % plan.panel_groups;
        const int64_t n0 = groups_[size_t(group)], n1 = groups_[size_t(group) + 1];
        const auto [p0, p1] = step_shape_.part(plan.panel_groups, member);
        const int64_t j0 = std::min(p0 * step_shape_.width, hidden);
        const int64_t j1 = std::min(p1 * step_shape_.width, hidden);
        const bool of_dx = task >= of_steps;
        const int64_t size = of_dx ? dx_task : plan.task;
        const int64_t past_step = s1 - (of_dx ? task - of_steps : task) * size;
        const int64_t first_step = std::max(s0, past_step - size);
        if (of_dx) {
          through(member, w_ih_, dz_at(active.total(s0, first_step), n0, n1 - n0),
                  dx.block(first_step, n0, n1 - n0), (past_step - first_step) * (n1 - n0));
          continue;
        }
        for (int64_t n = n0; n < n1 && past_step == steps; ++n) {
          T* to = dc.at(0, n);
          for (int64_t j = j0; j < j1; ++j) to[j] = in.grad_c ? in.grad_c[n * hidden + j] : 0;
        }
        int64_t row = active.total(s0, past_step);  // of dz, where step s begins
        for (int64_t s = past_step - 1; s >= first_step; --s) {
          const int64_t later = s == s1 - 1 ? carried : row;
          row -= active.at(s);
          StepBackward<T> step;
          step.step = s;
          step.hidden = hidden;
          step.w = in.layer.w_hr ? w_hr_.panels : w_hh_.panels;
          step.depth = in.layer.w_hr ? output : gates;
          step.gates = in.gates ? kept_gates.block(s, 0, batch) : Rows<const T>{};
          step.half_gates = in.half_gates ? half_gates.block(s, 0, batch) : Rows<const Float16>{};
          step.c = kept_cells.block(s, 0, batch);
          step.dc = dc;
          step.dz = dz_at(row, 0, batch);
          step.scratch = scratch;
          // Sequences that have a step before this one or not, and one after it or not.
          const int64_t before = active.with_before(s), after = active.with_after(s);
          const int64_t edges[] = {0, std::min(before, after), std::max(before, after),
                                   active.at(s)};
          for (int k = 0; k < 3; ++k) {
            const int64_t from = std::max(n0, edges[k]), past = std::min(n1, edges[k + 1]);
            if (from >= past) continue;
            const bool ends = from >= after;
            const auto y_part = in.grad_y.data ? grad_y.block(s, 0, batch) : Rows<const T>{};
            const auto h_part = ends ? grad_h : Rows<const T>{};
            const auto later_dz = ends ? Rows<const T>{} : Rows<const T>(dz_at(later, 0, batch));
            step.c_prev = from < before ? kept_cells.block(s - 1, 0, batch) : state_.c0();
            if (in.layer.w_hr) {
              // dL/dh_t first, whose columns the threads that share these rows divide.
              const Rows<T> dh{dh_ + row * output, 0, output, batch};
              sum_dh(dh, y_part, h_part, later_dz, from, past, member, scratch);
              row_group_[size_t(group)].wait(plan.panel_groups);
              step.grad_y = step.grad_h = {};
              step.next = dh;
            } else {
              step.grad_y = y_part;
              step.grad_h = h_part;
              step.next = later_dz;
            }
            steps_.step_backward(step, from, past, p0, p1);
          }
          row_group_[size_t(group)].wait(plan.panel_groups);
          const int64_t from = std::max(n0, before), past = std::min(n1, active.at(s));
          if (in.dh0 && from < past)
            through(member, w_hh_, dz_at(row, from, past - from),
                    Rows<T>{in.dh0, 0, output, batch}.block(0, from, past - from), past - from);
          if (in.dx.data && active.ragged() && n0 < past)
            through(member, w_ih_, dz_at(row, n0, past - n0), dx.block(s, n0, past - n0),
                    past - n0);
        }
        if (first_step == s0 && s0 > 0)
          for (int64_t n = n0; n < std::min(n1, active.at(s0)); ++n)
            for (int64_t gate = 0; gate < 4; ++gate) {
              const T* from = dz_ + n * gates + gate * hidden;
              std::copy(from + j0, from + j1, dz_ + (carried + n) * gates + gate * hidden + j0);
            }
      }

      if (weights_ && in.sizes.steps == 1 && batch <= kOuterRows) {
        all_.wait(threads);  // dz of the whole batch is there
        outer_products(x.block(0, 0, batch), raw.block(0, 0, batch), share(gates, threads, id),
                       share(output, threads, id));
        return;
      }
      if (in.dw_ih) {
        const auto [from, past] = x_shape_.part(threads, id);
        for_blocks(
            active, s0, s1,
            [&, from = from, past = past, input = input](int64_t s, int64_t k, int64_t count) {
              products_.pack_rows(x.block(s, 0, active.at(s)), k, count, input, from, past,
                                  x_panels);
            });
      }
      if (h_shape_.columns) {
        const auto [from, past] = h_shape_.part(threads, id);
        pack_h(active, y, s0, s1, from, past, h_panels);
      }
      if (in.dw_hr) {
        const auto [from, past] = raw_shape_.part(threads, id);
        for_blocks(
            active, s0, s1,
            [&, from = from, past = past, hidden = hidden](int64_t s, int64_t k, int64_t count) {
              products_.pack_rows(raw.block(s, 0, active.at(s)), k, count, hidden, from, past,
                                  raw_panels);
            });
      }
      all_.wait(threads);  // dz of the whole batch is there
      // f for each strip of the rows of A^T, A (rows, width).
      const auto strips_of = [&](Shares& strips, const T* a, int64_t width, auto&& f) {
        const int64_t height = strip_height(width);
        const auto [from, past] = share(ceil_div(width, height), threads, id);
        for (int64_t k = 0; k < rows; k += strip_depth) {
          const int64_t depth = std::min(strip_depth, rows - k);
          if (k > 0) all_.wait(threads);  // what was added to these rows before
          strips.open(id, from, past);
          for (int64_t item; (item = strips.take(id)) >= 0;) {
            const int64_t m = item * height, count = std::min(height, width - m);
            products_.transpose({a + k * width, width, width, 1}, depth, m, m + count, strip,
                                strip_depth);
            f(m, count, k, depth, last && k == 0);
          }
        }
      };
      if (in.dw_ih || in.dw_hh || in.db)
        strips_of(of_gates_, dz_, gates,
                  [&, input = input, output = output](int64_t m, int64_t count, int64_t k,
                                                      int64_t depth, bool first) {
                    accumulate(in.dw_ih, input, x_shape_, x_panels, m, count, k, depth, first);
                    if (!times_zeros(in))
                      accumulate(in.dw_hh, output, h_shape_, h_panels, m, count, k, depth, first);
                    else if (k == 0)
                      multiply_zeros(m, m + count);
                    if (in.db)
                      products_.sum_rows(strip, strip_depth, count, depth, in.db + m, !first);
                  });
      if (in.dw_hr)
        strips_of(
            of_outputs_, dh_, output,
            [&, hidden = hidden](int64_t m, int64_t count, int64_t k, int64_t depth, bool first) {
              accumulate(in.dw_hr, hidden, raw_shape_, raw_panels, m, count, k, depth, first);
            });
      all_.wait(threads);  // before the next block writes dz
    }
  }

 private:
  // Of a single step nothing goes back through W_hh, but to h0; a projection takes its shape.
  static bool needs_w_hh(const Backward<T>& in) {
    return in.sizes.steps > 1 || in.dh0 || in.layer.w_hr;
  }

  // A single step without a state gives W_hh no gradient.
  static bool times_zeros(const Backward<T>& in) {
    return in.dw_hh && in.sizes.steps == 1 && !in.h0;
  }

  // Rows of a strip: where threads share `width` rows, about one strip or some for each, in whole
  // tiles.
  int64_t strip_height(int64_t width) const {
    constexpr int64_t kLeast = 64, kMost = 4, kWhole = 16;
    const int64_t threads = plan_.threads();
    if (threads == 1) return products_.strip_rows;
    const int64_t strips = threads * std::clamp<int64_t>(width / (kLeast * threads), 1, kMost);
    const int64_t height = ceil_div(ceil_div(width, strips), kWhole) * kWhole;
    return std::min<int64_t>(height, products_.strip_rows);
  }

  // f(s, row in the block, rows) for runs of rows that lie evenly: all of the block where not
  // ragged.
  template <class F>
  static void for_blocks(const Active& active, int64_t s0, int64_t s1, F&& f) {
    if (!active.ragged()) return f(s0, 0, active.total(s0, s1));
    for (int64_t s = s0, row = 0; s < s1; row += active.at(s++)) f(s, row, active.at(s));
  }

  // The weight gradients of a single step: these rows of them, and these of W_hr's.
  void outer_products(Rows<const T> x, Rows<const T> raw, std::pair<int64_t, int64_t> ih,
                      std::pair<int64_t, int64_t> hr) const {
    const auto [steps, batch, input, hidden, output] = in_.sizes;
    const auto [m0, m1] = ih;
    const Rows<const T> dz{dz_, 0, 4 * hidden, batch}, dh{dh_, 0, output, batch};
    const auto add = [&, batch = batch](Rows<const T> left, Rows<const T> right, int64_t columns,
                                        int64_t from, int64_t past, T* to) {
      if (to) products_.outer(left, right, batch, columns, from, past, to);
    };
    add(dz, x, input, m0, m1, in_.dw_ih);
    if (times_zeros(in_))
      multiply_zeros(m0, m1);
    else
      add(dz, state_.h0(), output, m0, m1, in_.dw_hh);
    add(dh, raw, hidden, hr.first, hr.second, in_.dw_hr);
    for (int64_t m = m0; in_.db && m < m1; ++m) {
      T sum = 0;
      for (int64_t n = 0; n < batch; ++n) sum += dz.at(0, n)[m];
      in_.db[m] = sum;
    }
  }

  // Rows m0 <= m < m1 of dW_hh: zeros, or NaN where dz has an infinity or a NaN.
  void multiply_zeros(int64_t m0, int64_t m1) const {
    constexpr int64_t kAtOnce = 64;
    const auto [steps, batch, input, hidden, output] = in_.sizes;
    for (int64_t m = m0; m < m1; m += kAtOnce) {
      const int64_t count = std::min(kAtOnce, m1 - m);
      T sums[kAtOnce] = {};
      for (int64_t n = 0; n < batch; ++n)
        for (int64_t j = 0; j < count; ++j) sums[j] += dz_[n * 4 * hidden + m + j] * T(0);
      for (int64_t j = 0; j < count; ++j)
        std::fill_n(in_.dw_hh + (m + j) * output, output, sums[j]);
    }
  }

  // dh = grad_y + grad_h + dz W_hh for rows n0 <= n < n1; this thread's share of the columns.
  void sum_dh(Rows<T> dh, Rows<const T> grad_y, Rows<const T> grad_h, Rows<const T> dz, int64_t n0,
              int64_t n1, int member, T* scratch) const {
    const PanelShape& shape = w_hh_.shape;
    const auto [from, past] = shape.part(plan_.panel_groups, member);
    const int64_t j0 = std::min(from * shape.width, in_.sizes.output);
    const int64_t j1 = std::min(past * shape.width, in_.sizes.output);
    for (int64_t n = n0; n < n1; ++n)
      for (int64_t j = j0; j < j1; ++j)
        dh.at(0, n)[j] =
            (grad_y.data ? grad_y.at(0, n)[j] : T(0)) + (grad_h.data ? grad_h.at(0, n)[j] : T(0));
    if (!dz.data) return;
    product_of_group(steps_, plan_, member, dz.block(0, n0, n1 - n0), 4 * in_.sizes.hidden, shape,
                     w_hh_.panels, dh.block(0, n0, n1 - n0), in_.sizes.output, n1 - n0, scratch,
                     true);
  }

  // h_{t-1} of every row of the block.
  void pack_h(const Active& active, const Series<const T>& y, int64_t s0, int64_t s1, int64_t from,
              int64_t past, const Panels<T>& panels) const {
    const int64_t output = in_.sizes.output, batch = in_.sizes.batch;
    const auto pack = [&](Rows<const T> h, int64_t row, int64_t count) {
      if (count > 0) products_.pack_rows(h, row, count, output, from, past, panels);
    };
    if (!active.ragged()) {
      const int64_t initial = s0 == 0 ? batch : 0;
      pack(state_.h0(), 0, initial);
      if (s1 - s0 > (s0 == 0))
        pack(y.block(s0 == 0 ? 0 : s0 - 1, 0, batch), initial, active.total(s0, s1) - initial);
      return;
    }
    for (int64_t s = s0, row = 0; s < s1; row += active.at(s++)) {
      const int64_t going = active.with_before(s), begin = active.at(s) - going;
      if (going > 0) pack(y.block(s - 1, 0, going), row, going);
      Rows<const T> h0 = state_.h0();
      h0 = h0.block(0, going, begin);
      pack(h0, row + going, begin);
    }
  }

  const Backward<T> in_;
  const Plan plan_;
  const Kernels<T>&steps_, &products_;
  InitialState<T> state_;
  Right<T> w_hh_, w_hr_, w_ih_;
  const PanelShape x_shape_, h_shape_, raw_shape_, step_shape_;
  const bool weights_;  // a weight gradient is wanted
  const int64_t strip_size_;
  int64_t x_place_, h_place_, raw_place_, dh_place_, dc_place_, dz_place_, strips_place_;
  int64_t scratch_place_, scratch_size_;  // of a thread
  T *x_, *h_, *raw_, *dh_, *dc_, *dz_, *strips_, *scratch_;
  const std::vector<int64_t> groups_;  // of rows: the first of each, and past the last
  Chains chains_;                      // of each thread's rows and panels
  Shares of_gates_, of_outputs_;       // strips of the rows of dW_ih and dW_hh, of dW_hr
  Barrier all_;
  std::vector<Barrier> row_group_;
};

template <class T>
bool spoiled(const Backward<T>& in, const Kernels<T>& kernel) {
  const auto [steps, batch, input, hidden, output] = in.sizes;
  return has_nan(in.dx, input, in, kernel) || kernel.has_nan(in.dw_ih, 4 * hidden * input) ||
         kernel.has_nan(in.dw_hh, 4 * hidden * output) ||
         kernel.has_nan(in.dw_hr, output * hidden) || kernel.has_nan(in.db, 4 * hidden) ||
         kernel.has_nan(in.dh0, batch * output) || kernel.has_nan(in.dc0, batch * hidden);
}

}  // namespace

template <class T>
void backward(const Backward<T>* directions, int count, int threads) {
  const auto [steps, batch, input, hidden, output] = directions->sizes;
  if (batch == 0) {
    for (int d = 0; d < count; ++d) {
      const Backward<T>& in = directions[d];
      if (in.dw_ih) std::fill_n(in.dw_ih, 4 * hidden * input, T(0));
      if (in.dw_hh) std::fill_n(in.dw_hh, 4 * hidden * output, T(0));
      if (in.dw_hr) std::fill_n(in.dw_hr, output * hidden, T(0));
      if (in.db) std::fill_n(in.db, 4 * hidden, T(0));
    }
    return;
  }
  const Sizes& sizes = directions->sizes;
  const bool in_bf16 = directions->in_bf16;
  const auto run = [&](const Kernels<T>& steps, const Kernels<T>& products) {
    const auto plan = [&](int most) {
      return plan_backward(sizes, machine_of(steps), machine_of(products), most);
    };
    run_directions<BackwardPass<T>>(directions, count, threads, plan, steps, products);
  };
  run_with_kernels<T>(directions, count, run, spoiled<T>, use_backward(sizes, in_bf16),
                      use_products_backward(sizes, in_bf16));
}

template void backward(const Backward<float>*, int, int);
template void backward(const Backward<double>*, int, int);

}  // namespace fastlstm

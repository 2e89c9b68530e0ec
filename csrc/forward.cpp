// The forward pass: pack the weights, then block by block of time the input product and the steps.
#include <algorithm>
#include <atomic>
#include <deque>
#include <memory>
#include <vector>

#include "passes.h"

namespace fastlstm {
namespace {

// A pass, and what tells its steps to the layer above and those of the layer below to it, where
// these run at the same time.
template <class T>
struct Linked : Forward<T> {
  explicit Linked(const Forward<T>& in) : Forward<T>(in) {}
  const Progress* below = nullptr;
  Progress* done = nullptr;
};

// Steps of the calls before with these weights, modulo 2: where weights are read as they are, the
// first step then begins with what the last one of the call before left in the caches.
bool odd_step(const void* weights, int64_t steps) {
  static std::atomic<uint8_t> counts[256];  // of some weights each
  const auto place = uintptr_t(weights) >> 6;
  auto& count = counts[(place ^ place >> 8 ^ place >> 16) % 256];
  return count.fetch_add(uint8_t(steps), std::memory_order_relaxed) % 2;
}

// To look whether all of W_hh is finite takes as long as to multiply one row by it, as it is.
constexpr int64_t kBatchWithoutZeros = 2;

template <class T>
class ForwardPass {
 public:
  ForwardPass(const Linked<T>& in, const Plan& plan, Workspace* workspace, const Kernels<T>& kernel)
      : in_(in),
        plan_(plan),
        kernel_(kernel),
        state_(in.h0, in.c0, in.sizes, workspace),
        ih_shape_(panels_of_gates(in.sizes, kernel, plan.input_in_step)),
        hh_shape_(panels_of_gates(in.sizes, kernel, true)),
        y_shape_(in.layer.w_hr ? in.sizes.output : 0, kernel),
        first_step_(plan.direct && !plan.across && odd_step(in.layer.w_hh.data, in.sizes.steps)),
        skip_zeros_(!in.h0 && (!plan.direct || in.sizes.batch >= kBatchWithoutZeros)),
        groups_(Active(in).groups(plan.row_groups)),
        chains_(plan.threads()),
        row_group_(size_t(plan.row_groups)) {
    const auto [steps, batch, input, hidden, output] = in.sizes;
    bias_place_ = workspace->reserve<T>(4 * hidden);
    ih_place_ = workspace->reserve<T>(plan.direct        ? 0
                                      : plan.pack_at_use ? plan.threads() * panel_size(input)
                                                         : ih_shape_.packed_size(input));
    hh_place_ = workspace->reserve<T>(plan.direct ? 0 : hh_shape_.packed_size(output));
    hr_place_ = workspace->reserve<T>(y_shape_.packed_size(hidden));
    raw_place_ = workspace->reserve<T>(in.layer.w_hr && !in.raw ? batch * hidden : 0);
    // Training writes the input product where the gates will be kept.
    own_z_ = !in.gates && !plan.input_in_step;
    z_place_ = workspace->reserve<T>(own_z_ ? plan.block * batch * 4 * hidden : 0);
    const int64_t at_once = std::max(batch, plan.input_in_step ? 0 : plan.block * batch);
    scratch_size_ = plan.across ? kernel.across_size(input + output)
                                : kernel.scratch_size(
                                      at_once, input + output + hidden + 3 * kernel.panel_depth);
    scratch_place_ = workspace->reserve<T>(plan.threads() * scratch_size_);
  }

  void bind(const Workspace& workspace) {
    state_.bind(workspace);
    bias_ = workspace.at<T>(bias_place_);
    w_ih_ = workspace.at<T>(ih_place_);
    w_hh_ = workspace.at<T>(hh_place_);
    z_ = workspace.at<T>(z_place_);
    w_hr_ = workspace.at<T>(hr_place_);
    raw_ = workspace.at<T>(raw_place_);
    scratch_ = workspace.at<T>(scratch_place_);
  }

  int threads() const { return plan_.threads(); }
  // The part of thread `id` of threads().
  void work(int id) {
    const auto [steps, batch, input, hidden, output] = in_.sizes;
    const Linked<T>& in = in_;
    const Plan& plan = plan_;
    const Kernels<T>& kernel = kernel_;
    const int64_t lanes = kernel.lanes;
    const int64_t panels = ceil_div(hidden, lanes);
    const int64_t gates = 4 * hidden;
    const int threads = plan.threads();
    T* const bias = bias_;
    T* const w_ih = w_ih_ + (plan.pack_at_use ? id * panel_size(input) : 0);
    Panels<T> ih = ih_shape_.packed<T>(w_ih, input);
    if (plan.pack_at_use) ih.panel_step = 0;
    const Panels<T> hh = hh_shape_.packed<T>(w_hh_, output);
    T* const scratch = scratch_ + id * scratch_size_;

    const Active active(in);
    const Series<const T> x(in.x, in);
    const Series<T> y(in.y, in);
    const Series<T> kept_gates({in.gates, batch * gates, gates, batch}, in);
    const Series<Float16> half_gates({in.half_gates, batch * gates, gates, batch}, in);
    const Series<T> kept_cells({in.cells, batch * hidden, hidden, batch}, in);
    const Series<T> kept_raw({in.raw, batch * hidden, hidden, batch}, in);
    const Rows<T> own_raw{raw_, 0, hidden, batch};
    const Rows<T> c_n{in.c_n, 0, hidden, batch};
    const Rows<T> own{z_, batch * gates, gates, batch};

    if (id == 0)
      for (int64_t j = 0; j < gates; ++j)
        bias[j] = (in.layer.b_ih ? in.layer.b_ih[j] : 0) + (in.layer.b_hh ? in.layer.b_hh[j] : 0);
    // Nothing but zeros is there to multiply by W_hh.
    const bool only_zeros = steps == 1 && !in.h0 && plan.input_in_step;
    const auto [from, end] = share(panels, threads, id);
    if (!plan.direct && !plan.pack_at_use) {
      kernel.pack_gates(in.layer.w_ih, hidden, input, from, end, ih);
      if (!only_zeros) pack_hh(from, end, hh);
    }
    if (skip_zeros_ && (plan.direct || only_zeros)) look_at_hh(threads, id);
    if (in.layer.w_hr) pack_projection(threads, id);
    all_.wait(threads);
    if (only_zeros && !plan.direct && !skip_zeros_) {
      pack_hh(from, end, hh);
      all_.wait(threads);
    }

    const int64_t tasks = ceil_div(steps, plan.task);
    Chains::Place place{size_t(id)};
    for (int64_t task; (task = chains_.take(&place, tasks)) >= 0; chains_.done(&place)) {
      const int group = int(place.chain) / plan.panel_groups;
      const int member = int(place.chain) % plan.panel_groups;
      const int64_t n0 = groups_[size_t(group)], n1 = groups_[size_t(group) + 1];
      const auto [p0, p1] = share(panels, plan.panel_groups, member);
      const int64_t past = std::min((task + 1) * plan.task, steps);
      for (int64_t s0 = task * plan.task; s0 < past; s0 += plan.block) {
        const int64_t count = std::min(plan.block, past - s0);
        const Rows<T> z = own_z_ ? own : kept_gates.block(s0, 0, batch);
        if (in.below) in.below->wait(s0 + count);
        if (!plan.input_in_step) {
          Product<T> product;
          product.a = x.block(s0, n0, n1 - n0);
          product.depth = input;
          product.b = ih;
          product.c = z.block(0, n0, n1 - n0);
          product.columns = {hidden, true};
          product.start = bias;
          product.given = true;
          product.scratch = scratch;
          const int64_t rows = count * (n1 - n0);
          if (plan.pack_at_use)
            multiply_and_pack(product, rows, p0, p1, hh);
          else
            kernel.product(product, 0, rows, p0, p1);
        }
        for (int64_t s = s0; s < s0 + count; ++s) {
          StepForward<T> step;
          step.step = first_step_ + s;
          step.hidden = hidden;
          step.input = plan.input_in_step ? input : 0;
          step.output = output;
          step.full = hh_shape_.full;
          step.start = plan.input_in_step ? Rows<const T>{bias} : z.block(s - s0, 0, batch);
          step.x = x.block(s, 0, batch);
          step.w_ih = plan.direct ? in.layer.w_ih : Matrix<T>{w_ih};
          step.w_hh = plan.direct ? in.layer.w_hh : Matrix<T>{w_hh_};
          step.c = in.cells ? kept_cells.block(s, 0, batch) : c_n;
          const Rows<T> raw = in.raw ? kept_raw.block(s, 0, batch) : own_raw;
          step.h = in.layer.w_hr ? raw : y.block(s, 0, batch);
          step.gates = in.gates ? kept_gates.block(s, 0, batch) : Rows<T>{};
          step.half_gates = in.half_gates ? half_gates.block(s, 0, batch) : Rows<Float16>{};
          step.row_by_row = plan.row_by_row;
          step.as_distances = in.half_gates != nullptr;
          step.scratch = scratch;
          const auto run = [&, p0 = p0, p1 = p1](int64_t from, int64_t past) {
            if (!plan.direct) return kernel.step_forward(step, from, past, p0, p1);
            const int64_t across = std::clamp(plan.across, from, past);
            if (from < across) kernel.step_forward_across(step, from, across, p0, p1);
            if (across < past) kernel.step_forward_direct(step, across, past, p0, p1);
          };
          // Sequences that go on, then those that begin here.
          const int64_t going = active.with_before(s), all = active.at(s);
          if (n0 < going) {
            step.h_prev = y.block(s - 1, 0, batch);
            step.c_prev = in.cells ? Rows<const T>(kept_cells.block(s - 1, 0, batch)) : c_n;
            run(n0, std::min(n1, going));
          }
          if (going < all && n0 < all && going < n1) {
            step.h_prev = state_.h0();
            step.c_prev = state_.c0();
            if (skip_zeros_) step.output = 0;
            run(std::max(n0, going), std::min(n1, all));
          }
          row_group_[size_t(group)].wait(plan.panel_groups);
          if (in.layer.w_hr) {
            const int64_t count = std::min(n1, all) - n0;
            if (count > 0)
              project(raw.block(0, n0, count), y.block(s, n0, count), count, member, scratch);
            row_group_[size_t(group)].wait(plan.panel_groups);
          }
        }
        // Every layer has blocks of as many steps.
        if (in.done && member == 0) in.done->reached(group, s0 + count);
      }

      if (past < steps) continue;
      // What the last step of each sequence left.
      const auto last = [&](const Series<T>& from, int64_t columns, T* to) {
        const auto [j0, j1] = share(columns, plan.panel_groups, member);
        int64_t s = past - 1;
        for (int64_t n = n0; n < n1; ++n) {
          while (active.at(s) <= n) --s;
          const T* row = from.block(s, n, 1).at(0, 0);
          std::copy(row + j0, row + j1, to + n * columns + j0);
        }
      };
      if (in.h_n) last(y, output, in.h_n);
      if (in.cells) last(kept_cells, hidden, in.c_n);
    }
  }

 private:
  // Panels of the gates of VL units each. The last one of a step is a tail if it has half as many
  // units or fewer: its gates stand beside one another, not on a vector each.
  static PanelShape panels_of_gates(const Sizes& sizes, const Kernels<T>& kernel, bool in_step) {
    const int64_t H = sizes.hidden, VL = kernel.lanes;
    const bool tail = in_step && kernel.narrow_end && H % VL * 2 <= VL;
    return {4 * (tail ? H : ceil_div(H, VL) * VL), kernel, false};
  }
  // Elements of such a panel, where whole.
  int64_t panel_size(int64_t depth) const { return ih_shape_.rows(depth) * ih_shape_.row; }

  // The input product of `rows` rows panel by panel, W_ih packed just before and W_hh just after;
  // meanwhile the weights come in that are packed next.
  void multiply_and_pack(Product<T> product, int64_t rows, int64_t p0, int64_t p1,
                         const Panels<T>& hh) {
    const int64_t hidden = in_.sizes.hidden, input = in_.sizes.input, output = in_.sizes.output;
    for (int64_t p = p0; p < p1; ++p) {
      kernel_.pack_gates(in_.layer.w_ih, hidden, input, p, p + 1, product.b);
      Ahead ahead;
      Ahead::Run* run = ahead.runs;
      const auto add = [&](const Matrix<T>& w, int64_t depth, int64_t panel) {
        const auto* data = static_cast<const char*>(w.data);
        const int64_t row = depth * w.element_size(), first = panel * kernel_.lanes;
        for (int64_t gate = 0; gate < kPanelVectors; ++gate)
          *run++ = {data + (gate * hidden + first) * row, kernel_.lanes * row};
      };
      add(in_.layer.w_hh, output, p);
      add(in_.layer.w_ih, input, std::min(p + 1, p1 - 1));
      product.ahead = &ahead;
      kernel_.product(product, 0, rows, p, p + 1);
      pack_hh(p, p + 1, hh);
    }
  }

  void pack_hh(int64_t p0, int64_t p1, const Panels<T>& to) {
    const auto [steps, batch, input, hidden, output] = in_.sizes;
    if (!kernel_.pack_gates(in_.layer.w_hh, hidden, output, p0, p1, to)) skip_zeros_ = false;
  }

  // Looks for what is not finite in the part of W_hh that is thread `id`'s.
  void look_at_hh(int threads, int id) {
    const auto [from, past] = share(4 * in_.sizes.hidden, threads, id);
    const int64_t output = in_.sizes.output;
    if (!kernel_.finite(in_.layer.w_hh, from * output, (past - from) * output)) skip_zeros_ = false;
  }

  // The panels of W_hr^T that thread `id` packs.
  void pack_projection(int threads, int id) {
    const int64_t hidden = in_.sizes.hidden;
    const auto [from, past] = y_shape_.part(threads, id);
    kernel_.pack_columns(in_.layer.w_hr, hidden, in_.sizes.output, from, past,
                         y_shape_.packed<T>(w_hr_, hidden));
  }

  // h = raw W_hr^T for `count` rows, the panels cut among the row group.
  void project(Rows<const T> raw, Rows<T> h, int64_t count, int member, T* scratch) {
    const int64_t hidden = in_.sizes.hidden;
    product_of_group(kernel_, plan_, member, raw, hidden, y_shape_,
                     y_shape_.packed<T>(w_hr_, hidden), h, in_.sizes.output, count, scratch);
  }

  const Linked<T> in_;
  const Plan plan_;
  const Kernels<T>& kernel_;
  InitialState<T> state_;
  const PanelShape ih_shape_, hh_shape_, y_shape_;  // of W_ih^T, W_hh^T and W_hr^T
  int64_t bias_place_, ih_place_, hh_place_, z_place_, hr_place_, raw_place_, scratch_place_;
  int64_t scratch_size_;  // of a thread
  bool own_z_;
  T *bias_, *w_ih_, *w_hh_, *z_, *w_hr_, *raw_, *scratch_;
  const int64_t first_step_;
  // An initial state of zeros is not multiplied by W_hh, unless an infinite weight or a NaN in it
  // would make that a NaN.
  std::atomic<bool> skip_zeros_;
  const std::vector<int64_t> groups_;  // of rows: the first of each, and past the last
  Chains chains_;                      // of each thread's rows and panels
  Barrier all_;
  std::vector<Barrier> row_group_;
};

// Gives each layer but the last memory for its output, which is the input of the next. Where
// `at_once` of them run, they need one output each and that of the layer below.
template <class T>
std::vector<std::unique_ptr<T[]>> connect(Linked<T>* passes, int layers, int directions,
                                          int at_once) {
  const Forward<T>& in = *passes;
  const int64_t batch = in.sizes.batch, width = directions * in.sizes.output;
  const int64_t count = Active(in).total(0, in.sizes.steps) * width;
  std::vector<std::unique_ptr<T[]>> between(size_t(std::min(layers - 1, at_once + 1)));
  for (auto& memory : between) {
    memory.reset(new T[size_t(count)]);
    prefer_huge_pages(memory.get(), count * int64_t(sizeof(T)));
  }
  for (int k = 0; k < (layers - 1) * directions; ++k) {
    T* memory = between[size_t(k / directions) % between.size()].get();
    T* own = memory + k % directions * in.sizes.output;
    passes[k].y = {own, batch * width, width, batch};
    passes[k + directions].x = {memory, batch * width, width, batch};
  }
  return between;
}

// Runs layers at the same time, each some steps behind the one below it. False, with nothing run,
// where so many threads are not to be had.
template <class T, class PlanOf>
bool run_in_wave(Linked<T>* layers, int count, const Kernels<T>& kernel, PlanOf&& plan_of) {
  std::deque<Progress> progress;
  for (int k = 0; k < count; ++k) {
    layers[k].below = k ? &progress.back() : nullptr;
    layers[k].done = &progress.emplace_back(plan_of(k).row_groups);
  }
  const bool ran = run_together<ForwardPass<T>>(layers, count, plan_of, kernel);
  for (int k = 0; k < count; ++k) layers[k].below = layers[k].done = nullptr;
  return ran;
}

// A NaN in c stays until the end, and one in h makes one in c, but in the last step.
template <class T>
bool spoiled(const Forward<T>& in, const Kernels<T>& kernel) {
  const auto [steps, batch, input, hidden, output] = in.sizes;
  return (in.h_n ? kernel.has_nan(in.h_n, batch * output) : has_nan(in.y, output, in, kernel)) ||
         kernel.has_nan(in.c_n, batch * hidden);
}

// The kernels of the first layer, whose input has another size, and of those above it.
template <class T>
void run_layers(const Forward<T>* given, int layers, int directions, int threads,
                const Kernels<T>& of_first, const Kernels<T>& of_upper) {
  const auto make_plan = [&](auto* plan_of, const Forward<T>& in, const Kernels<T>& kernel,
                             int most) {
    Plan plan = plan_of(in.sizes, machine_of(kernel), most);
    // A product over time wants as many rows at every step.
    if (in.ragged.rows) {
      plan.input_in_step = true;
      plan.pack_at_use = false;
    }
    return plan;
  };
  const Sizes& upper = given[(layers - 1) * directions].sizes;
  const int at_once =
      directions == 1 && &of_first == &of_upper
          ? layers_at_once(upper, given->sizes.input, machine_of(of_upper), layers, threads)
          : 1;
  std::vector<Linked<T>> passes(given, given + layers * directions);
  const auto between = connect(passes.data(), layers, directions, at_once);

  for (int layer = 0; layer < layers; layer += at_once) {
    Linked<T>* run = &passes[size_t(layer * directions)];
    const Kernels<T>& kernel = layer ? of_upper : of_first;
    const int count = std::min(at_once, layers - layer);
    if (count > 1 && run_in_wave(run, count, kernel, [&](int k) {
          return make_plan(plan_in_wave, run[k], kernel, threads / count);
        }))
      continue;
    for (int k = 0; k < count; ++k, run += directions)
      run_directions<ForwardPass<T>>(
          run, directions, threads,
          [&](int most) { return make_plan(plan_forward, *run, kernel, most); }, kernel);
  }
}

}  // namespace

template <class T>
void forward(const Forward<T>* given, int layers, int directions, int threads) {
  if (given->sizes.batch == 0) return;
  const auto run = [&](const Kernels<T>& of_first, const Kernels<T>& of_upper) {
    run_layers(given, layers, directions, threads, of_first, of_upper);
  };
  const auto use_of = [&](int layer) {
    return use_forward(given[layer * directions].sizes, machine_of(kernels<T>()), given->in_bf16);
  };
  run_with_kernels<T>(given, layers * directions, run, spoiled<T>, use_of(0), use_of(layers - 1));
}

template void forward(const Forward<float>*, int, int, int);
template void forward(const Forward<double>*, int, int, int);

}  // namespace fastlstm

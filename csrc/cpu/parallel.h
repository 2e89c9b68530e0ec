// The only file that knows OpenMP: threads, barriers, fork, and the floating-point mode of a
// thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#include <pthread.h>
#include <sched.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastlstm {

// Treats denormals as zero while it lives. State that decays reaches them, and arithmetic on
// denormals is 10 to 100 times slower. The thread's own mode comes back at the end.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // FTZ | DAZ
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(saved_ | (uint64_t(1) << 24)));  // FZ
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
 public:
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

// Waits until `met()`. Spins briefly, then yields: threads that only spin collapse when another
// process wants the core.
template <class Met>
void wait_until(Met&& met) {
  constexpr int kSpins = 2000;  // some 20 to 100 us, longer than a step's imbalance
  for (int spins = 0; !met(); ++spins) {
    if (spins < kSpins) {
#if defined(__SSE2__)
      _mm_pause();
#elif defined(__aarch64__)
      __asm__ volatile("yield");
#endif
    } else {
      sched_yield();
    }
  }
}

// For `count` threads, again and again.
class Barrier {
 public:
  void wait(int count) {
    if (count == 1) return;
    const unsigned turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    wait_until([&] { return turn_.load(std::memory_order_acquire) != turn; });
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> turn_{0};
};

// How many steps each of some groups of threads has done.
class Progress {
 public:
  explicit Progress(int groups) : done_(size_t(groups)) {}
  void reached(int group, int64_t steps) {
    done_[size_t(group)].steps.store(steps, std::memory_order_release);
  }
  // Until all have done so many.
  void wait(int64_t steps) const {
    for (const Group& group : done_)
      wait_until([&] { return group.steps.load(std::memory_order_acquire) >= steps; });
  }

 private:
  struct alignas(64) Group {
    std::atomic<int64_t> steps{0};
  };
  std::vector<Group> done_;
};

// Chains of tasks that threads take as they come free, so that one on a slow core does less. A task
// begins when the one before it in its chain is done.
class Chains {
 public:
  using Clock = std::chrono::steady_clock;
  // Of a thread: the chain of its last task, or to begin with; when that task began, and how long
  // the one before took; and where the hindmost chain was when the thread last waited in vain.
  struct Place {
    size_t chain;
    Clock::time_point began{};
    Clock::duration took = std::chrono::milliseconds(1);
    int64_t stuck = -1;
  };

  explicit Chains(int count) : chains_(size_t(count)) {}
  // The next task of those before `past`, which begins now, in the chain `place->chain`: the one
  // the thread was in, unless that is far ahead of another. -1 where there is none for this thread.
  int64_t take(Place* place, int64_t past) {
    for (;;) {
      int64_t least = past;
      for (const Chain& chain : chains_) least = std::min(least, chain.taken.load(kRelaxed));
      if (least == past) return -1;
      const int64_t left = past - least;
      const int64_t most = least + (least == place->stuck ? left : left / kAhead);
      // That of before if its task can begin, else another that can, else the hindmost.
      size_t best = place->chain;
      int64_t task = past;
      bool ready = false;
      for (size_t k = 0; k < chains_.size(); ++k) {
        const size_t next = (place->chain + k) % chains_.size();
        const int64_t taken = chains_[next].taken.load(kRelaxed);
        const bool can = chains_[next].done.load(kRelaxed) == taken;
        if (taken == past || taken > most || can < ready || (can == ready && taken >= task))
          continue;
        best = next, task = taken, ready = can;
        if (k == 0 && ready) break;
      }
      // The last task of a chain stays with the thread that has the one before: its data is there.
      if (!ready && task == past - 1) return -1;
      Chain& chain = chains_[best];
      int64_t expected = task;
      if (task == past || !chain.taken.compare_exchange_strong(expected, task + 1)) continue;
      const auto met = [&] { return chain.done.load(std::memory_order_acquire) == task; };
      // The thread that has the task before it goes on in another chain, unless it has lost its
      // core: then this one does, if it has not tried that.
      bool gives_up = false;
      const auto patient = ready ? Clock::time_point{} : Clock::now() + kPatience * place->took;
      wait_until([&] {
        if (met()) return true;
        if (ready || place->stuck == least || Clock::now() <= patient) return false;
        expected = task + 1;
        return gives_up = chain.taken.compare_exchange_strong(expected, task);
      });
      if (gives_up) {
        place->stuck = least;
        continue;
      }
      place->chain = best;
      place->began = Clock::now();
      return task;
    }
  }
  void done(Place* place) {
    place->took = Clock::now() - place->began;
    chains_[place->chain].done.fetch_add(1, std::memory_order_release);
  }

 private:
  static constexpr auto kRelaxed = std::memory_order_relaxed;
  // A chain may be ahead of another by 1/kAhead of the tasks that this lacks.
  static constexpr int64_t kAhead = 8;
  static constexpr int kPatience = 4;  // a thread waits so many times as long as its last task took
  struct alignas(64) Chain {
    std::atomic<int64_t> taken{0}, done{0};
  };
  std::vector<Chain> chains_;
};

// Items that are each a thread's own, which others take from the end when they have done theirs.
class Shares {
 public:
  explicit Shares(int threads) : shares_(size_t(threads)) {}
  // Before thread `id` takes any: its own are from <= item < past.
  void open(int id, int64_t from, int64_t past) {
    shares_[size_t(id)].items = Items{int32_t(from), int32_t(past)};
  }
  // The next item of thread `id`, or -1 where none is left.
  int64_t take(int id) {
    std::atomic<Items>* share = &shares_[size_t(id)].items;
    for (;;) {
      Items items = share->load();
      const bool own = share == &shares_[size_t(id)].items;
      if (items.from < items.past) {
        const Items rest = {items.from + own, items.past - !own};
        if (share->compare_exchange_strong(items, rest)) return own ? items.from : rest.past;
        continue;
      }
      int32_t most = 0;
      for (Share& other : shares_) {
        const Items left = other.items;
        if (left.past - left.from > most) most = left.past - left.from, share = &other.items;
      }
      if (most == 0) return -1;
    }
  }

 private:
  struct alignas(8) Items {
    int32_t from, past;
  };
  struct alignas(64) Share {
    std::atomic<Items> items{Items{0, 0}};
  };
  std::vector<Share> shares_;
};

// libgomp's threads do not survive fork() and starting new ones in the child hangs, so a forked
// child works on one thread. Results do not change: their bits never depend on the threads.
inline std::atomic<bool> forked{false};
inline void watch_fork() {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

// The threads that a call with no number of its own uses: OMP_NUM_THREADS, omp_set_num_threads.
inline int default_threads() {
#ifdef _OPENMP
  return forked ? 1 : std::max(1, omp_get_max_threads());  // what is too large comes out negative
#else
  return 1;
#endif
}

inline std::string openmp_runtime() {
#ifdef _OPENMP
  return "OpenMP " + std::to_string(_OPENMP);
#else
  return "none (one thread)";
#endif
}

// body(id) for 0 <= id < count at the same time. False, with nothing run, where OpenMP gives fewer
// threads than asked for (nested regions, a thread limit, a forked child): plan again for one.
template <class Body>
bool parallel(int count, Body&& body) {
  if (count == 1) {
    FlushDenormals flush;
    body(0);
    return true;
  }
#ifdef _OPENMP
  if (forked) return false;
  bool all = true;
#pragma omp parallel num_threads(count)
  {
    if (omp_get_num_threads() == count) {
      FlushDenormals flush;
      body(omp_get_thread_num());
    } else if (omp_get_thread_num() == 0) {
      all = false;
    }
  }
  return all;
#else
  return false;
#endif
}

}  // namespace fastlstm

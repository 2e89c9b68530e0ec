// Python's lock. Included only by the bindings.
#pragma once

#include <Python.h>
#include <unistd.h>

#include <cstddef>  // __GLIBCXX__
#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

namespace fastlstm {

// Other Python threads run while it lives: pybind11's guard, but for daemon threads. Where Python
// is ending, one that asks for the lock has its stack unwound, which ends the process where it
// meets a destructor. It stops here instead, as it does in Python from 3.14 on.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() {
#ifdef __GLIBCXX__
    try {
      PyEval_RestoreThread(state_);
    } catch (abi::__forced_unwind&) {
      for (;;) pause();
    }
#else
    PyEval_RestoreThread(state_);
#endif
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  PyThreadState* const state_;
};

}  // namespace fastlstm

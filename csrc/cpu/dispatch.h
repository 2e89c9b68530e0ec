// Which ISA's kernels run. Chosen once, when the module is loaded; outside every loop.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "kernels.h"

namespace fastlstm {

std::vector<std::string> compiled_isas();   // from the plainest to the widest
std::vector<std::string> supported_isas();  // those of them that this CPU and its OS run

// Switches to `name`. Throws std::invalid_argument for a name that is not in supported_isas().
void use_isa(const std::string& name);
// The widest supported one, or what the environment variable FASTLSTM_ISA asks for.
void use_default_isa();
std::string active_isa();

// The kernels for that use, or those for any where the active ISA has none of their own.
template <class T>
const Kernels<T>& kernels(Use use = Use::any);

// For tests: how often a NaN among the results had passes run again with those for any use; see
// run_with_kernels() in passes.h.
inline std::atomic<int64_t> passes_run_again{0};

}  // namespace fastlstm

#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef FASTLSTM_X86
#include <cpuid.h>
#endif

namespace fastlstm {
namespace {

struct Isa {
  const char* name;
  const Kernels<float>* f32;
  const Kernels<double>* f64;
  bool (*supported)();
};

#ifdef FASTLSTM_X86
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};
Registers cpuid(unsigned leaf) {
  Registers r;
  __get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d);
  return r;
}

// The register state the operating system saves on a context switch (XCR0). Without it the CPU may
// know an instruction that nevertheless faults.
bool os_saves(uint64_t state) {
  if (!(cpuid(1).c & bit_OSXSAVE)) return false;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return ((uint64_t(high) << 32 | low) & state) == state;
}
constexpr uint64_t kYmm = 0x06;  // SSE and AVX state
constexpr uint64_t kZmm = 0xe6;  // and opmask, ZMM_Hi256, Hi16_ZMM

bool has_avx2() { return (cpuid(1).c & bit_FMA) && (cpuid(7).b & bit_AVX2) && os_saves(kYmm); }
bool has_avx512() { return has_avx2() && (cpuid(7).b & bit_AVX512F) && os_saves(kZmm); }
#endif

const Isa kIsas[] = {
    {"generic", &generic::kernels_f32, &generic::kernels_f64, [] { return true; }},
#ifdef FASTLSTM_X86
    {"avx2", &avx2::kernels_f32, &avx2::kernels_f64, has_avx2},
    {"avx512", &avx512::kernels_f32, &avx512::kernels_f64, has_avx512},
#endif
};

std::atomic<const Isa*> active{&kIsas[0]};

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) names.push_back(isa.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.supported()) names.push_back(isa.name);
  return names;
}

void use_isa(const std::string& name) {
  for (const Isa& isa : kIsas)
    if (name == isa.name && isa.supported()) {
      active = &isa;
      return;
    }
  throw std::invalid_argument("expected one of " + join(supported_isas()) +
                              " (what this machine runs of the compiled " + join(compiled_isas()) +
                              "), got '" + name + "'");
}

void use_default_isa() {
  if (const char* asked = std::getenv("FASTLSTM_ISA"); asked && *asked) {
    try {
      use_isa(asked);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("FASTLSTM_ISA: ") + error.what());
    }
  } else {
    use_isa(supported_isas().back());
  }
}

std::string active_isa() { return active.load()->name; }

template <>
const Kernels<float>& kernels<float>() {
  return *active.load(std::memory_order_relaxed)->f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return *active.load(std::memory_order_relaxed)->f64;
}

}  // namespace fastlstm

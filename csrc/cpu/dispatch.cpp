#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef FASTLSTM_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlstm {
namespace {

struct Isa {
  const char* name;
  const Kernels<float>* f32;
  const Kernels<double>* f64;
  bool (*supported)();
  // Where it has any of its own.
  const Kernels<float>* bf16 = nullptr;
  const Kernels<float>* floats_on_tiles = nullptr;
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

bool has_avx2() {
  const unsigned needed = bit_FMA | bit_F16C;
  return (cpuid(1).c & needed) == needed && (cpuid(7).b & bit_AVX2) && os_saves(kYmm);
}
bool has_avx512() { return has_avx2() && (cpuid(7).b & bit_AVX512F) && os_saves(kZmm); }

#if defined(FASTLSTM_EMULATE_TILES)
bool has_dots() { return has_avx512(); }
bool has_tiles() { return has_avx512(); }
bool tiles_granted() { return true; }
#elif defined(FASTLSTM_TILES)
constexpr unsigned kDotsBit = 1 << 5;
bool has_dots() {
  // Once: in a virtual machine CPUID takes long. Leaf 7 says whether it has a second part.
  static const bool has = [] {
    Registers r;
    return has_avx512() && cpuid(7).a >= 1 && __get_cpuid_count(7, 1, &r.a, &r.b, &r.c, &r.d) &&
           (r.a & kDotsBit);
  }();
  return has;
}
constexpr uint64_t kTiles = 0x60000;  // XTILECFG and XTILEDATA
constexpr unsigned kBf16Bit = 1 << 22, kTileBit = 1 << 24;
bool has_tiles() {
  return has_avx512() && (cpuid(7).d & kBf16Bit) && (cpuid(7).d & kTileBit) && os_saves(kTiles);
}
// Linux gives tiles to a process that asks, from then on with larger frames for signals.
bool tiles_granted() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}
#endif
#endif

const Isa kIsas[] = {
    {"generic", &generic::kernels_f32, &generic::kernels_f64, [] { return true; }},
#ifdef FASTLSTM_X86
    {"avx2", &avx2::kernels_f32, &avx2::kernels_f64, has_avx2},
    {"avx512", &avx512::kernels_f32, &avx512::kernels_f64, has_avx512},
#ifdef FASTLSTM_TILES
    {"avx512_bf16", &avx512::kernels_f32, &avx512::kernels_f64, has_dots,
     &avx512::kernels_bf16_dots},
    {"amx", &avx512::kernels_f32, &avx512::kernels_f64, has_tiles, &avx512::kernels_bf16,
     &avx512::kernels_f32_tiles},
#endif
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
const Kernels<float>& kernels<float>(Use use) {
  const Isa& isa = *active.load(std::memory_order_relaxed);
#ifdef FASTLSTM_TILES
  const Kernels<float>* own = use == Use::bf16              ? isa.bf16
                              : use == Use::floats_on_tiles ? isa.floats_on_tiles
                                                            : nullptr;
  if (own && (own == &avx512::kernels_bf16_dots || tiles_granted())) return *own;
  if (own && use == Use::bf16 && has_dots()) return avx512::kernels_bf16_dots;
#else
  (void)use;
#endif
  return *isa.f32;
}
template <>
const Kernels<double>& kernels<double>(Use) {
  return *active.load(std::memory_order_relaxed)->f64;
}

}  // namespace fastlstm

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

#define FASTLSTM_ISA generic
#include "kernels.inl"

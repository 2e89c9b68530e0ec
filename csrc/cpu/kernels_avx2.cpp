#include <immintrin.h>

#include "kernels.h"

#define FASTLSTM_ISA avx2
#include "kernels.inl"

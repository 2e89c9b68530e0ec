#include <immintrin.h>

#include "kernels.h"

#define FASTLSTM_ISA avx512
#include "kernels.inl"

#ifdef FASTLSTM_TILES
#include "tiles.inl"
#endif

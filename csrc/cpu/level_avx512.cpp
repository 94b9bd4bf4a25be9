#define TRAK_EXT_LEVEL_TABLE kAvx512Kernels
#define TRAK_EXT_LEVEL_NAME "avx512"
#include "level_table.h"

#define TRAK_EXT_LEVEL_TABLE kAvx2Kernels
#define TRAK_EXT_LEVEL_NAME "avx2"
#include "level_table.h"

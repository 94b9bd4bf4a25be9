#define TRAK_EXT_LEVEL_TABLE kBaselineKernels
#define TRAK_EXT_LEVEL_NAME "baseline"
#include "level_table.h"

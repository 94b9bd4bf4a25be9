// The body of a level's translation unit; TRAK_EXT_LEVEL_TABLE and TRAK_EXT_LEVEL_NAME are set.
// Only raw pointers and internal linkage below: a standard template instantiated here could be the
// copy that the linker keeps for code that runs on older machines.
#include "kernel_table.h"
#include "projection_kernel.h"
#include "scoring_kernel.h"

namespace trak_ext {

extern const KernelTable TRAK_EXT_LEVEL_TABLE = {
    TRAK_EXT_LEVEL_NAME,
    kTileColumns,
    kTileRowsMax,
    kTileColumnsMax,
    sizeof(ProjectionWorkspace),
    project_tile,
    fill_matrix_columns,
    {kMicroColumns<float>, pack_targets<float>, score_block<float>},
    {kMicroColumns<double>, pack_targets<double>, score_block<double>},
};

}  // namespace trak_ext

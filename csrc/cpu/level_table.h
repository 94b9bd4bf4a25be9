// The body of a level's translation unit; TRAK_EXT_LEVEL_TABLE and TRAK_EXT_LEVEL_NAME are set.
// Only raw pointers and internal linkage below: a standard template instantiated here could be the
// copy that the linker keeps for code that runs on older machines.
#include "kernel_table.h"
#include "projection_kernel.h"
#include "scoring_kernel.h"
#include "sjlt_kernel.h"

#if defined(__AVX512F__)
#include "lookup_avx512.h"
#elif defined(__AVX2__)
#include "lookup_avx2.h"
#endif

namespace trak_ext::cpu {

extern const KernelTable TRAK_EXT_LEVEL_TABLE = {
    TRAK_EXT_LEVEL_NAME,
#if defined(__AVX512F__)
    lookup_kernels<LookupAvx512>(),
#elif defined(__AVX2__)
    lookup_kernels<LookupAvx2>(),
#else
    product_kernels(),
#endif
    product_kernels(),
    kTileColumns,
    sizeof(EntryTile),
    fill_matrix_columns,
    sizeof(SjltScratch),
    sum_sjlt_node,
    {kMicroColumns<float>, pack_targets<float>, score_block<float>},
    {kMicroColumns<double>, pack_targets<double>, score_block<double>},
};

}  // namespace trak_ext::cpu

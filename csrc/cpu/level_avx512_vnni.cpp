#include "lookup_medium_avx512.h"

namespace trak_ext::cpu {

extern const ProjectionKernels kVnniMediumKernels = lookup_kernels<LookupMedium>();

}  // namespace trak_ext::cpu

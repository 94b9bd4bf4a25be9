#include "scorers.h"

namespace trak_ext::cuda {

Scorer<float> bfloat16_warpgroup_scorer(int parts, int64_t targets) {
  return warpgroup_tile_scorer<DType::kBFloat16>(parts, targets);
}

}  // namespace trak_ext::cuda

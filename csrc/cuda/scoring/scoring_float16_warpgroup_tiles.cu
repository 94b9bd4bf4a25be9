#include "scorers.h"

namespace trak_ext::cuda {

Scorer<float> float16_warpgroup_scorer(int parts, int64_t targets) {
  return warpgroup_tile_scorer<DType::kFloat16>(parts, targets);
}

}  // namespace trak_ext::cuda

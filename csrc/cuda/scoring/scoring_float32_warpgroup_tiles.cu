#include "scorers.h"

namespace trak_ext::cuda {

Scorer<float> float32_warpgroup_scorer(int parts, int64_t targets) {
  return warpgroup_tile_scorer<DType::kFloat32>(parts, targets);
}

}  // namespace trak_ext::cuda

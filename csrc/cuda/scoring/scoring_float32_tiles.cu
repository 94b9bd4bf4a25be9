#include "scorers.h"

namespace trak_ext::cuda {

Scorer<float> float32_scorer(int parts, int64_t targets) {
  return tile_scorer<DType::kFloat32>(parts, targets);
}

}  // namespace trak_ext::cuda

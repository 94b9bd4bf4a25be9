#include "scorers.h"

namespace trak_ext::cuda {

Scorer<float> bfloat16_scorer(int parts, int64_t targets) {
  return tile_scorer<DType::kBFloat16>(parts, targets);
}

}  // namespace trak_ext::cuda

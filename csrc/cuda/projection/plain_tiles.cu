#include "multipliers.h"

namespace trak_ext::cuda {

Multiplier plain_multiplier(Kind kind) {
  return {kPlainRows,
          kPlainThreads,
          kPlainThreads,
          kPlainRows * kStageParams * static_cast<int>(sizeof(float)),
          1,
          0,
          kind == Kind::kRademacher ? plain_kernel<Kind::kRademacher> : plain_kernel<Kind::kNormal>,
          nullptr,
          0};
}

}  // namespace trak_ext::cuda

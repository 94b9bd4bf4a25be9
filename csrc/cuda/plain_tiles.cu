#include "multipliers.h"

namespace trak_ext {

Multiplier plain_multiplier(Kind kind) {
  return {
      kPlainRows, kPlainThreads, kPlainThreads,
      kPlainRows * kStageParams * static_cast<int>(sizeof(float)),
      kind == Kind::kRademacher ? plain_kernel<Kind::kRademacher> : plain_kernel<Kind::kNormal>};
}

}  // namespace trak_ext

#include "multipliers.h"

namespace trak_ext::cuda {

Multiplier normal_multiplier(int passes, int64_t rows, int64_t shared_limit) {
  switch (passes) {
    case 1:
      return normal_tile<1>(rows, shared_limit);
    case 2:
      return normal_tile<2>(rows, shared_limit);
    default:
      return normal_tile<3>(rows, shared_limit);
  }
}

}  // namespace trak_ext::cuda

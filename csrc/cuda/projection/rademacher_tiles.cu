#include "multipliers.h"

namespace trak_ext::cuda {

Multiplier rademacher_multiplier(int passes, int64_t rows) {
  switch (passes) {
    case 1:
      return rademacher_tile<1>(rows);
    case 2:
      return rademacher_tile<2>(rows);
    default:
      return rademacher_tile<3>(rows);
  }
}

}  // namespace trak_ext::cuda

#include "multipliers.h"

namespace trak_ext::cuda {

Multiplier rademacher_warpgroup_multiplier(int passes, int64_t rows) {
  switch (passes) {
    case 1:
      return rademacher_warpgroup_tile<1>(rows);
    case 2:
      return rademacher_warpgroup_tile<2>(rows);
    default:
      return rademacher_warpgroup_tile<3>(rows);
  }
}

}  // namespace trak_ext::cuda

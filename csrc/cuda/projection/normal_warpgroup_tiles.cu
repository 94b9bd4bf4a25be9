#include "multipliers.h"

namespace trak_ext::cuda {

Multiplier normal_warpgroup_multiplier(int passes, int64_t rows) {
  switch (passes) {
    case 1:
      return normal_warpgroup_tile<1>(rows);
    case 2:
      return normal_warpgroup_tile<2>(rows);
    default:
      return normal_warpgroup_tile<3>(rows);
  }
}

}  // namespace trak_ext::cuda

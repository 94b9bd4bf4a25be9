#include "multipliers.h"

namespace trak_ext {

Multiplier normal_multiplier(int passes, int64_t rows) {
  switch (passes) {
    case 1:
      return normal_tile<1>(rows);
    case 2:
      return normal_tile<2>(rows);
    default:
      return normal_tile<3>(rows);
  }
}

}  // namespace trak_ext

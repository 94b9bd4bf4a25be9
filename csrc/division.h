// Division of sizes, for the host and every device.
#pragma once

#include <cstdint>

#include "law/platform.h"

namespace trak_ext {

// a / b rounded up, for a >= 0 and b > 0, without a + b that might not fit.
TRAK_EXT_LAW constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// The next multiple of b.
TRAK_EXT_LAW constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace trak_ext

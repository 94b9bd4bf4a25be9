#pragma once
#include "philox.h"
namespace trak_ext { constexpr int kNormalBlockLog2 = 2; }

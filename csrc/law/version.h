// The version of the law of the matrix (law.md). Another number is another matrix.
#pragma once

namespace trak_ext {

constexpr int kLawVersion = 1;

}  // namespace trak_ext

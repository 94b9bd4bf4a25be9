#pragma once
#include "simd.h"
namespace trak_ext { namespace { TRAK_EXT_INLINE VecF normal_from_word(VecU w){ return (VecF)((w&0x3fffffffu)); } } }

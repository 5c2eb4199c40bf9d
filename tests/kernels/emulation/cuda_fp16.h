// In place of CUDA's header on the include path.
#pragma once
#include "../host/types.h"

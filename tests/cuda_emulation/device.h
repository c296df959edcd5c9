#pragma once

// What kernels see of CUDA when a C++ compiler compiles them: types and conversions are those of NVIDIA's own headers.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include "tests/cuda_emulation/atomics.h"
#include "tests/cuda_emulation/device_math.h"
#include "tests/cuda_emulation/threads.h"
#include "tests/cuda_emulation/warp.h"

#undef __launch_bounds__
#define __launch_bounds__(...)

#pragma once

#include <driver_types.h>
#include <vector_types.h>

#include <cstddef>

namespace elattn::cuda::emulation {

/// Calls kernel(arguments) once for every thread of the grid and returns when all are done: cudaSuccess,
/// cudaErrorInvalidConfiguration or cudaErrorInvalidValue where a GPU could not launch it, or cudaErrorLaunchFailure
/// with findings().
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(const void* arguments),
                   const void* arguments, size_t argument_bytes);

template <class F>
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, const F& call) {
  return launch(
      grid, block, shared_bytes, [](const void* f) { (*static_cast<const F*>(f))(); }, &call, sizeof(F));
}

}  // namespace elattn::cuda::emulation

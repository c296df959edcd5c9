# elattn::torch, the C++ libraries of PyTorch, used by the build of elattn and by its installed package alike.
# find_package(Torch) is not used: where PyTorch was built with CUDA it stops without the CUDA toolkit, which nothing
# here needs.
include_guard(GLOBAL)

# Looks for PyTorch and caches its folder as ELATTN_TORCH_DIR: the variable itself (CMake or environment), Torch_DIR,
# CMAKE_PREFIX_PATH (either torch.utils.cmake_prefix_path or the root of LibTorch), then the folders in the arguments.
function(elattn_find_torch)
  set(hints $ENV{ELATTN_TORCH_DIR})
  if(Torch_DIR)
    list(APPEND hints ${Torch_DIR}/../../..)
  endif()
  cmake_path(CONVERT "$ENV{CMAKE_PREFIX_PATH}" TO_CMAKE_PATH_LIST env_prefixes)
  foreach(prefix IN LISTS CMAKE_PREFIX_PATH env_prefixes)
    list(APPEND hints ${prefix} ${prefix}/../..)
  endforeach()
  find_path(ELATTN_TORCH_DIR include/ATen/ATen.h HINTS ${hints} ${ARGN} NO_DEFAULT_PATH
            DOC "The folder of PyTorch that holds include/ and lib/")
endfunction()

# Defines elattn::torch from ELATTN_TORCH_DIR and sets ELATTN_TORCH_VERSION and ELATTN_TORCH_OPENMP. `problem` gets a
# sentence if that is impossible, else nothing.
function(elattn_add_torch problem)
  set(${problem} "" PARENT_SCOPE)
  set(include_dir ${ELATTN_TORCH_DIR}/include)
  if(NOT ELATTN_TORCH_DIR OR NOT EXISTS ${include_dir}/ATen/ATen.h)
    set(${problem} "elattn needs PyTorch 2.11 or newer and found none (ELATTN_TORCH_DIR is '${ELATTN_TORCH_DIR}'). Set \
CMAKE_PREFIX_PATH to the output of: python -c 'import torch; print(torch.utils.cmake_prefix_path)'" PARENT_SCOPE)
    return()
  endif()

  set(version 0)
  if(EXISTS ${include_dir}/torch/headeronly/version.h)
    file(STRINGS ${include_dir}/torch/headeronly/version.h numbers REGEX "TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
    list(TRANSFORM numbers REPLACE "[^0-9]" "")
    list(JOIN numbers "." version)
  endif()
  if(version VERSION_LESS 2.11)
    set(${problem} "elattn needs PyTorch 2.11 or newer; the one in ${ELATTN_TORCH_DIR} is older" PARENT_SCOPE)
    return()
  endif()
  set(ELATTN_TORCH_VERSION ${version} PARENT_SCOPE)

  file(GLOB openmp ${ELATTN_TORCH_DIR}/lib/libgomp*.so*)
  if(NOT openmp)
    set(openmp gomp)
  endif()
  set(ELATTN_TORCH_OPENMP ${openmp} PARENT_SCOPE)

  if(NOT TARGET elattn::torch)
    set(libraries "")
    foreach(name torch torch_cpu c10)
      add_library(elattn::${name}_library SHARED IMPORTED)
      set_target_properties(elattn::${name}_library PROPERTIES
        IMPORTED_LOCATION ${ELATTN_TORCH_DIR}/lib/lib${name}.so IMPORTED_SONAME lib${name}.so)
      list(APPEND libraries elattn::${name}_library)
    endforeach()
    add_library(elattn::torch INTERFACE IMPORTED)
    set_target_properties(elattn::torch PROPERTIES
      INTERFACE_INCLUDE_DIRECTORIES "${include_dir};${include_dir}/torch/csrc/api/include"
      INTERFACE_COMPILE_FEATURES cxx_std_20
      INTERFACE_LINK_LIBRARIES "${libraries}")
  endif()
endfunction()

# Catch2, and its main function for every binary of tests. Included, not a subdirectory: what it finds belongs to the
# folder that looks for it.
find_package(Catch2 3 QUIET)
if(NOT Catch2_FOUND)
  find_package(Catch2 2.13 QUIET)
endif()
if(NOT Catch2_FOUND)
  message(STATUS "Catch2 is not installed: fetching it")
  include(FetchContent)
  FetchContent_Declare(Catch2 GIT_REPOSITORY https://github.com/catchorg/Catch2.git GIT_TAG v3.7.1 GIT_SHALLOW ON)
  FetchContent_MakeAvailable(Catch2)
  list(APPEND CMAKE_MODULE_PATH ${catch2_SOURCE_DIR}/extras)
endif()
include(Catch)

# Of Catch2 2.13 it is all that is not a template, a minute at -O3. Tests spend their time elsewhere.
add_library(elattn_catch_main OBJECT tests/catch2/main.cpp)
target_compile_features(elattn_catch_main PRIVATE cxx_std_20)
target_compile_options(elattn_catch_main PRIVATE -O1)
target_include_directories(elattn_catch_main PUBLIC ${PROJECT_SOURCE_DIR})
target_link_libraries(elattn_catch_main PUBLIC Catch2::Catch2)

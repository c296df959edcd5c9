#define CATCH_CONFIG_RUNNER
#include "tests/cuda_emulation/catch.h"

int main(int argc, char** argv) { return Catch::Session().run(argc, argv); }

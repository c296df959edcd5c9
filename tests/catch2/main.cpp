#define CATCH_CONFIG_RUNNER
#include "tests/catch2/catch.h"

int main(int argc, char** argv) { return Catch::Session().run(argc, argv); }

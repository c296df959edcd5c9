// PNG for picture.cpp, from picture_png.cpp where there is libpng, else from picture_no_png.cpp; and what both readers
// check.
#pragma once

#include <ATen/ATen.h>

#include <cstdio>
#include <stdexcept>
#include <string>

/// Throws std::invalid_argument, as `read_picture`, without the name of the file.
at::Tensor read_png(std::FILE* file);

/// Whether the file was written.
bool write_png(std::FILE* file, const at::Tensor& pixels);

/// Before memory is taken for the pixels that a header promises. The limit is that of `elattn.detect.read_image`.
inline void check_size(int64_t width, int64_t height) {
  if (width * height > 80'000'000) {
    throw std::invalid_argument(std::to_string(width) + " x " + std::to_string(height) +
                                " pixels are more than 80 million");
  }
  if (width * height == 0) throw std::invalid_argument("it has no pixels");
}

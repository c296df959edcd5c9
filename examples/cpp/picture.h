// Picture files as tensors: uint8 RGB, (height, width, 3).
#pragma once

#include <ATen/ATen.h>

#include <string>

/// The pixels as they lie in the file: transparency and a camera's note of orientation are ignored, of 16 bits the
/// upper 8 are taken. Throws std::invalid_argument, in one line that names the file, if it is missing, broken, too
/// large or of an unknown kind.
at::Tensor read_picture(const std::string& path);

/// The kinds of files that this build reads, in words.
extern const char* const kPictureKinds;

/// Writes contiguous pixels in the format that the end of `path` names.
void write_picture(const std::string& path, const at::Tensor& pixels);

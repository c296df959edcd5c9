// Pictures without OpenCV: binary PPM, and PNG where there is libpng.
#include "picture.h"

#include <cctype>
#include <filesystem>

#include "picture_png.h"

namespace {

/// A number of the header and the one character after it; before it may be white space and comments.
int64_t header_number(std::FILE* file) {
  int next = std::fgetc(file);
  while (std::isspace(next) || next == '#') {
    if (next == '#') {
      while (next != '\n' && next != EOF) next = std::fgetc(file);
    }
    next = std::fgetc(file);
  }
  int64_t value = 0, digits = 0;
  for (; std::isdigit(next); next = std::fgetc(file)) {
    if (++digits > 9) throw std::invalid_argument("a number of its header has more than nine digits");
    value = 10 * value + (next - '0');
  }
  if (digits == 0 || !std::isspace(next)) throw std::invalid_argument("its header is not that of a PPM file");
  return value;
}

at::Tensor read_ppm(std::FILE* file) {
  std::fseek(file, 2, SEEK_SET);  // after P6
  const int64_t width = header_number(file), height = header_number(file), largest = header_number(file);
  check_size(width, height);
  if (largest != 255) {
    throw std::invalid_argument("its samples must go to 255, one byte each (they go to " + std::to_string(largest) +
                                ")");
  }
  at::Tensor pixels = at::empty({height, width, 3}, at::kByte);
  const auto bytes = static_cast<size_t>(pixels.numel());
  if (std::fread(pixels.data_ptr(), 1, bytes, file) != bytes) throw std::invalid_argument("it ends too early");
  return pixels;
}

bool write_ppm(std::FILE* file, const at::Tensor& pixels) {
  const auto bytes = static_cast<size_t>(pixels.numel());
  const auto width = static_cast<long long>(pixels.size(1)), height = static_cast<long long>(pixels.size(0));
  return std::fprintf(file, "P6\n%lld %lld\n255\n", width, height) > 0 &&
         std::fwrite(pixels.data_ptr(), 1, bytes, file) == bytes;
}

using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

}  // namespace

at::Tensor read_picture(const std::string& path) try {
  if (!std::filesystem::is_regular_file(path)) throw std::invalid_argument("there is no such file");
  const File file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) throw std::invalid_argument("it cannot be opened");
  char start[8] = {};
  const std::string magic(start, std::fread(start, 1, sizeof start, file.get()));
  std::rewind(file.get());
  if (magic.starts_with("P6")) return read_ppm(file.get());
  if (magic == "\x89PNG\r\n\x1a\n") return read_png(file.get());
  throw std::invalid_argument(std::string("it is not ") + kPictureKinds);
} catch (const std::invalid_argument& error) {
  throw std::invalid_argument(path + ": " + error.what());
}

void write_picture(const std::string& path, const at::Tensor& pixels) try {
  if (!path.ends_with(".ppm") && !path.ends_with(".png")) {
    throw std::invalid_argument("a picture to write must end in .png or .ppm");
  }
  File file(std::fopen(path.c_str(), "wb"), std::fclose);
  if (!file) throw std::invalid_argument("it cannot be written");
  const bool written = path.ends_with(".ppm") ? write_ppm(file.get(), pixels) : write_png(file.get(), pixels);
  if (!written || std::fclose(file.release()) != 0) throw std::invalid_argument("it could not be written to its end");
} catch (const std::invalid_argument& error) {
  throw std::invalid_argument(path + ": " + error.what());
}

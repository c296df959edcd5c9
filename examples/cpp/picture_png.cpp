#include "picture_png.h"

#include <png.h>

#include <csetjmp>

#include "picture.h"

namespace {

/// libpng leaves by a jump, over which no destructor runs: what has one lives in the caller of `read_rows`.
[[noreturn]] void on_error(png_structp png, png_const_charp message) {
  *static_cast<std::string*>(png_get_error_ptr(png)) = message;
  png_longjmp(png, 1);
}

void on_warning(png_structp, png_const_charp) {}

struct Reader {
  std::string problem;
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &problem, on_error, on_warning);
  png_infop info = png_create_info_struct(png);

  Reader() = default;
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader() { png_destroy_read_struct(&png, &info, nullptr); }
};

/// False with `reader.problem` if the file is broken.
bool read_rows(Reader& reader, std::FILE* file, at::Tensor& pixels) {
  png_structp png = reader.png;
  if (setjmp(png_jmpbuf(png))) return false;
  png_init_io(png, file);
  png_read_info(png, reader.info);
  const int64_t width = png_get_image_width(png, reader.info), height = png_get_image_height(png, reader.info);
  check_size(width, height);
  png_set_expand(png);  // palettes, and fewer than 8 bits
  png_set_strip_16(png);
  png_set_gray_to_rgb(png);
  png_set_strip_alpha(png);
  const int passes = png_set_interlace_handling(png);
  png_read_update_info(png, reader.info);
  pixels = at::empty({height, width, 3}, at::kByte);
  auto* const rows = pixels.data_ptr<uint8_t>();
  for (int pass = 0; pass < passes; ++pass) {
    for (int64_t y = 0; y < height; ++y) png_read_row(png, rows + y * width * 3, nullptr);
  }
  return true;
}

}  // namespace

const char* const kPictureKinds = "PNG or binary PPM";

at::Tensor read_png(std::FILE* file) {
  Reader reader;
  at::Tensor pixels;
  if (!read_rows(reader, file, pixels)) throw std::invalid_argument("it is a broken PNG file: " + reader.problem);
  return pixels;
}

bool write_png(std::FILE* file, const at::Tensor& pixels) {
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = static_cast<png_uint_32>(pixels.size(1));
  image.height = static_cast<png_uint_32>(pixels.size(0));
  image.format = PNG_FORMAT_RGB;
  return png_image_write_to_stdio(&image, file, 0, pixels.data_ptr(), 0, nullptr) != 0;
}

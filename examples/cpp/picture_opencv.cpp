// Pictures of any kind, through OpenCV.
#include <filesystem>
#include <opencv2/imgcodecs.hpp>
#include <stdexcept>

#include "picture.h"

const char* const kPictureKinds = "any kind that OpenCV reads";

at::Tensor read_picture(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) throw std::invalid_argument(path + ": there is no such file");
  cv::Mat bgr;
  try {
    bgr = cv::imread(path, cv::IMREAD_COLOR | cv::IMREAD_IGNORE_ORIENTATION);
  } catch (const cv::Exception& error) {
    throw std::invalid_argument(path + ": " + error.err);
  }
  if (bgr.empty()) throw std::invalid_argument(path + ": it is broken, or of a kind that OpenCV does not read");
  const auto row = static_cast<int64_t>(bgr.step[0]);
  return at::from_blob(bgr.data, {bgr.rows, bgr.cols, 3}, {row, 3, 1}, at::kByte).flip(2).contiguous();
}

void write_picture(const std::string& path, const at::Tensor& pixels) {
  const at::Tensor bgr = pixels.flip(2);
  const cv::Mat view(static_cast<int>(bgr.size(0)), static_cast<int>(bgr.size(1)), CV_8UC3, bgr.data_ptr());
  bool written = false;
  try {
    written = cv::imwrite(path, view);
  } catch (const cv::Exception&) {  // no format of that name
  }
  if (!written) throw std::invalid_argument(path + ": it cannot be written, or OpenCV has no such format");
}

// Finds objects in a picture with an exported detector, without Python. The model is a TorchScript file with the
// methods
//   forward(images (B, 3, S, S), float32 in 0..1) -> raw predictions
//   select(raw, confidence: float, iou: float, limit: int) -> for each picture boxes (n, 4), scores (n,), labels (n,).
#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <iomanip>

#include "picture.h"
#include "program.h"

namespace {

std::string usage() {
  return R"(usage: detect MODEL PICTURE [OUTPUT] [options]
  MODEL           a file that `elattn detect export` wrote
  PICTURE         )" +
         std::string(kPictureKinds) + R"(
  OUTPUT          the picture with frames around what was found, .png or .ppm
  --confidence P  the smallest score; the default is 0.25
  --iou P         a box that overlaps a better one of its class by more is left out; the default is 0.5
  --threads N     by default one per core
  --repeat N      do it N times and print median times
A line of the output is class, score, left, top, right and bottom in pixels of the picture, with tabs between.
)";
}

constexpr int64_t kMostBoxes = 100;  // the default of `YoloLat.detect`

struct Request {
  std::string model, picture, output;
  double confidence = 0.25, iou = 0.5;
  int64_t threads = 0, repeat = 1;
};

Request parse(int argc, char** argv) {
  Request request;
  const auto words = read_words(argc, argv, [&](const std::string& name, const auto& value) {
    if (name == "--confidence") {
      request.confidence = number<double>(name, value(), 0);
    } else if (name == "--iou") {
      request.iou = number<double>(name, value(), 0);
    } else if (name == "--threads") {
      request.threads = number<int64_t>(name, value(), 1);
    } else if (name == "--repeat") {
      request.repeat = number<int64_t>(name, value(), 1);
    } else {
      return false;
    }
    return true;
  });
  if (words.size() != 2 && words.size() != 3) {
    throw Mistake("needs MODEL, PICTURE and perhaps OUTPUT (got " + std::to_string(words.size()) + " words)");
  }
  request.model = words[0];
  request.picture = words[1];
  if (words.size() == 3) request.output = words[2];
  return request;
}

/// The names in a JSON list of strings. Of escapes it knows quotation marks and backslashes, all that a name needs.
std::vector<std::string> names(const std::string& json) {
  std::vector<std::string> list;
  std::istringstream text(json);
  char mark = 0;
  text >> mark;
  for (std::string name; mark != ']' && text >> std::quoted(name) >> mark;) list.push_back(name);
  return list;
}

/// Where a picture lies in the square that the model sees: in the middle, as large as fits with its aspect kept. To the
/// bit as `elattn.detect.Letterbox`.
struct Letterbox {
  int64_t width, height, left, top;

  Letterbox(const at::Tensor& pixels, int64_t size) : picture_width_(pixels.size(1)), picture_height_(pixels.size(0)) {
    const int64_t longest = std::max(picture_width_, picture_height_);
    const auto fitted = [&](int64_t side) {
      // Halves go to the even number, as in Python.
      const double exact = static_cast<double>(side * size) / static_cast<double>(longest);
      return std::max<int64_t>(1, static_cast<int64_t>(std::nearbyint(exact)));
    };
    width = fitted(picture_width_);
    height = fitted(picture_height_);
    left = (size - width) / 2;
    top = (size - height) / 2;
  }

  /// Boxes (n, 4) in pixels of the input as pixels of the picture.
  at::Tensor to_picture(const at::Tensor& boxes) const {
    const double x = static_cast<double>(width) / static_cast<double>(picture_width_);
    const double y = static_cast<double>(height) / static_cast<double>(picture_height_);
    return (boxes - torch::tensor({left, top, left, top}, at::kFloat)) / torch::tensor({x, y, x, y}, at::kFloat);
  }

 private:
  int64_t picture_width_, picture_height_;
};

/// The input (1, 3, size, size) of the model, pixels (H, W, 3) in it, grey around them.
at::Tensor input(const at::Tensor& pixels, const Letterbox& box, int64_t size) {
  const at::Tensor channels_first = pixels.permute({2, 0, 1}).unsqueeze(0);
  // The operator of torch.nn.functional.interpolate(mode="bilinear", antialias=True), in integers.
  const at::Tensor fitted =
      at::_upsample_bilinear2d_aa(channels_first, {box.height, box.width}, /*align_corners=*/false);
  at::Tensor square = at::full({1, 3, size, size}, 114.0 / 255, at::kFloat);
  at::Tensor inner = square.narrow(2, box.top, box.height).narrow(3, box.left, box.width);
  at::div_out(inner, fitted, at::scalar_tensor(255));
  return square;
}

/// Draws frames of two pixels around boxes (n, 4), in a colour for each class.
void draw(const at::Tensor& pixels, const at::Tensor& boxes, const at::Tensor& labels) {
  const at::Tensor colours = torch::tensor({{230, 25, 75},
                                            {60, 180, 75},
                                            {255, 225, 25},
                                            {0, 130, 200},
                                            {245, 130, 48},
                                            {145, 30, 180},
                                            {70, 240, 240},
                                            {240, 50, 230}},
                                           at::kByte);
  for (int64_t i = 0; i < boxes.size(0); ++i) {
    const auto edge = [&](int64_t side, int64_t length) {
      return std::clamp<int64_t>(std::llround(boxes[i][side].item<double>()), 0, length);
    };
    const at::Tensor colour = colours[labels[i].item<int64_t>() % colours.size(0)];
    const at::Tensor inside = pixels.slice(0, edge(1, pixels.size(0)), edge(3, pixels.size(0)))
                                  .slice(1, edge(0, pixels.size(1)), edge(2, pixels.size(1)));
    for (const int64_t dim : {0, 1}) {
      inside.slice(dim, 0, 2).copy_(colour);
      inside.slice(dim, -2).copy_(colour);
    }
  }
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

void detect(const Request& request) {
  const c10::InferenceMode no_gradients;
  if (request.threads > 0) at::set_num_threads(static_cast<int>(request.threads));
  Model model = load_model(request.model, {{"classes.json", ""}, {"size", ""}}, {"forward", "select"}, "detector");
  const auto size = number<int64_t>("the size that " + request.model + " names", model.facts.at("size"), 16);
  const std::vector<std::string> classes = names(model.facts.at("classes.json"));

  std::vector<double> reading, running, choosing;
  at::Tensor pixels, boxes, scores, labels;
  for (int64_t i = 0; i < request.repeat; ++i) {
    auto start = std::chrono::steady_clock::now();
    pixels = read_picture(request.picture);
    const Letterbox box(pixels, size);
    const at::Tensor images = input(pixels, box, size);
    reading.push_back(seconds_since(start));

    start = std::chrono::steady_clock::now();
    const at::Tensor raw = model.module.forward({images}).toTensor();
    running.push_back(seconds_since(start));

    start = std::chrono::steady_clock::now();
    const c10::IValue found = model.module.get_method("select")({raw, request.confidence, request.iou, kMostBoxes});
    const auto& of_picture = found.toListRef().at(0).toTupleRef().elements();
    boxes = box.to_picture(of_picture[0].toTensor());
    scores = of_picture[1].toTensor();
    labels = of_picture[2].toTensor();
    choosing.push_back(seconds_since(start));
  }

  std::cout << std::fixed << std::setprecision(5);
  for (int64_t i = 0; i < boxes.size(0); ++i) {
    std::cout << classes.at(static_cast<size_t>(labels[i].item<int64_t>())) << '\t' << scores[i].item<float>();
    for (int64_t side = 0; side < 4; ++side) std::cout << '\t' << boxes[i][side].item<float>();
    std::cout << '\n';
  }
  if (!std::cout.flush()) throw std::runtime_error("cannot write to standard output");
  if (!request.output.empty()) {
    draw(pixels, boxes, labels);
    write_picture(request.output, pixels);
  }
  std::cerr << std::fixed << std::setprecision(2) << "read " << 1e3 * median(reading) << " ms, model "
            << 1e3 * median(running) << " ms, boxes " << 1e3 * median(choosing) << " ms\n";
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("detect", usage(), argc, argv, [&] { detect(parse(argc, argv)); });
}

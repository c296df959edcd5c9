// Continues a prompt with an exported language model, without Python. The model is a TorchScript file with the methods
//   new_state(batch: int) -> List[Tensor]
//   prefill(ids (B, L), state) -> (logits (B, L, V), state)
//   step(ids (B,), state) -> logits (B, V), the state updated in place.
#include <torch/script.h>

#include <chrono>
#include <filesystem>
#include <iostream>
#include <sstream>

namespace {

struct Request {
  std::string model, prompt;
  int64_t count = 0;
  bool ids = false;  // prompt and output are comma-separated token numbers instead of bytes
};

Request parse(int argc, char** argv) {
  std::vector<std::string> words;
  Request request;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--ids") {
      request.ids = true;
    } else {
      words.emplace_back(argv[i]);
    }
  }
  if (words.size() != 3) throw std::invalid_argument("usage: generate MODEL PROMPT NUMBER_OF_TOKENS [--ids]");
  request.model = words[0];
  request.prompt = words[1];
  size_t read = 0;
  try {
    request.count = std::stoll(words[2], &read);
  } catch (const std::exception&) {
  }
  if (read != words[2].size() || read == 0 || request.count < 0) {
    throw std::invalid_argument("the number of tokens must be an integer >= 0 (got '" + words[2] + "')");
  }
  if (request.prompt.empty()) throw std::invalid_argument("the prompt is empty");
  return request;
}

std::vector<int64_t> encode(const Request& request) {
  if (!request.ids) {
    std::vector<int64_t> bytes;
    for (const unsigned char c : request.prompt) bytes.push_back(c);
    return bytes;
  }
  std::vector<int64_t> ids;
  std::istringstream items(request.prompt);
  for (std::string item; std::getline(items, item, ',');) {
    size_t read = 0;
    try {
      ids.push_back(std::stoll(item, &read));
    } catch (const std::exception&) {
    }
    if (read != item.size() || read == 0) {
      throw std::invalid_argument("with --ids the prompt is a list like 12,7,300 (got '" + item + "')");
    }
  }
  return ids;
}

void print(int64_t token, bool ids, bool first) {
  if (ids) {
    std::cout << (first ? "" : ",") << token << std::flush;
    return;
  }
  if (token > 255) throw std::invalid_argument("token " + std::to_string(token) + " is not a byte; use --ids");
  std::cout << static_cast<char>(token) << std::flush;
}

torch::jit::Module load(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) throw std::invalid_argument(path + " is not a file");
  try {
    torch::jit::Module model = torch::jit::load(path);
    model.eval();
    return model;
  } catch (const c10::Error&) {
    throw std::invalid_argument(path + " is not a TorchScript model, or is damaged");
  }
}

void generate(const Request& request) {
  const c10::InferenceMode no_gradients;
  const torch::jit::Module model = load(request.model);

  const at::Tensor prompt = torch::tensor(encode(request)).unsqueeze(0);  // (1, L)
  const auto filled = model.get_method("prefill")({prompt, model.get_method("new_state")({1})}).toTuple();
  at::Tensor logits = filled->elements()[0].toTensor().select(1, -1);  // (1, V)
  const c10::IValue state = filled->elements()[1];
  auto step = model.get_method("step");

  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < request.count; ++i) {
    const at::Tensor token = logits.argmax(-1);  // (1,)
    print(token.item<int64_t>(), request.ids, i == 0);
    if (i + 1 < request.count) logits = step({token, state}).toTensor();
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::cout << std::endl;
  std::cerr << request.count << " tokens, " << static_cast<double>(request.count) / seconds.count() << " tokens/s\n";
}

/// One line of a message: the last of TorchScript's, which stands below its traceback, else the first.
std::string one_line(std::string message) {
  if (message.find("Traceback of TorchScript") != std::string::npos) {
    message.erase(message.find_last_not_of('\n') + 1);
    return message.substr(message.rfind('\n') + 1);
  }
  return message.substr(0, message.find('\n'));
}

}  // namespace

int main(int argc, char** argv) {
  std::string problem;
  try {
    generate(parse(argc, argv));
    return 0;
  } catch (const c10::Error& error) {
    problem = error.what_without_backtrace();
  } catch (const std::exception& error) {
    problem = error.what();
  }
  std::cerr << "generate: " << one_line(problem) << '\n';
  return 1;
}

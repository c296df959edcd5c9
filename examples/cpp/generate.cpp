// Continues a prompt with an exported language model, without Python. The model is a TorchScript file with the methods
//   new_state(batch: int, capacity: int) -> List[Tensor], with room for so many tokens where a layer needs room
//   prefill(ids (B, L), state) -> (logits (B, L, V), state)
//   step(ids (B,), state) -> logits (B, V), the state updated in place.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <optional>

#include "program.h"

namespace {

constexpr const char* kUsage =
    R"(usage: generate MODEL PROMPT NUMBER_OF_TOKENS [options]
  MODEL            a file that `elattn export` wrote
  PROMPT           text, or - to read it from standard input
  --ids            prompt and output are token numbers like 12,7,300 instead of text
  --temperature T  sample from softmax(logits / T); 0, the default, takes the likeliest token
  --top-k K        sample from the K likeliest tokens
  --seed S         of the samples; the default is 0
  --stop TOKEN     end at this token number, which is not printed; by default at the end token of the model's tokenizer
  --step FILE      run the step of this AOTInductor package (.pt2), made from the same model
  --threads N      by default one per core
)";

struct Request {
  std::string model, prompt, step;
  int64_t count = 0, top_k = 0, seed = 0, threads = 0;
  std::optional<int64_t> stop;
  double temperature = 0;
  bool ids = false;
};

Request parse(int argc, char** argv) {
  Request request;
  const auto words = read_words(argc, argv, [&](const std::string& name, const auto& value) {
    if (name == "--ids") {
      request.ids = true;
    } else if (name == "--temperature") {
      request.temperature = number<double>(name, value(), 0);
    } else if (name == "--top-k") {
      request.top_k = number<int64_t>(name, value(), 1);
    } else if (name == "--seed") {
      request.seed = number<int64_t>(name, value(), 0);
    } else if (name == "--stop") {
      request.stop = number<int64_t>(name, value(), 0);
    } else if (name == "--step") {
      request.step = value();
    } else if (name == "--threads") {
      request.threads = number<int64_t>(name, value(), 1);
    } else {
      return false;
    }
    return true;
  });
  if (words.size() != 3) {
    throw Mistake("needs MODEL, PROMPT and NUMBER_OF_TOKENS (got " + std::to_string(words.size()) + " words)");
  }
  request.model = words[0];
  request.prompt = words[1];
  request.count = number<int64_t>("NUMBER_OF_TOKENS", words[2], 0);
  if (request.prompt == "-") request.prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
  return request;
}

Model load(const std::string& path) {
  return load_model(path, {{"vocab_size", ""}, {"byte_level", ""}, {"eos_id", ""}, {"fingerprint", ""}},
                    {"new_state", "prefill", "step"}, "language model");
}

/// The prompt as ids (1, L).
at::Tensor encode(const Request& request, const Model& model) {
  std::vector<int64_t> ids;
  if (request.ids) {
    std::string text = request.prompt;
    std::replace(text.begin(), text.end(), ',', ' ');
    std::istringstream items(text);
    for (std::string item; items >> item;) ids.push_back(number<int64_t>("with --ids a token", item, 0));
  } else {
    if (model.facts.at("byte_level") == "0") {
      throw Mistake(request.model + " has a tokenizer, so its tokens are not bytes: use --ids");
    }
    for (const unsigned char byte : request.prompt) ids.push_back(byte);
  }
  if (ids.empty()) throw Mistake("the prompt is empty");
  if (const std::string& size = model.facts.at("vocab_size"); !size.empty()) {
    const int64_t largest = *std::max_element(ids.begin(), ids.end());
    if (largest >= std::stoll(size)) {
      throw Mistake("token " + std::to_string(largest) + " is not among the model's " + size + " tokens");
    }
  }
  return torch::tensor(ids).unsqueeze(0);
}

/// Logits (B, V) for the tokens that follow ids (B,), the state updated in place.
using Step = std::function<at::Tensor(const at::Tensor& ids, const c10::IValue& state)>;

Step scripted_step(const Model& model) {
  return [step = model.module.get_method("step")](const at::Tensor& ids, const c10::IValue& state) mutable {
    return step({ids, state}).toTensor();
  };
}

Step compiled_step(const std::string& path, const Model& model) {
  if (!std::filesystem::is_regular_file(path)) throw Mistake(path + " is not a file");
  std::shared_ptr<torch::inductor::AOTIModelPackageLoader> package;
  try {
    package = std::make_shared<torch::inductor::AOTIModelPackageLoader>(path);
  } catch (const std::exception&) {
    throw Mistake(path + " is not an AOTInductor package for this machine, or is damaged");
  }
  // The package trusts its arguments: a state of other sizes would be read beyond its end.
  if (package->get_metadata()["fingerprint"] != model.facts.at("fingerprint")) {
    throw Mistake(path + " was made from another model");
  }
  return [package](const at::Tensor& ids, const c10::IValue& state) {
    std::vector<at::Tensor> arguments{ids};
    for (const at::Tensor& tensor : state.toTensorVector()) arguments.push_back(tensor);
    return package->run(arguments).at(0);
  };
}

/// Logits (1, V) for the token after the prompt ids (1, L), and the state. In pieces, because `prefill` returns logits
/// of every token: 100,000 tokens of a vocabulary of 6,400 would take 2.6 GB.
std::pair<at::Tensor, c10::IValue> prefill(const Model& model, const at::Tensor& ids, int64_t new_tokens) {
  auto method = model.module.get_method("prefill");
  c10::IValue state = model.module.get_method("new_state")({1, ids.size(1) + new_tokens});
  at::Tensor logits;
  for (const at::Tensor& piece : ids.split(2048, 1)) {
    const auto result = method({piece, state}).toTuple();
    logits = result->elements()[0].toTensor().select(1, -1);
    state = result->elements()[1];
  }
  return {logits, state};
}

/// The next token (1,): for equal seeds that of `ELATransformer.generate`.
at::Tensor choose(const at::Tensor& logits, const Request& request, const at::Generator& generator) {
  if (request.temperature == 0) return logits.argmax(-1);
  const at::Tensor relative = logits.to(at::kFloat);
  at::Tensor probabilities = ((relative - relative.amax(-1, /*keepdim=*/true)) / request.temperature).softmax(-1);
  if (request.top_k > 0 && request.top_k < logits.size(-1)) {
    const at::Tensor least = std::get<0>(probabilities.topk(request.top_k)).slice(-1, -1);
    probabilities = probabilities.masked_fill(probabilities < least, 0);
  }
  return probabilities.multinomial(1, /*replacement=*/false, generator).squeeze(-1);
}

void print(int64_t token, bool ids, bool first) {
  if (ids) {
    std::cout << (first ? "" : ",") << token;
  } else {
    if (token > 255) throw Mistake("token " + std::to_string(token) + " is not a byte: use --ids");
    std::cout << static_cast<char>(token);
  }
  // Each at once. Half of a UTF-8 character may be out for the time of a step; its bytes are complete in the end.
  if (!std::cout.flush()) throw std::runtime_error("cannot write to standard output");
}

void generate(const Request& request) {
  const c10::InferenceMode no_gradients;
  if (request.threads > 0) at::set_num_threads(static_cast<int>(request.threads));
  const Model model = load(request.model);
  const Step step = request.step.empty() ? scripted_step(model) : compiled_step(request.step, model);
  const at::Tensor prompt = encode(request, model);
  std::optional<int64_t> stop = request.stop;
  if (const std::string& eos = model.facts.at("eos_id"); !stop && !eos.empty()) stop = std::stoll(eos);
  const at::Generator generator = at::detail::createCPUGenerator(request.seed);

  auto start = std::chrono::steady_clock::now();
  auto [logits, state] = prefill(model, prompt, request.count);
  std::cerr << prompt.size(1) << " tokens of prompt in " << seconds_since(start) << " s\n";

  start = std::chrono::steady_clock::now();
  int64_t count = 0;
  while (count < request.count) {
    const at::Tensor next = choose(logits, request, generator);
    const int64_t token = next.item<int64_t>();
    if (token == stop) break;
    print(token, request.ids, count == 0);
    if (++count < request.count) logits = step(next, state);
  }
  const double seconds = seconds_since(start);
  std::cout << std::endl;
  std::cerr << count << " tokens, " << std::lround(static_cast<double>(count) / seconds) << " tokens/s\n";
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("generate", kUsage, argc, argv, [&] { generate(parse(argc, argv)); });
}

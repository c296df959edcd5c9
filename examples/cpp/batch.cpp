// Continues prompts of different lengths in one batch. Half way the conversations are written to a file, which a later
// program, in C++ or Python, can read: this one reads it back and goes on.
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>
#include <torch/serialize.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>

namespace {

/// (B, longest), shorter prompts filled up at their end; any token serves, because `lengths` says where they end.
at::Tensor padded(const std::vector<std::string>& prompts, const at::Tensor& lengths) {
  const auto batch = static_cast<int64_t>(prompts.size());
  at::Tensor ids = torch::zeros({batch, lengths.max().item<int64_t>()}, at::kLong);
  for (int64_t row = 0; row < batch; ++row) {
    for (size_t i = 0; i < prompts[row].size(); ++i) {
      ids[row][static_cast<int64_t>(i)] = static_cast<unsigned char>(prompts[row][i]);
    }
  }
  return ids;
}

/// As a tuple, which `torch.load` takes in Python without being told to trust the file.
void save(const std::string& path, const std::vector<at::Tensor>& state) {
  const auto tuple = c10::ivalue::Tuple::create(std::vector<c10::IValue>(state.begin(), state.end()));
  const std::vector<char> bytes = torch::pickle_save(tuple);
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size())).flush()) {
    throw std::runtime_error("cannot write " + path);
  }
}

std::vector<at::Tensor> load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const c10::IValue tuple = torch::pickle_load({std::istreambuf_iterator<char>(file), {}});
  std::vector<at::Tensor> state;
  for (const c10::IValue& tensor : tuple.toTupleRef().elements()) state.push_back(tensor.toTensor());
  return state;
}

void run(const std::string& model_file, const std::string& state_file, const std::vector<std::string>& prompts) {
  constexpr int64_t kNewTokens = 24;
  torch::jit::getProfilingMode() = false;
  const c10::InferenceMode no_gradients;
  torch::jit::Module model = torch::jit::load(model_file, at::kCPU);

  std::vector<int64_t> sizes;
  for (const std::string& prompt : prompts) sizes.push_back(static_cast<int64_t>(prompt.size()));
  const at::Tensor lengths = torch::tensor(sizes);  // (B,)
  const at::Tensor ids = padded(prompts, lengths);
  const int64_t batch = ids.size(0);

  const auto state = model.get_method("new_state")({batch, ids.size(1) + kNewTokens});
  const auto filled = model.get_method("prefill")({ids, state, lengths}).toTuple();
  // The logits after the last token of each prompt, (B, V).
  at::Tensor token = filled->elements()[0].toTensor().index({torch::arange(batch), lengths - 1}).argmax(-1);
  std::vector<at::Tensor> conversations = filled->elements()[1].toTensorVector();

  at::Tensor tokens = torch::empty({batch, kNewTokens}, at::kLong);
  for (int64_t i = 0; i < kNewTokens; ++i) {
    tokens.select(1, i).copy_(token);
    if (i == kNewTokens / 2) {
      save(state_file, conversations);
      conversations = load(state_file);
    }
    token = model.get_method("step")({token, conversations}).toTensor().argmax(-1);
  }
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t i = 0; i < kNewTokens; ++i) std::cout << (i > 0 ? "," : "") << tokens[row][i].item<int64_t>();
    std::cout << '\n';
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (words.size() < 3 || std::any_of(words.begin(), words.end(), [](const auto& word) { return word.empty(); })) {
    std::cerr << "usage: batch MODEL STATE_FILE PROMPT...\n";
    return 1;
  }
  try {
    run(words[0], words[1], {words.begin() + 2, words.end()});
    return 0;
  } catch (const c10::Error& error) {
    std::cerr << "batch: " << error.what_without_backtrace() << '\n';
  } catch (const std::exception& error) {
    std::cerr << "batch: " << error.what() << '\n';
  }
  return 1;
}

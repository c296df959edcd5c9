// What the programs for exported models share: arguments, loading, and mistakes in one line.
#pragma once

#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>

#include <charconv>
#include <chrono>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

/// A mistake of the user, or a file that does not serve: the message is for them.
using Mistake = std::invalid_argument;

template <class T>
T number(const std::string& name, const std::string& text, T least) {
  T value{};
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc{} || rest != end || !(value >= least)) {
    std::ostringstream message;
    message << name << " must be " << (std::is_integral_v<T> ? "an integer" : "a number") << " >= " << least
            << " (got '" << text << "')";
    throw Mistake(message.str());
  }
  return value;
}

/// The words of a command line that are no options. `option(name, value)` takes those that are, in their order, with
/// `value()` for the word that follows, and returns whether there is such an option.
inline std::vector<std::string> read_words(
    int argc, char** argv,
    const std::function<bool(const std::string& name, const std::function<std::string()>& value)>& option) {
  std::vector<std::string> words;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&] {
      if (++i == argc) throw Mistake(name + " needs a value");
      return std::string(argv[i]);
    };
    if (!name.starts_with("--")) {
      words.push_back(name);
    } else if (!option(name, value)) {
      throw Mistake("there is no option " + name);
    }
  }
  return words;
}

/// A TorchScript file and what elattn says about it in extra files; other files say nothing.
struct Model {
  torch::jit::Module module;
  torch::jit::ExtraFilesMap facts;
};

/// Fills the entries of `facts`. A file without one of the methods is not `kind`.
inline Model load_model(const std::string& path, torch::jit::ExtraFilesMap facts,
                        std::initializer_list<const char*> methods, const std::string& kind) {
  if (!std::filesystem::is_regular_file(path)) throw Mistake(path + " is not a file");
  // TorchScript would watch the first two calls of each method to compile it for the sizes met, which a model of elattn
  // does not need. Measured with 4 layers: 20 ms instead of 80 until all is compiled, and steps as fast afterwards.
  torch::jit::getProfilingMode() = false;
  Model model{.module = {}, .facts = std::move(facts)};
  try {
    model.module = torch::jit::load(path, at::kCPU, model.facts);
  } catch (const c10::Error&) {
    throw Mistake(path + " is not a TorchScript model, or is damaged");
  }
  for (const char* name : methods) {
    if (!model.module.find_method(name)) throw Mistake(path + " has no method " + name + ", so it is no " + kind);
  }
  model.module.eval();
  return model;
}

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// One line of a message: the last of TorchScript's, which stands below its traceback, else the first.
inline std::string one_line(std::string message) {
  if (message.find("Traceback of TorchScript") != std::string::npos) {
    message.erase(message.find_last_not_of('\n') + 1);
    return message.substr(message.rfind('\n') + 1);
  }
  return message.substr(0, message.find('\n'));
}

/// The exit code of a program: its usage if nothing or help is asked for, else what `body` does, its mistakes in one
/// line.
inline int run_program(const std::string& name, const std::string& usage, int argc, char** argv,
                       const std::function<void()>& body) {
  if (argc == 1 || (argc == 2 && std::string(argv[1]) == "--help")) {
    (argc == 1 ? std::cerr : std::cout) << usage;
    return argc == 1 ? 1 : 0;
  }
  std::string problem;
  try {
    body();
    return 0;
  } catch (const c10::Error& error) {
    problem = error.what_without_backtrace();
  } catch (const std::exception& error) {
    problem = error.what();
  }
  std::cerr << name << ": " << one_line(problem) << '\n';
  return 1;
}

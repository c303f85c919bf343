// Fuzzes the reader of the llama.cpp plugin's options: a text is applied, and what it describes itself as is read back
// as the same, or it is refused with a message that names its origin and leaves the options as they were.
#include <stdexcept>

#include "fuzz.h"
#include "options.h"
#include "text_mutator.h"

namespace flashprefill::test {

std::string FreshText(std::mt19937& random) {
  std::string text = "policy=" + RandomPolicyText(random);
  if (random() % 2) text += ", min_rows=" + std::to_string(random() % 300);
  if (random() % 2) text += "\nfinal_chunk=always # a comment";
  if (random() % 2) text += ", dense_layers=0-2 5";
  return text;
}

std::vector<std::string> TargetWords() {
  std::vector<std::string> words = PolicyWords();
  for (const char* word : {"policy=", "min_rows=", "min_keys=", "dense_layers=", "final_chunk=", "log=", "never",
                           "short", "always", "\n", "#", "0-3", "31 "}) {
    words.emplace_back(word);
  }
  return words;
}

namespace {

void Run(const std::string& text) {
  ggml::Options options;
  const std::string before = options.Describe();
  try {
    options.Apply(text, "here");
  } catch (const std::invalid_argument& error) {
    if (std::string(error.what()).rfind("here: ", 0) != 0) Finding("the message does not say where the text is from");
    if (options.Describe() != before) Finding("a refused text changed the options");
    return;
  }
  ++accepted;
  std::string described = options.Describe();
  ggml::Options again;
  for (size_t end; !described.empty(); described.erase(0, end)) { // options are separated by spaces outside brackets
    int depth = 0;
    for (end = 0; end < described.size() && (depth > 0 || described[end] != ' '); ++end) {
      depth += (described[end] == '(' || described[end] == '[') - (described[end] == ')' || described[end] == ']');
    }
    again.Apply(described.substr(0, end), "described");
    if (end < described.size()) ++end;
  }
  if (again.Describe() != options.Describe())
    Finding("'" + options.Describe() + "' reads back as '" + again.Describe() + "'");
}

} // namespace
} // namespace flashprefill::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  flashprefill::test::Run(std::string(reinterpret_cast<const char*>(data), size));
  return 0;
}

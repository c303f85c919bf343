// What users can set, and how. An option is a line "name = value" of a file, or "name=value" between commas in a
// string; '#' begins a comment. Options are the plugin's own, and the fields of the policy by their names.
#ifndef FLASHPREFILL_INTEGRATIONS_GGML_OPTIONS_H_
#define FLASHPREFILL_INTEGRATIONS_GGML_OPTIONS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "flashprefill/flashprefill.h"

namespace flashprefill::ggml {

// Which micro-batch is taken for the last one of its prompt. ggml does not tell; the policy's dense tail goes there.
enum class FinalChunk { kNever, kShort, kAlways };

struct Options {
  int64_t min_rows = 64;             // query rows of a micro-batch, and of each sequence in it
  int64_t min_keys = 0;              // keys in the cache: below it the CPU backend keeps the node
  std::vector<int64_t> dense_layers; // are left to the CPU backend
  FinalChunk final_chunk = FinalChunk::kShort;
  int guard = -1;            // fp_guard_mode; -1: nothing is measured
  float guard_target = 0.9f; // recall below which a head keeps too little
  bool log = false;          // a line for every micro-batch, not only the sum

  Options();
  // Applies a text of options on top of what is set. Throws std::invalid_argument, whose line names the option, its
  // value and what it must be; `from` says where the text is from.
  void Apply(const std::string& text, const std::string& from);
  // The file's text. Throws std::invalid_argument if it can't be read.
  void ApplyFile(const std::string& path);
  // "policy=flashprefill(alpha=0.12) final_chunk=short ..."
  std::string Describe() const;

  // Valid until the next Apply.
  const fp_policy& policy() const { return *reinterpret_cast<const fp_policy*>(storage_->data()); }

 private:
  void SetPolicy(const std::string& text);
  void SetField(const std::string& name, const std::string& value);
  void ParsePolicy(); // name_ and fields_ into storage_

  std::string name_;
  std::map<std::string, std::string> fields_;            // as they were given; the others are the policy's defaults
  std::shared_ptr<const std::vector<uint64_t>> storage_; // the policy's struct, and its tables behind it
};

} // namespace flashprefill::ggml

#endif // FLASHPREFILL_INTEGRATIONS_GGML_OPTIONS_H_

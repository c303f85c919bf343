// Mutations of text for targets that read it: besides libFuzzer's own, words are put in and ranges taken out, and now
// and then the text is made afresh. The target says what a text looks like.
#ifndef FLASHPREFILL_TESTS_TEXT_MUTATOR_H_
#define FLASHPREFILL_TESTS_TEXT_MUTATOR_H_

#include <random>
#include <string>
#include <vector>

namespace flashprefill::test {

// Of the target: a text that is likely to be accepted, and words that may stand in one.
std::string FreshText(std::mt19937& random);
std::vector<std::string> TargetWords();

// A policy as text with some of its fields, mostly inside their ranges.
std::string RandomPolicyText(std::mt19937& random);
// Names of methods, fields and choices, punctuation and numbers.
std::vector<std::string> PolicyWords();

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_TEXT_MUTATOR_H_

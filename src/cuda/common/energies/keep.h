// How energies decide, as a kernel argument.
#ifndef FLASHPREFILL_CUDA_COMMON_ENERGIES_KEEP_H_
#define FLASHPREFILL_CUDA_COMMON_ENERGIES_KEEP_H_

namespace flashprefill::cuda {

struct KeepRule {
  float alpha_log2 = 0; // log2(alpha), -inf for 0; not read if by_mass or by gain
  float mass = 0;
  bool by_mass = false;
  int min_blocks = 0;
  float gain = 0; // above 0: by gain, and neither alpha nor mass is read
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ENERGIES_KEEP_H_

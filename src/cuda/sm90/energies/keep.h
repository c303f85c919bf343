// How energies decide, as a kernel argument.
#ifndef FLASHPREFILL_CUDA_SM90_KEEP_H_
#define FLASHPREFILL_CUDA_SM90_KEEP_H_

namespace flashprefill::cuda {

struct KeepRule {
  float alpha_log2; // log2(alpha), -inf for 0; not read if by_mass or by gain
  float mass;
  bool by_mass;
  int min_blocks;
  float gain = 0; // above 0: by gain, and neither alpha nor mass is read
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_KEEP_H_

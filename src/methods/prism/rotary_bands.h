// Prism's two bands of dimensions: those that rotary embedding turns fast and slow. They may overlap.
#ifndef FLASHPREFILL_METHODS_PRISM_ROTARY_BANDS_H_
#define FLASHPREFILL_METHODS_PRISM_ROTARY_BANDS_H_

#include "core/types.h"

namespace flashprefill::methods::prism {

struct RotaryBands {
  int head_dim, rotary_dim, pairs, high, low;
  bool interleaved;

  static RotaryBands Of(const fp_prism& policy, int head_dim) {
    RotaryBands b{};
    b.head_dim = head_dim;
    b.rotary_dim = policy.rotary_dim > 0 ? policy.rotary_dim : head_dim / 2 * 2;
    b.pairs = b.rotary_dim / 2;
    b.high = policy.high_pairs > 0 ? policy.high_pairs : DivUp(b.pairs, 2);
    b.low = policy.low_pairs > 0 ? policy.low_pairs : DivUp(3 * b.pairs, 4);
    b.interleaved = policy.interleaved != 0;
    return b;
  }

  // Pairs are ordered from fast to slow; dimensions that are not rotated count as the slowest.
  bool InHigh(int dim) const { return dim < rotary_dim && Pair(dim) < high; }
  bool InLow(int dim) const { return dim >= rotary_dim || Pair(dim) >= pairs - low; }

 private:
  int Pair(int dim) const { return interleaved ? dim / 2 : dim % pairs; }
};

} // namespace flashprefill::methods::prism

#endif // FLASHPREFILL_METHODS_PRISM_ROTARY_BANDS_H_

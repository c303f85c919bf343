// FlashPrefill (arXiv 2603.06199): a key block is its mean.
#include "reference/energies.h"
#include "reference/selector.h"

namespace flashprefill::methods::flashprefill {
namespace {

using namespace reference;

std::unique_ptr<HeadSelector> MakeSelector(const HeadView& head) {
  const auto& policy = reinterpret_cast<const fp_flashprefill&>(head.policy);
  const Matrix means = BlockMeans(head.geometry, head.sequence, head.keys, head.problem.k.dtype);
  std::vector<std::vector<Point>> blocks(static_cast<size_t>(means.rows));
  for (int64_t b = 0; b < means.rows; ++b) {
    blocks[b] = {Point{1, std::vector<double>(means[b], means[b] + means.columns), {}}};
  }
  KeepRule rule;
  rule.alpha = policy.alpha;
  rule.min_blocks = policy.min_blocks;
  return std::make_unique<EnergySelector>(head, std::move(blocks), policy.query_pool, rule);
}

} // namespace

extern const reference::Selector kReference = {MakeSelector};

} // namespace flashprefill::methods::flashprefill

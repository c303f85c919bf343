// Copies of one head's rows in double, and their means. Every value is read once, through the offsets of core/types.h,
// so that the rest of the reference knows nothing of layouts, pages and dtypes. Only tokens that belong to the sequence
// are read: what lies in a page past the end of it may be anything.
#include "reference/reference.h"

namespace flashprefill::reference {

Matrix LoadQueries(const Problem& p, const Sequence& s, int64_t head) {
  Matrix m(s.q_len, p.head_dim);
  for (int64_t i = 0; i < s.q_len; ++i) {
    const int64_t row = RowOffset(p, p.q.stride, s, i, head);
    for (int64_t d = 0; d < p.head_dim; ++d) m[i][d] = LoadElement(p.q.data, p.q.dtype, row + d * p.q.stride[3]);
  }
  return m;
}

namespace {

Matrix LoadTokens(const Problem& p, const Tensor& tensor, double scale, const Sequence& s, int64_t kv_head) {
  Matrix m(s.k_len, p.head_dim);
  for (int64_t t = 0; t < s.k_len; ++t) {
    const int64_t row = KeyOffset(p, tensor.stride, s, t, kv_head);
    for (int64_t d = 0; d < p.head_dim; ++d) {
      m[t][d] = scale * LoadElement(tensor.data, tensor.dtype, row + d * tensor.stride[3]);
    }
  }
  return m;
}

} // namespace

Matrix LoadKeys(const Problem& p, const Sequence& s, int64_t kv_head) {
  return LoadTokens(p, p.k, KeyScale(p, s, kv_head), s, kv_head);
}
Matrix LoadValues(const Problem& p, const Sequence& s, int64_t kv_head) {
  return LoadTokens(p, p.v, ValueScale(p, s, kv_head), s, kv_head);
}

// Four sums, because one would make each addition wait for the one before: the tests' long cases are four times faster.
double Dot(const double* a, const double* b, int64_t n) {
  double sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int64_t j = 0; j < 4; ++j) sum[j] += a[i + j] * b[i + j];
  }
  for (; i < n; ++i) sum[0] += a[i] * b[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

void MeanOfRows(const Matrix& m, int64_t begin, int64_t end, int32_t dtype, double* mean) {
  std::vector<double> sum(static_cast<size_t>(m.columns));
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t d = 0; d < m.columns; ++d) sum[d] += m[r][d];
  }
  for (int64_t d = 0; d < m.columns; ++d) mean[d] = Rounded(dtype, sum[d] / static_cast<double>(end - begin));
}

Matrix BlockMeans(const Geometry& g, const Sequence& s, const Matrix& keys, int32_t dtype) {
  Matrix means(g.Blocks(s), keys.columns);
  for (int64_t b = 0; b < means.rows; ++b) {
    const int64_t begin = b * g.block_size;
    MeanOfRows(keys, begin, begin + g.BlockKeys(s, b), dtype, means[b]);
  }
  return means;
}

} // namespace flashprefill::reference

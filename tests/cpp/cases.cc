// The lists: see cases.h. Cases are small, since the reference answers each of them too: what matters is on which side
// of a block, tile, page or vector a length falls.
#include "cases.h"

namespace flashprefill::test {
namespace {

bool small = false;

// Numbers the cases, so that each has values of its own.
std::vector<OpCase> Seeded(std::vector<OpCase> cases, uint64_t first) {
  for (OpCase& op : cases) op.seed = op.page_seed = first++;
  return cases;
}

OpCase Packed(std::vector<Lengths> lengths) {
  OpCase op;
  op.lengths = std::move(lengths);
  op.q_layout = op.k_layout = Layout::kPacked;
  return op;
}

OpCase Paged(std::vector<Lengths> lengths, int page_size) {
  OpCase op = Packed(std::move(lengths));
  op.k_layout = Layout::kPaged;
  op.page_size = page_size;
  return op;
}

OpCase One(Lengths lengths) {
  OpCase op;
  op.lengths = {lengths};
  return op;
}

} // namespace

bool Small() { return small; }
void SetSmall(bool value) { small = value; }

std::vector<OpCase> LengthCases() {
  std::vector<OpCase> cases = {
      Packed({{1, 1}, {1, 300}, {0, 0}, {0, 17}, {2, 3}, {1, 128}, {1, 129}}),
      Packed({{63, 63}, {64, 64}, {65, 65}, {127, 127}, {128, 128}, {129, 129}}),
      Packed({{0, 0}, {257, 257}, {0, 0}, {251, 509}, {0, 64}}),
      Packed({{100, 333}, {33, 161}, {130, 1009}, {17, 511}, {129, 513}}),
      Packed({{0, 0}}),
      One({1, 2047}),
      One({1, 1}),
      One({255, 255}),
      One({513, 513}),
      One({128, 1024}),
      One({300, 1500}),
      One({31, 1031}),
      One({383, 1025}),
      One({0, 100}),
  };
  OpCase batch;
  batch.lengths = {{150, 150}, {150, 401}, {150, 277}};
  batch.seqused_k = true;
  cases.push_back(batch);
  OpCase chunk = One({256, 1152});
  chunk.final_chunk = false;
  cases.push_back(chunk);
  return Seeded(cases, 100);
}

std::vector<OpCase> HeadCases() {
  std::vector<OpCase> cases;
  for (const int group : {1, 2, 3, 5, 6, 7, 8, 12}) {
    OpCase op = One({150, 470});
    op.kv_heads = 2;
    op.group = group;
    cases.push_back(op);
  }
  for (const int head_dim : {64, 80, 96, 128, 256, 1, 3, 17, 72, 200, 512}) {
    for (const int32_t dtype : {FP_F32, FP_BF16}) {
      OpCase op = One({140, 396});
      op.head_dim = head_dim;
      op.group = 3;
      op.AllDtypes(dtype);
      cases.push_back(op);
    }
  }
  OpCase all_heads = One({9, 300}); // as many query heads as a tile has rows: tiles of one token
  all_heads.group = 128;
  cases.push_back(all_heads);
  return Seeded(cases, 200);
}

std::vector<OpCase> DtypeCases() {
  std::vector<OpCase> cases;
  const auto add = [&](int32_t q, int32_t k, int32_t v) {
    OpCase op = Packed({{200, 450}, {77, 300}});
    op.group = 2;
    op.Dtypes(q, k, v);
    cases.push_back(op);
  };
  add(FP_F32, FP_F32, FP_F32);
  add(FP_BF16, FP_BF16, FP_BF16);
  add(FP_F16, FP_F16, FP_F16);
  add(FP_F32, FP_F16, FP_F16); // ggml
  add(FP_F32, FP_BF16, FP_BF16);
  add(FP_F16, FP_F32, FP_F32);
  add(FP_BF16, FP_F16, FP_F32);
  add(FP_F32, FP_F32, FP_BF16);
  add(FP_BF16, FP_F32, FP_BF16);
  add(FP_F16, FP_BF16, FP_F16);
  for (const int scales : {2, 3, 0, 1}) { // FP8 caches
    add(scales % 2 ? FP_F32 : FP_BF16, FP_E4M3, scales == 1 ? FP_BF16 : FP_E4M3);
    cases.back().scales = scales;
    cases.back().kv_heads = 2;
    cases.back().values = Values::kStructured; // coarse means: flat scores would be near a tie everywhere
  }
  for (const int page_size : {16, 1}) {
    OpCase paged = Paged({{140, 333}, {1, 200}}, page_size);
    paged.kv_heads = 2, paged.group = 3, paged.head_dim = 80;
    paged.Dtypes(FP_BF16, FP_E4M3, FP_E4M3);
    paged.values = Values::kStructured;
    if (page_size == 1) paged.k_strides = paged.v_strides = Strides::kDimMajor; // transposed
    cases.push_back(paged);
  }
  return Seeded(cases, 300);
}

std::vector<OpCase> LayoutCases() {
  std::vector<OpCase> cases;
  for (const int page_size : {1, 16, 48, 64, 128, 256}) {
    for (const bool seqused : {false, true}) {
      OpCase op = Paged({{140, 333}, {0, 0}, {65, 65}, {1, 200}}, page_size);
      op.kv_heads = 2;
      op.group = 2;
      op.seqused_k = seqused;
      if (seqused) op.AllDtypes(FP_BF16);
      cases.push_back(op);
    }
  }
  OpCase rows; // rectangular q over pages
  rows.lengths = {{90, 90}, {90, 263}};
  rows.k_layout = Layout::kPaged;
  rows.page_size = 16;
  rows.seqused_k = true;
  cases.push_back(rows);
  OpCase used = Packed({{40, 170}, {130, 130}});
  used.seqused_k = true;
  cases.push_back(used);
  OpCase mixed = Packed({{100, 260}, {3, 260}}); // packed q, rectangular k
  mixed.k_layout = Layout::kRectangular;
  cases.push_back(mixed);
  OpCase crossed; // rectangular q, packed k
  crossed.lengths = {{70, 71}, {70, 290}};
  crossed.k_layout = Layout::kPacked;
  cases.push_back(crossed);
  OpCase equal;
  equal.lengths = {{130, 130}, {130, 130}};
  cases.push_back(equal);
  return Seeded(cases, 400);
}

std::vector<OpCase> StrideCases() {
  std::vector<OpCase> cases;
  for (const Strides strides :
       {Strides::kHeadMajor, Strides::kPadded, Strides::kSpreadDim, Strides::kDimMajor, Strides::kReversed}) {
    for (const int32_t dtype : {FP_F32, FP_BF16}) {
      OpCase all = One({133, 301});
      all.kv_heads = 2;
      all.group = 2;
      all.head_dim = 80;
      all.AllDtypes(dtype).AllStrides(strides);
      cases.push_back(all);
    }
    OpCase k_only = Paged({{90, 200}, {64, 150}}, 64); // K transposed inside its pages is vLLM's CPU cache
    k_only.kv_heads = 2;
    k_only.k_strides = strides;
    cases.push_back(k_only);
    OpCase v_only = Packed({{90, 200}, {64, 150}});
    v_only.kv_heads = 2;
    v_only.v_strides = strides;
    v_only.AllDtypes(FP_F16);
    cases.push_back(v_only);
    OpCase q_only = Packed({{90, 200}, {64, 150}});
    q_only.group = 3;
    q_only.q_strides = strides;
    q_only.out_strides = strides == Strides::kReversed ? Strides::kContiguous : strides;
    cases.push_back(q_only);
  }
  return Seeded(cases, 500);
}

std::vector<OpCase> FarCases() {
  OpCase pages = Paged({{60, 190}, {33, 65}}, 64); // 7 pages: 14 GiB of addresses each for k and v
  pages.k_strides = pages.v_strides = Strides::kFar;
  pages.AllDtypes(FP_BF16);
  OpCase sequences;
  sequences.lengths = {{70, 150}, {70, 150}, {70, 150}};
  sequences.AllStrides(Strides::kFar).AllDtypes(FP_F16);
  OpCase heads = Packed({{40, 170}, {30, 80}});
  heads.kv_heads = 2;
  heads.AllStrides(Strides::kFar).AllDtypes(FP_BF16);
  return Seeded({pages, sequences, heads}, 600);
}

std::vector<OpCase> LongCases() {
  OpCase whole = One({4096, 4096});
  whole.values = Values::kStructured;
  OpCase chunk = One({512, 4095});
  chunk.group = 2;
  chunk.values = Values::kStructured;
  chunk.AllDtypes(FP_BF16);
  return Seeded({whole, chunk}, 700);
}

std::vector<OpCase> PeakedCases() {
  std::vector<OpCase> cases;
  for (const int32_t dtype : {FP_F32, FP_BF16, FP_F16}) {
    OpCase op = Packed({{300, 1100}, {130, 900}});
    op.kv_heads = 2;
    op.group = 2;
    op.values = Values::kStructured;
    op.AllDtypes(dtype);
    cases.push_back(op);
    op.head_dim = 128;
    op.softmax_scale = 0.2f;
    cases.push_back(op);
  }
  return Seeded(cases, 800);
}

std::vector<OpCase> MixedCases() {
  std::vector<OpCase> cases;
  OpCase op;
  op.lengths = {{150, 427}};
  op.kv_heads = 2;
  op.group = 3;
  cases.push_back(op);
  op.AllDtypes(FP_BF16);
  op.lengths = {{260, 333}};
  cases.push_back(op);
  op.AllDtypes(FP_F16);
  op.lengths = {{1, 200}, {130, 311}, {64, 64}, {0, 50}};
  op.q_layout = Layout::kPacked;
  op.k_layout = Layout::kPaged;
  op.page_size = 16;
  op.seqused_k = true;
  cases.push_back(op);
  op.Dtypes(FP_F32, FP_F16, FP_F16);
  op.head_dim = 80;
  op.k_strides = Strides::kDimMajor;
  op.page_size = 64;
  cases.push_back(op);
  op.AllDtypes(FP_BF16);
  op.head_dim = 128;
  op.k_layout = Layout::kPacked;
  op.k_strides = Strides::kPadded;
  op.values = Values::kStructured;
  cases.push_back(op);
  return cases;
}

} // namespace flashprefill::test

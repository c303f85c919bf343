// attend_chunk: one tile of 128 rows over packed keys, the loop in which attend spends its time, for keys that stay in
// the L2 cache, that come from the last cache, and from memory. attend_pack: packing them.
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <limits>
#include <memory>
#include <random>

#include "benches.h"
#include "core/half.h"
#include "cpu/attend/tile.h"
#include "peak.h"

namespace flashprefill::bench {
namespace {

using cpu::Isa;

// Scratch memory as attend would get it.
class Buffer {
 public:
  explicit Buffer(size_t bytes)
      : data_(std::aligned_alloc(kWorkspaceAlign, DivUp(bytes, kWorkspaceAlign) * kWorkspaceAlign), &std::free) {}
  void* get() const { return data_.get(); }

 private:
  std::unique_ptr<void, void (*)(void*)> data_;
};

// One tile, `keys` packed keys, and the rows that they were packed from.
struct Setup {
  int32_t head_dim;
  int64_t keys;
  int32_t dtype;
  const cpu::AttendKernels& kernels;
  Buffer rows, packed_memory, tile_memory;
  std::vector<int64_t> offset;
  cpu::Packed packed{};
  cpu::TileState tile{};

  static Problem OfDtype(int32_t dtype) {
    Problem p{};
    p.q.dtype = p.k.dtype = p.v.dtype = dtype;
    return p;
  }

  Setup(Isa isa, int32_t head_dim, int64_t keys, int32_t dtype)
      : head_dim(head_dim),
        keys(keys),
        dtype(dtype),
        kernels(cpu::AttendKernelsFor(isa, OfDtype(dtype))),
        rows(static_cast<size_t>(keys * head_dim) * DtypeSize(dtype)),
        packed_memory(Bytes([&](Workspace& memory) { cpu::Packed::Take(memory, kernels, head_dim, keys); })),
        tile_memory(Bytes([&](Workspace& memory) { cpu::TakeTileState(memory, head_dim); })) {
    std::minstd_rand random(1);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < keys * head_dim; ++i) StoreElement(rows.get(), dtype, i, normal(random));
    for (int64_t t = 0; t < keys; ++t) offset.push_back(t * head_dim);

    Workspace packed_parts(packed_memory.get()), tile_parts(tile_memory.get());
    packed = cpu::Packed::Take(packed_parts, kernels, head_dim, keys);
    tile = cpu::TakeTileState(tile_parts, head_dim);
    tile.rows = kTileRows;
    tile.head_dim = head_dim;
    tile.scale = 1.44f / std::sqrt(static_cast<float>(head_dim));
    kernels.load_queries(RowsFrom(0), head_dim, tile.q);
    std::fill_n(tile.o, kTileRows * cpu::ValueWidth(head_dim), 0.0f);
    std::fill_n(tile.sum, kTileRows * cpu::kLeast, 0.0f);
    std::fill_n(tile.largest, kTileRows, -std::numeric_limits<float>::infinity());
    Pack();
  }

  template <typename Take>
  static size_t Bytes(Take&& take) {
    Workspace memory(nullptr);
    take(memory);
    return memory.used();
  }

  cpu::Rows RowsFrom(int64_t key) const { return {rows.get(), dtype, cpu::kGroup, 1, offset.data() + key}; }

  void Pack() {
    for (int64_t key = 0; key < keys; key += cpu::kGroup) {
      kernels.pack_keys(RowsFrom(key), head_dim, key, packed.k);
      kernels.pack_values(RowsFrom(key), head_dim, key, packed.v);
    }
  }

  void Attend() {
    cpu::Chunk chunk{packed.k, packed.v, cpu::kChunk, 1, {}, nullptr, -1, nullptr};
    for (int64_t key = 0; key < keys; key += cpu::kChunk) {
      chunk.run[0] = {key, 0, cpu::kChunk};
      chunk.next = (key + cpu::kChunk) % keys;
      kernels.attend(tile, chunk);
    }
  }
};

void RegisterOne(Isa isa, int32_t dtype, int32_t head_dim, int64_t keys) {
  const std::string tail = std::string("/") + cpu::IsaName(isa) + (dtype == FP_BF16 ? "/bf16" : "/fp32") + "/d" +
                           std::to_string(head_dim) + "/keys" + std::to_string(keys);
  // The manual time is CPU time: these machines are shared.
  benchmark::RegisterBenchmark(("attend_chunk" + tail).c_str(), [=](benchmark::State& state) {
    Setup setup(isa, head_dim, keys, dtype);
    setup.Attend();
    const double flops = 4.0 * kTileRows * static_cast<double>(keys) * head_dim;
    double best = std::numeric_limits<double>::infinity();
    for (auto _ : state) {
      const double start = ThreadSeconds();
      setup.Attend();
      const double seconds = ThreadSeconds() - start;
      best = std::min(best, seconds);
      state.SetIterationTime(seconds);
    }
    state.counters["best_gflops"] = flops / best * 1e-9;
    if (const double peak = PeakFlops(isa); peak > 0) state.counters["peak"] = flops / best / peak;
  })->UseManualTime();
  benchmark::RegisterBenchmark(("attend_pack" + tail).c_str(), [=](benchmark::State& state) {
    Setup setup(isa, head_dim, keys, dtype);
    for (auto _ : state) {
      const double start = ThreadSeconds();
      setup.Pack();
      state.SetIterationTime(ThreadSeconds() - start);
    }
    state.SetItemsProcessed(state.iterations() * keys);
  })->UseManualTime();
}

} // namespace

void RegisterAttend() {
  for (Isa isa : cpu::IsasHere()) {
    if (isa == Isa::kScalar) continue;
    const bool bf16 = isa == Isa::kAvx512Bf16 || isa == Isa::kAmxBf16;
    for (int32_t head_dim : {64, 128}) {
      for (int64_t keys : {1024, 8192, 131072}) RegisterOne(isa, bf16 ? FP_BF16 : FP_F32, head_dim, keys);
    }
  }
}

} // namespace flashprefill::bench

"""The vLLM plugin without vLLM: how it takes batches apart, caches of vLLM's shapes, what stays dense.

What all plugins share is tested in test_engines.py, what needs the engine in tests/engines/vllm.
"""

import logging
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flashprefill as fp
from flashprefill.engines import caches
from flashprefill.engines import sparse as shared
from flashprefill.vllm import backend, config, layers, metrics, options, runner, sparse
from flashprefill.vllm.host import host

H, HKV, D, PAGE = 6, 2, 64, 32
SCALE = 0.11


@dataclass
class Common:
    """What we read of vLLM's CommonAttentionMetadata."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: Any = True
    logits_indices_padded: Any = None
    dcp_local_seq_lens: Any = None
    positions: Any = None
    is_prefilling: Any = None
    seq_lens_cpu_upper_bound: Any = None
    req_idx: Any = None
    mm_req_doc_ranges: Any = None
    rswa_prefix_lens: Any = None
    _num_computed_tokens_cache: Any = None
    _token_to_req_indices_cache: Any = None


def common_of(requests, device="cpu"):
    """Requests are (rows, keys, prefilling); their pages are dealt out in random order."""
    rows, keys, prefilling = zip(*requests, strict=True)
    starts = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
    pages = [-(-n // PAGE) for n in keys]
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(1)).to(torch.int32) + 1
    table = torch.zeros(len(keys), max(pages) + 2, dtype=torch.int32)
    for i, (n, part) in enumerate(zip(pages, order.split(pages), strict=True)):
        table[i, :n] = part
    lengths = torch.tensor(keys, dtype=torch.int32)
    return Common(
        starts.to(device),
        starts,
        lengths.to(device),
        len(keys),
        int(starts[-1]),
        max(rows),
        max(keys),
        table.to(device),
        torch.zeros(int(starts[-1]), dtype=torch.int64, device=device),
        is_prefilling=torch.tensor(prefilling),
        seq_lens_cpu_upper_bound=lengths,
    )


def cpu_cache(k, v):
    """A cache as vLLM's CPU backend lays it out; k and v are [pages, page, heads, head_dim]."""
    transposed = k.permute(0, 2, 3, 1).flatten(2)
    return torch.cat((transposed, v.transpose(1, 2).flatten(2)), 2).view(len(k), k.shape[2], PAGE, -1)


def cuda_cache(k, v):
    return torch.cat((k, v), -1).transpose(1, 2).contiguous()


def cuda_cache_tokens_first(k, v):
    return torch.cat((k, v), -1).contiguous().transpose(1, 2)


CACHES = {
    "cpu": (cpu_cache, caches.transposed_pages),
    "cuda": (cuda_cache, caches.halves_pages),
    "cuda-nhd": (cuda_cache_tokens_first, caches.halves_pages),
}


class Engine:
    """Stands for vLLM: exact attention over a batch by its metadata, in float64, request by request."""

    def __init__(self, k, v):
        self.k, self.v, self.batches = k.double(), v.double(), []

    def __call__(self, query, metadata, output):
        self.batches.append(metadata)
        assert len(query) == len(output) >= metadata.num_actual_tokens
        starts = metadata.query_start_loc.tolist()
        for i, keys in enumerate(metadata.seq_lens.tolist()):
            rows = slice(starts[i], starts[i + 1])
            pages = metadata.block_table_tensor[i, : -(-keys // PAGE)].long()
            k, v = (x[pages].flatten(0, 1)[:keys].repeat_interleave(H // HKV, 1) for x in (self.k, self.v))
            scores = torch.einsum("qhd,khd->hqk", query[rows].double(), k) * SCALE
            n = starts[i + 1] - starts[i]
            hidden = torch.ones(n, keys, dtype=torch.bool, device=query.device).triu(keys - n + 1)
            output[rows] = torch.einsum(
                "hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v
            ).to(output.dtype)


def inputs(common, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    pages = int(common.block_table_tensor.max()) + 2
    k, v = torch.randn(2, pages, PAGE, HKV, D, generator=generator).to(dtype)
    # Slots past a sequence's end, and pages that nobody has, hold what they held before.
    for i, keys in enumerate(common.seq_lens.tolist()):
        last = int(common.block_table_tensor[i, (keys - 1) // PAGE])
        k[last, (keys - 1) % PAGE + 1 :] = v[last, (keys - 1) % PAGE + 1 :] = float("nan")
    k[0] = v[0] = k[-1] = v[-1] = float("inf")
    return torch.randn(common.num_actual_tokens, H, D, generator=generator).to(dtype), k, v


LONG = (300, 300, True)  # a prompt in one piece
CHUNK = (201, 500, True)  # a later chunk, not aligned to anything
HIT = (150, 278, True)  # what a prefix cache left to do
DECODE = (1, 411, False)
DRAFTS = (5, 390, False)
SHORT = (40, 400, True)
BATCHES = {
    "one-shot": [LONG],
    "chunk": [CHUNK],
    "decodes first": [DECODE, DRAFTS, LONG, CHUNK],
    "decodes last": [HIT, DECODE],
    "scattered": [DECODE, LONG, DRAFTS, CHUNK, HIT, SHORT, LONG, DECODE],
}
TINY = {"sink_blocks": 1, "window_blocks": 1, "dense_tail_blocks": 1, "block_size": 64}


def wanted(policy):
    return options.of_config(config(policy))


def run(common, policy, cache, final=None, dtype=torch.float32):
    write, pages_of = CACHES[cache]
    query, k, v = (x.to(common.seq_lens.device) for x in inputs(common, dtype))
    engine = Engine(k, v)
    plan = sparse.plan_of(common, final, wanted(policy), lambda batch: batch)
    output = torch.full_like(query, float("nan"))
    assert sparse.run(plan, query, *pages_of(write(k, v), D), output, SCALE, engine)
    return query, k, v, output, engine, plan


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("batch", BATCHES)
def test_all_kept_is_what_the_engine_computes(batch, cache):
    common = common_of(BATCHES[batch])
    for policy in (fp.Dense(), fp.FlashPrefill(alpha=0.0, **TINY)):
        query, k, v, output, _, _ = run(common, policy, cache)
        expected = torch.empty_like(query)
        Engine(k, v)(query, common, expected)
        torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", CACHES)
def test_each_request_is_what_it_would_be_alone(cache):
    """The sparse rows of a mixed batch: those of each request by itself, with its own tail."""
    requests = BATCHES["scattered"]
    common = common_of(requests)
    final = [True, False, True, True, False, True, True, True]
    policy = fp.FlashPrefill(alpha=1.0, **TINY)
    query, k, v, output, engine, plan = run(common, policy, cache, final)
    starts = common.query_start_loc.tolist()
    for i in (1, 3, 4, 6):
        rows, keys, _ = requests[i]
        pages = common.block_table_tensor[i, : -(-keys // PAGE)].long()
        here = slice(starts[i], starts[i + 1])
        k_alone, v_alone = (x[pages].flatten(0, 1)[:keys] for x in (k, v))
        alone, stats = fp.prefill_attention(
            query[here][None], k_alone[None], v_alone[None], policy,
            softmax_scale=SCALE, final_chunk=final[i], return_stats=True,
        )  # fmt: skip
        assert stats.mean_density < 1
        torch.testing.assert_close(output[here], alone[0], atol=1e-6, rtol=1e-6)
        other = fp.prefill_attention(
            query[here][None], k_alone[None], v_alone[None], policy,
            softmax_scale=SCALE, final_chunk=not final[i],
        )  # fmt: skip
        assert not torch.allclose(other, alone, atol=1e-3), "a tail that makes no difference tests nothing"
    (batch,) = engine.batches
    assert batch.num_reqs == 4
    assert batch.seq_lens.tolist() == [411, 390, 400, 411]
    assert batch.query_start_loc.tolist() == [0, 1, 6, 46, 47]
    assert batch.max_query_len == 40 and batch.max_seq_len == 411 and batch.num_actual_tokens == 47
    assert plan.split.dense_rows == {"decode": 2, "speculative": 5, "short": 40}


def test_a_step_is_counted_once():
    """A model with two kinds of layers prepares each batch twice."""
    common, final = common_of(BATCHES["scattered"]), [True] * 8
    before = metrics.snapshot()
    for step in (final, final, list(final)):
        sparse.plan_of(common, step, wanted(fp.Dense()), lambda batch: batch)
    alone = common_of([DECODE])
    for step in (final, [True], [True]):
        sparse.plan_of(alone, step, wanted(fp.Dense()), None)
    after = metrics.snapshot()
    assert after["steps"] - before["steps"] == 2
    assert after["dense_rows"]["decode"] - before["dense_rows"].get("decode", 0) == 2 * 2 + 3


def test_bf16():
    common = common_of(BATCHES["scattered"])
    query, k, v, output, _, _ = run(common, fp.Dense(), "cpu", dtype=torch.bfloat16)
    expected = torch.empty_like(query)
    Engine(k, v)(query, common, expected)
    torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)


def test_rows_of_neighbours_are_not_copied():
    """Dense requests that lie together are a slice of the batch, others are gathered."""
    together = sparse.plan_of(common_of(BATCHES["decodes first"]), None, wanted(fp.Dense()), lambda b: b)
    assert together.engine_rows == slice(0, 6)
    assert [(call.span.begin, call.span.end) for call in together.calls] == [(6, 507)]
    scattered = sparse.plan_of(common_of(BATCHES["scattered"]), None, wanted(fp.Dense()), lambda b: b)
    assert isinstance(scattered.engine_rows, torch.Tensor)
    assert [len(call.span.rows) for call in scattered.calls] == [1, 2, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"causal": False},
        {"causal": torch.ones(1, dtype=torch.int32)},
        {"is_prefilling": None},
        {"mm_req_doc_ranges": {0: [(3, 9)]}},
        {"rswa_prefix_lens": torch.tensor([3])},
        {"logits_indices_padded": torch.tensor([3])},
        {"dcp_local_seq_lens": torch.tensor([3])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_batches_that_are_not_plain_are_the_engines(change):
    common = common_of(BATCHES["one-shot"])
    assert sparse.plan_of(common, None, wanted(fp.Dense()), None) is not None
    assert sparse.plan_of(replace(common, **change), None, wanted(fp.Dense()), None) is None


def test_final_of_another_batch_is_not_used():
    common = common_of([LONG, LONG])
    plan = sparse.plan_of(common, [False], wanted(fp.Dense()), None)
    assert plan.calls[0].span.final == [True, True]
    plan = sparse.plan_of(common, [False, True], wanted(fp.Dense()), None)
    assert plan.calls[0].span.final == [False, True]


needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not any(b.name == "cuda" and b.available for b in fp.backends()),
        reason="needs the CUDA backend and a GPU that it knows",
    ),
]


@pytest.mark.parametrize(
    ("cache", "dtype"),
    [
        pytest.param(cache, dtype, marks=needs_gpu, id=f"{cache}-{str(dtype)[6:]}")
        for cache in ("cuda", "cuda-nhd")
        for dtype in (torch.bfloat16, torch.float16)
    ],
)
@pytest.mark.parametrize("batch", BATCHES)
def test_on_a_gpu(batch, cache, dtype):
    """Metadata and caches of vLLM's shapes and strides in a GPU's memory: exact, and as on the CPU."""
    requests = BATCHES[batch]
    final = [i % 2 == 0 for i in range(len(requests))]
    before = metrics.snapshot()
    common = common_of(requests, "cuda")
    query, k, v, output, _, plan = run(common, fp.Dense(), cache, final, dtype)
    expected = torch.empty_like(query)
    Engine(k, v)(query, common, expected)
    torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)
    assert all(call.seqused_k.device.type == "cuda" for call in plan.calls)
    after = metrics.snapshot()
    assert (
        after["kept_blocks"] - before["kept_blocks"] == after["causal_blocks"] - before["causal_blocks"] > 0
    )

    streaming = fp.Streaming(sink_blocks=0, window_blocks=1, dense_tail_blocks=1, block_size=128)
    _, _, _, on_gpu, _, _ = run(common, streaming, cache, final, dtype)
    _, _, _, on_cpu, _, _ = run(common_of(requests), streaming, cache, final, dtype)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("cache", [pytest.param("cuda", marks=needs_gpu)])
def test_nothing_waits_for_a_gpu(cache):
    """Dividing a mixed batch, its layers, and a line of statistics, with everything that waits an error."""
    common = common_of(BATCHES["scattered"], "cuda")
    query, k, v = (x.to("cuda") for x in inputs(common, torch.bfloat16))
    write, pages_of = CACHES[cache]
    pages, output = pages_of(write(k, v), D), torch.empty_like(query)
    counters = host.metrics

    def step():
        plan = sparse.plan_of(common, None, wanted(fp.FlashPrefill(alpha=0.5, **TINY)), lambda batch: batch)
        for _ in range(3):
            assert sparse.run(plan, query, *pages, output, SCALE, lambda q, batch, out: out.zero_())
        counters._next_line = 0.0
        counters.tick(replace(wanted(fp.Dense()), log_seconds=0.0))

    step()  # what is loaded at the first call may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ----------------------------------------------------------------- mix-ins


class FakeBuilder:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.built = []

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        self.built.append(fast_build)
        return SimpleNamespace(
            common=common_attn_metadata,
            block_table=common_attn_metadata.block_table_tensor,
            slot_mapping=None,
        )

    def update_block_table(self, metadata, blk_table, slot_mapping):
        return SimpleNamespace(common=metadata.common, block_table=blk_table, slot_mapping=slot_mapping)


class Builder(backend.BuilderMixin, FakeBuilder):
    build_options = {"fast_build": True}

    def impls(self, layer_names, vllm_config):
        return {name: impl_of() for name in layer_names}


class FakeImpl:
    def forward(self, layer, query, key, value, kv_cache, metadata, output, *scales):
        self.engine(query, metadata.common, output)


class Impl(backend.ImplMixin, FakeImpl):
    pages_of = staticmethod(lambda kv_cache: caches.transposed_pages(kv_cache, D))


def impl_of(**changes):
    impl = Impl()
    plain = {
        "attn_type": "decoder", "sliding_window": -1, "logits_soft_cap": 0, "alibi_slopes": None,
        "sinks": None, "kv_cache_dtype": "auto", "head_size": D, "scale": SCALE,
    }  # fmt: skip
    vars(impl).update(plain | changes)
    return impl


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(runner, "install", lambda vllm_config: None)


def builder_of(policy=None, **more):
    additional = {} if policy is None else config(policy, **more)
    return Builder(
        None,
        ["model.layers.0.attn", "model.layers.1.attn"],
        SimpleNamespace(additional_config=additional),
        None,
    )


def forward(impl, layer, common, metadata, k, v, query):
    impl.engine = Engine(k, v)
    output = torch.full_like(query, float("nan"))
    impl.forward(SimpleNamespace(layer_name=layer), query, None, None, cpu_cache(k, v), metadata, output)
    return output, impl.engine.batches


def test_turned_off_nothing_is_ours():
    builder = builder_of()
    common = common_of(BATCHES["scattered"])
    metadata = builder.build(0, common)
    assert builder.built == [False] and not hasattr(metadata, sparse.ATTRIBUTE)
    query, k, v = inputs(common)
    _, batches = forward(impl_of(), "model.layers.0.attn", common, metadata, k, v, query)
    assert batches == [common]


def test_a_backend_knows_from_how_many_rows_on(installed, monkeypatch):
    assert builder_of(fp.Dense()).options.min_chunk == 128
    monkeypatch.setattr(Builder, "min_chunk", 1024)
    assert builder_of(fp.Dense()).options.min_chunk == 1024
    assert builder_of(fp.Dense(), min_chunk=1).options.min_chunk == 1


def test_a_library_without_the_device_leaves_a_dense_engine(installed, monkeypatch, caplog):
    def refuses(policy, device):
        raise fp.UnsupportedError("no backend here can work on that memory")

    monkeypatch.setattr(backend, "dense_keys", refuses)
    with caplog.at_level(logging.WARNING, "vllm.flashprefill"):
        assert builder_of(fp.Dense()).options is None
    assert "stay dense: no backend here" in caplog.text


def test_backend(installed):
    builder = builder_of(fp.Dense(), first_dense_layers=1)
    common = common_of(BATCHES["scattered"])
    metadata = builder.build(0, common)
    assert builder.built == [False, True]
    query, k, v = inputs(common)
    dense, batches = forward(impl_of(), "model.layers.0.attn", common, metadata, k, v, query)
    assert batches == [common], "the first layer is to stay dense"
    ours, batches = forward(impl_of(), "model.layers.1.attn", common, metadata, k, v, query)
    assert [batch.num_reqs for batch in batches] == [4]
    torch.testing.assert_close(ours, dense, atol=2e-5, rtol=1e-5)
    softcapped, batches = forward(
        impl_of(logits_soft_cap=30.0), "model.layers.1.attn", common, metadata, k, v, query
    )
    assert batches == [common]
    assert builder.build_for_drafting(common, 0).__dict__.keys() == {"common", "block_table", "slot_mapping"}
    assert builder.built == [False, True, True]


class Fp8Impl(Impl):
    fp8_caches = ("fp8", "fp8_e4m3")
    pages_of = staticmethod(lambda kv_cache: caches.halves_pages(kv_cache.view(torch.float8_e4m3fn), D))


@pytest.mark.parametrize("scale", [[0.05], [0.05, 0.02]], ids=["tensor", "heads"])
def test_an_fp8_cache(installed, scale):
    """Keys, values and queries in FP8, by the layer's scales; the engine gets the queries as they are."""
    scale, q_scale, e4m3 = torch.tensor(scale), torch.tensor([0.03]), torch.float8_e4m3fn
    common = common_of(BATCHES["scattered"])
    metadata = builder_of(fp.Dense()).build(0, common)
    query, k, v = inputs(common)
    k8, v8 = ((x / scale[:, None]).clamp(-448, 448).to(e4m3) for x in (k, v))
    full = Engine(*(x.float() * scale[:, None] for x in (k8, v8)))
    impl, given = Fp8Impl(), []
    vars(impl).update(vars(impl_of(kv_cache_dtype="fp8")))

    def engine(queries, batch, results):
        given.append(queries.dtype)
        full(queries.float() * q_scale, batch, results)

    impl.engine = engine
    layer = SimpleNamespace(
        layer_name="model.layers.0.attn", _k_scale=scale, _v_scale=scale, _q_scale=q_scale
    )
    query8 = (query / q_scale).clamp(-448, 448).to(e4m3)
    cache = cuda_cache(k8.view(torch.uint8), v8.view(torch.uint8))
    output = torch.full(query.shape, float("nan"), dtype=torch.bfloat16)
    impl.forward(layer, query8, None, None, cache, metadata, output)
    assert given == [e4m3] and [batch.num_reqs for batch in full.batches] == [4]
    expected = torch.empty(query.shape)
    full(query8.float() * q_scale, common, expected)
    torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=2e-2)


def test_a_cache_that_is_replaced_or_moves_is_read_where_it_is(installed):
    common = common_of(BATCHES["one-shot"])
    metadata = builder_of(fp.Dense()).build(0, common)
    query, k, v = inputs(common)
    impl, layer = impl_of(), SimpleNamespace(layer_name="model.layers.0.attn")
    cache = cpu_cache(k, v)
    for new in (cache, cache.flip(1).contiguous(), cache):
        results = []
        for each in (impl, impl_of()):
            each.engine = Engine(k, v)
            results.append(torch.full_like(query, float("nan")))
            each.forward(layer, query, None, None, new, metadata, results[-1])
        assert torch.equal(*results) and not torch.isnan(results[0]).any()
    before = results[0].clone()
    cache.set_(cache.flip(1).contiguous())  # the same object, elsewhere
    impl.forward(layer, query, None, None, cache, metadata, results[0])
    impl_of().forward(layer, query, None, None, cache, metadata, results[1])
    assert torch.equal(*results) and not torch.equal(results[0], before)


def test_other_groups_have_pages_of_their_own(installed):
    builder = builder_of(fp.Dense())
    common = common_of(BATCHES["scattered"])
    metadata = builder.build(0, common)
    other = common.block_table_tensor.flip(0) + 1
    updated = builder.update_block_table(metadata, other, None)
    plan = getattr(updated, sparse.ATTRIBUTE)
    for call in plan.calls:
        assert torch.equal(call.block_table, other[call.span.first : call.span.past])
    assert torch.equal(plan.engine.block_table, other[plan.split.dense])
    first = getattr(metadata, sparse.ATTRIBUTE)
    assert torch.equal(first.calls[0].block_table, common.block_table_tensor[1:2]), "the first is left alone"


def test_a_kernel_that_refuses_leaves_a_dense_engine(installed, monkeypatch, caplog):
    builder = builder_of(fp.Dense())
    common = common_of(BATCHES["scattered"])
    metadata = builder.build(0, common)
    query, k, v = inputs(common)

    def refuses(*arguments, **keywords):
        raise fp.UnsupportedError("no such thing here")

    monkeypatch.setattr(shared, "PreparedPrefill", refuses)
    with caplog.at_level(logging.WARNING, "vllm.flashprefill"):
        output, batches = forward(impl_of(), "model.layers.0.attn", common, metadata, k, v, query)
    assert batches == [common] and not output.isnan().any()
    assert "no such thing here" in caplog.text
    assert metrics.snapshot()["fallbacks"]["no such thing here"] >= 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"sliding_window": (-1, -1)}, ""),
        ({"sliding_window": 1023}, "sliding window"),
        ({"sliding_window": (511, 0)}, "sliding window"),
        ({"logits_soft_cap": 50.0}, "softcapping"),
        ({"alibi_slopes": torch.ones(6)}, "ALiBi"),
        ({"sinks": torch.ones(6)}, "sinks"),
        ({"kv_cache_dtype": "fp8"}, "fp8"),
        ({"attn_type": "encoder_only"}, "decoder"),
        ({"dcp_world_size": 2}, "split over GPUs"),
    ],
)  # fmt: skip
def test_why_dense(change, reason):
    why = layers.why_dense(impl_of(**change))
    assert (reason in why) if reason else not why


def test_announcements(caplog):
    names = {"model.layers.0.attn": impl_of(), "model.layers.1.attn": impl_of(sliding_window=7)}
    with caplog.at_level(logging.INFO, "vllm.flashprefill"):
        layers.announce(names, wanted(fp.Sketch(mass=0.77)))
        layers.announce(names, wanted(fp.Sketch(mass=0.77)))
    (record,) = [r for r in caplog.records if "0.77" in r.message]
    assert "1 of 2 layers of a kind" in record.message and "1 stay dense: a sliding window" in record.message


def test_a_model_that_never_came_to_us(caplog, monkeypatch):
    monkeypatch.setattr(host, "announced", False)
    monkeypatch.setattr(host, "_said", set())
    with caplog.at_level(logging.WARNING, "vllm.flashprefill"):
        backend.warn_if_unused({})
        assert not caplog.records
        backend.warn_if_unused({"flashprefill": True})
    assert "prompts are read densely" in caplog.text


# ------------------------------------------------------------ model runners


def test_runners_tell_which_chunks_are_last():
    class First:
        input_batch = SimpleNamespace(num_reqs=3)
        discard_request_mask = SimpleNamespace(np=torch.tensor([True, False, True, True]).numpy())

        def _build(self, number):
            return runner.final_chunks(), number

    class Second:
        def prepare(self, input_batch):
            return runner.final_chunks()

    for _ in range(2):  # twice is once
        runner.wrap(First, "_build", runner.of_first_runner)
        runner.wrap(Second, "prepare", runner.of_second_runner)
    assert First()._build(4) == ([False, True, False], 4)
    batch = SimpleNamespace(
        num_computed_prefill_tokens_np=torch.tensor([0, 512, 512]).numpy(),
        num_scheduled_tokens=torch.tensor([512, 512, 100]).numpy(),
        prefill_len_np=torch.tensor([2000, 1024, 600]).numpy(),
    )
    assert Second().prepare(batch) == [False, True, True]
    assert runner.final_chunks() is None


# ------------------------------------------------------- options and counters


@pytest.mark.parametrize("value", [True, "flashprefill", {}, {"policy": "flashprefill"}])
def test_ways_to_turn_it_on(value):
    assert options.of_config({"flashprefill": value}).policy == fp.FlashPrefill()


@pytest.mark.parametrize("value", [{}, {"flashprefill": False}, {"flashprefill": None}, None, {"other": 1}])
def test_ways_to_leave_it_off(value):
    assert options.of_config(value) is None


@pytest.mark.parametrize(
    "policy",
    [
        fp.FlashPrefill(alpha=0.3, query_pool=16),
        fp.Sketch(mass=0.9),
        fp.Sketch(alpha=0.1),
        fp.Gather(budget=0.1),
        fp.Streaming(),
        fp.Dense(),
    ],
    ids=repr,
)
def test_policies_survive_the_way(policy):
    asked = options.of_config(config(policy, first_dense_layers=2, min_chunk=256, guard="repair(rows=16)"))
    assert (asked.policy, asked.first_dense_layers, asked.min_chunk) == (policy, 2, 256)
    assert asked.guard == fp.Guard("repair", rows=16)


@pytest.mark.parametrize(
    "policy", [fp.FlashPrefill(alpha=1.0, **TINY), fp.Gather(gain=0.05, **TINY)], ids=["blocks", "keys"]
)
def test_density_is_that_of_the_kernel(policy):
    common = common_of([LONG])
    before = metrics.snapshot()
    query, k, v, _, _, _ = run(common, policy, "cpu")
    after = metrics.snapshot()
    pages = common.block_table_tensor[0, :10].long()
    k, v = (x[pages].flatten(0, 1)[:300][None] for x in (k, v))
    _, stats = fp.prefill_attention(query[None], k, v, policy, softmax_scale=SCALE, return_stats=True)
    assert after["kept_blocks"] - before["kept_blocks"] == int(stats.kept.sum())
    assert after["causal_blocks"] - before["causal_blocks"] == int(stats.total.sum()) * stats.kept.shape[-1]
    assert after["calls"] - before["calls"] == 1

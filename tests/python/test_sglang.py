"""The SGLang plugin without SGLang: how it takes batches apart, what it hands to the stock backend, what
stays dense.

What all plugins share is tested in test_engines.py, what needs the engine in tests/engines/sglang.
"""

import json
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import flashprefill as fp
from flashprefill import sglang as plugin
from flashprefill.engines import caches
from flashprefill.engines import sparse as shared
from flashprefill.sglang import backend, batches, hooks, layers, options
from flashprefill.sglang.host import host

H, HKV, D = 6, 2, 64
SCALE = 0.11
TINY = {"sink_blocks": 1, "window_blocks": 1, "dense_tail_blocks": 1, "block_size": 64}

# New tokens and tokens in the cache before them.
LONG, CHUNK, HIT = (300, 0), (201, 299), (150, 128)
DECODE, SHORT, DECODE_LONG = (1, 410), (40, 360), (1, 700)
BATCHES = {
    "one-shot": [LONG],
    "chunk": [CHUNK],
    "two": [LONG, CHUNK],
    "decodes last": [HIT, DECODE, DECODE_LONG],
    "scattered": [DECODE, LONG, SHORT, CHUNK, HIT, DECODE_LONG, LONG],
}


class Mode(SimpleNamespace):
    """A ForwardMode."""

    def is_decode_or_idle(self):
        return self.name in ("DECODE", "IDLE")

    def is_decode(self):
        return self.name == "DECODE"

    def is_target_verify(self):
        return self.name == "TARGET_VERIFY"

    def is_extend(self):
        return self.name in ("EXTEND", "MIXED", "TARGET_VERIFY")


class Pool:
    """A token_to_kv_pool of one layer. Slots that nobody owns hold what they held before."""

    def __init__(self, slots, page, hnd=False):
        self.page = page
        self.k, self.v = (torch.full((slots, HKV, D), float("nan")) for _ in range(2))
        self.hnd = hnd

    def get_kv_buffer(self, layer):
        if not self.hnd:
            return self.k, self.v
        return tuple(x.view(-1, self.page, HKV, D).transpose(1, 2).contiguous() for x in (self.k, self.v))

    def set_kv_buffer(self, layer, where, k, v, k_scale=None, v_scale=None):
        self.k[where], self.v[where] = k, v


def world(requests, page=1, mode="EXTEND", hnd=False):
    """A runner, a batch of its requests and new k, v; what the cache had before is in its pool."""
    generator = torch.Generator().manual_seed(3)
    keys = [new + old for new, old in requests]
    pages = [-(-n // page) for n in keys]
    order = torch.randperm(sum(pages) + 3, generator=generator)[: sum(pages)]
    pool = Pool((sum(pages) + 3) * page, page, hnd)
    table = torch.zeros(len(keys) + 4, max(keys) + 2 * page, dtype=torch.int32)
    slots_of, k_all, v_all = [], [], []
    rows_of_requests = torch.randperm(len(keys) + 4, generator=generator)[: len(keys)]
    for i, part in enumerate(order.split(pages)):
        slots = (part[:, None] * page + torch.arange(page)).flatten()[: keys[i]]
        table[rows_of_requests[i], : keys[i]] = slots
        k, v = torch.randn(2, keys[i], HKV, D, generator=generator)
        past = requests[i][1]
        pool.set_kv_buffer(None, slots[:past], k[:past], v[:past])
        slots_of.append(slots[past:])
        k_all.append(k[past:])
        v_all.append(v[past:])
    new, old = ([r[i] for r in requests] for i in (0, 1))
    lengths = torch.tensor(keys)
    batch = SimpleNamespace(
        forward_mode=Mode(name=mode), batch_size=len(keys), rids=[f"r{i}" for i in range(len(keys))],
        input_ids=torch.arange(sum(new)), positions=torch.arange(sum(new)), out_cache_loc=torch.cat(slots_of),
        req_pool_indices=rows_of_requests, req_pool_indices_cpu=rows_of_requests.clone(),
        seq_lens=lengths, seq_lens_cpu=lengths.clone(), seq_lens_sum=sum(keys), orig_seq_lens=lengths.clone(),
        extend_seq_lens=torch.tensor(new), extend_prefix_lens=torch.tensor(old),
        extend_seq_lens_cpu=new, extend_prefix_lens_cpu=old, extend_num_tokens=sum(new),
        extend_start_loc=torch.tensor(shared.starts_of(new)[:-1], dtype=torch.int32),
        global_num_token_non_padded_cpu=sum(new), encoder_lens=None, multi_item_delimiter_indices=None,
        dcp_kv_mask=None, encoder_swa_replay=False, kv_loc_plan=object(), _attn_output=None,
    )  # fmt: skip
    runner = SimpleNamespace(
        page_size=page, req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=pool,
        is_draft_worker=False, use_mla_backend=False, kv_cache_dtype=torch.float32,
        model_config=SimpleNamespace(is_encoder_decoder=False), model=Model([layer_of()]),
    )  # fmt: skip
    q = torch.randn(sum(new), H * D, generator=generator)
    return runner, batch, q, torch.cat(k_all), torch.cat(v_all)


class RadixAttention(SimpleNamespace):
    """What we read of SGLang's."""


def layer_of(**changes):
    plain = {
        "layer_id": 0, "tp_q_head_num": H, "tp_k_head_num": HKV, "qk_head_dim": D, "v_head_dim": D,
        "scaling": SCALE, "logit_cap": 0.0, "sliding_window_size": -1, "is_cross_attention": False,
        "attn_type": SimpleNamespace(value="decoder"), "use_irope": False, "xai_temperature_len": -1,
        "pos_encoding_mode": "NONE", "k_scale": None, "v_scale": None,
    }  # fmt: skip
    return RadixAttention(**(plain | changes))


class Model(SimpleNamespace):
    def __init__(self, attention):
        super().__init__(attention=attention)

    def modules(self):
        return [self, *self.attention]


class Stock:
    """Stands for a stock backend: exact attention by the batch that was planned last, in float64."""

    def __init__(self, runner):
        self.runner, self.planned, self.computed = runner, None, []

    def init_forward_metadata(self, batch):
        self.init_forward_metadata_out_graph(batch)

    def init_forward_metadata_out_graph(self, batch, in_capture=False):
        self.planned = batch

    def forward_extend(self, q, k, v, layer, batch, save_kv_cache=True, sinks=None, return_lse=False):
        assert batch is self.planned, "another batch was planned"
        self.computed.append((batch, save_kv_cache))
        pool = self.runner.token_to_kv_pool
        if save_kv_cache:
            pool.set_kv_buffer(layer, batch.out_cache_loc, k, v)
        if k is not None:
            assert torch.equal(pool.k[batch.out_cache_loc], k), "keys of other rows"
        assert len(batch.input_ids) == len(q) == batch.extend_num_tokens == len(batch.positions)
        assert batch.extend_start_loc.tolist() == shared.starts_of(batch.extend_seq_lens_cpu)[:-1]
        assert batch.seq_lens_sum == int(batch.seq_lens.sum()) == int(batch.seq_lens_cpu.sum())
        table, out, begin = self.runner.req_to_token_pool.req_to_token, torch.empty_like(q), 0
        for i, new in enumerate(batch.extend_seq_lens_cpu):
            keys = int(batch.seq_lens[i])
            assert keys == new + batch.extend_prefix_lens_cpu[i]
            slots = table[batch.req_pool_indices[i], :keys].long()
            k_own, v_own = (x[slots].double().repeat_interleave(H // HKV, 1) for x in (pool.k, pool.v))
            rows = slice(begin, begin + new)
            scores = torch.einsum("qhd,khd->hqk", q[rows].view(new, H, D).double(), k_own) * layer.scaling
            hidden = torch.ones(new, keys, dtype=torch.bool).triu(keys - new + 1)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, v_own).to(q.dtype).flatten(1)
            begin += new
        return out


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """The three of SGLang's modules that a backend imports."""
    split = SimpleNamespace(ranks=False)
    write = SimpleNamespace(for_layer=lambda batch, layer: batch.out_cache_loc)
    contents = {
        "sglang.srt.mem_cache.memory_pool": {"KVWriteLoc": write},
        "sglang.srt.layers.cp.utils": {"is_cp_active": lambda batch: split.ranks},
        "sglang.srt.layers.radix_attention": {"RadixAttention": RadixAttention},
    }
    for name, members in contents.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(host, "_said", set())
    monkeypatch.setattr(host, "announced", False)
    hooks.remember([], [], [])
    return split


def wanted(policy, **more):
    return options.of_value(json.loads(plugin.config(policy, **more)[options.VARIABLE]))


def backends_of(runner, policy, **more):
    made = []

    def make():
        made.append(Stock(runner))
        return made[-1]

    first = make()
    backend.extend(first, make, runner, wanted(policy, **more))
    return first, made


def compute(one, batch, q, k, v, layer=None, **keywords):
    one.init_forward_metadata(batch)
    return one.forward_extend(q, k.clone(), v.clone(), layer or layer_of(), batch, **keywords)


def stock_answer(requests, page=1):
    runner, batch, q, k, v = world(requests, page)
    return compute(Stock(runner), batch, q, k, v)


class Fp8Pool:
    """A pool in FP8: k and v are what it stands for."""

    def __init__(self, pool, scale):
        self.scale = 1.0 if scale is None else scale
        self.stored = [self._stored(x) for x in (pool.k, pool.v)]

    k, v = (property(lambda self, i=i: self.get_kv_buffer(0)[i].float() * self.scale) for i in (0, 1))

    def _stored(self, x):
        return (x / self.scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)

    def get_kv_buffer(self, layer):
        return tuple(x.view(torch.float8_e4m3fn) for x in self.stored)

    def set_kv_buffer(self, layer, where, k, v, k_scale=None, v_scale=None):
        assert (1.0 if k_scale is None else k_scale) == (1.0 if v_scale is None else v_scale) == self.scale
        for store, x in zip(self.stored, (k, v), strict=True):
            store[where] = self._stored(x)


@pytest.mark.parametrize("scale", [None, torch.tensor(0.02)], ids=["none", "tensor"])
def test_an_fp8_pool(scale):
    """Keys and values in FP8 by the layer's scales, of which there may be none."""
    runner, batch, q, k, v = world(BATCHES["one-shot"], 16)
    runner.token_to_kv_pool = Fp8Pool(runner.token_to_kv_pool, scale)
    runner.kv_cache_dtype = torch.float8_e4m3fn
    one, made = backends_of(runner, fp.Dense())
    layer = layer_of(k_scale=scale, v_scale=scale)
    output = compute(one, batch, q, k, v, layer)
    assert not any(stock.computed for stock in made)
    stock = Stock(runner)
    stock.init_forward_metadata(batch)
    expected = stock.forward_extend(q, None, None, layer, batch, False)
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("page", [1, 16, 64, 128])
@pytest.mark.parametrize("name", BATCHES)
def test_all_kept_is_what_the_engine_computes(name, page):
    expected = stock_answer(BATCHES[name], page)
    for policy in (fp.Dense(), fp.FlashPrefill(alpha=0.0, **TINY)):
        runner, batch, q, k, v = world(BATCHES[name], page)
        one, made = backends_of(runner, policy)
        assert isinstance(one, Stock) and type(one).__name__ == "FlashPrefillStock"
        output = compute(one, batch, q, k, v)
        torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-5)
        assert not one.computed, "the first instance computes nothing of a batch that has sparse rows"
        assert len(made) == 1 + any(new < 128 for new, _ in BATCHES[name])
        assert torch.equal(runner.token_to_kv_pool.k[batch.out_cache_loc], k)


def test_a_pool_with_heads_before_tokens():
    runner, batch, q, k, v = world(BATCHES["two"], 16, hnd=True)
    one, _ = backends_of(runner, fp.Dense())
    torch.testing.assert_close(
        compute(one, batch, q, k, v), stock_answer(BATCHES["two"], 16), atol=2e-5, rtol=1e-5
    )


def test_pages_of_strided_slots():
    """A pool whose layers lie in one tensor: slots are far apart, also with pages of one."""
    memory = torch.randn(96, 3, 2, HKV * D)
    for page in (1, 16):
        pages = caches.slot_pages(memory[:, 1, 0], page, HKV, D)
        assert pages.shape == (96 // page, page, HKV, D)
        assert pages.stride(1) == memory.stride(0) and pages.stride(0) == page * memory.stride(0)
        assert torch.equal(pages.flatten(0, 1), memory[:, 1, 0].view(96, HKV, D))


def test_what_is_left_to_the_engine():
    runner, batch, q, k, v = world(BATCHES["scattered"], 16, "MIXED")
    one, made = backends_of(runner, fp.Dense())
    before = plugin.snapshot()
    hooks.remember(batch.rids, [False, True, True, True, True, False, True], [True] * 7)
    compute(one, batch, q, k, v)
    ((part, saved),) = made[1].computed
    assert not saved
    assert part.rids == ["r0", "r2", "r5"] and part.batch_size == 3
    assert part.extend_seq_lens_cpu == [1, 40, 1] and part.extend_prefix_lens_cpu == [410, 360, 700]
    assert part.kv_loc_plan is None and batch.kv_loc_plan is not None
    assert batch.batch_size == 7 and len(batch.out_cache_loc) == len(q), "the batch itself is left alone"
    after = plugin.snapshot()
    assert after["dense_rows"]["decode"] - before["dense_rows"].get("decode", 0) == 2
    assert after["dense_rows"]["short"] - before["dense_rows"].get("short", 0) == 40
    assert after["sparse_rows"] - before["sparse_rows"] == len(q) - 42
    assert after["calls"] - before["calls"] == 3, "neighbours go in one call"
    compute(one, batch, q, k, v)
    assert len(made) == 2, "the second instance is made once"


def test_the_dense_tail_is_the_last_chunks():
    policy = fp.FlashPrefill(alpha=1.0, **TINY)
    seen = []
    for known in ([True, False], [False, True], None):
        runner, batch, q, k, v = world(BATCHES["two"])
        one, _ = backends_of(runner, policy)
        if known is not None:
            hooks.remember(batch.rids, [True, True], known)
        else:
            hooks.remember(["others"], [True], [False])
            batch.orig_seq_lens[0] += 1  # more of that prompt is to come
        seen.append(compute(one, batch, q, k, v))
        (call,) = one.flashprefill.plan.calls
        assert call.span.final == (known or [False, True])
    assert not torch.allclose(seen[0], seen[1]), "a tail that makes no difference tests nothing"
    assert torch.equal(seen[1], seen[2])


def note(reqs, mode="EXTEND", decoding=None, draft=False, rids=None):
    batch = SimpleNamespace(forward_mode=Mode(name=mode), reqs=reqs, decoding_reqs=decoding)
    ids = [r.rid for r in reqs] if rids is None else rids
    result = SimpleNamespace(rids=ids, batch_size=len(reqs), input_ids=torch.arange(5))
    hooks.note_batch(result, object, batch, SimpleNamespace(is_draft_worker=draft))


def test_notes(monkeypatch):
    def request(rid, end, length):
        return SimpleNamespace(rid=rid, extend_end=end, full_untruncated_fill_ids=[0] * length)

    a, b, c = request("a", 512, 2000), request("b", 600, 600), request("c", 700, 700)
    note([a, b])
    assert hooks.requests_of(["a", "b"]) is None, "turned off, nothing is noted"
    monkeypatch.setattr(hooks, "options", wanted(fp.Dense()))
    note([a, b, c], "MIXED", decoding=[c])
    assert hooks.requests_of(["a", "b", "c"]) == ([True, True, False], [False, True, True])
    assert hooks.requests_of(["a", "b"]) is None
    before = plugin.snapshot()["dense_rows"]
    note([a, b], "DECODE")
    note([a, b], "TARGET_VERIFY")
    note([a, b], "DECODE", draft=True)
    note([a], draft=True)
    assert hooks.requests_of(["a", "b", "c"]) is not None, "drafts are not ours"
    after = plugin.snapshot()["dense_rows"]
    assert after["decode"] - before.get("decode", 0) == 2
    assert after["speculative"] - before.get("speculative", 0) == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forward_mode", Mode(name="TARGET_VERIFY")),
        ("forward_mode", Mode(name="SPLIT_PREFILL")),
        ("forward_mode", Mode(name="DRAFT_EXTEND_V2")),
        ("forward_mode", Mode(name="DLLM_EXTEND")),
        ("rids", None),
        ("encoder_lens", torch.tensor([3])),
        ("multi_item_delimiter_indices", [torch.tensor([3])]),
        ("dcp_kv_mask", torch.tensor([True])),
        ("encoder_swa_replay", True),
        ("extend_prefix_lens_cpu", None),
    ],
)
def test_batches_that_are_not_plain_are_the_engines(name, value):
    runner, batch, *_ = world(BATCHES["one-shot"])
    one, _ = backends_of(runner, fp.Dense())
    one.init_forward_metadata(batch)
    assert one.flashprefill.plan is not None
    setattr(batch, name, value)
    one.init_forward_metadata(batch)
    assert one.flashprefill.plan is None and one.planned is batch


def test_context_parallel_batches_are_the_engines(modules, caplog):
    modules.ranks = True
    runner, batch, q, k, v = world(BATCHES["one-shot"])
    one, _ = backends_of(runner, fp.Dense())
    with caplog.at_level(logging.WARNING, "sglang.flashprefill"):
        for _ in range(2):
            compute(one, batch, q, k, v)
    assert len(one.computed) == 2
    assert len([r for r in caplog.records if "context parallelism" in r.message]) == 1


def test_graphs_that_hold_attention_are_the_engines():
    """A plan is never left over from the batch before."""
    runner, batch, q, k, v = world(BATCHES["one-shot"])
    one, _ = backends_of(runner, fp.Dense())
    one.init_forward_metadata(batch)
    one.init_forward_metadata_out_graph(batch, in_capture=True)
    one.forward_extend(q, k, v, layer_of(), batch)
    assert one.computed == [(batch, True)]


@pytest.mark.parametrize(
    ("layer", "keywords"),
    [
        ({"layer_id": 1}, {}),
        ({"layer_id": 5, "logit_cap": 30.0}, {}),
        ({"layer_id": 5}, {"sinks": torch.ones(H)}),
    ],
)
def test_layers_that_are_not_plain_are_the_engines(layer, keywords, caplog):
    runner, batch, q, k, v = world(BATCHES["scattered"])
    runner.model.attention.append(layer_of(layer_id=5))
    one, made = backends_of(runner, fp.Dense(), first_dense_layers=2)
    compute(one, batch, q, k, v, layer_of(**layer), **keywords)
    assert one.computed == [(batch, True)] and not made[1].computed
    assert ("computed with sinks stay dense" in caplog.text) == bool(keywords)
    compute(one, batch, q, k, v, layer_of(layer_id=7), return_lse=False)
    assert len(one.computed) == 1 and made[1].computed


def test_where_the_engine_wants_its_result():
    """Between pieces of a prefill graph attention writes into the graph's buffer."""
    runner, batch, q, k, v = world(BATCHES["scattered"])
    one, _ = backends_of(runner, fp.Dense())
    batch._attn_output = torch.zeros_like(q)
    output = compute(one, batch, q, k, v)
    assert output.data_ptr() == batch._attn_output.data_ptr()
    torch.testing.assert_close(output, stock_answer(BATCHES["scattered"]), atol=2e-5, rtol=1e-5)


def test_queries_among_keys_and_values():
    """q is often a part of the rows of one projection."""
    runner, batch, q, k, v = world(BATCHES["scattered"])
    one, _ = backends_of(runner, fp.Dense())
    projected = torch.cat((q, k.flatten(1), v.flatten(1)), 1)
    parts = projected.split((H * D, HKV * D, HKV * D), 1)
    output = compute(one, batch, parts[0], *(x.unflatten(1, (HKV, D)) for x in parts[1:]))
    torch.testing.assert_close(output, stock_answer(BATCHES["scattered"]), atol=2e-5, rtol=1e-5)


def test_layers_that_read_anothers_cache():
    runner, batch, q, k, v = world(BATCHES["two"])
    runner.token_to_kv_pool.set_kv_buffer(None, batch.out_cache_loc, k, v)
    one, _ = backends_of(runner, fp.Dense())
    one.init_forward_metadata(batch)
    output = one.forward_extend(q, None, None, layer_of(), batch)
    torch.testing.assert_close(output, stock_answer(BATCHES["two"]), atol=2e-5, rtol=1e-5)


def test_a_kernel_that_refuses_leaves_a_dense_engine(monkeypatch, caplog):
    def refuses(*arguments, **keywords):
        raise fp.UnsupportedError("no such thing here")

    monkeypatch.setattr(shared, "PreparedPrefill", refuses)
    runner, batch, q, k, v = world(BATCHES["scattered"])
    one, _ = backends_of(runner, fp.Dense())
    with caplog.at_level(logging.WARNING, "sglang.flashprefill"):
        output = compute(one, batch, q, k, v)
    assert one.computed == [(batch, False)], "keys and values are written once"
    torch.testing.assert_close(output, stock_answer(BATCHES["scattered"]), atol=1e-6, rtol=1e-6)
    assert "no such thing here" in caplog.text
    assert plugin.snapshot()["fallbacks"]["no such thing here"] >= 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"sliding_window_size": None}, ""),
        ({"sliding_window_size": 1023}, "sliding window"),
        ({"logit_cap": 50.0}, "softcapping"),
        ({"is_cross_attention": True}, "decoder"),
        ({"attn_type": SimpleNamespace(value="encoder_only")}, "decoder"),
        ({"attn_type": SimpleNamespace(value="decoder_bidirectional")}, "decoder"),
        ({"use_irope": True}, "chunks"),
        ({"xai_temperature_len": 1024}, "temperature"),
        ({"pos_encoding_mode": "ALIBI"}, "ALIBI"),
        ({"v_head_dim": 128}, "head_dim"),
    ],
)
def test_why_dense(change, reason):
    why = layers.why_dense(layer_of(**change))
    assert (reason in why) if reason else not why


@pytest.mark.parametrize(
    ("change", "of_backend", "reason"),
    [
        ({"use_mla_backend": True}, {}, "MLA"),
        ({"kv_cache_dtype": torch.float8_e5m2}, {}, "float8"),
        ({"model_config": SimpleNamespace(is_encoder_decoder=True)}, {}, "encoder"),
        ({"kv_index_translator": SimpleNamespace(is_translating=True)}, {}, "unified memory"),
        ({}, {"_kv_shard_pool": object()}, "split over GPUs"),
        ({}, {"dcp_size": 2}, "split over GPUs"),
        ({}, {"fa_skip_kv_cache": True}, "embedding"),
        ({"model": Model([layer_of(sliding_window_size=7)])}, {}, "sliding window"),
    ],
)
def test_models_that_stay_dense(change, of_backend, reason, caplog):
    runner, *_ = world(BATCHES["one-shot"])
    vars(runner).update(change)
    one = Stock(runner)
    vars(one).update(of_backend)
    with caplog.at_level(logging.WARNING, "sglang.flashprefill"):
        backend.extend(one, None, runner, wanted(fp.Dense()))
    assert type(one) is Stock and host.announced
    assert reason in caplog.text


def test_factories(monkeypatch):
    runner, *_ = world(BATCHES["one-shot"])
    make = plugin.around("fa3", Stock, wanted(fp.Dense()))
    assert type(make(runner)).__mro__[1] is Stock and make(runner).flashprefill.make() is not None
    runner.is_draft_worker = True
    assert type(make(runner)) is Stock
    runner.is_draft_worker = False
    with pytest.raises(ValueError, match="alpha is -1"):
        plugin.around("fa3", Stock, ValueError("alpha is -1"))(runner)


def test_an_unknown_backend(caplog):
    result = SimpleNamespace(prefill_attention_backend_str="fa4", decode_attention_backend_str="fa4")
    keywords = {"model_runner": SimpleNamespace(is_draft_worker=False)}
    with caplog.at_level(logging.WARNING, "sglang.flashprefill"):
        hooks.warn_if_unused(result, **keywords)
    assert "does not extend the attention backend fa4" in caplog.text


def test_statistics_for_the_servers_information():
    result = SimpleNamespace(internal_state={})
    hooks.add_statistics(result)
    assert result.internal_state["flashprefill"] == plugin.snapshot()
    json.dumps(result.internal_state)


@pytest.mark.parametrize("text", ["1", "true", "flashprefill", "{}", '{"policy": "flashprefill"}'])
def test_ways_to_turn_it_on(text, monkeypatch):
    monkeypatch.setenv(options.VARIABLE, text)
    assert options.of_environment().policy == fp.FlashPrefill()


@pytest.mark.parametrize("text", ["", " ", "0", "false", "off", "False"])
def test_ways_to_leave_it_off(text, monkeypatch):
    monkeypatch.setenv(options.VARIABLE, text)
    assert options.of_environment() is None
    monkeypatch.delenv(options.VARIABLE)
    assert options.of_environment() is None
    plugin.register()  # touches nothing, so needs no engine


def test_options_survive_the_way(monkeypatch):
    for policy in (fp.Sketch(mass=0.9), fp.Gather(budget=0.1), fp.FlashPrefill(query_pool=16), fp.Dense()):
        given = plugin.config(policy, first_dense_layers=2, min_chunk=256, log_seconds=0.5, guard=fp.Guard())
        monkeypatch.setenv(options.VARIABLE, given[options.VARIABLE])
        asked = options.of_environment()
        assert (asked.policy, asked.first_dense_layers, asked.min_chunk) == (policy, 2, 256)
        assert asked.guard == fp.Guard()


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"alpha": 1}', "option"), ("{", "JSON"), ("flush", "one of"), ('{"min_chunk": 0}', "at least 1")],
)
def test_mistakes_are_named(text, words, monkeypatch):
    monkeypatch.setenv(options.VARIABLE, text)
    with pytest.raises((ValueError, TypeError), match=words):
        options.of_environment()


def test_batches_of_warm_ups_are_not_counted():
    runner, batch, *_ = world(BATCHES["one-shot"])
    batch.rids = None
    before = plugin.snapshot()
    assert batches.plan_of(batch, None, 1, wanted(fp.Dense())) is None
    assert plugin.snapshot() == before

"""What only torch has: compiled graphs, grad mode, threads, memory."""

import pathlib
import re

import pytest
import torch

import flashprefill as fp
from flashprefill import torch_op  # noqa: F401  (registers the operators)
from oracle import tensors

FREE = {"sink_blocks": 0, "window_blocks": 0, "dense_tail_blocks": 0}
POLICY = fp.FlashPrefill(alpha=0.97, block_size=16, sink_blocks=1, window_blocks=1, dense_tail_blocks=1)


def verbs(q, k, v, policy):
    out, lse, stats = fp.prefill_attention(q, k, v, policy, return_lse=True, return_stats=True)
    mask = fp.select(q, k, policy)
    again, again_lse = fp.attend(q.clone(), k, v, mask, return_lse=True)
    return out * 2, again + 1, lse, again_lse, stats, mask


@pytest.mark.parametrize(
    "compiler,dynamic,lengths",
    [("aot_eager", False, (200, 333)), ("aot_eager", True, (200, 333)), ("inductor", False, (200,))],
)
def test_compile_passes_over_all_verbs(compiler, dynamic, lengths):
    torch._dynamo.reset()
    compiled = torch.compile(verbs, fullgraph=True, backend=compiler, dynamic=dynamic)
    for tokens in lengths:
        q, k, v = tensors(tokens, (1, tokens, 4, 16), (1, tokens, 2, 16))
        actual, expected = compiled(q, k, v, POLICY), verbs(q, k, v, POLICY)
        for a, b in zip(actual[:4], expected[:4], strict=True):
            assert torch.equal(a, b)
        assert torch.equal(actual[4].kept, expected[4].kept) and repr(actual[4]) == repr(expected[4])
        assert torch.equal(actual[5].dense(), expected[5].dense())


@pytest.mark.parametrize("layout", ["packed", "paged"])
def test_compile_with_index_tensors(layout):
    torch._dynamo.reset()
    q, k, v = tensors(1, (150, 4, 16), (192, 2, 16))
    lens = {"cu_seqlens_q": torch.tensor([0, 50, 150]), "cu_seqlens_k": torch.tensor([0, 64, 192])}
    if layout == "paged":
        k, v = k.view(12, 16, 2, 16), v.view(12, 16, 2, 16)
        lens["block_table"] = torch.tensor([[3, 1, 5, 7, 0, 0, 0, 0], [11, 2, 4, 6, 8, 10, 0, 9]])

    def run(q, k, v, lens):
        policy = fp.Sketch(mass=0.7, block_size=16, window_blocks=1)  # made inside the graph
        out, lse = fp.prefill_attention(q, k, v, policy, return_lse=True, final_chunk=[True, False], **lens)
        mask = fp.select(q, k, policy, max_seqlen_q=100, max_seqlen_k=128, **lens)
        return out, lse, fp.attend(q, k, v, mask, **lens)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, v, lens), run(q, k, v, lens), strict=True):
        assert torch.equal(a, b)


def test_lengths_stay_symbols():
    """With max_seqlen given, prompts of new lengths take the old graph."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def run(q, k, cu, longest):
        lens = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
        mask = fp.select(q, k, POLICY, max_seqlen_q=longest, max_seqlen_k=longest, **lens)
        return fp.attend(q, k, k, mask, **lens)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=count, dynamic=True)
    for tokens in (100, 150, 333):
        q, k, _ = tensors(tokens, (tokens, 4, 16), (tokens, 2, 16))
        arguments = q, k, torch.tensor([0, tokens // 3, tokens]), tokens - tokens // 3
        assert torch.equal(compiled(*arguments), run(*arguments))
    assert len(graphs) == 1


def test_masks_made_inside_a_graph():
    def run(q, k, keep):
        return fp.attend(q, k, k, fp.BlockMask.from_dense(keep, q_len=256, k_len=256, block_size=64))

    torch._dynamo.reset()
    q, k, _ = tensors(9, (256, 4, 16), (256, 2, 16))
    keep = torch.tensor([[[1, 0, 0, 0], [0, 1, 0, 1]]], dtype=torch.bool).expand(4, -1, -1)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, keep), run(q, k, keep))


def test_compile_into_out():
    torch._dynamo.reset()

    def run(q, k, v, out):
        fp.prefill_attention(q, k, v, POLICY, out=out)
        return out.sum()

    q, k, v = tensors(2, (150, 2, 16), (150, 2, 16))
    out, expected = torch.zeros_like(q), torch.zeros_like(q)
    total = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v, out)
    assert torch.equal(total, run(q, k, v, expected)) and torch.equal(out, expected)


def test_a_policy_is_a_constant_of_the_graph():
    """Another alpha must not reuse the old graph."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, p: fp.select(q, k, p).counts.sum(), fullgraph=True, backend="eager")
    q, k, _ = tensors(3, (300, 2, 16), (300, 2, 16))
    sums = [int(compiled(q, k, fp.FlashPrefill(alpha=a, block_size=16, **FREE))) for a in (0.0, 0.97, 5.0)]
    assert sums[0] > sums[1] > sums[2]


def test_opcheck():
    from flashprefill._calls import ATTEND, PREFILL, SELECT

    ops = torch.ops.flashprefill
    q, k, v = tensors(4, (70, 4, 16), (90, 2, 16))
    results = {"out": torch.zeros_like(q), "lse": torch.zeros(4, 70)}
    given = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "block_table", "k_scale", "v_scale"))
    given |= {"max_seqlen_q": 70, "max_seqlen_k": 90, "softmax_scale": 0.25, "causal": True}
    given |= {"threads": 1, "backend": "reference", "target": None, "math": 0, "final_chunk": [True]}
    mask = {"bits": torch.zeros(4, 1, 1, dtype=torch.int64), "counts": torch.zeros(4, 1).int()}
    mask |= {"fallback": torch.zeros(1).int(), "vertical_slash": None, "key_lists": None, "skipped": None}
    shape = {"tile_tokens": 128, "block_size": 128, "share_heads": False, "mean_correction": 0}
    shape |= {"max_verticals": 0, "segment_tiles": 0, "skip": 0.0}

    def call(verb, **values):
        return verb.pack(q=q, k=k, **{"v": v, **results, **given, **mask, **shape, **values})

    for values in (None, v):
        torch.library.opcheck(ops.select, call(SELECT, v=values, policy=POLICY.text))
    torch.library.opcheck(ops.attend, call(ATTEND))
    torch.library.opcheck(ops.attend, call(ATTEND, skip=0.01, skipped=torch.zeros(4, 1).int()))

    in_tokens = fp.MInference(vertical=30, slash=50, rounding="tokens", block_size=16)
    lines = torch.zeros(1, 4, 82, dtype=torch.int32)
    selects = call(SELECT, v=None, policy=in_tokens.text, vertical_slash=lines)
    torch.library.opcheck(ops.select, selects)
    ops.select(*selects)
    assert lines[0, :, :2].tolist() == [[30, 50]] * 4
    torch.library.opcheck(ops.attend, call(ATTEND, block_size=16, vertical_slash=lines, max_verticals=30))

    for missing in ({}, dict.fromkeys(("lse", *mask))):
        torch.library.opcheck(ops.prefill, call(PREFILL, policy=fp.FlashPrefill().text, **missing))


def test_grad_is_refused():
    q, k, v = tensors(5, (32, 2, 16), (32, 2, 16))
    expected = fp.prefill_attention(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        x.requires_grad_()
        with pytest.raises(ValueError, match=rf"^{name}\.requires_grad is True; it must be False"):
            fp.prefill_attention(q, k, v)
        with torch.no_grad():
            assert torch.equal(expected, fp.prefill_attention(q, k, v))
        with torch.inference_mode():
            assert torch.equal(expected, fp.attend(q, k, v, fp.select(q, k)))
        x.requires_grad_(False)
    assert not fp.prefill_attention(q, k, v).requires_grad


@pytest.mark.parametrize("verb", ["prefill_attention", "select", "attend"])
def test_a_trace_of_torch_jit_is_refused_in_words(verb):
    q, k = torch.randn(40, 4, 16), torch.randn(40, 2, 16)
    mask = fp.select(q, k)
    calls = {
        "prefill_attention": lambda q, k: fp.prefill_attention(q, k, k),
        "select": lambda q, k: fp.select(q, k)._bits,
        "attend": lambda q, k: fp.attend(q, k, k, mask),
    }
    with pytest.raises(fp.UnsupportedError, match="torch.jit.trace.*torch.compile and torch.export"):
        torch.jit.trace(calls[verb], (q, k), check_trace=False)


def test_threads_follow_torch(monkeypatch):
    """The default number of threads is torch's at the time of the call."""
    from flashprefill import _engine

    seen = []
    original = _engine.exec_of

    def spy(*arguments):
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(_engine, "exec_of", spy)
    q, k, v = tensors(6, (32, 2, 16), (32, 2, 16))
    before = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            fp.prefill_attention(q, k, v)
            assert seen[-1].threads == n
    finally:
        torch.set_num_threads(before)
    fp.prefill_attention(q, k, v, threads=2)
    assert seen[-1].threads == 2
    fp.prefill_attention(*(x.numpy() for x in (q, k, v)))
    assert seen[-1].threads == 0


def test_torch_s_openmp_is_the_one_in_use():
    x = torch.randn(300, 2, 16)
    fp.prefill_attention(x, x, x)
    assert "gomp" in fp.thread_runtime() or "omp" in fp.thread_runtime()


def test_tensors_of_other_devices_are_refused():
    x = torch.empty(32, 2, 16, device="meta")
    with pytest.raises(ValueError, match=r"^q\.device is meta; it must be a CPU or a CUDA device"):
        fp.prefill_attention(x, x, x)


def test_lazily_negated_views():
    """torch keeps the sign of such a view next to the data."""
    z = torch.complex(torch.randn(40, 2, 16), torch.randn(40, 2, 16))
    q = z.conj().imag
    k = torch.randn(40, 2, 16)
    assert q.is_neg()
    out = fp.prefill_attention(q, k, k)
    assert torch.equal(out, fp.prefill_attention(q.resolve_neg(), k, k))


def advised_large(address):
    """Whether the kernel was asked for large pages where this address lies."""
    found = None
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(match[1], 16) <= address < int(match[2], 16)
        elif found and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds this address")


@pytest.mark.skipif(
    not pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs a Linux with large pages"
)
def test_large_outputs_lie_in_large_pages():
    middle = 4 << 20
    x = torch.randn(4096, 8, 64)  # 8 MiB
    assert advised_large(fp.prefill_attention(x, x, x).data_ptr() + middle)
    given = torch.empty_like(x)
    asked_before = advised_large(given.data_ptr() + middle)
    fp.prefill_attention(x, x, x, out=given)
    assert advised_large(given.data_ptr() + middle) == asked_before, "memory of the caller is left as it is"

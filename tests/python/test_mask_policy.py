"""MaskPolicy: a selection that is a Python function, wherever policies are taken."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flashprefill as fp
from flashprefill import cli
from flashprefill.apps.errors import UsageError
from flashprefill.apps.lab import lines
from flashprefill.apps.spec import parse_policy
from flashprefill.vllm import options
from oracle import tensors

QUERIES, KEYS = 300, 700
PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-method.md"


def everything(layer, q, k):
    """Keep all blocks."""
    return np.ones((1, -(-len(q) // 128), -(-len(k) // 128)), bool)


def nothing(tile_tokens):
    """Return a function that keeps no block, for tiles of so many tokens."""
    return lambda layer, q, k: torch.zeros(1, -(-len(q) // tile_tokens), -(-len(k) // 128)).bool()


def streaming(sinks, window, block_size=128):
    """Return fp.Streaming's rule, written with NumPy."""

    def keep(layer, q, k):
        tiles, blocks = -(-len(q) // 128), -(-len(k) // block_size)
        first = len(k) - len(q) + 128 * np.arange(tiles)[:, None]  # position of a tile's first query
        last = np.minimum(first + 127, len(k) - 1)
        block = np.arange(blocks)[None, :]
        near = (block > first // block_size - window) & (block <= last // block_size)
        return np.broadcast_to(near | (block < sinks), (q.shape[1], tiles, blocks))

    return keep


def arrays(library, *lead):
    q, k, v = tensors(1, (*lead, QUERIES, 4, 16), (*lead, KEYS, 2, 16))
    return (q, k, v) if library == "torch" else tuple(x.numpy() for x in (q, k, v))


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_keeping_everything_is_dense(library):
    q, k, v = arrays(library)
    policy = fp.MaskPolicy(everything)
    out, lse, stats = fp.prefill_attention(q, k, v, policy, return_lse=True, return_stats=True)
    expected, expected_lse = fp.prefill_attention(q, k, v, fp.Dense(), return_lse=True)
    assert np.array_equal(out, expected) and np.array_equal(lse, expected_lse)
    assert stats.mean_density == 1.0 and stats.reasons == ["selected"]


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("block_size", [64, 128])
def test_streaming_s_rule_gives_streaming_s_bits(library, block_size):
    q, k, v = arrays(library, 2)
    mine = fp.MaskPolicy(streaming(1, 2, block_size), block_size=block_size)
    theirs = fp.Streaming(1, 2, 0, block_size=block_size)
    ours, expected = fp.select(q, k, mine), fp.select(q, k, theirs)
    for name in ("bits", "counts", "fallback"):
        assert np.array_equal(getattr(ours, name), getattr(expected, name)), name
    (out, stats), (wanted, _) = (
        fp.prefill_attention(q, k, v, policy, return_stats=True) for policy in (mine, theirs)
    )
    assert np.array_equal(out, wanted) and 0 < stats.mean_density < 1


@pytest.mark.parametrize("forced", [(0, 0, 0), (1, 2, 1)])
@pytest.mark.parametrize("shared", [False, True])
def test_forced_blocks_are_joined(forced, shared):
    """The diagonal always, others as asked: what Streaming keeps."""
    q, k, _ = arrays("torch")
    fields = dict(zip(("sink_blocks", "window_blocks", "dense_tail_blocks"), forced, strict=True))
    fields |= {"share_heads": shared, "mean_correction": shared}
    mask = fp.select(q, k, fp.MaskPolicy(nothing(64 if shared else 128), **fields))
    expected = fp.select(q, k, fp.Streaming(**fields))
    assert torch.equal(mask.bits, expected.bits) and torch.equal(mask.counts, expected.counts)
    assert (mask.share_heads, mask.mean_correction) == (shared, shared)
    assert mask.density == expected.density


def test_what_the_function_gets():
    """One sequence at a time, whole or packed, padded or paged, with all its keys."""
    calls = []

    def note(layer, q, k):
        calls.append((layer, q.clone(), k.clone()))
        return everything(layer, q, k)

    policy = fp.MaskPolicy(note, layer=7)
    q, k, v = tensors(2, (150, 4, 16), (192, 2, 16))
    lens = {"cu_seqlens_q": torch.tensor([0, 50, 50, 150]), "cu_seqlens_k": torch.tensor([0, 64, 64, 192])}
    expected = fp.prefill_attention(q, k, v, fp.Dense(), **lens)
    assert torch.equal(fp.prefill_attention(q, k, v, policy, **lens), expected)
    assert [layer for layer, _, _ in calls] == [7, 7]  # the empty sequence is not asked for
    for (_, own_q, own_k), q_part, k_part in zip(calls, (q[:50], q[50:]), (k[:64], k[64:]), strict=True):
        assert torch.equal(own_q, q_part) and torch.equal(own_k, k_part)

    pages = torch.tensor([[3, 1, 5, 7, 0, 0, 0, 0], [11, 2, 4, 6, 8, 10, 0, 9]])
    k_pages, v_pages = torch.zeros(2, 12, 16, 2, 16)
    for row, begin, count in ((0, 0, 4), (1, 64, 8)):
        for x, pool in ((k, k_pages), (v, v_pages)):
            pool[pages[row, :count]] = x[begin : begin + 16 * count].view(count, 16, 2, 16)
    calls.clear()
    paged = {"cu_seqlens_q": torch.tensor([0, 50, 150]), "seqused_k": torch.tensor([64, 128])}
    out = fp.prefill_attention(q, k_pages, v_pages, policy, block_table=pages, **paged)
    torch.testing.assert_close(out, expected)
    assert torch.equal(calls[0][2], k[:64]) and torch.equal(calls[1][2], k[64:])

    calls.clear()
    batch = [x.view(2, -1, *x.shape[1:]) for x in (q, k, v)]
    fp.prefill_attention(*batch, policy, seqused_k=[75, 90])
    assert [tuple(own.shape) for _, _, own in calls] == [(75, 2, 16), (90, 2, 16)]
    assert torch.equal(calls[1][2], batch[1][1, :90])


def test_masks_of_other_policies():
    """A function may call select, and change what it gets."""
    q, k, v = arrays("torch")
    best = fp.FlashPrefill(alpha=0.9, sink_blocks=0, window_blocks=0, dense_tail_blocks=0)
    same = fp.MaskPolicy(lambda layer, q, k: fp.select(q, k, best))
    assert torch.equal(fp.select(q, k, same).bits, fp.select(q, k, best).bits)
    with fp.collect_timings() as timings:
        fp.prefill_attention(q, k, v, same)
    assert timings.select_seconds > 0 and timings.attend_seconds > 0
    shorter = fp.MaskPolicy(lambda layer, q, k: fp.select(q[1:], k, best))
    with pytest.raises(ValueError, match=r"<lambda>'s result is BlockMask\(.*; it must be a BlockMask of 1 "):
        fp.select(q, k, shorter)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (
            np.ones((1, 3, 5), bool),
            ValueError,
            r"shape is \(1, 3, 5\); it must be \(4 or 1, 3, 6\): heads, t",
        ),
        (
            np.ones((3, 3, 6), bool),
            ValueError,
            r"shape is \(3, 3, 6\); it must be \(4 or 1, 3, 6\): heads, t",
        ),
        (np.ones((3, 6), bool), ValueError, r"shape is \(3, 6\); it must be \(4 or 1, 3, 6\): heads, tiles "),
        (np.ones((1, 3, 6)), TypeError, r".*dtype is float64; it must be bool"),
        (torch.ones(1, 3, 6), TypeError, r".*dtype is torch.float32; it must be torch.bool"),
        (
            None,
            TypeError,
            r".*is a NoneType; it must be bools, as a NumPy array or a torch tensor, or a Block",
        ),
    ],
)
def test_results_that_are_refused(result, error, message):
    def choose(layer, q, k):
        return result

    q, k, v = arrays("torch")
    out = torch.full_like(q, 7.0)
    with pytest.raises(
        error, match=rf"^{test_results_that_are_refused.__name__}.*choose.*{message}"
    ) as caught:
        fp.prefill_attention(q, k, v, fp.MaskPolicy(choose), out=out)
    assert "\n" not in str(caught.value) and isinstance(caught.value, fp.FlashPrefillError)
    assert (out == 7.0).all()


def test_fields_that_are_refused():
    with pytest.raises(TypeError, match=r"^function is 3; it must be a function of \(layer, q, k\)"):
        fp.MaskPolicy(3)
    with pytest.raises(ValueError, match=r"^block_size is 100; it must be"):
        fp.MaskPolicy(everything, block_size=100)
    q, k, v = arrays("torch")
    with pytest.raises(ValueError, match="causal is 0; it must be 1"):
        fp.prefill_attention(q, k, v, fp.MaskPolicy(everything), causal=False)


def test_as_text():
    policy = fp.MaskPolicy(everything, block_size=64, sink_blocks=1)
    assert policy.text == f"{__name__}:everything(block_size=64, sink_blocks=1)"
    assert parse_policy(policy.text) == policy and parse_policy(f"{__name__}:everything").block_size == 128
    assert repr(policy) == policy.text and pickle.loads(pickle.dumps(policy)) == policy
    q, k, v = arrays("torch")
    assert torch.equal(
        fp.prefill_attention(q, k, v, f"{__name__}:everything"), fp.prefill_attention(q, k, v, "dense")
    )
    asked = options.of_config(options.config(policy))
    assert asked is not None and asked.policy == policy
    line = lines.methods([f"{__name__}:everything"])[-1]
    assert line.policy(None, {"sink_blocks": 2}) == fp.MaskPolicy(everything, sink_blocks=2)
    for text, message in {
        "no_such_module:f": "No module named",
        f"{__name__}:no_such_function": "has no attribute",
        f"{__name__}:everything(blocks=1)": "blocks is unknown; MaskPolicy takes block_size, sink_blocks",
    }.items():
        with pytest.raises(UsageError, match=message):
            parse_policy(text)


def test_graphs_are_left_for_the_call():
    torch._dynamo.reset()
    q, k, v = arrays("torch")
    policy = fp.MaskPolicy(streaming(1, 2))

    def run(q, k, v):
        return fp.prefill_attention(q * 2, k, v, policy) + 1

    assert torch.equal(torch.compile(run, backend="eager")(q, k, v), run(q, k, v))


@pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")
def test_the_prototype_of_the_documentation(tmp_path):
    """docs/add-a-method.md's section 0 runs, and is read by its name."""
    code = re.search(r"^`prototype.py`, a new file:\n```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)[1]
    (tmp_path / "prototype.py").write_text(code)
    done = subprocess.run([sys.executable, "prototype.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "mean error" in done.stdout, done.stderr
    read = "from flashprefill.apps.spec import parse_policy as p; print(p('prototype:loud(block_size=64)'))"
    done = subprocess.run([sys.executable, "-c", read], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "prototype:loud(block_size=64)", done.stderr


# -------------------------------------------------------------------- models


def test_in_a_model():
    """By layer, padded and in chunks: each call is one sequence's rows and all its keys."""
    transformers_models = pytest.importorskip("transformers_models")
    model, ids = transformers_models.make("llama"), transformers_models.tokens()
    wanted = transformers_models.logits(model, ids)
    calls = []

    def note(layer, q, k):
        calls.append((layer, *q.shape[:2], *k.shape[:2]))
        return everything(layer, q, k)

    fp.patch_model(model, fp.MaskPolicy(note))
    with fp.collect_stats(model) as stats:
        torch.testing.assert_close(transformers_models.logits(model, ids), wanted, atol=1e-4, rtol=1e-4)
    length = ids.shape[1]
    assert calls == [(layer, length, 4, length, 2) for layer in (0, 1) for _ in range(len(ids))]
    assert stats.sparse_calls == 2 and stats.density.tolist() == [[1.0] * 4] * 2

    calls.clear()
    fp.patch_model(model, {1: fp.MaskPolicy(note)})
    transformers_models.logits(model, ids)
    assert {call[0] for call in calls} == {1}

    calls.clear()
    padding = torch.ones_like(ids)
    padding[-1, :60] = 0
    transformers_models.logits(model, ids, attention_mask=padding)
    assert calls[-1] == (1, length - 60, 4, length - 60, 2)

    calls.clear()
    dense = fp.unpatch_model(model).generate(ids, max_new_tokens=3, do_sample=False)
    fp.patch_model(model, fp.MaskPolicy(note))
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), dense)
    assert len(calls) == 2 * len(ids)  # the prompt alone; new tokens are dense
    calls.clear()
    model.generate(ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=150)
    assert (1, length - 150, 4, length, 2) in calls
    fp.unpatch_model(model)


@pytest.mark.parametrize(
    "command",
    [
        ["demo", "--policy", "FUNCTION", "--tokens", "700", "--repeats", "1"],
        ["try", "--policy", "FUNCTION", "--tokens", "700", "--depth", "0.5"],
        ["lab", "--method", "FUNCTION", "--quick", "--no-studies", "--text", "gpl"],
    ],
    ids=lambda command: command[0],
)
def test_on_the_command_line(command, model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    function = f"{__name__}:everything"
    out = tmp_path / ("out.json" if command[0] == "try" else "out")
    command = [part.replace("FUNCTION", function) for part in command]
    code = cli.main([*command, "--model", str(model), "--dtype", "fp32", "--out", str(out)])
    assert code in (0, 1)  # 1: a needle that the small model found by chance
    assert function in capsys.readouterr().out

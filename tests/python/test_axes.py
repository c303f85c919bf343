"""The order of axes: layout="bhtd", the hint where tokens and heads look swapped, calls without tokens."""

import warnings

import numpy as np
import pytest
import torch

import flashprefill as fp


def inputs(library, kv_heads=2):
    """Batches of two prompts, [batch, tokens, heads, head_dim]."""
    q, k, v = fp.example_inputs(700, 4, kv_heads, 32, batch=2)
    return (q, k, v) if library == "numpy" else tuple(map(torch.from_numpy, (q, k, v)))


def swap(x):
    return x.swapaxes(-3, -2)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_bhtd_is_pytorch_s_order(library):
    q, k, v = inputs(library)
    policy = fp.FlashPrefill(dense_tail_blocks=0)
    out, lse = fp.prefill_attention(q, k, v, policy, return_lse=True)
    first, also = fp.prefill_attention(swap(q), swap(k), swap(v), policy, return_lse=True, layout="bhtd")
    assert (swap(first) == out).all() and (also == lse).all() and first.shape == swap(q).shape
    mask = fp.select(swap(q), swap(k), policy, layout="bhtd")
    assert (mask.dense() == fp.select(q, k, policy).dense()).all()
    assert (swap(fp.attend(swap(q), swap(k), swap(v), mask, layout="bhtd")) == out).all()
    given = (np.empty_like if library == "numpy" else torch.empty_like)(first)
    assert fp.prefill_attention(swap(q), swap(k), swap(v), policy, layout="bhtd", out=given) is given
    assert (given == first).all()


def test_bhtd_of_one_sequence_and_under_compile():
    q, k, v = (x[0] for x in inputs("torch"))
    out = fp.prefill_attention(q, k, v)
    assert torch.equal(swap(fp.prefill_attention(swap(q), swap(k), swap(v), layout="bhtd")), out)
    graph = torch.compile(lambda *x: fp.prefill_attention(*x, layout="bhtd"), backend="eager", fullgraph=True)
    assert torch.equal(swap(graph(swap(q), swap(k), swap(v))), out)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_equal_heads_that_look_swapped_are_a_warning(library):
    q, k, v = inputs(library, kv_heads=4)
    with pytest.warns(UserWarning, match=r"heads than tokens.*did you pass \[batch, heads, tokens") as caught:
        fp.prefill_attention(swap(q), swap(k), swap(v))
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"transpose\(0, 1\)"):
        fp.select(swap(q[0]), swap(k[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.prefill_attention(swap(q), swap(k), swap(v), layout="bthd")  # they are right, the caller says
        fp.prefill_attention(q, k, v)
        fp.prefill_attention(q[:, :3], k, v)  # three tokens over a cached prefix
        fp.prefill_attention(q[:, :1], k[:, :1], v[:, :1])


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_no_tokens_are_an_empty_result(library):
    q, k, v = (x[0] for x in inputs(library))
    for keys in (0, 5):
        out, lse = fp.prefill_attention(q[:0], k[:keys], v[:keys], return_lse=True)
        assert out.shape == (0, 4, 32) and lse.shape == (4, 0)
    assert fp.attend(q[:0], k[:0], v[:0], fp.select(q[:0], k[:0])).shape == (0, 4, 32)


def test_example_inputs_have_structure():
    q, k, v = fp.example_inputs(4096, 4, 2, 32)
    assert q.shape == (4096, 4, 32) and k.shape == v.shape == (4096, 2, 32) and q.dtype == np.float32
    kept, whole = (fp.select(x, k, fp.FlashPrefill()).density for x in (q, v.repeat(2, 1)))
    assert kept < 0.6 < 0.9 < whole
    again = fp.example_inputs(4096, 4, 2, 32, dtype=torch.bfloat16)
    assert again[0].dtype == torch.bfloat16 and torch.equal(again[0], torch.from_numpy(q).bfloat16())
    assert not np.array_equal(fp.example_inputs(4096, 4, 2, 32, seed=1)[0], q)
    batch = fp.example_inputs(300, 4, 2, 32, batch=2)
    assert [x.shape for x in batch] == [(2, 300, 4, 32), (2, 300, 2, 32), (2, 300, 2, 32)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "tokens is 0"),
        ((9, 3, 2), "heads is 3; it must be a multiple of kv_heads"),
        (("4K",), "tokens is '4K'"),
    ],
)
def test_example_inputs_refuse(arguments, message):
    with pytest.raises(fp.FlashPrefillError, match=message):
        fp.example_inputs(*arguments)

"""Bad input: each kind is refused with one line that names the argument, and nothing is written.

A row is a change to a good call: the keyword arguments to replace, the exception, and the beginning of its message.
Every row runs on torch tensors, and with NumPy arrays where it makes sense there; `out` must stay as it was.
"""

import math
import re

import numpy as np
import pytest
import torch

import flashprefill as fp

Q = torch.linspace(-1, 1, 60 * 4 * 16).view(60, 4, 16)
KV = torch.linspace(-2, 2, 60 * 2 * 16).view(60, 2, 16)
PAGES = torch.zeros(8, 16, 2, 16)
PACKED = {"cu_seqlens_q": [0, 20, 60], "cu_seqlens_k": [0, 20, 60]}
PAGED = {"k": PAGES, "v": PAGES, "cu_seqlens_q": [0, 20, 60], "seqused_k": [20, 60]}
TABLE = [[0, 1, 0, 0], [2, 3, 4, 5]]
BATCH = {"q": Q.view(2, 30, 4, 16), "k": KV.view(2, 30, 2, 16), "v": KV.view(2, 30, 2, 16)}

HEADS_FIRST = {"q": Q[None].transpose(1, 2), "k": KV[None].transpose(1, 2), "v": KV[None].transpose(1, 2)}

ROWS = [
    # what a tensor is
    ("q a list", {"q": [[[1.0]]]}, TypeError, r"q is a list; it must be a NumPy array or a torch tensor"),
    ("q None", {"q": None}, TypeError, r"q is a NoneType; it must be"),
    ("k a list", {"k": [1.0]}, TypeError, r"k is a list; it must be .*, as q is"),
    ("v None", {"v": None}, TypeError, r"v is a NoneType; it must be"),
    ("q float64", {"q": Q.double()}, TypeError, r"q\.dtype is (torch\.)?float64; it must be (torch\.)?float32"),
    ("k int", {"k": KV.int()}, TypeError, r"k\.dtype is (torch\.)?int32; it must be"),
    ("v bool", {"v": KV.bool()}, TypeError, r"v\.dtype is (torch\.)?bool; it must be"),
    # shapes
    ("q 2 axes", {"q": Q[0]}, ValueError, r"q\.shape is \(4, 16\); it must be \[tokens, heads"),
    ("q 5 axes", {"q": Q[None, None]}, ValueError, r"q\.shape is \(1, 1, 60, 4, 16\); it must be"),
    ("k axes", {"k": KV[None], "v": KV[None]}, ValueError, r"k\.shape is .*; it must be of as many axes as q"),
    ("k batch", {**BATCH, "k": BATCH["k"][:1], "v": BATCH["v"][:1]}, ValueError, r"k\.shape\[0\] is 1; it must"),
    ("v shape", {"v": KV[:-1]}, ValueError, r"v\.shape is \(59, 2, 16\); it must be k's \(\(60, 2, 16\)\)"),
    ("v head_dim", {"v": KV[..., :8]}, ValueError, r"v\.shape is \(60, 2, 8\); it must be"),
    ("k head_dim", {"k": KV[..., :8], "v": KV[..., :8]}, ValueError, r"k\.shape\[-1\] is 8; it must be q's"),
    ("heads", {"q": Q[:, :3]}, ValueError, r"q's number of heads is 3; it must be a positive multiple of k's \(2\)"),
    ("no heads", {"q": Q[:, :0]}, ValueError, r"q's number of heads is 0; it must be"),
    ("no kv heads", {"k": KV[:, :0], "v": KV[:, :0]}, ValueError, r"q's number of heads is 4; it must be"),
    ("head_dim 0", {n: x[..., :0] for n, x in (("q", Q), ("k", KV), ("v", KV))}, ValueError, r"head_dim is 0; it must"),
    ("head_dim 600", {n: torch.zeros(60, 2, 600) for n in "qkv"}, ValueError, r"head_dim is 600; it must be from 1 to 512"),
    ("more q than k", {"k": KV[:40], "v": KV[:40]}, ValueError, r"k's number of tokens is 40; it must be at least q's \(60\), .* q\.shape is \(60, 4, 16\), k\.shape is \(40,"),
    ("heads first", HEADS_FIRST, ValueError, r"k's number of tokens is 2; .*; did you pass \[batch, heads, tokens, head_dim\]\? trans"),
    ("heads first, 3 axes", {n: x[0] for n, x in HEADS_FIRST.items()}, ValueError, r".*; did you pass \[heads, .* transpose\(0, 1\)"),
    ("heads first, prefix", {**HEADS_FIRST, "q": Q[None, :4].transpose(1, 2)}, ValueError, r"q's number of heads is 4; .*, k\.shape is \(1, 2, 60, 16\)\. .*transpose"),
    ("layout word", {"layout": "heads"}, ValueError, r"layout is 'heads'; it must be \"bthd\", .*, or \"bhtd\""),
    ("layout number", {"layout": 1}, TypeError, r"layout is 1; it must be"),
    ("layout packed", {**PACKED, "layout": "bhtd"}, ValueError, r"layout is 'bhtd'; it must be \"bthd\" with cu_seqlens_q"),
    # numbers
    ("scale 0", {"softmax_scale": 0.0}, ValueError, r"softmax_scale is 0; it must be finite and above 0"),
    ("scale < 0", {"softmax_scale": -1}, ValueError, r"softmax_scale is -1; it must be"),
    ("scale NaN", {"softmax_scale": math.nan}, ValueError, r"softmax_scale is nan; it must be"),
    ("scale inf", {"softmax_scale": math.inf}, ValueError, r"softmax_scale is inf; it must be"),
    ("scale text", {"softmax_scale": "auto"}, TypeError, r"softmax_scale is 'auto'; it must be a number"),
    ("causal text", {"causal": "no"}, TypeError, r"causal is 'no'; it must be True or False"),
    ("causal 2", {"causal": 2}, TypeError, r"causal is 2; it must be True or False"),
    ("not causal", {"causal": False}, ValueError, r"causal is 0; it must be 1 for flashprefill: without causality these select: dense"),
    ("return_lse", {"return_lse": "yes"}, TypeError, r"return_lse is 'yes'; it must be"),
    ("return_stats", {"return_stats": None}, TypeError, r"return_stats is None; it must be"),
    ("threads < 0", {"threads": -2}, ValueError, r"threads is -2; it must be from 0"),
    ("threads", {"threads": 5000}, ValueError, r"threads is 5000; it must be from 0"),
    ("threads 1.5", {"threads": 1.5}, TypeError, r"threads is 1\.5; it must be an integer or None"),
    ("backend", {"backend": "abacus"}, ValueError, r"backend is abacus; it must be one of .*reference"),
    ("backend 7", {"backend": 7}, TypeError, r"backend is 7; it must be a string or None"),
    ("target", {"target": "mmx"}, ValueError, r"target is mmx; it must be one that backend"),
    ("math", {"math": "fp8"}, ValueError, r"math is 'fp8'; it must be \"input\" or \"8bit\""),
    ("math 8", {"math": 8}, TypeError, r"math is 8; it must be a string"),
    # policies
    ("policy number", {"policy": 3}, TypeError, r"policy is 3; it must be a policy, such as"),
    ("policy class", {"policy": fp.Dense}, TypeError, r"policy is the class Dense; it must be called: flashprefill\.Dense\(\)"),
    ("final_chunk text", {"final_chunk": "yes"}, TypeError, r"final_chunk is 'yes'; it must be"),
    ("final_chunk long", {"final_chunk": [True, False]}, ValueError, r"final_chunk is a list of 2; it must be one bool"),
    # packed
    ("cu without k's", {"cu_seqlens_q": [0, 60]}, ValueError, r"cu_seqlens_k is None; it must be given"),
    ("cu with batch", {**BATCH, **PACKED}, ValueError, r"q\.shape is \(2, 30, 4, 16\); it must be .* with cu_seqlens_q"),
    ("cu k axes", {**PACKED, "k": KV[None], "v": KV[None]}, ValueError, r"k\.shape is .*; it must be .* cu_seqlens_k"),
    ("cu empty", {**PACKED, "cu_seqlens_q": []}, ValueError, r"cu_seqlens_q is empty; it must be of batch \+ 1"),
    ("cu 2-D", {**PACKED, "cu_seqlens_q": [[0, 60]]}, ValueError, r"cu_seqlens_q\.ndim is 2; it must be 1"),
    ("cu floats", {**PACKED, "cu_seqlens_q": [0.0, 20.0, 60.0]}, TypeError, r"cu_seqlens_q is an array of .*float"),
    ("cu bools", {**PACKED, "cu_seqlens_k": [False, True]}, TypeError, r"cu_seqlens_k is an array of .*bool"),
    ("cu text", {**PACKED, "cu_seqlens_q": "0 20 60"}, TypeError, r"cu_seqlens_q is .*; it must be an array of int"),
    ("cu number", {**PACKED, "cu_seqlens_q": 60}, (TypeError, ValueError), r"cu_seqlens_q(\.ndim)? is .*; it must"),
    ("cu int64", {**PACKED, "cu_seqlens_q": [0, 20, 2**40]}, ValueError, r"cu_seqlens_q is .*; it must be inside int32"),
    ("cu from 1", {**PACKED, "cu_seqlens_q": [1, 20, 60]}, ValueError, r"cu_seqlens_q\[0\] is 1; it must be 0"),
    ("cu falls", {**PACKED, "cu_seqlens_q": [0, 61, 60]}, ValueError, r"cu_seqlens_q\[2\] is 60; it must be at least"),
    ("cu total", {**PACKED, "cu_seqlens_q": [0, 20, 50]}, ValueError, r"cu_seqlens_q\[2\] is 50; it must be the number of"),
    ("cu past k", {**PACKED, "cu_seqlens_k": [0, 20, 90]}, ValueError, r"cu_seqlens_k\[2\] is 90; it must be at most"),
    ("cu lengths", {**PACKED, "cu_seqlens_k": [0, 60]}, ValueError, r"cu_seqlens_k\.shape is \(2,\); it must be \(3,\)"),
    ("cu k short", {**PACKED, "cu_seqlens_k": [0, 10, 60]}, ValueError, r"the number of keys of sequence 0 is 10; it must"),
    ("max too small", {**PACKED, "max_seqlen_q": 30}, ValueError, r"cu_seqlens_q\[2\] is 60; it must be at most max_seqlen_q"),
    ("max k small", {**PACKED, "max_seqlen_k": 30}, ValueError, r"cu_seqlens_k\[2\] is 60; it must be at most max_seqlen_k"),
    ("max negative", {**PACKED, "max_seqlen_k": -1}, ValueError, r"max_seqlen_k is -1; it must be at least 0"),
    ("max text", {**PACKED, "max_seqlen_q": "30"}, TypeError, r"max_seqlen_q is '30'; it must be an integer"),
    ("max of a batch", {**BATCH, "max_seqlen_q": 31}, ValueError, r"max_seqlen_q is 31; it must be q's number of tokens"),
    ("max k of a batch", {**BATCH, "max_seqlen_k": 31}, ValueError, r"max_seqlen_k is 31; it must be k's number of tokens"),
    ("seqused length", {**BATCH, "seqused_k": [30]}, ValueError, r"seqused_k\.shape is \(1,\); it must be \(2,\)"),
    ("seqused past k", {**BATCH, "seqused_k": [30, 31]}, ValueError, r"seqused_k\[1\] is 31; it must be from 0 to 30"),
    ("seqused negative", {**BATCH, "seqused_k": [30, -1]}, ValueError, r"seqused_k\[1\] is -1; it must be from 0"),
    ("seqused short", {**BATCH, "seqused_k": [30, 29]}, ValueError, r"the number of keys of sequence 1 is 29; it must"),
    # paged
    ("pages 3 axes", {**PAGED, "k": KV, "v": KV, "block_table": TABLE}, ValueError, r"k\.shape is .*; it must be \[pages"),
    ("table 1-D", {**PAGED, "block_table": [0, 1]}, ValueError, r"block_table\.ndim is 1; it must be 2"),
    ("table rows", {**PAGED, "block_table": TABLE[:1]}, ValueError, r"block_table\.shape is \(1, 4\); it must be \(2, pages\)"),
    ("table columns", {**PAGED, "block_table": [[0, 1], [2, 3]]}, ValueError, r"block_table's number of columns is 2; it"),
    ("page 8", {**PAGED, "block_table": [[0, 1, 0, 0], [2, 3, 4, 8]]}, ValueError, r"block_table\[1\]\[3\] is 8; it must be a"),
    ("page -1", {**PAGED, "block_table": [[0, -1, 0, 0], TABLE[1]]}, ValueError, r"block_table\[0\]\[1\] is -1; it must be"),
    ("table alone", {**PAGED, "block_table": TABLE, "seqused_k": None}, ValueError, r"seqused_k is None; it must be given"),
]  # fmt: skip

BAD_OUT = [
    ("a list", [1.0], TypeError, r"out is a list; it must be"),
    ("dtype", torch.zeros(60, 4, 16).half(), TypeError, r"out\.dtype is (torch\.)?float16; it must be q's"),
    (
        "shape",
        torch.zeros(60, 4, 15),
        ValueError,
        r"out\.shape is \(60, 4, 15\); it must be q's \(\(60, 4, 16\)\)",
    ),
    (
        "overlapping",
        torch.zeros(60, 1, 16).expand(60, 4, 16),
        ValueError,
        r"out\.stride\[2\] is 0; it must be other",
    ),
    ("q itself", "q", ValueError, r"out is in the same memory as q; it must be memory of its own"),
    ("part of v", "v", ValueError, r"out is in the same memory as v; it must be memory of its own"),
]


def to_numpy(x):
    return x.numpy() if isinstance(x, torch.Tensor) else x


def refusal(call, exceptions, message):
    with pytest.raises(exceptions) as caught:
        call()
    text = str(caught.value)
    assert isinstance(caught.value, fp.FlashPrefillError)
    assert "\n" not in text and "; it must be " in text
    assert re.match(message, text), text


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("changes,exceptions,message", [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_refused(library, changes, exceptions, message):
    arguments = {"q": Q, "k": KV, "v": KV, **changes}
    convert = to_numpy if library == "numpy" else lambda x: x
    arguments = {name: convert(x) for name, x in arguments.items()}
    q = arguments["q"]
    out = None
    if hasattr(q, "dtype") and "float32" in str(q.dtype):
        out = convert(torch.full(tuple(q.shape), 7.0))
        arguments["out"] = out
    refusal(lambda: fp.prefill_attention(**arguments), exceptions, message)
    assert out is None or bool((out == 7).all())

    # The other verbs refuse the same with the same words.
    for name in ("v", "out", "return_lse", "return_stats"):
        arguments.pop(name, None)
    if not {"v", "return_lse", "return_stats", "math"} & {*changes} or "k" in changes:
        refusal(lambda: fp.select(**arguments), exceptions, message)


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("out,exceptions,message", [r[1:] for r in BAD_OUT], ids=[r[0] for r in BAD_OUT])
def test_refused_out(library, out, exceptions, message):
    q, k = Q.clone(), KV.clone()
    v = torch.cat([KV.flatten(), torch.zeros(Q.numel())])
    out = (
        {"q": q, "v": v[KV.numel() // 2 :][: Q.numel()].view(Q.shape)}.get(out, out)
        if isinstance(out, str)
        else out
    )
    v = v[: KV.numel()].view(KV.shape)
    convert = to_numpy if library == "numpy" else lambda x: x
    q, k, v, out = (convert(x) for x in (q, k, v, out))
    mask = fp.select(q, k)
    refusal(lambda: fp.prefill_attention(q, k, v, out=out), exceptions, message)
    refusal(lambda: fp.attend(q, k, v, mask, out=out), exceptions, message)
    assert np.array_equal(q, Q.numpy())


def test_refused_in_numpy_only():
    q, k = Q.numpy(), KV.numpy()
    with pytest.raises(TypeError, match=r"^k is a Tensor; it must be a NumPy array, as q is"):
        fp.prefill_attention(q, KV, KV)
    with pytest.raises(TypeError, match=r"^k is a ndarray; it must be a torch tensor, as q is"):
        fp.prefill_attention(Q, k, k)
    with pytest.raises(TypeError, match=r"^q\.dtype is >f4; it must be float32"):
        fp.prefill_attention(q.astype(">f4"), k, k)
    locked = np.zeros_like(q)
    locked.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out is read-only; it must be writeable"):
        fp.prefill_attention(q, k, k, out=locked)
    crooked = np.frombuffer(bytes(k.nbytes + 1), np.uint8)[1:].view(np.float32).reshape(k.shape)
    with pytest.raises(
        ValueError, match=r"^k\.strides is .*; it must be multiples of 4 bytes from an aligned"
    ):
        fp.prefill_attention(q, crooked, k)
    record = np.zeros((60, 2, 16), np.dtype([("x", np.float32), ("pad", np.int16)], align=False))["x"]
    with pytest.raises(ValueError, match=r"^v\.strides is .*; it must be"):
        fp.prefill_attention(q, k, record)
    with pytest.raises(TypeError, match=r"^q\.layout is torch\.sparse"):
        fp.prefill_attention(Q.to_sparse(), KV, KV)


KEEP = np.ones((4, 1, 1), bool)


@pytest.mark.parametrize(
    "changes,exceptions,message",
    [
        ({"keep": None}, TypeError, r"keep is a NoneType; it must be"),
        ({"keep": [[[True]]]}, TypeError, r"keep is a list; it must be"),
        ({"keep": KEEP.astype(np.int8)}, TypeError, r"keep\.dtype is int8; it must be bool"),
        ({"keep": torch.ones(4, 1, 1)}, TypeError, r"keep\.dtype is torch\.float32; it must be torch\.bool"),
        (
            {"keep": [KEEP, torch.ones(4, 1, 1)]},
            TypeError,
            r"keep\.dtype is float32; it must be bool|keep is",
        ),
        ({"keep": KEEP[0]}, ValueError, r"keep\.ndim is 2; it must be 3: heads, tiles, blocks"),
        (
            {"keep": np.ones((4, 2, 1), bool)},
            ValueError,
            r"keep\.shape is \(4, 2, 1\); it must be \(4, 1, 1\)",
        ),
        ({"keep": [KEEP, KEEP[:2]]}, ValueError, r"keep\[1\]\.shape is \(2, 1, 1\); it must be \(4, 1, 1\)"),
        ({"block_size": 100}, ValueError, r"block_size is 100; it must be a multiple of 16"),
        ({"block_size": 128.0}, TypeError, r"block_size is 128\.0; it must be an integer"),
        (
            {"q_len": None},
            TypeError,
            r"q_len is None; it must be given, an integer, where cu_seqlens_q is not",
        ),
        ({"q_len": -1}, ValueError, r"q_len is -1; it must be at least 0"),
        ({"k_len": 50}, ValueError, r"k_len is 50; it must be at least q_len \(60\)"),
        ({"k_len": 60.5}, TypeError, r"k_len is 60\.5; it must be an integer"),
        ({"share_heads": True, "group": 129}, ValueError, r"group is 129; it must be from 1 to 128"),
        ({"cu_seqlens_q": [0, 60]}, ValueError, r"q_len is 60; it must be None with cu_seqlens_q"),
        ({"cu_seqlens_k": [0, 60]}, ValueError, r"cu_seqlens_q is None; it must be given"),
        (
            {"q_len": None, "k_len": None, "cu_seqlens_q": [0, 9, 60]},
            ValueError,
            r"cu_seqlens_q\.shape is \(3,\)",
        ),
        (
            {"q_len": None, "k_len": None, "cu_seqlens_q": [1, 60]},
            ValueError,
            r"cu_seqlens_q is \[1, 60\]; it must",
        ),
        (
            {"q_len": None, "k_len": None, "cu_seqlens_q": [0, 60], "cu_seqlens_k": [0, 50]},
            ValueError,
            r"cu_seqlens_k's length of sequence 0 is 50; it must be at least its query length",
        ),
    ],
)
def test_refused_masks(changes, exceptions, message):
    arguments = {"keep": KEEP, "q_len": 60, "k_len": 60, **changes}
    refusal(lambda: fp.BlockMask.from_dense(**arguments), exceptions, message)


@pytest.mark.parametrize(
    "mask,changes,exceptions,message",
    [
        (KEEP, {}, TypeError, r"mask is a ndarray; it must be a BlockMask"),
        (
            {"q_len": 59, "k_len": 60},
            {},
            ValueError,
            r"mask's total_q is 59; it must be that of q and k \(60\)",
        ),
        (
            {"q_len": 60, "k_len": 61},
            {},
            ValueError,
            r"mask's max_seqlen_k is 61; it must be that of q and k \(60\)",
        ),
        ({"keep": KEEP[:3]}, {}, ValueError, r"mask's number of heads is 3; it must be 1, or q_heads \(4\)"),
        (
            {"share_heads": True},
            {},
            ValueError,
            r"mask's number of heads is 4; it must be 1, or kv_heads \(2\)",
        ),
        ({"share_heads": True, "keep": KEEP[:2]}, {}, ValueError, r"mask\.tile_tokens is 128; it must be 64"),
        (
            {},
            {"causal": False},
            ValueError,
            r"causal is False; it must be what the mask was made for \(True\)",
        ),
        (
            {"causal": False},
            {"causal": True},
            ValueError,
            r"causal is True; it must be what the mask was made for",
        ),
        (
            {},
            {"cu_seqlens_q": [0, 20, 60], "cu_seqlens_k": [0, 20, 60]},
            ValueError,
            r"mask's batch is 1; it must",
        ),
    ],
)
def test_refused_masks_of_other_calls(mask, changes, exceptions, message):
    if isinstance(mask, dict):
        mask = fp.BlockMask.from_dense(**{"keep": KEEP, "q_len": 60, "k_len": 60, **mask})
    out = torch.full(Q.shape, 7.0)
    refusal(lambda: fp.attend(Q, KV, KV, mask, out=out, **changes), exceptions, message)
    assert (out == 7).all()


POLICIES = [
    (fp.FlashPrefill, {"alpha": -0.1}, ValueError, "alpha is -0.1; it must be finite and at least 0"),
    (fp.FlashPrefill, {"alpha": math.nan}, ValueError, "alpha is nan; it must be"),
    (fp.FlashPrefill, {"alpha": 1e39}, ValueError, "alpha is 1e.39; it must be finite"),
    (fp.FlashPrefill, {"alpha": "0.1"}, TypeError, "alpha is '0.1'; it must be a number"),
    (fp.FlashPrefill, {"alpha": None}, TypeError, "alpha is None; it must be a number"),
    (fp.FlashPrefill, {"alpha": True}, TypeError, "alpha is True; it must be a number"),
    (fp.FlashPrefill, {"query_pool": 0}, ValueError, "query_pool is 0; it must be from 1 to 128"),
    (fp.FlashPrefill, {"query_pool": 129}, ValueError, "query_pool is 129; it must be from 1 to 128"),
    (fp.FlashPrefill, {"query_pool": 1.0}, TypeError, "query_pool is 1.0; it must be an integer"),
    (fp.FlashPrefill, {"min_blocks": -1}, ValueError, "min_blocks is -1; it must be from 0"),
    (fp.FlashPrefill, {"block_size": 8}, ValueError, "block_size is 8; it must be from 16 to 1024"),
    (fp.FlashPrefill, {"block_size": 120}, ValueError, "block_size is 120; it must be a multiple of 16"),
    (fp.FlashPrefill, {"share_heads": 1}, TypeError, "share_heads is 1; it must be True or False"),
    (
        fp.FlashPrefill,
        {"mean_correction": "on"},
        ValueError,
        "mean_correction is 'on'; it must be one of False, True, 'summary'",
    ),
    (
        fp.Streaming,
        {"mean_correction": 1},
        ValueError,
        "mean_correction is 1; it must be one of False, True, 'summary'",
    ),
    (fp.Streaming, {"sink_blocks": -1}, ValueError, "sink_blocks is -1; it must be from 0"),
    (fp.Streaming, {"window_blocks": 2**25}, ValueError, "window_blocks is 33554432; it must be from 0"),
    (fp.Streaming, {"dense_tail_blocks": 0.5}, TypeError, "dense_tail_blocks is 0.5; it must be an integer"),
    (fp.Sketch, {"mass": 0.0}, ValueError, "mass is 0.0; it must be above 0 and at most 1"),
    (fp.Sketch, {"mass": 1.1}, ValueError, "mass is 1.1; it must be above 0 and at most 1"),
    (fp.Sketch, {"mass": 0.5, "alpha": 0.1}, ValueError, "alpha is 0.1; it must be None where mass is given"),
    (fp.Sketch, {"mass": 0.5, "gain": 0.1}, ValueError, "gain is 0.1; it must be None where mass is given"),
    (fp.Sketch, {"alpha": 0.5, "gain": 0.1}, ValueError, "gain is 0.1; it must be None where alpha is given"),
    (fp.Sketch, {"gain": 1.0}, ValueError, "gain is 1.0; it must be above 0 and below 1"),
    (fp.Sketch, {"query_metric": 1}, TypeError, "query_metric is 1; it must be True or False"),
    (fp.Sketch, {"alpha": math.inf}, ValueError, "alpha is inf; it must be finite"),
    (fp.Sketch, {"outliers": 17}, ValueError, "outliers is 17; it must be from 0 to 16"),
    (fp.FlexPrefill, {"gamma": 0.0}, ValueError, "gamma is 0.0; it must be above 0 and at most 1"),
    (fp.FlexPrefill, {"gamma": None}, TypeError, "gamma is None; it must be a number"),
    (fp.FlexPrefill, {"tau": -0.1}, ValueError, "tau is -0.1; it must be finite and at least 0"),
    (fp.FlexPrefill, {"min_budget": 0.5}, TypeError, "min_budget is 0.5; it must be an integer"),
    (fp.FlexPrefill, {"max_budget": 100}, ValueError, r"max_budget is 100; it must be at least min_budget"),
    (fp.FlexPrefill, {"cover": "all"}, ValueError, "cover is 'all'; it must be one of 'first', 'both'"),
    (fp.MInference, {"vertical": -1}, ValueError, "vertical is -1; it must be from 0"),
    (fp.MInference, {"rounding": "up"}, ValueError, "rounding is 'up'; it must be one of 'blocks', 'tokens'"),
    (
        fp.MInference,
        {"rounding": "tokens", "mean_correction": True},
        ValueError,
        "mean_correction is True; it must be False with rounding",
    ),
    (fp.MInference, {"slash": 1.5}, TypeError, "slash is 1.5; it must be an integer"),
    (fp.MInference, {"heads": []}, ValueError, r"heads is \(\); it must be a pattern for each query head"),
    (fp.MInference, {"heads": [3]}, TypeError, r"heads\[0\] is 3; it must be \(pattern, a, b\)"),
    (
        fp.MInference,
        {"heads": [("diagonal", 1, 2)]},
        ValueError,
        r"heads\[0\]'s pattern is 'diagonal'; it must be one of vertical_and_slash, stream_llm, block_sparse",
    ),
    (
        fp.MInference,
        {"heads": [("stream_llm", 1, -2)]},
        ValueError,
        r"heads\[0\]'s b is -2; it must be from 0",
    ),
    (fp.XAttention, {"threshold": 1.5}, ValueError, "threshold is 1.5; it must be at least 0 and at most 1"),
    (fp.XAttention, {"stride": 12}, ValueError, "stride is 12; it must be 4, 8, 16, 32, 64 or 128"),
    (fp.XAttention, {"stride": 32, "block_size": 48}, ValueError, r"stride is 32; .* divisor of block_size"),
    (fp.XAttention, {"stride": 8.0}, TypeError, "stride is 8.0; it must be an integer"),
    (fp.XAttention, {"norm": 0}, ValueError, "norm is 0.0; it must be finite and above 0"),
    (
        fp.XAttention,
        {"head_thresholds": []},
        ValueError,
        r"head_thresholds is \(\); it must be a threshold for",
    ),
    (fp.XAttention, {"head_thresholds": [0.5, -1]}, ValueError, r"head_thresholds\[1\] is -1.0; it must be"),
    (fp.RRAttention, {"threshold": 0}, ValueError, "threshold is 0.0; it must be above 0 and at most 1"),
    (fp.RRAttention, {"stride": 2}, ValueError, "stride is 2; it must be from 4 to 128"),
    (fp.SpargeAttn, {"cdf": 0.5, "topk": 0.5}, ValueError, "topk is 0.5; it must be None where cdf is given"),
    (fp.SpargeAttn, {"cdf": -0.1}, ValueError, "cdf is -0.1; it must be at least 0 and at most 1"),
    (fp.SpargeAttn, {"topk": 1.1}, ValueError, "topk is 1.1; it must be at least 0 and at most 1"),
    (fp.SpargeAttn, {"similarity": math.nan}, ValueError, "similarity is nan; it must be at least -1"),
    (fp.Prism, {"mass": 0}, ValueError, "mass is 0.0; it must be above 0 and at most 1"),
    (fp.Prism, {"rotary_dim": 7}, ValueError, "rotary_dim is 7; it must be even"),
    (fp.Prism, {"high_pairs": -1}, ValueError, "high_pairs is -1; it must be from 0"),
    (fp.Prism, {"interleaved": 1}, TypeError, "interleaved is 1; it must be True or False"),
    (fp.SampleAttention, {"coverage": 0}, ValueError, "coverage is 0.0; it must be above 0 and at most 1"),
    (
        fp.SampleAttention,
        {"sample_ratio": 2},
        ValueError,
        "sample_ratio is 2.0; it must be above 0 and at most",
    ),
    (fp.SampleAttention, {"window_ratio": -1}, ValueError, "window_ratio is -1.0; it must be at least 0"),
    (fp.SampleAttention, {"sample_rows": 0}, ValueError, "sample_rows is 0; it must be from 1 to 128"),
    (fp.Dense, {"block_size": "128"}, TypeError, "block_size is '128'; it must be an integer"),
]


@pytest.mark.parametrize("policy,fields,exceptions,message", POLICIES)
def test_refused_policies(policy, fields, exceptions, message):
    refusal(lambda: policy(**fields), exceptions, message)


def test_unknown_models_are_refused_with_the_known_ones():
    refusal(
        lambda: fp.FlashPrefill.for_model("gpt-2"),
        ValueError,
        r"model is 'gpt-2'; it must be of a family with .*: llama-3\.1, qwen2, qwen2\.5, .*, qwen3-vl-30b$",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_cuda_tensors_without_a_backend():
    """The library answers for memory that no backend of this build works on."""
    from flashprefill import _abi
    from flashprefill.policies import library

    p, size = _abi.sized(_abi.Problem), _abi.ctypes.c_size_t()
    p.device, p.batch, p.q_heads, p.kv_heads, p.head_dim, p.softmax_scale = _abi.CUDA, 0, 1, 1, 16, 1.0
    policy = library.struct_of("dense")
    with pytest.raises(NotImplementedError, match="FP_CUDA"):
        _abi.check(_abi.lib.fp_select_workspace(_abi.byref(p), _abi.byref(policy), None, _abi.byref(size)))

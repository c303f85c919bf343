"""VSPrefill on a GPU, in PyTorch, against the CPU's: masses moved a little bound what may differ."""

import dataclasses

import numpy as np
import pytest
import torch

import flashprefill as fp
from flashprefill.policies.indexer import Indexer, LayerWeights
from test_cuda import PACKED, data, pytestmark, two_paged_sequences  # noqa: F401 (marks this file too)


def indexer(kv_heads=2, dim=128, hidden=40):
    make = np.random.default_rng(dim)
    shapes = (kv_heads, hidden, 2 * dim), *[(kv_heads, hidden)] * 3
    return Indexer({3: LayerWeights(*(make.normal(size=s).astype(np.float32) * 0.2 for s in shapes))}, "tiny")


def compare(q, k, v, policy, sequences=1, **layout):
    """The GPU's mask lies between two of the CPU's, and prefill is select, then attend."""
    there = [x.cuda() for x in (q, k, v)]
    moved = {n: x.cuda() if torch.is_tensor(x) else x for n, x in layout.items()}
    mask = fp.select(*there[:2], policy, v=there[2], **moved)

    def on_cpu(factor):
        masses = {name: getattr(policy, name) / factor for name in ("vertical_mass", "slash_mass")}
        own = dataclasses.replace(policy, rounding="blocks", **masses)
        return fp.select(q, k, own, v=v, backend="cpu", **layout)

    strict, loose = on_cpu(1.03), on_cpu(1 / 1.03)
    for b in range(sequences):
        bits, inner, outer = (torch.as_tensor(m.dense(b)).cpu().bool() for m in (mask, strict, loose))
        assert not (inner & ~bits).any() and not (bits & ~outer).any()
    assert torch.equal(fp.prefill_attention(*there, policy, **moved), fp.attend(*there, mask, **moved))
    return mask


@pytest.mark.parametrize("fields", [{}, {"share_heads": True}, {"mean_correction": True}, {"block_size": 48}])
def test_between_two_of_the_cpus(fields):
    policy = fp.VSPrefill(indexer(), vertical_mass=0.1, slash_mass=0.01, rounding="blocks", **fields)
    assert compare(*data(900, 1300, 4, 2, 128, torch.bfloat16), policy).density < 0.9


def test_layouts():
    policy = fp.VSPrefill(
        indexer(), vertical_mass=0.1, slash_mass=0.01, rounding="blocks", dense_tail_blocks=1
    )
    compare(*data(1500, 2650, 4, 2, 128, torch.bfloat16), policy, sequences=4, **PACKED)
    q, caches, layout, _ = two_paged_sequences(24)
    compare(q, *caches, policy, sequences=2, **layout)


def test_lines_of_tokens_touch_the_blocks_that_blocks_keep():
    q, k, v = (x.cuda() for x in data(3900, 3900, 4, 2, 128, torch.bfloat16))
    masks = [
        fp.select(q, k, fp.VSPrefill(indexer(), vertical_mass=0.05, slash_mass=0.004, rounding=to), v=v)
        for to in ("tokens", "blocks")
    ]
    assert torch.equal(masks[0].dense(), masks[1].dense()) and masks[1].density < 0.9


def test_weights_of_another_model_are_refused():
    q, k, v = (x.cuda() for x in data(500, 500, 4, 2, 64, torch.bfloat16))
    with pytest.raises(ValueError, match="2 KV heads of 128"):
        fp.select(q, k, fp.VSPrefill(indexer()), v=v)


@pytest.mark.parametrize("dim, layout", [(128, "one"), (64, "one"), (128, "packed")])
def test_verticals_stay_tokens(dim, layout):
    """Lists lie between two of the CPU's; attention under them is the CPU's under the same mask."""
    packed = PACKED if layout == "packed" else {}
    sizes = (1500, 2650) if packed else (2300, 3900)
    q, k, v = data(*sizes, 4, 2, dim, torch.bfloat16)
    policy = fp.VSPrefill(indexer(dim=dim), vertical_mass=0.1, slash_mass=0.001, block_size=64)
    there = [x.cuda() for x in (q, k, v)]
    moved = {n: x.cuda() if torch.is_tensor(x) else x for n, x in packed.items()}
    mask = fp.select(*there[:2], policy, v=there[2], **moved)
    assert mask.key_lists is not None and mask.key_lists.is_cuda

    def on_cpu(factor):
        own = dataclasses.replace(policy, vertical_mass=policy.vertical_mass / factor)
        return fp.select(q, k, own, v=v, backend="cpu", **packed)

    strict, loose = on_cpu(1.03), on_cpu(1 / 1.03)
    for b in range(mask.batch):
        if int(strict.fallback[b]):
            continue
        for h, head in enumerate(mask.keys(b)):
            inner, outer = (
                set(x[2 : 2 + x[0]].tolist()) for x in (m.vertical_slash[b, h] for m in (strict, loose))
            )
            assert inner <= set(head[0].tolist()) <= outer
    out, lse = fp.attend(*there, mask, return_lse=True, **moved)
    host, host_lse = fp.attend(q, k, v, mask.to("cpu"), return_lse=True, **packed)
    torch.testing.assert_close(out.cpu().float(), host.float(), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.cpu(), host_lse, atol=1e-2, rtol=1e-3)
    assert torch.equal(fp.prefill_attention(*there, policy, **moved), out)

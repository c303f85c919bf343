"""Batches in which some sequences keep everything and others select: each as alone, and none waits for ever.

Warpgroups of the score kernel take items in turn from one ring of buffers, and an item of a sequence that
keeps everything has nothing to load. The batches run in a process of their own, which is killed if a kernel
of it does not end.
"""

import multiprocessing

import pytest
import torch

import flashprefill as fp

PAGE, HEADS, KV_HEADS, DIM = 16, 32, 8, 128
# Rows and keys; up to 3,072 keys FlashPrefill and Sketch keep everything on a GPU.
BATCHES = [
    [(3000, 3000), (5190, 5190)],
    [(3810, 9000), (4379, 4379)],
    [(1400, 1400), (6000, 6000), (700, 2900), (92, 8192)],
    [(300, 300)] * 12 + [(4500, 20000)],
    [(8000, 8000), (192, 192)],
]
POLICIES = [
    fp.FlashPrefill(alpha=0.12),
    fp.FlashPrefill(alpha=0.12, query_pool=16),
    fp.FlashPrefill(alpha=0.12, share_heads=True),
    fp.Sketch(mass=0.9),
]


def caches(lengths, make):
    """K and V in pages, and the table of each sequence's."""
    most = max(-(-keys // PAGE) for _, keys in lengths)
    pages = len(lengths) * most
    k, v = (
        torch.randn(pages, PAGE, KV_HEADS, DIM, generator=make, device="cuda", dtype=torch.bfloat16)
        for _ in range(2)
    )
    table = torch.randperm(pages, generator=make, device="cuda").int().view(len(lengths), most)
    return k, v, table


def layout_of(lengths, table):
    starts = torch.tensor([0, *(rows for rows, _ in lengths)]).cumsum(0)
    return {
        "cu_seqlens_q": starts.int().cuda(),
        "seqused_k": torch.tensor([keys for _, keys in lengths], dtype=torch.int32).cuda(),
        "block_table": table,
        "max_seqlen_q": max(rows for rows, _ in lengths),
        "max_seqlen_k": max(keys for _, keys in lengths),
    }, starts.tolist()


def run(policy, repeats):
    """Each batch against its sequences alone, bit by bit; then over and over, one call behind the other."""
    make = torch.Generator("cuda").manual_seed(0)
    for lengths in BATCHES:
        layout, starts = layout_of(lengths, (cache := caches(lengths, make))[2])
        q = torch.randn(starts[-1], HEADS, DIM, generator=make, device="cuda", dtype=torch.bfloat16)
        out = fp.prefill_attention(q, *cache[:2], policy, **layout)
        for b, each in enumerate(lengths):
            alone, _ = layout_of([each], cache[2][b : b + 1])
            rows = slice(starts[b], starts[b + 1])
            assert torch.equal(out[rows], fp.prefill_attention(q[rows], *cache[:2], policy, **alone)), (
                lengths,
                b,
            )
        again = torch.empty_like(out)
        for _ in range(repeats):
            fp.prefill_attention(q, *cache[:2], policy, out=again, **layout)
        assert torch.equal(again, out)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_some_keep_everything(policy):
    process = multiprocessing.get_context("spawn").Process(target=run, args=(policy, 200), daemon=True)
    process.start()
    process.join(180)
    ended = process.exitcode
    if ended is None:
        process.kill()
    assert ended == 0, "a kernel waits for ever" if ended is None else f"exit code {ended}"

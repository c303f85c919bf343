"""The order in which query tiles are taken, heaviest first, comes from a mask's counts and changes no bit."""

import pytest
import torch

import flashprefill as fp

HEADS, KV_HEADS, DIM = 32, 8, 128


def rand(*shape: int) -> torch.Tensor:
    """Return normal values on the device."""
    return torch.randn(*shape, device="cuda").bfloat16()


@pytest.fixture(params=["rectangular", "packed", "paged"])
def problem(request: pytest.FixtureRequest):
    """Chunks at the end of long prefixes, enough of them for an order to be made."""
    torch.manual_seed(3)
    if request.param == "rectangular":
        return (rand(2, 2048, HEADS, DIM), rand(2, 16384, KV_HEADS, DIM), rand(2, 16384, KV_HEADS, DIM)), {}
    q_len, k_len = [1000, 0, 1, 2333, 130], [30000, 7, 4096, 2333, 140]
    cu_q = torch.tensor([0, *torch.tensor(q_len).cumsum(0)], dtype=torch.int32, device="cuda")
    q = rand(sum(q_len), HEADS, DIM)
    if request.param == "packed":
        cu_k = torch.tensor([0, *torch.tensor(k_len).cumsum(0)], dtype=torch.int32, device="cuda")
        k, v = rand(sum(k_len), KV_HEADS, DIM), rand(sum(k_len), KV_HEADS, DIM)
        return (q, k, v), {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    pages = -(-max(k_len) // 16)
    table = torch.randperm(len(k_len) * pages, device="cuda").int().view(len(k_len), pages)
    k, v = (rand(len(k_len) * pages, 16, KV_HEADS, DIM) for _ in range(2))
    used = torch.tensor(k_len, dtype=torch.int32, device="cuda")
    return (q, k, v), {"cu_seqlens_q": cu_q, "seqused_k": used, "block_table": table}


@pytest.mark.parametrize("share_heads", [False, True])
def test_counts_decide_nothing_but_the_order(problem, share_heads):
    (q, k, v), layout = problem
    policy = fp.FlashPrefill(alpha=0.5, share_heads=share_heads, query_pool=16)
    mask = fp.select(q, k, policy, **layout)
    expected, lse = fp.attend(q, k, v, mask, return_lse=True, **layout)
    for other in (
        torch.zeros_like(mask.counts),
        torch.full_like(mask.counts, -5),
        torch.full_like(mask.counts, 2**31 - 1),
        torch.randint_like(mask.counts, 300),
    ):
        mask.counts.copy_(other)
        out, other_lse = fp.attend(q, k, v, mask, return_lse=True, **layout)
        assert torch.equal(out, expected)
        assert torch.equal(other_lse, lse)


def test_heads_together_and_one_by_one_give_the_same_bits(problem):
    """One KV head has too few tiles for an order."""
    (q, k, v), layout = problem
    policy = fp.FlashPrefill(alpha=0.5)
    out = fp.prefill_attention(q, k, v, policy, **layout)
    group = HEADS // KV_HEADS
    for head in (0, KV_HEADS - 1):
        queries, keys = slice(head * group, (head + 1) * group), slice(head, head + 1)
        alone = fp.prefill_attention(q[..., queries, :], k[..., keys, :], v[..., keys, :], policy, **layout)
        assert torch.equal(out[..., queries, :], alone)

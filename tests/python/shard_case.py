"""One attention over several ranks beside the same one in one process."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

import flashprefill as fp
from flashprefill.distributed import zigzag


@dataclass
class Case:
    """Prompts, a policy, and how they are divided."""

    policy: object
    tokens: tuple = (1100,)
    prefix: tuple = ()
    heads: tuple = (4, 2, 32)  # query heads, KV heads, head_dim
    layout: str = "Zigzag"
    unit: int = 128
    rounds: int | None = None
    grouped: bool = False  # heads travel in the groups of long prompts
    batched: bool = False  # tensors have an axis for prompts
    dtype: torch.dtype = torch.float32
    options: dict = field(default_factory=dict)
    device: str = "cpu"

    def inputs(self, device):
        """q, k, v of all prompts, packed; k and v with their prefixes, as lists by prompt."""
        lengths = zip(self.tokens, self.prefix or (0,) * len(self.tokens), strict=True)
        made = [
            fp.example_inputs(n + p, *self.heads, seed=i, dtype=self.dtype, device=device)
            for i, (n, p) in enumerate(lengths)
        ]
        q = torch.cat([q[len(q) - n :] for (q, _, _), n in zip(made, self.tokens, strict=True)])
        return q, [k for _, k, _ in made], [v for _, _, v in made]

    def alone(self, q, keys, values):
        """Out, lse and statistics of one process."""

        def starts(lengths):
            return torch.tensor([0, *lengths]).cumsum(0).to(q.device)

        options = {name: value for name, value in self.options.items() if name != "head_groups"}
        lengths = [len(k) for k in keys]
        return fp.prefill_attention(
            q, torch.cat(keys), torch.cat(values), self.policy, cu_seqlens_q=starts(self.tokens),
            cu_seqlens_k=starts(lengths), max_seqlen_q=max(self.tokens), max_seqlen_k=max(lengths),
            return_lse=True, return_stats=True, **options,
        )  # fmt: skip


def compare(group, case):
    """Rank 0's findings: is each result, brought together, that of one process? Others return None."""
    rank = dist.get_rank(group)
    device = torch.device("cuda", rank) if case.device == "cuda" else torch.device("cpu")
    q, keys, values = case.inputs(device)
    before = case.prefix or (0,) * len(case.tokens)
    new_k, new_v = (
        torch.cat([x[p:] for x, p in zip(parts, before, strict=True)]) for parts in (keys, values)
    )
    prefix = None
    if case.prefix:
        prefix = tuple(
            torch.cat([x[:p] for x, p in zip(parts, before, strict=True)]) for parts in (keys, values)
        )
    layout = getattr(fp.distributed, case.layout)
    rounds = {} if case.rounds is None else {"rounds": case.rounds}
    shards = layout(list(case.tokens), group, prefix=list(before), unit=case.unit, **rounds)
    zigzag.LEAST_GROUPED_ROWS = 0 if case.grouped else 32768
    whole = [q, new_k, new_v]
    if case.batched:
        whole = [x.unflatten(0, (len(case.tokens), -1)) for x in whole]
        prefix = prefix and tuple(x.unflatten(0, (len(case.tokens), -1)) for x in prefix)
    own = [shards.shard(x) for x in whole]
    for _ in range(2):  # the second time in the buffers of the first
        out, lse, stats = fp.distributed.prefill_attention(
            *own,
            case.policy,
            shards=shards,
            prefix=prefix,
            return_lse=True,
            return_stats=True,
            **case.options,
        )
    assert out.shape == own[0].shape
    gathered = shards.keys_values(*own[1:])
    if case.batched:
        lse = lse.transpose(1, 2).contiguous()
    out, lse, stats = (
        shards.join(out),
        shards.join(lse if case.batched else lse.T.contiguous()),
        stats.over_ranks(group),
    )
    if case.batched:
        out, lse, gathered = out.flatten(0, 1), lse.flatten(0, 1), [x.flatten(0, 1) for x in gathered]
    if rank:
        return None
    want, want_lse, want_stats = case.alone(q, keys, values)
    return {
        "out": torch.equal(out, want),
        "lse": torch.equal(lse.T, want_lse),
        "kept": torch.equal(stats.kept, want_stats.kept),
        "total": torch.equal(stats.total, want_stats.total),
        "keys and values": torch.equal(gathered[0], new_k) and torch.equal(gathered[1], new_v),
        "density": stats.mean_density,
        "largest difference": float((out.float() - want.float()).abs().max()),
    }


def same(world, ranks, case):
    """Assert that it is all the same; return the density."""
    found = world.run(ranks, compare, case)[0]
    wrong = [name for name, equal in found.items() if equal is False]
    assert not wrong, f"{case}: {wrong}, largest difference {found['largest difference']}"
    return found["density"]

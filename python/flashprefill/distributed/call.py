"""prefill_attention over several ranks: what is checked, and by whom.

Each rank checks its own arguments. The first time that a kind of call is made, ranks also tell each other
what they were given: a rank with another shape, dtype or policy would not fail but wait for ever, or read
other numbers. After that calls of this kind exchange nothing but tensors, and wait for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from .. import torch_op
from .._arguments import final_chunk_of
from .._layout import check_bool
from ..errors import FlashPrefillError, InvalidArgumentError, refuse, refuse_type, shown
from ..policies import FlashPrefill, Policy
from ..policies.text import policy_of
from .shards import Shards
from .stats import ShardStats


@dataclass
class Call:
    """A call whose arguments are checked. Tensors are [rows, heads, head_dim]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_prefix: torch.Tensor | None
    v_prefix: torch.Tensor | None
    policy: Policy
    final: list[bool]
    softmax_scale: float | None
    head_groups: int | None
    return_lse: bool
    return_stats: bool
    options: dict[str, Any] = field(default_factory=dict)  # threads, backend, target

    def at_heads(self, first: int, past: int) -> Policy:
        """Return the policy for the query heads of KV heads first to past - 1."""
        group = self.q.shape[1] // self.k.shape[1]
        return self.policy._at_heads(first * group, past * group, self.q.shape[1])

    def described(self) -> dict[str, Any]:
        """Return what must be the same on all ranks, by the names of arguments."""
        return {
            "policy": self.policy.text,
            "q's heads": self.q.shape[1],
            "k's heads": self.k.shape[1],
            "head_dim": self.q.shape[2],
            "q.dtype": self.q.dtype,
            "q's kind of device": self.q.device.type,
            "prefix": self.k_prefix is not None,
            "final_chunk": tuple(self.final),
            "softmax_scale": self.softmax_scale,
            "head_groups": self.head_groups,
        }


def _flat(name: str, x: Any, q: Any, tokens: Sequence[int], what: str) -> torch.Tensor:
    """Return a tensor as [tokens of all prompts, heads, head_dim], or refuse it."""
    torch_op.check(name, x, q)
    assert isinstance(x, torch.Tensor)
    total = sum(tokens)
    if x.ndim == 3 and x.shape[0] == total:
        return x
    equal = len(set(tokens)) <= 1
    if x.ndim == 4 and equal and tuple(x.shape[:2]) == (len(tokens), tokens[0] if tokens else 0):
        return torch.flatten(x, 0, 1)
    must = f"({total}, heads, head_dim)"
    if equal and tokens:
        must += f" or ({len(tokens)}, {tokens[0]}, heads, head_dim)"
    return refuse(f"{name}.shape", tuple(x.shape), f"{must}: {what}")


def _checked(
    tensors: tuple[Any, Any, Any], policy: Any, shards: Shards, prefix: Any, options: dict[str, Any]
) -> Call:
    q, k, v = tensors
    if not isinstance(q, torch.Tensor):
        refuse_type("q", f"a {type(q).__name__}", "a torch tensor")
    rows = shards.rows_of(shards.rank)
    of_rank = f"rank {shards.rank} of {shards.ranks} has {shards.rows} rows"
    flat_q, flat_k, flat_v = (_flat(n, x, q, rows, of_rank) for n, x in (("q", q), ("k", k), ("v", v)))
    k_prefix = v_prefix = None
    if prefix is not None:
        if not isinstance(prefix, (tuple, list)) or len(prefix) != 2:
            refuse_type("prefix", f"a {type(prefix).__name__}", "a pair of tensors, keys and values")
        of_prompts = f"shards.prefix is {list(shards.prefix)}"
        k_prefix, v_prefix = (
            _flat(f"prefix[{i}]", x, q, shards.prefix, of_prompts) for i, x in enumerate(prefix)
        )  # fmt: skip
    elif any(shards.prefix):
        refuse(
            "prefix", None, f"keys and values of the tokens before: shards.prefix is {list(shards.prefix)}"
        )
    for name, x in (("v", flat_v), ("prefix[0]", k_prefix), ("prefix[1]", v_prefix)):
        if x is not None and x.shape[1:] != flat_k.shape[1:]:
            refuse(f"{name}'s heads and head_dim", tuple(x.shape[1:]), f"k's ({tuple(flat_k.shape[1:])})")
        if x is not None and x.dtype != flat_k.dtype:
            refuse_type(f"{name}.dtype", x.dtype, f"k's ({flat_k.dtype})")
    if flat_k.shape[2] != flat_q.shape[2]:
        refuse("k's head_dim", flat_k.shape[2], f"q's ({flat_q.shape[2]})")
    if flat_k.shape[1] < 1 or flat_q.shape[1] < 1 or flat_q.shape[1] % flat_k.shape[1]:
        refuse("q's number of heads", flat_q.shape[1], f"a positive multiple of k's ({flat_k.shape[1]})")
    final = final_chunk_of(options.pop("final_chunk"), len(shards.tokens))
    final = final * len(shards.tokens) if len(final) == 1 else final
    groups = options.pop("head_groups")
    if groups is not None and (isinstance(groups, bool) or not isinstance(groups, int)):
        refuse_type("head_groups", shown(groups), "an integer or None")
    if groups is not None and groups < 1:
        refuse("head_groups", groups, "at least 1")
    for name in ("return_lse", "return_stats"):
        check_bool(name, options[name])
    call = Call(
        flat_q, flat_k, flat_v, k_prefix, v_prefix, FlashPrefill() if policy is None else policy_of(policy),
        final, options.pop("softmax_scale"), groups, options.pop("return_lse"), options.pop("return_stats"),
        {name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    shards.check(call)
    return call


def _agree(shards: Shards, mine: dict[str, Any], error: FlashPrefillError | None) -> None:
    """Raise on all ranks if one has refused its arguments or has others; once for each kind of call."""
    key = tuple(mine.items())
    if shards.ranks == 1 or (error is None and key in shards.agreed):
        return
    if error is not None and shards.agreed:
        return  # the other ranks may be on their way already
    mine = {**shards.described(), **mine}
    everyone: list[Any] = [None] * shards.ranks
    dist.all_gather_object(everyone, (mine, None if error is None else str(error)), group=shards.group)
    if error is not None:
        return  # this rank says what is wrong itself
    for rank, (_, what) in enumerate(everyone):
        if what is not None:
            raise InvalidArgumentError(f"rank {rank} has refused its arguments: {what}")
    for rank, (theirs, _) in enumerate(everyone):
        for name, value in everyone[0][0].items():
            if theirs[name] != value:
                refuse(f"{name} of rank {rank}", theirs[name], f"rank 0's ({value})")
    shards.agreed.add(key)


def prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    policy: Policy | str | None = None,
    *,
    shards: Shards,
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
    softmax_scale: float | None = None,
    final_chunk: bool | Sequence[bool] = True,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    head_groups: int | None = None,
    threads: int | None = None,
    backend: str | None = None,
    target: str | None = None,
) -> Any:
    """Compute causal attention of prompts whose rows are spread over ranks. All ranks call it.

    The result of each row has the bits that :func:`flashprefill.prefill_attention` gives in one process.

    Args:
        q: this rank's queries, [rows, heads, head_dim], or [prompts, rows of each, heads, head_dim] where
            prompts have equal lengths: what ``shards.shard`` makes of the whole.
        k: its keys, likewise with kv_heads, which divide heads.
        v: its values, of k's shape.
        policy: what to keep, as a policy or as text; the default is ``FlashPrefill()``. The same on all
            ranks.
        shards: which rows are whose: a :class:`Zigzag` or :class:`Ulysses`.
        prefix: keys and values of the tokens before, whole on every rank: [tokens of all prompts, kv_heads,
            head_dim] each, or [prompts, tokens, kv_heads, head_dim].
        softmax_scale: factor of the scores; the default is head_dim**-0.5.
        final_chunk: whether the rows end their prompt, so that the policy's dense tail applies; or one bool
            per prompt.
        out: where to write the result: of q's shape and dtype, in memory of its own.
        return_lse: return the natural logarithm of each row's softmax denominator too, fp32 [heads, rows],
            or [prompts, heads, rows of each] where q has 4 axes.
        return_stats: return a :class:`ShardStats` of this rank too.
        head_groups: Zigzag: groups of equally many KV heads, a divisor of their number. While one group is
            attended to the next is gathered. The default is one group, and from 32,768 rows per rank on a
            quarter of the heads and then the rest.
        threads: as in :func:`flashprefill.prefill_attention`.
        backend: as in :func:`flashprefill.prefill_attention`.
        target: as in :func:`flashprefill.prefill_attention`.

    Returns:
        out, of q's shape and dtype; or a tuple of out and the other results, in the order lse, stats.

    Raises:
        InvalidArgumentError, ArgumentTypeError: an argument is wrong, or is not that of the other ranks. When
            a kind of call is made for the first time, all ranks raise; later only the one with the mistake
            does, and the others wait for it, as for any rank that fails.
        UnsupportedError: the policy can't be computed exactly over these shards, or no backend does it.
    """
    if not isinstance(shards, Shards):
        refuse_type("shards", f"a {type(shards).__name__}", "a Zigzag or Ulysses")
    options = dict(
        final_chunk=final_chunk, softmax_scale=softmax_scale, head_groups=head_groups, return_lse=return_lse,
        return_stats=return_stats, threads=threads, backend=backend, target=target,
    )  # fmt: skip
    try:
        call = _checked((q, k, v), policy, shards, prefix, options)
        if out is not None:
            _check_out(out, q)
    except FlashPrefillError as error:
        _agree(shards, {}, error)
        raise
    _agree(shards, call.described(), None)
    flat, lse, parts = shards.prefill(call)
    batch = q.shape[0] if q.ndim == 4 else None
    result = flat if batch is None else flat.view(q.shape)
    if out is not None:
        result = out.copy_(result)
    results: list[Any] = [result]
    if return_lse:
        results.append(lse if batch is None or lse is None else lse.view(len(lse), batch, -1).transpose(0, 1))
    if return_stats:
        results.append(shards.stats_of(call, parts))
    return results[0] if len(results) == 1 else tuple(results)


def _check_out(out: Any, q: torch.Tensor) -> None:
    torch_op.check("out", out, q)
    if out.dtype != q.dtype:
        refuse_type("out.dtype", out.dtype, f"q's ({q.dtype})")
    if out.shape != q.shape:
        refuse("out.shape", tuple(out.shape), f"q's ({tuple(q.shape)})")


__all__ = ["Call", "ShardStats", "prefill_attention"]

"""Types of the verbs' arguments, for type checkers only: nothing imports this module when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar

import numpy.typing as npt
import torch

from .guard import Guard

Array = TypeVar("Array", npt.NDArray[Any], torch.Tensor)
Lengths: TypeAlias = Sequence[int] | npt.NDArray[Any] | torch.Tensor
Table: TypeAlias = Sequence[Sequence[int]] | npt.NDArray[Any] | torch.Tensor
Scale: TypeAlias = float | Sequence[float] | npt.NDArray[Any] | torch.Tensor
AxisOrder: TypeAlias = Literal["bthd", "bhtd"]
MathName: TypeAlias = Literal["input", "8bit"]


class Options(TypedDict, total=False):
    """What the verbs take by keyword."""

    softmax_scale: float | None
    cu_seqlens_q: Lengths | None
    cu_seqlens_k: Lengths | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    seqused_k: Lengths | None
    block_table: Table | None
    k_scale: Scale | None
    v_scale: Scale | None
    q_descale: Scale | None
    k_descale: Scale | None
    v_descale: Scale | None
    layout: AxisOrder | None
    threads: int | None
    backend: str | None
    target: str | None


class PrefillOptions(Options, total=False):
    """What prefill_attention takes besides."""

    math: MathName
    causal: bool
    final_chunk: bool | Sequence[bool]
    guard: Guard | str | None


class AttendOptions(Options, total=False):
    """What attend takes besides."""

    math: MathName
    causal: bool | None

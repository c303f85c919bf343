"""Several GPUs: one long prompt, read by all ranks of a torch.distributed process group together.

    shards = fp.distributed.Zigzag(131072)       # in each of the processes that torchrun starts
    q, k, v = (shards.shard(x) for x in (q, k, v))
    out = fp.distributed.prefill_attention(q, k, v, policy, shards=shards)
    fp.distributed.patch_model(model, policy)    # or: a Transformers model whose prompts are so read

One file for each question: shards.py says which rows are whose, zigzag.py and ulysses.py what travels,
pages.py where it arrives, call.py what is checked, model.py how Transformers' models get there. See
docs/several-gpus.md.

Importing this package imports torch.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "flashprefill.distributed needs torch: pip install torch", name="torch"
    ) from error  # fmt: skip

from .call import prefill_attention
from .shards import Chunk, Shards
from .stats import ShardStats
from .ulysses import Ulysses
from .zigzag import Zigzag

if TYPE_CHECKING:
    from .model import patch_model as patch_model
    from .model import unpatch_model as unpatch_model

__all__ = ["Chunk", "ShardStats", "Shards", "Ulysses", "Zigzag", "prefill_attention"]

_TRANSFORMERS = ("patch_model", "unpatch_model")


def __getattr__(name: str) -> Any:
    """Import what needs Transformers when it is asked for."""
    if name in _TRANSFORMERS:
        if find_spec("transformers") is None:
            message = f"{name} needs transformers: pip install transformers"
            raise ModuleNotFoundError(message, name="transformers") from None
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module 'flashprefill.distributed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_TRANSFORMERS})

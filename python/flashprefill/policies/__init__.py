"""Policies: which blocks of keys a tile of queries keeps.

Each is a plain frozen dataclass of numbers, with the defaults that its paper or our own study publishes,
checked when it is made. A policy counts in *blocks* of ``block_size`` keys. The words that all share:

``block_size``
    keys a block, a multiple of 16 from 16 to 1024.
``sink_blocks``
    blocks; the first so many of a sequence are always kept.
``window_blocks``
    blocks; always kept from ``window_blocks - 1`` before the block of the tile's first token up to the block
    of its last. The tile's own diagonal is kept even with 0.
``dense_tail_blocks``
    blocks; so many blocks' worth of the last query tiles of a prompt's final chunk keep everything.
``share_heads``
    the query heads of a KV head share one list of blocks, and a tile is floor(128 / group) tokens times the
    group's heads (FlashPrefill V2). Without it each query head has its own list and tiles of 128 tokens (V1).
``mean_correction``
    blocks left out, and visible to the whole tile, count by their mean key and mean value (V2).
"""

from .base import Policy
from .dense import Dense
from .flashprefill import FlashPrefill
from .flexprefill import FlexPrefill
from .mask_policy import MaskPolicy
from .minference import MInference
from .prism import Prism
from .rrattention import RRAttention
from .sample_attention import SampleAttention
from .sketch import Sketch
from .sparge_attn import SpargeAttn
from .streaming import Streaming
from .xattention import XAttention

__all__ = [
    "Dense",
    "FlashPrefill",
    "FlexPrefill",
    "MInference",
    "MaskPolicy",
    "Policy",
    "Prism",
    "RRAttention",
    "SampleAttention",
    "Sketch",
    "SpargeAttn",
    "Streaming",
    "XAttention",
]

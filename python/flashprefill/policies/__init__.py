"""Policies: which blocks of keys each tile of queries keeps.

Each is a frozen dataclass of numbers, checked when it is made. Defaults are the library's: those that the
method's paper, or our own study, publishes. A policy counts in *blocks* of ``block_size`` keys. Fields that
most of them share:

``block_size``
    keys per block, a multiple of 16 from 16 to 1024.
``sink_blocks``
    blocks; the first ``sink_blocks`` blocks of a sequence are always kept.
``window_blocks``
    blocks; always kept from ``window_blocks - 1`` before the block of the tile's first token up to the block
    of its last. The tile's own diagonal is kept even with 0.
``dense_tail_blocks``
    blocks; the last query tiles of a prompt's final chunk, as many as hold this many blocks, keep everything.
``share_heads``
    the query heads of a KV head share one list of blocks, and a tile is floor(128 / group) tokens times the
    group's heads (FlashPrefill V2). Without it each query head has its own list and tiles of 128 tokens (V1).
``mean_correction``
    blocks that are left out, and visible to the whole tile, count by their mean key and mean value (V2).
"""

from .base import Policy
from .dense import Dense
from .flashprefill import FlashPrefill
from .flexprefill import FlexPrefill
from .gather import Gather
from .mask_policy import MaskPolicy
from .minference import MInference
from .prism import Prism
from .reuse import Borrowed, Reuse, ReusePlan
from .rrattention import RRAttention
from .s2o import S2O
from .sample_attention import SampleAttention
from .sketch import Sketch
from .sparge_attn import SpargeAttn
from .streaming import Streaming
from .token_sparse import TokenSparse
from .vsprefill import VSPrefill
from .xattention import XAttention

__all__ = [
    "Borrowed",
    "Dense",
    "FlashPrefill",
    "FlexPrefill",
    "Gather",
    "MInference",
    "MaskPolicy",
    "Policy",
    "Prism",
    "RRAttention",
    "Reuse",
    "ReusePlan",
    "S2O",
    "SampleAttention",
    "Sketch",
    "SpargeAttn",
    "Streaming",
    "TokenSparse",
    "VSPrefill",
    "XAttention",
]

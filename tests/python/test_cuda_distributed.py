"""Several GPUs: attention over NCCL has the bits of one GPU."""

import pytest

import flashprefill as fp

torch = pytest.importorskip("torch")
if not (torch.cuda.is_available() and torch.cuda.device_count() >= 2):
    pytest.skip("needs two GPUs", allow_module_level=True)

from ranks import World  # noqa: E402
from shard_case import Case, same  # noqa: E402

pytestmark = pytest.mark.gpu
GPU = {"heads": (8, 2, 128), "dtype": torch.bfloat16, "device": "cuda"}
RANKS = 4 if torch.cuda.device_count() >= 4 else 2
POOLED = fp.FlashPrefill(alpha=0.5, query_pool=16)
SHARED = fp.FlashPrefill(alpha=0.5, query_pool=16, share_heads=True, mean_correction=True)
OTHERS = [
    fp.Dense(),
    POOLED,
    fp.FlashPrefill(alpha=0.5),
    fp.FlashPrefill(alpha=0.5, mean_correction=True),
    SHARED,
    fp.Sketch(mass=0.8),
    fp.XAttention(),
    fp.Streaming(),
]


@pytest.fixture(scope="module")
def world():
    world = World(RANKS, "nccl")
    yield world
    world.close()


@pytest.mark.parametrize("tokens", [8192, 16384 + 77])
@pytest.mark.parametrize("policy", OTHERS, ids=str)
def test_bits_of_one_gpu(world, policy, tokens):
    # Early chunks of 8K are so short that CUDA would attend to them densely, were they prompts of their own.
    unit = 32 if policy.share_heads else 128
    same(world, RANKS, Case(policy, (tokens,), unit=unit, **GPU))


@pytest.mark.parametrize("groups", [1, 2])
def test_head_groups(world, groups):
    same(world, RANKS, Case(POOLED, (20000,), options={"head_groups": groups}, **GPU))


def test_prefix_and_batch(world):
    same(world, RANKS, Case(POOLED, (6000, 9000), (1000, 4096), **GPU))
    same(world, RANKS, Case(POOLED, (8192, 8192), batched=True, **GPU))
    same(world, RANKS, Case(fp.Sketch(), (5000,), (12345,), options={"final_chunk": False}, **GPU))
    same(world, RANKS, Case(SHARED, (2000,), (77,), unit=32, **GPU))


@pytest.mark.parametrize("policy", [fp.Dense(), POOLED, fp.FlexPrefill(), fp.XAttention()], ids=str)
def test_ulysses(world, policy):
    same(world, RANKS, Case(policy, (9000,), layout="Ulysses", **GPU))
    same(world, RANKS, Case(policy, (4000, 5000), (100, 0), layout="Ulysses", **GPU))


def test_other_heads(world):
    """Heads of 64 and fp16, in four groups."""
    shape = {"heads": (8, 4, 64), "dtype": torch.float16, "device": "cuda"}
    same(world, RANKS, Case(POOLED, (10000,), options={"head_groups": 4}, **shape))


def test_portable_kernels(world):
    """They select from another number of keys on than Hopper's."""
    for tokens in (2500, 8192):
        same(world, RANKS, Case(POOLED, (tokens,), options={"target": "portable"}, **GPU))

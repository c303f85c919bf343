"""Transformers' models whose prompts are read by several ranks, over gloo, beside one process."""

import pytest

import flashprefill as fp

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

import transformers_models as models  # noqa: E402
from ranks import World  # noqa: E402

KEEP = fp.FlashPrefill(alpha=0.9, block_size=16, sink_blocks=1, window_blocks=2, dense_tail_blocks=2)
SHARED = fp.FlashPrefill(alpha=0.9, block_size=32, sink_blocks=1, window_blocks=1, share_heads=True)


@pytest.fixture(scope="module")
def world():
    world = World(2)
    yield world
    world.close()


def _read(group, name, policy, layout):
    """Differences between a model read by all ranks and by one."""
    model, cache = models.make(name), models.CACHE
    ids = torch.randint(1, 96, (2, 900), generator=torch.Generator().manual_seed(1))
    fp.patch_model(model, policy)
    want = model(ids).logits
    written = model.generate(ids, max_new_tokens=6, do_sample=False)
    first = model(ids[:, :580], final_chunk=False)
    rest = model(ids[:, 580:], **{cache: first[cache]}).logits

    fp.distributed.patch_model(model, policy, group=group, layout=getattr(fp.distributed, layout))
    found = {}
    with fp.collect_stats(model) as stats:
        output = model(ids)
        found["last"] = (model(ids, logits_to_keep=1).logits - want[:, -1:]).abs().max()
    found["all"] = (output.logits - want).abs().max()
    assert output[cache].get_seq_length() == 900
    assert stats.sparse_calls == 2 * stats.layers and 0 < stats.mean_density <= 1
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), written)
    first = model(ids[:, :580], final_chunk=False)
    found["in two pieces"] = (model(ids[:, 580:], **{cache: first[cache]}).logits - rest).abs().max()
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False)
    found["embeddings"] = (embedded.logits - want).abs().max()
    assert getattr(embedded, cache) is None
    short = model(ids[:, :200]).logits  # each rank alone
    fp.distributed.unpatch_model(model)
    assert model(ids).logits.shape == want.shape
    found["short"] = (short - fp.patch_model(model, policy)(ids[:, :200]).logits).abs().max()
    return {what: float(difference) for what, difference in found.items()}


@pytest.mark.parametrize(
    ("name", "policy", "layout"),
    [
        ("llama", KEEP, "Zigzag"),
        ("llama", {"default": SHARED, 0: None}, "Zigzag"),
        ("llama", fp.FlexPrefill(block_size=32, min_budget=64), "Ulysses"),
        ("qwen3", KEEP, "Zigzag"),
        ("qwen3", fp.Dense(), "Ulysses"),
    ],
    ids=str,
)
def test_a_model_says_what_it_says_in_one_process(world, name, policy, layout):
    for found in world.run(2, _read, name, policy, layout):
        assert all(difference < 1e-4 for difference in found.values()), found


def _refused(group, name, change):
    rank = torch.distributed.get_rank(group)
    model = models.make(name)
    fp.distributed.patch_model(model, KEEP, group=group)
    ids = torch.ones(1, 600, dtype=torch.long)
    options = dict(change)
    if options.pop("pad", False):
        options["attention_mask"] = (torch.arange(600) > 3).long()[None]
    if options.pop("differ", False):
        ids = ids + rank
    model(ids, **options)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"pad": True}, "attention_mask has padding"),
        ("llama", {"differ": True}, "input_ids of rank 1 is not rank 0's"),
        ("llama", {"output_hidden_states": True}, "output_hidden_states=True"),
        ("mistral_window", {}, "layer 0 of MistralAttention can't be computed over several ranks"),
    ],
)
def test_refusals(world, name, change, message):
    for fine, what in world.outcomes(2, _refused, name, change):
        assert not fine
        assert message in what[1], what[2]


def test_without_a_process_group():
    with pytest.raises(fp.UnsupportedError, match="torchrun"):
        fp.distributed.patch_model(models.make("llama"), KEEP)

"""The guard in Transformers' models: patch_model(guard=...), collect_stats, and where it is refused."""

import dataclasses

import numpy as np
import pytest

import flashprefill as fp
from flashprefill.transformers import attention
from transformers_models import BEST, LENGTH, make, tokens, torch

LOW = dataclasses.replace(BEST, sink_blocks=0, window_blocks=1, dense_tail_blocks=0)


def read(model, ids):
    with torch.no_grad(), fp.collect_stats(model) as stats:
        return model(ids).logits, stats


def test_every_layer_is_guarded():
    model, ids = make("llama"), tokens(2)
    dense = read(model, ids)[0]
    fp.patch_model(model, LOW)
    plain, stats = read(model, ids)
    assert stats.guard is None
    fp.patch_model(model, LOW, guard="observe(target=1)")
    seen, stats = read(model, ids)
    assert torch.equal(plain, seen)
    assert stats.recall.shape == (2, 4) and (stats.recall < 1).all()
    assert stats.guard.heads == 16 and stats.guard.outcomes["low"] == 16
    assert stats.guard.certificate <= stats.guard.recall == pytest.approx(stats.recall.mean(), abs=0.01)
    assert str(stats.guard) in str(stats) and stats.guard_seconds > 0
    layers = [call.parts[0].guard.guard.layer for call in stats.calls]
    assert layers == [0, 1], "the layer is part of the seed"
    fp.patch_model(model, LOW, guard="strict(target=1)")
    strict, stats = read(model, ids)
    assert stats.guard.outcomes["dense"] == 16
    torch.testing.assert_close(strict, dense, atol=1e-4, rtol=1e-4)


def test_a_state_learns_over_chunks():
    model, ids = make("llama"), tokens(1)
    state = fp.GuardState()
    fp.patch_model(model, LOW, guard=fp.Guard("repair", state=state))
    model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=150)
    assert set(state.levels) == {0, 1}
    assert all((levels > 0).any() for levels in state.levels.values())


def test_padded_batches():
    model, ids = make("llama"), tokens(2)
    mask = torch.ones_like(ids)
    mask[0, :60] = 0
    fp.patch_model(model, LOW, guard="observe")
    with torch.no_grad(), fp.collect_stats(model) as stats:
        model(ids, attention_mask=mask)
    assert len(stats.calls[0].parts) == 2, "two spans"
    assert (np.nan_to_num(stats.recall) > 0).all()


def test_guards_are_refused_where_there_is_no_code_for_them():
    model = fp.patch_model(make("llama"), LOW, guard="observe")
    token = attention.over_ranks.set(lambda *_: None)
    try:
        with pytest.raises(fp.UnsupportedError, match="guard is given; it must be None for .* over several"):
            read(model, tokens(1))
    finally:
        attention.over_ranks.reset(token)
    with pytest.raises(fp.InvalidArgumentError, match="guard's mode"):
        fp.patch_model(model, LOW, guard="hope")
    assert LENGTH > 128

"""Variants of what users report: threads, forks, transforms, masks of any dtype, gradients of one input."""

from __future__ import annotations

import copy
import os
import signal
import threading

import pytest

import transformers_models
from transformers_models import (
    CACHE,
    KEEP,
    LENGTH,
    STREAMING,
    attention,
    fp,
    logits,
    make,
    padding,
    positions,
    tokens,
    torch,
    transformers,
)

models, patched, quiet = transformers_models.models, transformers_models.patched, transformers_models.quiet


def in_threads(count, work):
    """Run work(number) in threads at once, and return what they raised."""
    errors = []

    def run(number):
        try:
            work(number)
        except Exception as error:  # handed to the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def is_sparse(model):
    with fp.collect_stats(model) as stats:
        logits(model, tokens())
    return stats.sparse_calls > 0


def test_threads_that_patch_and_unpatch_models_of_their_own():
    several = [make("llama") for _ in range(4)]

    def work(number):
        for _ in range(3):
            fp.patch_model(several[number], STREAMING)
            assert is_sparse(several[number])
            fp.unpatch_model(several[number])
            assert not is_sparse(several[number])

    assert not in_threads(4, work)


def test_400_short_lived_threads(models, patched):
    model, ids = patched(models("llama"), STREAMING), tokens(1, 200)
    for _ in range(40):
        assert not in_threads(10, lambda _: logits(model, ids))


def test_a_fork_inside_a_thread(models, patched):
    model, ids = patched(models("llama"), STREAMING), tokens()
    wanted = logits(model, ids)
    codes = []

    def work(_):
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if torch.equal(logits(model, ids), wanted) else 3)
            finally:
                os._exit(4)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    assert not in_threads(1, work) and codes == [0]


def test_copies_of_copies_in_mixed_order():
    model = make("llama")
    before = copy.deepcopy(model)
    fp.patch_model(model, STREAMING)
    unpatched, kept = copy.deepcopy(model), copy.deepcopy(model)
    fp.unpatch_model(unpatched)
    again = fp.patch_model(copy.deepcopy(unpatched), KEEP)
    of_kept = copy.deepcopy(kept)
    fp.unpatch_model(kept)
    found = [is_sparse(each) for each in (model, before, unpatched, kept, again, of_kept)]
    assert found == [True, False, False, False, True, True]


def test_vmap_is_dense(patched):
    model, embeds = patched(make("llama"), STREAMING), torch.randn(2, 200, 48)

    def one(x):
        return model(inputs_embeds=x[None], use_cache=False).logits

    with torch.no_grad():
        got = torch.vmap(one)(embeds)
        fp.unpatch_model(model)
        torch.testing.assert_close(got, torch.stack([one(x) for x in embeds]), atol=1e-5, rtol=1e-5)


class Layer(torch.nn.Module):
    """What an attention layer is to the attention function."""

    is_causal = True
    num_key_value_groups = 2
    layer_idx = 0


@pytest.mark.parametrize("which", range(3))
def test_one_of_q_k_v_wants_a_gradient(which):
    module = Layer()
    setattr(module, attention.ATTRIBUTE, attention.Layer(KEEP, eager=False))
    tensors = [torch.randn(1, heads, LENGTH, 16) for heads in (4, 2, 2)]
    tensors[which].requires_grad_()
    with fp.collect_stats(module) as stats:
        out = attention.flashprefill_attention(module, *tensors, None)[0]
        out.sum().backward()
        with torch.no_grad():
            attention.flashprefill_attention(module, *tensors, None)
    assert [call.reason for call in stats.calls] == ["gradients", ""]
    assert tensors[which].grad is not None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_causal_masks_of_pairs(dtype, models, patched):
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    if dtype != torch.bool:
        seen = torch.where(seen, 0.0, torch.finfo(dtype).min)
    model, ids = models("llama"), tokens(2)
    wanted = logits(model, ids, attention_mask=seen)
    got = logits(patched(model, STREAMING), ids, attention_mask=seen)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_over_a_cached_prefix(side, dtype, models, patched):
    model, length, cached = models("llama"), LENGTH + 130, 130
    ids, mask = tokens(2, length), padding([length, length - 60], side, length)
    places, rows = positions(mask), mask.bool()
    mask = mask.to(dtype)

    def run():
        cache = transformers.DynamicCache(config=model.config)
        parts = []
        with torch.no_grad():
            for here in (slice(cached), slice(cached, length)):
                inputs = dict(attention_mask=mask[:, : here.stop], position_ids=places[:, here])
                parts.append(model(ids[:, here], **inputs, **{CACHE: cache}).logits)
        return torch.cat(parts, 1)

    wanted = run()
    patched(model, KEEP)
    with fp.collect_stats(model) as stats:
        got = run()
    assert stats.sparse_calls == 4 and not stats.fallbacks
    torch.testing.assert_close(got[rows], wanted[rows], atol=1e-4, rtol=1e-4)


class Prompts(torch.utils.data.Dataset):
    """Logits as a DataLoader's workers compute them."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 2

    def __getitem__(self, seed):
        return logits(self.model, tokens(1, 200, seed))[0, -1]


@pytest.mark.parametrize("method", ["fork"])
def test_workers_of_a_data_loader(method):
    model = fp.patch_model(make("llama"), STREAMING)
    wanted = [logits(model, tokens(1, 200, seed))[:, -1] for seed in range(2)]
    loader = torch.utils.data.DataLoader(Prompts(model), num_workers=1, multiprocessing_context=method)
    for got, expected in zip(loader, wanted, strict=True):
        torch.testing.assert_close(got, expected)


def test_forks_while_other_threads_compute(models, patched):
    model, ids = patched(models("llama"), STREAMING), tokens()
    done, codes = threading.Event(), []

    def work(number):
        if number > 0:
            while not done.is_set():
                logits(model, ids)
            return
        try:
            for _ in range(4):
                child = os.fork()
                if child == 0:
                    signal.alarm(120)
                    os._exit(0 if torch.equal(logits(model, ids), wanted) else 3)
                codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        finally:
            done.set()

    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's own threads do not live on in a forked child
    try:
        wanted = logits(model, ids)
        assert not in_threads(3, work) and codes == [0] * 4
    finally:
        torch.set_num_threads(torch_threads)


def learned_prefix(model):
    """Keys and values of 20 tokens that are trained, as in prefix tuning, and a cache that begins so."""
    draw = torch.Generator().manual_seed(3)
    prefix = [torch.randn(1, 2, 20, 16, generator=draw).requires_grad_() for _ in range(4)]
    cache = transformers.DynamicCache(config=model.config)
    for layer in range(2):
        cache.update(prefix[2 * layer], prefix[2 * layer + 1], layer)
    return prefix, {CACHE: cache}


TRAINED = {
    "norms": lambda model: [layer.input_layernorm.weight for layer in model.model.layers],
    "embedding": lambda model: [model.model.embed_tokens.weight],
    "last layer's mlp": lambda model: list(model.model.layers[1].mlp.parameters()),
    "prefix": lambda model: [],
}


@pytest.mark.parametrize("what", TRAINED)
def test_what_is_trained_gets_its_gradient(what):
    def gradients(patch):
        model, ids = make("llama").requires_grad_(False).train(), tokens()
        trained, inputs = TRAINED[what](model), {}
        for weight in trained:
            weight.requires_grad_()
        if what == "prefix":
            trained, inputs = learned_prefix(model)
        if patch:
            fp.patch_model(model, STREAMING)
        loss = model(ids, labels=ids, **inputs).loss
        return torch.autograd.grad(loss, trained)

    for got, wanted in zip(gradients(True), gradients(False), strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bfloat16, torch.float64])
def test_masks_of_other_dtypes(dtype, models, patched):
    model, ids, mask = models("llama"), tokens(2), padding([LENGTH, 170], "left")
    wanted = logits(model, ids, attention_mask=mask.to(dtype))
    patched(model, KEEP)
    with fp.collect_stats(model) as stats:
        got = logits(model, ids, attention_mask=mask.to(dtype))
    assert stats.sparse_calls == 2
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_cache", [False, True])
def test_sequences_that_positions_alone_tell_apart(use_cache, models, patched):
    model, ids = models("llama"), tokens()
    places = torch.cat([torch.arange(120), torch.arange(LENGTH - 120)])[None]
    wanted = logits(model, ids, position_ids=places, use_cache=use_cache)
    got = logits(patched(model, KEEP), ids, position_ids=places, use_cache=use_cache)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


class Passes(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatches(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Passes, Dispatches, lambda: torch.device("cpu"), torch.profiler.profile])
def test_modes_of_the_users_own(mode, models, patched):
    model, ids = models("llama"), tokens()
    wanted = logits(model, ids)
    patched(model, KEEP)
    with fp.collect_stats(model) as stats, mode():
        got = logits(model, ids)
    assert stats.sparse_calls == (0 if mode is Dispatches else 2)  # it may want to see the operators
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_part_of_a_model_that_sees_and_its_copy():
    model = make("qwen2_5_vl")
    fp.patch_model(model.model.language_model, STREAMING)
    other = copy.deepcopy(model)
    fp.unpatch_model(model.model.language_model)
    assert is_sparse(other) and not is_sparse(model)
    fp.unpatch_model(other.model.language_model)
    assert not is_sparse(other)


def test_another_dtype_after_the_patch():
    model = fp.patch_model(make("llama"), STREAMING)
    assert is_sparse(model.to(torch.bfloat16)) and is_sparse(model.half())
    with pytest.warns(fp.transformers.FlashPrefillWarning, match="float64"):
        assert not is_sparse(model.double())

"""With all blocks kept the engine answers what the stock engine answers, whatever the scheduler does."""

import pytest
from answers import Request, assert_same, tokens

import flashprefill as fp
from flashprefill import sglang as plugin

DENSE = plugin.config(fp.Dense())
ALL_KEPT = plugin.config(fp.FlashPrefill(alpha=0.0))  # the selection runs, and keeps everything
LIMIT = 5e-4  # of log-probabilities: rounding of fp32 through three layers; 2e-5 was seen

ASKED = [Request(tokens(n, n)) for n in (2001, 1500, 777, 128, 90)]
COMMON = tokens(1111, 1)
PREFIXES = [
    Request(COMMON + tokens(300, 2)),
    Request(COMMON + tokens(500, 3), at=14),
    Request(COMMON[:1000], at=28),
]
YARN = {
    "type": "yarn", "rope_type": "deepseek_yarn", "factor": 1.0, "original_max_position_embeddings": 8192,
    "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
# One that generates for as long as the others come, some that leave it early.
COME_AND_GO = [
    Request(tokens(60, 60), 40),
    Request(tokens(1300, 13), 12, at=2),
    Request(tokens(700, 7), 20, at=4),
    Request(tokens(30, 3), 9, at=5),
    Request(tokens(1900, 19), 5, at=9),
]


def both(serve, model, requests, policy=DENSE, limit=LIMIT, **arguments):
    """Serve with the stock engine, where nothing may be ours, and with ours; compare them."""
    stock = serve(model, requests, **arguments)
    assert not stock.error, stock.error
    assert stock.registry == [] and not stock.backend.startswith("FlashPrefill") and not stock.numbers
    ours = serve(model, requests, policy, **arguments)
    assert not ours.error, ours.error
    assert set(ours.registry) == set(plugin.BACKENDS)
    assert_same(stock.answers, ours.answers, limit)
    assert not ours.numbers["fallbacks"]
    assert [a.cached for a in stock.answers] == [a.cached for a in ours.answers]
    return stock, ours


@pytest.mark.parametrize("policy", [DENSE, ALL_KEPT], ids=["dense", "all-kept"])
def test_in_one_piece(serve, llama, policy):
    """Whole prompts, several in a batch."""
    _, ours = both(serve, llama, ASKED, policy)
    assert ours.backend == "FlashPrefillTorchNativeAttnBackend"
    assert ours.numbers["density"] == 1.0
    # Dense is ours from a tile of rows on; with a sink and a window prompts of up to 768 tokens are not.
    assert ours.numbers["sparse_rows"] == 2001 + 1500 + 777 + (128 if policy is DENSE else 0)


@pytest.mark.parametrize("page", [1, 16, 64, 128])
def test_chunks_over_a_radix_cache(serve, llama, page):
    """The second and third prompt begin as the first did; chunks are cut to pages."""
    _, ours = both(serve, llama, PREFIXES, page_size=page, chunked_prefill_size=384)
    cached = [answer.cached for answer in ours.answers]
    assert cached[0] == 0 and cached[1] == 1111 // page * page and cached[2] in range(896, 1001)
    assert ours.numbers["sparse_chunks"] >= 5 and ours.numbers["density"] == 1.0


@pytest.mark.parametrize("page", [1, 64])
def test_mixed_chunks(serve, llama, page):
    """Chunks of prompts and tokens that are generated in one batch."""
    _, ours = both(
        serve, llama, COME_AND_GO, page_size=page, chunked_prefill_size=512, enable_mixed_chunk=True
    )
    assert ours.together >= 3
    assert ours.numbers["sparse_rows"] > 3000
    assert ours.numbers["dense_rows"]["decode"] == sum(request.new - 1 for request in COME_AND_GO)


def test_without_overlap(serve, llama):
    both(serve, llama, COME_AND_GO, chunked_prefill_size=333, disable_overlap_schedule=True)


def test_retraction(serve, llama):
    """Requests that generate until the cache is full: one is put back, and read again with its answer.

    SGLang keeps room for all tokens of a request that cannot end, so these could end.
    """
    requests = [Request(tokens(200, i), 110, at=i, ends=True) for i in range(4)]
    stock, ours = both(
        serve, llama, requests, max_total_tokens=720, disable_radix_cache=True, limit=2e-3,
        schedule_conservativeness=0.01, context_length=1024,
    )  # fmt: skip
    assert stock.retracted and ours.retracted
    assert ours.numbers["sparse_rows"] > 4 * 200


def test_bf16(serve, llama):
    stock = serve(llama, ASKED[:2], dtype="bfloat16")
    ours = serve(llama, ASKED[:2], DENSE, dtype="bfloat16")
    assert_same(stock.answers, ours.answers, 0.5, near=0.5)
    assert ours.numbers["density"] == 1.0 and not ours.numbers["fallbacks"]


def test_first_layers_dense(serve, llama):
    _, ours = both(serve, llama, ASKED[:2], plugin.config("dense", first_dense_layers=2))
    assert ours.numbers["calls"] == 1, "one batch, one layer of three"
    assert "1 of 3 layers of a kind" in ours.log and "2 stay dense: first_dense_layers" in ours.log


def test_softcapping_stays_dense(serve, models):
    _, ours = both(serve, models("gemma2", hidden_act="gelu_pytorch_tanh"), ASKED[1:3], context_length=4096)
    assert ours.backend == "TorchNativeAttnBackend" and ours.numbers["calls"] == 0
    assert "stay dense: logit softcapping" in ours.log or "stay dense: a sliding window" in ours.log


def test_windows_stay_dense(serve, models):
    """Every second layer has a window and a cache of its own."""
    _, ours = both(serve, models("gemma3"), ASKED[1:4], context_length=4096, chunked_prefill_size=640)
    assert "2 of 4 layers of a kind" in ours.log and "2 stay dense: a sliding window" in ours.log
    assert ours.numbers["calls"] > 0 and ours.numbers["density"] == 1.0


def test_latent_caches_stay_dense(serve, models):
    """The engine only starts: its torch_native cannot compute this attention itself."""
    model = models("mla", rope_scaling=YARN, moe_layer_freq=1)
    ours = serve(model, [], DENSE, context_length=4096)
    assert not ours.error, ours.error
    assert not ours.backend.startswith("FlashPrefill") and "latent cache (MLA)" in ours.log


def test_a_request_that_leaves(serve, llama):
    """In the middle of its chunks, and while it generates; the others do not notice."""
    requests = [
        Request(tokens(2500, 1), 8),
        Request(tokens(2600, 2), 8, at=2, abort_at=9),
        Request(tokens(300, 3), 60, at=1, abort_at=20),
        Request(tokens(900, 4), 8, at=12),
    ]
    arguments = {"chunked_prefill_size": 256, "enable_mixed_chunk": True}
    stay = [requests[0], requests[3]]
    stock = serve(llama, stay, **arguments)
    ours = serve(llama, requests, DENSE, **arguments)
    assert not ours.error
    assert_same(stock.answers, [ours.answers[0], ours.answers[3]], LIMIT)
    assert len(ours.answers[2].tokens) < 60


def test_a_prompt_that_is_too_long(serve, llama):
    """It is refused by the engine with its own message; the next one is answered."""
    requests = [Request(tokens(1200, 1)), Request(tokens(500, 2), at=2)]
    _, ours = both(serve, llama, requests[1:], context_length=1024)
    longer = serve(llama, requests, DENSE, context_length=1024)
    assert not longer.error, longer.error
    assert longer.answers[0].reason["type"] == "abort" and "exceeds the maximum" in str(
        longer.answers[0].reason
    )
    assert_same(ours.answers, longer.answers[1:], LIMIT)

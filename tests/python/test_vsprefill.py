"""VSPrefill: its rule said a second time in NumPy, its file, its policy by layer, and kept logits."""

import json
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flashprefill as fp
from flashprefill.policies.indexer import Indexer, LayerWeights


def weights(kv_heads=2, head_dim=16, hidden=12, layers=(0,), seed=0, **more):
    """An indexer whose logits have a deviation of about 2."""
    draw = np.random.default_rng(seed)

    def layer():
        up = draw.normal(size=(kv_heads, hidden, 2 * head_dim)) / np.sqrt(head_dim)
        rest = (draw.normal(size=(kv_heads, hidden)) * s for s in (0.3, 2 / hidden**0.5, 2 / hidden**0.5))
        return LayerWeights(*(x.astype(np.float32) for x in (up, *rest)))

    return Indexer({n: layer() for n in layers}, "tiny", **more)


def arrays(q_len, k_len, heads=4, kv_heads=2, dim=16, seed=0):
    draw = np.random.default_rng(seed)
    q = draw.normal(size=(q_len, heads, dim)).astype(np.float32)
    k, v = (draw.normal(size=(k_len, kv_heads, dim)).astype(np.float32) for _ in range(2))
    return q, k, v


def predicted(layer, head, k, v):
    """(verticals, slashes): the two softmaxes of a KV head, float64."""
    x = np.concatenate([k[:, head], v[:, head]], axis=1).astype(float)
    z = x @ layer.up[head].astype(float).T + layer.bias[head]
    z = z / (1 + np.exp(-z))
    logits = z @ layer.vertical[head], z @ layer.slash[head]
    return [np.exp(y - y.max()) / np.exp(y - y.max()).sum() for y in logits]


def fewest(share, mass):
    """The fewest that hold the mass, and how near to a tie it was."""
    order = np.argsort(-share, kind="stable")
    sums = np.cumsum(share[order])
    count = int(np.searchsorted(sums, mass)) + 1
    return set(order[:count].tolist())


@given(st.integers(1, 300), st.integers(0, 200), st.sampled_from([0.05, 0.2, 0.6]), st.booleans())
def test_rule(engine, rows, prefix, mass, share_heads):
    """Blocks of the verticals, blocks that slashes cross; the same for the query heads of a KV head."""
    q, k, v = arrays(rows, prefix + rows, seed=rows)
    indexer = weights(seed=prefix)
    policy = fp.VSPrefill(
        indexer, mass, mass / 4, "blocks", 32, sink_blocks=0, window_blocks=0, share_heads=share_heads
    )
    mask = fp.select(q, k, policy, v=v, **engine)
    tile = 64 if share_heads else 128
    for head, bits in enumerate(mask.dense()):
        vertical, slash = predicted(indexer.layers[0], head if share_heads else head // 2, k, v)
        kept, lines = fewest(vertical, mass), fewest(slash, mass / 4)
        wrong = 0
        for m in range(bits.shape[0]):
            first, last = prefix + m * tile, prefix + min(m * tile + tile, rows) - 1
            want = {t // 32 for t in kept if t <= last}
            for d in lines:
                want |= {t // 32 for t in (first - d, last - d) if t >= 0}
                want |= set(range(max(0, first - d) // 32, (last - d) // 32 + 1)) if last >= d else set()
            want |= set(range(first // 32, last // 32 + 1))
            want = {b for b in want if b <= last // 32}
            wrong += len(want ^ set(np.flatnonzero(bits[m]).tolist()))
        assert wrong <= 2 * bits.shape[0]  # a token at the threshold may go either way
        assert wrong == 0 or min(abs(np.cumsum(np.sort(vertical)[::-1]) - mass).min(), 1) < 1e-3 or mass < 0.3


def test_values_decide():
    q, k, v = arrays(512, 512)
    policy = fp.VSPrefill(weights(), 0.1, 0.01, "blocks", 16, sink_blocks=0, window_blocks=0)
    one, other = (fp.select(q, k, policy, v=x).dense() for x in (v, v[::-1].copy()))
    assert (one != other).any()
    with pytest.raises(ValueError, match="v is None; it must be given: VSPrefill reads values"):
        fp.select(q, k, policy)


@pytest.mark.parametrize("rounding", ["blocks", "tokens"])
def test_prefill_is_select_and_attend(engine, rounding):
    q, k, v = arrays(300, 420)
    masses = (0.3, 0.1) if rounding == "tokens" else (0.02, 0.005)  # random tokens are in every block
    policy = fp.VSPrefill(weights(), *masses, rounding=rounding, block_size=32)
    out, stats = fp.prefill_attention(q, k, v, policy, return_stats=True, **engine)
    mask = fp.select(q, k, policy, v=v, **engine)
    np.testing.assert_array_equal(out, fp.attend(q, k, v, mask, **engine))
    assert stats.mean_density == pytest.approx(mask.density)
    assert 0.05 < mask.density < 0.95
    if rounding == "tokens":
        vertical, slash = predicted(weights().layers[0], 0, k, v)
        lists = np.asarray(mask.vertical_slash)[0, 1]
        assert abs(lists[0] - len(fewest(vertical, 0.3))) <= 1
        assert abs(lists[1] - len(fewest(slash, 0.1))) <= 1


def test_all_mass_is_dense():
    q, k, v = arrays(200, 200)
    out, stats = fp.prefill_attention(q, k, v, fp.VSPrefill(weights(), 1.0), return_stats=True)
    np.testing.assert_allclose(out, fp.prefill_attention(q, k, v, fp.Dense()), atol=1e-5)
    assert stats.mean_density == 1


def test_chunks_select_what_they_would_alone():
    """A prompt by chunks, and another one in between: logits that were kept change nothing."""
    policy = fp.VSPrefill(weights(seed=9), 0.05, 0.01, "blocks", 16)
    (q, k, v), other = arrays(640, 640, seed=1), arrays(640, 640, seed=2)
    fresh = [fp.VSPrefill(weights(seed=9), 0.05, 0.01, "blocks", 16)]
    for end in (128, 256, 640):
        for q_, k_, v_ in ((q, k, v), other):
            begin = {128: 0, 256: 128, 640: 256}[end]
            parts = q_[begin:end], k_[:end], v_[:end]
            mask = fp.select(*parts[:2], policy, v=parts[2], final_chunk=end == 640)
            vertical, _ = predicted(policy.weights.layers[0], 0, *parts[1:])
            alone = fp.select(*parts[:2], fresh[0], v=parts[2], backend="reference", final_chunk=end == 640)
            assert (mask.dense() != alone.dense()).mean() < 0.01


def test_logits_of_a_prefix_are_kept():
    indexer = weights(seed=77)
    policy = fp.VSPrefill(indexer, 0.3, 0.1, block_size=16)
    q, k, v = arrays(512, 512, seed=3)
    from flashprefill.policies import weights as module

    held = module._BOUND[module.number_of(indexer, 0)]
    fp.select(q, k, policy, v=v)  # a whole prompt: nothing that a later call asks for
    assert held.logits.size == 0
    fp.select(q[:300], k[:300], policy, v=v[:300], final_chunk=False)
    entries = held.logits.view(np.uint64)[..., 0]
    assert (entries[0, :, :300] != 0).all() and not entries[0, :, 300:].any()
    before = held.logits[0, :, :300].copy()
    fp.select(q[300:], k, policy, v=v)
    assert (held.logits.view(np.uint64)[..., 0][0, :, :512] != 0).all()
    np.testing.assert_array_equal(before, held.logits[0, :, :300])


# ------------------------------------------------------------------ the policy


def test_layers():
    indexer = weights(layers=(1, 4))
    policy = fp.VSPrefill(indexer)
    assert policy.at_layer(4).layer == 4
    assert isinstance(policy.at_layer(0), fp.Dense)
    assert policy.at_layer(1).text != policy.at_layer(4).text
    q, k, v = arrays(200, 200)
    with pytest.raises(ValueError, match="layer is None; it must be a layer of the weights"):
        fp.prefill_attention(q, k, v, policy)
    with pytest.raises(ValueError, match="layer is 2; it must be one of the weights': 1, 4"):
        fp.VSPrefill(indexer, layer=2)
    again = pickle.loads(pickle.dumps(policy.at_layer(4)))
    assert again == policy.at_layer(4) and again.text == policy.at_layer(4).text


def test_without_weights_the_forced_blocks_alone():
    q, k, v = arrays(500, 500)
    with pytest.warns(UserWarning, match="train-indexer"):
        policy = fp.VSPrefill(block_size=64)
    forced = fp.Streaming(sink_blocks=1, window_blocks=2, dense_tail_blocks=0, block_size=64)
    np.testing.assert_array_equal(fp.select(q, k, policy, v=v).dense(), fp.select(q, k, forced).dense())


def test_refusals():
    with pytest.raises(TypeError, match="weights is a int; it must be an Indexer"):
        fp.VSPrefill(3)
    with pytest.raises(ValueError, match="share_heads is True; it must be False with rounding"):
        fp.VSPrefill(weights(), rounding="tokens", share_heads=True)
    q, k, v = arrays(200, 200, dim=32)
    with pytest.raises(ValueError, match="the weights' head_dim is 16; it must be the problem's"):
        fp.prefill_attention(q, k, v, fp.VSPrefill(weights()))
    from flashprefill.engines import options

    with pytest.raises(ValueError, match="VSPrefill's weights and"):
        options._alone(fp.VSPrefill(weights()))
    with pytest.raises(NotImplementedError, match="heads 0 to 1 of 4"):
        fp.VSPrefill(weights())._at_heads(0, 2, 4)


class Config:
    num_attention_heads, num_key_value_heads, head_dim, num_hidden_layers = 4, 2, 16, 6
    rope_parameters = {"rope_theta": 10000.0}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_key_value_heads": 4}, "is for KV heads 2, and the model has 4"),
        ({"head_dim": 64}, "is for head_dim 16, and the model has 64"),
        ({"num_hidden_layers": 4}, "is for weights of layer 4, and the model has 4 layers"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "is for the rotary base 10000, and the model has 500000"),
    ],
)
def test_a_model_that_the_weights_are_not_for(change, message):
    policy = fp.VSPrefill(weights(layers=(1, 4), rope_theta=10000.0))
    policy.check_model(Config())
    with pytest.raises(ValueError, match=message):
        policy.check_model(type("Other", (Config,), change)())


# ------------------------------------------------------------------ the file


def test_save_and_load(tmp_path):
    """Weights that bf16 holds come back bit for bit, by us and by the format's own library."""
    path = tmp_path / "i.safetensors"
    indexer = weights(layers=(0, 3), rope_theta=100000.0, notes={"step": "7"})
    indexer.save(path)
    once = Indexer.load(path)
    once.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert (once.kv_heads, once.head_dim, once.hidden, once.model) == (2, 16, 12, "tiny")
    assert once.rope_theta == 100000.0 and once.notes["step"] == "7"
    for mine, theirs in zip(once.layers[3], indexer.layers[3], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2**-8)
    indexer.save(path, "fp32")
    assert Indexer.load(path) == indexer
    safetensors = pytest.importorskip("safetensors.numpy")
    np.testing.assert_array_equal(
        safetensors.load_file(path)["layers.3.kv.1.up"], np.asarray(indexer.layers[3].up[1])
    )
    text = f"vsprefill(weights='{path}', slash_mass=0.5, layer=3)"
    q, k, v = arrays(200, 200)
    assert fp.prefill_attention(q, k, v, text).shape == q.shape


def edited(path, change):
    """The file with its header changed."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h: h["__metadata__"].update(method="other"), "method is 'other'; it must be 'vsprefill'"),
        (lambda h: h["__metadata__"].update(slash="end"), "slash is 'end'; it must be 'offset'"),
        (lambda h: h["__metadata__"].update(version="2"), "version is '2'; it must be '1'"),
        (lambda h: h["__metadata__"].update(hidden="x"), "hidden is 'x'; it must be a whole number"),
        (lambda h: h["__metadata__"].update(n_kv_heads="1"), "kv.1 is there; it must be of 1 KV heads"),
        (lambda h: h["__metadata__"].update(head_dim="8"), r"up is \[12, 32\]; it must be \[12, 16\]"),
        (lambda h: h.pop("layers.0.kv.1.bias"), "layers.0.kv.1.bias is missing; it must be there"),
        (lambda h: h.pop("__metadata__"), "without metadata"),
        (lambda h: h.update(other=h["layers.0.kv.0.up"]), "a tensor of .* is 'other'"),
        (lambda h: h["layers.0.kv.0.up"].update(dtype="I64"), "of another dtype; it must be BF16 or F32"),
        (lambda h: h["layers.0.kv.0.up"].update(shape=[1, 2]), "is damaged; it must be as long as its shape"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    path = tmp_path / "i.safetensors"
    weights().save(path)
    edited(path, change)
    with pytest.raises(ValueError, match=message):
        fp.VSPrefill(path)


def test_no_file(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="which cannot be read; it must be a safetensors file"):
        fp.VSPrefill(tmp_path / "x.safetensors")
    with pytest.raises(OSError):
        fp.VSPrefill(tmp_path / "y.safetensors")


@pytest.mark.parametrize("lengths", [[(300, 300)], [(257, 700), (0, 0), (90, 90)]])
def test_verticals_as_lists_in_torch(monkeypatch, lengths):
    """What a GPU does, here: verticals are those of the CPU's own lists, slashes become blocks."""
    torch = pytest.importorskip("torch")
    from flashprefill import _lines

    monkeypatch.setattr(_lines, "_gathers", lambda k: True)
    total_q, total_k = (sum(pair[i] for pair in lengths) for i in (0, 1))
    q, k, v = (torch.from_numpy(x) for x in arrays(total_q, total_k, seed=3))
    q = q[:total_q]
    ends = [torch.tensor([0, *np.cumsum([pair[i] for pair in lengths])], dtype=torch.int32) for i in (0, 1)]
    packed = {} if len(lengths) == 1 else {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
    policy = fp.VSPrefill(weights(), 0.3, 0.01, block_size=32, sink_blocks=1, window_blocks=1)
    ours = fp.select(q, k, policy.forced, **packed)
    _lines.join_lines(ours, policy, (q, k, v), ours._layout)
    theirs = fp.select(q, k, policy, v=v, **packed)
    for seq, (rows, keys) in enumerate(lengths):
        if int(theirs.fallback[seq]):  # too short to leave anything out
            assert torch.equal(ours.dense(seq), theirs.dense(seq))
            continue
        extra = theirs.vertical_slash[seq].numpy()
        wanted = [head[2 : 2 + head[0]].tolist() for head in extra]
        assert [head[0].tolist() for head in ours.keys(seq)] == wanted
        assert all(len(head) == 1 for head in ours.keys(seq)) and 0 < len(wanted[0]) < keys
        again = fp.BlockMask.from_dense(
            ours._blocks(seq), q_len=rows, k_len=keys, block_size=32,
            keys=ours.keys(seq), segment_tiles=ours.segment_tiles,
        )  # fmt: skip
        first = sum(pair[0] for pair in lengths[:seq]) // 128 + seq
        assert torch.equal(again.counts, ours.counts[:, first : first + again.counts.shape[1]])
    out, lse = fp.attend(q, k, v, ours, return_lse=True, **packed)
    least = fp.attend(q, k, v, theirs, return_lse=True, **packed)[1]
    assert out.isfinite().all() and (lse >= least - 1e-4).all()  # a slash's block holds the slash

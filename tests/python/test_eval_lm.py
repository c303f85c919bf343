"""`flashprefill eval` with lm-eval: prompts, the model class against lm-eval's own, a whole run, no
network."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import types

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
for module in ("lm_eval", "wonderwords", "nltk", "scipy"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install '.[eval]'")

import torch  # noqa: E402

import flashprefill as fp  # noqa: E402
from flashprefill import cli  # noqa: E402
from flashprefill.apps import models, spec  # noqa: E402
from flashprefill.apps.errors import UsageError  # noqa: E402
from flashprefill.apps.eval import asker, draw, figures, harness, ruler, run, suites  # noqa: E402
from flashprefill.apps.eval.model import Job  # noqa: E402

# From the first samples of each task, made by lm-eval 0.4.13 and wonderwords 3.0.1 with a tokenizer that
# splits at spaces.
GOLDEN = {
    "niah_single_1": "84eb754493bcd263",
    "niah_single_2": "49ef9c3f2f7e556d",
    "niah_single_3": "6411dbd6061e1005",
    "niah_multikey_1": "b7cb8070150dd1b1",
    "niah_multikey_2": "969055f4c00d1714",
    "niah_multikey_3": "e63138179c322dfe",
    "niah_multivalue": "75e3a8c64387dda0",
    "niah_multiquery": "ae38b3531dcbf723",
    "vt": "3f8c0eb1cc4e8d94",
    "cwe": "c1e7d497cae3ab1a",
    "fwe": "62dfbe8434219ec3",
}
KEEP_ALL = "flashprefill(alpha=0.0, dense_tail_blocks=0)"
HALF = "flashprefill(alpha=1.0, sink_blocks=1, window_blocks=1, dense_tail_blocks=0)"


class Words:
    """A tokenizer that splits at spaces."""

    def __call__(self, text):
        return type("Encoded", (), {"input_ids": text.split()})()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a model of a few thousand weights is done before a second thread wakes
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prose")
    lines = [
        f"Sentence number {i} tells of {'rain' if i % 3 else 'snow'} in town {i * 7 % 41}."
        for i in range(1500)
    ]
    (folder / "weather.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every test here fails if it asks for an address: nothing of this needs a network."""

    def refuse(_self, address):
        raise AssertionError(f"a socket to {address} was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


# ---------------------------------------------------------------- prompts


def made(task, prose, **more):
    return ruler.samples_of(task, Words(), 1024, **{"samples": 2, "text_path": prose, **more})


@pytest.mark.parametrize("task", ruler.OFFLINE)
def test_golden_prompts(task, prose):
    samples = made(task, prose)
    text = json.dumps([[one["input"], one["gen_prefix"], one["outputs"]] for one in samples])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN.get(task)


@pytest.mark.parametrize("task", ruler.OFFLINE)
def test_prompts_fit_and_hold_their_answers(task, prose):
    samples = made(task, prose, samples=3)
    assert len(samples) == 3 and len({one["input"] for one in samples}) == 3
    for one in samples:
        assert one["max_length"] == 1024 and len(one["input"].split()) < one["length"] <= 1024
        assert all(expected in one["input"] for expected in one["outputs"])
        right = ruler.score(one, [" ".join(one["outputs"]).upper()])
        assert right["score"] == 1.0 and ruler.score(one, ["nothing of it"])["score"] == 0.0
        some = ruler.score(one, [one["outputs"][0]])["score"]
        assert some == pytest.approx(1 / len(one["outputs"]))


def test_prompts_do_not_depend_on_what_was_made_before(prose):
    alone = made("niah_multikey_1", prose)
    made("cwe", prose)
    assert made("niah_multikey_1", prose) == alone != made("niah_multikey_1", prose, seed=1)
    assert made("niah_multikey_1", prose, samples=1) == alone[:1]


def test_the_depth_is_where_the_needle_stands(prose):
    (one,) = made("niah_single_2", prose, samples=1)
    depth = ruler.depth_of("niah_single_2", one)
    at = round(depth * len(one["input"]))
    assert one["input"][at:].startswith(one["outputs"][0]) and 0 < depth < 1
    assert ruler.depth_of("niah_multivalue", one) is None


def test_lengths_that_would_never_fit_are_refused(prose):
    class Letters:
        def __call__(self, text):
            return type("Encoded", (), {"input_ids": list(text)})()

    for task in ("vt", "cwe"):  # lm-eval would try for ever
        with pytest.raises(UsageError, match=f"{task}'s smallest prompt takes"):
            ruler.samples_of(task, Letters(), 1024, 1, text_path=prose)
    with pytest.raises(UsageError, match="at least 1024 tokens"):
        ruler.samples_of("vt", Words(), 512, 1, text_path=prose)


def test_questions_from_a_file(tmp_path, prose):
    paragraphs = []
    for i, word in enumerate(("green", "blue", "small", "old")):
        right = [{"text": word}, {"text": "a town"}]
        question = {"question": f"What is town {i}?", "is_impossible": False, "answers": right}
        paragraphs.append({"context": f"Town {i} is {word}.", "qas": [question]})
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    samples = made("qa_squad", prose, data=tmp_path)
    assert [one["outputs"] for one in samples] == [["green", "a town"], ["blue", "a town"]]
    assert ruler.score_any(samples[0], ["It is GREEN."])["score"] == 1.0  # one of them is enough
    assert ruler.score_any(samples[0], ["It is blue."])["score"] == 0.0
    with pytest.raises(UsageError, match=r"qa_hotpot: --data .*: hotpot_dev_distractor_v1\.json is missing"):
        made("qa_hotpot", prose, data=tmp_path)


def test_the_global_random_state_is_left_alone(prose):
    import random

    random.seed(5)
    state = random.getstate()
    made("fwe", prose)
    assert random.getstate() == state


# ---------------------------------------------------------------- the model class


def asked(prompts, **options):
    from lm_eval.api.instance import Instance

    options = {"until": [], "max_gen_toks": 10, "do_sample": False, "temperature": 0.0, **options}
    return [Instance("generate_until", {}, (p, options), 0, ("t", i, 1)) for i, p in enumerate(prompts)]


def choices(context, endings):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, (context, end), i, ("t", 0, 1)) for i, end in enumerate(endings)]


@pytest.fixture(scope="module")
def loaded(model):
    return models.load(model, "fp32")


@pytest.fixture(scope="module")
def stock(loaded):
    from lm_eval.models.huggingface import HFLM

    with harness.quiet():
        return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=1)


@pytest.fixture
def ours(model):
    from flashprefill.lm_eval import FlashPrefillLM

    def make(**options):
        with harness.quiet():
            return FlashPrefillLM(pretrained=str(model), dtype="fp32", **options)

    return make


PROMPTS = ["".join(chr(97 + (i * i + 3 * i + k) % 26) for i in range(400 + 150 * k)) for k in range(3)]
ENDINGS = [" A", " B", " longer"]


@pytest.mark.parametrize("last_token", ["dense", "policy"])
@pytest.mark.parametrize("policy", ["dense", "dense()", KEEP_ALL])
def test_dense_and_keep_all_are_the_stock_model(ours, stock, policy, last_token):
    expected = stock.generate_until(asked(PROMPTS), disable_tqdm=True)
    lm = ours(policy=policy, last_token=last_token)
    assert lm.generate_until(asked(PROMPTS), disable_tqdm=True) == expected
    assert lm.reading.tokens == len(PROMPTS[-1]) and lm.reading.density == 1.0 and lm.reading.ttft > 0
    known = stock.loglikelihood(choices(PROMPTS[0], ENDINGS), disable_tqdm=True)
    for (a, greedy_a), (b, greedy_b) in zip(
        lm.loglikelihood(choices(PROMPTS[0], ENDINGS), disable_tqdm=True), known, strict=True
    ):
        assert a == pytest.approx(b, abs=2e-3) and greedy_a == greedy_b


@pytest.mark.parametrize("prompts", [PROMPTS[2:], PROMPTS], ids=["one length", "three lengths"])
def test_a_batch_answers_as_each_alone(ours, prompts):
    policies = [
        None,
        fp.FlashPrefill(alpha=0.0, dense_tail_blocks=0),
        spec.parse_policy(HALF),
        fp.Streaming(),
    ]
    lm = ours()
    jobs = [Job(request, policy, True) for policy in policies for request in asked(prompts)]
    together = lm.answer_together(jobs)
    assert lm.can_batch and not ours(last_token="policy").can_batch and lm.policy is None
    assert lm.model.config._attn_implementation == "sdpa"
    for job, (said, reading) in zip(jobs, together, strict=True):
        lm.use(job.policy)
        assert lm.generate_until([job.request], disable_tqdm=True) == [said]
        assert lm.reading.density == reading.density and lm.reading.tokens == reading.tokens
    assert together[len(prompts) - 1][0] != together[3 * len(prompts) - 1][0]
    assert (
        lm.cache_bytes(100) == 2 * 3 * 2 * 16 * 100 * 4
    )  # K and V, layers, KV heads, head_dim, tokens, fp32


def test_a_stop_string_ends_the_answer_as_in_the_stock_model(ours, stock):
    whole = stock.generate_until(asked(PROMPTS[:1]), disable_tqdm=True)[0]
    request = asked(PROMPTS[:1], until=[whole[3]])
    expected = stock.generate_until(request, disable_tqdm=True)
    assert ours().generate_until(request, disable_tqdm=True) == expected == [whole[: whole.index(whole[3])]]


def test_a_policy_leaves_out_and_the_model_comes_back(ours):
    lm = ours(policy=HALF)
    lm.generate_until(asked(PROMPTS[-1:]), disable_tqdm=True)
    assert 0.3 < lm.reading.density < 0.9 and lm.reading.fallbacks == {}
    sparse = lm.loglikelihood(choices(PROMPTS[-1], ENDINGS), disable_tqdm=True)
    lm.use(None)
    dense = lm.loglikelihood(choices(PROMPTS[-1], ENDINGS), disable_tqdm=True)
    assert lm.reading.density == 1.0
    assert all(abs(a - b) > 1e-4 for (a, _), (b, _) in zip(sparse, dense, strict=True))
    lm.count = False
    lm.use(HALF)
    assert lm.loglikelihood(choices(PROMPTS[-1], ENDINGS), disable_tqdm=True) == sparse
    assert lm.reading.density is None


def test_prompts_that_are_too_long_lose_their_beginning_or_middle(ours):
    for cut, kept in (("left", (500, 550)), ("middle", (0, 20))):
        lm = ours(max_length=60, cut=cut)
        ids = torch.arange(550)[None]
        fitted = lm._fit(ids, 50)[0]
        assert len(fitted) == 50 and lm.reading.cut == 500
        assert int(fitted[0]) == kept[0] and int(fitted[-1]) == 549
        assert cut == "left" or fitted.tolist() == [*range(25), *range(525, 550)]


def test_arguments_that_cannot_be_are_refused(ours):
    for options, message in (
        ({"last_token": "sparse"}, "last_token='sparse': must be one of dense, policy"),
        ({"batch_size": 4}, "batch_size=4: must be 1"),
        ({"policy": "sketchy"}, "the name must be one of"),
        ({"policy": 3}, "policy 3: must be a policy"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            ours(**options)


def test_prompts_come_in_the_order_of_the_lengths(prose):
    loaded = types.SimpleNamespace(tokenizer=Words(), context=4096)

    def order(lengths):
        options = run.Options(text=prose, samples=2, lengths=lengths)
        made = run.make_prompts(["niah_single_2", "niah_single_1"], options, loaded, None)
        return list(dict.fromkeys((prompt.length, prompt.task) for prompt in made))

    both = ["niah_single_2", "niah_single_1"]
    assert order([2048, 1024]) == [(2048, both[0]), (2048, both[1]), (1024, both[0]), (1024, both[1])]
    assert order([1024, 2048]) == [(1024, both[0]), (1024, both[1]), (2048, both[0]), (2048, both[1])]


# ---------------------------------------------------------------- whole runs


ARGUMENTS = ["--dtype", "fp32", "--lengths", "2K", "--samples", "2", "--max-tokens", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def finished(model, prose, tmp_path_factory):
    """One run of the command line: its folder, what it printed, results.json."""
    out = tmp_path_factory.mktemp("eval")
    tasks = "niah_single_1,niah_multikey_2"
    arguments = ["eval", tasks, "--model", str(model), "--text", str(prose), "--out", str(out), *ARGUMENTS]
    assert cli.main([*arguments, "--policy", HALF]) == 0
    return out, arguments, json.loads((out / "results.json").read_text())


def test_a_run_writes_all_that_it_promises(finished):
    out, _, results = finished
    assert results["schema"] == "flashprefill-eval/1" and results["versions"]["lm_eval"]
    assert set(results["files"]) == {path.name for path in out.iterdir()}
    assert results["settings"]["seed"] == 42 and results["settings"]["from_disk"] == 0
    label = list(results["methods"])[1]
    assert list(results["methods"])[0] == "dense" and results["methods"][label].startswith("flashprefill(")
    assert len(results["cases"]) == 4 and len(results["prompts_hash"]) == 64
    for case in results["cases"]:
        assert set(case["answers"]) == {"dense", label} and case["cut"] == 0 and 0 < case["depth"] < 1
        assert case["answers"]["dense"]["density"] == 1.0 and case["answers"][label]["density"] < 0.9
    row = figures.one(results["rows"], label, 2048, None)
    assert row["prompts"] == 4 and row["density"] < 0.9 and row["ttft_seconds"] > 0
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 3 and "niah_multikey_2" in results["table"]
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")


def test_a_second_run_reads_the_answers(finished, capsys, monkeypatch):
    out, arguments, before = finished
    from flashprefill.apps.eval.model import FlashPrefillLM

    def refuse(*_args, **_kw):
        raise AssertionError("an answer was asked for again")

    monkeypatch.setattr(FlashPrefillLM, "generate_until", refuse)
    monkeypatch.setattr(FlashPrefillLM, "answer_together", refuse)
    assert cli.main([*arguments, "--policy", HALF]) == 0
    after = json.loads((out / "results.json").read_text())
    assert after["settings"]["from_disk"] == 8 and after["cases"] == before["cases"]
    assert before["prompts_hash"] == after["prompts_hash"]
    with pytest.raises(AssertionError, match="asked for again"):  # another policy is not on disk
        cli.main([*arguments, "--policy", "streaming"])


def test_prompts_beside_each_other_are_answered_as_one_by_one(finished, tmp_path, monkeypatch):
    """As on a GPU: batches of three answers of two prompts."""
    _, arguments, whole = finished
    monkeypatch.setattr(run, "together", lambda _kind, _methods: 2)
    monkeypatch.setattr(asker, "MOST_TOGETHER", 3)
    there = [*arguments[: arguments.index("--out")], "--out", str(tmp_path), *ARGUMENTS]
    assert cli.main([*there, "--policy", HALF]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    texts = [{label: said["text"] for label, said in case["answers"].items()} for case in results["cases"]]
    assert texts == [{k: said["text"] for k, said in case["answers"].items()} for case in whole["cases"]]
    assert [case["prompt"] for case in results["cases"]] == [case["prompt"] for case in whole["cases"]]


def test_the_time_is_up(finished, tmp_path, monkeypatch, capsys):
    """After the first group of prompts: its answers are shown, and a second run asks the rest alone."""
    _, arguments, whole = finished
    clock = iter([0.0, 0.0])
    monkeypatch.setattr(run, "time", types.SimpleNamespace(monotonic=lambda: next(clock, 100.0)))
    there = [*arguments[: arguments.index("--out")], "--out", str(tmp_path), *ARGUMENTS, "--policy", HALF]
    assert cli.main([*there, "--minutes", "1"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert "time is up after 1 prompts" in capsys.readouterr().err
    assert len(results["cases"]) == 1 and results["settings"]["unanswered"] == 3
    assert results["cases"][0]["prompt"] == whole["cases"][0]["prompt"]
    assert cli.main(there) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["from_disk"] == 2 and results["settings"]["unanswered"] == 0


def test_runs_of_single_tasks_are_joined(finished, tmp_path):
    """The joined results are those of one run over all tasks, but for the times."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    import join_eval

    _, _, whole = finished
    parts = []
    for task in whole["settings"]["tasks"]:
        cases = [case for case in whole["cases"] if case["task"] == task]
        settings = whole["settings"] | {"tasks": [task], "suites": [task], "from_disk": 0}
        rows = figures.summaries(cases, list(whole["methods"]))
        parts.append(whole | {"cases": cases, "settings": settings, "rows": rows})
    joined = join_eval.joined(parts)
    assert len(parts) == 2 and joined["settings"]["tasks"] == whole["settings"]["tasks"]
    for ours, theirs in zip(joined["rows"], whole["rows"], strict=True):
        assert ours == theirs | {"ttft_seconds": None, "ttft_speedup": None}
    parts[1]["settings"] = parts[1]["settings"] | {"seed": 7}
    with pytest.raises(SystemExit, match="seed"):
        join_eval.joined(parts)


def test_a_run_that_was_stopped_goes_on(finished, model, prose, tmp_path, monkeypatch):
    _, arguments, whole = finished
    lines = (finished[0] / "answers.jsonl").read_text().splitlines()
    (tmp_path / "answers.jsonl").write_text("\n".join(lines[:3]) + "\n")
    there = [*arguments[: arguments.index("--out")], "--out", str(tmp_path), *ARGUMENTS]
    assert cli.main([*there, "--policy", HALF]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["from_disk"] == 3
    texts = [{label: said["text"] for label, said in case["answers"].items()} for case in results["cases"]]
    assert texts == [{k: said["text"] for k, said in case["answers"].items()} for case in whole["cases"]]


def test_files_of_the_user_through_the_whole_chain(model, tmp_path):
    """InfiniteBench's passkey by generating, LongBench v2 by likelihood, cut in the middle."""
    context = "The grass is green. " * 40 + "The pass key is 71432. Remember it. " + "The sky is blue. " * 40
    line = {"id": 0, "context": context, "input": "What is the pass key?", "answer": ["71432"], "options": []}
    (tmp_path / "passkey.jsonl").write_text(json.dumps(line) + "\n")
    doc = {f"choice_{letter}": letter.lower() for letter in "ABCD"}
    doc |= {"domain": "Single-Document QA", "question": "Which?", "context": context, "answer": "C"}
    (tmp_path / "data.json").write_text(json.dumps([doc]))
    options = run.Options(
        suites=["passkey", "longbench2"], model=model, data=tmp_path, policies=[KEEP_ALL], lengths=[1024],
        samples=3, dtype="fp32", threads=1, out=tmp_path / "out",
    )  # fmt: skip
    results = run.run(options)
    tasks = {case["task"]: case for case in results["cases"]}
    assert set(tasks) == {"passkey", "longbench2_single"}
    for case in tasks.values():
        dense, kept = case["answers"].values()
        assert dense["text"] == kept["text"] and dense["score"] == kept["score"]
        assert case["cut"] > 0 and case["tokens"] <= 1024
    assert tasks["longbench2_single"]["answers"]["dense"]["text"] in "0123"
    assert not (tmp_path / "out" / "needles.png").exists()


def test_the_tasks_are_lm_evals_too(model, prose):
    """simple_evaluate finds model and tasks by their names, and its scores are the run's."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from flashprefill.lm_eval import TASKS_PATH

    metadata = {"max_seq_lengths": [2048], "tokenizer": str(model), "samples": 2, "text": str(prose)}
    with harness.quiet():
        manager = TaskManager(include_path=TASKS_PATH, include_defaults=False, metadata=metadata)
        found = lm_eval.simple_evaluate(
            model="flashprefill",
            model_args={"pretrained": str(model), "dtype": "fp32", "policy": HALF, "max_gen_toks_limit": 4},
            tasks=["fp_ruler_niah_multikey_2"],
            task_manager=manager,
            bootstrap_iters=0,
        )
    samples = found["samples"]["fp_ruler_niah_multikey_2"]
    assert len(samples) == 2 and found["results"]["fp_ruler_niah_multikey_2"]["score,none"] in (0.0, 0.5, 1.0)
    tokenizer = models.load(model, "fp32").tokenizer
    ours = ruler.samples_of("niah_multikey_2", tokenizer, 2048, 2, text_path=prose)
    assert [one["doc"]["input"] for one in samples] == [one["input"] for one in ours]
    assert set(suites.SUITES["ruler"]) == {
        path.stem.removeprefix(ruler.PREFIX) for path in TASKS_PATH.glob("fp_ruler_*.yaml")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["niah"], "niah: there is no such suite or task; known are ruler, infinitebench, longbench2, "),
        (["qa_squad"], "qa_squad: it needs the file dev-v2.0.json"),
        (["infinitebench"], "passkey: it needs the file passkey.jsonl"),
        (["vt", "--lengths", "512"], "--lengths 512: must be at least 1024"),
        (["vt", "--lengths", "8K"], "--lengths 8192: the model reads 4096 tokens; --stretch"),
        (["vt", "--samples", "0"], "--samples 0: must be at least 1"),
        (["vt", "--text", "nowhere"], "--text nowhere: there is no such file or directory"),
        (["vt", "--pattern", "sketchy"], "the name must be one of"),
    ],
)
def test_refusals_are_one_line(model, tmp_path, capsys, arguments, message):
    assert cli.main(["eval", *arguments, "--model", str(model), "--out", str(tmp_path / "out")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading")]
    assert len(said) == 1 and message in said[0]


def test_methods_by_name_and_by_text():
    by_default = run.methods_of(run.Options())
    assert list(by_default)[0] == "dense" and len(by_default) == 3
    named = run.methods_of(run.Options(patterns=["flex_prefill"], policies=["sketch(gain=0.0025)"]))
    assert [label.partition("(")[0] for label in named] == ["dense", "flexprefill", "sketch"]
    every = run.methods_of(run.Options(patterns=["all"]))
    assert {"flashprefill", "sketch", "streaming", "xattention"} <= {
        label.partition("(")[0] for label in every
    }
    names = draw.short(["dense", "sketch(gain=0.0025)", "flashprefill(alpha=0.1)", "flashprefill(alpha=0.2)"])
    assert list(names.values()) == ["dense", "sketch", "flashprefill(alpha=0.1)", "flashprefill(alpha=0.2)"]

"""`flashprefill eval` without lm-eval: the haystack, the figures on pairs, files of the user, answers on
disk."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from flashprefill import cli  # noqa: E402
from flashprefill.apps import machine  # noqa: E402
from flashprefill.apps.errors import UsageError  # noqa: E402
from flashprefill.apps.eval import answers, figures, files, text  # noqa: E402


def case(task, length, index, depth=None, **scores):
    said = {
        label: {"score": score, "text": str(score), "ttft_seconds": seconds, "density": density}
        for label, (score, seconds, density) in scores.items()
    }
    return {"task": task, "length": length, "index": index, "depth": depth, "answers": said}


# ---------------------------------------------------------------- the haystack


@pytest.mark.parametrize(
    ("written", "cut"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "Go." Then left.', ['He said "Go."', "Then left."]),
        ("Version 3.11 is out. (See below.) Done.", ["Version 3.11 is out.", "(See below.)", "Done."]),
        ("e.g. this stays whole. 4 follow.", ["e.g. this stays whole.", "4 follow."]),
        ("no end", ["no end"]),
        ("", []),
    ],
)
def test_sentences(written, cut):
    assert text.sentences(written) == cut
    assert " ".join(text.sentences(written)) == written


def test_words_are_the_users_in_their_order(tmp_path):
    (tmp_path / "b.txt").write_text("four five\n\nsix")
    (tmp_path / "a.md").write_text("one  two\nthree")
    (tmp_path / "c.png").write_bytes(b"no text")
    assert text.words(6, tmp_path) == ["one", "two", "three", "four", "five", "six"]
    assert text.words(2, tmp_path) == ["one", "two", "three"]  # whole files


def test_too_few_words_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one two three")
    with pytest.raises(UsageError, match=r"--text .*: 3 words are too few for prompts of 4096 tokens"):
        text.words(4096, tmp_path)
    with pytest.raises(UsageError, match=r"there is no such file"):
        text.files_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no \.txt, \.md, \.rst files"):
        text.files_of(tmp_path / "empty")


# ---------------------------------------------------------------- figures


def test_mcnemar_by_hand():
    # Five lost and none won: 2 of 32 equally likely outcomes are as uneven. 8 against 2: 2 x 56 of 1024.
    assert figures.mcnemar(5, 0) == pytest.approx(2 / 32)
    assert figures.mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert figures.mcnemar(3, 3) == 1.0
    assert figures.mcnemar(0, 0) == 1.0


def test_pairs_by_hand():
    # Dense is right in three of four; the policy keeps two of those and half of the third.
    cases = [
        case("a", 4096, 0, dense=(1.0, 2.0, 1.0), sketch=(1.0, 1.0, 0.25)),
        case("a", 4096, 1, dense=(1.0, 4.0, 1.0), sketch=(0.5, 2.0, 0.75)),
        case("a", 4096, 2, dense=(1.0, 6.0, 1.0), sketch=(1.0, 3.0, None)),
        case("a", 4096, 3, dense=(0.0, 8.0, 1.0), sketch=(1.0, 4.0, 0.5)),
    ]
    made = figures.pairs(cases, "sketch")
    assert made["score"] == pytest.approx(3.5 / 4) and made["dense_score"] == pytest.approx(3 / 4)
    assert made["dense_right"] == 3 and made["kept_of_dense"] == pytest.approx(2.5 / 3)
    assert (made["worse"], made["better"], made["mcnemar_p"]) == (1, 1, 1.0)
    assert made["density"] == pytest.approx(0.5)  # of the three where it was counted
    assert made["ttft_seconds"] == pytest.approx(2.5) and made["ttft_speedup"] == pytest.approx(2.0)
    assert made["same_answer"] == pytest.approx(0.5)


def test_a_score_over_tasks_is_the_mean_of_their_means():
    cases = [case("a", 1024, 0, dense=(1.0, 1.0, 1.0))]
    cases += [case("b", 1024, index, dense=(0.0, 1.0, 1.0)) for index in range(3)]
    rows = figures.summaries(cases, ["dense"])
    assert figures.one(rows, "dense", 1024, None)["score"] == pytest.approx(0.5)
    assert figures.one(rows, "dense", 1024, "b")["score"] == 0.0
    assert figures.one(rows, "dense", None, None)["prompts"] == 4


def test_needles_by_depth():
    cases = [
        case("a", 1024, 0, depth=0.0, dense=(1.0, 1.0, 1.0)),
        case("a", 1024, 1, depth=0.19, dense=(0.0, 1.0, 1.0)),
        case("a", 2048, 0, depth=1.0, dense=(1.0, 1.0, 1.0)),
        case("vt", 2048, 0, depth=None, dense=(0.0, 1.0, 1.0)),
    ]
    table = figures.depth_bins(cases, "dense", [1024, 2048])
    assert table[0] == [0.5, None] and table[4] == [None, 1.0]
    assert all(cell is None for row in table[1:4] for cell in row)


# ---------------------------------------------------------------- files that the user names


def passkeys(count):
    lines = [
        {
            "id": i,
            "context": f"text {i}",
            "input": "What is the pass key?",
            "answer": [str(1000 + i)],
            "options": [],
        }
        for i in range(count)
    ]
    return "\n".join(map(json.dumps, lines)) + "\n"


def test_infinitebench_as_published(tmp_path):
    (tmp_path / "passkey.jsonl").write_text(passkeys(10))
    docs = files.infinitebench("passkey", tmp_path, 4, 42)
    assert [doc["id"] for doc in docs] == sorted(doc["id"] for doc in docs) and len(docs) == 4
    assert (
        docs
        == files.infinitebench("passkey", tmp_path, 4, 42)
        != files.infinitebench("passkey", tmp_path, 4, 1)
    )
    (tmp_path / "code_run.jsonl").write_text('{"context": "c", "input": "i", "answer": 7}\n')
    assert files.infinitebench("code_run", tmp_path, 4, 42)[0]["answer"] == ["7"]
    (tmp_path / "longbook_qa_eng.jsonl").write_text('{"context": "c", "input": "i", "answer": ["x", "y"]}\n')
    assert files.infinitebench("longbook_qa_en", tmp_path, 4, 42)[0]["answer"] == ["x", "y"]


def test_missing_data_names_the_file(tmp_path):
    with pytest.raises(UsageError, match=r"passkey: it needs the file passkey\.jsonl; .* with --data"):
        files.infinitebench("passkey", None, 4, 42)
    with pytest.raises(UsageError, match=r"passkey: --data .*: passkey\.jsonl is missing"):
        files.infinitebench("passkey", tmp_path, 4, 42)
    with pytest.raises(UsageError, match=r"data\.json or longbench_v2\.json is missing"):
        files.longbench2("longbench2", tmp_path, 4, 42)
    with pytest.raises(UsageError, match="there is no such directory"):
        files.longbench2("longbench2", tmp_path / "nowhere", 4, 42)
    (tmp_path / "passkey.jsonl").write_text(passkeys(1) + '{"context": "no answer"}\n')
    with pytest.raises(UsageError, match=r"passkey\.jsonl, line 2: KeyError: 'answer'"):
        files.infinitebench("passkey", tmp_path, 4, 42)


def test_longbench2_by_domain(tmp_path):
    docs = [
        {
            "_id": str(i),
            "domain": domain,
            "question": "q",
            "context": "c",
            "answer": "ABCD"[i],
            "choice_A": "a",
        }
        | {f"choice_{letter}": letter for letter in "BCD"}
        for i, domain in enumerate(
            ("Single-Document QA", "Code Repository Understanding", "Multi-Document QA")
        )
    ]
    (tmp_path / "data.json").write_text(json.dumps(docs))
    assert len(files.longbench2("longbench2", tmp_path, 10, 42)) == 3
    (one,) = files.longbench2("longbench2_code", tmp_path, 10, 42)
    assert one["answer"] == 1 and one["choices"] == ["a", "B", "C", "D"]
    with pytest.raises(UsageError, match="whose domain begins with 'long-dialogue'"):
        files.longbench2("longbench2_history", tmp_path, 10, 42)


# ---------------------------------------------------------------- answers on disk


def test_answers_survive_a_crash(tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    known = answers.Answers(path)
    known.put("k1", {"said": ["é"]})
    known.close()
    with path.open("a") as file:
        file.write('{"key": "k2", "said": ["cut o')  # the machine stopped here
    again = answers.Answers(path)
    assert again.get("k1")["said"] == ["é"] and again.get("k2") is None
    again.put("k3", {"said": ["after"]})
    again.close()
    third = answers.Answers(path)
    assert set(third.known) == {"k1", "k3"}
    third.close()
    fresh = answers.Answers(path, fresh=True)
    assert not fresh.known
    fresh.close()


def test_a_models_hash_is_of_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    before = answers.of_model(tmp_path)
    (tmp_path / "notes.txt").write_text("of no account")
    assert answers.of_model(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(bytes(99) + b"1")
    assert answers.of_model(tmp_path) != before
    assert answers.of_model(tmp_path / "config.json") != before
    assert len(answers.of_library()) == 64


def test_the_digest_is_of_the_content():
    assert answers.digest({"a": 1, "b": [2]}) == answers.digest({"b": [2], "a": 1})
    assert answers.digest(["a", "b"]) != answers.digest(["ab"])
    assert math.isfinite(int(answers.digest(None), 16))


# ---------------------------------------------------------------- the command line


def test_what_is_missing_is_named_with_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "importable", lambda name: name not in ("lm_eval", "bs4"))
    assert cli.main(["eval", "vt", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "flashprefill: eval needs lm-eval, beautifulsoup4: pip install lm-eval beautifulsoup4\n"
    )
    assert not (tmp_path / "out").exists()

"""A soak's judgement: what it lets pass, and that it can fail."""

import judge
import pytest

SURE = [[-0.1, -4.0], [-0.2, -3.0], [-0.3, -0.3005]]  # two best of each token; the third is a near tie


def answer(tokens="abc", **changed):
    return list(tokens), [changed.get(token, best) for token, best in zip("abc", SURE, strict=True)]


def test_equal_answers_are_off_by_nothing():
    assert judge.compare(answer(), answer()) == (None, 0.0)


def test_a_near_tie_that_falls_the_other_way():
    swap, moved = judge.compare(answer(), answer("abx", b=[-0.2, -3.0004]))
    assert swap == (2, pytest.approx(0.0005)) and moved == pytest.approx(0.0004)


def test_a_sure_token_that_changes():
    swap, _ = judge.compare(answer(), answer("xbc"))
    assert swap == (0, pytest.approx(3.9))


@pytest.mark.parametrize(
    ("off", "message"),
    [
        ([0.0] * 50, None),
        ([0.0009] * 50, None),
        ([0.0] * 48 + [0.02] * 2, None),
        ([0.0] * 47 + [0.02] * 3, "3 of 50 answers are off by more than 0.001"),
        ([0.0] * 49 + [3.9], "1 of 50 answers are off by more than 0.05, the worst by 3.9000"),
    ],
)
def test_verdict(off, message):
    found = judge.verdict("float32", off)
    assert found is None if message is None else message in found

"""Long sequences with things to find in them, and questions at the end: what the adapter learns from.

A sequence is a text, or one sentence again and again, into which facts are put at random places; then come
questions and their answers, several per sequence, since a long text is dear to read and an answer cheap.
Only answers are learnt from, and a little of the text. The kinds, in the words of RULER (Hsieh et al., arXiv
2404.06654), whose prompts the model is to answer in the end:

    needles     "The special magic number for black-fox is: 7381920.", several keys, some with several values
    pairs       lines of a key and a value, all of them asked for alike: no text between them
    variables   "VAR XQA = 41782", "VAR BTR = VAR XQA", ...: all names that hold a value
    words       a list of words, few of them often: which are the most common

What a sequence is depends on its number and the seed alone, so a run that goes on after a stop sees what it
would have seen.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

Ids = list[int]
Encode = Callable[[str], Ids]

REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ADJECTIVES = (
    "quick",
    "lazy",
    "bright",
    "silent",
    "brave",
    "gentle",
    "ancient",
    "modern",
    "golden",
    "silver",
    "hollow",
    "narrow",
    "distant",
    "hidden",
    "frozen",
    "warm",
    "bitter",
    "sweet",
    "heavy",
    "light",
    "rapid",
    "calm",
    "noisy",
    "clever",
    "honest",
    "polite",
    "rough",
    "smooth",
    "steep",
    "shallow",
    "round",
    "square",
    "red",
    "blue",
    "green",
    "yellow",
    "purple",
    "orange",
    "black",
    "white",
    "early",
    "late",
    "young",
    "old",
    "tall",
    "short",
    "rich",
    "poor",
    "proud",
)
NOUNS = (
    "river",
    "mountain",
    "garden",
    "window",
    "engine",
    "bottle",
    "castle",
    "letter",
    "market",
    "forest",
    "island",
    "bridge",
    "candle",
    "mirror",
    "pocket",
    "ribbon",
    "saddle",
    "temple",
    "tunnel",
    "valley",
    "wagon",
    "anchor",
    "basket",
    "button",
    "carpet",
    "dragon",
    "eagle",
    "feather",
    "goose",
    "hammer",
    "insect",
    "jacket",
    "kettle",
    "ladder",
    "magnet",
    "needle",
    "oyster",
    "pencil",
    "quartz",
    "rabbit",
    "shovel",
    "ticket",
    "umbrella",
    "violin",
    "walnut",
    "yogurt",
    "zebra",
    "barrel",
    "camera",
    "desert",
)
WORDS = (
    "number",
    "special",
    "apple",
    "stone",
    "paper",
    "horse",
    "chair",
    "water",
    "music",
    "light",
    "story",
    "field",
    "cloud",
    "dance",
    "earth",
    "flame",
    "grain",
    "house",
    "index",
    "judge",
    "knife",
    "lemon",
    "money",
    "night",
    "ocean",
    "piano",
    "queen",
    "radio",
    "smile",
    "table",
    "uncle",
    "voice",
    "wheel",
    "youth",
)
INTRO = {
    "numbers": "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n",
    "uuids": "Some special magic uuids are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the uuids afterwards.\n",
    "variables": "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "words": "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n",
}


@dataclass
class Made:
    """Token ids of one sequence and which of them are learnt: id t is predicted from those before it."""

    ids: npt.NDArray[np.int64]
    learnt: npt.NDArray[np.bool_]


def number(draw: random.Random) -> str:
    """Seven digits."""
    return str(draw.randint(10**6, 10**7 - 1))


def uuid(draw: random.Random) -> str:
    """Thirty-two hexadecimal digits in five groups."""
    digits = f"{draw.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def key(draw: random.Random) -> str:
    """Two words with a dash, as RULER names its needles; now and then a uuid."""
    return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"


@dataclass
class Asked:
    """Facts for the text and, after it, questions whose answers follow."""

    intro: str
    facts: list[str]
    questions: list[tuple[str, str]]  # what stands before an answer, the answer
    among: str  # "text", "repeated", or "facts": nothing but facts


def needles(draw: random.Random, _tokens: int, _encode: Encode) -> Asked:
    """Numbers or uuids under keys; some keys have several values."""
    kind = "numbers" if draw.random() < 0.7 else "uuids"
    value = number if kind == "numbers" else uuid
    keys = list(dict.fromkeys(key(draw) for _ in range(draw.choice((1, 4, 8, 12, 16)))))
    held = {
        one: [value(draw) for _ in range(1 if draw.random() < 0.8 else draw.randint(2, 4))] for one in keys
    }
    what = kind[:-1]
    facts = [
        f"One of the special magic {kind} for {one} is: {v}." for one, values in held.items() for v in values
    ]
    draw.shuffle(keys)
    questions = []
    for one in keys[:8]:
        values = held[one]
        if len(values) == 1:
            ask = f"What is the special magic {what} for {one} mentioned in the provided text?"
            begin = f"The special magic {what} for {one} mentioned in the provided text is"
        else:
            ask = f"What are all the special magic {kind} for {one} mentioned in the provided text?"
            begin = f"The special magic {kind} for {one} mentioned in the provided text are"
        order = sorted(values, key=[f.rpartition(": ")[2][:-1] for f in facts].index)
        questions.append((f"\n{ask} {begin}", f" {', '.join(order)}.\n"))
    return Asked(INTRO[kind], facts, questions, "text" if draw.random() < 0.8 else "repeated")


def pairs(draw: random.Random, tokens: int, encode: Encode) -> Asked:
    """Nothing but keys and values: as many as fill the text."""
    by_uuid = draw.random() < 0.5
    kind, name, value = ("uuid", uuid, uuid) if by_uuid else ("number", key, number)

    def fact(one: str, held: str) -> str:
        return f"One of the special magic {kind}s for {one} is: {held}."

    # Eight questions take at most twenty facts' room. Some facts are longer than others: with an eighth to
    # spare none is cut off that is asked for.
    longest = max(len(encode(f"\n{fact(name(draw), value(draw))}\n")) for _ in range(8))
    room = max(1, tokens * 7 // 8 - min(tokens // 2, 20 * longest) - 64)
    held = {name(draw): value(draw) for _ in range(max(1, room // longest))}
    facts = [fact(one, value) for one, value in held.items()]
    questions = [
        (
            f"\nWhat is the special magic {kind} for {one} mentioned in the provided text? "
            f"The special magic {kind} for {one} mentioned in the provided text is",
            f" {held[one]}.\n",
        )
        for one in draw.sample(list(held), min(8, len(held)))
    ]
    return Asked(INTRO[kind + "s"], facts, questions, "facts")


def variables(draw: random.Random, _tokens: int, _encode: Encode) -> Asked:
    """Chains of assignments, each a value that is handed on."""
    chosen = dict.fromkeys(tuple(draw.choices(string.ascii_uppercase, k=5)) for _ in range(64))
    names = iter(["".join(name) for name in chosen])
    facts, questions = [], []
    for value in draw.sample(range(10000, 100000), draw.choice((1, 2, 3, 4))):
        chain = [next(names) for _ in range(draw.choice((2, 3, 5)))]
        facts.append(f"VAR {chain[0]} = {value}")
        facts += [f"VAR {new} = VAR {old}" for old, new in zip(chain, chain[1:], strict=False)]
        ask = (
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: "
        )
        begin = f"According to the chain(s) of variable assignment in the text above, {len(chain)} variables "
        questions.append((f"{ask}{begin}are assigned the value {value}, they are:", f" {' '.join(chain)}\n"))
    return Asked(INTRO["variables"], facts, questions, "text" if draw.random() < 0.3 else "repeated")


def words(draw: random.Random, tokens: int, encode: Encode) -> Asked:
    """A numbered list with a few words that are frequent."""
    common = draw.sample(WORDS, 10)
    rare = [f"{a}{b}" for a in ADJECTIVES for b in NOUNS]
    per_entry = len(encode("".join(f"1000. {word}\n" for word in draw.sample(rare, 8)))) / 8
    count = max(40, int(0.8 * tokens / per_entry))
    times = max(3, min(30, count // 40))
    entries = common * times + draw.choices(rare, k=max(1, count - 10 * times))
    draw.shuffle(entries)
    facts = [f"{place}. {word}" for place, word in enumerate(entries, 1)]
    ask = "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words"
    order = sorted(common, key=entries.index)
    answer = " " + " ".join(f"{place}. {word}" for place, word in enumerate(order, 1)) + "\n"
    return Asked(INTRO["words"], facts, [(f"{ask} that appear most often in the list are:", answer)], "facts")


def single(draw: random.Random) -> Asked:
    """One number under one key: what is counted to say how far the model reads."""
    one, value = key(draw), number(draw)
    ask = f"What is the special magic number for {one} mentioned in the provided text?"
    begin = f"The special magic number for {one} mentioned in the provided text is"
    fact = f"One of the special magic numbers for {one} is: {value}."
    return Asked(INTRO["numbers"], [fact], [(f"\n{ask} {begin}", f" {value}")], "text")


KINDS: dict[str, tuple[Callable[[random.Random, int, Encode], Asked], float]] = {  # with their shares
    "needles": (needles, 0.55),
    "pairs": (pairs, 0.2),
    "variables": (variables, 0.15),
    "words": (words, 0.1),
}


class Maker:
    """Makes sequences of any length from a text's ids.

    Args:
        encode: a text to ids, without special tokens.
        text: the ids of all texts, one after the other.
        begin: ids that every sequence begins with.
    """

    def __init__(self, encode: Encode, text: Sequence[int], begin: Sequence[int] = ()) -> None:
        self.encode, self.begin = encode, list(begin)
        self.text = np.asarray(text, dtype=np.int64)
        repeated = encode(REPEATED + " ")
        self.repeated = np.asarray(repeated * (1 + 65536 // len(repeated)), dtype=np.int64)

    def _hay(self, draw: random.Random, among: str, tokens: int) -> npt.NDArray[np.int64]:
        """So many ids from a random place, of the text or of the sentence."""
        source = self.text if among == "text" else self.repeated
        if len(source) < tokens:
            source = np.tile(source, 1 + tokens // len(source))
        at = draw.randrange(len(source) - tokens + 1)
        return source[at : at + tokens]

    def make(self, draw: random.Random, tokens: int, kind: str | None = None) -> Made:
        """One sequence of exactly `tokens` ids to learn from.

        Args:
            draw: what decides.
            tokens: length.
            kind: one of KINDS; drawn by their shares if it is None.
        """
        kind = kind or draw.choices(list(KINDS), [share for _, share in KINDS.values()])[0]
        return self.filled(draw, tokens, KINDS[kind][0](draw, tokens, self.encode))

    def filled(self, draw: random.Random, tokens: int, asked: Asked, depth: float | None = None) -> Made:
        """A sequence of exactly `tokens` ids with these facts, at random places or all at one depth."""
        tail, tail_learnt = self._tail(asked, tokens // 2)
        head = self.begin + self.encode(asked.intro)
        room = tokens - len(head) - len(tail)
        if room < 1:
            raise UsageError(f"--tokens {tokens}: a question alone takes {len(head) + len(tail)} tokens")
        separator = "\n" if asked.among == "facts" or asked.intro == INTRO["variables"] else " "
        facts = [self.encode(f"{separator}{fact}{separator}".replace("\n\n", "\n")) for fact in asked.facts]
        middle = (
            self._facts_alone(facts, room)
            if asked.among == "facts"
            else self._hidden(draw, asked, facts, room, depth)
        )
        ids = np.concatenate([np.asarray(head, dtype=np.int64), middle, np.asarray(tail, dtype=np.int64)])
        learnt = np.zeros(tokens, dtype=bool)
        learnt[tokens - len(tail) :] = tail_learnt
        return Made(ids, learnt)

    def _tail(self, asked: Asked, most: int) -> tuple[Ids, list[bool]]:
        """Questions and answers, as many as there is room for, at least one."""
        ids: Ids = []
        learnt: list[bool] = []
        for before, answer in asked.questions:
            question, said = self.encode(before), self.encode(answer)
            if ids and len(ids) + len(question) + len(said) > most:
                break
            ids += question + said
            learnt += [False] * len(question) + [True] * len(said)
        return ids, learnt

    def _facts_alone(self, facts: list[Ids], room: int) -> npt.NDArray[np.int64]:
        """The facts, as far as they fit, and the repeated sentence for what is left."""
        joined = [one for fact in facts for one in fact]
        if len(joined) < room:
            joined = list(self.repeated[: room - len(joined)]) + joined
        return np.asarray(joined[:room], dtype=np.int64)

    def _hidden(
        self, draw: random.Random, asked: Asked, facts: list[Ids], room: int, depth: float | None
    ) -> npt.NDArray[np.int64]:
        """The facts in their order within a text."""
        kept: list[Ids] = []
        while facts and sum(map(len, kept)) + len(facts[0]) <= room:
            kept.append(facts.pop(0))
        hay = self._hay(draw, asked.among, room - sum(map(len, kept)))
        places = [draw.randint(0, len(hay)) if depth is None else round(depth * len(hay)) for _ in kept]
        places.sort()
        parts, last = [], 0
        for place, fact in zip(places, kept, strict=True):
            parts += [hay[last:place], np.asarray(fact, dtype=np.int64)]
            last = place
        return np.concatenate([*parts, hay[last:]])


def maker_of(tokenizer: Any, text: Sequence[int]) -> Maker:
    """A Maker for a tokenizer."""

    def encode(words: str) -> Ids:
        return list(tokenizer(words, add_special_tokens=False)["input_ids"])

    return Maker(encode, text)

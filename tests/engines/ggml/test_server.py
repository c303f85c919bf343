"""llama-server with the plugin: requests together, over its prompt cache, given up, and too long."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import PLUGIN, decode, prompt
from programs import LOADED, Server, dense_config


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return dense_config(tmp_path)


def test_server(dense: Path) -> None:
    """Requests that come together, and then longer ones that begin with what is in the cache."""
    starts = [decode(prompt(count, number)) for number, count in enumerate((700, 150, 400))]
    answers = []
    for plugin in (None, PLUGIN):
        server = Server(plugin, dense)
        try:
            turns = []
            for texts in (starts, [text + decode(prompt(250, 9)) for text in starts]):
                results: dict[int, str] = {}

                def ask(i: int, text: str, server: Server = server, results: dict = results) -> None:
                    results[i] = server.complete(text)["content"]

                threads = [threading.Thread(target=ask, args=item) for item in enumerate(texts)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                turns.append([results[i] for i in range(len(texts))])
            answers.append(turns)
        finally:
            text = server.close()
    assert LOADED in text
    assert re.search(r"flashprefill: \d+ rows in \d+ nodes", text), text[-2000:]
    same = sum(a == b for stock, ours in zip(*answers, strict=True) for a, b in zip(stock, ours, strict=True))
    assert same >= 5, answers  # one near tie is allowed: see test_exact.py


@pytest.fixture
def server(dense: Path) -> Iterator[Server]:
    it = Server(PLUGIN, dense)
    yield it
    it.close()


def test_a_client_that_leaves(server: Server) -> None:
    """In the middle of its prompt; another request goes on, and is answered as it is alone."""
    text = decode(prompt(900, 4))
    alone = server.complete(text)["content"]
    answers: list[str] = []
    stays = threading.Thread(target=lambda: answers.append(server.complete(text + " ")["content"]))
    with pytest.raises(TimeoutError):
        server.complete(decode(prompt(1200, 5)), timeout=1.5)
    stays.start()
    stays.join()
    assert server.complete(text)["content"] == alone
    assert len(answers) == 1 and answers[0]
    deadline = time.monotonic() + 30
    while "cancel task" not in server.log and time.monotonic() < deadline:
        time.sleep(0.2)
    assert "cancel task" in server.log, server.log[-2000:]
    assert "left to the CPU backend" in server.close()


def test_a_prompt_that_is_too_long(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.complete(prompt(5000, 6))
    assert refused.value.code == 400
    message = json.loads(refused.value.read())["error"]["message"]
    assert "exceeds the available context size" in message
    assert server.complete(decode(prompt(200, 7)))["content"]

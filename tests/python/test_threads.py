"""Processes and threads: calls after a fork, and from many threads that come and go."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

import flashprefill as fp

FORK = """
    import multiprocessing, os, signal
    {first}
    import numpy as np
    import flashprefill as fp

    x = np.random.default_rng(0).standard_normal((600, 4, 64), dtype=np.float32)

    def attend(_=None):
        {convert}
        return float(np.abs(np.asarray(fp.prefill_attention(y, y, y, fp.FlashPrefill()))).sum())

    before = attend()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        children = pool.map(attend, range(4))
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        grandchild = os.fork()
        if grandchild == 0:
            signal.alarm(60)
            os._exit(0 if attend() == before else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
        os._exit(status if attend() == before else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert children == [before] * 4 and attend() == before
    print("right")
"""


@pytest.mark.parametrize("arrays", ["numpy", "torch"])
def test_forked_children_compute(arrays):
    first = "import torch; torch.ones(500, 500) @ torch.ones(500, 500)" if arrays == "torch" else ""
    convert = "y = torch.from_numpy(x)" if arrays == "torch" else "y = x"
    if arrays == "torch":
        pytest.importorskip("torch")
    code = textwrap.dedent(FORK).format(first=first, convert=convert)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.stdout.strip() == "right", done.stderr[-3000:]


def test_many_threads_that_come_and_go():
    import threading

    x = np.random.default_rng(0).standard_normal((300, 2, 32), dtype=np.float32)
    expected = fp.prefill_attention(x, x, x, fp.FlashPrefill())
    wrong = []

    def call():
        if not np.array_equal(fp.prefill_attention(x, x, x, fp.FlashPrefill()), expected):
            wrong.append(threading.get_ident())

    for _ in range(50):
        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong

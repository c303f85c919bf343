"""What a type checker sees: mypy --strict passes a small script of a user, and finds the wrong calls."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]

RIGHT = """
import numpy as np
import numpy.typing as npt
import torch
import flashprefill as fp

q, k, v = fp.example_inputs(4096, heads=8, kv_heads=2, head_dim=64)
out: npt.NDArray[np.float32] = fp.prefill_attention(q, k, v, fp.FlashPrefill(alpha=0.12))
again, lse = fp.prefill_attention(q, k, v, "sketch", return_lse=True, layout="bthd")
last, stats = fp.prefill_attention(q, k, v, return_stats=True, softmax_scale=0.1)
_, _, both = fp.prefill_attention(q, k, v, return_lse=True, return_stats=True, cu_seqlens_q=[0, 4096],
                                  cu_seqlens_k=[0, 4096])
kept: float = stats.mean_density + both.mean_density
tq, tk, tv = fp.example_inputs(64, dtype=torch.float32)
tensor: torch.Tensor = fp.prefill_attention(tq, tk, tv, out=torch.empty_like(tq))
mask: fp.BlockMask = fp.select(tq, tk, fp.FlexPrefill(gamma=0.95))
attended: torch.Tensor = fp.attend(tq, tk, tv, mask)
result, logs = fp.attend(tq, tk, tv, mask, return_lse=True)
policy: fp.FlexPrefill = fp.FlexPrefill.for_model("llama-3.1", tau=0.2)


def wrapped(x: torch.Tensor, want: bool) -> None:
    fp.prefill_attention(x, x, x, return_lse=want)
"""

WRONG = {
    'fp.prefill_attention("a", k, v)': "prefill_attention",
    "fp.prefill_attention(q, None, v)": "prefill_attention",
    "fp.prefill_attention(q, k, 3)": "prefill_attention",
    "fp.prefill_attention(q, k)": "prefill_attention",
    "fp.prefill_attention(q, k, v, 0.12)": "prefill_attention",
    "fp.prefill_attention(q, k, v, softmax_scal=1.0)": "prefill_attention",
    'fp.prefill_attention(q, k, v, layout="bshd")': "prefill_attention",
    "fp.prefill_attention(q, k, v, return_lse=True).shape": "shape",
    "tuple_: torch.Tensor = fp.prefill_attention(tq, tk, tv, return_stats=True)": "Stats",
    "fp.prefill_attention(q, tk, v)": "prefill_attention",
    "fp.select(q, 3)": "select",
    "fp.attend(q, k, v, fp.Dense())": "attend",
    'fp.FlashPrefill(alpha="much")': "FlashPrefill",
    "fp.FlashPrefill(aplha=0.1)": "aplha",
}


def test_mypy_passes_a_script_and_finds_what_is_wrong_in_it(tmp_path):
    """One run, since mypy reads torch for half a minute: line by line, errors where there are to be some."""
    script = tmp_path / "script.py"
    script.write_text(RIGHT + "\n" + "\n".join(WRONG) + "\n")
    first = len((RIGHT + "\n").splitlines()) + 1
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file", ""]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / "users"), str(script)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={"MYPYPATH": str(ROOT / "python"), "PATH": ""},
    )
    errors: dict[int, str] = {}
    for path, line, text in re.findall(r"^(.+?):(\d+): error: (.*)$", done.stdout, re.MULTILINE):
        assert path.endswith("script.py"), done.stdout
        errors.setdefault(int(line), text)
    right = {line: text for line, text in errors.items() if line < first}
    assert not right and not done.stderr, done.stdout + done.stderr
    missed = [call for number, call in enumerate(WRONG, first) if number not in errors]
    assert not missed, missed
    for number, word in enumerate(WRONG.values(), first):
        assert word in errors[number], errors[number]

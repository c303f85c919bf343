"""Compiles the kernels that must not spill registers, for every architecture, and fails where one does.

    python tools/check_spills.py [--architectures 80,90,120] [--jobs 2]

Attention's kernels: the portable ones for each of the architectures, Hopper's for sm_90a. A spilled
register is a load in the innermost loop, which nothing but the clock would show. Needs nvcc, and no
GPU. Prints registers and spills per kernel.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PORTABLE = sorted((ROOT / "src/cuda/sm80/attend").glob("*.cu"))
# Hopper's own but those of head_dim 256, whose output alone fills the registers.
HOPPER = sorted(
    path
    for folder in ("attend", "attend_8bit")
    for path in (ROOT / "src/cuda/sm90" / folder).glob("*.cu")
    if not path.stem.endswith("d256") and path.stem != "images"
)
MAY_SPILL = re.compile("LoadingE1")  # two warps that share many copies keep some of their state in memory
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin")
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def kernels(log: str) -> list[tuple[str, int, int]]:
    """Return name, registers and spilled bytes of every kernel in ptxas's words."""
    return [
        (found["name"], int(found["registers"]), int(found["stores"]) + int(found["loads"]))
        for found in KERNEL.finditer(log)
    ]


def compiled(path: Path, architecture: str) -> list[tuple[str, int, int]]:
    """Compile a file for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nvcc",
            *FLAGS,
            f"-arch=sm_{architecture}",
            f"-I{ROOT / 'src'}",
            f"-I{ROOT / 'include'}",
            *("-o", f"{folder}/out.cubin", str(path)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{path.name}, sm_{architecture}: {done.stderr.strip()[:2000]}")
    return kernels(done.stderr + done.stdout)


def short(name: str) -> str:
    """Return a kernel's template arguments out of its mangled name."""
    found = re.search(r"Portable(Skip)?ShapeILi(\d+)ELb(\d)", name)
    if found:
        return f"head_dim {found[2]}{', small' if found[3] == '1' else ''}{', skips' if found[1] else ''}"
    found = re.search(r"AttendShapeILi(\d+)E.*LoadingE(\d)", name)
    if found:
        return f"head_dim {found[1]}, {('tiles', 'chunks', 'rows', 'lists')[int(found[2])]}"
    return re.sub(r"^_ZN12flashprefill4cuda\d+|I.*", "", name)


def main() -> int:
    """Print a line per kernel; return 1 if one spills, or if none was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architectures", default="80,90,120")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    work = [(path, arch) for path in PORTABLE for arch in options.architectures.split(",")]
    work += [(path, "90a") for path in HOPPER]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda one: compiled(*one), work))
    bad = 0
    for (path, arch), found in zip(work, results, strict=True):
        bad += not found
        for name, registers, spilled in found:
            bad += spilled > 0 and not MAY_SPILL.search(name)
            said = f"{spilled} bytes spilled" if spilled else "no spills"
            print(f"{path.stem:12s} sm_{arch:4s} {short(name):20s} {registers} registers, {said}")
    print("spills: clean" if not bad else f"spills: {bad} faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

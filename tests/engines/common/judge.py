"""What a soak holds answers against, and the memory of processes."""

from pathlib import Path

# Of log-probabilities. Batches of other sizes round elsewhere: bf16 logits from 16 on by steps of 0.125.
ROUNDING = {"bfloat16": 0.25, "float32": 1e-3}
FLIPPED = {"bfloat16": 0.5, "float32": 0.05}
RARELY = 0.05


def memory_mib(pid):
    """Resident memory of a process and of all that it started."""
    total, todo = 0, [pid]
    while todo:
        one = todo.pop()
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return total / 1024


def compare(alone, answer):
    """Where an answer parts from the one given alone, and how rounding moved it before that.

    Returns (token, gap there between the two best of the one alone), None where they agree; and the most that
    the gap between the two best changed at tokens where they agree.
    """
    moved = 0.0
    for at, (a, b, x, y) in enumerate(zip(alone[0], answer[0], alone[1], answer[1], strict=True)):
        if a != b:
            return (at, x[0] - x[1]), moved
        moved = max(moved, abs((x[0] - x[1]) - (y[0] - y[1])))
    return None, moved


def verdict(dtype, off):
    """What is wrong with answers that are off by so much; None if nothing is.

    An answer is off by what the gaps of its two best tokens moved, or by the gap that it parted at, if that
    is more. Rounding makes that ROUNDING at most. Where it moves an energy over its threshold, a block more
    or less is read, and it is what that block matters: FLIPPED at most, and seldom. The limits stand here and
    are not taken from the run, so an answer that read wrong keys can't excuse itself.
    """
    for limit, allowed in ((FLIPPED[dtype], 0), (ROUNDING[dtype], RARELY * len(off))):
        beyond = sum(by > limit for by in off)
        if beyond > allowed:
            return f"{beyond} of {len(off)} answers are off by more than {limit}, the worst by {max(off):.4f}"
    return None

"""Writes the table of model families into docs/transformers.md, from tiny random models that it runs.

    .venv/bin/python tools/model_table.py [--check]

The models are those of tests/python/transformers_models.py. Which layers ran sparse, and why others did not,
is what flashprefill.collect_stats saw; what authors publish is for_model's answer to the family's hub id.
With --check nothing is written; the exit status is 1 if the page is behind.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "python"))

import flashprefill as fp  # noqa: E402
import transformers_models as tiny  # noqa: E402

PAGE = ROOT / "docs" / "transformers.md"
BEGIN, END = "<!-- tools/model_table.py writes this -->\n", "<!-- to here -->\n"

# The family as people call it, the test's model of it, and a hub id.
FAMILIES = [
    ("Llama 3.1", "llama", "meta-llama/Llama-3.1-8B-Instruct"),
    ("Yi (a Llama)", "llama", "01-ai/Yi-9B-200K"),
    ("Llama 4", "llama4", "meta-llama/Llama-4-Scout-17B-16E-Instruct"),
    ("Mistral", "mistral", "mistralai/Mistral-7B-Instruct-v0.3"),
    ("Mistral with a window", "mistral_window", "mistralai/Mistral-7B-v0.1"),
    ("Qwen2", "qwen2", "Qwen/Qwen2-7B-Instruct"),
    ("Qwen2.5 (a Qwen2)", "qwen2", "Qwen/Qwen2.5-7B-Instruct"),
    ("Qwen2.5-VL", "qwen2_5_vl", "Qwen/Qwen2.5-VL-7B-Instruct"),
    ("Qwen3", "qwen3", "Qwen/Qwen3-8B"),
    ("Qwen3-MoE", "qwen3_moe", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
    ("Qwen3-VL", "qwen3_vl", "Qwen/Qwen3-VL-8B-Instruct"),
    ("Qwen3-VL-MoE", "qwen3_vl_moe", "Qwen/Qwen3-VL-30B-A3B-Instruct"),
    ("Gemma 1", "gemma", "google/gemma-7b"),
    ("Gemma 2", "gemma2", "google/gemma-2-9b"),
    ("Gemma 3", "gemma3", "google/gemma-3-4b-it"),
    ("Phi-3", "phi3", "microsoft/Phi-3-mini-128k-instruct"),
    ("GLM-4 (a GLM)", "glm", "zai-org/glm-4-9b-chat-1m-hf"),
    ("GLM-4-0414", "glm4", "zai-org/GLM-4-9B-0414"),
    ("gpt-oss", "gpt_oss", "openai/gpt-oss-20b"),
]
POLICIES = (fp.FlashPrefill, fp.FlexPrefill, fp.MInference)  # those with published values for each model
HEADER = ["family", "`model_type`", "sparse", "dense, and why", "padded batch", "published values"]


def shown(policy: Any) -> str:
    """Return a policy's values as they are given to it, without block counts."""
    return f"`{policy.text}`"


def published(hub_id: str) -> str:
    """Return what for_model knows of a hub id."""
    found = []
    for kind in POLICIES:
        try:
            found.append(shown(kind.for_model(hub_id)))
        except ValueError:
            continue  # nothing is published
    return ", ".join(found) or "none"


def outcome(model: Any, **inputs: Any) -> tuple[int, dict[str, int]]:
    """Return how many layers ran sparse in one forward, and for each reason how many dense."""
    with fp.collect_stats(model) as stats:
        tiny.logits(model, tiny.tokens(2), **inputs)
    return stats.sparse_calls, dict(stats.fallbacks)


def rows() -> list[str]:
    """Return the table's lines."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    mask = tiny.padding([tiny.LENGTH, 170], "left")
    for family, name, hub_id in FAMILIES:
        model = fp.patch_model(tiny.make(name), tiny.KEEP)
        sparse, dense = outcome(model)
        padded, _ = outcome(model, attention_mask=mask, position_ids=tiny.positions(mask))
        layers = "all layers" if not dense else "no layer" if not sparse else "full-attention layers"
        why = ", ".join(sorted(dense)) or "-"
        batch = "-" if not sparse else "as alone" if padded == sparse else "dense"
        kind = model.config.model_type
        lines.append(f"| {family} | `{kind}` | {layers} | {why} | {batch} | {published(hub_id)} |")
    return lines


def page() -> str:
    """Return the page with the table as it is now."""
    text = PAGE.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return text[:begin] + "\n".join(rows()) + "\n" + text[end:]


def main() -> int:
    """Write the page, or check it."""
    new = page()
    if "--check" in sys.argv:
        return int(new != PAGE.read_text())
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Video-MME with a sparse prefill: questions about a video, dense attention and policies side by side.

    python examples/videomme.py --model ~/models/Qwen2.5-VL-7B-Instruct --questions videomme.jsonl
        --frames ~/videomme/frames --policy "flashprefill(alpha=0.10)"

Works with Qwen2.5-VL and Qwen3-VL, whose text model is what a policy reads; the vision tower stays as it is.
Videos are yours: a folder of frames per video, DIR/<video>/*.jpg or *.png, in the order of their names, taken
at an even pace (ffmpeg -i video.mp4 -vf fps=1 DIR/video/%05d.jpg). Of those `--num-frames` are taken evenly.
Questions are JSON lines:

    {"video": "fFjv93ACGo8", "question": "..", "options": ["A. ..", "B. ..", "C. ..", "D. .."], "answer": "C",
     "duration": "short"}

which is what the benchmark's own table has, its videoID named video. As FlashPrefill's authors run it: 128
frames, at most 16 new tokens; alpha 0.10 for Qwen2.5-VL, 0.22 for Qwen3-VL-30B-A3B. The answer is the first
letter of A to D that stands alone. A GPU with memory for the model, and torchvision for its processor, are
needed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

import flashprefill as fp

PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only "
    "the letter (A, B, C, or D) of the correct option.\n{question}\n{options}\nThe best answer is:"
)
FIELDS = ("video", "question", "options", "answer")


def read_questions(path: Path) -> list[dict[str, Any]]:
    """All questions of a file of JSON lines; a line that lacks something is named."""
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            question = json.loads(line)
            missing = [field for field in FIELDS if field not in question]
            if missing:
                raise SystemExit(f"{path}, line {number}: {', '.join(missing)} missing")
            questions.append(question)
    return questions


def pick_frames(folder: Path, count: int) -> list[Path]:
    """`count` frames, spread evenly over all that are there; all of them if there are fewer."""
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise SystemExit(f"{folder}: holds no .jpg or .png frames")
    if len(files) <= count:
        return files
    return [files[round(i * (len(files) - 1) / max(1, count - 1))] for i in range(count)]


def load_frames(files: list[Path]) -> list[Any]:
    """The frames as images."""
    from PIL import Image

    return [Image.open(file).convert("RGB") for file in files]


def letter_of(answer: str) -> str | None:
    """The letter that an answer gives: the first of A to D that stands alone, or begins it."""
    found = re.search(r"\b([A-D])\b", answer) or re.match(r"\s*\(?([A-D])", answer)
    return found[1] if found else None


def inputs_for(processor: Any, frames: list[Any], question: dict[str, Any]) -> Any:
    """What the model is called with: frames as one video, then the question."""
    text = PROMPT.format(question=question["question"], options="\n".join(question["options"]))
    content = [{"type": "video"}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return processor(text=[prompt], videos=[frames], do_sample_frames=False, return_tensors="pt")


def answer(model: Any, processor: Any, inputs: Any, policy: Any, new_tokens: int) -> dict[str, Any]:
    """One method reads one question; `policy` None is the model's own attention."""
    if policy is not None:
        fp.patch_model(model, policy)
    try:
        start = time.perf_counter()
        with fp.collect_stats(model) as stats, torch.inference_mode():
            written = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            new = written[:, inputs["input_ids"].shape[1] :]
            words = processor.batch_decode(new, skip_special_tokens=True)[0]
        return {
            "letter": letter_of(words),
            "text": words.strip(),
            "tokens": int(inputs["input_ids"].shape[1]),
            "seconds": time.perf_counter() - start,
            "density": stats.mean_density if stats.sparse_calls else 1.0,
        }
    finally:
        if policy is not None:
            fp.unpatch_model(model)


def run(
    model: Any,
    processor: Any,
    questions: list[dict[str, Any]],
    frames: Path,
    policies: list[str],
    count: int,
    new_tokens: int,
) -> list[dict[str, Any]]:
    """Every question through dense attention and every policy."""
    cases = []
    for number, question in enumerate(questions, 1):
        images = load_frames(pick_frames(frames / question["video"], count))
        inputs = inputs_for(processor, images, question).to(model.device)
        case = {key: question[key] for key in ("video", "answer")} | {"duration": question.get("duration")}
        case["said"] = {
            name: answer(model, processor, inputs, None if name == "dense" else name, new_tokens)
            for name in ["dense", *policies]
        }
        cases.append(case)
        said = ", ".join(f"{name} {one['letter']}" for name, one in case["said"].items())
        done = f"{number}/{len(questions)} {question['video']}"
        print(f"{done}: {case['answer']}; {said}", file=sys.stderr, flush=True)
    return cases


def table(cases: list[dict[str, Any]]) -> str:
    """Accuracy, agreement with dense attention, density and seconds of each method."""
    lines = [f"{'':44} right  of dense's  density  seconds"]
    right = {
        name: [case["said"][name]["letter"] == case["answer"] for case in cases] for name in cases[0]["said"]
    }
    for name, own in right.items():
        kept = [mine for mine, dense in zip(own, right["dense"], strict=True) if dense]
        said = [case["said"][name] for case in cases]
        density, seconds = (sum(one[key] for one in said) / len(said) for key in ("density", "seconds"))
        share = f"{sum(kept)}/{len(kept)}"
        lines.append(f"{name:44} {sum(own)}/{len(own)}  {share:>10}  {density:7.3f}  {seconds:7.2f}")
    return "\n".join(lines)


def main() -> None:
    """Read the arguments, ask, print, write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    what = "Qwen2.5-VL or Qwen3-VL: a folder or a name on the hub"
    parser.add_argument("--model", required=True, help=what)
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines")
    parser.add_argument("--frames", type=Path, required=True, help="a folder of frames per video in it")
    what = "may be repeated (default: flashprefill(alpha=0.10))"
    parser.add_argument("--policy", action="append", default=[], help=what)
    parser.add_argument("--num-frames", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--limit", type=int, help="only so many questions")
    parser.add_argument("--out", type=Path, default=Path("out/videomme.json"))
    options = parser.parse_args()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    questions = read_questions(options.questions)[: options.limit]
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto", device_map="auto").eval()
    policies = options.policy or ["flashprefill(alpha=0.10)"]
    cases = run(
        model, processor, questions, options.frames, policies, options.num_frames, options.max_new_tokens
    )
    print(table(cases))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model": options.model, "cases": cases}, indent=1)
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

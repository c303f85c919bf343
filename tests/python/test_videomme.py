"""examples/videomme.py on tiny random models: frames, prompts, answers, policies. Real ones need a GPU and
videos."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")
Image = pytest.importorskip("PIL.Image")

import flashprefill as fp  # noqa: E402

PATH = Path(__file__).resolve().parents[2] / "examples" / "videomme.py"
SIDE, FRAMES = 56, 8  # pixels of a frame, frames of a video
VIDEO, START, END = 3, 4, 5  # special tokens
TEXT = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
IDS = {
    "video_token_id": VIDEO,
    "image_token_id": 2,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


@pytest.fixture(scope="module")
def videomme():
    spec = importlib.util.spec_from_file_location("videomme", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Processor:
    """Stands for Qwen's, which needs torchvision: letters as tokens, frames as patches, two frames per step.

    Qwen3-VL's begins and ends every step of a video, and writes its time before it.
    """

    def __init__(self, by_step, patch=14):
        self.by_step, self.patch = by_step, patch

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        (message,) = messages
        parts = ["<video>" if part["type"] == "video" else part["text"] for part in message["content"]]
        return f"user: {''.join(parts)}\nassistant:"

    def __call__(self, text, videos, do_sample_frames, return_tensors):
        assert not do_sample_frames and return_tensors == "pt"
        (prompt,), (frames,) = text, videos
        side, steps = SIDE // self.patch, len(frames) // 2
        grid = torch.tensor([[steps, side, side]])
        draw = torch.Generator().manual_seed(frames[0].getpixel((0, 0))[0])
        patches = torch.randn(steps * side * side, 3 * 2 * self.patch**2, generator=draw)
        before, after = ([32 + ord(c) % 96 for c in part] for part in prompt.split("<video>"))
        of_step = [VIDEO] * (side * side // 4)  # 2 x 2 patches are merged
        video = [40, START, *of_step, END] * steps if self.by_step else [START, *of_step * steps, END]
        ids = torch.tensor([before + video + after])
        return transformers.BatchFeature(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": 2 * (ids == VIDEO).int(),
                "pixel_values_videos": patches,
                "video_grid_thw": grid,
            }
        )

    def batch_decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return ["".join(chr(int(i) % 96 + 32) for i in row) for row in ids]


def tiny(name):
    torch.manual_seed(0)
    if name == "qwen2_5_vl":
        vision = {"depth": 1, **VISION, "patch_size": 14, "fullatt_block_indexes": [0], "window_size": 56}
        config = transformers.Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision, **IDS)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        vision = {
            "depth": 2,
            **VISION,
            "patch_size": 14,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        }
        config = transformers.Qwen3VLConfig(text_config=TEXT, vision_config=vision, **IDS)
        model = transformers.Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture
def data(tmp_path):
    """(questions' file, frames' folder): a video of more frames than are taken."""
    folder = tmp_path / "frames" / "v1"
    folder.mkdir(parents=True)
    for i in range(20):
        Image.new("RGB", (SIDE, SIDE), (10 * i, 0, 0)).save(folder / f"{i:05d}.png")
    question = {"video": "v1", "question": "What is it? " * 20, "answer": "B"}
    question["options"] = ["A. a", "B. b", "C. c", "D. d"]
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({**question, "duration": "short"}) + "\n\n" + json.dumps(question) + "\n")
    return path, tmp_path / "frames"


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_the_whole_chain(videomme, data, name):
    path, frames = data
    model, processor = tiny(name), Processor(by_step=name == "qwen3_vl")
    keep_all = "flashprefill(alpha=0.0, block_size=16, dense_tail_blocks=0)"
    few = "streaming(sink_blocks=1, window_blocks=1, dense_tail_blocks=0, block_size=16)"
    cases = videomme.run(model, processor, videomme.read_questions(path), frames, [keep_all, few], FRAMES, 6)
    assert [case["duration"] for case in cases] == ["short", None]
    for case in cases:
        dense, same, sparse = (case["said"][key] for key in ("dense", keep_all, few))
        assert same["text"] == dense["text"] and same["tokens"] == dense["tokens"] > 300
        assert dense["density"] == same["density"] == 1.0 and 0.0 < sparse["density"] < 0.7
    text = videomme.table(cases)
    assert len(text.splitlines()) == 4 and f"{keep_all:44} " in text
    with pytest.raises(fp.FlashPrefillError):
        fp.unpatch_model(model)  # it was left as it came


def test_frames_are_spread_evenly(videomme, data):
    _, frames = data
    picked = [int(path.stem) for path in videomme.pick_frames(frames / "v1", 5)]
    assert picked == [0, 5, 10, 14, 19]
    assert len(videomme.pick_frames(frames / "v1", 64)) == 20
    with pytest.raises(SystemExit, match="holds no"):
        videomme.pick_frames(frames, 5)


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("The best answer is: (C) because", "C"),
        ("D. a dog", "D"),
        ("Bees", "B"),
        ("none", None),
        ("", None),
    ],
)
def test_letters(videomme, said, letter):
    assert videomme.letter_of(said) == letter


def test_a_question_that_lacks_something_is_named(videomme, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"video": "v", "question": "q", "options": []}\n')
    with pytest.raises(SystemExit, match=r"q\.jsonl, line 1: answer missing"):
        videomme.read_questions(tmp_path / "q.jsonl")

"""An engine in processes of its own, as a user's script has it; for the tests here and in ../vllm_cuda."""

import json
import os
import subprocess
import sys

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    model, options, ids, new = json.loads(sys.argv[1])
    llm = LLM(model, skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=4, **options)
    sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, logprobs=2)
    outputs = llm.generate([{"prompt_token_ids": one} for one in ids], sampling, use_tqdm=False)
    best = lambda entries: sorted((entry.logprob for entry in entries.values()), reverse=True)[:2]
    answers = [(list(o.outputs[0].token_ids), list(map(best, o.outputs[0].logprobs))) for o in outputs]
    stats = llm.collective_rpc("flashprefill_stats") if "worker_extension_cls" in options else None
    print("RESULT", json.dumps([answers, stats]))

if __name__ == "__main__":
    main()
"""
COUNTED = {"worker_extension_cls": "flashprefill.vllm.WorkerExtension"}


def run(folder, model, options, ids, new, **environment):
    """Let a script generate.

    Returns (answers, stats, log): for each prompt its tokens and each token's two best log-probabilities;
    what each worker counted, with COUNTED in the options; all that was printed.
    """
    script = folder / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, json.dumps([str(model), options, ids, new])],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    answers, stats = json.loads(line.removeprefix("RESULT"))
    return answers, stats, log

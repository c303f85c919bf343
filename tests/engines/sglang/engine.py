"""SGLang's scheduler and model runner, stock and ours, driven step by step in a process of their own.

The process is forked from this one, which has imported SGLang and computed nothing, so an engine starts in
seconds. In it the scheduler runs its real loop, overlapped with computation or not. Only its two ends are
ours: requests come at a given step where it would receive them, and what it sends to the tokenizer is kept.
"""

import json
import logging
import multiprocessing
import os
import sys
import traceback
from array import array
from dataclasses import dataclass, field
from pathlib import Path

from answers import Answer

VARIABLE = "FLASHPREFILL_SGLANG"


@dataclass
class Served:
    """What became of a list of requests."""

    answers: list = field(default_factory=list)
    numbers: dict = field(default_factory=dict)  # the plugin's counters; those of the server's information
    retracted: int = 0
    together: int = 0  # most requests that generated in one step
    backend: str = ""  # name of the attention backend's class
    registry: list = field(default_factory=list)  # names of backends whose factories are ours
    log: str = ""
    error: str = ""  # a traceback, where the engine did not start


def serve(model, requests, log, policy=None, **arguments):
    """Start an engine, serve requests that come and go, end it.

    Args:
        model: its folder.
        requests: of `answers.Request`.
        log: a path for what the engine prints.
        policy: the environment that `flashprefill.sglang.config` returns; None: the stock engine. It may also
            name a folder to import from, TEST_PATH, what SGLang is to say of itself, TEST_SGLANG_VERSION, and
            with TEST_FA3 let the FlashAttention 3 backend run.
        **arguments: of SGLang's ServerArgs.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    what = (theirs, str(model), requests, str(log), policy, arguments)
    process = context.Process(target=_process, args=what)
    process.start()
    theirs.close()
    try:
        served = ours.recv() if ours.poll(1800) else None
    except EOFError:
        served = None
    process.join(30)
    if process.is_alive():
        process.kill()
    text = Path(log).read_text(errors="replace")
    assert served is not None, f"the engine's process ended with {process.exitcode}\n{text}"
    served.log = text
    return served


def _process(pipe, model, requests, log, policy, arguments):
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # pytest has put files of its own in these places.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    os.environ.pop(VARIABLE, None)
    os.environ.update(policy or {})
    sys.path.insert(0, os.environ.get("TEST_PATH", ""))
    if "TEST_SGLANG_VERSION" in os.environ:
        import sglang

        sglang.__version__ = os.environ["TEST_SGLANG_VERSION"]
    if "TEST_FA3" in os.environ:
        import fa3_on_cpu

        fa3_on_cpu.install()
    served = Served()
    try:
        _Loop(_start(model, arguments), requests, served).run()
    except BaseException:
        served.error = traceback.format_exc()
    pipe.send(served)
    pipe.close()
    os._exit(0)  # threads of the engine may still wait for processes that were never there


def _start(model, arguments):
    """Do what Engine and run_scheduler_process do on their ways to a Scheduler."""
    from sglang.srt.entrypoints.engine import _set_envs_and_config
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, ServerArgs
    from sglang.srt.utils import configure_logger

    load_plugins()
    plain = {
        "device": "cpu", "attention_backend": "torch_native", "skip_tokenizer_init": True, "dtype": "float32",
        "max_total_tokens": 16384, "mem_fraction_static": 0.3, "max_running_requests": 8, "random_seed": 1,
        "chunked_prefill_size": -1, "context_length": 8192,
    }  # fmt: skip
    server_args = ServerArgs(model_path=model, **(plain | arguments))
    configure_logger(server_args)
    server_args.resolve_once()
    _set_envs_and_config(server_args)
    server_args.check_server_args()
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    return Scheduler(server_args, PortArgs.init_new(server_args))


class _Loop:
    def __init__(self, scheduler, requests, served):
        self.scheduler, self.requests, self.served = scheduler, requests, served
        self.step, self.silent = 0, 0
        served.answers = [Answer() for _ in requests]
        served.backend = type(scheduler.tp_worker.model_runner.attn_backend).__name__
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

        factories = ATTENTION_BACKENDS.items()
        served.registry = [name for name, factory in factories if hasattr(factory, "_flashprefill")]
        scheduler.ingest_requests = self.ingest
        for channel in (scheduler.ipc_channels.send_to_tokenizer, scheduler.ipc_channels.send_to_detokenizer):
            channel.send_output = self.keep

    def run(self):
        self.scheduler.run_event_loop()
        from sglang.srt.managers.io_struct import GetInternalStateReq

        state = self.scheduler.get_internal_state(GetInternalStateReq()).internal_state
        self.served.numbers = json.loads(json.dumps(state.get("flashprefill", {})))

    def ingest(self):
        """Instead of Scheduler.ingest_requests."""
        from sglang.srt.managers.io_struct import AbortReq

        scheduler = self.scheduler
        came = [self.tokenized(i) for i, request in enumerate(self.requests) if request.at == self.step]
        for i, request in enumerate(self.requests):
            if request.abort_at == self.step:
                came.append(AbortReq(rid=str(i)))
                self.served.answers[i].finished = True
        scheduler.process_input_requests(came)
        running = scheduler.running_batch.reqs
        self.served.together = max(self.served.together, len(running))
        self.step += 1
        waits = any(request.at >= self.step for request in self.requests)
        if not waits and all(answer.finished for answer in self.served.answers):
            self.silent += 1  # let what was aborted be cleaned up
            scheduler.gracefully_exit = self.silent > 3
        assert self.step < 5000, "the engine does not come to an end"
        return came

    def tokenized(self, number):
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        request = self.requests[number]
        sampling = SamplingParams(max_new_tokens=request.new, temperature=0, ignore_eos=not request.ends)
        sampling.normalize(None)
        return TokenizedGenerateReqInput(
            rid=str(number), input_text=None, input_ids=array("q", request.ids), input_embeds=None,
            mm_inputs=None, token_type_ids=None, sampling_params=sampling, return_logprob=True,
            logprob_start_len=-1, top_logprobs_num=5, token_ids_logprob=None, stream=False,
        )  # fmt: skip

    def keep(self, output, *_):
        """Instead of sending to the tokenizer's process."""
        if type(output).__name__ != "BatchTokenIDOutput":
            return
        for i, rid in enumerate(output.rids):
            answer = self.served.answers[int(rid)]
            answer.tokens += list(output.output_ids[i])
            values, ids = output.output_top_logprobs_val, output.output_top_logprobs_idx
            if values:
                answer.logprobs += [
                    dict(zip(t, v, strict=True)) for t, v in zip(ids[i], values[i], strict=True)
                ]
            answer.cached = max(answer.cached, output.cached_tokens[i])
            answer.finished = answer.finished or output.finished_reasons[i] is not None
            answer.reason = output.finished_reasons[i]
            if output.retraction_counts:
                self.served.retracted = max(self.served.retracted, output.retraction_counts[i])

"""vLLM's engine, stock and ours, driven step by step in this process."""

import gc

import torch
from answers import Answer, delta
from vllm import LLM, SamplingParams
from vllm.plugins import load_general_plugins
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from flashprefill import vllm as plugin

CUDA = torch.cuda.is_available()
if CUDA:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl as StockImpl

    # The share of memory: several such processes may use one GPU.
    BACKEND = AttentionBackendEnum.FLASH_ATTN
    KIND = {"attention_backend": "FLASH_ATTN", "gpu_memory_utilization": 0.1}
else:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl as StockImpl

    BACKEND, KIND = AttentionBackendEnum.CPU_ATTN, {}


class Engine:
    def __init__(self, model, policy=None, dtype="float32", max_len=8192, memory=1 << 28, **options):
        """Start an engine; without a policy with vLLM's own classes, not ours turned off."""
        asked = {} if policy is None else policy
        stock = policy is None
        load_general_plugins()  # once a process: now, so that nobody registers us in between
        selector._cached_get_attn_backend.cache_clear()
        if stock:
            BACKEND.clear_override()
        else:
            plugin.register()
        options = {"skip_tokenizer_init": True, "enforce_eager": True, **KIND, **options}
        self.llm = LLM(
            str(model), dtype=dtype, max_model_len=max_len, kv_cache_memory_bytes=memory,
            additional_config=asked, seed=0, disable_log_stats=False, **options,
        )  # fmt: skip
        plugin.register()
        self.core = self.llm.llm_engine
        self._number = 0
        for impl in self.impls():
            assert (type(impl) is StockImpl) == stock

    def impls(self):
        runner = self.core.model_executor.driver_worker.worker.model_runner
        layers = runner.vllm_config.compilation_config.static_forward_context.values()
        return [layer.impl for layer in layers if isinstance(getattr(layer, "impl", None), StockImpl)]

    @property
    def scheduler(self):
        return self.core.engine_core.engine_core.scheduler

    def run(self, requests):
        """Serve requests that come and go; returns their answers and what the plugin counted."""
        before = plugin.snapshot()
        answers, names, added = [Answer() for _ in requests], {}, 0
        step = 0
        self.preemptions = self.most_running = 0
        while added < len(requests) or self.core.has_unfinished_requests():
            for i, request in enumerate(requests):
                if request.at == step:
                    self._number += 1
                    added += 1
                    name = str(self._number)
                    names[name] = i
                    params = SamplingParams(
                        max_tokens=request.new, temperature=0, logprobs=5, ignore_eos=True
                    )
                    more = {} if request.lora is None else {"lora_request": request.lora}
                    sent = self.core.add_request(name, {"prompt_token_ids": request.ids}, params, **more)
                    names[sent or name] = i
                if request.abort_at == step:
                    self.core.abort_request([name for name, j in names.items() if j == i])
            for output in self.core.step():
                answer = answers[names[output.request_id]]
                answer.tokens = list(output.outputs[0].token_ids)
                answer.logprobs = [
                    {token: entry.logprob for token, entry in best.items()}
                    for best in output.outputs[0].logprobs
                ]
                answer.cached = output.num_cached_tokens or 0
                answer.finished = output.finished
            self.preemptions = max(
                [self.preemptions, *(r.num_preemptions for r in self.scheduler.requests.values())]
            )
            self.most_running = max(self.most_running, len(self.scheduler.running))
            step += 1
            assert step < 5000
        return answers, delta(before, plugin.snapshot())

    def chunk(self, tokens):
        """From the next step on a batch has so many tokens at most."""
        self.scheduler.max_num_scheduled_tokens = tokens

    def close(self):
        del self.llm, self.core
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()

"""Runs vLLM in a process of its own, for tests/test_vllm.py: python vllm_job.py JOB.json ANSWER.json

A job: {"model", "llm": keywords of LLM, "prompts": [[token ids]], "tokens": new ones for each, "packed": whether to
multiply by packed weights on the CPU, too, "as_on_gpu": whether to compile with vLLM's own backend there, too, "count":
whether to count calls, "lora": a directory or nothing, "writes": a directory for what the KV cache is given
(vllm_writes.py), or nothing}. The answer: {"tokens": [[ids]], "logprobs": [[of each token]],
"calls": {op of glq: how often it was called}, "metrics": {name: count} if kept, "kv_tokens": that fit}.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch


def main(job):
    from vllm import LLM, SamplingParams

    if job.get("packed"):
        from glq.vllm_integration import methods

        methods.decodes_once = lambda: False
    if job.get("as_on_gpu"):
        keep_own_backend()
    extension = {"worker_extension_cls": "vllm_writes.Writes"} if job.get("writes") else {}
    llm = LLM(job["model"], **job["llm"], **extension)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    params = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, logprobs=0)
    if job.get("lora"):
        from vllm.lora.request import LoRARequest
    adapter = LoRARequest("adapter", 1, job["lora"]) if job.get("lora") else None
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu]) if job.get("count") else nullcontext() as profile:
        requests = llm.generate(prompts, params, use_tqdm=False, lora_request=adapter)
    if job.get("writes"):
        llm.collective_rpc("save_writes", args=(job["writes"],))
    outputs = [request.outputs[0] for request in requests]
    tokens = [list(output.token_ids) for output in outputs]
    logprobs = [
        [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
        for output in outputs
    ]
    events = profile.key_averages() if profile else []
    calls = {event.key.removeprefix("glq::"): event.count for event in events if event.key.startswith("glq::")}
    counters = [] if job["llm"].get("disable_log_stats", True) else llm.get_metrics()
    metrics = {counter.name: counter.value for counter in counters if hasattr(counter, "value")}
    cache = llm.llm_engine.vllm_config.cache_config
    kv_tokens = cache.num_gpu_blocks * cache.block_size
    return {"tokens": tokens, "logprobs": logprobs, "calls": calls, "metrics": metrics, "kv_tokens": kv_tokens}


def keep_own_backend():
    """vLLM leaves the CPU to Inductor alone, which has neither vLLM's passes nor its norms as one node."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    platform = type(current_platform)
    update = platform.check_and_update_config

    def check_and_update_config(vllm_config):
        update(vllm_config)
        compilation = vllm_config.compilation_config
        compilation.mode, compilation.ir_enable_torch_wrap = CompilationMode.VLLM_COMPILE, True
        compilation.compile_sizes = []

    platform.check_and_update_config = staticmethod(check_and_update_config)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))

"""Runs vLLM for tests/test_vllm.py, each engine in a fork of this process, which has imported vLLM by then.

From standard input comes a line for each job, {"job", "answer", "log": paths, "environment"}; its exit status goes to
standard output. A job: {"model", "llm": keywords of LLM, "prompts": [[token ids]], "tokens": new ones for each,
"packed": whether to multiply by packed weights on the CPU, too, "as_on_gpu": whether to compile with vLLM's own backend
there, too, "count": whether to count calls, "lora": a directory or nothing, "writes": a directory for what the KV cache
is given (vllm_writes.py), or nothing}. The answer: {"tokens": [[ids]], "logprobs": [[of each token]],
"calls": {op of glq: how often it was called}, "metrics": {name: count} if kept, "kv_tokens": that fit}.
"""

import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch


def main(job):
    if job["llm"].get("enforce_eager"):
        torch._dynamo.config.disable = True  # vLLM's sampler would be compiled, for five seconds
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


def serve(answers):
    for line in sys.stdin:
        request = json.loads(line)
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
            continue
        signal.alarm(900)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.environ.clear()
        os.environ.update(request["environment"])
        answer = main(json.loads(Path(request["job"]).read_text(encoding="utf-8")))
        Path(request["answer"]).write_text(json.dumps(answer))
        return


if __name__ == "__main__":  # a rank of an engine, which starts anew, imports this file, too
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM may print while it is imported
    import vllm.model_executor.models.llama
    import vllm.v1.worker.cpu_model_runner  # noqa: F401
    from vllm import LLM, SamplingParams

    serve(own)

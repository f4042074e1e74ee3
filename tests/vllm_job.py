"""Runs vLLM in a process of its own, for tests/test_vllm.py: python vllm_job.py JOB.json ANSWER.json

A job: {"model", "llm": keywords of LLM, "prompts": [[token ids]], "tokens": new ones for each, "packed": whether to
multiply by packed weights on the CPU, too, "lora": a directory or nothing}. The answer: {"tokens": [[ids]],
"logprobs": [[of each token]]}.
"""

import json
import sys
from pathlib import Path


def main(job):
    from vllm import LLM, SamplingParams

    if job.get("packed"):
        from glq.vllm_integration import methods

        methods.decodes_once = lambda: False
    llm = LLM(job["model"], **job["llm"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    params = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, logprobs=0)
    if job.get("lora"):
        from vllm.lora.request import LoRARequest
    adapter = LoRARequest("adapter", 1, job["lora"]) if job.get("lora") else None
    requests = llm.generate(prompts, params, use_tqdm=False, lora_request=adapter)
    outputs = [request.outputs[0] for request in requests]
    tokens = [list(output.token_ids) for output in outputs]
    logprobs = [
        [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
        for output in outputs
    ]
    return {"tokens": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))

"""Runs vLLM in a process of its own, for tests/test_vllm.py: python vllm_job.py JOB.json → a last line of JSON.

A job: {"model", "llm": keywords of LLM, "prompts": [[token ids]], "tokens": new ones for each, "packed": whether to
multiply by packed weights on the CPU, too}. The answer: {"tokens": [[ids]], "logprobs": [[of each token]]}.
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
    outputs = [request.outputs[0] for request in llm.generate(prompts, params, use_tqdm=False)]
    tokens = [list(output.token_ids) for output in outputs]
    logprobs = [
        [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
        for output in outputs
    ]
    print(json.dumps({"tokens": tokens, "logprobs": logprobs}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

"""Whether a model still finds a number in a long text when its KV cache has few bits.

    python bench/passkey.py MODEL [--lengths 1024 2048] [--places 4] [--bits 16 4 3 2] [--plain | --served]
        [--text eval.txt]

A text of so many tokens has "The pass key is 12345." in it, at several places, and ends with "The pass key is". One
forward pass over text and answer, in which attention sees decoded keys and values only: found, if each token of the
number is the likeliest one. log_prob: of the whole number, the mean over places. --plain: without a centre, as pages in
vLLM with glq_kv_repeatable. --served: as vLLM without it, so that tokens of the text see each other in 16 bits, and
only the number's read codes. What the 16-bit cache does not find says nothing about the others.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from glq import GlqCache
from glq.calibration import read_text
from glq.evaluation import log_probabilities
from glq.hf_integration import load
from glq.hub import load_tokenizer, resolve

QUESTION = "\n\nWhat is the pass key that the text has told you? The pass key is"


def prompts(tokenizer, content: str, length: int, places: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens of a text with its question, and of the answer, for each place."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    found, generator = [], torch.Generator().manual_seed(0)
    question, first = ids(QUESTION), tokenizer(" ").input_ids[:-1]  # a beginning of text, where there is one
    for i in range(places):
        number = torch.randint(10000, 100000, (), generator=generator).item()
        told, answer = (
            ids(f"\n\nThe pass key is {number}. Remember it: {number} is the pass key.\n\n"),
            ids(f" {number}"),
        )
        room = length - len(first) - len(told) - len(question) - len(answer)
        filler = ids(content)[:room]
        if len(filler) < room:
            raise SystemExit(f"the text has {len(filler)} tokens, and {room} are needed: give a longer one by --text")
        at = room * (2 * i + 1) // (2 * places)
        found.append((torch.tensor(first + filler[:at] + told + filler[at:] + question), torch.tensor(answer)))
    return found


class Served(GlqCache):
    """Tokens that come together see each other as they are."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        both, new = super().update(key_states, value_states, *args, **kwargs), key_states.shape[-2]
        if new > 1:
            both[0][..., -new:, :], both[1][..., -new:, :] = key_states, value_states
        return both


def answer(model: PreTrainedModel, prompt: Tensor, number: Tensor, cache: Cache) -> tuple[bool, float]:
    ids = torch.cat([prompt, number])[None, :-1].to(model.device)
    parts = [ids] if not isinstance(cache, Served) else [ids[:, : len(prompt)], *ids[:, len(prompt) :].split(1, 1)]
    states = [model.base_model(part, past_key_values=cache).last_hidden_state for part in parts]
    hidden = torch.cat(states, 1)[0, len(prompt) - 1 :]
    log_p, number = log_probabilities(model, hidden), number.to(model.device)
    return bool((log_p.argmax(-1) == number).all()), log_p.gather(1, number[:, None]).sum().item()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048])
    parser.add_argument("--places", type=int, default=4)
    parser.add_argument("--bits", type=int, nargs="*", default=[16, 4, 3, 2])
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--served", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = load(args.model, device=args.device), load_tokenizer(resolve(args.model))
    content, rows = read_text(args.text, default="evaluation"), []
    for length in args.lengths:
        asked = prompts(tokenizer, content, length, args.places)
        for bits in args.bits:
            results = []
            for prompt, number in asked:
                if bits == 16:
                    cache = DynamicCache(config=model.config)
                else:
                    kind = Served if args.served else GlqCache
                    cache = kind(bits, model=model, centre=not (args.served or args.plain))
                results.append(answer(model, prompt, number, cache))
            found, log_p = sum(ok for ok, _ in results), sum(p for _, p in results) / len(results)
            rows.append({"tokens": length, "bits": bits, "found": found, "of": len(results), "log_prob": log_p})
            print(f"| {length} | {bits} | {found} of {len(results)} | {log_p:.3f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

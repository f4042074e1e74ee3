"""A conversation with a model: turns in its chat template, answers as they are written."""

from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from glq.kv.cache import GlqCache, cache_keyword


class Chat:
    """`history`: turns as chat templates take them. Without a template, what was said so far is text to go on from."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
        kv_bits: int | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._max_tokens, self._temperature, self._kv_bits = max_tokens, temperature, kv_bits
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.history: list[dict[str, str]] = list(self._start)
        self._stop = Event()

    def stop(self) -> None:
        """End the answer that is being written after its next token; what was written stays in the history."""
        self._stop.set()

    def say(self, text: str) -> Iterator[str]:
        """The answer, piece by piece. Ends early after `stop`, or if the reader stops reading."""
        self.history.append({"role": "user", "content": text})
        self._stop.clear()
        inputs = self._encode()
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []
        arguments: dict[str, Any] = dict(inputs) | {
            "max_new_tokens": self._room(inputs["input_ids"].shape[1]),
            "do_sample": self._temperature > 0,
            "streamer": streamer,
            "stopping_criteria": StoppingCriteriaList([_Stopped(self._stop)]),
        }
        if self._temperature > 0:
            arguments["temperature"] = self._temperature
        if self._kv_bits is not None:
            arguments[cache_keyword(self._model)] = GlqCache(self._kv_bits, model=self._model)

        def write() -> None:
            try:
                self._model.generate(**arguments)
            except BaseException as error:  # noqa: BLE001 (raised again by the thread that waits)
                failed.append(error)
                streamer.end()

        writer, pieces = Thread(target=write, daemon=True), []
        writer.start()
        try:
            for piece in streamer:
                if piece:
                    pieces.append(piece)
                    yield piece
        finally:
            self._stop.set()
            writer.join()
            self.history.append({"role": "assistant", "content": "".join(pieces)})
        if failed:
            raise failed[0]

    def _encode(self) -> dict[str, torch.Tensor]:
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(self.history, tokenize=False, add_generation_prompt=True)
        else:
            text = "".join(turn["content"] for turn in self.history)
        own = not self._tokenizer.chat_template  # a template writes the special tokens itself
        encoded = self._tokenizer(text, return_tensors="pt", add_special_tokens=own)
        return {key: encoded[key].to(self._model.device) for key in ("input_ids", "attention_mask")}

    def _room(self, tokens: int) -> int:
        """New tokens that the model's positions leave, at least one."""
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return self._max_tokens if most is None else max(1, min(self._max_tokens, most - tokens))


class _Stopped(StoppingCriteria):
    def __init__(self, stop: Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._stop.is_set(), device=input_ids.device)

"""`glq chat` and `glq serve`: trying a checkpoint."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glq.arguments import refuse_below, refuse_no_model
from glq.commands.console import plain_errors, say
from glq.errors import GlqError, how_to_install

if TYPE_CHECKING:
    from glq.chat import Chat


def chat(
    model: Annotated[str, typer.Argument(help="checkpoint directory or name")],
    system: Annotated[str | None, typer.Option(help="what the model is told first")] = None,
    max_tokens: Annotated[int, typer.Option(help="new tokens of an answer at most")] = 512,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token")] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    kv_bits: Annotated[int | None, typer.Option(help="bits of the KV cache: 4, 3 or 2; default: 16 or 32")] = None,
) -> None:
    """Talk to a model in the terminal. /reset forgets, Ctrl-C stops an answer, /quit or Ctrl-D ends."""

    def check() -> None:
        refuse_no_model(model)
        refuse_below(1, max_tokens=max_tokens)
        refuse_below(0, temperature=temperature)

    with plain_errors(check):
        from glq.chat import Chat
        from glq.hf_integration import load
        from glq.hub import load_tokenizer, resolve
        from glq.kv.codec import kv_codec

        if kv_bits is not None:
            kv_codec(kv_bits)  # refused before anything is loaded
        tokenizer = load_tokenizer(resolve(model))
        options = {"system": system, "max_tokens": max_tokens, "temperature": temperature, "kv_bits": kv_bits}
        talk = Chat(load(model, device=device), tokenizer, **options)  # type: ignore[arg-type]
        if not tokenizer.chat_template:
            say("this model has no chat template: it goes on with what you write")
        say("/reset forgets what was said, Ctrl-C stops an answer, /quit ends")
        _loop(talk)


def _loop(talk: "Chat") -> None:
    asked = False  # whether Ctrl-C is to end it, too
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:  # meant for an answer that had just ended, maybe
            say("" if asked else "\nCtrl-C again, Ctrl-D or /quit ends")
            if asked:
                return
            asked = True
            continue
        asked = False
        if not sys.stdin.isatty():
            say(text)  # what is piped in has no echo
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            talk.reset()
            say("forgotten")
        elif text.startswith("/"):
            say("/reset forgets what was said; /quit or Ctrl-D ends; Ctrl-C stops an answer")
        elif text:
            _answer(talk, text)


def _answer(talk: "Chat", text: str) -> None:
    """Print an answer as it comes; Ctrl-C ends it, and the conversation goes on."""
    pieces = talk.say(text)
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        talk.stop()
        pieces.close()  # type: ignore[attr-defined]
        sys.stdout.write(" …")
    sys.stdout.write("\n")


def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="checkpoint directory")],
) -> None:
    """Serve a checkpoint with vLLM's OpenAI server; what follows MODEL is passed on: glq serve out --port 8001."""
    with plain_errors():
        from glq.checkpoint import read_config

        read_config(model)
        command = shutil.which("vllm", path=str(Path(sys.executable).parent)) or shutil.which("vllm")
        if command is None or find_spec("vllm") is None:
            raise GlqError(
                f"serving needs vLLM, which is not installed here: {how_to_install('vllm')}, or docs/serving.md for an "
                f"image. Without it: glq chat {model}"
            )
        os.execv(command, [command, "serve", str(model), *context.args])

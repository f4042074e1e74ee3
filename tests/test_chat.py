"""`glq chat` says what generate says and keeps the history; `glq serve` finds vLLM or tells how to get it."""

import sys

import pytest
import torch
from typer.testing import CliRunner

from glq.chat import Chat
from glq.cli import app
from glq.commands import talk
from glq.hf_integration import load
from glq.hub import load_tokenizer

runner = CliRunner()
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture
def parts(tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    tokenizer.chat_template = TEMPLATE
    return load(tiny_checkpoint, device="cpu"), tokenizer


def test_an_answer_is_that_of_generate_and_history_is_kept(parts):
    model, tokenizer = parts
    chat = Chat(model, tokenizer, max_tokens=6, system="w9")
    first = "".join(chat.say("w1 w2"))
    prompt = "system w9 user w1 w2 "
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert first.split() == tokenizer.decode(written[0, ids.shape[1] :]).split()
    assert [turn["role"] for turn in chat.history] == ["system", "user", "assistant"]
    assert chat.history[-1]["content"] == first
    list(chat.say("w3"))
    encoded = tokenizer.decode(chat._encode()["input_ids"][0])
    assert first.strip() in encoded
    chat.reset()
    assert chat.history == [{"role": "system", "content": "w9"}]


def test_an_answer_can_be_stopped_and_what_was_written_stays(parts):
    chat = Chat(*parts, max_tokens=200)
    pieces = chat.say("w1")
    some = [next(pieces), next(pieces)]
    pieces.close()
    assert chat.history[-1] == {"role": "assistant", "content": "".join(some)}
    chat._max_tokens = 3
    assert len("".join(chat.say("w2")).split()) == 3


def test_a_quantized_cache_and_a_model_without_template(parts):
    model, tokenizer = parts
    tokenizer.chat_template = None
    chat = Chat(model, tokenizer, max_tokens=4, kv_bits=4)
    answer = "".join(chat.say("w1 w2 w3"))
    assert len(answer.split()) == 4


def test_what_fails_while_writing_is_raised(parts):
    chat = Chat(*parts, max_tokens=4)
    chat._model.generate = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(chat.say("w1"))
    del chat._model.generate


def test_the_terminal(tiny_checkpoint):
    lines = "w1 w2\n/nonsense\n/reset\n\n/quit\n"
    result = runner.invoke(app, ["chat", str(tiny_checkpoint), "--max-tokens", "3", "--device", "cpu"], input=lines)
    assert result.exit_code == 0, result.output
    assert "no chat template" in result.output
    assert "forgotten" in result.output
    assert "/quit or Ctrl-D ends" in result.output
    assert len([word for word in result.output.split() if word[1:].isdigit()]) >= 3


def test_ctrl_c_ends_an_answer_and_not_the_conversation(capsys):
    class Interrupted:
        stopped = False

        def say(self, text):
            yield "some"
            raise KeyboardInterrupt

        def stop(self):
            self.stopped = True

    chat = Interrupted()
    talk._answer(chat, "w1")
    assert chat.stopped
    assert capsys.readouterr().out == "some …\n"


def test_ctrl_c_at_the_prompt_asks_once(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    talk._loop(None)
    assert capsys.readouterr().out.count("Ctrl-C again") == 1


def test_serve_needs_vllm_and_says_how_to_get_it(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(talk, "find_spec", lambda name: None)
    result = runner.invoke(app, ["serve", str(tiny_checkpoint)])
    assert result.exit_code == 2
    assert "pip install '.[vllm]' in a clone" in result.stderr
    assert result.stderr.count("\n") <= 2
    result = runner.invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 2
    assert "not a checkpoint directory" in result.stderr


def test_serve_hands_over_to_vllm_with_what_follows(tiny_checkpoint, tmp_path, monkeypatch):
    command, called = tmp_path / "vllm", []
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    monkeypatch.setattr(talk, "find_spec", lambda name: object())
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr("os.execv", lambda path, arguments: called.append((path, arguments)))
    result = runner.invoke(app, ["serve", str(tiny_checkpoint), "--port", "8001", "--enforce-eager"])
    assert result.exit_code == 0, result.output
    assert called == [
        (str(command), [str(command), "serve", str(tiny_checkpoint), "--port", "8001", "--enforce-eager"])
    ]

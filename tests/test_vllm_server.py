"""vLLM's OpenAI server with a glq checkpoint, and a real client: streams, and sixteen requests at once."""

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from test_vllm import environment

from glq.hf_integration import load

pytestmark = pytest.mark.skipif(find_spec("vllm") is None or find_spec("openai") is None, reason="needs vllm, openai")

PROMPTS = [[0, 5 + i, 9, 30 + i, 200 - i] for i in range(16)]
NEW = 12


@pytest.fixture(scope="module")
def client(tiny_even, tmp_path_factory):
    """An OpenAI client of a server of its own, which is stopped in the end."""
    from openai import OpenAI

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_even)]
    command += ["--served-model-name", "glq", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16"]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment(processes=True), stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_for(server, f"http://127.0.0.1:{port}/health", log)
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        finally:
            server.terminate()
            server.wait(60)


def wait_for(server, url, log):
    for _ in range(300):
        if server.poll() is not None:
            break
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(1)
    pytest.fail(log.read_text()[-6000:])


def ask(client, prompt, stream=False):
    extra = {"ignore_eos": True, "return_token_ids": True}
    return client.completions.create(
        model="glq", prompt=prompt, max_tokens=NEW, temperature=0, stream=stream, extra_body=extra
    )


def test_a_stream_comes_in_pieces_and_is_the_whole(client):
    whole = ask(client, PROMPTS[0]).choices[0].text
    pieces = [chunk.choices[0].text for chunk in ask(client, PROMPTS[0], stream=True) if chunk.choices]
    assert "".join(pieces) == whole
    assert len(whole.split()) == NEW
    assert len(pieces) > 2


def test_sixteen_at_once_get_the_answers_of_one_at_a_time(client, tiny_even):
    alone = [ask(client, prompt).choices[0] for prompt in PROMPTS]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: ask(client, prompt).choices[0], PROMPTS))
    assert [choice.token_ids for choice in together] == [choice.token_ids for choice in alone]
    assert len({tuple(choice.token_ids) for choice in alone}) > 1
    model = load(tiny_even, device="cpu")
    for prompt, choice in zip(PROMPTS, alone, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *choice.token_ids]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits[torch.arange(NEW), choice.token_ids]
        assert (logits.max(-1).values - chosen).max() < 1e-4

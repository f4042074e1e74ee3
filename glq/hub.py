"""Where a model is: a local directory, or the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from glq.arguments import refuse_no_model
from glq.errors import GlqError

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md", "e8_codebook.pt"]


def resolve(model: str | Path) -> Path:
    """The local directory of a model: itself, or the snapshot of a hub name, downloaded if need be."""
    path = Path(model)
    if path.is_dir():
        return path
    refuse_no_model(model)
    try:
        return Path(snapshot_download(str(model), allow_patterns=HUB_FILES))
    except (OSError, HFValidationError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        first = next((line.removeprefix("Got: ").rstrip(".") for line in lines if line), type(error).__name__)
        raise GlqError(
            f"{model} is no local directory, and the hub does not give it: {first}. Check the name, the network and "
            "your access rights; without a network, give a directory"
        ) from error


def at_hand(model: str | Path, revision: str | None = None, cache_dir: str | None = None) -> Path | None:
    """As `resolve`, of what was downloaded already: None if nothing was."""
    path = Path(model)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(model), revision=revision, cache_dir=cache_dir, local_files_only=True))
    except (OSError, ValueError):  # not there; no name of the hub
        return None


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; GlqError if there is none that works."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise GlqError(f"{path} has no usable tokenizer: {str(error).splitlines()[0]}") from error

"""Where a model is: a local directory, or the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from glq.errors import GlqError

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md", "e8_codebook.pt"]


def resolve(model: str | Path) -> Path:
    """The local directory of a model: itself, or the snapshot of a hub name, downloaded if need be."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise GlqError(f"{model} is not a directory: give a local model directory or a Hugging Face name like org/name")
    try:
        return Path(snapshot_download(str(model), allow_patterns=HUB_FILES))
    except (OSError, HFValidationError) as error:
        first = str(error).strip().splitlines()[0]
        raise GlqError(
            f"{model} is neither a local directory nor a model that the hub gives: {first}. "
            "Check the name, the network and your access rights"
        ) from error


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; GlqError if there is none that works."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise GlqError(f"{path} has no usable tokenizer: {str(error).splitlines()[0]}") from error

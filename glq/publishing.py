"""From a checkpoint directory to the Hugging Face hub, and what its card says of the model that it was made from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from glq.checkpoint import inspect
from glq.errors import GlqError
from glq.hub import resolve

_KEPT = ("license", "license_name", "license_link", "language", "base_model")


def base_model(model: str | Path) -> dict[str, Any]:
    """What publishing needs to know of the model before: its name, bytes, licence and languages, from its card."""
    path = resolve(model)
    data = _card_data(path / "README.md")
    on_hub = not Path(model).is_dir()
    base = {
        "name": str(model) if on_hub else _own_name(data, path),
        "on_hub": on_hub,
        "bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
        "chat": _has_chat_template(path),
    }
    return base | {key: data.get(key) for key in _KEPT} | {"license_files": [f.name for f in path.glob("LICENSE*")]}


def push(
    path: Path, name: str, *, private: bool = False, message: str | None = None, endpoint: str | None = None
) -> str:
    """Upload a checkpoint directory, after checking all of it; the address of what is there then.

    endpoint: another hub than huggingface.co, which gets plain HTTP: any hub takes that, and few have Xet. GlqError if
    the directory is not whole, or the hub refuses.
    """
    inspect(path)
    if name.count("/") != 1:
        raise GlqError(f"a repository on the hub is named like you/model, found {name!r}")
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        with _xet(disabled=constants.HF_HUB_DISABLE_XET or endpoint is not None):
            info = api.upload_folder(
                repo_id=name,
                folder_path=path,
                commit_message=message or f"{path.name}: quantized by glq",
                ignore_patterns=[".*"],
            )
    except Exception as error:  # the network's, too, of whatever library huggingface_hub has for it
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise GlqError(f"{_what_failed(error, name, api.endpoint)}: {first.strip()[:300]}") from error
    return str(info.commit_url).rpartition("/commit/")[0] or name


@contextmanager
def _xet(disabled: bool) -> Iterator[None]:
    """huggingface_hub decides by a constant, which no argument stands for, whether it uploads by Xet."""
    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, disabled
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _what_failed(error: Exception, name: str, hub: str) -> str:
    """The hub's answer, or that there was none."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        return f"{hub} refused {name} (`hf auth login` sets a token)"
    if status is not None or isinstance(error, HFValidationError):
        return f"{hub} refused {name}"
    return f"{name} was not uploaded, {hub} cannot be reached or broke off"


def _card_data(card: Path) -> dict[str, Any]:
    """The metadata of a model card; nothing where there is none, or none that can be read."""
    if not card.is_file():
        return {}
    try:
        return dict(ModelCard(card.read_text(encoding="utf-8", errors="replace")).data.to_dict())
    except Exception:  # noqa: BLE001 (whatever a stranger's YAML raises, it is not needed)
        return {}


def _has_chat_template(path: Path) -> bool:
    config = path / "tokenizer_config.json"
    inside = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8", errors="replace")
    return inside or (path / "chat_template.jinja").is_file()


def _own_name(data: dict[str, Any], path: Path) -> str:
    """Of a directory: its name."""
    return str(data.get("model_name") or path.resolve().name)

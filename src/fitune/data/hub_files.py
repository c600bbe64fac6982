"""Data sets on the hub: a name in, the files of it in the local cache out."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from fitune.config.schema import HUB
from fitune.data.sources import SUFFIXES
from fitune.errors import InputError

PATIENCE_SECONDS = 20.0
_REFERENCE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?")


def is_on_hub(path: str) -> bool:
    """Whether a path names a data set on the hub: hf://datasets/OWNER/NAME[@REVISION][/FILE], FILE may have *."""
    return path.startswith("hf://")


def fetch(reference: str) -> list[Path]:
    """The files that a reference names, fetched once and kept in the hub's cache; in the order of their names.

    Without a FILE the data set's one file of training data, or the parts of it.

    Raises:
        InputError: it is no such name, the hub cannot be reached, has no such data set, or the files are not clear.
    """
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise InputError(f"{reference} is not of the form {HUB}OWNER/NAME[@REVISION][/FILE]")
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    name, revision, pattern = found.groups()
    try:
        entries = HfApi().dataset_info(name, revision=revision, timeout=PATIENCE_SECONDS).siblings or []
        there = [entry.rfilename for entry in entries]
        chosen = _choose(there, pattern, reference)
        return [Path(hf_hub_download(name, file, repo_type="dataset", revision=revision)) for file in chosen]
    except RepositoryNotFoundError:
        raise InputError(f"{reference}: the hub has no such data set, or it is private") from None
    except OfflineModeIsEnabled:
        raise InputError(f"{reference}: HF_HUB_OFFLINE forbids fetching it; name a file instead") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{reference}: the hub cannot be reached ({reason}); name a file instead") from None
    except Exception as error:
        if type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise InputError(f"{reference}: the hub cannot be reached ({error}); name a file instead") from None
        raise


def _choose(there: Sequence[str], pattern: str | None, reference: str) -> list[str]:
    data = sorted(file for file in there if _is_data(file))
    if pattern is not None:
        chosen = [file for file in data if fnmatch.fnmatchcase(file, pattern)]
    else:
        train = [file for file in data if PurePosixPath(file).name.startswith("train")]
        chosen = train or (data if len(data) == 1 else [])
        folders = {str(PurePosixPath(file).parent) for file in chosen}
        chosen = chosen if len(folders) == 1 else []
    if not chosen:
        shown = ", ".join(data[:20]) + (f", and {len(data) - 20} more" if len(data) > 20 else "")
        what = f"no file there fits {pattern}" if pattern else "which of its files is meant is not clear"
        raise InputError(f"{reference}: {what}; it has {shown or 'no file of data'}")
    return chosen


def _is_data(file: str) -> bool:
    suffixes = PurePosixPath(file).suffixes
    return (
        any(suffix.lower() in SUFFIXES for suffix in suffixes[-2:])
        and PurePosixPath(file).name != "dataset_infos.json"
    )

"""`fitune init`: a commented run file to start from."""

from __future__ import annotations

import errno
import os
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fitune.errors import DiskFullError, InputError

if TYPE_CHECKING:
    from fitune.config.recommended import Recommendation


class Method(StrEnum):
    qlora = "qlora"
    lora = "lora"
    full = "full"


def command(
    path: Annotated[Path, typer.Argument(help="The run file to write.")] = Path("run.yaml"),
    model: Annotated[
        str, typer.Option(help="The base model: bundled, a folder, a GGUF file or a hub name.")
    ] = "bundled",
    data: Annotated[Path | None, typer.Option(help="The file of training data.")] = None,
    method: Annotated[Method, typer.Option(help="How to train.")] = Method.qlora,
    recommended: Annotated[
        bool, typer.Option("--recommended", help="Fill in the settings published for the model's family and size.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")] = False,
) -> None:
    """Write a run file in which every field is explained, to edit and train from."""
    from fitune import config

    if data is not None and not data.is_file():
        raise InputError("no such file", where=f"--data {data}")
    if path.is_dir():
        raise InputError("is a folder; name the run file to write in it", where=path)
    if path.exists() and not force:
        raise InputError("is there already; name another file, or replace it with --force", where=path)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} to write it in", where=path)
    named = "train.jsonl" if data is None else os.path.relpath(data.absolute(), folder)
    if model != "bundled" and Path(model).exists():
        model = str(Path(model).absolute())
    if recommended:
        recipe = _recommendation(model, method)
        origin = f"{recipe.note}, {recipe.source}"
        text = config.starter_file(model, named, method.value, path.name, recipe.settings, origin)
    else:
        text = config.starter_file(model, named, method.value, path.name)
    _write(path, text)
    print(f"Wrote {path}.")
    if data is None and not (folder / named).is_file():
        print(f"Put your training data into {folder / named}, or name your file under data.train.")
    print(f"Next: fitune plan {path}")


def _recommendation(model: str, method: Method) -> Recommendation:
    """The most specific settings published for a model, which is not fetched; InputError where there are none."""
    from fitune.config.recommended import recommendations
    from fitune.models.find import find_model
    from fitune.models.presets import family_of, find_preset

    preset = find_preset(model)
    if preset is not None:
        found = recommendations(preset.family, preset.published - preset.beyond, method.value)
    elif model == "bundled" or Path(model).exists():
        from fitune.models.dimensions import dimensions

        config = find_model(model).config
        found = recommendations(family_of(config, model), dimensions(config).parameters, method.value)
    else:
        raise InputError(
            "the size of this model is not known before it is fetched; leave --recommended out, or give a folder",
            where=f"--model {model}",
        )
    if not found:
        raise InputError(
            f"no settings for method {method.value} are known to be published for it; leave --recommended out, "
            "or see `fitune models show` for other methods",
            where=f"--model {model}",
        )
    return found[0]


def _write(path: Path, text: str) -> None:
    """The whole file or nothing: written beside and renamed."""
    beside: str | None = None
    try:
        descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)
        os.replace(beside, path)
    except OSError as error:
        if beside is not None and os.path.exists(beside):
            os.unlink(beside)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"{path}: the disk is full; nothing was written") from error
        raise InputError(f"cannot be written: {error.strerror}", where=path) from error

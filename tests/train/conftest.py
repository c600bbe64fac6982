"""What the tests of runs share: a folder with a tiny model and its data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tiny_models import write_model, write_questions


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, data and a store's cache of its own."""
    folder = tmp_path_factory.mktemp("runs")
    write_model(folder / "model")
    write_questions(folder / "train.jsonl")
    write_questions(folder / "validation.jsonl", 5, first=100)
    before = os.environ.get("FITUNE_CACHE")
    os.environ["FITUNE_CACHE"] = str(folder / "cache")
    yield folder
    del os.environ["FITUNE_CACHE"]
    if before is not None:
        os.environ["FITUNE_CACHE"] = before

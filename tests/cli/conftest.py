"""One tiny real run, trained once through the command line, for all tests of the verbs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import STEPS, TrainedRun, facts_of


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own, unless one is named."""
    if os.environ.get("FITUNE_CACHE"):
        yield
        return
    os.environ["FITUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["FITUNE_CACHE"]


@pytest.fixture
def one_core() -> Iterator[None]:
    """This process on one of its cores, where no run file sets the threads: machines that test are often busy."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twelve samples and a run file for a few steps on them."""
    folder = tmp_path_factory.mktemp("work")
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} plus {n}?"},
                {"role": "assistant", "content": str(2 * n)},
            ]
        }
        for n in range(1, 13)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.yaml").write_text(
        "model: bundled\n"
        "data:\n  train: sums.jsonl\n  validation: 0.2\n  max_tokens: 256\n"
        f"train:\n  steps: {STEPS}\n  micro_batch: 1\n  threads: 1\n"
        "evaluate:\n  task: perplexity\n"
    )
    return folder


@pytest.fixture(scope="session")
def trained(workplace: Path, cache: None) -> TrainedRun:
    """The run of `workplace`, trained."""
    folder = workplace / "trained"
    return TrainedRun(folder, workplace / "run.yaml", facts_of("train", workplace / "run.yaml", f"output={folder}"))

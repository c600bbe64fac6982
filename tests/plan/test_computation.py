"""How train.compute: int8 is resolved: what it makes of a machine that has it, and of one that has not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fitune.config.schema import RunConfig
from fitune.hardware import detect
from fitune.kernels import int8_products
from fitune.plan.computation import choose_computation

RESOLVE = """
from fitune.config.schema import RunConfig
from fitune.hardware import detect
from fitune.plan.computation import choose_computation
choose_computation(RunConfig.model_validate({"data": {"train": "a"}, "train": {"compute": "int8"}}), detect())
"""


def config_of(**train: str) -> RunConfig:
    return RunConfig.model_validate({"data": {"train": "a"}, "train": train})


def test_int8_trains_in_integers_and_answers_without() -> None:
    backend = "auto" if int8_products.natively_multiplied(torch.bfloat16) else "reference"
    config = config_of(compute="int8", backend=backend)
    found = choose_computation(config, detect())
    assert (found.dtype, found.trains_in_int8) == (torch.bfloat16, True)
    assert "int8 (asked for)" in found.reason
    answering = choose_computation(config, detect(), for_training=False)
    assert not answering.trains_in_int8
    assert answering == choose_computation(config_of(compute="auto", backend=backend), detect())


def test_plain_torch_may_stand_in_where_it_was_asked_for() -> None:
    found = choose_computation(config_of(compute="int8", backend="reference"), detect())
    assert (found.backend, found.trains_in_int8) == ("reference", True)


@pytest.mark.parametrize("name", ["scalar", "none such"])
def test_a_machine_without_it_is_told_so(name: str) -> None:
    """In a process of its own: the kernels are chosen once."""
    made = subprocess.run(
        [sys.executable, "-c", RESOLVE], env={**os.environ, "FITUNE_INSTRUCTION_SET": name}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert made.returncode == 1
    assert "InputError: train.compute: int8 needs" in made.stderr
    assert "train.backend reference" in made.stderr

"""`fitune doctor` tells what is so: compared with the machine, the packages and the kernels themselves."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata

import pytest

from fitune import __version__, cli
from fitune.kernels import native


def test_json_is_one_line_of_facts(capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    facts = json.loads(out)
    assert facts["fitune"] == __version__
    assert facts["python"] == platform.python_version()
    assert 1 <= facts["hardware"]["threads"] <= len(os.sched_getaffinity(0))
    assert facts["packages"]["torch"] == metadata.version("torch")
    status = native.status()
    assert facts["kernels"] == {
        "backend": "native" if status.available else "reference",
        "instruction_set": status.instruction_set,
        "reason": status.reason,
        "path": status.path,
    }
    assert facts["problems"] == []


def test_text_has_the_same_facts(capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"fitune {__version__} on Python")
    for said in (metadata.version("torch"), native.status().reason, "Nothing that a run needs is missing."):
        assert said in out

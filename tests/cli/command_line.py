"""Running fitune's commands in this process, and the tiny run that many tests share."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitune import cli

STEPS = 8


@dataclass(frozen=True)
class TrainedRun:
    """A finished run's folder, its run file, and what `fitune train --json` said of it."""

    folder: Path
    run_file: Path
    facts: dict[str, Any]


def call(*arguments: object) -> tuple[int, str, str]:
    """One command in this process -> exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def facts_of(*arguments: object) -> dict[str, Any]:
    """One command with --json that must succeed -> its object, which must be all of stdout."""
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    facts = json.loads(out)
    assert isinstance(facts, dict)
    return facts

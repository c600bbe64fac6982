"""A worker as its parent sees it: started, asked for steps, closed; and whether it has room."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fitune.hardware import detect

WORKER = Path(__file__).with_name("speed_worker.py")
LOG_LINES = 5
# What the system and this benchmark's own process may come to need meanwhile.
MARGIN_BYTES = 500_000_000


class WorkerFailed(Exception):  # noqa: N818 - it tells what happened
    """A worker could not do what it was asked.

    Attributes:
        is_refusal: whether fitune said that the settings cannot be used.
    """

    def __init__(self, message: str, is_refusal: bool) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal


class Worker:
    """A process of one side, loaded.

    Args:
        spec: what `speed_worker.py` takes.
        scratch: a folder for its log, and for a store that is made anew (as in a first run) and removed with it.
        environment: what its environment has besides.

    Attributes:
        step_tokens, computed_tokens: of every different step, its samples' tokens and those that are computed.
        load_seconds, load_peak_bytes: from the start of the process until it was ready for its first step.
        seconds, losses: of every step taken so far.

    Raises WorkerFailed.
    """

    def __init__(
        self, spec: dict[str, Any], scratch: Path, threads: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self._cache = Path(tempfile.mkdtemp(prefix="store-", dir=scratch))
        self._log = scratch / f"{self._cache.name}.log"
        given = {
            **os.environ,
            **(environment or {}),
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "FITUNE_CACHE": str(self._cache),
        }
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), json.dumps(spec)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=given,
            )  # fmt: skip
        self.seconds: list[float] = []
        self.losses: list[float] = []
        try:
            first = self._read()
        except BaseException:
            self.close()
            raise
        self.load_seconds: float = first["loaded"]["seconds"]
        self.load_peak_bytes: int = first["loaded"]["peak_bytes"]
        self.report: dict[str, Any] = first["loaded"]["report"]
        self.step_tokens: list[int] = first["step_tokens"]
        self.computed_tokens: list[int] = first["computed_tokens"]

    def step(self, number: int | None = None) -> float:
        """Takes the step of a number (None: the next one, from the first again after the last) -> seconds."""
        if number is None:
            number = len(self.losses) % len(self.step_tokens)
        found = self.ask({"step": number})
        self.seconds.append(found["seconds"])
        self.losses.append(found["loss"])
        return self.seconds[-1]

    def memory(self) -> tuple[int, int]:
        """Peak and present resident bytes of the process."""
        found = self.ask({"memory": True})
        return found["peak_bytes"], found["resident_bytes"]

    def close(self) -> None:
        """Ends the process and removes what it made."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        shutil.rmtree(self._cache, ignore_errors=True)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the worker answers to a request."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        found: dict[str, Any] = json.loads(line)
        if "failed" in found:
            raise WorkerFailed(found["failed"], found["is_refusal"])
        return found

    def _ended(self) -> WorkerFailed:
        code = self._process.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
        last = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return WorkerFailed("\n".join([f"a worker {how}; its last words:", *last]), False)


def room_bytes(running: Iterable[Worker] = ()) -> int:
    """What another worker may take: the memory available now, less what the running ones will take again."""
    room = detect(with_accelerators=False).available_bytes - MARGIN_BYTES
    for worker in running:
        peak, resident = worker.memory()
        room -= peak - resident
    return room

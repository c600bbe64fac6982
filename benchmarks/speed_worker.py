"""One side of a benchmark in a process of its own, driven over stdin and stdout with lines of JSON.

The first argument is a JSON object that says what to load; `{"loaded": ...}` is answered when that is done. Then
`{"step": N}` takes the step of that number, `{"generate": true}` continues its prompts, and `{"memory": true}`
tells the process's memory. Whatever the libraries print goes to stderr. The process ends with its stdin.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from fitune.errors import InputError
from fitune.process_memory import ask_for_huge_pages, give_back_free_memory, peak_bytes, resident_bytes


class Trainer(Protocol):
    """What can be asked for steps."""

    @property
    def step_tokens(self) -> list[int]: ...
    @property
    def computed_tokens(self) -> list[int]: ...
    def step(self, number: int) -> tuple[float, float]: ...


class Generator(Protocol):
    """What can be asked for continuations -> the new tokens of each prompt, seconds."""

    report: dict[str, Any]

    def generate(self) -> tuple[list[list[int]], float]: ...


class Fitune:
    """Our side, from the rooms that `fitune train` uses and in its order.

    Args:
        run_file: what to train.
        steps: for each step its rows of {"tokens", "trained"}; None: those that the run file's data make.
        adapter: folder of the adapter to begin with; None: a fresh one.
    """

    def __init__(self, run_file: Path, steps: list[Any] | None, adapter: Path | None) -> None:
        from fitune.config import load

        config = load(run_file)  # before what takes long to import: it may refuse the settings

        from fitune.hardware import detect
        from fitune.models.find import find_model
        from fitune.plan.computation import choose_computation
        from fitune.step.optimizer import make_optimizer
        from fitune.train.prepare import build_for_training
        from fitune.train.run import prepare_run

        self.settings = config.train
        if steps is None:
            prepared = prepare_run(config)
            source, computation = prepared.source, prepared.computation
            self._take_rows(prepared.rows)
        else:
            computation = choose_computation(config, detect())
            computation.begin()
            source = find_model(config.model)
            self._take_steps(steps, config.data.max_tokens)
        self.model = build_for_training(config, source, computation, calibration=self._batches(0))
        if adapter is not None:
            _begin_with(self.model.adapted, adapter)
        self.optimizer = make_optimizer(
            config.train.optimizer, self.model.trainable, config.train.betas, config.train.weight_decay,
            self.model.backend, run_file.parent if config.train.optimizer_states == "disk" else None,
        )  # fmt: skip
        self.report = {
            "computation": computation.reason,
            "replaced": dict(self.model.report.replaced),
            "left": dict(self.model.report.left),
        }
        self.taken = 0

    def _take_steps(self, steps: list[Any], row_tokens: int) -> None:
        from fitune.data.collation import collate
        from fitune.data.encoding import EncodedSample

        rows = [[[EncodedSample(tuple(row["tokens"]), tuple(row["trained"]))] for row in step] for step in steps]
        self._batches = lambda number: [collate(rows[number], row_tokens, 0)]
        self.step_tokens = [sum(len(row["tokens"]) for row in step) for step in steps]
        self.computed_tokens = self.step_tokens

    def _take_rows(self, rows: Any) -> None:
        """One epoch of a run."""
        steps = list(rows.epoch(0))
        self._batches = lambda number: rows.batches(steps[number])
        self.step_tokens = [sum(len(rows.samples[index]) for row in step for index in row.samples) for step in steps]
        self.computed_tokens = [sum(batch.tokens.numel() for batch in rows.batches(step)) for step in steps]

    def step(self, number: int) -> tuple[float, float]:
        """One optimizer step on the rows of a number -> loss, seconds."""
        from fitune.step.update import update
        from fitune.train.loop import TRIM_EVERY_STEPS

        rate = self.settings.learning_rate
        assert rate is not None
        begun = time.perf_counter()
        result = update(self.model, self._batches(number), self.optimizer, rate, self.settings.max_grad_norm)
        self.taken += 1
        if self.taken % TRIM_EVERY_STEPS == 0 or self.settings.optimizer_states == "disk":
            give_back_free_memory()
        return result.loss, time.perf_counter() - begun


def _begin_with(adapted: Any, folder: Path) -> None:
    """Gives a fresh adapter the values of a saved one. Raises RuntimeError where the two do not fit exactly."""
    import torch
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    fresh = {
        name.replace(".default.", "."): value for name, value in adapted.named_parameters() if value.requires_grad
    }
    if saved.keys() != fresh.keys():
        odd = sorted(saved.keys() ^ fresh.keys())
        raise RuntimeError(f"{len(odd)} tensors are in one side's adapter only, such as {odd[0]}")
    with torch.no_grad():
        for name, value in saved.items():
            fresh[name].copy_(value)


def open_side(spec: dict[str, Any]) -> Trainer | Generator:
    """What a worker is told -> its side, loaded.

    {"side", "steps", "adapter"} and "run_file" and "without" (fitune), or "model", "variant" and "threads" (peer);
    to generate {"side", "model", "prompts", "new_tokens"} and "four_bit" (fitune) or "threads" (transformers).
    """
    if spec["side"] == "fitune":
        ask_for_huge_pages()  # as the command does
    if "prompts" in spec:
        from speed_generation import open_generator

        return open_generator(spec)
    steps = None if spec["steps"] is None else json.loads(Path(spec["steps"]).read_text())
    adapter = None if spec["adapter"] is None else Path(spec["adapter"])
    if spec["side"] == "fitune":
        if spec.get("without") is not None:
            from speed_switches import switch_off

            switch_off(spec["without"])
        return Fitune(Path(spec["run_file"]), steps, adapter)
    from speed_cases import Variant
    from speed_peer import Peer

    assert steps is not None
    assert adapter is not None
    return Peer(Path(spec["model"]), steps, adapter, Variant(**spec["variant"]), spec["threads"])


def answer(side: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What one request is answered with."""
    if "step" in request:
        loss, seconds = side.step(request["step"])
        return {"loss": loss, "seconds": seconds}
    if "generate" in request:
        tokens, seconds = side.generate()
        return {"tokens": tokens, "seconds": seconds}
    return {"peak_bytes": peak_bytes(), "resident_bytes": resident_bytes()}


def main() -> int:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(facts: dict[str, Any]) -> None:
        replies.write(json.dumps(facts) + "\n")
        replies.flush()

    begun = time.perf_counter()
    try:
        side = open_side(json.loads(sys.argv[1]))
        loaded = {
            "seconds": time.perf_counter() - begun,
            "peak_bytes": peak_bytes(),
            "report": getattr(side, "report", {}),
        }
        counts = {name: getattr(side, name, []) for name in ("step_tokens", "computed_tokens")}
        reply({"loaded": loaded, **counts})
        for line in sys.stdin:
            reply(answer(side, json.loads(line)))
    except InputError as error:
        reply({"failed": str(error), "is_refusal": True})
        return error.exit_code
    except Exception as error:
        reply({"failed": f"{type(error).__name__}: {error}", "is_refusal": False})
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())

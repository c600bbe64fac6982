"""How the numbers of a run are computed: number format, kernels, threads, resolved from what the machine has."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from fitune.config.schema import RunConfig
from fitune.errors import InputError
from fitune.hardware import Hardware
from fitune.kernels import native
from fitune.process_memory import bound_primitive_cache

# What a processor must have for bfloat16 products to be quicker than float32 ones.
BFLOAT16_SETS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Computation:
    """How the numbers are computed, resolved from "auto" by what the machine has.

    Attributes:
        dtype: of activations and products.
        backend: which kernels run.
        threads: CPU threads.
        reason: one sentence on why.
    """

    dtype: torch.dtype
    backend: str
    threads: int
    reason: str

    def begin(self) -> None:
        """Makes it so for this process; to be called before the first product."""
        bound_primitive_cache()
        torch.set_num_threads(self.threads)


def choose_computation(config: RunConfig, hardware: Hardware) -> Computation:
    """Resolves train.compute, train.backend and train.threads; raises InputError for what cannot run here."""
    has_bfloat16 = bool(BFLOAT16_SETS & hardware.instruction_sets)
    asked = config.train.compute
    dtype = torch.bfloat16 if asked == "bfloat16" or (asked == "auto" and has_bfloat16) else torch.float32
    state = native.status()
    if config.train.backend == "native" and not state.available:
        raise InputError(f"the native kernels cannot run here: {state.reason}", where="train.backend")
    backend = "native" if state.available and config.train.backend != "reference" else "reference"
    name = str(dtype).removeprefix("torch.")
    by_itself = "the processor computes it" if has_bfloat16 else "no bfloat16 here"
    why = f"{name} ({by_itself if asked == 'auto' else 'asked for'})"
    kernels = f"kernels: {state.instruction_set}" if backend == "native" else f"no native kernels ({state.reason})"
    return Computation(dtype, backend, _threads(config, hardware), f"{why}, {kernels}")


def _threads(config: RunConfig, hardware: Hardware) -> int:
    """What the run file says, else what OMP_NUM_THREADS says, else what affinity and container leave."""
    if config.train.threads:
        return config.train.threads
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return max(1, min(hardware.threads, int(said))) if said.isdigit() else hardware.threads

"""How the numbers of a run are computed: number format, kernels, threads, resolved from what the machine has."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from fitune.config.schema import RunConfig
from fitune.errors import InputError
from fitune.hardware import Hardware
from fitune.kernels import int8_products, native
from fitune.process_memory import bound_primitive_cache
from fitune.step.ranks import ALONE, Ranks

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
        trains_in_int8: whether the products with frozen weights are computed in 8-bit integers in training steps.
        processes: how many share a step's micro-batches, each with so many threads.
    """

    dtype: torch.dtype
    backend: str
    threads: int
    reason: str
    trains_in_int8: bool = False
    processes: int = 1

    def begin(self) -> None:
        """Makes it so for this process; to be called before the first product."""
        bound_primitive_cache()
        torch.set_num_threads(self.threads)


def choose_computation(
    config: RunConfig, hardware: Hardware, for_training: bool = True, ranks: Ranks = ALONE
) -> Computation:
    """Resolves train.compute, train.backend and train.threads; raises InputError for what cannot run here.

    Not `for_training`, int8 means auto: what was trained with integers is used without them.
    """
    has_bfloat16 = bool(BFLOAT16_SETS & hardware.instruction_sets)
    asked = config.train.compute if for_training or config.train.compute != "int8" else "auto"
    narrow = asked in ("bfloat16", "int8") or (asked == "auto" and has_bfloat16)
    dtype = torch.float16 if asked == "float16" else torch.bfloat16 if narrow else torch.float32
    state = native.status()
    if config.train.backend == "native" and not state.available:
        raise InputError(f"the native kernels cannot run here: {state.reason}", where="train.backend")
    backend = "native" if state.available and config.train.backend != "reference" else "reference"
    name = str(dtype).removeprefix("torch.")
    by_itself = "the processor computes it" if has_bfloat16 else "no bfloat16 here"
    why = f"{name} ({by_itself if asked == 'auto' else 'asked for'})"
    kernels = f"kernels: {state.instruction_set}" if backend == "native" else f"no native kernels ({state.reason})"
    in_int8 = asked == "int8"
    if in_int8:
        if backend == "native" and not int8_products.natively_multiplied(dtype):
            raise InputError(
                f"int8 needs a processor with AVX-512 BF16 and VNNI, or AMX; this one has {state.instruction_set}. "
                "Take auto, or train.backend reference (the same numbers, far slower)",
                where="train.compute",
            )
        if backend == "reference" and config.train.backend != "reference":
            raise InputError(
                f"int8 needs the native kernels, which cannot run here: {state.reason}. Take auto, or train.backend "
                "reference (the same numbers, far slower)",
                where="train.compute",
            )
        why = f"int8 (asked for) for products with frozen weights in training steps, {name} for everything else"
    return Computation(dtype, backend, _threads(config, hardware, ranks), f"{why}, {kernels}", in_int8, ranks.count)


def _threads(config: RunConfig, hardware: Hardware, ranks: Ranks) -> int:
    """What the run file says, else what OMP_NUM_THREADS says, else what affinity and container leave."""
    if config.train.threads:
        return config.train.threads
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if ranks.count > 1 and said == "1":  # torchrun's own choice, where nobody made one
        return hardware.threads
    return max(1, min(hardware.threads, int(said))) if said.isdigit() else hardware.threads

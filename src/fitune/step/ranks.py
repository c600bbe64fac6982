"""Processes that share a run: each computes some of a step's micro-batches, and all take the sum of the gradients.

They are started by `torchrun`, or by whatever else sets its variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT),
on one machine or several, and talk through torch.distributed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor

from fitune.errors import FituneError, InputError

# Gradients go over in parts of so many bytes: DDP's own size (bucket_cap_mb, 25 MiB).
BUCKET_BYTES = 25 << 20
# Processes draw other numbers (dropout): their seeds lie this far apart, so that no run's next seed is another's.
SEED_STEP = 1_000_003
# A process may wait so long for the others: quantising a large model, which one of them does, takes minutes.
PATIENCE = timedelta(hours=2)


class Ranks:
    """This process alone.

    Attributes:
        rank: which of the processes this is; the first one, 0, writes and tells.
        count: how many there are; local_count: on this machine.
    """

    rank = 0
    count = 1
    local_count = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and tells."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """What this process draws from in a run of `seed`."""
        return seed + self.rank * SEED_STEP

    def share(self, whole: Sequence[object]) -> slice:
        """Which of a step's micro-batches this process computes."""
        return slice(self.rank, len(whole), self.count)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes, the same in all of them."""
        return list(values)

    def any(self, here: bool) -> bool:
        """Whether it is so in one of them."""
        return bool(self.sums([float(here)])[0])

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """The gradients of `parameters` become their sums over all processes; None stays where none has one."""

    def each(self, tensor: Tensor) -> list[Tensor]:
        """What every process has here, of one shape and type."""
        return [tensor]

    def told(self, text: str) -> str:
        """What the first one says."""
        return text

    def check_equal(self, tensors: Sequence[Tensor]) -> None:
        """Raises FituneError where a process has other bits: its results would be lost."""


ALONE = Ranks()


class Processes(Ranks):
    """One of several processes; torch.distributed has been begun."""

    def __init__(self, local_count: int) -> None:
        self.rank = torch.distributed.get_rank()
        self.count = torch.distributed.get_world_size()
        self.local_count = local_count

    def sums(self, values: Sequence[float]) -> list[float]:
        """As of all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(tensor)
        found: list[float] = tensor.tolist()
        return found

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """As of all ranks."""
        has = self.sums([float(parameter.grad is not None) for parameter in parameters])
        used = [parameter for parameter, count in zip(parameters, has, strict=True) if count]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in used if parameter.grad is not None]
        for bucket in _buckets(gradients):
            whole = torch.cat([gradient.flatten() for gradient in bucket])
            torch.distributed.all_reduce(whole)
            for gradient, part in zip(bucket, whole.split([one.numel() for one in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def each(self, tensor: Tensor) -> list[Tensor]:
        """As of all ranks."""
        found = [torch.empty_like(tensor) for _ in range(self.count)]
        torch.distributed.all_gather(found, tensor.contiguous())
        return found

    def told(self, text: str) -> str:
        """As of all ranks."""
        found = [text]
        torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def check_equal(self, tensors: Sequence[Tensor]) -> None:
        """As of all ranks."""
        number = 0
        for tensor in tensors:
            number = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), number)
        found = [int(one) for one in self.each(torch.tensor(number))]
        if len(set(found)) > 1:
            raise FituneError(
                f"the trained weights of process {next(r for r, one in enumerate(found) if one != found[0])} are not "
                "those of process 0: do all of them run on machines of one kind, with the same versions?"
            )


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, of `BUCKET_BYTES` together or a little more."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (
            tensor.dtype != bucket[0].dtype or sum(one.numel() * one.itemsize for one in bucket) >= BUCKET_BYTES
        ):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that this one was started with; itself alone where it was started by itself.

    Raises InputError where the variables that say so cannot be used.
    """
    count = _number("WORLD_SIZE", 1)
    if count <= 1:
        yield ALONE
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise InputError(f"WORLD_SIZE is {count}, but {', '.join(missing)} are not set; start it by torchrun")
    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(_number("LOCAL_WORLD_SIZE", 1))
    finally:
        torch.distributed.destroy_process_group()


def _number(name: str, otherwise: int) -> int:
    said = os.environ.get(name, "").strip()
    if said and not said.isdigit():
        raise InputError(f"{said!r} is no number of processes", where=name)
    return int(said) if said else otherwise

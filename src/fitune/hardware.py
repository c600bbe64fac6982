"""What this machine has: CPU threads and instruction sets, memory, GPUs, disk; container limits included.

Everything is read from files that Linux provides; the functions take their locations, so that recorded ones
from other machines can be read too.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")

# Above this a version 1 memory limit means "none": the kernel writes the largest multiple of its page size.
_NO_LIMIT_BYTES = 1 << 60

_ARM_NAMES = {"asimd": "neon", "asimddp": "dotprod", "asimdhp": "fp16"}


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A GPU. `device` is torch's name for it (`cuda:0`)."""

    device: str
    name: str
    memory_bytes: int
    computes_bfloat16: bool


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a run may use.

    Attributes:
        cpu_model: as the processor calls itself.
        threads: CPU threads that affinity and the container's quota leave to this process; at least 1.
        instruction_sets: as Linux names them: avx2, fma, avx512f, avx512_bf16, avx512_vnni, amx_bf16,
            amx_int8, ...; on ARM neon, bf16, i8mm, sve, ...
        memory_bytes: RAM, or the container's limit where that is lower.
        available_bytes: what can be taken now without swapping, within that limit.
        accelerators: GPUs that torch can compute on.
        limits: container limits that were found, in words, for people.
    """

    cpu_model: str
    threads: int
    instruction_sets: frozenset[str]
    memory_bytes: int
    available_bytes: int
    accelerators: tuple[Accelerator, ...] = ()
    limits: tuple[str, ...] = field(default=())

    def part(self, count: int) -> Hardware:
        """What each of `count` processes has of it, where they share it evenly."""
        return replace(
            self, threads=max(1, self.threads // count), memory_bytes=self.memory_bytes // count,
            available_bytes=self.available_bytes // count,
        )  # fmt: skip

    def disk_free_bytes(self, path: Path) -> int:
        """Bytes this user can still write at `path`, or where it will be made."""
        return disk_free_bytes(path)


def disk_free_bytes(path: Path) -> int:
    """Free bytes on the file system of `path`, or of its nearest parent that exists."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def lies_in_memory(path: Path, proc: Path = PROC) -> bool:
    """Whether the file system of `path` is one that keeps its files in memory (tmpfs, ramfs)."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    found: tuple[int, str] = (-1, "")
    for line in (_read(proc / "self" / "mountinfo") or "").splitlines():
        # man 5 proc_pid_mountinfo: the mount point is the fifth field, the type comes after a lone dash.
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4]))
        if path.resolve().is_relative_to(point):
            found = max(
                (len(point.parts), after.split()[0]), found, key=lambda one: one[0]
            )  # of equal ones the later
    return found[1] in ("tmpfs", "ramfs")


def _read(path: Path) -> str | None:
    """A small file's text; None where there is none, or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def cpu_model(cpuinfo: str) -> str:
    """The processor's name from the text of /proc/cpuinfo."""
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    for name in ("model name", "Model", "Processor", "Hardware", "cpu"):
        if facts.get(name):
            return facts[name]
    if "CPU implementer" in facts:
        return f"ARM, implementer {facts['CPU implementer']}, part {facts.get('CPU part', 'unknown')}"
    return "unknown"


def instruction_sets(cpuinfo: str) -> frozenset[str]:
    """The CPU features that every core has, from the text of /proc/cpuinfo (x86 `flags`, ARM `Features`)."""
    cores = [
        {_ARM_NAMES.get(name, name) for name in line.partition(":")[2].split()}
        for line in cpuinfo.splitlines()
        if line.partition(":")[0].strip() in ("flags", "Features")
    ]
    return frozenset(set.intersection(*cores)) if cores else frozenset()


def memory_from(meminfo: str) -> tuple[int, int]:
    """RAM and available bytes from the text of /proc/meminfo."""
    facts = {}
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit():
            facts[name] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    total = facts.get("MemTotal", 0)
    older = facts.get("MemFree", 0) + facts.get("Cached", 0) + facts.get("Buffers", 0)
    return total, facts.get("MemAvailable", older)  # kernels before 3.14 have no MemAvailable


def cgroup_folders(proc: Path, cgroups: Path, controller: str) -> list[Path]:
    """The folders whose `controller` limits hold for this process: its own group first, then its parents.

    Inside a container /proc/self/cgroup may name a path that is not visible there; its visible parents,
    the mount's root at least, are taken.
    """
    folders: list[Path] = []
    for line in (_read(proc / "self" / "cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            roots = [cgroups, cgroups / "unified"]
        elif controller in controllers.split(","):
            roots = [cgroups / controllers, cgroups / controller]
        else:
            continue
        for root in roots:
            if root.is_dir():
                at = Path(os.path.normpath("/" + group.lstrip("/")))
                folders += [folder for part in (at, *at.parents) if (folder := root / str(part)[1:]).is_dir()]
    return list(dict.fromkeys(folders))


def cpu_quota(proc: Path = PROC, cgroups: Path = CGROUPS) -> float | None:
    """CPUs' worth of time that the container may use (the tightest of its groups); None: no limit."""
    quotas: list[float] = []
    for folder in cgroup_folders(proc, cgroups, "cpu"):
        words = (_read(folder / "cpu.max") or "").split()  # version 2: "max 100000" or "150000 100000"
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and period and quota > 0:  # version 1: -1 is no limit
            quotas.append(quota / period)
    return min(quotas, default=None)


def _number(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.removeprefix("-").isdigit() else None


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A group's memory limit, and how much of it cannot be given back without swapping."""

    limit_bytes: int
    used_bytes: int


def memory_limits(proc: Path = PROC, cgroups: Path = CGROUPS) -> list[MemoryLimit]:
    """The container's memory limits, its own group's first; droppable file cache does not count as used."""
    limits: list[MemoryLimit] = []
    for folder in cgroup_folders(proc, cgroups, "memory"):
        for limit_name, usage_name, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.high", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            limit = _number(folder / limit_name)  # "max" is no number: no limit
            if limit is None or not 0 <= limit < _NO_LIMIT_BYTES:
                continue
            counts = dict(line.split()[:2] for line in (_read(folder / "memory.stat") or "").splitlines())
            # The kernel counts both lists into MemAvailable, and a mapped file that is in use is on the active one.
            cache = sum(int(counts.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))
            used = (_number(folder / usage_name) or 0) - cache
            limits.append(MemoryLimit(limit, max(0, used)))
    return limits


def memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> tuple[int, int]:
    """RAM, or the container's limit where that is lower, and what of it can be taken now without swapping."""
    total, available = memory_from(_read(proc / "meminfo") or "")
    for limit in memory_limits(proc, cgroups):
        total = min(total or limit.limit_bytes, limit.limit_bytes)
        room = max(0, limit.limit_bytes - limit.used_bytes)
        available = min(available, room) if available else room
    return total, min(available, total)


def allowed_threads(affinity: int, quota: float | None) -> int:
    """Threads to run: no more than the CPUs this process may use, nor than its quota, rounded up."""
    return max(1, affinity if quota is None else min(affinity, math.ceil(quota)))


def _affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on every system
        return os.cpu_count() or 1


def accelerators() -> tuple[Accelerator, ...]:
    """The GPUs torch can compute on; none where torch is not installed. Imports torch."""
    if importlib.util.find_spec("torch") is None:
        return ()
    import torch

    found: list[Accelerator] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            # bfloat16 tensor cores came with compute capability 8.0 (Ampere).
            found.append(
                Accelerator(f"cuda:{index}", properties.name, properties.total_memory, properties.major >= 8)
            )
    return tuple(found)


def detect(proc: Path = PROC, cgroups: Path = CGROUPS, *, with_accelerators: bool = True) -> Hardware:
    """This machine, as far as this process may use it. `with_accelerators=False` does not import torch."""
    cpuinfo = _read(proc / "cpuinfo") or ""
    quota = cpu_quota(proc, cgroups)
    affinity = _affinity()
    unlimited, _ = memory_from(_read(proc / "meminfo") or "")
    total, available = memory(proc, cgroups)
    words: list[str] = []
    if quota is not None:
        words.append(f"CPU quota of {quota:g} of {affinity} CPUs")
    for limit in memory_limits(proc, cgroups):
        if unlimited and limit.limit_bytes < unlimited:
            words.append(f"memory limit of {limit.limit_bytes / 1e9:.1f} GB")
    return Hardware(
        cpu_model=cpu_model(cpuinfo),
        threads=allowed_threads(affinity, quota),
        instruction_sets=instruction_sets(cpuinfo),
        memory_bytes=total,
        available_bytes=available,
        accelerators=accelerators() if with_accelerators else (),
        limits=tuple(dict.fromkeys(words)),
    )

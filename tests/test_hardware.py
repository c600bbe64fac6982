"""What a machine has, read from the files of this one and from recorded files of others."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from fitune import hardware

# Recorded: an AMD server, an ARM server (AWS Graviton2), a Raspberry Pi 3 with a 32-bit system; shortened.
AMD = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9755 128-Core Processor
flags\t\t: fpu sse2 fma f16c avx avx2 avx512f avx512bw avx512_bf16 avx512_vnni
bugs\t\t: sysret_ss_attrs

processor\t: 1
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9755 128-Core Processor
flags\t\t: fpu sse2 fma f16c avx avx2 avx512f avx512bw avx512_bf16 avx512_vnni
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes pmull sha1 sha2 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""
PI = """processor\t: 0
model name\t: ARMv7 Processor rev 4 (v7l)
BogoMIPS\t: 38.40
Features\t: half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm crc32

Hardware\t: BCM2835
Model\t\t: Raspberry Pi 3 Model B Rev 1.2
"""
MEMINFO = """MemTotal:       16384000 kB
MemFree:         1000000 kB
MemAvailable:    8192000 kB
Buffers:          100000 kB
Cached:          7000000 kB
HugePages_Total:       0
"""


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    root.mkdir(exist_ok=True)
    return root


@pytest.mark.parametrize(
    ("cpuinfo", "model", "has", "has_not"),
    [
        (
            AMD,
            "AMD EPYC 9755 128-Core Processor",
            {"avx2", "fma", "avx512_bf16", "avx512_vnni"},
            {"amx_bf16", "neon"},
        ),
        (
            GRAVITON,
            "ARM, implementer 0x41, part 0xd0c",
            {"neon", "dotprod", "fp16"},
            {"bf16", "avx2", "asimd"},
        ),
        (PI, "ARMv7 Processor rev 4 (v7l)", {"neon"}, {"dotprod"}),
        ("", "unknown", set(), {"avx2"}),
    ],
)
def test_processors(cpuinfo: str, model: str, has: set[str], has_not: set[str]) -> None:
    assert hardware.cpu_model(cpuinfo) == model
    found = hardware.instruction_sets(cpuinfo)
    assert has <= found
    assert not has_not & found


def test_only_what_every_core_has_counts() -> None:
    """Hybrid processors exist; a thread may run on any core."""
    mixed = AMD.replace(" avx512f", "", 1)
    assert "avx512f" not in hardware.instruction_sets(mixed)
    assert "avx2" in hardware.instruction_sets(mixed)


def test_meminfo() -> None:
    assert hardware.memory_from(MEMINFO) == (16384000 * 1024, 8192000 * 1024)
    without = "\n".join(line for line in MEMINFO.splitlines() if "MemAvailable" not in line)
    assert hardware.memory_from(without) == (16384000 * 1024, 8100000 * 1024)
    assert hardware.memory_from("") == (0, 0)


VERSION_2 = {"self/cgroup": "0::/kubepods/pod1/box\n"}
VERSION_1 = {"self/cgroup": "12:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n0::/x\n"}


@pytest.mark.parametrize(
    ("proc", "cgroups", "quota"),
    [
        (VERSION_2, {"kubepods/pod1/box/cpu.max": "150000 100000\n"}, 1.5),
        (VERSION_2, {"kubepods/pod1/box/cpu.max": "max 100000\n"}, None),
        # A parent's quota holds for its children.
        (VERSION_2, {"kubepods/pod1/box/cpu.max": "400000 100000", "kubepods/cpu.max": "50000 100000"}, 0.5),
        # In a container the own group is what is mounted at the root.
        (VERSION_2, {"cpu.max": "300000 100000\n"}, 3.0),
        ({"self/cgroup": "0::/../../box\n"}, {"box/cpu.max": "200000 100000\n"}, 2.0),
        (
            VERSION_1,
            {
                "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (VERSION_1, {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        (VERSION_1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        (VERSION_1, {"unified/cpu.max": "100000 100000\n"}, 1.0),
        ({}, {"cpu.max": "100000 100000\n"}, None),
        (VERSION_2, {"cpu.max": "nonsense\n"}, None),
    ],
)
def test_cpu_quotas(tmp_path: Path, proc: dict, cgroups: dict, quota: float | None) -> None:
    found = hardware.cpu_quota(make(tmp_path / "proc", proc), make(tmp_path / "cgroup", cgroups))
    assert found == quota


@pytest.mark.parametrize(
    ("affinity", "quota", "threads"),
    [(8, None, 8), (8, 1.5, 2), (8, 0.1, 1), (2, 16.0, 2), (8, 3.0, 3), (1, 0.5, 1)],
)
def test_threads(affinity: int, quota: float | None, threads: int) -> None:
    assert hardware.allowed_threads(affinity, quota) == threads


@pytest.mark.parametrize(
    ("proc", "cgroups", "memory", "available"),
    [
        (VERSION_2, {"kubepods/pod1/box/memory.max": "max\n"}, 16384000 * 1024, 8192000 * 1024),
        (
            VERSION_2,
            {
                "kubepods/pod1/box/memory.max": "4000000000\n",
                "kubepods/pod1/box/memory.current": "3000000000\n",
                "kubepods/pod1/box/memory.stat": "anon 1\ninactive_file 2000000000\nactive_file 500000000\n",
            },
            4_000_000_000,
            3_500_000_000,
        ),
        (
            VERSION_2,
            {
                "kubepods/memory.max": "2000000000\n",
                "kubepods/memory.current": "500000000\n",
                "kubepods/pod1/box/memory.max": "4000000000\n",
            },
            2_000_000_000,
            1_500_000_000,
        ),
        (
            VERSION_1,
            {
                "memory/memory.limit_in_bytes": "1000000000\n",
                "memory/memory.usage_in_bytes": "900000000\n",
                "memory/memory.stat": "active_file 9\ntotal_active_file 40000000\ntotal_inactive_file 60000000\n",
            },
            1_000_000_000,
            200_000_000,
        ),
        (
            VERSION_1,
            {"memory/memory.limit_in_bytes": "9223372036854771712\n"},
            16384000 * 1024,
            8192000 * 1024,
        ),
    ],
)
def test_memory_within_a_container(tmp_path: Path, proc: dict, cgroups: dict, memory: int, available: int) -> None:
    proc_root = make(tmp_path / "proc", {**proc, "meminfo": MEMINFO, "cpuinfo": AMD})
    found = hardware.detect(proc_root, make(tmp_path / "cgroup", cgroups), with_accelerators=False)
    assert (found.memory_bytes, found.available_bytes) == (memory, available)
    assert bool(found.limits) == (memory < 16384000 * 1024)
    assert found.cpu_model.startswith("AMD EPYC")


def test_no_limit_is_no_limit_where_nothing_else_is_known(tmp_path: Path) -> None:
    proc = make(tmp_path / "proc", VERSION_1)
    cgroups = make(tmp_path / "cgroup", {"memory/memory.limit_in_bytes": "9223372036854771712\n"})
    found = hardware.detect(proc, cgroups, with_accelerators=False)
    assert (found.memory_bytes, found.available_bytes, found.limits) == (0, 0, ())


def test_this_machine() -> None:
    found = hardware.detect(with_accelerators=False)
    assert 1 <= found.threads <= len(os.sched_getaffinity(0))
    assert 0 < found.available_bytes <= found.memory_bytes <= psutil.virtual_memory().total
    assert found.instruction_sets
    assert found.cpu_model != "unknown"


def test_affinity_is_followed() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert hardware.detect(with_accelerators=False).threads == 1
    finally:
        os.sched_setaffinity(0, before)


def test_free_disk(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = hardware.disk_free_bytes(tmp_path / "not" / "made" / "yet")
    assert free == pytest.approx(status.f_bavail * status.f_frsize, rel=0.05)
    found = hardware.detect(with_accelerators=False)
    assert found.disk_free_bytes(tmp_path) == pytest.approx(free, rel=0.05)


def test_accelerators_are_those_of_torch() -> None:
    import torch

    found = hardware.accelerators()
    assert len(found) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for index, gpu in enumerate(found):
        assert gpu.device == f"cuda:{index}"
        assert gpu.memory_bytes > 0


def test_file_systems_that_lie_in_memory(tmp_path: Path) -> None:
    """Lines of /proc/self/mountinfo: the longest mount point above a path counts, the last of equal ones."""
    here = tmp_path / "with space" / "runs"
    here.mkdir(parents=True)
    escaped = str(tmp_path / "with space").replace(" ", "\\040")
    lines = ["22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw"]
    (tmp_path / "self").mkdir()

    def found(path: Path, *more: str) -> bool:
        (tmp_path / "self" / "mountinfo").write_text("\n".join([*lines, *more]) + "\n")
        return hardware.lies_in_memory(path, tmp_path)

    assert not found(here)
    memory = f"40 22 0:41 / {escaped} rw - tmpfs tmpfs rw,size=1g"
    assert found(here / "not-made-yet", memory)
    assert not found(tmp_path, memory)
    assert not found(here, memory, f"41 40 8:1 / {escaped} rw shared:2 master:1 - xfs /dev/sda rw")
    assert not hardware.lies_in_memory(here, tmp_path / "nothing")

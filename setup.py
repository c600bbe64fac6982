"""Builds the native kernels as one shared library with a C interface.

Plain setuptools: the only thing a machine needs is a C++ compiler, and without one the package still installs
and runs on the torch reference (`fitune doctor` says so).
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
COMPILE = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
           "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]  # fmt: skip
# The element-wise kernels round after every operation, as the reference does (NF4's scales must have its very
# bits); attention's products may contract a multiplication and an addition into one.
EXACT, CONTRACT = ["-ffp-contract=off"], ["-ffp-contract=fast"]
# One object per instruction set, compiled with its own flags and nothing more (a machine may lack the rest).
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
SETS = {
    "x86_64": {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": AVX512_BF16,
        "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
    },
    "aarch64": {"neon": []},
}
# Sets that older compilers do not know (GCC before 10 and 11): left out where that is so.
YOUNG = ("avx512_bf16", "amx")


def understands(compiler: list[str], flags: list[str], build: Path) -> bool:
    """Whether the compiler takes these flags."""
    probe = build / "probe.cpp"
    probe.write_text("int probe() { return 0; }\n")
    command = [*compiler, *flags, "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class BuildKernels(build_ext):
    """Compiles csrc/ with $CXX (or c++) and puts libfitune_kernels.so beside the binding."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            self.compile_library(target)
        except (OSError, subprocess.CalledProcessError) as error:
            print(
                f"fitune: the native kernels were not built ({error}); the package runs on torch alone, slower. "
                "Install a C++ compiler and install again.",
                file=sys.stderr,
            )

    def compile_library(self, target: Path) -> None:
        compiler = os.environ.get("CXX", "c++").split()
        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        extra = os.environ.get("FITUNE_CXXFLAGS", "").split()
        machine = "aarch64" if platform.machine() == "arm64" else platform.machine()
        sets = dict(SETS.get(machine, {}))
        for name in YOUNG:
            if name in sets and not understands(compiler, sets[name], build):
                print(f"fitune: this compiler does not know {name}; its kernels are left out", file=sys.stderr)
                del sets[name]
        known = [f"-DFITUNE_HAS_{name.upper()}" for name in YOUNG if name in sets]
        units = {"dispatch": known, "decode_layer": [], "kernels_scalar": EXACT, "attention_scalar": CONTRACT}
        for name, flags in sets.items():
            units[f"kernels_{name}"] = [*flags, *EXACT]
            units[f"attention_{name}"] = [*flags, *CONTRACT]
            if name in YOUNG:  # those that have dot products of bfloat16
                units[f"product_{name}"] = [*flags, *EXACT]

        def compile_unit(unit: str) -> str:
            made = str(build / f"{unit}.o")
            source = str(HERE / "csrc" / f"{unit}.cpp")
            subprocess.run([*compiler, *COMPILE, *units[unit], *extra, "-c", source, "-o", made], check=True)
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run([*compiler, "-shared", "-fopenmp", *extra, *objects, "-o", str(beside)], check=True)
        beside.replace(target)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


setup(
    ext_modules=[
        Extension(
            "fitune.kernels.libfitune_kernels",
            sources=[],
            depends=[str(path) for path in sorted((HERE / "csrc").glob("*"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)

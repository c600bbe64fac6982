"""Builds the native kernels as one shared library with a C interface.

Plain setuptools: the only thing a machine needs is a C++ compiler, and without one the package still installs
and runs on the torch reference (`fitune doctor` says so).
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
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
SETS = {
    "x86_64": {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
                   "-mprefer-vector-width=512"],
    },
    "aarch64": {"neon": []},
}  # fmt: skip


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
        units = {"dispatch": [], "kernels_scalar": EXACT, "attention_scalar": CONTRACT}
        machine = "aarch64" if platform.machine() == "arm64" else platform.machine()
        for name, flags in SETS.get(machine, {}).items():
            units[f"kernels_{name}"] = [*flags, *EXACT]
            units[f"attention_{name}"] = [*flags, *CONTRACT]
        extra = os.environ.get("FITUNE_CXXFLAGS", "").split()
        objects = []
        for unit, flags in units.items():
            objects.append(str(build / f"{unit}.o"))
            subprocess.run(
                [*compiler, *COMPILE, *flags, *extra, "-c", str(HERE / "csrc" / f"{unit}.cpp"), "-o", objects[-1]],
                check=True,
            )
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

"""The kernels on processors that this machine is not: AVX2 without AVX-512, x86-64 without AVX, and AArch64.

qemu runs each instruction of the other processor. On x86-64 that is the installed library itself, with Python and
torch: `fitune doctor` must choose the set that is expected, and some of tests/kernels must pass; then the stand-alone
driver (tests/kernels/native_driver*.cpp), which checks every kernel. For AArch64 both are cross-compiled
by the recipe of setup.py.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = REPOSITORY / "build" / "emulated"
LIBRARY = Path("fitune") / "kernels" / "libfitune_kernels.so"
CROSS = "aarch64-linux-gnu-g++"
NEEDED = {"qemu-x86_64": "qemu-user", "qemu-aarch64": "qemu-user", CROSS: "g++-aarch64-linux-gnu"}
# Every kernel in Python too, and what is about dtypes, addresses and threads, in some minutes of emulation.
TESTS = [
    "tests/kernels/test_native.py::test_results_are_the_same_from_run_to_run_and_for_any_thread_count",
    "tests/kernels/test_native.py::test_rms_norm_backward_is_the_gradient",
    "tests/kernels/test_native.py::test_gated_activation_is_torchs_own",
    "tests/kernels/test_native.py::test_token_logprob_gradient_is_autograds",
    "tests/kernels/test_native.py::test_what_is_not_finite_stays_where_the_reference_has_it",
    "tests/kernels/test_native.py::test_exponential_is_exact_to_rounding_over_its_range",
    "tests/kernels/test_native.py::test_native_code_refuses_what_it_would_misread",
    "tests/kernels/test_native.py::test_nf4_quantise_has_the_bits_of_the_reference",
    "tests/kernels/test_native.py::test_nf4_dequantise_has_the_bits_of_the_reference",
    "tests/kernels/test_native.py::test_rotate",
    "tests/kernels/test_attention.py::test_a_window_shifted_by_one_is_another_result",
    "tests/kernels/test_attention.py::test_strided_inputs_and_lse",
    "tests/kernels/test_attention.py::test_thread_counts_change_nothing_forward_and_only_rounding_backward",
    "tests/kernels/test_attention.py::test_what_is_not_a_number_stays_in_its_document",
    "tests/kernels/test_products_reference.py::test_the_operators_are_the_gradients_of_a_linear_layer_with_its_adapter",
]
# qemu 7.2 reads 16 bytes for the 4 of a scalar multiply-add from memory (vfmadd231ss), so past an operand's end; the
# processor itself does not, which `make test` sees on any x86-64.
MARGIN = "16"
X86 = {"Haswell": "avx2", "Nehalem": "scalar"}  # model -> the set that it must choose
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def run(command: list[str], **more: str) -> str:
    """Its standard output; ends this script where it failed."""
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**ENVIRONMENT, **more}, text=True, capture_output=True, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}\n{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def build(folder: Path, compiler: str, machine: str) -> Path:
    """The library and the driver for a machine; returns the driver."""
    library = folder / LIBRARY
    library.unlink(missing_ok=True)
    # setup.py asks `platform` which machine it builds for
    recipe = (
        f"import platform, runpy, sys; platform.machine = lambda: {machine!r}; "
        "sys.argv = sys.argv[1:]; runpy.run_path('setup.py')"
    )
    run([sys.executable, "-c", recipe, "setup.py", "-q", "build_ext", f"--build-lib={folder}",
         f"--build-temp={folder / 'objects'}"], CXX=compiler)  # fmt: skip
    if not library.is_file():
        sys.exit(f"the library for {machine} was not built")
    return build_driver(folder, compiler, library)


def build_driver(folder: Path, compiler: str, library: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(str(path) for path in (REPOSITORY / "tests" / "kernels").glob("native_driver*.cpp"))
    driver = folder / "native_driver"
    run([*compiler.split(), "-std=c++17", "-O1", "-ffp-contract=off", f"-I{REPOSITORY / 'csrc'}", *sources,
         "-o", str(driver), str(library)])  # fmt: skip
    return driver


def emulate_x86(model: str, expected: str, driver: Path) -> None:
    emulator = ["qemu-x86_64", "-cpu", model]
    python = [*emulator, sys.executable]
    kernels = json.loads(run([*python, "-m", "fitune", "doctor", "--json"]))["kernels"]
    print(f"{model}: fitune doctor: {kernels['instruction_set']}, {kernels['reason']}", flush=True)
    if kernels["instruction_set"] != expected:
        sys.exit(f"{model} should have chosen {expected}")
    print(run([*emulator, str(driver), "--margin", MARGIN]), end="", flush=True)
    if expected != "scalar":  # the driver has said it, and torch is slower still
        # a test that starts a process would have it run on this machine's own processor
        options = ["-p", "no:cacheprovider", "--timeout=0", "-k", "not instruction_set and not fake"]
        print(run([*python, "-m", "pytest", *options, *(sys.argv[1:] or TESTS)]), flush=True)


def main() -> None:
    missing = sorted({package for tool, package in NEEDED.items() if shutil.which(tool) is None})
    if missing:
        sys.exit(f"emulation needs {' and '.join(missing)}: apt-get install {' '.join(missing)}")
    if platform.machine() != "x86_64":
        sys.exit("this script emulates from an x86-64 machine")
    started = time.monotonic()
    driver = build(BUILD / "aarch64", CROSS, "aarch64")
    print(run(["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", str(driver)]), end="", flush=True)
    status = run([sys.executable, "-c", "from fitune.kernels import native; print(native.status().path or '')"])
    if not status.strip():
        sys.exit("the native kernels are not built here; install fitune with a C++ compiler first")
    driver = build_driver(BUILD / "x86_64", os.environ.get("CXX", "c++"), Path(status.strip()))
    for model, expected in X86.items():
        emulate_x86(model, expected, driver)
    print(f"every emulated processor is right; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

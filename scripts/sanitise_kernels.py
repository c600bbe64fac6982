"""The kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer, in every instruction set of this machine.

Builds csrc into build/sanitised, beside the library that fitune uses and never over it, shows that both sanitisers
see an error when there is one, and runs the stand-alone driver and the kernels' tests with that library. Ends at the
first finding, with its report. Tests of torch's registration and of fake tensors (schema, fake) and those that start
other instruction sets are left out: no kernel of ours runs in the former, and this script does the latter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = REPOSITORY / "build" / "sanitised"
LIBRARY = BUILD / "fitune" / "kernels" / "libfitune_kernels.so"
DRIVER = BUILD / "native_driver"
SANITISE = (
    "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1 -w"
)
TESTS = ("tests/kernels", "tests/fuse/test_layer_step.py")  # the latter for the whole layer of generation
LEFT_OUT = "not instruction_set and not fake and not schema"
COMPILER = os.environ.get("CXX", "g++").split()

# What must be found: a weight shorter than it is said to be, and a size that overflows.
PROBE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
if sys.argv[2] == "address":
    library.fitune_kernels.restype = ctypes.POINTER(ctypes.c_void_p)
    quantise = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p,
                                        ctypes.c_void_p, ctypes.c_int])(library.fitune_kernels(b"scalar")[1])
    n = 6400
    weight, codes, absmax = (ctypes.c_float * (n - 1))(), (ctypes.c_uint8 * n)(), (ctypes.c_float * n)()
    quantise(ctypes.addressof(weight), 0, n, ctypes.addressof(codes), ctypes.addressof(absmax), 1)
elif sys.argv[2] == "undefined":
    library.fitune_attention_floats.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    library.fitune_attention_floats(2**60, 2**20, 0)
else:
    library.fitune_available.restype = ctypes.c_char_p
    print(library.fitune_available().decode())
"""


def environment(**more: str) -> dict[str, str]:
    """In which Python can load the sanitised library. Leaks are not looked for: Python frees little at its end."""
    # C++'s own library too: else the sanitiser, which is ready before torch brings it, finds no `throw` in it.
    paths = []
    for name in ("libstdc++.so", "libasan.so"):
        found = subprocess.run([*COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        paths.append(found.stdout.strip())
    if not Path(paths[1]).is_absolute():
        sys.exit(f"{COMPILER[0]} has no libasan.so: install GCC with its sanitisers (Debian: g++), or set CXX=g++")
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(reversed(paths)),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:abort_on_error=1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "FITUNE_KERNELS_LIBRARY": str(LIBRARY),
        **more,
    }


def build() -> None:
    LIBRARY.unlink(missing_ok=True)
    extra = f"{SANITISE} {os.environ.get('FITUNE_CXXFLAGS', '')}"
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={BUILD}", f"--build-temp={BUILD / 'objects'}"],
        cwd=REPOSITORY, env={**os.environ, "CXX": " ".join(COMPILER), "FITUNE_CXXFLAGS": extra}, check=True,
    )  # fmt: skip
    if not LIBRARY.is_file():
        sys.exit("the sanitised library was not built")
    sources = sorted(str(path) for path in (REPOSITORY / "tests" / "kernels").glob("native_driver*.cpp"))
    subprocess.run(
        [*COMPILER, "-std=c++17", "-ffp-contract=off", *SANITISE.split(), f"-I{REPOSITORY / 'csrc'}", *sources,
         "-o", str(DRIVER), str(LIBRARY)],
        check=True,
    )  # fmt: skip


def probe(what: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE, str(LIBRARY), what], env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def main() -> None:
    started = time.monotonic()
    build()
    print(f"built {LIBRARY.relative_to(REPOSITORY)} in {time.monotonic() - started:.0f} s", flush=True)
    for what, message in (("address", "heap-buffer-overflow"), ("undefined", "signed integer overflow")):
        if message not in (found := probe(what)).stderr:
            sys.exit(f"the {what} sanitiser did not see the error made for it:\n{found.stderr[-2000:]}")
    sets = probe("sets").stdout.split()
    alone = {key: value for key, value in environment().items() if key != "LD_PRELOAD"}
    subprocess.run([str(DRIVER)], env=alone, check=True)
    for name in sets:
        print(f"{name}:", flush=True)
        command = [sys.executable, "-m", "pytest", "--capture=sys", "-p", "no:cacheprovider", "-k", LEFT_OUT]
        done = subprocess.run(
            [*command, *TESTS, *sys.argv[1:]], cwd=REPOSITORY,
            env=environment(FITUNE_INSTRUCTION_SET=name), check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{name}: the tests ended with {done.returncode}")
    print(f"no findings in {', '.join(sets)}; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

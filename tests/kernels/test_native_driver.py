"""The stand-alone driver (native_driver*.cpp) on this machine: that it passes, and that it can fail.

It checks every kernel of every instruction set against plain loops in double precision, with one, two and three
threads, at any address, and between pages that cannot be touched. `make emulate` runs it on other processors.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from instruction_sets import available_sets

from fitune.kernels import native

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("native_driver*.cpp"))
COMPILER = os.environ.get("CXX", "c++").split()
pytestmark = [
    pytest.mark.skipif(not native.status().available, reason=native.status().reason),
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"there is no C++ compiler {COMPILER[0]}"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("driver") / "native_driver"
    library = native.status().path
    assert library is not None
    command = [*COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    paths = [f"-I{HERE.parent.parent / 'csrc'}", *map(str, SOURCES), "-o", str(made), library]
    done = subprocess.run([*command, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made


def run(driver: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # threads that wait actively would take the processor from those that work, of which there are more than cores
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    return subprocess.run([str(driver), *words], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", available_sets())
def test_every_kernel_is_right(driver: Path, name: str) -> None:
    done = run(driver, name)
    assert done.returncode == 0, done.stdout
    assert f"{name}: " in done.stdout
    assert " 0 failures" in done.stdout


KERNELS = [
    "nf4_quantise", "nf4_dequantise", "rms_norm", "rms_norm_backward", "gated_activation",
    "gated_activation_backward",
    "token_logprob", "rotate", "add_scaled", "adamw8bit", "attention", "attention_backward", "slot_attention",
]  # fmt: skip
PRODUCTS = [
    "product_forward", "product_backward", "adapter_gradients", "int8_row_scales", "int8_outlier_columns",
    "int8_forward", "int8_backward",
]  # fmt: skip


# Each is a run of the driver: the first of them always, the others with the slow tests.
def first_quick(names: list[str]) -> list[object]:
    return [names[0], *(pytest.param(name, marks=pytest.mark.slow) for name in names[1:])]


@pytest.mark.parametrize("kernel", first_quick(KERNELS))
def test_a_wrong_expectation_of_a_kernel_is_noticed(driver: Path, kernel: str) -> None:
    done = run(driver, "--mutate", kernel, "scalar")
    assert done.returncode == 1, done.stdout
    assert f"scalar, {kernel}: " in done.stdout
    assert not any(f"scalar, {other}: " in done.stdout for other in KERNELS if other != kernel)


@pytest.mark.parametrize("product", first_quick(PRODUCTS))
def test_a_wrong_expectation_of_a_product_is_noticed(driver: Path, product: str) -> None:
    with_products = [name for name in available_sets() if name in ("amx", "avx512_bf16")]
    if not with_products:
        pytest.skip(f"no instruction set with products: {available_sets()}")
    done = run(driver, "--mutate", product, with_products[0])
    assert done.returncode == 1, done.stdout
    assert f"{with_products[0]}, {product}: " in done.stdout


def test_other_bits_from_one_call_to_the_next_are_noticed(driver: Path) -> None:
    done = run(driver, "--mutate", "bits", "scalar")
    assert done.returncode == 1
    assert "other bits with 2 threads" in done.stdout


def test_a_kernel_that_leaves_its_buffers_is_noticed(driver: Path) -> None:
    done = run(driver, "--mutate", "memory", "scalar")
    assert done.returncode == 3
    assert "scalar, rms_norm: touched memory that is not its own" in done.stdout


def test_a_set_that_cannot_run_here_is_refused(driver: Path) -> None:
    done = run(driver, "sse9")
    assert done.returncode == 2
    assert "sse9 cannot run here; these can: " in done.stdout


def status_with(library: str) -> str:
    script = "from fitune.kernels import native; print(native.status())"
    return subprocess.run([sys.executable, "-c", script], env={**os.environ, "FITUNE_KERNELS_LIBRARY": library},
                          capture_output=True, text=True, check=True).stdout  # fmt: skip


def test_another_library_is_taken_where_the_environment_names_one(tmp_path: Path) -> None:
    library = native.status().path
    assert library is not None
    copy = shutil.copy(library, tmp_path / "other.so")
    found = status_with(str(copy))
    assert "available=True" in found
    assert "from the library that FITUNE_KERNELS_LIBRARY names" in found
    assert f"path='{copy}'" in found
    for wrong in (str(tmp_path), ""):
        found = status_with(wrong)
        assert "available=False" in found
        assert f"FITUNE_KERNELS_LIBRARY={wrong} is not a file" in found
    text = tmp_path / "text.so"
    text.write_text("no library")
    assert "cannot be loaded" in status_with(str(text))

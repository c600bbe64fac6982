"""Which torch set-up takes: judged by pip's own report, recorded for both kinds of registry and shortened."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_torch", ROOT / "scripts" / "install_torch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(*packages: tuple[str, str], url: str = "file:///nowhere") -> dict:
    return {
        "version": "1",
        "install": [
            {"metadata": {"name": name, "version": version}, "download_info": {"url": url}}
            for name, version in packages
        ],
    }


@pytest.mark.parametrize(
    ("packages", "is_cpu"),
    [
        ([("torch", "2.13.0+cpu"), ("filelock", "4.2.11")], True),
        ([("torch", "2.13.0"), ("filelock", "4.2.11")], True),  # macOS, and ARM without CUDA
        ([("torch", "2.13.0"), ("nvidia-cublas-cu12", "12.8.4.1"), ("triton", "3.4.0")], False),
        ([("torch", "2.13.0"), ("cuda-bindings", "13.0.3")], False),
        ([("filelock", "4.2.11")], False),
    ],
)
def test_a_cpu_build_is_known_by_what_it_brings(script: ModuleType, packages: list, is_cpu: bool) -> None:
    assert script.is_cpu_build(report(*packages)) is is_cpu


def test_the_pin_is_read_from_the_requirements(script: ModuleType) -> None:
    assert script.torch_pin("numpy==2.4.6\ntorch==2.13.0  # any build\ntorchao==1\n") == "2.13.0"
    assert script.torch_pin("torch == 2.13.0+cpu") == "2.13.0"
    with pytest.raises(SystemExit, match="do not pin torch"):
        script.torch_pin("torch>=2.6\npytorch==1.0\n")


def test_the_size_is_said_where_it_is_known(script: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "torch 2.whl"
    with wheel.open("wb") as file:
        file.truncate(150_000_000)  # holes take no room
    assert script.download_in_words(report(("torch", "2"), ("x", "1"), url=wheel.as_uri())) == "0.3 GB"
    assert script.download_in_words(report(("torch", "2"))) == "about 3 GB"
    assert script.download_in_words(None) == "about 3 GB"


def test_an_installed_torch_is_kept(script: ModuleType) -> None:
    import torch

    assert script.installed(torch.__version__.partition("+")[0]) == torch.__version__
    assert script.installed("0.0.1") is None

"""Installs the pinned torch: its CPU build where there is no NVIDIA GPU and one is on offer.

    python scripts/install_torch.py requirements/runtime.txt [auto|cpu|default]

The default build carries several gigabytes of CUDA libraries that a machine without a GPU cannot use. pip is
asked what the pinned version would bring; where that is not a CPU build, PyTorch's own CPU index is asked;
where that cannot be reached either, the default build is installed, and its size is said beforehand.
Only the standard library is used: this runs before anything is installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
Report = dict[str, Any]


def torch_pin(requirements: str) -> str:
    """The version that a requirements file pins torch to, without a local part such as +cpu."""
    match = re.search(r"^torch\s*==\s*([0-9][0-9A-Za-z.]*)", requirements, re.MULTILINE)
    if match is None:
        raise SystemExit("install_torch: the requirements do not pin torch as torch==VERSION")
    return match[1]


def is_cpu_build(report: Report) -> bool:
    """Whether what pip would install brings no CUDA libraries."""
    names = {entry["metadata"]["name"].lower(): entry["metadata"]["version"] for entry in report["install"]}
    if names.get("torch", "").endswith("+cpu"):
        return True
    return "torch" in names and not any(name.startswith(("nvidia-", "nvidia_", "cuda-")) for name in names)


def ask_pip(version: str, *options: str) -> Report | None:
    """What pip would install for this torch; None where pip cannot tell."""
    command = [*PIP, "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", *options]
    asked = subprocess.run([*command, f"torch=={version}"], capture_output=True, text=True, check=False)
    if asked.returncode:
        return None
    try:
        return json.loads(asked.stdout)
    except ValueError:
        return None


def size_bytes(url: str) -> int | None:
    """The size of one download, without downloading it."""
    try:
        if url.startswith("file:"):
            return os.stat(urllib.request.url2pathname(urllib.parse.urlsplit(url).path)).st_size
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=15) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, TypeError, ValueError):
        return None


def download_in_words(report: Report | None) -> str:
    """`2.9 GB`, or `about 3 GB` where sizes are not told."""
    sizes = [size_bytes(entry["download_info"]["url"]) for entry in report["install"]] if report else [None]
    if None in sizes:
        return "about 3 GB"
    return f"{sum(size for size in sizes if size is not None) / 1e9:.1f} GB"


def has_nvidia_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def installed(version: str) -> str | None:
    """The torch that is there already, if it is this version in any build."""
    try:
        found = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None
    return found if found.partition("+")[0] == version else None


def install(version: str, *options: str) -> None:
    subprocess.run([*PIP, "install", *options, f"torch=={version}"], check=True)


def main(requirements: str, build: str = "auto") -> None:
    if build not in ("auto", "cpu", "default"):
        raise SystemExit(f"install_torch: the build must be auto, cpu or default, not {build}")
    version = torch_pin(Path(requirements).read_text(encoding="utf-8"))
    found = installed(version)
    if found is not None:
        print(f"torch {found} is installed")
        return
    default = ask_pip(version)
    wants_cpu = build == "cpu" or (build == "auto" and not has_nvidia_gpu())
    if default is not None and is_cpu_build(default):
        print(f"torch {version}: the registry's build needs no CUDA libraries ({download_in_words(default)})")
        install(version)
        return
    if wants_cpu:
        options = ("--index-url", CPU_INDEX, "--timeout", "15", "--retries", "1")
        offered = ask_pip(version, *options)
        if offered is not None and is_cpu_build(offered):
            print(f"torch {version}: the CPU build from {CPU_INDEX} ({download_in_words(offered)})")
            install(version, "--index-url", CPU_INDEX)
            return
        print(f"torch {version}: no CPU build can be reached from here; the default build has CUDA libraries")
    print(f"torch {version}: downloading {download_in_words(default)}")
    install(version)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"install_torch: pip failed with code {error.returncode}; see above") from None

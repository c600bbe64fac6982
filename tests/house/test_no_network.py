"""Nothing foreign is executed and nothing is fetched unasked: forbidden calls are searched for."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
EXECUTE = {"eval", "exec", "__import__"}


def _name(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def forbidden(text: str) -> Iterator[str]:
    """What a file does that no file may do, with the line."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.split(".")[0] in PICKLES:
                    yield f"line {node.lineno}: imports {name}"
                if name.split(".")[0] == "kernels":
                    yield f"line {node.lineno}: imports the package kernels, which fetches code"
        if not isinstance(node, ast.Call):
            if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
                yield f"line {node.lineno}: names trust_remote_code"
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        remote = keywords.get("trust_remote_code")
        if remote is not None and not (isinstance(remote, ast.Constant) and remote.value is False):
            yield f"line {node.lineno}: trust_remote_code"
        called = _name(node.func)
        if called == "torch.load":
            only = keywords.get("weights_only")
            if not (isinstance(only, ast.Constant) and only.value is True):
                yield f"line {node.lineno}: torch.load without weights_only=True"
        if called in EXECUTE:
            yield f"line {node.lineno}: {called}"
        loads_numpy = called.endswith(("np.load", "numpy.load")) and "allow_pickle" in keywords
        if loads_numpy and not (
            isinstance(keywords["allow_pickle"], ast.Constant) and keywords["allow_pickle"].value is False
        ):
            yield f"line {node.lineno}: allow_pickle"


def test_no_file_runs_or_unpickles_what_it_reads() -> None:
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in sorted((ROOT / "src").rglob("*.py"))
        if (wrong := list(forbidden(path.read_text(encoding="utf-8"))))
    }
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "AutoModel.from_pretrained(x, **{'trust_remote_code': True})",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "import pickle",
        "from pickle import loads",
        "def f():\n    from kernels import get_kernel",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_each_forbidden_thing_is_found(text: str) -> None:
    assert list(forbidden(text))


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=False)",
        "from fitune.kernels import native",
        "from . import kernels",
    ],
)
def test_allowed_things_are_not(text: str) -> None:
    assert not list(forbidden(text))


def test_the_package_kernels_is_no_dependency() -> None:
    """With it installed bitsandbytes fetches code when it is imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    for path in (ROOT / "requirements").glob("*.txt"):
        wanted += [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    names = [line.split("#")[0].strip().replace("[", "=").split("=")[0].split(">")[0].strip() for line in wanted]
    assert "torch" in names
    assert "kernels" not in names

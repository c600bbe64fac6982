"""Imports run one way, from the rooms people see down to `errors`; those inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"

# Top to bottom; rooms on one level do not import each other.
LEVELS = [
    ["__main__"],
    ["cli"],
    ["demo"],
    ["serve", "export"],
    ["train"],
    ["audit"],
    ["evaluate", "plan"],
    ["generate", "step"],
    ["fuse"],
    ["adapters", "data"],
    ["models"],
    ["quant"],
    ["kernels"],
    ["atomic", "config", "hardware", "process_memory"],
    ["errors"],
]
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}


def room_of(module: str) -> str | None:
    """`fitune.data.batch` -> `data`; None for the package itself (its version) and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "fitune" and len(parts) > 1 else None


def module_of(path: Path, source: Path) -> str:
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, source: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, at whatever depth."""
    module = module_of(path, source)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                start = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def wrong_imports(source: Path) -> list[str]:
    wrong = []
    for path in sorted((source / "fitune").rglob("*.py")):
        room = room_of(module_of(path, source))
        if room is None:
            continue
        if room not in LEVEL:
            wrong.append(f"{path.relative_to(source)}: the room {room} has no level")
            continue
        for line, name in imported(path, source):
            target = room_of(name)
            if target in (None, room, "__version__"):
                continue
            if target not in LEVEL or LEVEL[target] <= LEVEL[room]:
                wrong.append(f"{path.relative_to(source)}:{line}: {room} imports {name}")
    return wrong


def file_cycles(source: Path) -> list[str]:
    """Files that import each other in a ring at module level (an __init__ may gather its files)."""
    modules = {module_of(path, source): path for path in (source / "fitune").rglob("*.py")}
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        top = ast.Module([node for node in ast.parse(path.read_text()).body if not is_typing_only(node)], [])
        names: set[str] = set()
        for node in top.body:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        edges[module] = {name for name in names if name in modules and not module.startswith(f"{name}.")} - {module}
    rings: list[str] = []
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            rings.append(" > ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for target in sorted(edges[module]):
                walk(target, [*trail, module])
            done.add(module)

    for module in sorted(edges):
        walk(module, [])
    return rings


def is_typing_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def test_imports_run_one_way() -> None:
    assert wrong_imports(SOURCE) == []


def test_no_files_import_each_other() -> None:
    assert file_cycles(SOURCE) == []


def test_a_wrong_import_is_found(tmp_path: Path) -> None:
    """Upward, sideways, inside a function, relative, under TYPE_CHECKING: each is seen."""
    for name, text in {
        "quant/nf4.py": "def f():\n    from fitune.train import loop\n",
        "data/pack.py": "import fitune.adapters.presets\n",
        "config/schema.py": "from ..hardware import detect\n",
        "models/find.py": "if TYPE_CHECKING:\n    from fitune.cli import app\n",
        "train/loop.py": "from fitune import step\nfrom fitune import __version__\nfrom .other import x\n",
        "attic/old.py": "",
    }.items():
        path = tmp_path / "fitune" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert wrong_imports(tmp_path) == [
        "fitune/attic/old.py: the room attic has no level",
        "fitune/config/schema.py:1: config imports fitune.hardware.detect",
        "fitune/data/pack.py:1: data imports fitune.adapters.presets",
        "fitune/models/find.py:2: models imports fitune.cli.app",
        "fitune/quant/nf4.py:2: quant imports fitune.train.loop",
    ]


def test_a_ring_is_found(tmp_path: Path) -> None:
    room = tmp_path / "fitune" / "data"
    room.mkdir(parents=True)
    (room / "__init__.py").write_text("from fitune.data.a import x\n")
    (room / "a.py").write_text("from fitune.data.b import y\n")
    (room / "b.py").write_text("from fitune.data import a\n")
    assert file_cycles(tmp_path) == ["fitune.data.a > fitune.data.b > fitune.data.a"]

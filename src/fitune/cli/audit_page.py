"""How `fitune models --audit` speaks: a line for every model type, the sum, or one JSON object."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fitune.audit.model_audit import AuditRow


def run_audit_verb(only: str | None, write: Path | None, as_json: bool) -> bool:
    """Audits all model types, or the `only` ones (names with commas between); returns whether nothing got worse.

    `write`: a page to write, and to compare with first if it is there.
    """
    from fitune.atomic import write_text
    from fitune.audit.audit_table import audit_page, read_results, worse
    from fitune.audit.tiny_configs import model_types
    from fitune.audit.whole_audit import run_audit
    from fitune.cli.output import print_json
    from fitune.hardware import detect
    from fitune.kernels import native

    names = [name.strip() for name in only.split(",") if name.strip()] if only else model_types()
    backend = "native" if native.status().available else "reference"
    rows = run_audit(names, backend, max(1, detect().threads), None if as_json else _say)
    found = [row.as_dict() for row in rows]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "peft", "torch"))
    page = audit_page(found, versions)
    losses: list[str] = []
    if write is not None:
        if write.is_file():
            losses = worse(read_results(write.read_text(encoding="utf-8")), read_results(page))
        write_text(write, page)
    passed = sum(row.passed for row in rows)
    if as_json:
        print_json({"rows": found, "passed": passed, "total": len(rows), "worse": losses})
    else:
        print(f"\n{passed} of {len(rows)} model types pass ({versions}).")
        for loss in losses:
            print(f"worse than before: {loss}")
    return not losses


def _say(row: AuditRow, done: int, total: int) -> None:
    result = "passes" if row.passed else "not audited" if row.reason and not row.architecture else "FAILS"
    parts = ", ".join(f"{part} {count}" for part, count in row.replaced.items() if count)
    why = "; ".join(filter(None, [row.reason, *row.failures]))
    packs = ", packs" if row.packs else ""
    print(
        f"[{done}/{total}] {row.model_type}: {result} ({row.seconds:.0f} s) {parts}{packs} {why}".rstrip(), flush=True
    )

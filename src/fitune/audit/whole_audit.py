"""The audit of many model types, in processes of their own: one that crashes takes nothing with it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from fitune.errors import InputError

if TYPE_CHECKING:
    from fitune.audit.model_audit import AuditRow

Progress = Callable[["AuditRow", int, int], None]


def run_audit(
    names: Sequence[str], backend: str, processes: int, progress: Progress | None = None
) -> list[AuditRow]:  # fmt: skip
    """Audits the named model types; rows come back in the order of the names.

    Args:
        processes: how many at a time, one thread each.
        progress: told each row as it is done, how many are done, and how many there are.

    Raises InputError for a name that transformers has no causal language model for.
    """
    from fitune.audit.tiny_configs import model_types

    known = set(model_types())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError([f"{name!r} is no model type that transformers has a causal language model for"
                          for name in unknown])  # fmt: skip
    rows: dict[str, AuditRow] = {}

    def done(row: AuditRow) -> None:
        rows[row.model_type] = row
        if progress is not None:
            progress(row, len(rows), len(names))

    for name in _in_processes(names, backend, processes, done):
        # It, or its neighbour, ended a process: alone it is seen which.
        if _in_processes([name], backend, 1, done):
            done(_crashed(name))
    return [rows[name] for name in names]


def _in_processes(names: Sequence[str], backend: str, processes: int, done: Callable[[AuditRow], None]) -> list[str]:
    """Audits in a pool; returns the names that have no row because a process ended."""
    left = dict.fromkeys(names)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
        waiting: dict[Future[AuditRow], str] = {pool.submit(_one, name, backend): name for name in names}
        for future in as_completed(waiting):
            try:
                row = future.result()
            except BrokenProcessPool:
                break
            del left[waiting[future]]
            done(row)
    return list(left)


def _begin() -> None:
    """One thread, and silence: what models and libraries say is not about the audit."""
    import warnings

    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process


def _one(name: str, backend: str) -> AuditRow:
    from fitune.audit.model_audit import audit_model

    return audit_model(name, backend)


def _crashed(name: str) -> AuditRow:
    from fitune.audit.model_audit import AuditRow

    return AuditRow(name, reason="the process ended while it was audited (a crash, or out of memory)")

"""Findings as a table for a person and as JSON for a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from arvideo_dist.checks.finding import Finding, Level

_ROWS_PER_FAULT = 8
_WORDS = {Level.OK: "ok", Level.WARNING: "warning", Level.ERROR: "ERROR"}


def table(findings: Sequence[Finding]) -> str:
    """A row for each check that is well everywhere, with what one place found; a row for each place that has
    something to mend."""
    rows = [("check", "where", "result", "found")]
    for check in dict.fromkeys(finding.check for finding in findings):
        of_check = [finding for finding in findings if finding.check == check]
        well = [finding for finding in of_check if finding.level is Level.OK]
        rows += _well(check, well)
        faults = sorted((f for f in of_check if f.level is not Level.OK), key=lambda f: -f.level)
        rows += [(check, f.where or "driver", _WORDS[f.level], f.message) for f in faults[:_ROWS_PER_FAULT]]
        if len(faults) > _ROWS_PER_FAULT:
            left = len(faults) - _ROWS_PER_FAULT
            rows.append((check, f"{left} more", "", "--json lists all"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )


def _well(check: str, well: Sequence[Finding]) -> list[tuple[str, str, str, str]]:
    """One row for the driver's, one for what several workers found; alike but for numbers, so one speaks."""
    rows = [(check, "driver", "ok", f.message) for f in well if not f.where]
    places = list(dict.fromkeys(f.where for f in well if f.where))
    if len(places) == 1:
        rows += [(check, places[0], "ok", f.message) for f in well if f.where]
    elif places:
        rows += [(check, f"{len(places)} workers", "ok", f.message) for f in well if f.where == places[0]]
    return rows


def verdict(findings: Sequence[Finding]) -> str:
    """The last line: may the run start."""
    errors, warnings = (
        sum(finding.level is level for finding in findings) for level in (Level.ERROR, Level.WARNING)
    )
    if errors:
        return f"{errors} to mend before the run can start, {warnings} warnings"
    return f"ready to start, {warnings} warnings"


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "passed": all(finding.level is not Level.ERROR for finding in findings),
        "findings": [asdict(finding) | {"level": finding.level.name.lower()} for finding in findings],
    }

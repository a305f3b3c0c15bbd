"""The table and the JSON of findings."""

from __future__ import annotations

from arvideo_dist.checks.finding import Finding, Level
from arvideo_dist.checks.report import as_json, table, verdict

FINDINGS = [
    Finding("storage", Level.OK, "written"),
    *(Finding("device", Level.OK, f"GPU {rank}", where=f"worker {rank}") for rank in range(3)),
    Finding("device", Level.WARNING, "in use", where="worker 3"),
    Finding("/dev/shm", Level.ERROR, "too small: more", where="worker 1"),
]


def test_table_sums_up_what_is_well_and_lists_what_is_not() -> None:
    rows = [line.split(maxsplit=1)[0] for line in table(FINDINGS).splitlines()]
    assert rows == ["check", "storage", "device", "device", "/dev/shm"]
    lines = table(FINDINGS).splitlines()
    assert lines[2].split() == ["device", "3", "workers", "ok", "GPU", "0"]
    assert lines[3].split() == ["device", "worker", "3", "warning", "in", "use"]
    assert lines[4].endswith("ERROR    too small: more")


def test_fault_of_a_thousand_workers_stays_readable() -> None:
    many = [Finding("clock", Level.WARNING, "late", where=f"worker {i}") for i in range(1000)]
    lines = table(many).splitlines()
    assert len(lines) == 1 + 8 + 1
    assert "992 more" in lines[-1]


def test_verdict_and_json_agree() -> None:
    assert verdict(FINDINGS) == "1 to mend before the run can start, 1 warnings"
    assert verdict(FINDINGS[:1]) == "ready to start, 0 warnings"
    found = as_json(FINDINGS)
    assert not found["passed"]
    assert len(found["findings"]) == len(FINDINGS)
    assert found["findings"][-1] == {
        "check": "/dev/shm", "level": "error", "message": "too small: more", "passing": False, "away": False,
        "where": "worker 1",
    }  # fmt: skip
    assert as_json(FINDINGS[:5])["passed"]

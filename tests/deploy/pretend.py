"""Stands for a command of a pipeline: `python -m tests.deploy.pretend ...` leaves what the command would.

Its arguments go into what it leaves, and a line into `calls`. The first line of the file `codes`, if there is one,
is taken from it and is the exit code; `wait` there: until SIGTERM, then 75.
"""

from __future__ import annotations

import itertools
import signal
import sys
import time
from pathlib import Path


def main(here: Path, arguments: list[str]) -> int:
    given = dict(itertools.pairwise(arguments))
    with open(here / "calls", "a") as calls:
        calls.write(" ".join(arguments) + "\n")
    codes = here / "codes"
    first, *others = (codes.read_text().splitlines() if codes.exists() else []) or ["0"]
    codes.write_text("\n".join(others))
    if first == "wait":
        told = []
        signal.signal(signal.SIGTERM, lambda *_: told.append(1))
        print("waits", flush=True)
        while not told:
            time.sleep(0.01)
        time.sleep(0.5)  # a command needs a while to leave
        (here / "left").write_text("")
        return 75
    if first != "0":
        return int(first)
    out = Path(given["--out"]) if "--out" in given else Path("runs", given["--run.name"])
    out.mkdir(parents=True, exist_ok=True)
    name = f"dataset-{given['--split']}.json" if "--out" in given else "result.json"
    (out / name).write_text(" ".join(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path.cwd(), sys.argv[1:]))

"""What no other process of any machine has."""

from __future__ import annotations

import os
from pathlib import Path


def process_identity(pid: int) -> str | None:
    """What no other process of any machine has, though PIDs are given out again and clocks are set; None if this
    system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        # Field 22, counted after the command's name, which may hold spaces and parentheses.
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
    return f"{boot}/{namespace}/{pid}/{started}"


def namespace_of(process: str) -> list[str]:
    return process.split("/")[:2]

"""Between machines: who can open a connection to whom, and how far clocks stand apart."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from arvideo_dist.checks.finding import Finding, Level

CONNECT_TIMEOUT_S = 5.0
ALL_PAIRS = 32  # workers up to which each tries each other; beyond, its neighbours and the first

_SKEW_WARNING_S = 1.0
_SKEW_ERROR_S = 60.0  # deadlines of preemption notices are in UNIX time; S3 refuses requests 15 minutes off
_OUTLIER = 2.0  # times the median of links of the same kind


class Listener:
    """A port of this machine on which every connection gets `token`; open until `close`."""

    def __init__(self, token: str) -> None:
        self._socket = socket.create_server(("", 0), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        self._token = token.encode()
        threading.Thread(target=self._answer, name="preflight listener", daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            with connection:
                connection.settimeout(CONNECT_TIMEOUT_S)
                try:
                    connection.sendall(self._token)
                except OSError:  # whoever asked has left, and will say so
                    continue


def greet(host: str, port: int, token: str) -> str | None:
    """Connect to a listener; what went wrong, or None."""
    try:
        with socket.create_connection((host, port), CONNECT_TIMEOUT_S) as connection:
            heard = b""
            while len(heard) < len(token) and (piece := connection.recv(1024)):
                heard += piece
    except OSError as error:  # timeouts among them
        return error.strerror or str(error)
    return None if heard.decode(errors="replace") == token else "something else answered there"


def targets(rank: int, world: int) -> list[int]:
    """The ranks that `rank` connects to: all, or in large worlds the next ones and the first."""
    if world <= ALL_PAIRS:
        return [other for other in range(world) if other != rank]
    near = {(rank + 1) % world, (rank - 1) % world, 0}
    return sorted((set(range(world)) if rank == 0 else near) - {rank})


def check_reach(
    labels: Sequence[str], addresses: Sequence[tuple[str, int, str]], chosen: Sequence[int]
) -> list[Finding]:
    """Connect from here to the workers `chosen` of all; addresses are (host, port, token)."""
    with ThreadPoolExecutor(max(1, len(chosen))) as threads:
        answers = list(threads.map(lambda other: greet(*addresses[other]), chosen))
    missed = [
        f"{labels[other]} at {addresses[other][0]}:{addresses[other][1]} ({answer})"
        for other, answer in zip(chosen, answers, strict=True)
        if answer is not None
    ]
    if missed:
        return [
            Finding(
                "network",
                Level.ERROR,
                f"cannot connect to {'; '.join(missed)}: let TCP through between all workers on all ports above "
                "1023 (firewall, security group, NetworkPolicy: k8s/40-network.yaml), and check that the address "
                "is the one that others reach (ray start --node-ip-address)",
            )
        ]
    return [Finding("network", Level.OK, f"connects to {len(chosen)} other workers")]


def clock_offset(ask: Callable[[], float], rounds: int = 5) -> tuple[float, float]:
    """Seconds that a clock stands ahead of this machine's, and by how much that may be wrong: half the shortest
    round trip of `ask`, which returns that clock's UNIX time (Cristian's algorithm)."""
    best = (0.0, float("inf"))
    for _ in range(rounds):
        sent = time.time()
        began = time.perf_counter()
        answer = ask()
        bound = (time.perf_counter() - began) / 2
        if bound < best[1]:
            best = answer - (sent + bound), bound
    return best


def check_clock(offset_s: float, bound_s: float) -> Finding:
    """`offset_s`: against the driver or rank 0, known to +-`bound_s`."""
    skew = max(0.0, abs(offset_s) - bound_s)
    text = f"{offset_s:+.3f} s (+-{bound_s:.3f} s)"
    if skew < _SKEW_WARNING_S:
        return Finding("clock", Level.OK, text)
    level = Level.ERROR if skew >= _SKEW_ERROR_S else Level.WARNING
    return Finding("clock", level, f"{text}: let NTP (chrony, timesyncd) set the clocks of all nodes")


def link_outliers(nodes: Sequence[str], rates: Sequence[float]) -> dict[int, float]:
    """Ranks whose links in the ring are slower than half the median of their kind, with that median.

    `nodes`: each rank's machine. `rates`: bytes a second of each rank when it sends to the next rank and receives
    from the one before. A rank whose neighbours are on its own machine is compared with such ranks only.
    """
    world = len(nodes)
    kinds = [
        nodes[rank] == nodes[rank - 1] and nodes[rank] == nodes[(rank + 1) % world] for rank in range(world)
    ]
    found = {}
    for kind in (True, False):
        ranks = [rank for rank in range(world) if kinds[rank] == kind]
        if len(ranks) < 3:  # a median of two accuses the slower one of being slower
            continue
        middle = median(rates[rank] for rank in ranks)
        found.update({rank: middle for rank in ranks if rates[rank] * _OUTLIER < middle})
    return found

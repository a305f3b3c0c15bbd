"""One rank's sign of life: what it is doing, told to the run's `Monitor` by a thread."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import psutil
import torch.distributed as dist

from arvideo_dist import stacks
from arvideo_dist.processes import process_identity
from arvideo_dist.storage import Storage
from arvideo_dist.threads import BlockThread
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.health.monitor import Beat, Order, seconds_between_beats

_WRITE_S = 20.0  # for the stacks: the store itself may be what hangs
_EXIT_CODE = 70  # EX_SOFTWARE


class Heartbeat(BlockThread):
    """Tells the monitor of this rank until the `with` block ends; ends the process if the monitor says so."""

    def __init__(
        self, tell: Callable[[Beat], Order | None], run: Storage, hung_s: float, workers: str, node: str
    ) -> None:
        """`tell`: gives the monitor a beat and returns its order; may raise. `run`: where the stacks of a hang are
        written. `workers`: the name of this set of workers, which no other set has. (Ports are given out again, so
        an address would not do.) `node`: this machine's id in the cluster."""
        self._tell_monitor, self._run = tell, run
        me = psutil.Process()
        self._who: dict[str, Any] = {
            "group": workers,
            "rank": dist.get_rank(),
            "world_size": dist.get_world_size(),
            "node": node,
            "host": socket.gethostname(),
            "pid": me.pid,
            "process": process_identity(me.pid),
        }
        self._every = seconds_between_beats(hung_s)
        self._heard = True
        stacks.keep_ready()
        super().__init__("heartbeat", join_s=2 * self._every)

    def _keep(self) -> None:
        self._tell(left=False)
        while self._pause(self._every):
            self._tell(left=False)
        self._tell(left=True)

    def _tell(self, *, left: bool) -> None:
        try:
            order = self._tell_monitor(Beat(**self._who, **activity.reading()._asdict(), left=left))
        except Exception as error:
            # The monitor starts again by itself, and without a driver this process is ended.
            if self._heard:
                print(f"rank {self._who['rank']}: the monitor heard no heartbeat: {error}", file=sys.stderr)
            self._heard = False
            return
        self._heard = True
        if order is not None and not left:
            self._obey(order)

    def _obey(self, order: Order) -> None:
        """Leave the stacks and end: other ways out wait for the very thing that hangs."""
        rank = self._who["rank"]
        text = f"{order.reason}\n\nrank {rank}\n\n{stacks.of_tree(os.getpid())}"
        written = threading.Event()

        def write() -> None:
            self._run.write_bytes(f"{order.folder}/rank-{rank:05d}.txt", text.encode())
            written.set()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(_WRITE_S)
        if not written.is_set():
            print(text, file=sys.stderr)
        print(f"rank {rank} ends itself to be started again: {order.reason}", file=sys.stderr, flush=True)
        os._exit(_EXIT_CODE)

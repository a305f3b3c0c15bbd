"""How many workers the cluster has room for: what is free on its nodes, what an autoscaler is asked for, the wait.

The driver decides how many workers each set has, and Ray Train is given that number. Ray's elastic policy would
replace running workers without a save as soon as a node joins.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from arvideo_dist.checks.cluster import cluster_address, free_places, most_places, worker_resources
from arvideo_dist.config.commands import RunConfig

# What a set of workers leaves is free again within a second: fewer workers than could be are not started sooner.
_SETTLED_S = 3.0
_LOOK_S = 0.5

# An autoscaler forgets what a driver that was killed asked for after the first time; until then it is told again.
_EXPIRES_S, _AGAIN_S = 180.0, 20.0
_CANCEL_S = 3.0


def check_own_ray(config: RunConfig) -> None:
    """If Ray is started on this machine, which no node will ever join, it has the GPUs that the run wants.

    ValueError says what to change. CPUs are no question: as many slots are made as are asked for.
    """
    if cluster_address(config) is not None or config.cluster.device == "cpu":
        return
    gpus, wanted = torch.cuda.device_count(), config.cluster.min_workers
    if gpus >= wanted or (config.cluster.device == "auto" and not gpus):
        return
    build = f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none: a CPU build'})"
    fewer = f"set cluster.workers to {gpus} or less, " if gpus else ""
    raise ValueError(
        f"the run wants {wanted} GPUs (cluster.workers {config.cluster.workers}, cluster.device "
        f"{config.cluster.device}), and {build} sees {gpus} on this machine, where Ray would be started: "
        f"{fewer}set cluster.device to cpu, or join a cluster with GPUs by cluster.address or RAY_ADDRESS"
    )


class Room:
    """The cluster as a run uses it. Within its block it may ask an autoscaler for nodes; then no longer."""

    def __init__(self, config: RunConfig, use_gpu: bool, name: str) -> None:
        """`name`: unlike that of any other driver of the cluster."""
        self.bundle = worker_resources(config, use_gpu)
        self._fewest, self._most = config.cluster.min_workers, config.cluster.max_workers
        self._interval_s = config.cluster.resize_interval_s
        self._demand = _Demand(self.bundle, f"arvideo-{name}")

    def __enter__(self) -> Room:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._demand.cancel()

    def wait(self, stop_if_asked: Callable[[], None]) -> int:
        """The number of workers to start now: as many as fit. Waits until there is room for the fewest.

        `stop_if_asked` is called all the while and ends the wait by what it raises. ValueError if the cluster's
        autoscaler can never make the room.
        """
        seen, since, said = -1, time.monotonic(), -1
        while True:
            stop_if_asked()
            fits = min(sum(free_places(self.bundle).values()), self._most)
            if fits == self._most:
                return fits
            self._demand.ask(self._most)
            if fits != seen:
                seen, since = fits, time.monotonic()
            elif time.monotonic() > since + _SETTLED_S:
                if fits >= self._fewest:
                    return fits
                if fits != said:
                    said = fits
                    self._say_short(fits)
            time.sleep(_LOOK_S)

    def widening(self, running: int) -> Widening:
        """For a set of `running` workers that starts now. For these Ray Train asks an autoscaler itself."""
        self._demand.ask(self._most - running)
        return Widening(self, running, self._most, self._interval_s)

    def keep_asking(self) -> None:
        """To be called while workers run, so that the demand for more of them does not expire."""
        self._demand.repeat()

    def _say_short(self, fits: int) -> None:
        each = " and ".join(f"{amount:g} {kind}" for kind, amount in self.bundle.items())
        most = most_places(self.bundle)
        if most is not None and most < self._fewest:
            raise ValueError(
                f"the run wants {self._fewest} workers of {each} each, and the cluster's autoscaler can make room "
                f"for {most} at most: lower cluster.workers or cluster.cpus_per_worker, or raise maxReplicas of a "
                "group of nodes that hold one"
            )
        print(
            f"the cluster has room for {fits} workers of {each} each now, the run wants {self._fewest}: it waits "
            "until nodes join; if no autoscaler adds them, lower cluster.workers or cluster.cpus_per_worker",
            flush=True,
        )


class Widening:
    """Whether the workers that run should make way for more, because nodes have room for these and stay."""

    def __init__(self, room: Room, running: int, most: int, interval_s: float) -> None:
        self._room, self._running, self._most, self._interval_s = room, running, most, interval_s
        self._since: dict[str, float] = {}  # nodes with room, and when that was first seen
        self._every_s = min(5.0, max(_LOOK_S, interval_s / 10))
        self._next_look = 0.0

    def due(self, now: float) -> int | None:
        """The number of workers that there could be at `now` (monotonic seconds), if they are more; said once.

        A node counts once it has had room at every look of an interval: of nodes that come and go faster none does.
        """
        self._room.keep_asking()
        if self._running >= self._most or now < self._next_look:
            return None
        self._next_look = now + self._every_s
        free = free_places(self._room.bundle)
        self._since = {node: self._since.get(node, now) for node in free}
        steady = sum(free[node] for node, since in self._since.items() if now >= since + self._interval_s)
        if not steady:
            return None
        self._next_look = math.inf
        return min(self._running + steady, self._most)


class _Demand:
    """What an autoscaler shall make room for.

    Said to the actor that Ray Train and Ray Data use: it adds up what all ask for, and forgets who is silent.
    (`ray.autoscaler.sdk.request_resources` would replace what others ask for, and stay for ever.)
    """

    def __init__(self, bundle: dict[str, float], name: str) -> None:
        self._bundle, self._name = bundle, name
        self._number = 0
        self._told, self._told_at = False, 0.0

    def ask(self, number: int) -> None:
        """For `number` workers from now on, as long as this or `repeat` is called again and again.

        It does not wait."""
        if number != self._number:
            self._number = number
            self._tell()
        else:
            self.repeat()

    def repeat(self) -> None:
        """Once more what was asked for, before it expires."""
        if self._number and time.monotonic() > self._told_at + _AGAIN_S:
            self._tell()

    def _tell(self) -> None:
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            ResourceRequestPriority,
        )

        self._told_at = time.monotonic()
        self._told = True
        _coordinator().request_resources.remote(
            requester_id=self._name,
            resources=[self._bundle] * self._number,
            expire_after_s=_EXPIRES_S,
            priority=ResourceRequestPriority.HIGH,
        )

    def cancel(self) -> None:
        import ray

        if self._told and ray.is_initialized():  # else the call would start Ray
            with contextlib.suppress(Exception):  # Ray may be what was lost; then the demand expires
                ray.get(_coordinator().cancel_request.remote(self._name), timeout=_CANCEL_S)


def _coordinator() -> Any:
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    return get_or_create_autoscaling_coordinator()

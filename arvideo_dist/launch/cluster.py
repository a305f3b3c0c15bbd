"""The Ray that a run joins, or starts on this machine."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Iterator

from arvideo_dist.checks.cluster import cluster_address
from arvideo_dist.config.commands import RunConfig


def connect(config: RunConfig) -> None:
    """Join the named or surrounding cluster, or start Ray on this machine.

    Workers are told which cluster theirs is. Else Ray Train asks the one that `ray start` left a note of on the
    machine whether its controller lives, for 12 s at each end of its workers if that one is gone, and removes
    the workers if it is another.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # else each worker line shows twice
    # Room was there when the driver looked (`Room.wait`); if it is gone again, the driver looks again.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    # It would set a handler of its own for SIGTERM, and says that it cannot do so outside the main thread.
    logging.getLogger("ray._private.worker").addFilter(
        lambda record: not str(record.msg).startswith("SIGTERM handler is not set")
    )
    # The second line of defence behind the run's own monitor: a worker that does not answer, and Ray's collectives.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(collective_timeout_s(config))
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(collective_timeout_s(config))
    if (address := cluster_address(config)) is not None:
        here = {} if address == "auto" else {"env_vars": {"RAY_ADDRESS": address}}
        ray.init(address=address, runtime_env=here)
        return
    # All on this machine: as many slots as asked for, so that a small machine queues nothing for ever.
    slots = max(os.cpu_count() or 1, config.cluster.max_workers * config.cluster.cpus_per_worker)
    port = _free_port(8265)
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    ray.init(address="local", num_cpus=slots, dashboard_port=port)


@contextlib.contextmanager
def connected(config: RunConfig) -> Iterator[bool]:
    """Within it this process is part of the cluster; gives whether the workers train on GPUs."""
    import ray

    connect(config)
    try:
        yield use_gpu_of(config, ray.cluster_resources())
    finally:
        ray.shutdown()


def _free_port(preferred: int) -> int:
    for port in (preferred, 0):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as probe:
            found: int = probe.getsockname()[1]
            return found
    raise OSError("no port of 127.0.0.1 is free for Ray's dashboard")


def collective_timeout_s(config: RunConfig) -> int:
    """When torch gives a collective up: later than the monitor, which knows who is to blame."""
    return math.ceil(2 * config.run.hung_s + 60)


def use_gpu_of(config: RunConfig, resources: dict[str, float]) -> bool:
    """Whether the workers train on GPUs; `resources`: the cluster's (`ray.cluster_resources`)."""
    if config.cluster.device != "auto":
        return config.cluster.device == "cuda"
    return resources.get("GPU", 0) > 0

"""What the Ray cluster has room for: now, and at most."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from arvideo_dist.config.commands import RunConfig

_ANSWER_S = 1.0


def cluster_address(config: RunConfig) -> str | None:
    """The Ray that the run joins; None if it starts one on this machine."""
    inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return config.cluster.address or ("auto" if inside_job else os.environ.get("RAY_ADDRESS"))


def worker_resources(config: RunConfig, use_gpu: bool) -> dict[str, float]:
    """What Ray reserves for each training worker."""
    return {"CPU": float(config.cluster.cpus_per_worker), **({"GPU": 1.0} if use_gpu else {})}


def slots(nodes: Sequence[Mapping[str, float]], bundle: Mapping[str, float]) -> int:
    """How many times `bundle` fits into nodes of these resources; each one lies on one node."""
    return sum(
        # Ray counts in ten thousandths, and its sums may lie that much below a whole number.
        min(int((node.get(kind, 0) + 1e-4) // amount) for kind, amount in bundle.items())
        for node in nodes
    )


def free_places(bundle: Mapping[str, float]) -> dict[str, int]:
    """Nodes, by Ray's id, on which workers can start now, and how many.

    Not on nodes with a preemption notice, and only on those that answer: Ray counts a dead one for up to 20 s.
    """
    import ray
    from ray._private.state import available_resources_per_node, state

    free = available_resources_per_node()
    leaving = state.get_draining_nodes()
    places = {
        node["NodeID"]: ((node["NodeManagerAddress"], node["NodeManagerPort"]), number)
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] not in leaving
        and (number := slots([free.get(node["NodeID"], {})], bundle))
    }
    if not places:
        return {}
    with ThreadPoolExecutor(min(len(places), 32)) as pool:
        answers = list(pool.map(_answers, [address for address, _ in places.values()]))
    return {
        node: number for (node, (_, number)), answer in zip(places.items(), answers, strict=True) if answer
    }


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, _ANSWER_S).close()
    except OSError:
        return False
    return True


def most_places(bundle: Mapping[str, float]) -> int | None:
    """Workers for which there can ever be room: on the nodes that an autoscaler may add at most, or on those that
    are there. None if the cluster tells no such limit."""
    import ray
    from ray._private.state import state

    groups = getattr(state.get_cluster_config(), "node_group_configs", None)
    if not groups:
        return None
    there = slots([node["Resources"] for node in ray.nodes() if node["Alive"]], bundle)
    # A negative count says that there is no limit.
    if any(group.max_count < 0 and slots([group.resources], bundle) for group in groups):
        return None
    return max(there, sum(group.max_count * slots([group.resources], bundle) for group in groups))

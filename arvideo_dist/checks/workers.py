"""The same workers as the run would have, placed as it would place them, and what they find.

Ray actors with the run's resources in one placement group: first without torch.distributed, so that a worker that
cannot reach another is named and not waited for; then in a real process group.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from arvideo_dist.checks import collective, network
from arvideo_dist.checks.cluster import slots, worker_resources
from arvideo_dist.checks.finding import Finding, Level, errors, of_os_error
from arvideo_dist.checks.machine import check_machine, check_versions, device_kind, versions
from arvideo_dist.checks.needs import Needs, needs_of
from arvideo_dist.checks.plan import check_pace
from arvideo_dist.checks.stores import (
    check_data,
    check_mlflow,
    check_shared,
    check_storage,
    manifest_digests,
    scratch_folder,
)
from arvideo_dist.config.commands import ROOTS, RunConfig
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.derived import Workload

_STORAGE_BYTES = 8 * 2**20
_PLACED_WITHIN_S = 60.0  # workers that fit
_ANSWER_WITHIN_S = 120.0
_DATA_WITHIN_S = 600.0  # a look at each of 10^5 remote shards


class Worker:
    """One training worker's place in the cluster, as a Ray actor."""

    def __init__(self, command: str, config: dict[str, Any], cuda: bool) -> None:
        self._config, self._cuda = ROOTS[command].model_validate(config), cuda
        self._listener: network.Listener | None = None

    def describe(self) -> Place:
        return Place(
            node=ray.get_runtime_context().get_node_id(),
            host=socket.gethostname(),
            address=ray.util.get_node_ip_address(),
            device=device_kind(cuda=self._cuda),
            versions=versions(),
        )

    def machine(self, needs: Needs, workers_here: int) -> list[Finding]:
        return check_machine(self._config, needs, workers_here=workers_here, cuda=self._cuda)

    def storage(self, folder: str, name: str) -> list[Finding]:
        """`name`: what the driver wrote in `folder`."""
        return [
            check_storage(self._config, _STORAGE_BYTES),
            check_shared(Storage(folder), name, "the driver"),
        ]

    def data(self, part: int, parts: int, drivers: Sequence[str]) -> list[Finding]:
        """`drivers`: the digests of the manifests that the driver reads."""
        findings = check_data(self._config, share=(part, parts))
        if not errors(findings) and manifest_digests(self._config) != list(drivers):
            message = (
                "reads another manifest than the driver: data.path must lead to the same data set everywhere"
            )
            findings.append(Finding("data", Level.ERROR, message))
        return findings

    def mlflow(self, uri: str) -> list[Finding]:
        return [check_mlflow(uri)]

    def clock(self) -> float:
        return time.time()

    def listen(self, token: str) -> tuple[str, int, str]:
        """Address under which the other workers shall reach this one: Ray's, which the run uses as well."""
        self._listener = network.Listener(token)
        return ray.util.get_node_ip_address(), self._listener.port, token

    def reach(
        self, labels: list[str], addresses: list[tuple[str, int, str]], chosen: list[int]
    ) -> list[Finding]:
        return network.check_reach(labels, addresses, chosen)

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port: int = probe.getsockname()[1]
            return port

    def measure(self, rank: int, world: int, address: str) -> collective.Bandwidth:
        torch.set_num_threads(1)
        return collective.measure(rank, world, address, cuda=self._cuda)


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    node: str
    host: str
    address: str
    device: str
    versions: dict[str, str]


class Team:
    """The workers by rank, and how they are asked."""

    def __init__(self, actors: list[Any], places: list[Place]) -> None:
        order = sorted(range(len(actors)), key=lambda i: (places[i].address, places[i].node, i))
        self.actors = [actors[i] for i in order]
        self.places = [places[i] for i in order]
        self.labels = [f"worker {rank} on {place.host}" for rank, place in enumerate(self.places)]
        if len({place.host for place in self.places}) < len({place.node for place in self.places}):
            self.labels = [f"worker {rank} on {p.host} ({p.address})" for rank, p in enumerate(self.places)]

    def __len__(self) -> int:
        return len(self.actors)

    def ask(
        self, check: str, call: Callable[[Any, int], Any], within_s: float
    ) -> tuple[dict[int, Any], list[Finding]]:
        """`call(actor, rank)` on all workers at once: answers by rank, and a finding for each that gave none."""
        references = {rank: call(actor, rank) for rank, actor in enumerate(self.actors)}
        return _gather(check, references, self.labels, within_s)

    def findings(self, check: str, call: Callable[[Any, int], Any], within_s: float) -> list[Finding]:
        """As `ask`, for calls that return findings."""
        answers, silent = self.ask(check, call, within_s)
        return silent + [f.at(self.labels[rank]) for rank, found in answers.items() for f in found]


def check_workers(
    config: RunConfig, derived: Workload, *, tracking_uri: str | None, use_gpu: bool, wait_s: float
) -> list[Finding]:
    """Everything that the workers of the run find, on the cluster that this process is connected to.

    `tracking_uri`: None if it is not known. `wait_s`: seconds for which an autoscaler may add nodes.
    """
    bundle = worker_resources(config, use_gpu)
    fitting = slots([node["Resources"] for node in ray.nodes() if node["Alive"]], bundle)
    enough = fitting >= config.cluster.min_workers
    if not enough and not wait_s and not fitting:
        return [_no_room(config, fitting, bundle)]
    number = min(config.cluster.max_workers, fitting)
    if not enough and wait_s:
        number = config.cluster.min_workers
    group = placement_group([bundle] * number, strategy="PACK")
    try:
        if not group.wait(_PLACED_WITHIN_S if fitting >= number else wait_s):
            if fitting < number:
                return [_no_room(config, fitting, bundle)]
            return [
                Finding(
                    "room",
                    Level.ERROR,
                    f"the cluster has {fitting} places of {_resources(bundle)}, but others use some of the "
                    f"{number} that the run wants: wait for them to end (ray job list), or lower cluster.workers",
                )
            ]
        findings = [_room(config, number)]
        if number < config.cluster.min_workers:
            findings = [_no_room(config, fitting, bundle)]
        actor: Any = ray.remote(Worker)
        actors = [
            actor.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
            ).remote(config.command, config.model_dump(mode="json"), use_gpu)
            for i in range(number)
        ]
        numbered = [f"worker {i}" for i in range(number)]
        described, silent = _gather(
            "start", {i: a.describe.remote() for i, a in enumerate(actors)}, numbered, _ANSWER_WITHIN_S
        )
        if silent:
            return findings + silent
        team = Team(actors, [described[i] for i in range(number)])
        here = derived.at_world_size(number)
        needs = needs_of(config, here, cuda=use_gpu)
        findings += check_pace(config, here, cuda=use_gpu)
        findings += _alone(team, config, needs, tracking_uri)
        findings += _together(team)
        return findings
    finally:
        remove_placement_group(group)  # ends the actors


def _alone(team: Team, config: RunConfig, needs: Needs, tracking_uri: str | None) -> list[Finding]:
    """What each worker finds by itself."""
    findings = [
        check_versions(place.versions, versions()).at(label)
        for label, place in zip(team.labels, team.places, strict=True)
    ]
    kinds = Counter(place.device for place in team.places)
    if len(kinds) > 1:
        usual = kinds.most_common(1)[0][0]
        findings += [
            Finding(
                "device",
                Level.WARNING,
                f"{place.device}, most others have {usual}: the slowest sets the pace; give the run nodes of "
                "one kind",
                where=label,
            )
            for label, place in zip(team.labels, team.places, strict=True)
            if place.device != usual
        ]
    per_node = Counter(place.node for place in team.places)
    findings += team.findings(
        "machine",
        lambda actor, rank: actor.machine.remote(needs, per_node[team.places[rank].node]),
        _ANSWER_WITHIN_S,
    )
    findings += _storage(team, config)
    try:
        digests = manifest_digests(config)
    except (OSError, ValueError):  # the driver's own check names it
        digests = []
    if digests:
        findings += team.findings(
            "data", lambda actor, rank: actor.data.remote(rank, len(team), digests), _DATA_WITHIN_S
        )
    if tracking_uri is not None:
        answers, silent = _gather(
            "mlflow", {0: team.actors[0].mlflow.remote(tracking_uri)}, team.labels, _ANSWER_WITHIN_S
        )
        findings += silent + [f.at(team.labels[0]) for found in answers.values() for f in found]
    return findings + _clocks(team)


def _storage(team: Team, config: RunConfig) -> list[Finding]:
    name = f".preflight-{uuid.uuid4().hex}"
    try:
        folder = scratch_folder(config)
        folder.write_bytes(name, b"seen from the driver")
    except (OSError, ValueError):  # the driver's own check names it
        return []
    try:
        return team.findings(
            "storage", lambda actor, rank: actor.storage.remote(folder.address, name), _ANSWER_WITHIN_S
        )
    finally:
        folder.delete(name)


def _clocks(team: Team) -> list[Finding]:
    findings = []
    for rank, actor in enumerate(team.actors):
        try:
            offset, bound = network.clock_offset(
                lambda actor=actor: ray.get(actor.clock.remote(), timeout=_ANSWER_WITHIN_S)  # type: ignore[misc]
            )
        except RayError as error:
            findings.append(_silent("clock", team.labels[rank], error, _ANSWER_WITHIN_S))
        else:
            findings.append(network.check_clock(offset, bound).at(team.labels[rank]))
    return findings


def _together(team: Team) -> list[Finding]:
    """Connections between the workers, then a process group of all."""
    if len(team) < 2:
        return [Finding("network", Level.OK, "one worker: nobody to reach")]
    tokens = [uuid.uuid4().hex for _ in team.actors]
    listening, findings = team.ask(
        "network", lambda actor, rank: actor.listen.remote(tokens[rank]), _ANSWER_WITHIN_S
    )
    if not findings:
        addresses = [listening[rank] for rank in range(len(team))]
        findings = team.findings(
            "network",
            lambda actor, rank: actor.reach.remote(team.labels, addresses, network.targets(rank, len(team))),
            _ANSWER_WITHIN_S,
        )
    if errors(findings):
        skipped = "not measured: not all workers reach each other"
        return [*findings, Finding("all-reduce", Level.WARNING, f"{skipped}; mend that first")]
    return findings + _bandwidth(team)


def _bandwidth(team: Team) -> list[Finding]:
    ports, silent = _gather(
        "all-reduce", {0: team.actors[0].free_port.remote()}, team.labels, _ANSWER_WITHIN_S
    )
    if silent:
        return silent
    address = f"{team.places[0].address}:{ports[0]}"
    answers, silent = team.ask(
        "all-reduce",
        lambda actor, rank: actor.measure.remote(rank, len(team), address),
        2 * collective.GROUP_TIMEOUT_S,
    )
    if silent:
        return silent
    rates: list[collective.Bandwidth] = [answers[rank] for rank in range(len(team))]
    bus = median(rate.all_reduce for rate in rates) / 1e9
    slow = network.link_outliers([place.node for place in team.places], [rate.ring for rate in rates])
    return [
        Finding("all-reduce", Level.OK, f"bus bandwidth {bus:.2f} GB/s over {len(team)} workers"),
        *(
            Finding(
                "all-reduce",
                Level.WARNING,
                f"{rates[rank].ring / 1e9:.2f} GB/s between its neighbours and it, others of its kind "
                f"{middle / 1e9:.2f} GB/s: look at its network link (ethtool, ibstat, nvidia-smi nvlink -s)",
                where=team.labels[rank],
            )
            for rank, middle in slow.items()
        ),
    ]


def _gather(
    check: str, references: dict[int, Any], labels: Sequence[str], within_s: float
) -> tuple[dict[int, Any], list[Finding]]:
    until = time.monotonic() + within_s
    answers, silent = {}, []
    for rank, reference in references.items():
        try:
            answers[rank] = ray.get(reference, timeout=max(0.1, until - time.monotonic()))
        except OSError as error:  # of the worker's own, which Ray hands on as its kind
            silent.append(of_os_error(check, error, "look at this machine").at(labels[rank]))
        except Exception as error:  # whatever it is, it is this worker's answer
            silent.append(_silent(check, labels[rank], error, within_s))
    return answers, silent


def _silent(check: str, label: str, error: Exception, within_s: float) -> Finding:
    if isinstance(error, GetTimeoutError):
        message = f"no answer within {within_s:g} s: look at this machine, or take it out of the cluster"
    elif isinstance(error, RayActorError):
        message = f"the worker died ({error}): look at this machine's memory and at Ray's logs there"
    else:
        cause = getattr(error, "cause", error)
        advice = ""
        if check == "all-reduce":
            advice = (
                ": TCP gets through, so look at the interface that torch chose (GLOO_SOCKET_IFNAME, "
                "NCCL_SOCKET_IFNAME), and with NCCL_DEBUG=INFO at what NCCL says"
            )
        message = (
            f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause) else ''}{advice}"
        )
    return Finding(check, Level.ERROR, message, where=label)


def _room(config: RunConfig, number: int) -> Finding:
    return Finding("room", Level.OK, f"{number} workers placed, cluster.workers {config.cluster.workers}")


def _no_room(config: RunConfig, fitting: int, bundle: dict[str, float]) -> Finding:
    return Finding(
        "room",
        Level.ERROR,
        f"the cluster has room for {fitting} workers of {_resources(bundle)}, the run wants at least "
        f"{config.cluster.min_workers}: add nodes (if an autoscaler does, wait for it with --wait SECONDS; its "
        "limit is maxReplicas), or lower cluster.workers or cluster.cpus_per_worker",
    )


def _resources(bundle: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}{'s' if amount != 1 else ''}" for kind, amount in bundle.items())

"""The quick form of the checks, at every start of a run: on the driver, then on the workers before the model."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from arvideo_dist.checks.finding import WAITS_S, Finding, Level, errors, retried
from arvideo_dist.checks.machine import (
    check_disk,
    check_machine,
    check_memory,
    check_room,
    check_shared_memory,
)
from arvideo_dist.checks.memory import checkpoint_bytes
from arvideo_dist.checks.needs import needs_of
from arvideo_dist.checks.network import check_clock
from arvideo_dist.checks.plan import check_pace, check_plan
from arvideo_dist.checks.stores import check_data, check_mlflow, check_shared, check_storage
from arvideo_dist.config.commands import RunConfig
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.derived import Workload
from arvideo_dist.train.checkpoint.layout import complete_checkpoints
from arvideo_dist.train.run import lease
from arvideo_dist.train.run.lease import Guard
from arvideo_dist.train.run.stop import RunStoppedError

_T = TypeVar("_T")

_STORAGE_BYTES = 4096
# What may stop a run that has begun: a restart meets the same.
_LOCAL = {"device", "/dev/shm", "disk", "storage shared"}


def check_driver(config: RunConfig) -> None:
    """Data set, storage and tracking server from here; ValueError says what is to be mended.

    In this order: nothing is written for a run whose data set is not there. A fault that may pass is tried again
    for some seconds. OSError is raised instead if a store or server cannot be reached, or if a run that has
    begun meets nothing but what may pass. Without its tracking server such a run goes on.
    """
    run = Storage(config.run.storage_path).child(config.run.name)
    _stop_at_errors(retried(lambda: check_data(config), _say), run)
    _stop_at_errors(retried(lambda: [check_storage(config, _STORAGE_BYTES)], _say), run)
    from arvideo_dist.train.tracking.runs import RUN_FILE, tracking_uri  # imports MLflow, which takes seconds

    uri = tracking_uri(config)
    if run.exists(RUN_FILE):
        _stop_at_errors([check_mlflow(uri).softened()], run)
    else:
        _stop_at_errors(retried(lambda: [check_mlflow(uri)], _say), run)


def check_run(config: RunConfig, derived: Workload) -> None:
    """What the numbers of the run say here, on the driver, before Ray starts: a plan that is seldom meant, room for
    checkpoints, and, if all workers will be on this machine, what the machine has.

    ValueError if something of this is an error for a new run. One that has begun is warned: its workers look
    again, others may use the storage too, and saves that fail have their own patience (`run.max_failed_saves`).
    """
    findings = [*check_plan(derived), *check_room(config, checkpoint_bytes(derived))]
    if _starts_ray_here(config):
        device, workers = config.cluster.device, derived.world_size
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        needs = needs_of(config, derived, cuda=cuda)
        findings += [check_shared_memory(needs, workers, cuda=cuda), check_memory(needs, workers)]
        findings += check_disk(config, needs)
    run = Storage(config.run.storage_path).child(config.run.name)
    if not _is_new(run):
        findings = [finding.softened() for finding in findings]
    _stop_at_errors(findings, run)


def _starts_ray_here(config: RunConfig) -> bool:
    elsewhere = {"RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"} & os.environ.keys()
    return config.cluster.address is None and not elsewhere


def _stop_at_errors(findings: Sequence[Finding], run: Storage) -> None:
    _say_warnings(findings)
    if found := errors(findings):
        message = _listed("the run cannot start", found)
        if all(finding.away for finding in found) or (
            all(finding.passing for finding in found) and not _is_new(run)
        ):
            raise OSError(message)
        raise ValueError(message)


def check_workers_start(
    config: RunConfig, derived: Workload, guard: Guard, control: dist.ProcessGroup
) -> None:
    """Collective, on every rank at each start: this machine, the storage from here, the clocks.

    `control`: a gloo group. RunStoppedError on all ranks lists what all of them found. Once the run has a
    checkpoint only faults of a machine stop it: at night a store may be away for a moment, and what needs it then
    has its own patience.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    run = Storage(guard.run_address)
    clock, bound_s = _common_moment(control)
    facts = _all_gather((socket.gethostname(), clock, rank == 0 and _is_new(run)), control)
    hosts, clocks, news = zip(*facts, strict=True)
    new = any(news)
    cuda = dist.get_backend() == "nccl"
    here = derived.at_world_size(world)
    needs = needs_of(config, here, cuda=cuda)
    if rank == 0:
        _say_warnings(check_pace(config, here, cuda=cuda))
    findings = check_machine(config, needs, workers_here=Counter(hosts)[hosts[rank]], cuda=cuda)
    if hosts.index(hosts[rank]) != rank:  # of a machine's memory one speaks
        findings = [finding for finding in findings if finding.check != "memory"]
    findings.append(check_clock(clock - clocks[0], bound_s))
    waits_s = WAITS_S if new else ()
    lease_file = f"{lease.FOLDER}/{guard.name}"
    findings += retried(lambda: [check_storage(config, _STORAGE_BYTES)], _say, waits_s)
    findings += retried(lambda: [check_shared(run, lease_file, "the driver")], _say, waits_s)
    mine = [finding.at(f"rank {rank} on {hosts[rank]}") for finding in findings]
    everyones = [finding for found in _all_gather(mine, control) for finding in found]
    if not new:
        everyones = [
            finding if finding.check in _LOCAL and not finding.passing else finding.softened()
            for finding in everyones
        ]
    if rank == 0:
        _say_warnings(everyones)
    if found := errors(everyones):
        message = _listed("the workers' machines are not ready", found)
        raise RunStoppedError(message, passing=all(finding.away for finding in found))


def _is_new(run: Storage) -> bool:
    try:
        return not complete_checkpoints(run)
    except OSError:  # then whoever reads the checkpoints finds it out
        return False


def _common_moment(control: dist.ProcessGroup) -> tuple[float, float]:
    """UNIX time at a moment that lies on all ranks within the seconds returned besides."""
    dist.barrier(control)  # so that nobody waits for a late one below
    began = time.perf_counter()
    dist.barrier(control)
    now = time.time()
    dist.barrier(control)
    return now, time.perf_counter() - began


def _all_gather(mine: _T, control: dist.ProcessGroup) -> list[_T]:
    everyones: list[_T] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine, group=control)
    return everyones


def _say_warnings(findings: Sequence[Finding]) -> None:
    for finding in findings:
        if finding.level is Level.WARNING:
            _say(f"warning: {finding.line()}")


def _say(line: str) -> None:
    print(line, flush=True)


def _listed(what: str, findings: Sequence[Finding]) -> str:
    """One line for each fault, however many ranks have found it."""
    alike: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        alike.setdefault((finding.check, finding.message), []).append(finding)
    lines = []
    for first, *others in alike.values():
        more = f" and {len(others)} more" if others else ""
        lines.append(first.at(f"{first.where}{more}").line())
    return "\n  ".join([f"{what}; mend:", *lines])

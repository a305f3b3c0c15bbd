"""What one machine must have: its device and driver, shared memory, memory, disk, packages."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import psutil
import torch

from arvideo_dist.checks.finding import Finding, Level
from arvideo_dist.checks.memory import Memory
from arvideo_dist.checks.needs import Needs
from arvideo_dist.config.commands import RunConfig
from arvideo_dist.config.sources import loader_options
from arvideo_dist.data.index import index_cache
from arvideo_dist.hardware import cpu_name
from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.layout import FOLDER

PACKAGES = ("arvideo-dist", "torch", "deepspeed", "ray", "mlflow", "pyarrow", "decord")

_NCCL_ADVISED_BYTES = 2**30  # NCCL's guide, "Troubleshooting: Shared memory": --shm-size=1g
# Past this share of its disk Ray spills and stores no more objects (local_fs_capacity_threshold).
_RAY_FULL = 0.95
_GPU_TAKEN = 0.1  # share of a GPU's memory in others' hands that is worth a word


def check_machine(config: RunConfig, needs: Needs, *, workers_here: int, cuda: bool) -> list[Finding]:
    """Everything of this machine; `workers_here`: training workers that share it."""
    return [
        check_device(cuda=cuda),
        check_shared_memory(needs, workers_here, cuda=cuda),
        check_memory(needs, workers_here),
        *([check_device_memory(needs)] if cuda and torch.cuda.is_available() else []),
        *check_disk(config, needs),
    ]


def check_device(*, cuda: bool) -> Finding:
    """The device that this process was given computes; `cuda`: the run wants a GPU."""
    if not cuda:
        return Finding("device", Level.OK, f"CPU, {cpu_name()}, {os.cpu_count()} cores")
    driver = _driver_version()
    if not torch.cuda.is_available():
        mend = (
            f"driver {driver} is there, but no GPU is visible or the driver is too old for it: give the container "
            "GPUs (nvidia.com/gpu), or update the driver"
            if driver
            else "no NVIDIA driver is found: install it, and the device plugin in Kubernetes"
        )
        built = torch.version.cuda or "none (a CPU build)"
        return Finding(
            "device", Level.ERROR, f"torch {torch.__version__} (CUDA {built}) sees no usable GPU; {mend}"
        )
    name = torch.cuda.get_device_name()
    try:
        ones = torch.ones(256, 256, device="cuda")
        correct = bool((ones @ ones == 256).all())
        free, total = torch.cuda.mem_get_info()
    except RuntimeError as error:
        return Finding(
            "device",
            Level.ERROR,
            f"{name} does not compute ({error}): reset or drain this node, see dmesg for Xid",
        )
    if not correct:
        return Finding("device", Level.ERROR, f"{name} computes a wrong product: drain this node")
    text = f"{name}, {total / 2**30:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}"
    taken = total - free - torch.cuda.memory_reserved()
    if taken > _GPU_TAKEN * total:
        return Finding(
            "device",
            Level.WARNING,
            f"{text}; {taken / 2**30:.1f} GiB are in use by other processes: end them (nvidia-smi lists them)",
        )
    return Finding("device", Level.OK, text)


def device_kind(*, cuda: bool) -> str:
    """What should be the same on all workers."""
    if not cuda or not torch.cuda.is_available():
        return "CPU"
    return f"{torch.cuda.get_device_name()}, driver {_driver_version()}"


def check_shared_memory(
    needs: Needs, workers_here: int, *, cuda: bool, folder: Path = Path("/dev/shm")
) -> Finding:
    """Free room in /dev/shm against what the workers of this machine send through it."""
    check = "/dev/shm"
    remedy = (
        "give the container more: in Kubernetes an emptyDir of medium Memory on /dev/shm with a larger sizeLimit "
        "(k8s/50-raycluster.yaml), in Docker --shm-size"
    )
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Finding(check, Level.ERROR, f"{folder}: {error.strerror}: mount a tmpfs there")
    required = needs.shm * workers_here
    found = f"{_size(usage.free)} of {_size(usage.total)} free, {workers_here} workers need {_size(required)}"
    if usage.free < required:
        return Finding(check, Level.ERROR, f"{found}: {remedy}, or lower data.workers or train.micro_batch")
    advised = needs.shm_for_large_batches * workers_here
    if usage.free < advised:
        return Finding(
            check,
            Level.WARNING,
            f"{found}, and {_size(advised)} if data.device_transforms meets videos larger than the first "
            f"ones: {remedy}",
        )
    if cuda and usage.total < _NCCL_ADVISED_BYTES:
        return Finding(check, Level.WARNING, f"{found}; NCCL's guide advises 1 GiB: {remedy}")
    return Finding(check, Level.OK, found)


def check_memory(needs: Needs, workers_here: int) -> Finding:
    """Memory that is free, within the container's limit too, against all that the workers here will take of it."""
    free, required = free_memory(), needs.memory.total * workers_here
    found = f"{_size(free)} free, {workers_here} workers take up to {_size(required)}, each: {_parts(needs.memory)}"
    if free < required:  # what a process that has just ended held may not be back yet
        remedy = f"{_smaller(needs.memory, free / workers_here)}, or raise the container's memory limit"
        return Finding("memory", Level.ERROR, f"{found}: {remedy}", passing=True)
    return Finding("memory", Level.OK, found)


def check_device_memory(needs: Needs) -> Finding:
    """The GPU's memory against what training takes of it, by an estimate: only more than all of it is an error."""
    free, total = torch.cuda.mem_get_info()
    return judge_device_memory(needs.device_memory, free + torch.cuda.memory_reserved(), total)


def judge_device_memory(memory: Memory, free: int, total: int) -> Finding:
    found = (
        f"{_size(free)} of {_size(total)} free, a worker takes some {_size(memory.total)}: {_parts(memory)}"
    )
    if memory.total <= free:
        return Finding("GPU memory", Level.OK, found)
    level = Level.ERROR if memory.total > total else Level.WARNING
    return Finding("GPU memory", level, f"{found}: {_smaller(memory, free)}")


def _parts(memory: Memory) -> str:
    return ", ".join(f"{_size(number)} {what}" for what, number in memory.parts if number)


def _smaller(memory: Memory, room: float) -> str:
    """What makes a worker fit into `room` bytes."""
    largest = memory.largest_micro_batch(room)
    if largest:
        return f"lower train.micro_batch to {largest}, the largest that fits"
    return (
        "no train.micro_batch fits: raise train.zero_stage or the number of machines, lower data.workers or "
        "train.global_batch, or take a smaller model.encoder"
    )


def check_disk(config: RunConfig, needs: Needs) -> list[Finding]:
    """Free disk for temporary files, the index and the shard cache."""
    scratch = Path(tempfile.gettempdir())
    index = max(0, needs.index - _held(index_cache(), "*.arrow"))
    findings = [_room(scratch, index, "the data set's index", "set TMPDIR to a larger disk", ray=True)]
    if needs.shard_cache:
        folder = loader_options(config.data, pin_memory=False).shard_cache
        assert folder is not None
        missing = max(0, needs.shard_cache - _held(folder, "*.tar"))
        remedy = "lower data.shard_cache_gib or set data.shard_cache to a larger disk"
        findings.append(_writable(folder) or _room(folder, missing, "data.shard_cache_gib", remedy))
    return findings


def check_room(config: RunConfig, checkpoint: int) -> list[Finding]:
    """Free disk for checkpoints of `checkpoint` bytes each, of storage that is a local path.

    All machines share it, so one looks. What the run has there already counts as free.
    """
    run = Storage(config.run.storage_path).child(config.run.name)
    if not run.is_local:
        return []
    held = _held(Path(run.root), f"{FOLDER}/*/*")
    # A new checkpoint is whole before an old one goes.
    missing = max(checkpoint, checkpoint * (config.run.keep_last + 1) - held)
    remedy = "delete old runs, lower run.keep_last, or set run.storage_path to a larger disk"
    return [_room(Path(run.root), missing, "the run's checkpoints", remedy)]


def _room(folder: Path, required: int, what: str, remedy: str, *, ray: bool = False) -> Finding:
    usage = shutil.disk_usage(_existing(folder))
    text = f"{folder}: {_size(usage.free)} free, {_size(required)} wanted for {what}"
    if usage.free < required:
        return Finding("disk", Level.ERROR, f"{text}: {remedy}")
    if ray and usage.used > _RAY_FULL * usage.total:
        full = f"{usage.used / usage.total:.0%} are used, and past {_RAY_FULL:.0%} Ray stores no objects"
        return Finding("disk", Level.WARNING, f"{text}; {full}: {remedy}")
    return Finding("disk", Level.OK, text)


def _writable(folder: Path) -> Finding | None:
    """The error if this process cannot write into `folder`, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        message = (
            f"{folder} cannot be written ({error.strerror}): set data.shard_cache to a folder of your own"
        )
        return Finding("disk", Level.ERROR, message)
    return None


def _held(folder: Path, pattern: str) -> int:
    """Bytes of the files of a folder; they may go while they are counted."""
    total = 0
    for file in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def versions() -> dict[str, str]:
    """Of the packages that must be alike on all machines; "missing" if one is not installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def check_versions(mine: dict[str, str], drivers: dict[str, str]) -> Finding:
    """A worker's `versions` against the driver's."""
    other = [
        f"{package} {mine[package]} here, {version} on the driver"
        for package, version in drivers.items()
        if mine[package] != version
    ]
    if other:
        return Finding(
            "versions", Level.ERROR, f"{'; '.join(other)}: start driver and workers from the same image"
        )
    return Finding(
        "versions", Level.OK, ", ".join(f"{package} {version}" for package, version in mine.items())
    )


def _driver_version() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", text)
    return match[1] if match else None


# Limit, use and statistics of this process's control group as a container sees them, and what the cache's share is
# called there: version 2, version 1.
_CONTROL_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def free_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes: what the machine has, and what its control group leaves."""
    free: int = psutil.virtual_memory().available
    for limit_file, used_file, statistics_file, cache in _CONTROL_GROUPS:
        try:
            limit = (groups / limit_file).read_text().strip()
            used = int((groups / used_file).read_text())
            statistics = dict(line.split() for line in (groups / statistics_file).read_text().splitlines())
        except OSError:  # no group of this version
            continue
        if limit != "max":  # version 1 gives a huge number instead
            free = min(free, int(limit) - used + int(statistics[cache]))  # a cache that yields
    return free


def _existing(folder: Path) -> Path:
    """`folder` or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"

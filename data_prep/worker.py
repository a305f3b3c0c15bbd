"""What is done for one input, wherever it runs; and the pool of threads that does it on one machine.

Threads are enough: the work is in helper processes, so they run in parallel, start at once and cannot be
taken down by a video. Starting Ray takes longer than a small data set.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from arvideo_dist.storage import Storage, patiently
from data_prep import boxes, synthetic
from data_prep.errors import Interrupted, Rejected, is_machines_fault
from data_prep.isolation import Limits, Prober, allow_helpers
from data_prep.items import Item
from data_prep.probe import VideoInfo
from data_prep.shards import Outcome, Sample, SliceRecord, write_slice
from data_prep.transcode import TranscodeSettings, accept, encode_raw, transcode

_PIECE_BYTES = 2**20
_SCRATCH = "data-prep-"
_TRIES = 6  # of one video, if its helpers are killed from outside (an operator, the kernel out of memory)


def process(item: Item, folder: Path, settings: TranscodeSettings, limits: Limits, prober: Prober) -> Outcome:
    """Make the sample of `item`, its video a file in `folder`, or say why there is none.

    Of several files that it may be the one that is sound is taken; none if there are more that differ, since
    nothing tells which is meant. Raises OSError if the machine, not the input, is at fault (a full disk, a mount
    that stays away).
    """
    target = folder / f"{item.key}.mp4"
    if not item.choices:
        return _processed(item, target, settings, limits, prober)
    refused: list[tuple[str, str]] = []
    for group in item.choices:
        taken: tuple[str, Outcome] | None = None
        for path, file in group:
            staged = target if taken is None else target.with_suffix(".other.mp4")
            one = replace(item, path=path, file=file, choices=())
            outcome = _processed(one, staged, settings, limits, prober)
            if outcome.sample is None:
                refused.append((file, outcome.reason or ""))
            elif taken is None:
                taken = file, outcome
            else:
                staged.unlink()
                if taken[1].sample and outcome.sample.sha256 != taken[1].sample.sha256:
                    target.unlink()
                    return Outcome(item.source, reason=f"ambiguous: videos that differ: {taken[0]}, {file}")
        if taken:
            return taken[1]
    names = ", ".join(file for file, _ in refused)
    return Outcome(item.source, reason=f"{refused[0][1]} (none of these is sound: {names})")


def _processed(
    item: Item, target: Path, settings: TranscodeSettings, limits: Limits, prober: Prober
) -> Outcome:
    """The outcome for the one file or clip of `item`, its video written to `target`.

    A helper that crashes or meets a limit gets one more try, one that somebody kills a few.
    """
    tries, crashes = 0, 0
    while True:
        try:
            video, extra = _make(item, target, settings, limits, prober)
            break
        except Rejected as rejected:
            target.unlink(missing_ok=True)
            return Outcome(item.source, reason=str(rejected))
        except Interrupted as interrupted:
            target.unlink(missing_ok=True)
            tries, crashes = tries + 1, crashes + (not interrupted.outside)
            if crashes == 2 or tries == _TRIES:
                return Outcome(item.source, reason=f"limit: {interrupted} (tried {tries} times)")
    with open(target, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    sample = Sample(
        key=item.key,
        size=target.stat().st_size,
        sha256=digest,
        width=video.width,
        height=video.height,
        fps=video.fps,
        frames=video.frames,
        duration=video.duration,
        label=item.label,
        label_name=item.label_name,
        source=item.source,
        extra=extra,
    )
    return Outcome(item.source, sample=sample, video=target)


def _make(
    item: Item, target: Path, settings: TranscodeSettings, limits: Limits, prober: Prober
) -> tuple[VideoInfo, dict[str, object]]:
    if item.reason:
        raise Rejected(item.reason)
    if item.clip:
        clip = item.clip
        pictures = synthetic.render(clip)
        size = (clip.width, clip.height)
        encode_raw(target, size, clip.fps, settings, limits, lambda pipe: pipe.write(pictures.data))
        return accept(target, settings, prober, clip.frames), dict(item.extra)
    assert item.path is not None, f"{item.source} is neither a file nor a clip"
    patiently(partial(_check_file, item.path))
    try:
        video, source = transcode(Path(item.path), target, settings, limits, prober)
    except Rejected:  # for ever: so it must be the file, not a read that failed
        patiently(partial(_check_file, item.path, whole=True))
        video, source = transcode(Path(item.path), target, settings, limits, prober)
    extra = {"source_start": source.start, **item.extra}
    if source.cuts:
        extra["cuts"] = source.cuts
    if "boxes" in extra:
        extra |= boxes.placed(extra["boxes"], extra["video_start"], source.start, video, source.cuts)
    if item.file:
        extra["file"] = item.file
    return video, extra


def _check_file(path: str, whole: bool = False) -> None:
    """Raises Rejected if opening `path`, or reading the `whole` of it, would fail or wait for ever; OSError
    if that is the fault of its disk or mount."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Rejected(f"not a file: {_kind(status.st_mode)}")
        if not status.st_size:
            raise Rejected("empty: the file holds no bytes")
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            while whole and os.read(handle, _PIECE_BYTES):
                pass
        finally:
            os.close(handle)
    except OSError as error:
        if is_machines_fault(error):
            raise OSError(
                f"{path}: {error.strerror}; if it is this file alone, put an empty one in its place, which is "
                "rejected"
            ) from error
        if isinstance(error, FileNotFoundError) and _holds_nothing(os.path.dirname(path)):
            raise OSError(f"{path} is gone, with all that stood beside it: is its disk mounted?") from error
        raise Rejected(f"unreadable: {error.strerror}") from error


def _holds_nothing(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def _kind(mode: int) -> str:
    names = {stat.S_IFIFO: "a fifo", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return names.get(stat.S_IFMT(mode), "a device")


def scratch_prefix() -> str:
    """Of this process's folders in the machine's temporary folder; removes there what killed processes left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*-*"):
        pid = folder.name.removeprefix(_SCRATCH).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)
    return f"{_SCRATCH}{os.getpid()}-"


class LocalPool:
    """`workers` threads on this machine. Use as a context manager; leaving it ends every helper."""

    def __init__(
        self, workers: int, storage: Storage, split: str, settings: TranscodeSettings, limits: Limits
    ):
        self.slots = 2 * workers  # videos in flight: the next one waits beside each that runs
        self._storage, self._split, self._settings, self._limits = storage, split, settings, limits
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="data-prep")
        self._local = threading.local()
        self._probers: list[Prober] = []
        if storage.is_local:  # beside the output, which is this run's alone: others there are of killed runs
            base, prefix = Path(storage.path()), f".work-{split}-"
            for stale in base.glob(f"{prefix}*"):
                shutil.rmtree(stale, ignore_errors=True)
            self._staging = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        else:
            self._staging = Path(tempfile.mkdtemp(prefix=scratch_prefix()))

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        allow_helpers(False)
        self._threads.shutdown(wait=True)
        allow_helpers(True)
        for prober in self._probers:
            prober.close()
        shutil.rmtree(self._staging, ignore_errors=True)

    def video(self, item: Item) -> Future[Outcome]:
        return self._threads.submit(self._video, item)

    def shard(self, number: int, videos: list[Future[Outcome] | Outcome]) -> Future[SliceRecord]:
        outcomes = [video if isinstance(video, Outcome) else video.result() for video in videos]
        return self._threads.submit(self._shard, number, outcomes)

    def wait(self, handles: set[Future[Any]]) -> set[Future[Any]]:
        """Those of `handles` that are done, at least one."""
        return wait(handles, return_when=FIRST_COMPLETED).done

    def outcome(self, handle: Future[Outcome]) -> Outcome:
        return handle.result()

    def record(self, handle: Future[SliceRecord]) -> SliceRecord:
        return handle.result()

    def _video(self, item: Item) -> Outcome:
        if not hasattr(self._local, "prober"):
            self._local.prober = Prober(self._limits)
            self._probers.append(self._local.prober)
        return process(item, self._staging, self._settings, self._limits, self._local.prober)

    def _shard(self, number: int, outcomes: list[Outcome]) -> SliceRecord:
        record = write_slice(self._storage, self._split, number, outcomes)
        for outcome in outcomes:
            if isinstance(outcome.video, Path):
                outcome.video.unlink()
        return record

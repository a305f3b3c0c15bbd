"""The driver's side of hangs: starts the monitor on its own node; says, notes and ends what hangs."""

from __future__ import annotations

import contextlib
import signal
import threading
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil

from arvideo_dist.storage import shown
from arvideo_dist.threads import BlockThread
from arvideo_dist.train.health.monitor import Beat, Hang, Monitor

if TYPE_CHECKING:
    from arvideo_dist.train.run.lease import Guard

TAG = "arvideo.last_hang"
_ANSWER_S = 2.0  # for the actor, which does nothing that takes time
_AUTOPSY_S = 60.0  # for a task on the node of a rank that is mute; if the node is gone it never runs


def autopsy(pid: int, identity: str | None) -> str | None:
    """Runs on the node of a rank that is mute: its state and stacks, then the process is killed; None if it had
    ended before."""
    from arvideo_dist import stacks
    from arvideo_dist.processes import process_identity

    try:
        process = psutil.Process(pid)
        if process_identity(pid) != identity:
            return None
        found = stacks.of_tree(pid)
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return None
    return found


class HangWatch(BlockThread):
    """The driver's side, a context within `ray.init`: starts the monitor; says, notes and ends what hangs."""

    def __init__(self, hung_s: float, guard: Guard, note: Callable[[str, str], None]) -> None:
        """`note(tag, value)`: called in a thread with each hang's reason; what it raises is printed."""
        import ray

        self._guard, self._note = guard, note
        self._set = 0  # number of the set of workers that the driver has started last
        self._name = ""  # what its ranks call it
        self._reason: tuple[int, str] | None = None  # why a set was ended
        actor: Any = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=_on(_this_node()))(Monitor)
        self.monitor = actor.remote(hung_s, guard.generation)
        super().__init__("hang watch", join_s=5)

    def __exit__(self, *error: object) -> None:
        import ray

        if ray.is_initialized():  # else the call would start Ray
            with contextlib.suppress(Exception):  # Ray may be what was lost
                ray.kill(self.monitor)  # which ends the thread's waiting
        super().__exit__(*error)

    def new_workers(self) -> str:
        """The driver starts another set, of the name that is returned.

        What is found out of an older one is no reason for the end of this one.
        """
        self._set += 1  # while `_end_mute` may still wait for a node of the older one that is unreachable
        self._name = uuid.uuid4().hex
        return self._name

    def have_begun(self) -> bool:
        """Whether the workers of the newest set run; True if nobody knows."""
        import ray

        try:
            return bool(ray.get(self.monitor.has_heard.remote(self._name), timeout=_ANSWER_S))
        except Exception:
            return True

    def reason(self) -> str | None:
        """Why the workers were ended, if that was a hang."""
        of_set, reason = self._reason or (None, None)
        return reason if of_set == self._set else None

    def _keep(self) -> None:
        import ray

        while not self._ended.is_set():
            try:
                hang = ray.get(self.monitor.next_hang.remote())
            except ray.exceptions.RayError:  # it starts again, unless the block's end has killed it
                self._pause(1)
                continue
            of_set = self._set
            ends = {} if hang.live else self._end_mute(hang)
            if ends and all(found is None for found in ends.values()):
                continue  # they had been killed, and new workers wait for room: no hang, however long that takes
            reason = f"{hang.reason}; stacks are in {self._guard.run_uri}/{hang.folder}"
            self._reason = of_set, reason
            print(f"the run hangs: {reason}", flush=True)
            self._write(hang.folder, "reason.txt", f"{hang.reason}\n\n{hang.table}\n")
            for beat, found in (ends or self._end_mute(hang)).items():
                text = found or "its process or its node has ended\n"
                print(f"{beat}: {text.splitlines()[0]}", flush=True)
                name = f"rank-{beat.rank:05d}.txt"
                self._write(hang.folder, name, f"{hang.reason}\n\nrank {beat.rank}\n\n{text}")
            try:
                self._note(TAG, reason)
            except Exception as error:
                print(f"the hang was not noted in MLflow: {shown(error)}", flush=True)

    def _end_mute(self, hang: Hang) -> dict[Beat, str | None]:
        """What an autopsy found of each mute rank, whose process has ended after it."""
        import ray

        tasks = {
            ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=_on(beat.node))(autopsy).remote(
                beat.pid, beat.process
            ): beat
            for beat in hang.mute
        }
        if not tasks:
            return {}
        done, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=_AUTOPSY_S)
        found: dict[Beat, str | None] = {}
        for task, beat in tasks.items():
            if task not in done:
                found[beat] = f"its node {beat.node} did not answer within {_AUTOPSY_S:g} s\n"
                continue
            try:
                found[beat] = ray.get(task)
            except ray.exceptions.RayTaskError as error:
                found[beat] = f"its process may not have ended: {error}\n"
            except ray.exceptions.RayError:  # Ray knows that the node is gone
                found[beat] = None
        return found

    def _write(self, folder: str, name: str, text: str) -> None:
        """In a thread of its own: the store may be what hangs, and the ranks must be ended all the same."""

        def write() -> None:
            with contextlib.suppress(Exception):  # what it says was printed
                self._guard.storage().write_bytes(f"{folder}/{name}", text.encode())

        threading.Thread(target=write, name="hang report", daemon=True).start()


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _this_node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()

"""When workers that were lost start again, and when a run gives up: a budget that a new checkpoint refills."""

from __future__ import annotations

import re
from typing import Any

from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure

from arvideo_dist.train.run.stop import CrashLoopError

# Before the second restart without progress, doubled for each further one: a store or a tracking server that is
# away for a minute at start must not use the budget up.
_FIRST_PAUSE_S = 15.0
_LONGEST_PAUSE_S = 240.0
_MAX_LINE = 400
# What a rank says whose neighbour went away: an effect, and seldom the cause.
_COLLATERAL = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|NCCL|gloo|timed out|Timeout", re.IGNORECASE
)
# Ray's words for a worker that was ended since another one had failed.
_ENDED = re.compile(r"ray\.kill|owner|intended", re.IGNORECASE)


class Restarts:
    """Counts the losses of workers since the newest checkpoint."""

    def __init__(self, budget: int, run_uri: str) -> None:
        """`budget`: restarts without a new checkpoint, `run.max_restarts`."""
        self._budget, self._run_uri = budget, run_uri
        self._checkpoint: str | None = None
        self._causes: list[str] = []

    def lost(self, cause: str, checkpoint: str | None) -> tuple[str, float]:
        """Workers were lost because of `cause` (one line) with `checkpoint` as the newest complete one.

        Only one that is newer than all before is progress: a store that shows fewer is none.

        Returns the line to print and the seconds to wait before workers start again. Raises CrashLoopError if
        the budget is used up.
        """
        if checkpoint is not None and (self._checkpoint is None or checkpoint > self._checkpoint):
            self._checkpoint, self._causes = checkpoint, []
        self._causes.append(cause)
        number = len(self._causes)
        since = f"checkpoint {self._checkpoint}" if self._checkpoint else "the start, before any checkpoint"
        if number > self._budget:
            earlier = "".join(f"\n  {i}. {each}" for i, each in enumerate(self._causes, start=1))
            raise CrashLoopError(
                f"the workers were lost {number} times since {since}, without a new checkpoint in between "
                f"(run.max_restarts {self._budget}):{earlier}\n"
                "What each worker printed is on its node in logs/ of Ray's session folder "
                "(/tmp/ray/session_latest/logs/worker-*.err), stacks of hangs are in "
                f"{self._run_uri}/hangs. Mend the cause; then the same command continues from {since}"
            )
        pause = 0.0 if number == 1 else min(_FIRST_PAUSE_S * 2 ** (number - 2), _LONGEST_PAUSE_S)
        when = f"in {pause:g} s" if pause else "now"
        line = (
            f"workers were lost: {cause}\nrestart {number} of {self._budget} since {since}, {when}; a new "
            "checkpoint sets the count back"
        )
        return line, pause


def uncounted(error: BaseException) -> str | None:
    """The line to print when workers start again at once and no restart is counted: none had begun since room was
    gone again, or their nodes left as announced. `error`: what Ray Train's `fit` raised."""
    if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
        return "the room for the workers was gone before they started: the run waits for room again"
    lost: Any = error  # Ray Train V2's; what a type checker sees is V1's
    if _is_preemption_failure(lost):
        return f"workers were lost with nodes that had a preemption notice: {_one_line(_root(error))}"
    return None


def cause_of(error: BaseException) -> str:
    """One line for why the workers were lost: the rank and its error, of several ranks the likely origin.

    `error`: what Ray Train's `fit` raised.
    """
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    if not failures:
        inner = getattr(error, "controller_failure", error)
        told = f"the workers did not start: {_root(inner)}"
        if isinstance(inner, WorkerGroupStartupFailedError) and (death := _death_of_a_worker()):
            told = f"the workers did not start: {death}"
        return _one_line(told)
    lines = {rank: _root(failure) for rank, failure in failures.items()}
    # A death before an exception, an exception before those that follow from a neighbour's end.
    rank = min(
        lines, key=lambda rank: (not _died(failures[rank]), bool(_COLLATERAL.search(lines[rank])), rank)
    )
    more = f" (and {len(lines) - 1} more ranks)" if len(lines) > 1 else ""
    return _one_line(f"rank {rank}{more}: {lines[rank]}")


def _death_of_a_worker() -> str | None:
    """How the training worker that died last died by itself; Ray Train's error of a failed start does not tell."""
    import ray
    from ray._private.state import state

    if not ray.is_initialized():
        return None
    dead = state.actor_table(None, ray.get_runtime_context().job_id, "DEAD").values()
    for actor in sorted(dead, key=lambda actor: -actor["EndTime"]):
        cause = actor["DeathCause"].actor_died_error_context
        if actor["ActorClassName"] == "RayTrainWorker" and not _ENDED.search(cause.error_message):
            where = f"ip: {actor['Address']['IPAddress']}, pid: {actor['Pid']}"
            return f"a worker's process ended ({where}): {' '.join(cause.error_message.split())}"
    return None


def _died(failure: BaseException) -> bool:
    return isinstance(getattr(failure, "health_check_failure", failure), RayActorError)


def _root(failure: BaseException) -> str:
    """The innermost error's own words."""
    failure = getattr(failure, "health_check_failure", failure)
    while failure.__cause__ is not None:
        failure = failure.__cause__
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    if isinstance(failure, RayActorError):
        pid = next((line for line in lines if line.startswith("pid:")), "")
        node = next((line for line in lines if line.startswith("ip:")), "")
        end = next((line for line in lines if "exit" in line or "node" in line.lower()), lines[-1])
        return f"its process ended ({', '.join(filter(None, (node, pid)))}): {end}"
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"


def _one_line(text: str) -> str:
    return text if len(text) <= _MAX_LINE else f"{text[:_MAX_LINE]}..."

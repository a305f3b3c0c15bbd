"""A run that has ended and is started again: nothing is left to train, and the command says so at once."""

from __future__ import annotations

import json
from typing import Any

from arvideo_dist.config.commands import RunConfig, TrainingConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.launch.driver import Finished
from arvideo_dist.launch.start import check_resume, derive_checked, planned_places
from arvideo_dist.storage import Storage, shown
from arvideo_dist.train.checkpoint.layout import FOLDER
from arvideo_dist.train.run.lease import acquire
from arvideo_dist.train.run.stop import RESULT


def already_finished(config: RunConfig) -> Finished | None:
    """What the run left, if it has ended under this configuration; None if something is left to do.

    Starts no Ray and changes nothing, unless MLflow lacks something of the run: then that is sent. Raises
    ValueError if the configuration does not fit the run (`check_resume`).
    """
    run = run_folder(config)
    try:
        if not run.exists(RESULT):
            return None
    except OSError:  # the checks of a start say what is wrong with the storage
        return None
    result = json.loads(run.read_bytes(RESULT))
    checkpoint = check_resume(config)
    if checkpoint is None:
        return None
    state = checkpoint.state
    # A run that was made longer keeps the result of its first end until it comes to the next.
    if result.get("step", state["step"]) != state["step"]:
        return None
    if state["position"] < planned_places(config, derive_checked(config), state):
        return None
    verb, more = config.command, ""
    if isinstance(config, TrainingConfig):
        verb = "train"
        more = ". For more, raise train.epochs or train.steps and name it in --run.allow_change"
    print(
        f"run {config.run.name} is finished: step {state['step']} was its last, nothing is left to "
        f"{verb}{more}",
        flush=True,
    )
    return Finished(
        metrics=result,
        run_folder=run.uri,
        checkpoint=f"{run.uri}/{FOLDER}/{checkpoint.name}",
        mlflow_run_id=_settle_mlflow(config, run),
    )


def _settle_mlflow(config: RunConfig, run: Storage) -> str:
    """Send what MLflow has not got and set the status that it did not take; the id of its run."""
    from arvideo_dist.train.tracking import outbox
    from arvideo_dist.train.tracking import runs as tracking

    uri = tracking.tracking_uri(config)
    run_id = str(json.loads(run.read_bytes(tracking.RUN_FILE))["mlflow_run_id"])
    try:
        status = tracking.status_of(uri, run_id)
    except Exception as error:  # of whatever database or server; the run itself is finished all the same
        print(
            f"MLflow at {shown(uri)} does not tell whether it has all of the run: {shown(error)}", flush=True
        )
        return run_id
    if status == "FINISHED" and not outbox.holds_entries(run):
        return run_id
    with acquire(run, config.run.lease_s) as lease:
        to_mlflow: Any = tracking.Tracker(uri, run_id, lease.guard.check)
        with outbox.QueuedTracker(to_mlflow, lease.guard.storage()):
            pass  # its end sends what waits
        tracking.close_run(config, run_id, "FINISHED")
        outbox.say_unsent(lease.guard.storage())
    return run_id

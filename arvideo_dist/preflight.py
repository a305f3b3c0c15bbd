"""Check cluster, storage, data and tracking: `python -m arvideo_dist.preflight --config FILE.yaml ...`.

Takes the configuration exactly as `pretrain` does and looks at it on as many workers, placed alike, as the run
would have. Exit code 0: the run can start, whatever the warnings; 1: something is to be mended, the table says
what; 2: the configuration itself is wrong, and nothing was looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from arvideo_dist.checks.finding import Finding, Level, errors
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.settings import exit_with, read_config
from arvideo_dist.launch.cluster import connected
from arvideo_dist.launch.start import derive_checked, with_absolute_paths
from arvideo_dist.storage import without_credentials
from arvideo_dist.tasks.derived import Derived, derive

_STORAGE_BYTES = 8 * 2**20


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m arvideo_dist.preflight",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write all findings there as well")
    parser.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="for nodes that an autoscaler adds (default: 0)",
    )
    try:
        config, flags = read_config(PretrainConfig, sys.argv[1:] if argv is None else argv, parser)
        config = with_absolute_paths(config)
        derived = derive(config, None)
    except ValueError as error:
        exit_with(error, 2)

    from arvideo_dist.checks.machine import check_room
    from arvideo_dist.checks.memory import checkpoint_bytes
    from arvideo_dist.checks.plan import check_plan
    from arvideo_dist.checks.report import as_json, table, verdict
    from arvideo_dist.hardware import environment, write_json  # these import MLflow and Ray: seconds

    findings, uri = _driver(config)
    print(f"{len(findings)} checks on the driver done; now the workers", flush=True)
    if not errors(findings):  # else the data may be away, which has been said
        try:
            derived = derive_checked(config)  # with the number of samples
        except (ValueError, OSError) as error:
            print(f"without the data set's size: {str(error).splitlines()[0]}", flush=True)
    if derived.samples is not None:
        findings += [*check_plan(derived), *check_room(config, checkpoint_bytes(derived))]
    findings += _workers(config, derived, uri, flags.wait)
    print(table(findings))
    print(verdict(findings), flush=True)
    result = as_json(findings)
    if flags.json is not None:
        write_json(
            flags.json,
            {"subject": "preflight"}
            | environment()
            | {"configuration": without_credentials(config.model_dump(mode="json"))}
            | result,
        )
    if not result["passed"]:
        raise SystemExit(1)


def _driver(config: PretrainConfig) -> tuple[list[Finding], str | None]:
    """What this machine finds, and the tracking server's address if it has a valid one."""
    from arvideo_dist.checks.stores import check_data, check_mlflow, check_storage
    from arvideo_dist.train.tracking.runs import tracking_uri

    findings = [check_storage(config, _STORAGE_BYTES), *check_data(config)]
    try:
        uri = tracking_uri(config)
    except ValueError as error:
        return [*findings, Finding("mlflow", Level.ERROR, str(error))], None
    return [*findings, check_mlflow(uri)], uri


def _workers(config: PretrainConfig, derived: Derived, uri: str | None, wait_s: float) -> list[Finding]:
    from arvideo_dist.checks.workers import check_workers

    with contextlib.ExitStack() as cluster:
        try:
            use_gpu = cluster.enter_context(connected(config))
        except Exception as error:  # Ray raises bare ones, too
            message = (
                f"{error}: check cluster.address, RAY_ADDRESS and RAY_AUTH_TOKEN, and that the head runs"
            )
            return [Finding("cluster", Level.ERROR, message)]
        return check_workers(config, derived, tracking_uri=uri, use_gpu=use_gpu, wait_s=wait_s)


if __name__ == "__main__":
    main()

"""The GPU checks: run here on the CPU where they can be, so that a session with a GPU finds them working."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType
from unittest import mock

import pytest
import torch

from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.model.vit import ENCODER_SIZES, EncoderSize
from tests.conftest import ROOT
from tests.train.distributed import run_ranks

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


def _load() -> ModuleType:
    """The script as a module, with a geometry that a CPU computes in seconds."""
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    module.SMALL = ModelConfig(  # type: ignore[attr-defined]
        encoder="demo", frames=8, image_size=32, tubelet=(2, 8, 8), cluster=(2, 2, 2)
    )
    module.SMALL_DECODER = DecoderConfig(width=64, depth=1)  # type: ignore[attr-defined]
    module.METHODS["randsac"][0]["cluster"] = (1, 2, 2)
    module.METHODS["igpt"][0].update(frames=4, image_size=8)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script runs its checks")
def test_script_says_that_it_skipped_where_there_is_no_gpu() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == "gpu_check: skipped, this machine has no CUDA device\n"


def test_script_needs_only_torch_pydantic_and_deepspeed() -> None:
    """What it and the engine import from the project brings in no other third-party package."""
    absent = [
        "ray",
        "mlflow",
        "pyarrow",
        "decord",
        "av",
        "webdataset",
        "pydantic_settings",
        "yaml",
        "safetensors",
    ]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r})); sys.path.insert(0, {str(ROOT)!r})\n"
        f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='loaded')\n"
        "import arvideo_dist.train.engine.engine\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["check_bf16_against_fp32", "check_no_leak", "check_planes_to_clips"])
def test_model_checks_pass_on_the_cpu(name: str) -> None:
    result = getattr(_load(), name)(torch.device("cpu"))
    assert result["passed"], result


def _with_deepspeed() -> dict[str, dict]:
    """In one process, as the script runs them, with a smaller encoder: they build 24 engines."""
    torch.distributed.destroy_process_group()
    module, device = _load(), torch.device("cpu")
    checks = ("check_zero_stages", "check_checkpoints", "check_bad_steps")
    with mock.patch.dict(ENCODER_SIZES, demo=EncoderSize(width=96, depth=2, heads=1)):
        return {name: getattr(module, name)(device) for name in checks}


def test_engine_checks_pass_in_bf16_on_the_cpu() -> None:
    (results,) = run_ranks(1, _with_deepspeed)
    assert all(result["passed"] for result in results.values()), results

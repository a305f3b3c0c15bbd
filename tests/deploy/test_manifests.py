"""Invariants of k8s/, and for each the faults that it must notice."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Callable
from typing import Any

import manifest_checks as checks
import pytest
from manifest_checks import ROOT, Doc, load_manifests, named

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.settings import read_config

PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
IMAGE_UID = int(re.findall(r"^USER (\d+):", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1])
MANIFESTS = load_manifests()

CHECKS: dict[str, Callable[[list[Doc]], list[str]]] = {
    "schema": checks.schema_problems,
    "order": checks.order_problems,
    "reference": checks.reference_problems,
    "selector": checks.selector_problems,
    "network": checks.network_problems,
    "tracking": checks.tracking_problems,
    "path": checks.path_problems,
    "version": lambda docs: checks.version_problems(docs, PINS, VERSION),
    "resource": checks.resource_problems,
    "capacity": lambda docs: checks.capacity_problems(docs, cpus_per_worker=1),
    "restricted": lambda docs: checks.restricted_problems(docs, IMAGE_UID),
    "secret": checks.secret_problems,
    "life": lambda docs: checks.life_problems(docs, PretrainConfig().run.preemption_grace_s),
}

ABBREVIATIONS = {
    "CONFIG": "ConfigMap data",
    "MLFLOW_POD": "Deployment spec template spec",
    "MLFLOW": "Deployment spec template spec containers 0",
    "HEAD": "RayCluster spec headGroupSpec template spec containers 0",
    "HEAD_START": "RayCluster spec headGroupSpec rayStartParams",
    "GPU_POD": "RayCluster spec workerGroupSpecs 0 template spec",
    "GPU": "RayCluster spec workerGroupSpecs 0 template spec containers 0",
}
GONE = object()

# (check, what to change: a kind, or kind:name, and the keys down to the value, the value, what is reported)
FAULTS: list[tuple[str, str, Any, str]] = [
    ("schema", "MLFLOW_POD enableServiceLink", False, "'enableServiceLink' was unexpected"),
    ("schema", "RayCluster spec autoscalerOption", {}, "'autoscalerOption' was unexpected"),
    ("schema", "GPU envfrom", [], "'envfrom' was unexpected"),
    ("schema", "CONFIG ARVIDEO__CLUSTER__WORKERS", 8, "8 is not of type"),
    ("schema", "HEAD_START num-cpus", 0, "0 is not of type 'string'"),
    ("schema", "RayCluster spec authOptions mode", "tokens", "'tokens' is not one of"),
    ("schema", "GPU_POD restartPolicy", 1, "restartPolicy"),
    ("order", "Namespace", GONE, "first document is a PersistentVolumeClaim"),
    ("order", "Service metadata namespace", "default", "Service mlflow is not in the namespace"),
    ("order", "PersistentVolumeClaim:mlflow metadata name", "arvideo-data", "is given twice"),
    ("reference", "PersistentVolumeClaim:arvideo-runs metadata name", "r", "unknown claim arvideo-runs"),
    ("reference", "GPU volumeMounts 0 name", "dataset", "mounts the unknown volume dataset"),
    ("reference", "ConfigMap metadata name", "config", "unknown ConfigMap arvideo-config"),
    ("reference", "Secret metadata name", "credentials", "unknown Secret arvideo-credentials"),
    ("reference", "Secret metadata name", "arvideo", "the operator gives to the token's Secret"),
    ("selector", "Service spec selector app.kubernetes.io/name", "x", "selects 0 workloads"),
    ("selector", "Service spec ports 0 targetPort", "web", "no port web"),
    ("selector", "Deployment spec selector matchLabels app.kubernetes.io/name", "x", "not select its own"),
    ("selector", "RayCluster metadata name", "other", "NetworkPolicy ray-internal selects no pod"),
    ("selector", "NetworkPolicy:mlflow spec ingress 0 ports 0 port", 5001, "no port 5001"),
    ("network", "NetworkPolicy:deny-ingress", GONE, "no policy closes the namespace"),
    ("network", "NetworkPolicy:mlflow", GONE, "no policy lets arvideo/gpu reach MLflow"),
    ("tracking", "CONFIG ARVIDEO__TRACKING__URI", "http://tracking:5000", "no such Service"),
    ("tracking", "CONFIG ARVIDEO__TRACKING__URI", "http://mlflow:80", "Service mlflow has no port 80"),
    ("tracking", "MLFLOW args 1", "--port=5001", "listens on 5001"),
    ("tracking", "MLFLOW args 4", "--allowed-hosts=mlflow,localhost:*", "403 to mlflow:5000"),
    ("path", "CONFIG ARVIDEO__DATA__PATH", "/mnt/k400", "does not lie on the claim arvideo-data"),
    ("path", "CONFIG ARVIDEO__RUN__STORAGE_PATH", "/data/runs", "not lie on the claim arvideo-runs"),
    ("path", "GPU envFrom", [], "arvideo/gpu/ray-worker does not read arvideo-config"),
    ("version", "RayCluster spec rayVersion", "2.59.0", "is not the pinned 2.60.0"),
    ("version", "GPU image", "rayproject/ray:2.60.0-gpu", "rayproject/ray:2.60.0-gpu"),
    ("resource", "HEAD resources limits memory", "8Gi", "requests more memory than its limit"),
    ("resource", "MLFLOW resources limits memory", GONE, "has no memory limit"),
    ("resource", "GPU resources limits nvidia.com/gpu", GONE, "requested and limited alike"),
    ("resource", "GPU_POD volumes 2 emptyDir sizeLimit", "400Gi", "more than half of the pod's memory"),
    ("resource", "HEAD_START object-store-memory", "8589934592", "does not fit in its /dev/shm"),
    ("capacity", "CONFIG ARVIDEO__CLUSTER__WORKERS", "17", "17 training workers are asked for, 16 fit"),
    ("capacity", "CONFIG ARVIDEO__CLUSTER__WORKERS", "[8,24]", "24 training workers are asked for, 16 fit"),
    ("capacity", "GPU resources limits cpu", "3", "16 training workers are asked for, 6 fit"),
    ("restricted", "MLFLOW_POD securityContext runAsUser", 0, "does not run as the image's user"),
    ("restricted", "GPU_POD volumes 2", {"name": "shm", "hostPath": {"path": "/dev/shm"}}, "volume shm"),
    ("restricted", "GPU securityContext capabilities", GONE, "ray-worker keeps capabilities"),
    ("restricted", "RayCluster spec autoscalerOptions securityContext", GONE, "autoscaler may escalate"),
    ("restricted", "Namespace metadata labels", {}, "does not enforce restricted"),
    ("secret", "Secret stringData", {"AWS_ACCESS_KEY_ID": "x"}, "arvideo-credentials holds data"),
    ("secret", "GPU env 0", {"name": "RAY_AUTH_TOKEN", "value": "x"}, "RAY_AUTH_TOKEN is written"),
    ("secret", "RayCluster spec authOptions", GONE, "without a token"),
    ("life", "HEAD_START num-cpus", "4", "could land on the head"),
    ("life", "RayCluster spec autoscalerOptions version", "v1", "is not v2"),
    ("life", "GPU_POD terminationGracePeriodSeconds", 300, "killed before Ray's 300 s"),
    ("life", "HEAD env 0 value", "60", "`ray job stop` kills a job within its 120 s"),
    ("life", "GPU env 0 value", "60", "drained for less than a run's 120 s"),
    ("life", "MLFLOW_POD enableServiceLinks", GONE, "MLFLOW_PORT"),
    ("life", "Deployment spec replicas", 2, "one sqlite file"),
]


def with_fault(where: str, value: Any) -> list[Doc]:
    """A copy of the manifests with one value replaced or, where it is GONE, removed."""
    docs = copy.deepcopy(MANIFESTS)
    first, *rest = where.split()
    first, *keys = [*ABBREVIATIONS.get(first, first).split(), *rest]
    target: Any = named(docs, *first.split(":"))
    if not keys:
        docs.remove(target)
        return docs
    steps = [int(key) if key.isdecimal() else key for key in keys]
    for step in steps[:-1]:
        # YAML's anchors make parts shared, and a fault must hit one place.
        target[step] = copy.deepcopy(target[step])
        target = target[step]
    if value is GONE:
        del target[steps[-1]]
    else:
        target[steps[-1]] = value
    return docs


@pytest.mark.parametrize("check", CHECKS)
def test_manifests_keep_the_invariant(check: str) -> None:
    assert CHECKS[check](MANIFESTS) == []


@pytest.mark.parametrize(("check", "where", "value", "report"), FAULTS)
def test_invariant_notices_the_fault(check: str, where: str, value: Any, report: str) -> None:
    problems = CHECKS[check](with_fault(where, value))
    assert any(report in problem for problem in problems), problems


def test_every_invariant_has_a_fault() -> None:
    assert {check for check, *_ in FAULTS} == CHECKS.keys()


@pytest.mark.parametrize("bad", ["8 Gi", "Gi", "1.5.2", "-1", "12gb", ""])
def test_quantities_that_kubernetes_refuses_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="not a Kubernetes quantity"):
        checks.quantity(bad)


def test_kubectl_takes_the_folder_as_it_is() -> None:
    """No kustomization (kubectl would fail on it as an object), and one kind beyond Kubernetes' own."""
    files = sorted(file.name for file in (ROOT / "k8s").iterdir() if file.is_file())
    assert files
    assert all(re.fullmatch(r"\d\d-[a-z]+\.yaml", name) for name in files)
    beyond = {doc["apiVersion"] for doc in MANIFESTS} - {"v1", "apps/v1", "networking.k8s.io/v1"}
    assert beyond == {"ray.io/v1"}


def test_environment_alone_configures_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray job submit -- python -m arvideo_dist.pretrain`: no file, no flag, only what the pods carry."""
    for name, value in named(MANIFESTS, "ConfigMap")["data"].items():
        monkeypatch.setenv(name, value)
    resolved, _ = read_config(PretrainConfig, [])
    assert resolved.data.path == "/data/k400"
    assert resolved.run.storage_path == "/runs"
    assert resolved.tracking.uri == "http://mlflow:5000"
    assert resolved.cluster.device == "cuda"
    assert resolved.cluster.workers == (8, 16)
    assert checks.capacity_problems(MANIFESTS, resolved.cluster.cpus_per_worker) == []


def test_documented_commands_name_what_exists() -> None:
    """Services, Secrets, ports, versions, namespaces and files of docs/deployment.md."""
    text = (ROOT / "docs" / "deployment.md").read_text()
    cluster = named(MANIFESTS, "RayCluster")["metadata"]["name"]
    ports = {
        d["metadata"]["name"]: d["spec"]["ports"][0]["port"] for d in MANIFESTS if d["kind"] == "Service"
    }
    ports[f"{cluster}-head-svc"] = 8265  # the operator's name for the head's Service
    forwards = re.findall(r"port-forward svc/([\w-]+) \d+:(\d+)", text)
    assert {(name, int(port)) for name, port in forwards} == set(ports.items())
    assert f"get secret {cluster} " in text
    assert set(re.findall(r"ray\[default\]==([\d.]+)", text)) == {PINS["ray"]}
    assert set(re.findall(r"arvideo-dist:([\d.]+\d)", text)) == {VERSION}
    assert set(re.findall(r"kubectl -n (\S+)", text)) == {named(MANIFESTS, "Namespace")["metadata"]["name"]}
    operator = named(MANIFESTS, "NetworkPolicy", "ray-operator")["spec"]["ingress"][0]["from"][0]
    namespace = operator["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert set(re.findall(r"--namespace (\S+)", text)) == {namespace}
    for folder, name in re.findall(r"\b(k8s|jobs)/([\w-]+\.yaml)", text):
        assert (ROOT / folder / name).is_file()
    for name in re.findall(r"`(\d\d-[a-z]+\.yaml)`", text):
        assert (ROOT / "k8s" / name).is_file()

"""Checks of k8s/ that the schemas cannot make. Each returns the problems that it found, as sentences.

They take the documents as data, so that the tests can also show that each check notices its fault.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import yaml

Doc = dict[str, Any]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KUBERNETES_VERSION = "1.33"
SUFFIXES: dict[str, Decimal | int] = {
    "": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip


def load_manifests(folder: Path = ROOT / "k8s") -> list[Doc]:
    """Every document in the order in which `kubectl apply -f k8s/` sends them."""
    return [doc for file in sorted(folder.glob("*.yaml")) for doc in yaml.safe_load_all(file.read_text())]


def named(docs: list[Doc], kind: str, name: str | None = None) -> Doc:
    """The one document of this kind (and name)."""
    (found,) = [d for d in docs if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    return found


def names_of(docs: list[Doc], kind: str) -> set[str]:
    return {d["metadata"]["name"] for d in docs if d["kind"] == kind}


def quantity(text: str | int) -> Decimal:
    """A Kubernetes resource quantity in its base unit (cores, bytes, pieces)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(text))
    if match is None or match[2] not in SUFFIXES:
        raise ValueError(f"{text!r} is not a Kubernetes quantity")
    return Decimal(match[1]) * SUFFIXES[match[2]]


def pods(docs: list[Doc]) -> Iterator[tuple[str, dict[str, str], Doc]]:
    """(name, labels as the pod will carry them, pod spec) of every pod template."""
    for doc in docs:
        if doc["kind"] == "Deployment":
            template = doc["spec"]["template"]
            yield doc["metadata"]["name"], template["metadata"]["labels"], template["spec"]
        elif doc["kind"] == "RayCluster":
            cluster, spec = doc["metadata"]["name"], doc["spec"]
            groups = [("head", "head", spec["headGroupSpec"])]
            groups += [(g["groupName"], "worker", g) for g in spec["workerGroupSpecs"]]
            for name, node_type, group in groups:
                template = group["template"]
                # The operator adds these two labels and refuses to have them overridden.
                added = {"ray.io/cluster": cluster, "ray.io/node-type": node_type}
                yield f"{cluster}/{name}", template["metadata"].get("labels", {}) | added, template["spec"]


def containers(docs: list[Doc]) -> Iterator[tuple[str, Doc, Doc]]:
    """(where, pod spec, container)."""
    for name, _, spec in pods(docs):
        for container in spec["containers"] + spec.get("initContainers", []):
            yield f"{name}/{container['name']}", spec, container


def _selects(selector: Doc, labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


# --- schemas ---


def strict(schema: Any) -> Any:
    """A CRD's schema as the API server applies it with `--validate=strict`.

    Unknown fields are refused, what has a default need not be given, and int-or-string means just that.
    """
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict):
        result.setdefault("additionalProperties", False)
        result["required"] = [
            key for key in schema.get("required", []) if "default" not in properties.get(key, {})
        ]
    if schema.get("x-kubernetes-int-or-string"):
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return result


def schema_problems(docs: list[Doc]) -> list[str]:
    """Built-in kinds against Kubernetes' schemas, the RayCluster against KubeRay's and its pods as pods."""
    ray = strict(json.loads((HERE / "schemas" / "rayclusters.v1.schema.json").read_text()))
    found = []
    for doc in docs:
        if doc["apiVersion"] == "ray.io/v1":
            errors = jsonschema.Draft7Validator(ray).iter_errors(doc)
            found += [f"{doc['kind']}: {error.json_path}: {error.message}" for error in errors]
        else:
            found += _built_in_problems(doc)
    for name, labels, spec in pods(docs):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", "labels": labels}, "spec": spec}
        found += [f"{name}: {problem}" for problem in _built_in_problems(pod)]
    return found


def _built_in_problems(doc: Doc) -> list[str]:
    try:
        kubernetes_validate.validate(doc, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{doc['kind']}: {'.'.join(map(str, error.path))}: {error.message}"]
    return []


# --- names that must agree ---


def order_problems(docs: list[Doc]) -> list[str]:
    """The namespace comes first, everything else is in it, and no object is given twice."""
    if docs[0]["kind"] != "Namespace":
        return [f"the first document is a {docs[0]['kind']}: what comes before the namespace is refused"]
    found = []
    namespace = named(docs, "Namespace")["metadata"]["name"]
    for doc in docs:
        if doc["kind"] != "Namespace" and doc["metadata"].get("namespace") != namespace:
            found.append(f"{doc['kind']} {doc['metadata']['name']} is not in the namespace {namespace}")
    keys = [(doc["kind"], doc["metadata"]["name"]) for doc in docs]
    found += [f"{kind} {name} is given twice" for kind, name in set(keys) if keys.count((kind, name)) > 1]
    return found


def reference_problems(docs: list[Doc]) -> list[str]:
    """Every claim, ConfigMap, Secret and volume that a pod names exists; every volume and claim is used."""
    found, used_claims = [], set()
    for name, _, spec in pods(docs):
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        mounted = {m["name"] for c in spec["containers"] for m in c.get("volumeMounts", [])}
        found += [f"{name} mounts the unknown volume {v}" for v in sorted(mounted - volumes.keys())]
        found += [f"{name} does not mount its volume {v}" for v in sorted(volumes.keys() - mounted)]
        claims = {
            v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v
        }
        used_claims |= claims
        known = names_of(docs, "PersistentVolumeClaim")
        found += [f"{name} uses the unknown claim {claim}" for claim in sorted(claims - known)]
    found += [
        f"claim {claim} is used by no pod"
        for claim in sorted(names_of(docs, "PersistentVolumeClaim") - used_claims)
    ]
    for where, _, container in containers(docs):
        for source in container.get("envFrom", []):
            for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if key in source and source[key]["name"] not in names_of(docs, kind):
                    found.append(
                        f"{where} takes its environment from the unknown {kind} {source[key]['name']}"
                    )
    cluster = named(docs, "RayCluster")["metadata"]["name"]
    if cluster in names_of(docs, "Secret"):
        found.append(f"Secret {cluster} is the name that the operator gives to the token's Secret")
    return found


def selector_problems(docs: list[Doc]) -> list[str]:
    """Selectors of Deployments, Services and NetworkPolicies find pods, and their ports exist on them."""
    found = []
    all_pods = list(pods(docs))
    for doc in docs:
        name, spec = f"{doc['kind']} {doc['metadata']['name']}", doc.get("spec", {})
        if doc["kind"] == "Deployment" and not _selects(
            spec["selector"], spec["template"]["metadata"]["labels"]
        ):
            found.append(f"{name} does not select its own pods")
        if doc["kind"] == "Service":
            selected = [s for _, labels, s in all_pods if spec["selector"].items() <= labels.items()]
            found += [f"{name} selects {len(selected)} workloads, not one"] if len(selected) != 1 else []
            for port in spec["ports"]:
                if not all(_has_port(pod, port.get("targetPort", port["port"])) for pod in selected):
                    found.append(f"{name}: its pods have no port {port.get('targetPort', port['port'])}")
        if doc["kind"] == "NetworkPolicy":
            selected = [s for _, labels, s in all_pods if _selects(spec["podSelector"], labels)]
            if not selected:
                found.append(f"{name} selects no pod")
            for rule in spec.get("ingress", []):
                for port in rule.get("ports", []):
                    if not all(_has_port(pod, port["port"]) for pod in selected):
                        found.append(f"{name}: a selected pod has no port {port['port']}")
                for peer in rule["from"]:
                    inside = "namespaceSelector" not in peer
                    if inside and not any(_selects(peer["podSelector"], labels) for _, labels, _ in all_pods):
                        found.append(f"{name} lets in pods that do not exist")
    return found


def _has_port(pod: Doc, port: str | int) -> bool:
    ports = [p for c in pod["containers"] for p in c.get("ports", [])]
    return any(port in (p.get("name"), p["containerPort"]) for p in ports)


def network_problems(docs: list[Doc]) -> list[str]:
    """Every pod is closed to what no policy names, and Ray's pods may reach MLflow."""
    found = []
    policies = [d["spec"] for d in docs if d["kind"] == "NetworkPolicy"]
    if not any(p["podSelector"] == {} and "ingress" not in p for p in policies):
        found.append("no policy closes the namespace by default")
    uri = urlsplit(named(docs, "ConfigMap")["data"]["ARVIDEO__TRACKING__URI"])
    (mlflow,) = [labels for name, labels, _ in pods(docs) if name == uri.hostname]
    for name, labels, _ in pods(docs):
        if "ray.io/cluster" in labels and not any(
            _selects(policy["podSelector"], mlflow)
            and any(_selects(peer["podSelector"], labels) for peer in rule["from"])
            for policy in policies
            for rule in policy.get("ingress", [])
        ):
            found.append(f"no policy lets {name} reach MLflow")
    return found


def tracking_problems(docs: list[Doc]) -> list[str]:
    """The tracking address names a Service and its port, which the server listens on and answers for."""
    found = []
    uri = urlsplit(named(docs, "ConfigMap")["data"]["ARVIDEO__TRACKING__URI"])
    services = {d["metadata"]["name"]: d["spec"]["ports"] for d in docs if d["kind"] == "Service"}
    if uri.hostname not in services:
        return [f"tracking.uri names {uri.hostname}, and there is no such Service"]
    if uri.port not in [port["port"] for port in services[uri.hostname]]:
        found.append(f"Service {uri.hostname} has no port {uri.port}")
    container = named(docs, "Deployment", uri.hostname)["spec"]["template"]["spec"]["containers"][0]
    arguments = dict(argument.split("=", 1) for argument in container["args"])
    if int(arguments["--port"]) not in [port["containerPort"] for port in container["ports"]]:
        found.append(f"the server listens on {arguments['--port']}, which is not its container's port")
    allowed = arguments["--allowed-hosts"].split(",")
    found += [
        f"MLflow would answer 403 to {host}"
        for host in (uri.netloc, f"localhost:{uri.port}", f"127.0.0.1:{uri.port}")
        if not any(fnmatch.fnmatch(host, pattern) for pattern in allowed)
    ]
    return found


def path_problems(docs: list[Doc]) -> list[str]:
    """The folders that the environment names lie on claims, mounted alike in every Ray pod."""
    data, found = named(docs, "ConfigMap")["data"], []
    for where, spec, container in containers(docs):
        if not where.startswith(named(docs, "RayCluster")["metadata"]["name"] + "/"):
            continue
        on_claims = {
            v["name"]: v["persistentVolumeClaim"]["claimName"]
            for v in spec.get("volumes", [])
            if "persistentVolumeClaim" in v
        }
        mounts = {
            m["mountPath"]: on_claims[m["name"]]
            for m in container.get("volumeMounts", [])
            if m["name"] in on_claims
        }
        for key, claim in (
            ("ARVIDEO__DATA__PATH", "arvideo-data"),
            ("ARVIDEO__RUN__STORAGE_PATH", "arvideo-runs"),
        ):
            under = [path for path in mounts if Path(data[key]).is_relative_to(path)]
            if [mounts[path] for path in under] != [claim]:
                found.append(f"{where}: {key}={data[key]} does not lie on the claim {claim}")
        if not {"arvideo-config"} <= {s.get("configMapRef", {}).get("name") for s in container["envFrom"]}:
            found.append(f"{where} does not read arvideo-config")
    return found


def version_problems(docs: list[Doc], pins: dict[str, str], version: str) -> list[str]:
    """rayVersion is the pinned Ray and every container runs this project's image of this version."""
    found = []
    ray = named(docs, "RayCluster")["spec"]["rayVersion"]
    if ray != pins["ray"]:
        found.append(f"rayVersion {ray} is not the pinned {pins['ray']}")
    images = {container["image"] for _, _, container in containers(docs)}
    if images != {f"arvideo-dist:{version}"}:
        found.append(f"images {sorted(images)} are not arvideo-dist:{version} alone")
    return found


# --- sizes ---


def resource_problems(docs: list[Doc]) -> list[str]:
    """Quantities parse, requests stay within limits, memory is bounded, shared memory fits in it."""
    found = []
    for where, spec, container in containers(docs):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        if "memory" not in limits:
            found.append(f"{where} has no memory limit")
        for key, value in requests.items():
            if key in limits and quantity(value) > quantity(limits[key]):
                found.append(f"{where} requests more {key} than its limit")
        for key in requests.keys() | limits.keys():
            if "/" in key and requests.get(key) != limits.get(key):
                found.append(f"{where}: {key} must be requested and limited alike")
        for volume in spec.get("volumes", []):
            if volume.get("emptyDir", {}).get("medium") == "Memory" and quantity(
                volume["emptyDir"]["sizeLimit"]
            ) * 2 > quantity(limits["memory"]):
                found.append(f"{where}: {volume['name']} may take more than half of the pod's memory")
    for doc in docs:
        if doc["kind"] == "PersistentVolumeClaim":
            quantity(doc["spec"]["resources"]["requests"]["storage"])
    cluster = named(docs, "RayCluster")["spec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
        shm = [m["name"] for m in spec["containers"][0]["volumeMounts"] if m["mountPath"] == "/dev/shm"]
        sizes = [quantity(v["emptyDir"]["sizeLimit"]) for v in spec["volumes"] if v["name"] in shm]
        if not sizes or quantity(group["rayStartParams"]["object-store-memory"]) > sizes[0]:
            found.append("a Ray pod's object store does not fit in its /dev/shm")
    return found


def capacity_problems(docs: list[Doc], cpus_per_worker: int) -> list[str]:
    """The workers that the environment asks for fit in the GPU group: else the job would wait for ever."""
    asked = json.loads(named(docs, "ConfigMap")["data"]["ARVIDEO__CLUSTER__WORKERS"])
    workers = asked[-1] if isinstance(asked, list) else asked
    room = 0
    for group in named(docs, "RayCluster")["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus = int(quantity(limits.get("nvidia.com/gpu", 0)))
        room += group["maxReplicas"] * min(gpus, int(quantity(limits["cpu"])) // cpus_per_worker)
    return [f"{workers} training workers are asked for, {room} fit"] if workers > room else []


# --- security and life ---


def restricted_problems(docs: list[Doc], uid: int) -> list[str]:
    """PodSecurity "restricted", the autoscaler's container included; the user is the image's."""
    found = []
    for name, _, spec in pods(docs):
        context = spec.get("securityContext", {})
        if (
            not context.get("runAsNonRoot")
            or context.get("runAsUser") != uid
            or context.get("fsGroup") != uid
        ):
            found.append(f"{name} does not run as the image's user {uid}")
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            found.append(f"{name} has no seccomp profile")
        if {"hostNetwork", "hostPID", "hostIPC"} & spec.keys():
            found.append(f"{name} uses the host's namespaces")
        allowed = {"name", "persistentVolumeClaim", "emptyDir", "configMap", "secret", "projected"}
        found += [f"{name}: volume {v['name']}" for v in spec.get("volumes", []) if v.keys() - allowed]
    contexts = [(where, container.get("securityContext", {})) for where, _, container in containers(docs)]
    ray = named(docs, "RayCluster")["spec"]
    if ray.get("enableInTreeAutoscaling"):
        contexts.append(("autoscaler", ray.get("autoscalerOptions", {}).get("securityContext", {})))
    for where, context in contexts:
        if context.get("allowPrivilegeEscalation") is not False:
            found.append(f"{where} may escalate its privileges")
        if context.get("capabilities") != {"drop": ["ALL"]}:
            found.append(f"{where} keeps capabilities")
    labels = named(docs, "Namespace")["metadata"]["labels"]
    if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
        found.append("the namespace does not enforce restricted")
    return found


def secret_problems(docs: list[Doc]) -> list[str]:
    """No credential is written down, and Ray asks for a token."""
    found = [
        f"Secret {d['metadata']['name']} holds data"
        for d in docs
        if d["kind"] == "Secret" and {"data", "stringData"} & d.keys()
    ]
    for where, _, container in containers(docs):
        for variable in container.get("env", []):
            if re.search("TOKEN|PASSWORD|SECRET|KEY", variable["name"]) and "value" in variable:
                found.append(f"{where}: {variable['name']} is written in the manifest")
    if named(docs, "RayCluster")["spec"].get("authOptions", {}).get("mode") != "token":
        found.append("Ray takes jobs without a token")
    return found


def life_problems(docs: list[Doc], grace_s: float) -> list[str]:
    """Drivers alone on the head, autoscaler v2, one writer of sqlite, and time to save: a run that is asked to
    stop gets its `grace_s` before Ray kills the job or ends the node, and the pod outlives Ray."""
    found = []
    cluster = named(docs, "RayCluster")["spec"]
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        found.append("training workers could land on the head")
    if cluster.get("enableInTreeAutoscaling") and cluster["autoscalerOptions"].get("version") != "v2":
        found.append("the autoscaler is not v2")
    for name, labels, spec in pods(docs):
        if spec.get("enableServiceLinks") is not False:
            found.append(f"{name} gets variables such as MLFLOW_PORT from Kubernetes")
        if "ray.io/cluster" not in labels:
            continue
        variables = {v["name"]: v["value"] for v in spec["containers"][0].get("env", [])}
        if spec is cluster["headGroupSpec"]["template"]["spec"]:
            if float(variables.get("RAY_JOB_STOP_WAIT_TIME_S", 3)) <= grace_s:
                found.append(f"`ray job stop` kills a job within its {grace_s:.0f} s of grace")
        elif float(variables.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30)) < grace_s:
            found.append(f"{name} is drained for less than a run's {grace_s:.0f} s of grace")
        drain = float(variables.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
        if spec.get("terminationGracePeriodSeconds", 30) <= drain:
            found.append(f"{name} is killed before Ray's {drain:.0f} s of draining end")
    deployment = named(docs, "Deployment", "mlflow")["spec"]
    if deployment["replicas"] != 1 or deployment["strategy"] != {"type": "Recreate"}:
        found.append("two MLflow pods could open one sqlite file")
    return found

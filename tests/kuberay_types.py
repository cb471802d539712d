"""Checks a RayJob (`ray.io/v1`) against KubeRay 1.7: the fields of its types, and the rules of its operator.

No package registry has the resource definitions, so the fields are copied from KubeRay's API reference. Pod templates
are checked against Kubernetes' schema by `kubernetes-validate`.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import kubernetes_validate
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

KUBERNETES = "1.34"


class Type(BaseModel):
    """A custom resource's type. Unknown fields, which the API server drops silently, are errors; so are numbers for
    strings."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Auth(Type):
    mode: Literal["disabled", "token"] = "token"
    secretName: str | None = None
    enableK8sTokenAuth: bool | None = None


class Autoscaler(Type):
    version: Literal["v1", "v2"] | None = None
    idleTimeoutSeconds: int | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    resources: dict[str, Any] | None = None
    image: str | None = None
    imagePullPolicy: str | None = None
    env: list[dict[str, Any]] | None = None
    envFrom: list[dict[str, Any]] | None = None
    volumeMounts: list[dict[str, Any]] | None = None
    securityContext: dict[str, Any] | None = None


class Group(Type):
    template: dict[str, Any]
    rayStartParams: dict[str, str] = {}
    resources: dict[str, str] | None = None
    labels: dict[str, str] | None = None


class Head(Group):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    headService: dict[str, Any] | None = None
    enableIngress: bool | None = None
    ingressOptions: dict[str, Any] | None = None


class Workers(Group):
    groupName: str
    replicas: NonNegativeInt | None = None
    minReplicas: NonNegativeInt = 0
    maxReplicas: NonNegativeInt = 2**31 - 1
    numOfHosts: PositiveInt | None = None
    idleTimeoutSeconds: int | None = None
    priority: int | None = None
    suspend: bool | None = None
    scaleStrategy: dict[str, Any] | None = None


class Cluster(Type):
    headGroupSpec: Head
    workerGroupSpecs: list[Workers] = []
    rayVersion: str | None = None
    authOptions: Auth | None = None
    enableInTreeAutoscaling: bool | None = None
    autoscalerOptions: Autoscaler | None = None
    gcsFaultToleranceOptions: dict[str, Any] | None = None
    headServiceAnnotations: dict[str, str] | None = None
    historyServerOptions: dict[str, Any] | None = None
    managedBy: str | None = None
    networkPolicy: dict[str, Any] | None = None
    suspend: bool | None = None
    tlsOptions: dict[str, Any] | None = None
    upgradeStrategy: dict[str, Any] | None = None


class Job(Type):
    rayClusterSpec: Cluster | None = None
    clusterSelector: dict[str, str] | None = None
    entrypoint: str = ""
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    entrypointResources: str | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    submitterPodTemplate: dict[str, Any] | None = None
    submitterConfig: dict[str, Any] | None = None
    backoffLimit: NonNegativeInt = 0
    activeDeadlineSeconds: PositiveInt | None = None
    preRunningDeadlineSeconds: PositiveInt | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: NonNegativeInt = 0
    deletionStrategy: dict[str, Any] | None = None
    runtimeEnvYAML: str = ""
    metadata: dict[str, str] | None = None
    jobId: str | None = None
    managedBy: str | None = None
    suspend: bool = False


class RayJob(Type):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: dict[str, Any]
    spec: Job


NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
MAX_NAME = 47
RESOURCE_PARAMS = {"num-cpus", "num-gpus", "memory", "resources"}


def problems(manifest: dict[str, Any]) -> list[str]:
    """Fields of a RayJob that KubeRay or Kubernetes refuses, drops or misreads; empty if there are none."""
    try:
        job = RayJob.model_validate(manifest)
    except ValidationError as error:
        return [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
    spec, cluster = job.spec, job.spec.rayClusterSpec
    found = _of_name("metadata.name", job.metadata.get("name", ""), MAX_NAME)
    if cluster is None:
        return [*found, "rayClusterSpec is missing"]
    if spec.ttlSecondsAfterFinished and not spec.shutdownAfterJobFinishes:
        found.append("ttlSecondsAfterFinished does nothing without shutdownAfterJobFinishes")
    if spec.submitterPodTemplate:
        found += _of_pod("submitterPodTemplate", spec.submitterPodTemplate, restart=("Never", "OnFailure"))
    return found + _of_cluster(cluster)


def _of_cluster(cluster: Cluster) -> list[str]:
    found = []
    if cluster.authOptions and cluster.authOptions.mode == "token" and _version(cluster.rayVersion) < (2, 52):
        found.append(f"rayVersion {cluster.rayVersion}: token authentication needs 2.52")
    scaler = cluster.autoscalerOptions
    if scaler and scaler.version == "v2" and not cluster.enableInTreeAutoscaling:
        found.append("autoscalerOptions without enableInTreeAutoscaling")
    names = [group.groupName for group in cluster.workerGroupSpecs]
    found += [f"groupName {name} stands twice" for name in sorted({n for n in names if names.count(n) > 1})]
    found += _of_group("head", cluster.headGroupSpec)
    for group in cluster.workerGroupSpecs:
        found += _of_name("groupName", group.groupName, 63) + _of_group(group.groupName, group)
        if not group.minReplicas <= (group.replicas or 0) <= group.maxReplicas:
            found.append(
                f"{group.groupName}: replicas {group.replicas} outside {group.minReplicas}-{group.maxReplicas}"
            )
    return found


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (text or "0").split(".")[:2])


def _of_group(name: str, group: Group) -> list[str]:
    found = _of_pod(name, group.template, restart=("Never",))
    if "labels" in group.rayStartParams:
        found.append(f"{name}: rayStartParams.labels is refused; use labels")
    if group.resources and RESOURCE_PARAMS & group.rayStartParams.keys():
        found.append(f"{name}: resources stand in rayStartParams and in resources")
    for key, value in (group.labels or {}).items():
        if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value) or key.startswith("ray.io/"):
            found.append(f"{name}: label {key}: {value} is none")
    return found


def _of_pod(name: str, template: dict[str, Any], restart: tuple[str, ...]) -> list[str]:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
    found = [f"{name}: {line}" for line in kubernetes_problems(pod)]
    spec = template.get("spec", {})
    if not spec.get("containers"):
        found.append(f"{name}: spec.containers is empty")
    if spec.get("restartPolicy", "Never") not in restart:
        found.append(f"{name}: restartPolicy {spec['restartPolicy']} is refused")
    for container in spec.get("containers", []):
        if any(each["name"] == "RAY_enable_autoscaler_v2" for each in container.get("env", [])):
            found.append(f"{name}: RAY_enable_autoscaler_v2 is refused beside autoscalerOptions.version")
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        missing = {mount["name"] for mount in container.get("volumeMounts", [])} - volumes
        found += [f"{name}: no volume {volume}" for volume in sorted(missing)]
        limits = container.get("resources", {}).get("limits", {})
        found += [f"{name}: no limit of {kind}" for kind in ("cpu", "memory") if kind not in limits]
    return found


def _of_name(key: str, name: str, longest: int) -> list[str]:
    return [] if NAME.fullmatch(name) and len(name) <= longest else [f"{key}: {name!r} is no name"]


def kubernetes_problems(manifest: dict[str, Any]) -> list[str]:
    """Violations of the schema of Kubernetes' own kinds; unknown fields count."""
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}"]
    return []

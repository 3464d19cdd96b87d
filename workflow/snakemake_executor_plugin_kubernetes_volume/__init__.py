"""Snakemake's executor `kubernetes` for pods that share a volume: `executor: kubernetes-volume`.

The plugin itself knows no shared file system: it takes from a pod what a rule declares as output, and gives the next
pod what a rule declares as input. Stages keep more than that, such as checkpoints, samples so far and the weights
beside a manifest (docs/cluster.md). Here every pod starts in the folder where Snakemake was started, on the volume.
Snakemake finds this package by its name.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import snakemake_executor_plugin_kubernetes as plugin
from kubernetes.client import BatchV1Api, CoreV1Api, V1EmptyDirVolumeSource, V1Job, V1Volume, V1VolumeMount
from snakemake_executor_plugin_kubernetes import ExecutorSettings

__all__ = ["Executor", "ExecutorSettings", "common_settings"]

common_settings = replace(
    plugin.common_settings,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    auto_deploy_default_storage_provider=False,  # or every pod asks a package index for all storage plugins
)


class Executor(plugin.Executor):
    """The plugin's, in a folder of the volume, with its requests to Kubernetes as `_Jobs` and `_Pods` mend them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.batchapi, self.kubeapi = _Jobs(), _Pods()

    def get_job_exec_prefix(self, job: Any) -> str:
        return f"cd {shlex.quote(str(Path.cwd()))}"


class _Jobs(BatchV1Api):
    def create_namespaced_job(self, namespace: str, body: V1Job, **options: Any) -> V1Job:
        """With shared memory up to the memory of the pod: the 64 MB of a container are too few for several GPUs."""
        pod = body.spec.template.spec
        pod.volumes.append(V1Volume(name="shm", empty_dir=V1EmptyDirVolumeSource(medium="Memory")))
        pod.containers[0].volume_mounts.append(V1VolumeMount(name="shm", mount_path="/dev/shm"))
        return super().create_namespaced_job(namespace, body, **options)


class _Pods(CoreV1Api):
    def read_namespaced_pod_log(self, name: str, namespace: str, **options: Any) -> str:
        """The log of a failed pod. The plugin asks for that of the container before it; there is none, for pods are
        not restarted, and the refusal would end the whole run in place of one job."""
        return super().read_namespaced_pod_log(name, namespace, **options | {"previous": False})

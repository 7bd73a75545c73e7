"""The address of a VM of KubeVirt. Apart from its session, which imports a websocket library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KubevirtTarget:
    """A VirtualMachineInstance.

    Attributes:
        namespace: of the instance.
        name: of the instance; it is that of the VM.
        context: of the kubeconfig; empty: the current one, or the account of the pod in which this runs.
    """

    namespace: str
    name: str
    context: str = ""

    def __str__(self) -> str:
        context = f"{self.context}/" if self.context else ""
        return f"kubevirt://{context}{self.namespace}/{self.name}"

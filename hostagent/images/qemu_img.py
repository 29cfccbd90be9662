"""qemu-img check: an image's tables are walked by an unprivileged program under limits (hostagent.images.tool).

The image is named by a `json:` description with `backing: null`, so nothing that its header names is opened. QEMU's
image locks stay on: an image that somebody writes is `busy`, not checked against tables that move. Our own leases are
read locks and do not stand in the way.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from typing import Any

from hostagent.images.chain import OpenChain
from hostagent.images.tool import Finished, RunAs, Tool, ToolLimits, alone, grasped, reason
from jobs.errors import JobError
from jobs.model import Layer

_CLEAN, _CORRUPT, _LEAKS, _NOT_SUPPORTED = 0, 2, 3, 63  # exit statuses in qemu-img(1)
_SKIP = "or say --check never"

__all__ = ["CheckResult", "QemuImg", "RunAs", "ToolLimits"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """An image without corruption. `supported` is False for raw, which has nothing to check."""

    path: str
    leaks: int = 0
    supported: bool = True
    warning: str | None = None


class QemuImg:
    """Runs qemu-img as `user`; None is the user that we are."""

    def __init__(self, *, user: RunAs | None, limits: ToolLimits, binary: str = "qemu-img") -> None:
        self._limits = limits
        self._tool = Tool(user=user, limits=limits, binary=binary)

    async def check(self, opened: OpenChain, *, layer: int = 0) -> CheckResult:
        """Check one layer, alone. Leaked clusters are a warning; corruption is `image_corrupt`."""
        image = opened.chain.layers[layer]
        if image.format == "raw":
            return CheckResult(image.path, supported=False)
        with grasped(opened.fds[layer]) as (handle,):
            try:
                finished = await self._tool.read(["check", "--output=json", alone(image.format, handle)], [handle])
            except TimeoutError:
                raise JobError(
                    "timeout",
                    f"the check of {image.path} took longer than images.check_timeout ({self._limits.timeout:g} s)",
                    remedy=f"raise images.check_timeout, {_SKIP}",
                    value=image.path,
                ) from None
        return self._judge(finished, image, f"/proc/self/fd/{handle}")

    def _judge(self, finished: Finished, image: Layer, handle: str) -> CheckResult:
        if finished.status == _NOT_SUPPORTED:
            return CheckResult(image.path, supported=False)
        if finished.status < 0:
            raise self._killed(finished.status, image)
        said = finished.said.replace(handle, image.path)
        report = _report(finished.stdout)
        if finished.status == _CORRUPT:
            count = report.get("corruptions", "some")
            remedy = f"restore it from a copy, or try qemu-img check -r all on one; {_SKIP} at your own risk"
            raise JobError("image_corrupt", f"{image.path} has {count} corruptions", remedy=remedy, value=image.path)
        if finished.status == _LEAKS:
            leaks = int(report.get("leaks", 0))
            return CheckResult(image.path, leaks=leaks, warning=f"{image.path} has {leaks} leaked clusters (harmless)")
        if finished.status != _CLEAN:
            raise _failed(image, finished, said)
        return CheckResult(image.path)

    def _killed(self, status: int, image: Layer) -> JobError:
        name = signal.Signals(-status).name
        message = f"the check of {image.path} was ended by {name}: it needs more than its limits, or it crashed"
        remedy = f"raise images.tool_cpu ({self._limits.cpu} s) or images.tool_memory ({self._limits.memory}), {_SKIP}"
        return JobError("limit", message, remedy=remedy, value=image.path)


def _report(stdout: bytes) -> dict[str, Any]:
    try:
        report = json.loads(stdout)
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def _failed(image: Layer, finished: Finished, said: str) -> JobError:
    """The check did not come to an end; find out why from what it said."""
    last = said.splitlines()[-1][:500] if said else "qemu-img gave no reason"
    code, remedy = reason(finished, image.path) or ("image_invalid", "restore it from a copy")
    if code == "limit":
        remedy = f"{remedy}, {_SKIP}"
    return JobError(code, f"{image.path} cannot be checked: {last}", remedy=remedy, value=image.path)

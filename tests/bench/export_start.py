"""How long until an image can be read over NBD: through the agent, and by qemu-nbd alone.

Both end with a client's handshake, since being connectable is what a caller waits for. The agent also leases and grants
every layer, remembers the export durably, and shakes hands by itself before it says `running`.
"""

from __future__ import annotations

import time
from pathlib import Path

from hostagent.nbdclient import connection, conversations
from tests.bench import bare
from tests.bench.figure import Figure, Result, median
from tests.bench.stage import Stage, alternate
from tests.harness import MIB, raw_image

NAME = "export-start"
RUNS = 20
SIZE = 64 * MIB
TARGET_RATIO = 4.0
NBD_TIMEOUT = 10.0


def measure(stage: Stage) -> Figure:
    why = "" if connection.available() else "needs libnbd's Python binding (python3-libnbd)"
    ours: list[float] = []
    bares: list[float] = []
    runs = 0 if why else stage.count(RUNS)
    base = raw_image(stage.folder / "base.raw", SIZE)
    with stage.overlay(base) as overlay, stage.agent() as agent:

        def by_agent() -> None:
            began = time.perf_counter()
            export = agent.export(overlay)
            conversations.handshake(export["socket"], export["id"], NBD_TIMEOUT)
            ours.append(time.perf_counter() - began)
            agent.delete(f"/v1/exports/{export['id']}?force=true")

        for number in range(runs):
            stage.say(f"{NAME}: run {number + 1} of {runs}")
            alternate(number, by_agent, lambda: bares.append(_qemu_nbd(overlay)))
    base.unlink()
    ratios = [a / b for a, b in zip(ours, bares, strict=True)]
    return Figure(
        name=NAME,
        measured="POST of an export of a 2-layer chain until a client's handshake is done",
        peer="`qemu-nbd --fork` of the same chain until a client's handshake is done",
        runs=runs,
        results=(Result("agent / qemu-nbd, median", median(ratios) if ratios else None, TARGET_RATIO, "x", why=why),),
        details={"agent_ms": 1000 * median(ours), "qemu_nbd_ms": 1000 * median(bares)} if ratios else {},
    )


def _qemu_nbd(image: Path) -> float:
    socket = image.with_name("bare-nbd.sock")
    began = time.perf_counter()
    with bare.nbd_server(image, socket):
        conversations.handshake(str(socket), "", NBD_TIMEOUT)
        return time.perf_counter() - began

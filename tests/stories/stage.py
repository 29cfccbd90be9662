"""The real side of a story: an agent with images and exports, how a job is run to its end, and what comes in between."""

from __future__ import annotations

import contextlib
import http.client
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness import AgentProcess, ApiError, Json, overlay, reachable
from tests.qemu.faults import HASTE, PATIENCE, Reader, eventually, send, storage_daemons
from tests.stories import checks
from tests.stories.foresight import Fate, Foresight, Use
from tests.stories.model import CLUSTER, CLUSTERS, Image, Tree
from tests.stories.tally import Tally

BANDWIDTH = 4 << 20
"""Bytes a second: a job takes half a second, so that what comes between does."""
CALM = ("nothing", "nothing", "pause", "speed", "drain")
ROUGH = ("kill agent", "kill agent", "kill agent at the request", "kill daemons", "kill both", "abort", "abort")
ENDED = ("completed", "failed", "aborted")


@dataclass(frozen=True)
class Between:
    """What happens `delay` seconds after a job was asked for, and whether a client reads an export meanwhile."""

    what: str = "nothing"
    delay: float = 0.0
    reads: bool = False

    @classmethod
    def chosen(cls, dice: random.Random) -> Between:
        what = dice.choice(CALM if dice.random() < 0.5 else ROUGH)
        short = what == "kill agent at the request" or dice.random() < 0.3
        return cls(what, dice.uniform(0, 0.03 if short else 0.8), dice.random() < 0.35)

    @property
    def kills_daemons(self) -> bool:
        return self.what in ("kill daemons", "kill both")

    def lawful(self, fate: Fate | None) -> set[str]:
        """The states that a job may end in."""
        found = {fate.outcome if fate else "completed"}
        return found | ({"failed"} if self.kills_daemons else set()) | ({"aborted"} if self.what == "abort" else set())


class Stage:
    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.home = Path(tempfile.mkdtemp(prefix="stories-"))
        self.folder = self.home / "images"
        self.folder.mkdir(mode=0o755)
        with reachable(self.folder):
            pass
        self.agent = AgentProcess(self.home, HASTE)
        self.agent.start()
        self.tree = Tree()
        self.exports: dict[str, Json] = {}
        self.waiting: dict[str, Json] = {}
        self.massacres = 0  # of all storage daemons
        """Copies that stay ready, by their jobs' ids: what was asked for."""
        self.jobs: dict[str, str] = {}
        self.story: list[str] = []
        self.seen = checks.Seen(tally)
        self._names = 0

    def close(self) -> None:
        self.agent.close()
        shutil.rmtree(self.home, ignore_errors=True)

    def tell(self, *words: object) -> None:
        self.story.append(" ".join(map(str, words)))

    # Images

    def base(self) -> Image:
        path = self.name("raw")
        view = [n % 7 + 1 + len(self.tree.images) * 10 for n in range(CLUSTERS)]
        path.write_bytes(checks.bytes_of(view))
        path.chmod(0o600)
        image = self.tree.images[path] = Image(path, "raw", None, view)
        return image

    def overlay(self, backing: Image) -> Image:
        path = overlay(self.name("qcow2"), backing.path, backing.format)
        assert backing.view is not None
        view = list(backing.view)
        words = []
        for n in range(3):
            tag, cluster = (100 + self._names + n) % 256, (self._names * 5 + n * 11) % CLUSTERS
            words += ["-c", f"write -q -P {tag} {cluster * CLUSTER} {CLUSTER}"]
            view[cluster] = tag
        subprocess.run(["qemu-io", *words, str(path)], check=True, timeout=PATIENCE)
        image = self.tree.images[path] = Image(path, "qcow2", backing.path, view)
        return image

    def empty(self, format: str, backing: Image | None) -> Path:
        """An image for a copy to write over."""
        path = self.name(format)
        below = ["-b", backing.path.name, "-F", backing.format] if backing else []
        command = ["qemu-img", "create", "-q", "-f", format, *below, str(path), str(CLUSTER * CLUSTERS)]
        subprocess.run(command, check=True, timeout=PATIENCE)
        path.chmod(0o600)
        return path

    def name(self, suffix: str) -> Path:
        self._names += 1
        return self.folder / f"image{self._names}.{suffix}"

    @property
    def foresight(self) -> Foresight:
        uses = [
            Use(top, frozenset(self.tree.chain(top)), writer=export["writable"], apart=bool(export["bitmaps"]))
            for export in self.exports.values()
            for top in [Path(export["path"])]
        ]
        for body in self.waiting.values():
            top = Path(body["target"])
            files = frozenset([*self.tree.chain(top), Path(body["dest"])])
            below = self.tree.images[top].backing if body["shallow"] else None
            uses.append(Use(top, files, job=True, part_on=below))
        return Foresight(self.tree, uses)

    def bitmaps(self, image: Image) -> list[Json]:
        found: list[Json] = self.agent.get(checks.bitmaps_of(image))["items"]
        return found

    # Requests

    def asked(self, kind: str, fate: Fate | None, path: str, body: Json, *, excused: bool = False) -> Json | None:
        """The answer, None where a refusal was foreseen and came."""
        try:
            answer: Json = self.agent.post(path, body)
        except ApiError as error:
            self.refused(kind, fate, error, excused=excused)
            return None
        assert fate is None or fate.outcome != "refused", (kind, body, f"was obeyed, {fate} was foreseen")
        return answer

    def refused(self, kind: str, fate: Fate | None, error: ApiError, *, excused: bool = False) -> None:
        self.tally.count(kind, f"refused {error.code}")
        self.tell("  refused:", error)
        foreseen = fate is not None and (fate.outcome, fate.code) == ("refused", error.code)
        assert foreseen or (excused and error.code == "busy"), (kind, fate, error, error.body)

    # Jobs

    def work(self, kind: str, path: str, body: Json, fate: Fate | None, between: Between) -> list[Json] | None:
        """The jobs when they have ended, None when they were refused, as was foreseen."""
        body = {"id": str(uuid.uuid4()), "bandwidth": BANDWIDTH, **body}
        self.tell(kind, body, between, fate)
        with self._reading(between):
            if between.what == "kill agent at the request":
                self._cut_off(path, body, between.delay)
            answer = self.asked(kind, fate, path, body)
            if answer is None:
                return None
            names = [job["id"] for job in answer.get("jobs", [answer])]
            time.sleep(between.delay)
            self._interfere(between.what, names[-1])
            jobs = self.until_ended(names, body.get("completion") or "pivot")
        self.judge(kind, jobs, fate, between)
        return jobs

    def judge(self, kind: str, jobs: list[Json], fate: Fate | None, between: Between) -> None:
        for job in jobs:
            self.jobs[job["id"]] = job["state"]
            self.tell("  ended:", job["state"], job["error"], job["revocation"])
            code = f" {job['error']['code']}" if job["error"] else ""
            assert job["state"] in between.lawful(fate), (between, fate, job)
            if fate is not None and job["state"] == "failed" and not between.kills_daemons:
                assert job["error"]["code"] == fate.code, (fate, job)
            shorter = job["completion"] != "finish"
            self.tree.ended(Path(job["target"]), completed=job["state"] == "completed", shorter=shorter)
        assert len({job["state"] for job in jobs}) == 1, jobs
        self.tally.count(kind, f"{jobs[0]['state']}{code}")
        self.tally.facts[f"jobs with: {between.what}"] += 1
        self.follow()

    def _cut_off(self, path: str, body: Json, delay: float) -> None:
        """A request whose agent is killed about then: obeyed whole, or not at all."""

        def ask() -> None:
            with contextlib.suppress(ApiError, OSError, ValueError, http.client.HTTPException):
                self.agent.post(path, body)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        time.sleep(delay)
        self.kill_agent()
        asking.join(PATIENCE)

    @contextlib.contextmanager
    def _reading(self, between: Between) -> Iterator[None]:
        """A client that compares all that it reads, and is cut off only when its storage daemon is killed."""
        images = self.tree.images
        served = [one for one in self.exports.values() if images[Path(one["path"])].view and not one["writable"]]
        if not between.reads or not served:
            yield
            return
        truth = self.home / "truth.raw"
        truth.write_bytes(checks.bytes_of(images[Path(served[-1]["path"])].view or []))
        massacres = self.massacres
        with Reader(served[-1]["uri"], truth) as reader:
            yield
            if self.massacres > massacres:  # what was refused waits for no kill
                assert reader.cut_off(), reader.process.returncode
            else:
                self.tally.facts["reads beside jobs"] += reader.stop()

    def until_ended(self, names: list[str], completion: str) -> list[Json]:
        asks: dict[str, tuple[str, Any]] = {
            "paused": ("resume", None),
            "waiting": ("next", None),
            "ready": ("complete", {"completion": completion}),
        }
        deadline = time.monotonic() + 3 * PATIENCE
        while time.monotonic() < deadline:
            jobs = [self.agent.job(name) for name in names]
            if all(job["state"] in ENDED and job["revocation"] != "pending" for job in jobs):
                return jobs
            for job in jobs:
                if job["state"] in asks:
                    what, request = asks[job["state"]]
                    path = f"/v1/jobs/{job['id']}/{what}"
                    self._order(lambda path=path, request=request: self.agent.post(path, request))  # type: ignore[misc]
            time.sleep(0.02)
        raise AssertionError(f"the jobs stay {jobs}")

    def _interfere(self, what: str, name: str) -> None:
        match what:
            case "kill agent":
                self.kill_agent()
            case "kill daemons":
                self.kill_daemons()
            case "kill both":
                self.kill_daemons(agent=True)
            case "drain":
                self.agent.post("/v1/host/drain", {"pause": True})
                self.agent.delete("/v1/host/drain")
            case "speed":
                self._order(lambda: self.agent.patch(f"/v1/jobs/{name}", {"bandwidth": 4 * BANDWIDTH}))
            case "abort" | "pause":
                self._order(lambda: self.agent.post(f"/v1/jobs/{name}/{what}"))

    def _order(self, order: Callable[[], object]) -> None:
        """One that may come too late."""
        try:
            order()
        except ApiError as error:
            assert error.code in ("conflict", "busy"), error

    # Kills

    def kill_agent(self) -> None:
        self.tally.facts["kills of the agent"] += 1
        self.agent.kill()
        self.agent.start()

    def kill_daemons(self, *, agent: bool = False) -> None:
        """Of all storage daemons; what was written through them is not closed in order."""
        found = storage_daemons(self.agent)
        self.tally.facts["kills of storage daemons"] += len(found)
        if agent:
            self.tally.facts["kills of the agent"] += 1
            self.agent.kill()
        send(signal.SIGKILL, *found)
        self.massacres += 1
        for export in self.exports.values():
            if export["writable"]:
                self.tree.doubted(Path(export["path"]))
        if agent:
            self.agent.start()

    def follow(self) -> None:
        """A pivot takes exports along, and a killed storage daemon ends them."""
        assert eventually(self._daemons_known), "a dead storage daemon is not noticed"
        for name in list(self.exports):
            export = self.agent.get(f"/v1/exports/{name}")
            if export["state"] == "running":
                self.exports[name] = export
            else:
                assert export["state"] == "lost", export
                del self.exports[name]

    def _daemons_known(self) -> bool:
        alive = set(storage_daemons(self.agent))
        exports = [self.agent.get(f"/v1/exports/{name}") for name in self.exports]
        users = [*exports, *self.agent.get("/v1/host")["storage_daemons"]]
        return all(user["pid"] in alive for user in users if user["state"] == "running")

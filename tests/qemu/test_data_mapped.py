"""Images served from the files of their layers, against what QEMU itself reads of them, byte by byte."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostagent.data.backends.base import Extent, ImageBackend
from hostagent.data.backends.holds import Holds
from hostagent.data.backends.layers import open_layers
from hostagent.data.backends.mapped import mapped
from hostagent.data.backends.mapping import Unmappable
from hostagent.data.backends.qemu_map import MapLimits
from hostagent.data.backends.registry import Opening
from hostagent.data.streams import PIECE, Stopped
from hostagent.errors import AgentError
from hostagent.extents import merged
from hostagent.qemu_locks import AGENT_BYTE, first_taken
from tests.ends import Collected, noise
from tests.qemu_export import Export

MIB, KIB = 1 << 20, 1 << 10
pytestmark = pytest.mark.qemu


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


@dataclass
class Stage:
    """An image, its export, and the backend before it, as a ticket has them."""

    image: Path
    format: str
    folders: list[str] | None = None
    limits: MapLimits = field(default_factory=MapLimits)

    def __post_init__(self) -> None:
        self.export = Export(self.image, self.format)
        self.holds = Holds()
        self.shared: dict[str, Any] = {}
        self.told: list[str] = []

    def open(
        self, image: dict[str, object] | None = None, claim: Callable[[str], list[int]] | None = None
    ) -> ImageBackend:
        folders = [str(self.image.parent)] if self.folders is None else self.folders
        factory = mapped(
            self.export.factory(),
            folders,
            lambda _, name: claim(name) if claim else [],
            self.holds,
            self.limits,
            self.told.append,
        )
        said: dict[str, object] = {"path": str(self.image), "format": self.format} if image is None else image
        return factory(Opening("nbd:", 1 << 50, image=said, shared=self.shared))


@contextlib.contextmanager
def staged(*args: Any, **options: Any) -> Iterator[Stage]:
    stage = Stage(*args, **options)
    try:
        yield stage
    finally:
        stage.export.stop()


def copied(backend: ImageBackend, offset: int, length: int, sink: Collected | None = None) -> bytes:
    sink = sink or Collected()
    with backend.open_session() as session:
        session.copy_to(sink, offset, length)
    return bytes(sink.data)


def converted(image: Path, format: str) -> bytes:
    raw = image.with_suffix(".converted")
    run("qemu-img", "convert", "-f", format, "-O", "raw", image, raw)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


# Generated chains

Step = tuple[str, int, int]
UNIT = 4 * KIB


@dataclass(frozen=True)
class LayerPlan:
    format: str
    size: int  # in UNITs
    cluster: int
    old: bool
    steps: list[Step]


@dataclass(frozen=True)
class Plan:
    layers: list[LayerPlan]
    shrink: int | None
    ranges: list[tuple[int, int]]


@pytest.fixture(scope="module", autouse=True)
def noises(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is written: a byte from elsewhere is never the right one."""
    folder = tmp_path_factory.mktemp("noise")
    for number, path in enumerate(NOISE):
        NOISE[number] = str(folder / path)
        Path(NOISE[number]).write_bytes(noise(256 * KIB, number))


NOISE = [f"noise{number}" for number in range(7)]


def layer_plans(format: st.SearchStrategy[str]) -> st.SearchStrategy[LayerPlan]:
    what = st.sampled_from(["write", "write", "write -z", "write -z -u", "discard", "write -c"])
    step = st.tuples(what, st.integers(0, 255), st.integers(1, 64))
    return st.builds(
        LayerPlan,
        format=format,
        size=st.integers(1, 256),
        cluster=st.sampled_from([4 * KIB, 16 * KIB, 64 * KIB]),
        old=st.booleans(),
        steps=st.lists(step, max_size=6),
    )


plans = st.builds(
    Plan,
    layers=st.builds(
        lambda base, above: [base, *above],
        layer_plans(st.sampled_from(["raw", "qcow2"])),
        st.lists(layer_plans(st.just("qcow2")), max_size=3),
    ),
    shrink=st.none() | st.integers(1, 256),
    ranges=st.lists(st.tuples(st.integers(0, MIB), st.integers(0, MIB)), max_size=4),
)


def build(plan: Plan, folder: Path) -> tuple[Path, str]:
    below: Path | None = None
    for number, layer in enumerate(plan.layers):
        path = folder / f"layer{number}.{layer.format}"
        options = f"cluster_size={layer.cluster},compat={'0.10' if layer.old else '1.1'}"
        words: list[str | Path] = ["qemu-img", "create", "-q", "-f", layer.format]
        if layer.format == "qcow2":
            words += ["-o", options]
        if below is not None:
            words += ["-b", below, "-F", plan.layers[number - 1].format]
        run(*words, path, str(layer.size * UNIT))
        fill(path, layer, number)
        below = path
    assert below is not None
    base = plan.layers[0]
    if plan.shrink is not None and plan.shrink < base.size and len(plan.layers) > 1:
        run(
            "qemu-img",
            "resize",
            "-q",
            "-f",
            base.format,
            "--shrink",
            folder / f"layer0.{base.format}",
            str(plan.shrink * UNIT),
        )
    return below, plan.layers[-1].format


def fill(path: Path, layer: LayerPlan, seed: int) -> None:
    commands: list[str] = []
    touched: set[int] = set()  # clusters; QEMU writes no compressed one over another
    size = layer.size * UNIT
    for number, (what, start, length) in enumerate(layer.steps):
        begin, end = start * UNIT, min((start + length) * UNIT, size)
        clusters = set(range(begin // layer.cluster, -(-end // layer.cluster)))
        pattern = seed * 16 + number + 1
        if what == "write -c" and layer.format == "qcow2":
            free = sorted(one for one in clusters - touched if (one + 1) * layer.cluster <= size)
            for one in free:
                commands += ["-c", f"write -q -c -P {pattern} {one * layer.cluster} {layer.cluster}"]
        elif begin < end:
            verb = {"write -c": "write", "write": f"write -s {NOISE[pattern % len(NOISE)]}"}.get(what, what)
            verb = "write -z" if layer.format == "raw" and what == "write -z -u" else verb
            commands += ["-c", f"{verb.replace(' ', ' -q ', 1) if ' ' in verb else verb + ' -q'} {begin} {end - begin}"]
        touched |= clusters
    if commands:
        run("qemu-io", "-f", layer.format, *commands, path)


def check(plan: Plan, folder: Path) -> None:
    image, format = build(plan, folder)
    expected = converted(image, format)
    with staged(image, format) as stage:
        backend = stage.open()
        assert backend.size() == len(expected)
        assert copied(backend, 0, len(expected)) == expected
        for start, length in plan.ranges:
            start = min(start, len(expected))
            length = min(length, len(expected) - start)
            assert copied(backend, start, length) == expected[start : start + length]
            assert backend.read(start, length) == expected[start : start + length]
        assert not stage.told
        lawful(backend, expected, plan.ranges)
        compressed = any(what == "write -c" for layer in plan.layers for what, _, _ in layer.steps)
        assert compressed or not stage.export.read_bytes, "it went by NBD for no reason"


def lawful(backend: ImageBackend, expected: bytes, ranges: list[tuple[int, int]]) -> None:
    """Sorted, gapless, merged; zeros are zeros; a part tells the same as the whole."""
    size = len(expected)
    found = list(merged(backend.extents(0, size)))
    at = 0
    for one in found:
        assert one.start == at and one.length > 0
        at += one.length
        assert not one.zero or not any(expected[one.start : at])
        assert one.zero or not one.hole
    assert at == size
    for start, length in ranges:
        start = min(start, size)
        length = min(length, size - start)
        part = list(merged(backend.extents(start, length)))
        assert sum(one.length for one in part) == length
        for one in part:
            whole = next(each for each in found if each.start <= one.start < each.start + each.length)
            assert (one.zero, one.hole) == (whole.zero, whole.hole)
            assert one.start + one.length <= whole.start + whole.length


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans)
def test_any_chain_reads_as_qemu_reads_it(plan: Plan) -> None:
    with tempfile.TemporaryDirectory(prefix="ha-map-") as folder:
        check(plan, Path(folder))


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans)
def test_many_chains_read_as_qemu_reads_them(plan: Plan) -> None:
    with tempfile.TemporaryDirectory(prefix="ha-map-") as folder:
        check(plan, Path(folder))


def test_holes_are_what_no_layer_has_and_the_export_says_the_same(chain: list[Path]) -> None:
    with staged(chain[1], "qcow2") as stage:
        expected = [Extent(start, length, True, True) for start, length, depth in stage.export.depths() if depth == 0]
        assert not expected, "a raw base has all of it"
    run("qemu-img", "create", "-q", "-f", "qcow2", chain[2].with_name("alone.qcow2"), "8M")
    alone = chain[2].with_name("alone.qcow2")
    run(
        "qemu-io", "-f", "qcow2", "-c", "write -q 1M 64k", "-c", "write -q -z 2M 64k", "-c", "write -q -c 3M 64k", alone
    )
    over = chain[2].with_name("over.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", alone, "-F", "qcow2", over)
    run("qemu-io", "-f", "qcow2", "-c", "write -q 5M 64k", "-c", "write -q -z 6M 64k", over)
    with staged(over, "qcow2") as stage:
        found = list(merged(stage.open().extents(0, 8 * MIB)))
        holes = [(one.start, one.length) for one in found if one.hole]
        assert holes == [(start, length) for start, length, depth in stage.export.depths() if depth == 0]
        assert Extent(6 * MIB, 64 * KIB, True, False) in found
        assert Extent(3 * MIB, 64 * KIB, False, False) in found


# One chain for what follows: raw base, two overlays


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Top first."""
    folder = tmp_path / "img"
    folder.mkdir()
    base, middle, top = folder / "base.raw", folder / "middle.qcow2", folder / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "raw", base, "8M")
    run("qemu-io", "-f", "raw", "-c", "write -q -P 1 0 3M", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", middle)
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 2 1M 1M", "-c", "write -q -z 2M 64k", middle)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", top)
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 3 5000k 100k", top)
    return [top, middle, base]


@pytest.fixture
def stage(chain: list[Path]) -> Iterator[Stage]:
    with staged(chain[0], "qcow2") as stage:
        yield stage


def format_of(path: Path) -> str:
    return path.suffix.removeprefix(".")


def writes(path: Path) -> bool:
    words = ["qemu-io", "-f", format_of(path), "-c", "write -P 9 6M 4k", str(path)]
    return subprocess.run(words, capture_output=True, timeout=30).returncode == 0


def open_marks(paths: list[Path]) -> int:
    """How many of the bytes that QEMU uses are locked."""
    count = 0
    for path in paths:
        with path.open("rb") as file:
            count += sum(first_taken(file.fileno(), [byte]) is not None for byte in range(100, 204))
    return count


def by_nbd(stage: Stage, backend: ImageBackend | None = None) -> bool:
    """Whether it is served by its export, and right."""
    before = stage.export.sessions
    expected = converted(stage.image, stage.format)
    assert copied(backend or stage.open(), 0, len(expected)) == expected
    return stage.export.sessions > before


def test_no_layer_is_written_during_a_transfer_and_each_may_be_right_after(stage: Stage, chain: list[Path]) -> None:
    backend = stage.open()
    with backend.open_session() as session:
        assert not any(writes(path) for path in chain)
        with stage.open().open_session() as other:
            assert other.read(0, 4) == b"\1\1\1\1"
        assert not any(writes(path) for path in chain), "the other transfer's end gave the marks back"
        assert session.read(0, 4) == b"\1\1\1\1"
    assert open_marks(chain) == 0
    assert all(writes(path) for path in reversed(chain))
    assert not stage.export.read_bytes


def test_extents_hold_the_marks_too(stage: Stage, chain: list[Path]) -> None:
    found = stage.open().extents(0, 8 * MIB)
    next(found)
    assert not writes(chain[2])
    list(found)
    assert writes(chain[2])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_image_of_which_somebody_writes_a_layer_goes_by_nbd(which: int, stage: Stage, chain: list[Path]) -> None:
    expected = converted(stage.image, "qcow2")
    path = chain[which]
    words = ["qemu-io", "-f", format_of(path), str(path)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    try:
        process.stdin.write(b"length\n")
        process.stdin.flush()
        process.stdout.readline()
        assert "is open for writing" in why_not(chain[0], "qcow2", marks=False)
    finally:
        process.communicate(b"quit\n", timeout=20)
    assert copied(stage.open(), 0, 100) == expected[:100]
    assert not stage.told


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_was_written_between_two_transfers_is_seen(which: int, stage: Stage, chain: list[Path]) -> None:
    """A client puts them together, for they have one ETag. Another ticket reads what is there now."""
    assert copied(stage.open(), 0, MIB) == converted(stage.image, "qcow2")[:MIB]
    run("qemu-io", "-f", format_of(chain[which]), "-c", f"write -q -P {20 + which} {which}M 128k", chain[which])
    with pytest.raises(AgentError) as caught:
        copied(stage.open(), MIB, MIB)
    assert caught.value.code == "image_changed"
    assert open_marks(chain) == 0
    stage.shared.clear()
    assert copied(stage.open(), 0, 8 * MIB) == converted(stage.image, "qcow2")
    assert not stage.export.read_bytes


def test_the_map_is_made_once_for_all_connections_of_a_ticket(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    time.sleep(0.05)  # files that were just written are not trusted to tell when they were
    runs: list[object] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: (runs.append(a), popen(*a, **k))[1])
    stage.open().size()
    before = len(runs)
    threads = [threading.Thread(target=copied, args=(stage.open(), 0, 8 * MIB)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(3):
        copied(stage.open(), 0, 8 * MIB)
    assert len(runs) - before == 1


def test_a_file_that_somebody_writes_without_asking_ends_the_transfer(stage: Stage, chain: list[Path]) -> None:
    with stage.open().open_session() as session:
        with chain[2].open("r+b") as file:
            file.write(b"x")
        sink = Collected()
        with pytest.raises(AgentError) as caught:
            session.copy_to(sink, 0, 8 * MIB)
        assert caught.value.code == "image_changed"
        assert len(sink.data) < 8 * MIB, "whoever downloads it takes it for complete"
        with pytest.raises(AgentError):
            session.read(0, 10)


def test_a_file_that_somebody_cuts_is_not_padded(stage: Stage, chain: list[Path]) -> None:
    with stage.open().open_session() as session:
        os.truncate(chain[2], 65536)
        sink = Collected()
        with pytest.raises(AgentError) as caught:
            session.copy_to(sink, 0, 8 * MIB)
        assert caught.value.code == "image_changed"
        assert len(sink.data) <= MIB


def test_locks_are_held_so_long_and_then_it_goes_on_by_nbd(chain: list[Path]) -> None:
    expected = converted(chain[0], "qcow2")
    with staged(chain[0], "qcow2", limits=MapLimits(hold=0.3)) as stage:
        backend = stage.open()
        backend.size()
        late = Collected(before=lambda: time.sleep(0.35) if len(late.data) == 2 * MIB else None)
        with backend.open_session() as session:
            session.copy_to(late, 0, 8 * MIB)
            assert bytes(late.data) == expected
            assert 0 < stage.export.read_bytes <= 6 * MIB
            assert open_marks([chain[2]]) == 1, "only the export's own"
            assert session.read(5, 10) == expected[5:15]


@pytest.fixture
def tail(tmp_path: Path) -> Path:
    """An image of 8 MiB whose last half is compressed."""
    path = tmp_path / "tail.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
    compressed = [word for at in range(4 << 10, 8 << 10, 64) for word in ("-c", f"write -q -c -P 4 {at}k 64k")]
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 4M", *compressed, path)
    return path


def touched(path: Path) -> None:
    """By somebody who heeds no marks."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def test_a_change_is_seen_also_where_the_end_comes_by_the_export(tail: Path) -> None:
    with staged(tail, "qcow2") as stage:
        changes = [touched]
        sink = Collected(before=lambda: len(sink.data) >= 6 * MIB and changes and changes.pop()(tail))
        with pytest.raises(AgentError) as caught:
            copied(stage.open(), 0, 8 * MIB, sink)
        assert caught.value.code == "image_changed"
        assert 6 * MIB <= len(sink.data) < 8 * MIB
    assert open_marks([tail]) == 0


def test_a_change_is_seen_before_the_marks_are_given_back(chain: list[Path]) -> None:
    with staged(chain[0], "qcow2", limits=MapLimits(hold=0.3)) as stage:

        def late() -> None:
            if len(sink.data) == 2 * MIB:
                touched(chain[2])
                time.sleep(0.35)

        sink = Collected(before=late)
        with pytest.raises(AgentError) as caught:
            copied(stage.open(), 0, 8 * MIB, sink)
        assert caught.value.code == "image_changed"
        assert len(sink.data) < 8 * MIB
        assert open_marks(chain) == 0


def test_locks_are_held_so_long_also_of_what_comes_by_the_export(tail: Path) -> None:
    expected = converted(tail, "qcow2")
    with staged(tail, "qcow2", limits=MapLimits(hold=0.5)) as stage:
        seen: list[bool] = []

        def late() -> None:
            if len(sink.data) >= 6 * MIB:
                time.sleep(0 if seen else 0.55)
                with tail.open("rb") as file:
                    seen.append(first_taken(file.fileno(), [AGENT_BYTE]) is not None)

        sink = Collected(before=late)
        assert copied(stage.open(), 0, 8 * MIB, sink) == expected
        assert seen[0]
        assert not seen[-1], "the marks stayed until the end"


def test_a_fence_ends_what_runs(stage: Stage, chain: list[Path]) -> None:
    backend = stage.open()
    sink = Collected(before=lambda: backend.fence() if len(sink.data) >= MIB else None)
    with pytest.raises(Stopped):
        copied(backend, 0, 8 * MIB, sink)
    assert len(sink.data) <= 2 * PIECE
    assert stage.export.fenced
    with pytest.raises(Stopped):
        backend.open_session()
    assert open_marks(chain) == 0


def test_a_fence_ends_the_wait_for_a_map(chain: list[Path], tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    with staged(chain[0], "qcow2", limits=MapLimits(qemu_img=str(slow))) as stage:
        backend = stage.open()
        threading.Timer(0.3, backend.fence).start()
        began = time.monotonic()
        with pytest.raises(Stopped):
            backend.open_session()
        assert time.monotonic() - began < 10
        assert open_marks(chain) == 0


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exec sleep 60", "took longer"),
        ("echo nonsense", "cannot be read"),
        ("echo '[{\"start\": 0,'", "breaks off"),
        ('echo \'[{"start": 4096, "length": 1, "depth": 0, "zero": true, "data": false}]\'', "gap"),
        ('echo \'[{"start": 0, "length": 1, "depth": 7, "zero": true, "data": false}]\'', "understood"),
        ("echo 'cannot do that' >&2; exit 1", "cannot do that"),
        ("kill -SEGV $$", "failed"),
        ("yes '[' ", "cannot be read"),
        ("exit 0", "breaks off"),
    ],
)
def test_a_map_that_cannot_be_had_is_no_reason_to_fail(
    script: str, why: str, chain: list[Path], tmp_path: Path
) -> None:
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    with staged(chain[0], "qcow2", limits=MapLimits(qemu_img=str(tool), timeout=1.0)) as stage:
        assert by_nbd(stage)
        assert why in stage.told[-1]


def test_an_image_with_too_many_extents_goes_by_nbd(chain: list[Path]) -> None:
    with staged(chain[0], "qcow2", limits=MapLimits(extents=3)) as stage:
        assert by_nbd(stage)
        assert "data.map_extents" in stage.told[0]
        told = len(stage.told)
        assert by_nbd(stage)
        assert stage.told[told] == stage.told[0]


# What may not be mapped


def why_not(path: Path, format: str, *, marks: bool = True) -> str:
    """Without an export: QEMU has its own troubles with such images."""
    with pytest.raises(Unmappable) as caught:
        open_layers({"path": str(path), "format": format}, [str(path.parent)], lambda _: [], Holds())
    assert not marks or open_marks(list(path.parent.iterdir())) == 0
    return str(caught.value)


def image(folder: Path, *options: str | Path, name: str = "x.qcow2") -> Path:
    path = folder / name
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, "2M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 5 0 1M", path)
    return path


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["-o", "extended_l2=on"], "extended L2"),
        (["-o", "data_file={folder}/data.raw"], "external data file"),
        (["-o", "data_file={folder}/data.raw,data_file_raw=on"], "external data file"),
    ],
)
def test_a_strange_image_goes_by_nbd(options: list[str], why: str, tmp_path: Path) -> None:
    path = image(tmp_path, *[option.replace("{folder}", str(tmp_path)) for option in options])
    with staged(path, "qcow2") as stage:
        assert by_nbd(stage)
        assert why in stage.told[0]


@pytest.mark.parametrize(
    ("byte", "bit", "why"),
    [(79, 1, "was not closed"), (79, 2, "corrupt"), (79, 32, "not known"), (35, 2, "encryption")],
)
def test_an_image_with_a_mark_is_not_mapped(byte: int, bit: int, why: str, tmp_path: Path) -> None:
    path = image(tmp_path)
    with path.open("r+b") as file:
        file.seek(byte)
        before = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([before | bit]))
    assert why in why_not(path, "qcow2")


def test_a_layer_outside_the_allowed_folders_is_not_read(chain: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    secret = chain[2].rename(other / "base.raw")
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", secret, "-F", "raw", chain[1])
    with staged(chain[0], "qcow2") as stage:
        assert by_nbd(stage)
        assert "may serve" in stage.told[0]
    with staged(chain[0], "qcow2", folders=[str(tmp_path)]) as stage:
        assert not by_nbd(stage)


def test_a_backing_file_by_a_link_is_not_followed(chain: list[Path]) -> None:
    real = chain[2].rename(chain[2].with_name("real.raw"))
    chain[2].symlink_to(real)
    with staged(chain[0], "qcow2") as stage:
        assert by_nbd(stage)
        assert "symbolic link" in stage.told[0]


def test_a_backing_file_on_the_network_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "nbd:unix:/nowhere", "-F", "raw", path, "2M")
    assert "protocol" in why_not(path, "qcow2")


def test_a_backing_file_whose_format_is_not_said_is_not_read(chain: list[Path]) -> None:
    data = chain[1].read_bytes()
    at = data.index(b"\xe2\x79\x2a\xca", 72, 65536)
    with chain[1].open("r+b") as file:  # the header extension that tells it
        file.seek(at)
        file.write(b"\x6f\x6f\x6f\x6f")
    assert "not said" in why_not(chain[0], "qcow2")


def test_a_chain_that_leads_back_to_itself_is_not_read_for_ever(chain: list[Path]) -> None:
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", chain[0], "-F", "qcow2", chain[1])
    assert "itself" in why_not(chain[0], "qcow2")


def test_a_cluster_beyond_the_end_of_its_file_is_left_to_qemu(tmp_path: Path) -> None:
    """QEMU reads zeros there; whether that is right is not ours to judge."""
    path = image(tmp_path)
    end = path.stat().st_size
    os.truncate(path, end - 4096)
    with staged(path, "qcow2") as stage:
        assert by_nbd(stage)
        assert 0 < stage.export.read_bytes <= MIB


def test_an_export_of_another_size_is_believed(chain: list[Path]) -> None:
    """It is what the ticket names; the image beside it must be the same."""
    with staged(chain[0], "qcow2") as stage:
        other = {"path": str(image(chain[0].parent)), "format": "qcow2"}
        backend = stage.open(other)
        assert copied(backend, 0, 8 * MIB) == converted(chain[0], "qcow2")
        assert "export" in stage.told[0]


def test_a_raw_image_of_no_whole_sectors_is_served_as_its_export_is(tmp_path: Path) -> None:
    path = tmp_path / "odd.raw"
    path.write_bytes(b"\7" * 70001)
    with staged(path, "raw") as stage:
        backend = stage.open()
        size = backend.size()
        with stage.export.open_session() as session:
            expected = session.read(0, size)
        assert copied(backend, 0, size) == expected


@pytest.mark.parametrize("said", [{}, {"path": "x", "format": "raw"}, {"path": "/x"}, {"path": "/x", "format": "vmdk"},
                                  {"files": "n", "formats": []}, {"files": "n", "formats": ["x"]}, {"files": 5}])  # fmt: skip
def test_a_ticket_s_image_that_says_neither_is_refused(said: dict[str, object], stage: Stage) -> None:
    with pytest.raises(AgentError) as caught:
        stage.open(said)
    assert (caught.value.code, caught.value.field) == ("invalid", "image")


def test_a_mapped_image_is_not_written(stage: Stage, chain: list[Path]) -> None:
    backend = stage.open()
    assert backend.get_capabilities()["read_only"]
    assert not backend.supports_range_write
    for call in (lambda: backend.write(b"x", 0), lambda: backend.zero(0, 1), backend.flush):
        with pytest.raises(AgentError) as caught:
            call()
        assert caught.value.code == "denied"


# Handed over by the agent


def hand(chain: list[Path], *, map_: bool = True) -> list[int]:
    fds = [os.open(path, os.O_RDONLY) for path in chain]
    if map_:
        found = run("qemu-img", "map", "--output=json", "-f", "qcow2", chain[0]).stdout
        time.sleep(0.02)
        fds.append(os.memfd_create("map"))
        os.write(fds[-1], found.encode())
    return fds


@pytest.mark.parametrize("map_", [True, False])
def test_layers_that_were_handed_over_are_read(map_: bool, chain: list[Path]) -> None:
    expected = converted(chain[0], "qcow2")
    fds = hand(chain, map_=map_)
    with staged(chain[0], "qcow2", folders=[]) as stage:
        said: dict[str, object] = {"files": "one", "formats": ["qcow2", "qcow2", "raw"]}
        backend = stage.open(said, lambda name: [os.dup(fd) for fd in fds])
        with backend.open_session() as session:
            sink = Collected()
            session.copy_to(sink, 0, 8 * MIB)
            assert bytes(sink.data) == expected
            assert not any(writes(path) for path in chain)
        assert all(writes(path) for path in reversed(chain)), "the agent's descriptors keep the marks"
        assert not stage.told
        assert not stage.export.read_bytes
    for fd in fds:
        os.close(fd)


def test_a_map_that_is_older_than_its_image_is_not_believed(chain: list[Path]) -> None:
    fds = hand(chain)
    with staged(chain[0], "qcow2", folders=[]) as stage:
        said: dict[str, object] = {"files": "one", "formats": ["qcow2", "qcow2", "raw"]}
        backend = stage.open(said, lambda name: [os.dup(fd) for fd in fds])
        assert not by_nbd(stage, backend)
        run("qemu-io", "-f", "qcow2", "-c", "write -q -P 66 7M 64k", chain[1])
        stage.shared.clear()  # another ticket
        assert by_nbd(stage, stage.open(said, lambda name: [os.dup(fd) for fd in fds]))
        assert "after its map" in stage.told[-1]
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("formats", [["qcow2"], ["qcow2", "qcow2"], ["qcow2", "raw", "raw"], ["raw"] * 4 + ["qcow2"]])
def test_layers_that_their_headers_do_not_tell_of_are_not_read(formats: list[str], chain: list[Path]) -> None:
    fds = hand(chain)
    before = len(os.listdir("/proc/self/fd"))
    with staged(chain[0], "qcow2", folders=[]) as stage:
        backend = stage.open({"files": "one", "formats": formats}, lambda name: [os.dup(fd) for fd in fds])
        assert by_nbd(stage, backend)
        assert stage.told
    assert len(os.listdir("/proc/self/fd")) <= before
    for fd in fds:
        os.close(fd)


def test_nothing_stays_open(stage: Stage) -> None:
    stage.open().read(0, 1)
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with stage.open() as backend:
            copied(backend, 0, 8 * MIB)
            next(backend.extents(0, MIB))
    assert sorted(os.listdir("/proc/self/fd")) == before

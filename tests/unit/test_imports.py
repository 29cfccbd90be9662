"""The direction of the imports, over the tree as it is.

    events <- jobs <- hostagent.{store, images, drivers, nbd, guests, access} <- hostagent.api.service <- hostagent.api.*, metrics <- daemon

The leaves import nothing of ours and anybody may import them; each third-party package is at home in one place.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"events", "jobs", "hostagent"}
LEAVES = {
    f"hostagent.{name}"
    for name in (
        *("config", "config_data", "config_dbus", "config_rule", "config_text"),
        *("addresses", "errors", "sizes", "logs", "sdnotify", "activation"),
        *("audit", "calls", "certificates", "listening", "refusals", "tokens", "x509"),
        "nbdclient",
        *("locks", "looks", "schema", "selection", "turns", "unix_http", "tls_http"),
        *("blocks", "extents", "inodes", "qcow2", "qemu_locks", "rangeset"),
    )
}
SIBLINGS = ("store", "images", "drivers", "nbd", "guests", "access", "transfers")
AMONG_SIBLINGS = {
    *(("nbd", other) for other in ("images", "drivers")),
    *(("guests", other) for other in ("images", "drivers", "nbd")),
    *(("transfers", other) for other in ("nbd", "access")),
}
USE_CASES = {f"hostagent.api.{name}" for name in ("service", "grants", "requests", "status", "audited", "peer")}
BELOW_SERVICE = {f"hostagent.{name}" for name in (*SIBLINGS, "records", "database", "ledger_rows", "forgetting")}

# Where a third-party package may be imported at all, and where it may be imported as the module is loaded.
HOMES = {
    "qemu": ("hostagent/drivers/",),
    "libvirt": ("hostagent/drivers/libvirt.py",),
    "libvirt_qemu": ("hostagent/drivers/libvirt.py",),
    "nbd": ("hostagent/nbdclient/connection.py", "hostagent/nbdclient/offer.py"),
    "fastapi": ("hostagent/api/",),
    "starlette": ("hostagent/api/",),
    "uvicorn": ("hostagent/api/", "hostagent/daemon.py"),
    "pydantic": ("hostagent/api/",),
    "pydantic_core": ("hostagent/api/",),
    "h11": ("hostagent/data/", "hostagent/api/", "hostagent/cli/doctor_doors.py"),
    "prometheus_client": ("hostagent/metrics.py", "hostagent/data/metrics.py"),
    "rich": ("hostagent/cli/",),
    "sqlite3": ("hostagent/database.py",),
    "grpc": ("hostagent/api/grpc.py",),
    "dbus_next": ("hostagent/api/dbus.py",),
    "dbus_fast": ("hostagent/api/dbus.py",),
}
OPTIONAL = {"nbd", "libvirt", "libvirt_qemu", "rich", "dbus_next", "dbus_fast"}


@dataclass(frozen=True, slots=True)
class Import:
    module: str
    path: str
    line: int
    name: str
    at_load: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.name}"

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


def imports_of(source: str, path: str) -> Iterator[Import]:
    """All imports, also those inside functions; `from x import y` counts as x.y, so that modules are seen."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    tree = ast.parse(source)
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    typing_only = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for n in ast.walk(block)
    }
    for node in ast.walk(tree):
        at_load = id(node) not in lazy and id(node) not in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, path, node.lineno, alias.name, at_load)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                yield Import(module, path, node.lineno, f"{node.module}.{alias.name}", at_load)


def whole_tree() -> list[Import]:
    found: list[Import] = []
    for package in sorted(OURS):
        for path in sorted((ROOT / package).rglob("*.py")):
            found += imports_of(path.read_text(), str(path.relative_to(ROOT)))
    return found


TREE = whole_tree()


def is_in(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def sibling_of(name: str) -> str | None:
    return next((sibling for sibling in SIBLINGS if is_in(name, {f"hostagent.{sibling}"})), None)


def offenders(wrong: list[Import]) -> str:
    return "\n".join(str(one) for one in wrong)


def test_there_is_a_tree_to_look_at() -> None:
    assert len(TREE) > 200
    assert {one.path.split("/")[0] for one in TREE} == OURS


def test_events_is_standard_library_and_itself() -> None:
    allowed = set(sys.stdlib_module_names) | {"events"}
    wrong = [one for one in TREE if one.path.startswith("events/") and one.top not in allowed]
    assert not wrong, offenders(wrong)


def test_jobs_is_standard_library_events_and_itself() -> None:
    allowed = set(sys.stdlib_module_names) | {"events", "jobs"}
    wrong = [one for one in TREE if one.path.startswith("jobs/") and one.top not in allowed]
    assert not wrong, offenders(wrong)


@pytest.mark.parametrize("forbidden", ["sqlite3", "subprocess", "socket", "ctypes", "threading"])
def test_jobs_and_events_touch_nothing_of_the_host(forbidden: str) -> None:
    wrong = [one for one in TREE if one.path.startswith(("jobs/", "events/")) and one.top == forbidden]
    assert not wrong, offenders(wrong)


def test_a_leaf_imports_nothing_of_ours_but_leaves() -> None:
    wrong = [one for one in TREE if one.module in LEAVES and one.top in OURS and not is_in(one.name, LEAVES)]
    assert not wrong, offenders(wrong)


def test_records_know_jobs_alone() -> None:
    wrong = [one for one in TREE if one.module == "hostagent.records" and one.top in OURS and one.top != "jobs"]
    assert not wrong, offenders(wrong)


def test_siblings_meet_only_where_the_architecture_says() -> None:
    wrong = []
    for one in TREE:
        mine, other = sibling_of(one.module), sibling_of(one.name)
        if mine and other and mine != other and (mine, other) not in AMONG_SIBLINGS:
            wrong.append(one)
    assert not wrong, offenders(wrong)


def test_siblings_do_not_look_up() -> None:
    below = BELOW_SERVICE | LEAVES
    wrong = [one for one in TREE if sibling_of(one.module) and one.top == "hostagent" and not is_in(one.name, below)]
    assert not wrong, offenders(wrong)


def test_nothing_imports_the_composition_root_but_the_command_that_serves() -> None:
    allowed = {"hostagent.daemon": "hostagent.cli.serve", "hostagent.guest_jobs": "hostagent.daemon"}
    wrong = [one for one in TREE for root, by in allowed.items() if is_in(one.name, {root}) and one.module != by]
    assert not wrong, offenders(wrong)


def test_the_use_cases_know_no_front_end() -> None:
    names = (
        *("http", "routes", "sse", "problem", "models", "peercred", "limits"),
        *("gate", "scopes", "identities", "bounded", "remote"),
    )
    front = {f"hostagent.api.{name}" for name in names}
    wrong = [one for one in TREE if one.module in USE_CASES and is_in(one.name, front)]
    wrong += [one for one in TREE if one.module in USE_CASES and one.top in HOMES]
    assert not wrong, offenders(wrong)


def test_front_ends_reach_the_store_only_through_the_use_cases() -> None:
    own = {"hostagent.api", "hostagent.records", "hostagent.metrics", "hostagent.__version__"} | LEAVES
    wrong = [
        one
        for one in TREE
        if is_in(one.module, {"hostagent.api"})
        and one.module not in USE_CASES
        and one.top == "hostagent"
        and not is_in(one.name, own)
    ]
    assert not wrong, offenders(wrong)


def test_the_command_line_talks_to_the_agent_over_its_socket() -> None:
    """Only `serve`, `data`, `demo`, `doctor` and `image` run here, and may use more than the leaves; what moves images
    uses hostagent.client."""
    here = {"serve", "data", "demo", "demo_stage", "demo_images", "doctor", "doctor_host", "doctor_doors", "images"}
    own = {"hostagent.cli"} | LEAVES
    movers = {f"hostagent.cli.{name}" for name in ("transfers", "remote_map", "ticket_url")}
    wrong = [
        one
        for one in TREE
        if is_in(one.module, {"hostagent.cli"})
        and one.module.rpartition(".")[2] not in here
        and one.top == "hostagent"
        and one.name != "hostagent.__version__"
        and not is_in(one.name, own | ({"hostagent.client"} if one.module in movers else set()))
    ]
    assert not wrong, offenders(wrong)


@pytest.mark.parametrize("package", ["hostagent.data", "hostagent.client"])
def test_the_two_ends_of_a_transfer_are_leaves_and_themselves(package: str) -> None:
    own = {package, "hostagent.__version__"} | LEAVES
    wrong = [one for one in TREE if is_in(one.module, {package}) and one.top in OURS and not is_in(one.name, own)]
    assert not wrong, offenders(wrong)


@pytest.mark.parametrize("package", sorted(HOMES))
def test_a_third_party_package_stays_at_home(package: str) -> None:
    wrong = [one for one in TREE if one.top == package and not one.path.startswith(HOMES[package])]
    assert not wrong, offenders(wrong)


def test_every_third_party_package_has_a_home() -> None:
    known = set(sys.stdlib_module_names) | OURS | set(HOMES)
    wrong = [one for one in TREE if one.top not in known]
    assert not wrong, offenders(wrong)


@pytest.mark.parametrize("package", sorted(OPTIONAL))
def test_what_may_be_absent_is_never_needed_to_load_a_module(package: str) -> None:
    wrong = [one for one in TREE if one.top == package and one.at_load and not inside_try(one)]
    assert not wrong, offenders(wrong)


def inside_try(one: Import) -> bool:
    tree = ast.parse((ROOT / one.path).read_text())
    guarded = [node for node in ast.walk(tree) if isinstance(node, ast.Try) and catches_import_error(node)]
    return any(child for node in guarded for child in node.body if child.lineno <= one.line <= (child.end_lineno or 0))


def catches_import_error(node: ast.Try) -> bool:
    return any(handler.type is not None and "ImportError" in ast.unparse(handler.type) for handler in node.handlers)


def test_the_check_finds_what_it_should() -> None:
    source = "import sqlite3\ndef f():\n    from hostagent.access import ledger\n"
    found = list(imports_of(source, "hostagent/nbd/x.py"))
    assert [(one.name, one.at_load) for one in found] == [("sqlite3", True), ("hostagent.access.ledger", False)]
    assert sibling_of(found[1].name) == "access"
    assert sibling_of(found[1].module) == "nbd"
    assert not found[0].path.startswith(HOMES["sqlite3"])

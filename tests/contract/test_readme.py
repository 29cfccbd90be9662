"""What README says is there: its commands parse, its files and make targets exist, its addresses are routes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute

from hostagent.api import routes
from hostagent.cli.main import parser
from hostagent.config_text import load
from hostagent.data.downloads import Downloads
from hostagent.data.images import Images
from hostagent.data.uploads import Uploads

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]
INLINE = re.findall(r"`(hostagent [^`]+)`", README)
COMMANDS = [line for line in LINES if line.startswith("hostagent ")] + INLINE


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str) -> None:
    args = parser().parse_args(shlex.split(command, comments=True)[1:])
    assert callable(args.run)


def test_no_command_is_one_that_is_not_supported_yet() -> None:
    later = {args.noun for args in (parser().parse_args(shlex.split(c, comments=True)[1:]) for c in COMMANDS)}
    assert later <= {
        "status",
        "doctor",
        "image",
        "bitmap",
        "export",
        "job",
        "events",
        "grant",
        "serve",
        "demo",
        "drain",
        "data",
        "upload",
        "download",
        "checksum",
        "completion",
        "token",
    }


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\(([^)]+)\)", README))))
def test_every_file_that_is_linked_exists(name: str) -> None:
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)", "\n".join([*LINES, README])))))
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("curl ")])
def test_every_address_is_a_route(line: str) -> None:
    path = re.search(r"http://(?:localhost|127\.0\.0\.1:54322)([^\s\"?]*)", line)
    assert path
    wanted = path[1].replace("$JOB", "{id}").replace("$TICKET", "{id}")
    method = re.search(r"-X (\w+)", line)
    expected = method[1] if method else "POST" if " -d " in line else "GET"
    known = CONTROL if "$CONTROL" in line else _images() if ":54322" in line else _routes()
    assert (wanted, expected) in known


CONTROL = {
    *(("/tickets/{id}", verb) for verb in ("GET", "PUT", "PATCH", "DELETE")),
    *(("/tickets/", verb) for verb in ("GET", "DELETE")),
    ("/metrics", "GET"),
    ("/healthz", "GET"),
}
"""What the data daemon's control socket answers (tests/data has them all)."""


def _images() -> set[tuple[str, str]]:
    access: Any = None
    routes = Images(access, Downloads(access), Uploads(access, 0), "").routes
    return {(f"/images/{{id}}/{name}".rstrip("/"), verb) for name, verbs in routes.items() for verb in verbs}


def _routes() -> set[tuple[str, str]]:
    routers = [value for value in vars(routes).values() if isinstance(value, APIRouter)]
    return {
        (route.path, method)
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z]+\.(?!sock`)[a-z_]+)`", README))))
def test_every_setting_exists(name: str) -> None:
    assert name in load(env={}).origin


def test_the_chosen_version_is_in_the_changelog() -> None:
    from hostagent import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()

"""The documented REST surface (rest.txt) and the application's OpenAPI document say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from events.bus import Bus
from hostagent.api.http import HttpSettings, build_app
from hostagent.errors import CODES

METHOD = r"(?:GET|POST|PUT|PATCH|DELETE)"
LATER = ("/v1/backups", "/v1/domains", "/v1/transfers")

JOB = """id operation target path domain disk state cursor upto bandwidth base increment check labels origin revision
created since started finished error revocation chain rate eta stalled_seconds warnings dest completion group
synchronous_writes"""
EXPORT = """id image uri socket name format size offset shallow writable max_clients bitmaps tls port state reason
created stopped expires ttl idle_timeout clients daemon pid labels revision"""
OBJECTS = {
    "Job": JOB,
    "Export": EXPORT,
    "Grant": "id path mode holder since reason access given state detail",
    "Drain": "draining since pause paused drained jobs exports revocations beginning",
    "Chain": "before after revoked kept",
    "Kept": "path reason holders",
    "Cursor": "cur end",
    "Failure": "code message remedy",
    "Client": "pid name uid",
    "Target": "path format state",
    "Bitmap": "name granularity recording state",
    "BitmapList": "path items lost holders",
}
REQUESTS = {
    "JobCreate": "id operation target base increment bandwidth check labels dry_run dest format "
    "source_format shallow reuse_external synchronous_writes top delete prune_bitmaps completion",
    "GroupCreate": "id disks bandwidth check labels dry_run shallow reuse_external completion",
    "Disk": "target dest format source_format",
    "JobPatch": "bandwidth",
    "CompleteBody": "completion",
    "BitmapCreate": "name granularity disabled",
    "BitmapMerge": "name source_name source",
    "NextBody": "cursor",
    "AbortBody": "force",
    "DrainBody": "pause",
    "ExportCreate": "id image format shallow writable bitmaps offset size max_clients tcp tls ttl idle_timeout labels",
}


@pytest.fixture(scope="module")
def document():
    app = build_app(None, Bus(), settings=HttpSettings(host="h"), metrics=lambda: (b"", ""))
    return app.openapi()


def documented() -> set[tuple[str, str]]:
    text = (Path(__file__).parent / "rest.txt").read_text()
    found = set()
    for methods, paths in re.findall(rf"({METHOD}(?:\|{METHOD})*)((?:\s+/\S+)+)", text):
        for path in paths.split():
            for method in methods.split("|"):
                found |= {(method.lower(), each) for each in expanded(path, method)}
    return {(method, path) for method, path in found if not path.startswith(LATER)}


def expanded(path: str, method: str) -> list[str]:
    """`/a[/{id}]` is the list and one of it (and DELETE takes only one); `{x|y}` are two words, `{id}` is a name."""
    path = re.sub(r"\[\?.*?\]|\?.*", "", path)
    whole, one = re.sub(r"\[.*?\]", "", path), path.replace("[", "").replace("]", "")
    paths = [one] if whole == one or method == "DELETE" else [whole, one]
    if choice := re.search(r"\{([a-z]+(?:\|[a-z]+)+)\}", one):
        return [one.replace(choice[0], word) for word in choice[1].split("|")]
    return paths


def test_every_documented_route_is_there_and_no_other(document):
    served = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert served == documented()


def test_it_is_openapi_3_1(document):
    assert document["openapi"].startswith("3.1")


@pytest.mark.parametrize(("name", "fields"), [*OBJECTS.items(), *REQUESTS.items()])
def test_objects_have_the_documented_fields(document, name, fields):
    assert set(document["components"]["schemas"][name]["properties"]) == set(fields.split())


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_take_no_other_field(document, name):
    assert document["components"]["schemas"][name]["additionalProperties"] is False


def test_every_operation_answers_problems_as_problem_json(document):
    for methods in document["paths"].values():
        for operation in methods.values():
            assert list(operation["responses"]["default"]["content"]) == ["application/problem+json"]
            assert "422" not in operation["responses"]


def test_every_operation_says_what_it_does_and_which_errors_there_are(document):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description", "").endswith("."), f"{method} {path}"
            errors = operation["responses"]["default"]["description"]
            missing = [code for code, entry in CODES.items() if f"{code} ({entry.http})" not in errors]
            assert not missing, f"{method} {path}"


def test_what_starts_work_answers_202(document):
    for path in ("/v1/jobs", "/v1/exports", "/v1/jobs/{id}/next", "/v1/jobs/{id}/abort"):
        assert "202" in document["paths"][path]["post"]["responses"]

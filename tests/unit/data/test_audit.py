"""The audit: a line for each grant, extension and revocation, without the secret."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from hostagent.data.audit import Audit
from hostagent.data.throttle import Lane, Rate
from hostagent.data.ticket import Spec
from hostagent.data.tickets import Tickets


def test_each_line_says_what_happened_and_who_asked_and_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "audit"
    audit, host = Audit(file), Rate(0)
    tickets = Tickets(most=5, lane=lambda own: Lane(Rate(own), host), told=audit.tell)
    tickets.add(Spec("s3cret", 10, ("read",), 300, "nbd:unix:/s", 60, transfer_id="T\n1"), 1, "uid 5")
    tickets.extend("s3cret", 5, "uid 6")
    tickets.remove("s3cret", 1, "uid 7")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["event"], line["by"], line["transfer"]) for line in lines] == [
        ("granted", "uid 5", "T\n1"),
        ("extended", "uid 6", "T\n1"),
        ("revoked", "uid 7", "T\n1"),
    ]
    assert {line["digest"] for line in lines} == {hashlib.sha256(b"s3cret").hexdigest()[:16]}
    assert "s3cret" not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600


def test_an_audit_that_cannot_be_written_refuses_nothing(tmp_path: Path) -> None:
    host = Rate(0)
    audit = Audit(tmp_path / "nowhere" / "audit")
    tickets = Tickets(most=5, lane=lambda own: Lane(Rate(own), host), told=audit.tell)
    assert tickets.add(Spec("id", 10, ("read",), 300, "nbd:unix:/s", 60), 1)

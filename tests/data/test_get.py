"""GET and HEAD of an image."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.data.both import only_ours
from tests.data.daemons import Daemon
from tests.data.table import Answer, Row, check, refused

MIB = 1 << 20
SIZE = MIB + 512
CONTENT = b"".join(number.to_bytes(8, "big") for number in range(SIZE // 8))
BEYOND = f"bytes */{SIZE}"


def part(first: int, last: int) -> Answer:
    span = {"content-range": f"bytes {first}-{last}/{SIZE}", "content-length": str(last - first + 1)}
    return Answer(206, {"content-type": "application/octet-stream"} | span, CONTENT[first : last + 1])


def ranged(name: str, value: str, answer: Answer, flaw: Answer | None = None) -> Row:
    return Row(name, "GET", "", answer, flaw, {"Range": value})


UNSATISFIABLE = refused(416, "", content_range=BEYOND)
INVALID = refused(416, "[Ii]nvalid range|Cannot satisfy")

RANGES = [
    ranged("first-bytes", "bytes=0-99", part(0, 99)),
    ranged("one-byte", "bytes=77-77", part(77, 77)),
    ranged("across-a-block", "bytes=4000-9001", part(4000, 9001)),
    ranged("last-byte", f"bytes={SIZE - 1}-{SIZE - 1}", part(SIZE - 1, SIZE - 1)),
    ranged("everything", f"bytes=0-{SIZE - 1}", part(0, SIZE - 1)),
    ranged("to-the-end", "bytes=1000000-", part(1000000, SIZE - 1)),
    ranged("from-0-to-the-end", "bytes=0-", part(0, SIZE - 1)),
    ranged("suffix", "bytes=-100", part(SIZE - 100, SIZE - 1), refused(416, "not supported")),
    ranged("suffix-longer-than-the-image", "bytes=-99999999", part(0, SIZE - 1), refused(416, "not supported")),
    ranged("suffix-of-nothing", "bytes=-0", UNSATISFIABLE, Answer(206, {"content-length": str(SIZE)}, CONTENT)),
    ranged("begins-at-the-end", f"bytes={SIZE}-", UNSATISFIABLE, Answer(206, {"content-length": "0"}, b"")),
    ranged("begins-beyond-the-end", f"bytes={SIZE + 7}-", UNSATISFIABLE, refused(400, "Requested -7 bytes")),
    ranged("ends-beyond-the-end", f"bytes=0-{SIZE}", refused(416, "", content_range=BEYOND)),
    ranged("enormous", f"bytes=0-{10**30}", refused(416, "", content_range=BEYOND)),
    ranged("backwards", "bytes=9-3", INVALID),
    ranged("no-numbers", "bytes=-", INVALID),
    ranged("two-ranges", "bytes=0-9,20-29", INVALID),
    ranged("another-unit", "sectors=0-9", INVALID),
    ranged("no-unit", "0-9", INVALID),
    ranged("letters", "bytes=a-b", INVALID),
    ranged("hexadecimal", "bytes=0x0-0x9", INVALID),
    ranged("a-sign", "bytes=+0-9", INVALID),
    ranged("an-underscore", "bytes=1_0-20", INVALID),
    ranged("more-after-it", "bytes=0-9 junk", INVALID),
    ranged("other-digits", "bytes=\xb2-9", INVALID),
    ranged("empty", "bytes=", INVALID),
]


@pytest.fixture(scope="module")
def image(home: Path) -> Path:
    path = home / "image.raw"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(scope="module")
def ticket(daemon: Daemon, image: Path) -> str:
    return daemon.ticket(f"file://{image}", SIZE)


@pytest.mark.parametrize("row", RANGES, ids=lambda row: row.id)
def test_a_range_gives_exactly_its_bytes_or_says_why_not(daemon: Daemon, ticket: str, row: Row) -> None:
    with daemon.tcp() as wire:
        check(daemon, wire, row, f"/images/{ticket}")


def test_the_whole_image_comes_with_its_length_and_a_kind_that_browsers_save(daemon: Daemon, ticket: str) -> None:
    headers = {
        "content-type": "application/octet-stream",
        "content-disposition": "attachment",
        "content-length": str(SIZE),
        "content-range": None,
        "transfer-encoding": None,
    }
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", "GET", "", Answer(200, headers, CONTENT)), f"/images/{ticket}")


def test_a_path_may_be_percent_encoded(daemon: Daemon, ticket: str) -> None:
    encoded = "".join(f"%{ord(character):02x}" for character in ticket)
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", "GET", "", Answer(200, {}, CONTENT)), f"/images/{encoded}")


def test_head_tells_what_get_would_and_sends_no_body(daemon: Daemon, ticket: str) -> None:
    headers = {"content-length": str(SIZE), "content-type": "application/octet-stream"}
    row = Row("", "HEAD", "", Answer(200, headers, b""), Answer(405, astray=True))  # theirs has a body
    with daemon.tcp() as wire:
        check(daemon, wire, row, f"/images/{ticket}")


def test_close_is_granted_on_request(daemon: Daemon, ticket: str) -> None:
    answer = Answer(200, {}, CONTENT, closes=True)
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", "GET", "", answer), f"/images/{ticket}?close=y")


def test_a_client_may_say_that_it_asks_for_nothing_more(daemon: Daemon, ticket: str) -> None:
    with daemon.tcp() as wire:
        reply = wire.ask("GET", f"/images/{ticket}", {"Connection": "close"})
        assert reply.body == CONTENT and wire.ended()
        assert reply.last or daemon.name == "imageio", "it closes without a word"


def test_a_client_of_http_1_0_gets_its_image_and_the_connection_ends(daemon: Daemon, ticket: str) -> None:
    with daemon.tcp() as wire:
        wire.send(f"GET /images/{ticket} HTTP/1.0\r\n\r\n".encode())
        reply = wire.reply()
        assert (reply.status, reply.body == CONTENT, wire.ended()) == (200, True, True)


def test_requests_sent_at_once_are_answered_in_turn(daemon: Daemon, ticket: str) -> None:
    with daemon.tcp() as wire:
        for first in range(0, 5000, 1000):
            wire.request("GET", f"/images/{ticket}", {"Range": f"bytes={first}-{first + 999}"})
        for first in range(0, 5000, 1000):
            assert wire.reply().body == CONTENT[first : first + 1000]


# The ticket's size, the image's size, the ticket's file name


def test_a_ticket_shorter_than_its_image_ends_before_it(daemon: Daemon, image: Path) -> None:
    ticket = daemon.ticket(f"file://{image}", 4096)
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", "GET", "", Answer(200, {}, CONTENT[:4096])), f"/images/{ticket}")
        answer = refused(416, "", content_range="bytes */4096")
        check(daemon, wire, ranged("", "bytes=0-4096", answer), f"/images/{ticket}")


def test_a_ticket_longer_than_its_image_ends_with_it(daemon: Daemon, image: Path) -> None:
    ticket = daemon.ticket(f"file://{image}", 2 * MIB)
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", "GET", "", Answer(200, {}, CONTENT)), f"/images/{ticket}")
        answer = refused(416, "", content_range=BEYOND)
        check(daemon, wire, ranged("", f"bytes=0-{SIZE}", answer), f"/images/{ticket}")


NAMES = [
    pytest.param("disk.raw", "disk.raw", id="plain"),
    pytest.param("my disk.raw", "my disk.raw", id="space"),
    pytest.param('a"b\\c.raw', 'a"b\\c.raw', id="quotes"),
    pytest.param("дом-家.qcow2", "дом-家.qcow2", id="unicode"),
    pytest.param("x\r\nX-Injected: yes\r\n\r\nGET /", None, id="line-breaks"),
    pytest.param("x\nSet-Cookie: a=b", None, id="newline"),
    pytest.param("a; filename=other.raw", "a; filename=other.raw", id="parameter"),
    pytest.param("nul\0byte", None, id="nul"),
]


@only_ours
@pytest.mark.parametrize(("name", "read"), NAMES)
def test_a_file_name_reaches_a_browser_as_it_is_and_never_becomes_a_header(
    daemon: Daemon, image: Path, name: str, read: str | None
) -> None:
    """RFC 6266. A name that no header can carry is refused, or cleaned."""
    ticket = "a-name-of-a-file"
    reply = daemon.put(
        {"uuid": ticket, "url": f"file://{image}", "size": SIZE, "ops": ["read"], "timeout": 9, "filename": name}
    )
    if reply.status == 400 and read is None:
        return
    assert reply.status in (200, 201), reply
    with daemon.tcp() as wire:
        reply = wire.ask("GET", f"/images/{ticket}", {"Range": "bytes=0-9"})
        assert reply.body == CONTENT[:10] and reply.get("x-injected") is None, reply
        found = file_name(reply.get("content-disposition") or "")
        assert found == read if read is not None else not set("\r\n\0") & set(found), reply


def file_name(disposition: str) -> str:
    """What a browser takes (RFC 6266): filename* if it is there."""
    token, _, rest = disposition.partition(";")
    assert token == "attachment", disposition
    better = re.search(r"filename\*=UTF-8''([A-Za-z0-9!#$&+.^_`|~%-]+)$", rest)
    plain = re.search(r'filename="((?:[^"\\\r\n]|\\.)*)"', rest)
    assert plain, disposition
    return unquote(better[1]) if better else re.sub(r"\\(.)", r"\1", plain[1])


# What has no image


def test_an_image_that_is_not_there_is_not_found(daemon: Daemon, home: Path) -> None:
    ticket = daemon.ticket(f"file://{home / 'missing.raw'}", SIZE)
    row = Row("", "GET", "", refused(404, "."), refused(500, "Server failed to perform the request"))
    with daemon.tcp() as wire:
        reply = check(daemon, wire, row, f"/images/{ticket}")
    assert reply and str(home) not in reply.text, "a client learns nothing of this host's folders"


def test_an_export_that_nobody_serves_is_unavailable(daemon: Daemon, home: Path) -> None:
    ticket = daemon.ticket(f"nbd:unix:{home / 'nobody.sock'}", SIZE)
    with daemon.tcp() as wire:
        row = Row("", "GET", "", refused(503, "."), refused(500, "Server failed to perform the request"))
        reply = check(daemon, wire, row, f"/images/{ticket}")
    assert reply and str(home) not in reply.text

"""The agent's API, over its unix socket or by TCP, with nothing but the standard library: it must start in
milliseconds.

Each call is one connection. An answer that is a problem (RFC 9457) becomes a `CliError`, whose exit status comes from
the one table of codes. `patient` is for those who follow a job: an agent that restarts is waited for, because its jobs
go on without it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

from hostagent.errors import CODES, EXIT_ERROR

if TYPE_CHECKING:
    from hostagent.cli.away import Away
    from hostagent.unix_http import HTTPConnection, HTTPResponse

Json = dict[str, Any]
T = TypeVar("T")

ANSWER_TIMEOUT = 60.0  # seconds; starting a job includes reading a chain and starting a storage daemon
PATIENCE = 15.0  # seconds that an agent which restarts is waited for
RETRY_PAUSE = 0.2  # seconds between two tries
STREAM_SILENCE = 60.0  # seconds; the agent sends a heartbeat every 15 s, so a longer silence is a lost connection
LARGEST_ANSWER = 64 << 20  # bytes; a page of 1000 jobs, each with a chain of 200 layers, stays below it
LARGEST_LINE = 1 << 20  # bytes of one line of an event stream
MOST_PAGES = 1000  # of a list; a hundred objects each, unless the agent is set otherwise
SYSTEM = Path("/run/hostagent/hostagent.sock")  # of this host's own agent
BOOTED = Path("/run/systemd/system")  # there where systemd is the service manager (sd_booted(3))
UNIT = "hostagent.service"
UNITS = ("/etc/systemd/system", "/lib/systemd/system")  # where it lies: made by hand, or the package's


class CliError(Exception):
    """What went wrong, for a person, and the exit status that a program gets.

    `sent`: the request had gone out when the agent went away, so that it may have been obeyed. `data` is the answer
    that the agent gave, where it gave one.
    """

    def __init__(
        self, code: str, message: str, *, remedy: str | None = None, sent: bool = False, data: Json | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy
        self.sent = sent
        self.data = data

    @property
    def exit(self) -> int:
        return CODES[self.code].exit if self.code in CODES else EXIT_ERROR


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    data: Any


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One event of a text/event-stream. `id` is empty for a transient one."""

    type: str
    data: str
    id: str = ""


class Client:
    """`owners`: the users whose agent is asked, or None where it may be anybody's; another user's is `denied`."""

    def __init__(
        self, where: Path | Away, *, owners: Collection[int] | None = None, timeout: float = ANSWER_TIMEOUT
    ) -> None:
        self._where = where
        self._owners = owners
        self._timeout = timeout

    def _connection(self, timeout: float) -> HTTPConnection:
        from hostagent.unix_http import UnixConnection

        if isinstance(self._where, Path):
            return UnixConnection(self._where, timeout=timeout, owners=self._owners)
        return self._where.connection(timeout)

    def _headers(self, *given: Mapping[str, str]) -> dict[str, str]:
        headers = {} if isinstance(self._where, Path) else dict(self._where.headers)
        for more in given:
            headers |= more
        return headers

    def get(self, path: str, query: Mapping[str, Any] | None = None, *, etag: object = None, wait: float = 0) -> Reply:
        headers = {} if etag is None else {"If-None-Match": f'"{etag}"'}
        parameters = {**(query or {}), **({"wait": f"{wait:g}"} if wait else {})}
        reply = self._call("GET", path, query=parameters, headers=headers, timeout=self._timeout + wait)
        return reply if reply.status == 304 else Reply(reply.status, _expect_object(reply.data))

    def post(self, path: str, body: Json | None = None, query: Mapping[str, Any] | None = None) -> Json:
        return self._object("POST", path, body, query)

    def patch(self, path: str, body: Json) -> Json:
        return self._object("PATCH", path, body)

    def delete(self, path: str, query: Mapping[str, Any] | None = None) -> Any:
        return self._call("DELETE", path, query=query or {}).data

    def items(self, path: str, query: Mapping[str, Any]) -> list[Json]:
        """All objects of a list, page by page."""
        found: list[Json] = []
        page: dict[str, Any] = dict(query)
        for _ in range(MOST_PAGES):
            answer = self.get(path, page).data
            if not isinstance(items := answer["items"], list):
                raise _no_such(f"items are {str(items)[:100]!r}")
            found += items
            if not answer.get("next"):
                break
            page["after"] = answer["next"]
        return found

    def changed(self, path: str, *, revision: object, wait: float) -> Json:
        """The object at `path` when its revision is another one, or as it is after `wait` seconds."""
        reply = self.get(path, etag=revision, wait=wait)
        if reply.status == 304:
            reply = self.get(path)
        return _expect_object(reply.data)

    def events(self, query: Mapping[str, Any], *, silence: float = STREAM_SILENCE) -> Iterator[StreamEvent]:
        """The event stream until it ends. Raises TimeoutError after `silence` seconds without a byte."""
        connection, headers = self._connection(ANSWER_TIMEOUT), self._headers({"Accept": "text/event-stream"})
        with _as_unreachable(self._where, but=TimeoutError):
            try:
                connection.connect()
                stream = connection.sock
                connection.request("GET", _address("/v1/events", query), headers=headers)
                response = connection.getresponse()
                if response.status != 200:
                    raise _problem(response.status, _decoded(response.read(LARGEST_ANSWER)))
                stream.settimeout(silence)
                yield from _stream_events(response)
            finally:
                connection.close()

    def _object(self, method: str, path: str, body: Json | None, query: Mapping[str, Any] | None = None) -> Json:
        return _expect_object(self._call(method, path, body=body, query=query or {}).data)

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Json | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = ANSWER_TIMEOUT,
    ) -> Reply:
        sent = self._headers({"Accept": "application/json", "Connection": "close"}, headers or {})
        payload = None if body is None else json.dumps(body).encode()
        if payload is not None:
            sent["Content-Type"] = "application/json"
        connection = self._connection(timeout)
        with _as_unreachable(self._where):
            connection.connect()
        with _as_unreachable(self._where, sent=True):
            try:
                connection.request(method, _address(path, query or {}), payload, sent)
                response = connection.getresponse()
                text = _whole(response)
            finally:
                connection.close()
        if len(text) > LARGEST_ANSWER:
            raise CliError("internal", f"the agent's answer is larger than {LARGEST_ANSWER} bytes")
        data = _decoded(text)
        if response.status >= 400:
            raise _problem(response.status, data)
        return Reply(response.status, data)


def _whole(response: HTTPResponse) -> bytes:
    """The answer's body. http.client takes an end within the headers or the body for the end of the answer."""
    length = response.length
    text = response.read(LARGEST_ANSWER + 1)
    if not response.chunked and (length is None or len(text) < min(length, LARGEST_ANSWER)):
        raise ConnectionAbortedError("the answer was cut off")
    return text


def patient(call: Callable[[], T], *, patience: float = PATIENCE) -> T:
    """The result of `call`, tried again for `patience` seconds while the agent is away or still starting."""
    end = time.monotonic() + patience
    while True:
        try:
            return call()
        except CliError as error:
            if error.code not in ("unreachable", "unavailable") or time.monotonic() >= end:
                raise
            time.sleep(RETRY_PAUSE)


def once(call: Callable[[], T]) -> T:
    """`call`, which may safely be repeated, once more if its answer was lost. Without an agent it fails at once."""
    try:
        return call()
    except CliError as error:
        if not error.sent:
            raise
        return patient(call)


def quoted(part: str) -> str:
    """`part` as one segment of a path."""
    return quote(part, safe="") if part not in (".", "..") else part.replace(".", "%2E")


def _address(path: str, query: Mapping[str, Any]) -> str:
    given = {key: value for key, value in query.items() if value is not None and value != []}
    return f"{path}?{urlencode(given, doseq=True, errors='surrogateescape')}" if given else path


@contextmanager
def _as_unreachable(where: Path | Away, *, but: type[OSError] | None = None, sent: bool = False) -> Iterator[None]:
    """Turn what the socket says into a CliError. `but` is an exception that the caller knows what to do with."""
    from hostagent.unix_http import ForeignServer, HTTPException

    try:
        yield
    except ForeignServer as error:
        raise CliError(
            "denied",
            f"who listens on {str(where)!r} is uid {error.uid}, neither root nor you: nothing was asked",
            remedy="see whose it is; if you trust that user, name the socket with --socket or HOSTAGENT_SOCKET",
        ) from error
    except PermissionError as error:
        raise CliError(
            "denied",
            f"the agent's socket {str(where)!r} may not be used by this user",
            remedy=_who_may(where),
        ) from error
    except (OSError, HTTPException) as error:
        if but is not None and isinstance(error, but):
            raise
        reason = getattr(error, "verify_message", None) or getattr(error, "strerror", None) or str(error)
        message = f"no answer from the agent at {str(where)!r}: {reason or type(error).__name__}"
        raise CliError("unreachable", message, remedy=_where_else(where), sent=sent) from error


def _who_may(where: Path | Away) -> str:
    """Who may use the socket, as far as it can be seen from here."""
    import grp
    import pwd

    if not isinstance(where, Path):
        return "ask as a user who may"
    try:
        found = where.stat()
    except OSError:
        return "ask as the user that the agent runs as, or as root"
    user, group = str(found.st_uid), str(found.st_gid)
    with suppress(KeyError):
        user = pwd.getpwuid(found.st_uid).pw_name
    with suppress(KeyError):
        group = grp.getgrgid(found.st_gid).gr_name
    ask = "ask as root" if found.st_uid == 0 else f"ask as {user}, whose agent it is, or as root"
    return f"join the group {group} (then log in again), or {ask}" if found.st_mode & 0o020 else ask


def _where_else(path: Path | Away) -> str:
    if not isinstance(path, Path):
        return "is it served there (api.listen)? its certificate must be of --cafile, and ours of its api.tls_client_ca"
    other = f"; this host's own agent is at --socket {SYSTEM}" if path != SYSTEM and SYSTEM.exists() else ""
    named = f"or name its socket with --socket or HOSTAGENT_SOCKET{other}"
    if path == SYSTEM and BOOTED.is_dir() and any(Path(folder, UNIT).exists() for folder in UNITS):
        why = "`journalctl -u hostagent -n 20` says why it is not there"
        again = "`systemctl reset-failed 'hostagent*'; systemctl restart hostagent`"
        return f"{why}; when that is mended: {again}, {named}"
    return f"start it (`hostagent serve`), {named}"


def _decoded(text: bytes) -> Any:
    if not text:
        return None
    try:
        return json.loads(text, object_hook=Answered)
    except ValueError:
        return text.decode(errors="backslashreplace")


class Answered(Json):
    """An object of an answer. One that lacks what an agent always says came from something else."""

    def __missing__(self, key: str) -> Any:
        raise _no_such(f"it has no {key!r}")


def _no_such(what: str) -> CliError:
    remedy = "is it hostagent that answers there, of this version? see `hostagent status`, --socket and --url"
    return CliError("internal", f"the answer is not an agent's: {what}", remedy=remedy)


def _expect_object(data: Any) -> Json:
    if not isinstance(data, dict):
        raise _no_such(f"it is no JSON object, but {str(data)[:100]!r}")
    return data


def _problem(status: int, data: Any) -> CliError:
    if not isinstance(data, dict):
        return CliError(_code_of(status), f"the agent answered {status}: {str(data)[:200]!r}")
    code = str(data.get("code") or _code_of(status))
    message = str(data.get("detail") or data.get("title") or f"the agent answered {status}")
    return CliError(code, message, remedy=data.get("remedy"), data=data)


def _code_of(status: int) -> str:
    return next((code for code, entry in CODES.items() if entry.http == status), "internal")


def _stream_events(response: HTTPResponse) -> Iterator[StreamEvent]:
    """Events by the rules of the HTML standard, as far as this API uses them."""
    kind, event_id = "", ""
    data: list[str] = []
    while True:
        raw = response.readline(LARGEST_LINE + 1)
        if not raw or len(raw) > LARGEST_LINE:
            return
        line = raw.decode(errors="backslashreplace").rstrip("\r\n")
        if not line:
            if data:
                yield StreamEvent(kind or "message", "\n".join(data), event_id)
            kind, data, event_id = "", [], ""
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            kind = value
        elif name == "data":
            data.append(value)
        elif name == "id":
            event_id = value

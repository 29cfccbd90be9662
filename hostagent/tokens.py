"""Bearer tokens (RFC 6750): who may do what at the API over TCP. A file has their names, scopes and hashes.

A token is `hostagent.NAME.SECRET`. SECRET is 256 random bits, so that a plain SHA-256 of the token is enough at rest:
there is no dictionary to try, which is all that a slow hash or a salt would hinder. NAME only finds the line.

The command line writes the file, and the agent reads it anew when it changes; there is no way to a token over the API.
A file that cannot be believed has no token in it: whoever took one away must be able to rely on that.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Any

from hostagent.errors import AgentError

log = logging.getLogger(__name__)

SETTING = "api.tokens_file"
LONGEST = 256  # characters of a token; ours have at most 117
_PREFIX = "hostagent"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_LARGEST_FILE = 4 << 20
_NOBODYS = bytes(32)


class Scope(IntEnum):
    """What an identity may do; each may do what those before it may."""

    NONE = 0
    READ = 1
    OPERATE = 2
    ADMIN = 3

    @property
    def word(self) -> str:
        return self.name.lower()

    @classmethod
    def of(cls, word: str) -> Scope:
        """Of those that can be given. ValueError."""
        for scope in GIVEN:
            if scope.word == word:
                return scope
        raise ValueError(f"{word!r} is no scope")


GIVEN = (Scope.READ, Scope.OPERATE, Scope.ADMIN)
WORDS = tuple(scope.word for scope in GIVEN)


@dataclass(frozen=True, slots=True)
class Token:
    """`digest` is the SHA-256 of the whole token; `expires` None is never."""

    name: str
    digest: bytes
    scope: Scope
    created: datetime
    expires: datetime | None

    def over(self, now: datetime) -> bool:
        return self.expires is not None and self.expires <= now


def new(name: str, scope: Scope, expires: datetime | None) -> tuple[Token, str]:
    """A token and its text, which nothing keeps. AgentError invalid."""
    if not _NAME.fullmatch(name):
        remedy = "small letters, digits and -, 63 at most"
        raise AgentError("invalid", f"{name!r} is no name for a token", field="name", value=name, remedy=remedy)
    text = f"{_PREFIX}.{name}.{secrets.token_urlsafe(32)}"
    return Token(name, digest_of(text), scope, datetime.now(UTC).replace(microsecond=0), expires), text


def digest_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# The file


def read(path: Path) -> list[Token]:
    """Those of a file; none where there is no file. AgentError: it cannot be read, or others could change it."""
    try:
        with path.open("rb") as file:
            _refuse_others(path, os.fstat(file.fileno()))
            text = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unusable(path, str(error.strerror)) from error
    if len(text) > _LARGEST_FILE:
        raise _unusable(path, f"it has more than {_LARGEST_FILE} bytes")
    try:
        lines = json.loads(text)["tokens"]
        found = [_token(one) for one in (lines if isinstance(lines, list) else [lines])]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _unusable(path, "it is not as `hostagent token` writes it") from error
    if len({token.name for token in found}) != len(found):
        raise _unusable(path, "a name stands twice in it")
    return found


def write(path: Path, tokens: Sequence[Token]) -> None:
    """In one step, with the mode and the owner that keep others out."""
    text = json.dumps({"tokens": [_plain(token) for token in tokens]}, indent=1)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text + "\n")
            file.flush()
            folder = path.parent.stat()
            if os.geteuid() == 0 and folder.st_uid != 0:  # the agent is a plain user's
                os.fchown(file.fileno(), folder.st_uid, folder.st_gid)
            os.fsync(file.fileno())
        beside.rename(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)


@contextlib.contextmanager
def changing(path: Path) -> Iterator[list[Token]]:
    """The file's tokens, to be changed in place; written at the end. One at a time does this."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        found = read(path)
        yield found
        write(path, found)
    finally:
        os.close(fd)


def _refuse_others(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _unusable(path, "it is no file")
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise _unusable(path, f"others can change it (uid {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o})")


def _unusable(path: Path, why: str) -> AgentError:
    remedy = "chown it to the agent's user, mode 0600; or remove it and make tokens anew: `hostagent token add`"
    return AgentError("invalid", f"the tokens in {str(path)!r} cannot be used: {why}", field=SETTING, remedy=remedy)


def _token(one: dict[str, Any]) -> Token:
    if not _NAME.fullmatch(one["name"]) or len(digest := bytes.fromhex(one["sha256"])) != 32:
        raise ValueError
    return Token(
        one["name"],
        digest,
        Scope.of(one["scope"]),
        _time(one["created"]),
        None if one["expires"] is None else _time(one["expires"]),
    )


def _plain(token: Token) -> dict[str, str | None]:
    return {
        "name": token.name,
        "sha256": token.digest.hex(),
        "scope": token.scope.word,
        "created": token.created.isoformat(),
        "expires": token.expires.isoformat() if token.expires else None,
    }


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError
    return found


# In the agent


class Tokens:
    """The tokens in force. `look` reads the file when it has changed; it may block, and any thread may call it."""

    def __init__(self, path: Path, most: int) -> None:
        self._path = path
        self._most = most
        self._seen: tuple[int, ...] | None = None
        self._by_name: dict[str, Token] = {}
        self._turn = threading.Lock()

    def __len__(self) -> int:
        return len(self._by_name)

    def look(self) -> None:
        with self._turn:  # who comes meanwhile finds what was read
            self._look()

    def _look(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            found = read(self._path)
            if len(found) > self._most:
                raise _unusable(self._path, f"it has {len(found)}, and api.tokens is {self._most}")
        except AgentError as error:
            fields = {"error": error.message, "remedy": error.remedy}
            log.error("no token is accepted", extra={"fields": fields})
            found = []
        before, self._by_name = self._by_name, {token.name: token for token in found}
        gone = [name for name, token in before.items() if self._by_name.get(name) != token]
        come = [name for name, token in self._by_name.items() if before.get(name) != token]
        log.info("tokens read", extra={"fields": {"tokens": len(found), "come": come, "gone": gone}})

    def find(self, text: str) -> Token | None:
        """The token whose text that is, also when its time is over."""
        parts = text.split(".") if len(text) <= LONGEST else []
        token = self._by_name.get(parts[1]) if len(parts) == 3 else None
        if hmac.compare_digest(digest_of(text[:LONGEST]), token.digest if token else _NOBODYS):
            return token
        return None

    def holds(self, token: Token) -> bool:
        """Whether it is still in force."""
        return self._by_name.get(token.name) == token and not token.over(datetime.now(UTC))

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError as error:
            return (error.errno or 0,)
        return (found.st_mtime_ns, found.st_ino, found.st_size, found.st_mode, found.st_uid)

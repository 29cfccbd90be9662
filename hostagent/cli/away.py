"""An agent that is reached by TCP: its address, the authorities that its certificate must be of, and who we are."""

from __future__ import annotations

import functools
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hostagent.errors import AgentError

if TYPE_CHECKING:
    import ssl
    from http.client import HTTPConnection

    from hostagent.tls_http import Address

LONGEST_TOKEN = 1024  # bytes of a token's file that are looked at


@dataclass(frozen=True)
class Away:
    """Files as they were named; empty where none was."""

    url: str
    cafile: str = ""
    certificate: str = ""
    key: str = ""
    token_file: str = ""

    def __str__(self) -> str:
        return self.url

    def connection(self, timeout: float) -> HTTPConnection:
        """Not connected yet. AgentError: what was named is no address, or cannot be used."""
        from hostagent.tls_http import connection

        return connection(self.address, self.tls, timeout)

    @functools.cached_property
    def address(self) -> Address:
        from hostagent.tls_http import address

        return address(self.url)

    @functools.cached_property
    def tls(self) -> ssl.SSLContext | None:
        from hostagent.tls_http import context

        return context(self.cafile, self.certificate, self.key) if self.address.tls else None

    @functools.cached_property
    def headers(self) -> dict[str, str]:
        """Who asks."""
        return {"Authorization": f"Bearer {_token(Path(self.token_file))}"} if self.token_file else {}


def _token(path: Path) -> str:
    try:
        with path.open() as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            text = file.readline(LONGEST_TOKEN).strip()
    except (OSError, ValueError) as error:
        raise AgentError("invalid", f"no token can be read from {str(path)!r}: {error}", field="token-file") from error
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise AgentError("invalid", f"there is no token in {str(path)!r}", field="token-file")
    if mode & 0o077:
        from hostagent.cli.terminal import remark

        remark(f"hostagent: others may read the token in {path} (mode {mode:04o}): chmod 0600 {path}")
    return text

"""One connection to an image on a data daemon: the requests of the dialect.

Wire: docs of ovirt-imageio's HTTP API; ours adds ETag, sizes and partial extents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any

from hostagent.client.exchange import ERROR_MOST, Exchange
from hostagent.client.features import Features, features_of
from hostagent.client.trouble import Retry, decoded
from hostagent.errors import AgentError

ANSWER_MOST = 1 << 20
Deliver = Callable[[memoryview], None]
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)", re.ASCII)


class Remote(Exchange):
    """One worker's."""

    def options(self) -> Features:
        response = self._request("OPTIONS", expect=(200, 204, 405, 501))
        body = self._body(response, ANSWER_MOST)
        return features_of(body, response.headers) if response.status == 200 and body else Features()

    def get(self, offset: int, length: int) -> Body:
        """These bytes. Close it."""
        wanted = {"Range": f"bytes={offset}-{offset + length - 1}"}
        response = self._request("GET", headers=wanted, expect=(200, 206))
        try:
            self._check(response, offset, length)
        except BaseException:
            self.close()
            raise
        return Body(self, response, length)

    def put(self, offset: int, length: int, produce: Callable[[Deliver], None], *, flush: bool) -> None:
        """Send what `produce` delivers, which is `length` bytes; they are the caller's again when this returns."""
        headers = {
            "Content-Length": str(length),
            "Content-Range": f"bytes {offset}-{offset + length - 1}/*",
            "Content-Type": "application/octet-stream",
            **self._usual(),
        }
        done = False
        try:
            connection = self._connected()
            with self._losses():
                connection.putrequest("PUT", f"{self.address.path}?flush={'y' if flush else 'n'}")
                for name, value in headers.items():
                    connection.putheader(name, value)
                connection.endheaders()
            produce(self._send)
            if flush:
                connection.sock.settimeout(self._dial.patience.flush)
            self.end(self._response("PUT", (200, 201, 204)))
            self._relax()
            done = True
        finally:
            if not done:
                self.close()

    def _send(self, view: memoryview) -> None:
        try:
            self._connected().send(view)
        except (OSError, HTTPException) as error:
            raise self._last_word(error) from error

    def zero(self, offset: int, length: int, *, flush: bool, timeout: float) -> None:
        self._patch({"op": "zero", "offset": offset, "size": length, "flush": flush}, timeout)

    def flush(self, timeout: float) -> None:
        self._patch({"op": "flush"}, timeout)

    def extents(self, query: str) -> Iterator[bytes]:
        """The JSON text of an answer to GET …/extents?query, in pieces."""
        self.connect()
        response = self._request("GET", f"{self.address.path}/extents?{query}", expect=(200,))
        done = False
        try:
            while block := self._read(response, 256 << 10):
                yield block
            if response.length:
                raise self._cut()
            self.end(response)
            done = True
        finally:
            if not done:
                self.close()

    def json(self, rest: str, timeout: float) -> Any:
        """The answer to GET …/rest."""
        self.connect()
        response = self._request("GET", f"{self.address.path}/{rest}", expect=(200,), timeout=timeout)
        body = self._body(response, ANSWER_MOST)
        found = decoded(body)
        if found is None:
            raise self._strange("what is not JSON")
        return found

    def total(self) -> int | None:
        """The size that the answer to a request for the first byte tells; None where it tells none."""
        self.connect()
        try:
            response = self._request("GET", headers={"Range": "bytes=0-0"}, expect=(200, 206))
        except Retry:
            raise
        except AgentError:  # no right to read, or nothing there
            return None
        match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range") or "")
        if response.status == 206 and match and match[3] != "*":
            self._body(response, ERROR_MOST)
            return int(match[3])
        self.close()
        return response.length if response.status == 200 else None

    def _patch(self, message: Mapping[str, object], timeout: float) -> None:
        body = json.dumps(message).encode()
        kind = {"Content-Type": "application/json"}
        response = self._request("PATCH", headers=kind, body=body, expect=(200, 204), timeout=timeout)
        self.end(response)

    def _check(self, response: HTTPResponse, offset: int, length: int) -> None:
        """Whether the body is what was asked for: another range would be written to the wrong place."""
        if response.status == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range") or "")
            if match is None or (int(match[1]), int(match[2])) != (offset, offset + length - 1):
                raise self._strange("another range than the one that it was asked for")
        elif offset != 0:
            raise self._strange("all of the image when it was asked for a part of it")
        if response.length != length:
            raise self._strange(f"a body of {response.length} bytes when it was asked for {length}")


class Body:
    """The body of an answer: bytes of the image, in order."""

    def __init__(self, remote: Remote, response: HTTPResponse, length: int) -> None:
        self._remote = remote
        self._response = response
        self._left = length

    def fill(self, view: memoryview) -> int:
        """Fill `view`, or as much of it as there still is; the bytes, 0 at the end."""
        part = view[: self._left]
        if part:
            self._remote.fill(self._response, part)
            self._left -= len(part)
            if not self._left:
                self._remote.end(self._response)
        return len(part)

    def close(self) -> None:
        if self._left:
            self._remote.close()  # the rest is still on its way

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

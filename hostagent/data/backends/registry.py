"""Which backend serves a ticket's URL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from hostagent.data.backends.base import ImageBackend
from hostagent.errors import AgentError


@dataclass(frozen=True, slots=True)
class Opening:
    """How a ticket wants its image opened: `url` as the ticket has it, `size` its limit in bytes, `sparse` whether
    zeroing may free space, `bitmap` which dirty bitmap is meant where there are several. `image` is the read-only image
    behind an NBD export, for reads that need not cross it.

    `shared` is the ticket's: what its backends share, under names of theirs (several threads use it: setdefault); each
    value has a `close()`, called when the ticket ends.
    """

    url: str
    size: int
    writable: bool = False
    sparse: bool = False
    dirty: bool = False
    bitmap: str | None = None
    image: Mapping[str, object] | None = None
    shared: dict[str, Any] = field(default_factory=dict)


Claim = Callable[[Mapping[str, Any], str], list[int]]
"""Of what a ticket shares: duplicates of the descriptors that were handed over for it by a name, for the caller to
close; AgentError not_found."""

Factory = Callable[[Opening], ImageBackend]
"""Checks the URL (AgentError invalid, denied) and returns a backend that opens nothing before its first use."""


@dataclass(frozen=True, slots=True)
class Registry:
    factories: dict[str, Factory] = field(default_factory=dict)

    def register(self, scheme: str, factory: Factory) -> None:
        self.factories[scheme] = factory

    def open(self, opening: Opening) -> ImageBackend:
        try:
            scheme = urlsplit(opening.url).scheme
        except ValueError as error:
            remedy = "write it as file:///path or nbd:unix:/path"
            raise AgentError("invalid", str(error), field="url", value=opening.url, remedy=remedy) from error
        factory = self.factories.get(scheme)
        if factory is None:
            known = ", ".join(sorted(self.factories))
            message = f"Unsupported url scheme: {scheme or opening.url[:40]}"
            raise AgentError("invalid", message, field="url", value=opening.url, remedy=f"one of {known}")
        return factory(opening)

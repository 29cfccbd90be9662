"""What commands that talk to a data daemon have in common: the ticket's URL, and how its server is reached.

The URL may stand in a file (`@FILE`) or on stdin (`-`): it is the right to the image, and a command line is for
everybody to see. Which user reads a qcow2 image, and where backing files may lie, is what this user's settings say.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hostagent.cli import arguments
from hostagent.cli.terminal import remark
from hostagent.errors import AgentError

if TYPE_CHECKING:
    from hostagent.client import Options
    from hostagent.config import Config

URL_MOST = 8192  # bytes of a file with a URL


def server_options(parser: argparse.ArgumentParser) -> None:
    """How a server is reached."""
    group = parser.add_argument_group("the server")
    group.add_argument("--cafile", metavar="FILE", help="the authorities (PEM) that its certificate must be of")
    group.add_argument("--insecure", action="store_true", help="accept any certificate, and whoever shows it")
    group.add_argument("--certificate", metavar="FILE", help="the client's own (PEM)")
    group.add_argument("--key", metavar="FILE", help="its key, where it is not in that file")
    group.add_argument("--proxy", metavar="URL", help="another server for the ticket, when its own is out of reach")
    group.add_argument("--proxy-only", action="store_true", help="use only the proxy")
    group.add_argument("--no-local", action="store_true", help="no unix socket, when the server is on this host")
    group.add_argument("--connect-timeout", metavar="S", type=arguments.seconds, help="(10)")
    group.add_argument("--silence", metavar="S", type=arguments.seconds, help="until a connection is given up (60)")


def options(args: argparse.Namespace) -> Options:
    """Those that were said; the rest as the library has them, or as the settings of this user say."""
    from hostagent import client, config_text

    settings = config_text.load(file=config_text.default_file(os.environ))
    if args.insecure:
        remark("--insecure: whoever answers at that address gets the ticket, and is believed")
    usual = client.Options()
    storage = client.Storage(
        binary=getattr(args, "storage_daemon", None) or settings.qsd.binary,
        user=getattr(args, "storage_user", None) or _usual_user(settings),
        pools=(*settings.images.pools, *(getattr(args, "pool", None) or ())),
        layers_most=settings.images.max_depth,
        start_timeout=settings.qsd.start_timeout,
        stop_timeout=settings.qsd.flush_timeout,
    )
    patience = _said(
        usual.patience, connect=args.connect_timeout, silence=args.silence, retry_for=getattr(args, "retry_for", None)
    )
    tls = client.Tls(args.cafile or "", args.insecure, args.certificate or "", args.key or "")
    names = ("workers", "bandwidth", "verify", "resume", "journal", "flush_interval", "request_size", "extents_most")
    said = {name: getattr(args, name, None) for name in (*names, "algorithm", "block_size", "proxy")}
    found: Options = _said(
        usual,
        tls=tls,
        patience=patience,
        storage=storage,
        proxy_only=args.proxy_only,
        local=not args.no_local,
        **said,
    )
    return found


def _usual_user(settings: Config) -> str:
    """The settings' own; and on a host without hypervisor, where nobody has set one, nobody."""
    import pwd

    user = settings.qsd.user
    if all(settings.origin.get(name) == "default" for name in ("qsd.user", "access.hypervisor_user")):
        try:
            pwd.getpwnam(user)
        except KeyError:
            return "nobody" if user else ""
    return user


def _said(usual: Any, **given: object) -> Any:
    return dataclasses.replace(usual, **{name: value for name, value in given.items() if value is not None})


def file_or_url(text: str) -> str:
    """A path, made absolute, or what means a ticket's URL."""
    return (
        text if text == "-" or text.startswith(("@", "http://", "https://", "http+unix://")) else arguments.file(text)
    )


def is_url(text: str) -> bool:
    """Of what `file_or_url` gave."""
    return not text.startswith("/")


def url(text: str) -> str:
    """The ticket's URL that an argument means. What is wrong with it is said without it."""
    from hostagent.client.address import parse

    found = _read(text)
    parse(found)
    return found


def _read(text: str) -> str:
    if text == "-":
        return sys.stdin.readline(URL_MOST).strip()
    if not text.startswith("@"):
        return text
    try:
        with Path(text[1:]).open() as lines:
            return lines.readline(URL_MOST).strip()
    except (OSError, ValueError) as error:
        message = f"the URL cannot be read from {text[1:]!r}: {error}"
        raise AgentError("invalid", message, field="url") from error

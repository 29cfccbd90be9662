"""`hostagent upload`, `download` and `checksum`: images over HTTP(S), from here to a data daemon and back.

They need no agent, and use hostagent.client alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hostagent.cli import arguments
from hostagent.cli.terminal import Terminal, remark
from hostagent.cli.ticket_url import file_or_url, is_url, options, server_options, url
from hostagent.errors import EXIT_OK
from hostagent.sizes import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from hostagent.client import Progress, Result


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    upload = _noun(nouns, common, "upload", _upload, "send an image to a data daemon, as a guest sees it")
    upload.add_argument("file", metavar="FILE", type=arguments.file, help="raw, or qcow2 with all that it stands on")
    upload.add_argument("url", metavar="URL", help="of the ticket; @FILE or - reads it")
    upload.add_argument("--format", choices=("raw", "qcow2"), help="of FILE; else its header says it")
    upload.add_argument("--target-is-zero", action="store_true", help="the server's image is all zeros already")
    _transferring(upload)

    download = _noun(nouns, common, "download", _download, "fetch an image from a data daemon")
    download.add_argument("url", metavar="URL", help="of the ticket; @FILE or - reads it")
    download.add_argument("file", metavar="FILE", type=arguments.file, help="a new file, or a block device")
    download.add_argument("--format", choices=("raw", "qcow2"), help="of FILE; else qcow2 if it is named so, or raw")
    download.add_argument("--backing", metavar="FILE", help="what a new qcow2 stands on")
    download.add_argument("--backing-format", choices=("raw", "qcow2"), help="of that; else its header says it")
    download.add_argument("--incremental", action="store_true", help="only what the server's dirty bitmap names")
    download.add_argument("--preallocate", action="store_true", help="take all of a raw file's space at once")
    download.add_argument("--force", action="store_true", help="replace FILE, once the new one is whole")
    _transferring(download)

    text = "an image's checksum, the same for every format"
    checksum = _noun(nouns, common, "checksum", _checksum, text)
    checksum.add_argument("where", metavar="FILE|URL", type=file_or_url, help="an image, or a ticket's URL")
    checksum.add_argument("--format", choices=("raw", "qcow2"), help="of FILE; else its header says it")
    checksum.add_argument("--progress", choices=("auto", "json", "none"), default="auto", help="how it is followed")
    _hashing(checksum)
    server_options(checksum)
    _storage(checksum)
    checksum.add_argument("--workers", metavar="N", type=arguments.count, help="blocks at a time (4)")


def _noun(nouns: Any, common: argparse.ArgumentParser, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = nouns.add_parser(name, help=text, description=text, parents=[common])
    parser.set_defaults(run=run)
    return parser


def _transferring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the transfer")
    group.add_argument("--workers", metavar="N", type=arguments.count, help="connections, as far as the server has (4)")
    group.add_argument("--bandwidth", metavar="RATE", type=arguments.rate, help="such as 50MiB/s, of all together")
    group.add_argument("--verify", action="store_true", help="compare both sides' checksums at the end")
    group.add_argument("--progress", choices=("auto", "json", "none"), default="auto", help="how it is followed")
    group.add_argument(
        "--resume",
        choices=("auto", "trust", "never"),
        help="auto: go on where it is proven to be the same image; trust: also with a new ticket for it",
    )
    group.add_argument("--journal", metavar="FILE", type=arguments.path, help="where that is written down")
    group.add_argument("--retry-for", metavar="S", type=arguments.seconds, help="without progress, until it gives up")
    group.add_argument("--flush-interval", metavar="S", type=arguments.seconds, help="so much is done again (10)")
    group.add_argument("--request-size", metavar="SIZE", type=arguments.size, help="of one request (32MiB)")
    group.add_argument("--extents-most", metavar="N", type=arguments.count, help="of one image (4000000)")
    _hashing(parser)
    server_options(parser)
    _storage(parser)


def _hashing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the checksum")
    group.add_argument("--algorithm", metavar="NAME", help="as hashlib and the server name it (blake2b)")
    group.add_argument("--block-size", metavar="SIZE", type=arguments.size, help="(4MiB)")


def _storage(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the storage daemon that knows qcow2")
    group.add_argument("--pool", metavar="DIR", type=arguments.path, action="append", help="backing files may lie here")
    group.add_argument("--storage-user", metavar="USER", help="as which it runs, for root (qsd.user)")
    group.add_argument("--storage-daemon", metavar="PATH", help="(qsd.binary)")


def _upload(args: argparse.Namespace) -> int:
    from hostagent import client

    work = client.Upload(args.file, url(args.url), args.format, args.target_is_zero)
    with _followed(args, "upload", args.file) as (show, terminal):
        found = client.upload(work, options(args), show=show, tell=remark)
    return _reported(terminal, found)


def _download(args: argparse.Namespace) -> int:
    from hostagent import client

    work = client.Download(
        url=url(args.url),
        path=args.file,
        format=args.format,
        backing=os.path.abspath(args.backing) if args.backing else None,  # noqa: PTH100 - links are kept as they are
        backing_format=args.backing_format,
        incremental=args.incremental,
        preallocate=args.preallocate,
        force=args.force,
    )
    with _followed(args, "download", args.file) as (show, terminal):
        found = client.download(work, options(args), show=show, tell=remark)
    return _reported(terminal, found)


def _checksum(args: argparse.Namespace) -> int:
    from hostagent import client

    remote = is_url(args.where)
    where = url(args.where) if remote else args.where
    with _followed(args, "checksum", "the image" if remote else where) as (show, terminal):
        found = client.checksum(where, options(args), format=args.format, show=show, tell=remark)
    if terminal.json:
        terminal.data(dataclasses.asdict(found))
    else:
        terminal.line(f"{found.checksum}  {found.algorithm}, blocks of {format_size(found.block_size)}")
    return EXIT_OK


def _reported(terminal: Terminal, found: Result) -> int:
    if terminal.json:
        terminal.data(dataclasses.asdict(found))
        return EXIT_OK
    took = format_duration(found.seconds)
    speed = f", {format_rate(found.moved / found.seconds)}" if found.seconds else ""
    what = f"{format_size(found.size)}, {format_size(found.moved)} of it over the wire, in {took}{speed}"
    if found.resumed:
        what += f"; {format_size(found.resumed)} were there already"
    if found.checksum:
        what += f"; verified, {found.checksum.algorithm} {found.checksum.checksum}"
    terminal.line(f"{found.operation}ed {what}")
    return EXIT_OK


@contextmanager
def _followed(args: argparse.Namespace, operation: str, target: str) -> Iterator[tuple[Any, Terminal]]:
    """What shows the progress: a bar, lines of JSON, or nothing."""
    from hostagent.cli.progress import shown

    terminal = Terminal.of(args)
    with shown(args.progress, terminal) as display:

        def show(progress: Progress) -> None:
            display.update(
                {
                    "operation": operation,
                    "target": target,
                    "state": progress.state,
                    "cursor": {"cur": progress.done, "end": progress.size},
                    "rate": progress.rate,
                    "eta": progress.eta,
                }
            )

        try:
            yield show, terminal
        except KeyboardInterrupt:
            if operation != "checksum":
                remark("interrupted; the same command again goes on from here")
            raise

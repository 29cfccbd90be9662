"""`hostagent image …`: look at an image and its backing chain.

It runs here, by the agent's own bounded reader and rules; the image is not trusted. The settings are those of the
running agent where there is one (hostagent.cli.judged), and no agent is needed.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from hostagent.cli import arguments, remote_map
from hostagent.cli.terminal import Column, Terminal, remark
from hostagent.cli.ticket_url import file_or_url, is_url, server_options
from hostagent.errors import EXIT_ERROR, EXIT_OK
from hostagent.sizes import format_size

if TYPE_CHECKING:
    from hostagent.cli.follow import Display
    from hostagent.cli.judged import Judged
    from hostagent.config import Config
    from hostagent.images.chain import ChainLimits, OpenChain
    from hostagent.images.extents import Extent
    from hostagent.images.qemu_img import QemuImg
    from hostagent.images.tool import RunAs, ToolLimits

MAP_COLUMNS = (
    Column("start", right=True), Column("length", right=True), Column("depth", right=True), "kind", "file",
)  # fmt: skip
COLUMNS = ("", "path", "format", Column("virtual", right=True), Column("allocated", right=True), "state")


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    noun = nouns.add_parser("image", help="look at an image (runs here, without the agent)", parents=[common])
    verbs = noun.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, parents=[common])
        place = ("PATH|URL", file_or_url) if name == "map" else ("PATH", arguments.file)
        parser.add_argument("path", metavar=place[0], type=place[1])
        parser.add_argument("--format", choices=("raw", "qcow2"), help="say raw for raw: else the header decides")
        parser.set_defaults(run=run)
        return parser

    verb("inspect", _inspect, "the backing chain, as its headers say")
    verb("check", _check, "qemu-img check of each layer, under limits")
    extents = verb("map", _map, "which bytes are data and which are zeros, in which file; or behind a ticket's URL")
    extents.add_argument("--start", metavar="SIZE", type=arguments.size, default=0, help="from this byte on")
    extents.add_argument("--length", metavar="SIZE", type=arguments.size, help="so many bytes")
    extents.add_argument("--dirty", action="store_true", help="of a URL: and what has changed since its bitmap")
    server_options(extents)


def _inspect(args: argparse.Namespace) -> int:
    from hostagent.images.chain import open_chain

    terminal = Terminal.of(args)
    with open_chain(args.path, limits=_limits(_settings(args).settings), format=args.format) as opened:
        layers = _layers(opened)
    if terminal.json:
        terminal.data({"path": args.path, "layers": layers})
        return EXIT_OK
    rows = [
        (
            "top" if i == 0 else "base" if i == len(layers) - 1 else str(i),
            str(layer["path"]),
            str(layer["format"]),
            format_size(layer["virtual_size"]),
            format_size(layer["allocated"]),
            ", ".join(layer["flags"]),
        )
        for i, layer in enumerate(layers)
    ]
    terminal.table(COLUMNS, rows)
    return EXIT_OK


def _layers(opened: OpenChain) -> list[dict[str, Any]]:
    return [
        {
            "path": layer.path,
            "format": layer.format,
            "virtual_size": layer.virtual_size,
            "allocated": layer.allocated,
            "backing": layer.backing,
            "file": str(layer.file),
            "flags": [name for name in ("dirty", "corrupt") if header is not None and getattr(header, name)],
        }
        for layer, header in zip(opened.chain.layers, opened.headers, strict=True)
    ]


def _check(args: argparse.Namespace) -> int:
    """Each layer by itself. A damaged one is said, and the others are still checked."""
    import asyncio

    from hostagent.cli.progress import shown
    from hostagent.images.chain import open_chain

    terminal, found = Terminal.of(args), _settings(args)
    config = found.settings
    remark(f"settings: {found.whose}")
    with (
        open_chain(args.path, limits=_limits(config), format=args.format) as opened,
        shown("auto", terminal) as display,
    ):
        results = asyncio.run(_check_each(opened, _tool(config), display))
    if terminal.json:
        settings = "agent" if found.agent else "own"
        terminal.data({"path": args.path, "settings": settings, "layers": results})
    else:
        terminal.table(
            ("path", "result", "detail"), [(str(r["path"]), str(r["result"]), str(r["detail"] or "")) for r in results]
        )
    return EXIT_ERROR if any(result["result"] == "fail" for result in results) else EXIT_OK


async def _check_each(opened: OpenChain, tool: QemuImg, display: Display) -> list[dict[str, Any]]:
    """qemu-img tells nothing of a check before its end, so the bar moves layer by layer, by what each has allocated."""
    from jobs.errors import JobError

    results: list[dict[str, Any]] = []
    layers = opened.chain.layers
    total = sum(layer.allocated for layer in layers)
    for index, layer in enumerate(layers):
        cursor = {"cur": sum(done.allocated for done in layers[:index]), "end": total}
        state = f"layer {index + 1} of {len(layers)}"
        display.update({"operation": "check", "target": layer.path, "cursor": cursor, "state": state})
        entry: dict[str, Any] = {"path": layer.path, "result": "ok", "code": None, "detail": None, "remedy": None}
        try:
            found = await tool.check(opened, layer=index)
            if not found.supported:
                entry["detail"] = f"{layer.format} has nothing to check"
            elif found.warning:
                entry |= {"result": "warn", "detail": found.warning}
        except JobError as error:
            remedy = f"; {error.remedy}" if error.remedy else ""
            entry |= {"result": "fail", "code": error.code, "detail": error.message + remedy, "remedy": error.remedy}
        results.append(entry)
    return results


def _map(args: argparse.Namespace) -> int:
    import asyncio
    import dataclasses

    if is_url(args.path):
        return remote_map.show(args)
    from hostagent.images.chain import open_chain
    from hostagent.images.extents import Map

    terminal, config = Terminal.of(args), _settings(args).settings
    user, limits = _tools(config)
    tool = Map(user=user, limits=limits, binary=config.images.qemu_img, output=config.images.map_output)
    with open_chain(args.path, limits=_limits(config), format=args.format) as opened:
        found = asyncio.run(tool.extents(opened, start=args.start, length=args.length))
        size = opened.chain.top.virtual_size
    if terminal.json:
        extents = [dataclasses.asdict(extent) for extent in found]
        terminal.data({"path": args.path, "virtual_size": size, "extents": extents})
        return EXIT_OK
    rows = [(str(one.start), str(one.length), str(one.depth), _kind(one), one.path or "") for one in found]
    terminal.table(MAP_COLUMNS, rows)
    return EXIT_OK


def _kind(extent: Extent) -> str:
    if extent.data:
        return "data, zero" if extent.zero else "data"
    return "zero" if extent.zero else "unknown"


def _settings(args: argparse.Namespace) -> Judged:
    from hostagent.cli.judged import judged
    from hostagent.config_text import default_file, load

    own = load(file=default_file(os.environ))
    return judged(arguments.named_socket(args) or own.api.socket, own)


def _limits(config: Config) -> ChainLimits:
    from hostagent.images.chain import ChainLimits

    return ChainLimits(pools=config.images.pools, max_depth=config.images.max_depth, top_anywhere=True)


def _tool(config: Config) -> QemuImg:
    from hostagent.images.qemu_img import QemuImg

    user, limits = _tools(config)
    return QemuImg(user=user, limits=limits, binary=config.images.qemu_img)


def _tools(config: Config) -> tuple[RunAs | None, ToolLimits]:
    """qemu-img as the storage daemons' user, as the agent would run it; as ourselves where that is not possible."""
    import pwd

    from hostagent.images.tool import RunAs, ToolLimits

    limits = ToolLimits(
        timeout=config.images.check_timeout, cpu=config.images.tool_cpu, memory=config.images.tool_memory
    )
    user = None
    if os.geteuid() == 0 and config.qsd.user:
        try:
            found = pwd.getpwnam(config.qsd.user)
            user = RunAs(found.pw_uid, found.pw_gid, tuple(os.getgrouplist(found.pw_name, found.pw_gid)))
        except KeyError:
            from hostagent.cli.client import CliError

            raise CliError(
                "unavailable",
                f"the user {config.qsd.user!r}, as which qemu-img runs, does not exist",
                remedy="install the hypervisor's packages, or set qsd.user",
            ) from None
    return user, limits

"""`hostagent image …`: look at an image and its backing chain.

It runs here, without the agent, by the same bounded reader and the same rules; the image is not trusted.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from hostagent.cli import arguments
from hostagent.cli.terminal import Column, Terminal
from hostagent.errors import EXIT_ERROR, EXIT_OK
from hostagent.sizes import format_size

if TYPE_CHECKING:
    from hostagent.config import Config
    from hostagent.images.chain import ChainLimits, OpenChain
    from hostagent.images.qemu_img import QemuImg

COLUMNS = ("", "path", "format", Column("virtual", right=True), Column("allocated", right=True), "state")


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    noun = nouns.add_parser("image", help="look at an image (runs here, without the agent)", parents=[common])
    verbs = noun.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, run, text in (
        ("inspect", _inspect, "the backing chain, as its headers say"),
        ("check", _check, "qemu-img check of each layer, under limits"),
    ):
        parser = verbs.add_parser(verb, help=text, description=text, parents=[common])
        parser.add_argument("path", metavar="PATH", type=arguments.path)
        parser.add_argument("--format", choices=("raw", "qcow2"), help="needed for raw, which is never probed")
        parser.set_defaults(run=run)


def _inspect(args: argparse.Namespace) -> int:
    from hostagent.images.chain import open_chain

    terminal = Terminal.of(args)
    with open_chain(args.path, limits=_limits(_settings()), format=args.format) as opened:
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

    from hostagent.images.chain import open_chain

    terminal, config = Terminal.of(args), _settings()
    with open_chain(args.path, limits=_limits(config), format=args.format) as opened:
        results = asyncio.run(_check_each(opened, _tool(config)))
    if terminal.json:
        terminal.data({"path": args.path, "layers": results})
    else:
        terminal.table(
            ("path", "result", "detail"), [(str(r["path"]), str(r["result"]), str(r["detail"] or "")) for r in results]
        )
    return EXIT_ERROR if any(result["result"] == "fail" for result in results) else EXIT_OK


async def _check_each(opened: OpenChain, tool: QemuImg) -> list[dict[str, Any]]:
    from jobs.errors import JobError

    results: list[dict[str, Any]] = []
    for index, layer in enumerate(opened.chain.layers):
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


def _settings() -> Config:
    from hostagent.config import default_file, load

    return load(file=default_file(os.environ))


def _limits(config: Config) -> ChainLimits:
    from hostagent.images.chain import ChainLimits

    return ChainLimits(pools=config.images.pools, max_depth=config.images.max_depth, top_anywhere=True)


def _tool(config: Config) -> QemuImg:
    """qemu-img as the storage daemons' user, as the agent would run it; as ourselves where that is not possible."""
    import pwd

    from hostagent.images.qemu_img import QemuImg, RunAs, ToolLimits

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
    return QemuImg(user=user, limits=limits, binary=config.images.qemu_img)

"""Downloads of a raw file: over TCP with one and four connections, over the unix socket, through TLS; nginx beside it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench import sink
from tests.bench.arena import SIZE, Arena, Case, arena, cheaper, details, digest, faster, in_turns
from tests.bench.figure import Figure, Result
from tests.bench.sink import Where
from tests.bench.stage import Stage
from tests.data.daemons import free_port
from tests.data.wire import tcp
from tests.harness import raw_image

NAME = "data-file"
RUNS = 7
NGINX = "nginx is not installed (apt install nginx-light)"


def measure(stage: Stage) -> Figure:
    runs = stage.count(RUNS)
    with arena(stage, "ours", "stock", "tuned", "ours-tls", "stock-tls") as place, contextlib.ExitStack() as open_:
        image = raw_image(place.folder / "image.raw", SIZE)
        nginx = open_.enter_context(_nginx(place, image)) if shutil.which("nginx") else None

        def cases(_: contextlib.ExitStack) -> list[Case]:
            place.anew()
            return [*_cases(place, image), *([nginx] if nginx else [])]

        found = in_turns(stage, NAME, cases, runs)
    beside = faster(found, "ours 1", "nginx", 1.0, "1 connection") if nginx else None
    missing = Result("1 connection, throughput / nginx", None, 1.0, "x", at_least=True, why=NGINX)
    return Figure(
        name=NAME,
        measured=f"download of a {SIZE >> 30} GiB raw file in memory, server's CPU beside it",
        peer="ovirt-imageio 2.5.1, stock and tuned; nginx with sendfile",
        runs=runs,
        results=(
            faster(found, "ours 1", "stock 1", 1.4, "1 connection"),
            faster(found, "ours 4", "stock 4", 0.95, "4 connections"),
            cheaper(found, "ours 1", "stock 1", 0.8, "1 connection"),
            cheaper(found, "ours 4", "stock 4", 0.8, "4 connections"),
            faster(found, "ours-tls 1", "stock-tls 1", 1.4, "TLS"),
            cheaper(found, "ours-tls 1", "stock-tls 1", 0.75, "TLS"),
            beside or missing,
        ),
        details=details(found),
    )


def _cases(place: Arena, image: Path) -> Iterator[Case]:
    like, url = digest(image), f"file://{image}"
    for name in place.daemons:
        for number in (1, 4):
            yield place.download(name, url, label=f"{name} {number}", connections=number, like=like)
    for name in ("ours", "stock"):
        yield place.download(name, url, label=f"{name} unix", unix=True, like=like)


@contextlib.contextmanager
def _nginx(place: Arena, image: Path) -> Iterator[Case]:
    """One process of it, on loopback."""
    home, port = place.folder / "nginx", free_port()
    home.mkdir()
    (home / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {home}/pid; error_log {home}/error;\n"
        "events {}\n"
        f"http {{ access_log off; sendfile on; tcp_nopush on; client_body_temp_path {home}; proxy_temp_path {home};\n"
        f"fastcgi_temp_path {home}; uwsgi_temp_path {home}; scgi_temp_path {home};\n"
        f"server {{ listen 127.0.0.1:{port}; root {image.parent}; }} }}\n"
    )
    command = ["nginx", "-e", str(home / "error"), "-p", str(home), "-c", str(home / "nginx.conf")]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        _until_served(port)
        where = Where(("127.0.0.1", port))
        yield Case("nginx", lambda: sink.download(where, f"/{image.name}", SIZE, 1), process.pid)
    finally:
        process.terminate()
        process.wait(20)


def _until_served(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), tcp(port):
            return
        time.sleep(0.05)
    raise AssertionError("nginx does not listen")

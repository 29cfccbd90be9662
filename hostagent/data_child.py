"""The data daemon as the agent starts it: as a user of its own, which has none of our rights. What it may not open is
handed over to it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hostagent import __version__, host
from hostagent.config import Config
from hostagent.config_text import show
from hostagent.data import listeners
from hostagent.drivers import process
from hostagent.transfers import child
from hostagent.transfers.control import Control

SETTINGS = "data.toml"


def make(config: Config, group: int | None, tell: Callable[[bool, str | None], None]) -> child.Child:
    """`group` is the socket's; `tell` hears whether it answers, and why not."""
    data, settings = config.data, Path(config.agent.runtime_dir) / SETTINGS
    user = host.data_user(config, group)
    control = Control(
        data.control_socket,
        data.control_socket.with_name(listeners.HANDOVER),
        timeout=data.header_timeout,
        revoke=data.revoke_timeout,
    )
    # It has our modules and no others: not those of the folder that we were started in.
    command = [sys.executable, "-I" if sys.flags.isolated else "-P", "-m", "hostagent.cli.main"]
    command += ["data", "--config", str(settings)]
    mark = f"{__version__}-{hashlib.sha256(show(config).encode()).hexdigest()[:16]}"
    files = data.max_connections * 3 + 1000

    def launch(command: list[str], fds: list[int]) -> subprocess.Popen[bytes]:
        return process.launch(command, user=user, pass_fds=fds, log_path=None, open_files=files)

    return child.Child(
        control,
        child.Settings(command, mark, ready=config.qsd.start_timeout, look=5 * config.qsd.probe_interval),
        listen=lambda: listeners.listen(config),
        launch=launch,
        tell=tell,
    )


def write_settings(config: Config) -> None:
    """What it reads at its start: ours, as they are in force. It runs as another user, and they are no secret."""
    path = Path(config.agent.runtime_dir) / SETTINGS
    path.write_text(show(config))
    path.chmod(0o644)

"""Whose settings a command works by that runs here: those of the running agent, else what an agent would read now.

An agent is asked only if it runs as this very user. Settings name programs that are run and users that they run as, so
another user's agent must not choose them; and what that user may open, this one cannot judge.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hostagent.cli.client import Client, CliError
from hostagent.errors import AgentError

if TYPE_CHECKING:
    from hostagent.config import Config

ASK_TIMEOUT = 5.0  # seconds; an agent that does not answer must not keep an image from being looked at


@dataclass(frozen=True, slots=True)
class Judged:
    """`whose` says it to a person; `agent` is whether they are the running agent's."""

    settings: Config
    agent: bool
    whose: str


def judged(socket: Path, own: Config) -> Judged:
    """The settings of the agent at `socket`; `own` where it cannot be asked, with the reason."""
    from hostagent import config_text

    try:
        values = Client(socket, owners={os.geteuid()}, timeout=ASK_TIMEOUT).get("/v1/host").data.get("settings")
        return Judged(config_text.restored(values, "the running agent"), agent=True, whose=f"the agent's at {socket}")
    except CliError as error:
        reasons = {"unreachable": "no agent answers", "denied": "the agent is another user's"}
        why = f"{reasons.get(error.code, error.message)} at {socket}"
    except (AgentError, LookupError, TypeError, AttributeError):
        why = f"the agent at {socket} does not tell its own so that this version understands them"
    return Judged(own, agent=False, whose=f"not an agent's: {why}, so by what one would read when it starts here")

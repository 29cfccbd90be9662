"""SIGHUP, `systemctl reload`: the settings are read anew. What can change in a running agent changes; of the rest it is
said that it waits for the next start. Settings that are wrong change nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable

from hostagent import sdnotify
from hostagent.config import Config
from hostagent.config_text import plain
from hostagent.errors import AgentError

log = logging.getLogger(__name__)

AT_ONCE = ("logs.level", "api.certificate_scopes")


class Reload:
    """`load` reads the settings; `config` are those in force. `anew` gets those that were read, for what else is read
    anew with them: it raises AgentError where they are wrong, and changes nothing then. `reopen` comes first, whatever
    they are. `status` is the agent's line for the service manager."""

    def __init__(
        self,
        config: Config,
        load: Callable[[], Config],
        anew: Callable[[Config], None] = lambda config: None,
        status: Callable[[], str] = lambda: "ready",
        reopen: Callable[[], None] = lambda: None,
    ) -> None:
        self._in_force = plain(config)
        self._load = load
        self._anew = anew
        self._status = status
        self._reopen = reopen

    def now(self) -> None:
        sdnotify.reloading()
        status = ""
        try:
            self._reopen()
            self._apply(self._load())
        except AgentError as error:
            fields = {"error": error.message, "remedy": error.remedy}
            log.error("the settings are wrong: those from before stay in force", extra={"fields": fields})
            status = f"the settings are wrong, those from before stay in force: {error.message}"
        finally:
            sdnotify.ready(status or self._status())

    def _apply(self, config: Config) -> None:
        wanted = plain(config)
        self._anew(config)
        logging.getLogger().setLevel(config.logs.level.upper())
        self._in_force |= {name: wanted[name] for name in AT_ONCE}
        waiting = [name for name, value in wanted.items() if value != self._in_force.get(name)]
        log.info("settings read anew", extra={"fields": {"at_the_next_start": waiting}})

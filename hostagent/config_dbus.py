"""The settings of the agent on D-Bus."""

from __future__ import annotations

from dataclasses import dataclass

from hostagent.config_rule import MIB, setting


@dataclass(frozen=True, slots=True)
class Dbus:
    address: str = setting(
        "auto",
        "The message bus that the agent is on, as org.hostagent1: `system`, `session`, `off`, or an address "
        "(unix:path=…). auto is the system bus for root, as soon as there is one, and off for a plain user.",
    )
    call_timeout: float = setting(5.0, "Seconds to connect to the bus, and for its own answers.", low=0.1, high=600)
    stall_timeout: float = setting(
        10.0,
        "Seconds for which the bus may take or answer nothing; then it is left, and connected to anew.",
        low=0.1,
        high=600,
    )
    polkit_timeout: float = setting(
        30.0,
        "Seconds until polkit must have said whether a caller may do what he asks for, his password included. After "
        "that he may not.",
        low=0.1,
        high=600,
    )
    reconnect_wait: float = setting(1.0, "Seconds until a lost bus is tried again.", low=0.1, high=600)
    reconnect_wait_max: float = setting(30.0, "That wait doubles up to this many seconds.", low=0.1, high=3600)
    interval: float = setting(1.0, "Seconds between two signals of one job's progress.", low=0.05, high=600)
    refresh: float = setting(
        60.0, "Seconds between two comparisons of what is shown with what there is.", low=1, high=86400
    )
    finished_time: float = setting(600.0, "Seconds for which an ended job is still shown.", low=0, high=86400)
    finished_count: int = setting(100, "Ended jobs that are shown; the oldest go first.", low=0, high=10000)
    objects: int = setting(5000, "Jobs, exports and grants that are shown.", low=1, high=100000)
    queue: int = setting(
        10000, "Objects that have changed and wait for the bus; when more do, all are read anew.", low=10, high=1000000
    )
    calls: int = setting(64, "Calls at a time, and as many of root and the agent's own user.", low=1, high=10000)
    caller_calls: int = setting(16, "Calls of one connection at a time.", low=1, high=10000)
    max_message: int = setting(65536, "Bytes of a message to the agent.", low=4096, high=16 * MIB, size=True)

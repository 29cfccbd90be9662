"""The spellings of NBD URLs in tickets."""

from __future__ import annotations

import pytest

from hostagent.data.backends.nbd_url import server_of
from hostagent.errors import AgentError
from hostagent.nbdclient.dial import Server


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("nbd:unix:/run/s", Server("", socket="/run/s")),
        ("nbd:unix:/run/s:exportname=sda", Server("sda", socket="/run/s")),
        ("nbd:unix:/run/s:exportname=a:b=c d", Server("a:b=c d", socket="/run/s")),
        ("nbd:unix:/run/%41:exportname=%41", Server("%41", socket="/run/%41")),
        ("nbd:host:10809", Server("", host="host", port=10809)),
        ("nbd:host:1:exportname=sda", Server("sda", host="host", port=1)),
        ("nbd:[::1]:1:exportname=sda", Server("sda", host="::1", port=1)),
        ("nbd://host:1/sda", Server("sda", host="host", port=1)),
        ("nbd://host/", Server("", host="host", port=10809)),
        ("nbd://host", Server("", host="host", port=10809)),
        ("nbd://[fe80::1]:2/a/b%20c", Server("a/b c", host="fe80::1", port=2)),
        ("nbd+unix:///sda?socket=/run/s", Server("sda", socket="/run/s")),
        ("nbd+unix:///?socket=/run/a+b%20c", Server("", socket="/run/a+b c")),
    ],
)
def test_it_is_understood(url: str, server: Server) -> None:
    assert server_of(url) == server


@pytest.mark.parametrize(
    "url",
    [
        "nbd:",
        "nbd:unix:",
        "nbd:unix:relative",
        "nbd:host",
        "nbd:host:",
        "nbd:host:0",
        "nbd:host:65536",
        "nbd:host:-1",
        "nbd:host:٣",
        "nbd:::1:5",
        "nbd:host:1\n",
        "nbd://host:x/",
        "nbd://host:0/",
        "nbd://user:secret@host/",
        "nbd://host/a?socket=/s",
        "nbd://host/a#b",
        "nbd://host/%ff",
        "nbd://host/%00",
        "nbd+unix:///a",
        "nbd+unix:///a?socket=s",
        "nbd+unix:///a?socket=/s&tls=1",
        "nbd+unix://host/a?socket=/s",
    ],
)
def test_it_is_refused(url: str) -> None:
    with pytest.raises(AgentError) as error:
        server_of(url)
    assert (error.value.code, error.value.field) == ("invalid", "url")
    assert error.value.remedy
    assert "secret" not in f"{error.value.message} {error.value.value}"

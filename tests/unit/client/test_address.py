"""A ticket's URL: what is one, and that its secret is shown nowhere."""

from __future__ import annotations

import uuid
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostagent.client.address import by_proxy, parse
from hostagent.errors import AgentError

ID = str(uuid.UUID(int=7))


@pytest.mark.parametrize(
    ("url", "shown", "path"),
    [
        (f"https://host:54322/images/{ID}", "https://host:54322", f"/images/{ID}"),
        (f"http://host/images/{ID}", "http://host:80", f"/images/{ID}"),
        (f"https://[::1]:1/images/{ID}", "https://[::1]:1", f"/images/{ID}"),
        (f"http+unix:///images/{ID}?socket=/run/d.sock", "unix socket /run/d.sock", f"/images/{ID}"),
        (f"http+unix:///images/{ID}?socket=@/org/ovirt/imageio", "unix socket @/org/ovirt/imageio", f"/images/{ID}"),
    ],
)
def test_a_url_is_an_address(url: str, shown: str, path: str) -> None:
    address = parse(url)
    assert (str(address), address.path, address.secret) == (shown, path, ID)
    assert ID not in repr(address)
    assert address.socket.startswith("\0") == ("@" in url)


@pytest.mark.parametrize(
    "url",
    [
        f"ftp://host/images/{ID}",
        f"host/images/{ID}",
        f"https:///images/{ID}",
        f"https://user:word@host/images/{ID}",
        f"https://host:99999/images/{ID}",
        f"https://host/images/{ID}?flush=n",
        f"https://host/images/{ID}#part",
        f"https://host/images/{ID}/",
        f"https://host/images/{ID}\r\nX: y",
        f"https://host/ images/{ID}",
        f"https://[::1/images/{ID}",
        f"http+unix:///images/{ID}",
        f"http+unix://host/images/{ID}?socket=/x",
        "https://host/",
        "",
        "https://host/images/" + "x" * 5000,
    ],
)
def test_what_is_no_ticket_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(AgentError) as refused:
        parse(url)
    assert refused.value.code == "invalid"
    assert ID not in refused.value.message + (refused.value.remedy or "")


@given(
    st.text("abcdefgh0123456789-._~:@!$", min_size=1, max_size=40).filter(lambda t: set(t) != {"."}),
    st.text(max_size=20),
)
def test_a_servers_word_is_shown_without_the_id(secret: str, around: str) -> None:
    address = parse(f"https://host/images/{quote(secret, safe='')}")
    assert address.secret == secret
    for written in (secret, quote(secret, safe="")):
        hidden = address.hidden(f"No such ticket '{written}'")
        assert f"'{written}'" not in hidden
        assert hidden.startswith("No such ticket") or written in "No such ticket"


def test_a_proxy_has_the_tickets_path_unless_it_has_its_own() -> None:
    address = parse(f"https://host:54322/images/{ID}")
    assert str(by_proxy(address, "https://engine:54323")) == "https://engine:54323"
    assert by_proxy(address, "https://engine:54323/").path == address.path
    assert by_proxy(address, "http://engine/other/x").path == "/other/x"
    with pytest.raises(AgentError):
        by_proxy(address, "engine:54323")

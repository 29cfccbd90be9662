from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from hostagent import host
from hostagent.errors import AgentError


def test_an_inherited_socket_is_where_the_settings_say() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder) / "api.sock"
        listener.bind(str(path))
        host.refuse_other_address(listener, path)
        with pytest.raises(AgentError, match="the settings name") as refused:
            host.refuse_other_address(listener, path.with_name("other.sock"))
        assert refused.value.field == "api.socket" and "ListenStream" in str(refused.value.remedy)

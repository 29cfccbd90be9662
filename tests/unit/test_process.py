from __future__ import annotations

import asyncio
import os
import subprocess
import time
from pathlib import Path

from hostagent.drivers import process
from hostagent.drivers.process import User, Watch


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "60"])


def test_a_process_is_known_by_its_start_time_and_not_by_its_id() -> None:
    child = sleeper()
    try:
        began = process.start_time(child.pid)
        own = process.start_time(os.getpid())
        assert began is not None and own is not None and own <= began
        child.kill()
        deadline = time.monotonic() + 5
        while process.start_time(child.pid) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.start_time(child.pid) is None, "a zombie is not alive"
    finally:
        child.kill()
        child.wait()
    assert process.start_time(child.pid) is None


def test_a_watch_tells_the_end_once_and_how() -> None:
    async def scenario() -> None:
        ends: list[str] = []
        child = sleeper()
        watch = Watch(child.pid, lambda: ends.append("end"), child)
        assert not await watch.wait(0.01)
        child.kill()
        assert await watch.wait(5)
        assert (ends, watch.gone, watch.how) == (["end"], True, "killed by SIGKILL")
        watch.close()

    asyncio.run(scenario())


def test_a_child_is_launched_as_its_user_in_a_session_of_its_own(tmp_path: Path) -> None:
    user = User("nobody", 65534, 65534, ()) if os.geteuid() == 0 else User.current()
    script = (
        "import os; print(os.getuid(), os.getgroups() if os.getuid() == 65534 else [], os.getsid(0) == os.getpid())"
    )
    log = tmp_path / "log"
    child = process.launch(["/usr/bin/python3", "-c", script], user=user, pass_fds=(), log_path=log, open_files=64)
    assert child.wait(10) == 0
    uid, groups, leader = log.read_text().split(" ", 2)
    assert (int(uid), groups, leader.strip()) == (user.uid, "[]", "True")

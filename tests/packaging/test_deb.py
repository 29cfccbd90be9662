"""The life of the Debian package in a fresh Debian 12 that boots systemd: installed, used, upgraded, removed, purged."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostagent import __version__
from hostagent.schema import MIGRATIONS
from tests.packaging import debian
from tests.packaging.source import WAIT, copied
from tests.systemd import container
from tests.systemd.container import Container

pytestmark = pytest.mark.slow

MIB = 1 << 20
AGENT = "hostagent.service"
NEWER = "0.999"
PACKAGES = "/opt/packages"
DROP_IN = "/etc/hostagent/hostagent.d/jobs.toml"
SITE = "/usr/lib/hostagent/lib/python3.11/site-packages"

READER = """
import pathlib, sys, time, nbd
handle, truth, count = nbd.NBD(), pathlib.Path("/srv/images/truth.raw").read_bytes(), 0
handle.connect_uri(sys.argv[1])
while not pathlib.Path("/srv/enough").exists():
    at = count % 64 << 20
    assert handle.pread(1 << 20, at) == truth[at:at + (1 << 20)], at
    count += 1
    pathlib.Path("/srv/next").write_text(str(count))
    pathlib.Path("/srv/next").rename("/srv/count")  # which is never empty
    time.sleep(0.05)
print("read", count)
"""
"""One connection that is kept open, and whose every byte is compared."""

IMPORTS = """
import importlib, pathlib, sys
site = pathlib.Path(sys.argv[1])
for package in ("events", "jobs", "hostagent"):
    for path in sorted((site / package).rglob("*.py")):
        importlib.import_module(".".join(path.relative_to(site).with_suffix("").parts).removesuffix(".__init__"))
import libvirt, libvirt_qemu, nbd, rich
print(sys.path)
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hostagent.deb as it is built, and newer.deb of a higher version, whose store has one more table."""
    if (why := debian.missing() or container.missing()) is not None:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("packages")
    tree = copied(tmp_path_factory.mktemp("tree"))
    done = subprocess.run([tree / "tools/deb.sh"], capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    (built,) = (tree / "dist").glob("*.deb")
    built.rename(folder / "hostagent.deb")
    content = folder / "content"
    subprocess.run(["dpkg-deb", "-R", folder / "hostagent.deb", content], check=True, timeout=WAIT)
    edit(content / "DEBIAN/control", f"Version: {__version__}\n", f"Version: {NEWER}\n")
    ours = content / SITE.strip("/") / "hostagent"
    edit(ours / "__init__.py", __version__, NEWER)
    with (ours / "schema.py").open("a") as schema:
        schema.write('\nMIGRATIONS = (*MIGRATIONS, "CREATE TABLE upgraded (x TEXT);")\n')
    (content / "DEBIAN/md5sums").unlink()
    command = ["dpkg-deb", "--root-owner-group", "-b", content, folder / "newer.deb"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=WAIT)
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, path
    path.write_text(text.replace(old, new, 1))


@pytest.fixture(scope="module")
def host(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """It has what the package depends on, and runs; `clean` has the names of its files then."""
    root = tmp_path_factory.mktemp("debian") / "root"
    debian.made(root, debian.run("dpkg-deb", "-f", str(packages / "hostagent.deb"), "Depends").strip())
    host = Container(root, name="hostagent-deb", binds={PACKAGES: packages})
    host.prepare()
    try:
        try:
            host.boot()
        except container.Unbootable as error:
            pytest.skip(f"no container boots here: {error}")
        yield host
    finally:
        host.end()


def names(host: Container) -> set[str]:
    """Of all files but what the system itself writes in passing, and the images."""
    passing = ("/var/log/*", "/var/cache/*", "/srv/*", "/var/lib/dpkg/*", "/var/lib/systemd/*", "/etc/*-", "/run/*",
               "/proc/*", "/sys/*", "/dev/*", "/tmp/*", "/opt/*")  # fmt: skip
    without = [word for pattern in passing for word in ("-not", "-path", pattern)]
    return set(host.run("find", "/", "-xdev", *without).splitlines())


def image(host: Container, name: str) -> str:
    """An overlay of 64 MiB of which everything is in its base. All read as truth.raw."""
    make = (
        "mkdir -p /srv/images && cd /srv/images && ([ -e truth.raw ] || dd if=/dev/urandom of=truth.raw bs=1M count=64) && "
        f"cp truth.raw {name}-base.raw && qemu-img create -q -f qcow2 -F raw -b /srv/images/{name}-base.raw {name}.qcow2 "
        f"&& chmod 600 {name}*"
    )
    host.run("sh", "-c", make)
    return f"/srv/images/{name}.qcow2"


def asked(host: Container, *words: str) -> Any:
    return json.loads(host.run("hostagent", *words, "--json"))


def slow_pull(host: Container, path: str) -> str:
    """One that would take minutes, in its midst."""
    job = str(asked(host, "job", "pull", path, "--bandwidth", "512KiB/s")["id"])
    host.until(lambda: asked(host, "job", "show", job)["cursor"]["cur"] > 0, "it pulls")
    return job


def refused(host: Container, *words: str) -> str:
    """What dpkg says when a script of the package refuses."""
    done = subprocess.run(host.command(*words), capture_output=True, text=True, timeout=WAIT)
    assert done.returncode != 0, done.stdout
    return done.stderr


def storage_daemons(host: Container) -> list[str]:
    return host.run("pgrep", "-f", "id=hostagent-", check=False).split()


def processes(host: Container) -> str:
    """The agent's own, and those that it runs as others."""
    users = "libvirt-qemu,hostagent-data,nobody"
    return host.run("pgrep", "-f", "hostagent", check=False) + host.run("pgrep", "-u", users, check=False)


CONTROL = """
import http.client, socket, sys
connection = http.client.HTTPConnection("localhost")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect("/run/hostagent/data-control.sock")
connection.request(sys.argv[1], "/tickets/t-1", sys.argv[2] or None)
assert connection.getresponse().status < 300
"""


def ticket(host: Container, verb: str, body: dict[str, Any] | None = None) -> None:
    host.run("python3", "-c", CONTROL, verb, json.dumps(body) if body else "")


def data_user(host: Container) -> str:
    pid = asked(host, "status")["host"]["data_daemon"]["pid"]
    return host.run("stat", "-c", "%U", f"/proc/{pid}").strip()


def status_of(host: Container) -> str:
    """Of the package, as dpkg has it."""
    shown = host.run("dpkg-query", "-W", "-f", "${db:Status-Status}", "hostagent", check=False)
    return shown or "not known"


def test_the_life_of_the_package(host: Container) -> None:
    clean = names(host)
    it_refuses_an_environment_that_was_made_by_hand(host)
    it_installs_and_runs_in_its_own_environment(host)
    it_upgrades_under_a_running_pull_and_a_served_export(host)
    it_is_not_removed_while_an_export_is_served(host)
    it_is_removed_and_not_purged_while_access_is_given(host)
    it_comes_back_and_goes_for_good(host)
    assert names(host) - clean == set(), "nothing is left"
    assert clean - names(host) == set(), "and nothing else is gone"


def it_refuses_an_environment_that_was_made_by_hand(host: Container) -> None:
    host.run("sh", "-c", "mkdir /usr/lib/hostagent && touch /usr/lib/hostagent/pyvenv.cfg")
    said = refused(host, "dpkg", "-i", f"{PACKAGES}/hostagent.deb")
    assert "made by hand" in said and not (host.root / "usr/bin/hostagent").exists(), said
    host.run("rm", "-r", "/usr/lib/hostagent")


def it_installs_and_runs_in_its_own_environment(host: Container) -> None:
    host.run("dpkg", "-i", f"{PACKAGES}/hostagent.deb", timeout=WAIT)
    assert host.run("hostagent", "--version") == f"hostagent {__version__}\n"
    enabled = ("systemctl", "is-enabled", AGENT, "hostagent.socket", "hostagent-data.service")
    assert host.run(*enabled, check=False).split() == ["enabled", "enabled", "disabled"]
    assert host.show(AGENT, "ActiveState") == "active"
    host.until(lambda: asked(host, "status")["host"]["data_daemon"]["running"], "the data daemon runs")
    assert data_user(host) == "hostagent-data"
    host.until(lambda: asked(host, "status")["host"]["dbus"].startswith("connected"), "it is on the system bus")
    version = ("/org/hostagent1", "org.hostagent1.Manager", "Version")
    assert host.run("busctl", "get-property", "org.hostagent1", *version) == f's "{__version__}"\n'
    assert host.run("dpkg", "-V", "hostagent") == ""
    assert host.run("getent", "group", "hostagent") and host.run("getent", "passwd", "hostagent-data")

    python = "/usr/lib/hostagent/bin/python3"
    path = host.run(python, "-I", "-B", "-c", IMPORTS, SITE)
    assert SITE in path and "/usr/lib/python3/dist-packages" in path and "/usr/local" not in path
    for name in ("jobs", "events", "hostagent", "pydantic"):
        assert host.run("python3", "-c", f"import {name}", check=False) == ""
        assert "No module named" in refused(host, "python3", "-c", f"import {name}")
    trap = (
        "mkdir -p /srv/trap/hostagent && echo 'raise SystemExit(9)' > /srv/trap/hostagent/__init__.py && cd /srv/trap"
    )
    assert "hostagent" in host.run("sh", "-c", f"{trap} && PYTHONPATH=/srv/trap hostagent --version")

    offered = "source /usr/share/bash-completion/completions/hostagent; COMP_WORDS=(hostagent jo); COMP_CWORD=1; "
    assert host.run("bash", "-c", f"{offered}_hostagent; echo ${{COMPREPLY[@]}}") == "job\n"
    assert ".SS job pull" in host.run("zcat", "/usr/share/man/man1/hostagent-job.1.gz")


def it_upgrades_under_a_running_pull_and_a_served_export(host: Container) -> None:
    host.run("sh", "-c", f"printf '[jobs]\nwidth = 3\n' > {DROP_IN}")
    pulled, served = image(host, "pulled"), image(host, "served")
    job = slow_pull(host, pulled)
    export = asked(host, "export", "start", served)
    (host.root / "srv/reader.py").write_text(READER)
    reader = subprocess.Popen(
        host.command("python3", "/srv/reader.py", export["uri"]), stdout=subprocess.PIPE, text=True
    )
    host.until(lambda: (host.root / "srv/count").exists(), "it reads")
    before, agent = storage_daemons(host), host.show(AGENT, "MainPID")
    assert len(before) == 2

    host.run("dpkg", "-i", f"{PACKAGES}/newer.deb", timeout=WAIT)

    assert host.run("hostagent", "--version") == f"hostagent {NEWER}\n"
    assert host.show(AGENT, "ActiveState") == "active" and host.show(AGENT, "MainPID") != agent
    assert storage_daemons(host) == before, "both were left alone"
    count = int((host.root / "srv/count").read_text())
    host.until(lambda: int((host.root / "srv/count").read_text()) > count, "the client goes on reading")
    assert reader.poll() is None
    shown = asked(host, "job", "show", job)
    assert (shown["state"], shown["finished"]) == ("running", None)
    assert f"width = 3  # from: {DROP_IN}" in host.run("hostagent", "serve", "--show-config")

    host.run("hostagent", "job", "speed", job, "unlimited")
    host.until(lambda: asked(host, "job", "show", job)["finished"], "the pull ends")
    assert asked(host, "job", "show", job)["state"] == "completed"
    base = "/srv/images/pulled-base.raw"
    host.until(lambda: asked(host, "job", "show", job)["chain"]["revoked"] == [base], "its base is taken back")
    host.run("qemu-img", "compare", pulled, "/srv/images/truth.raw")
    assert job in host.run("script", "-qec", "hostagent job list", "/dev/null"), "a terminal's table, by Debian's rich"
    (host.root / "srv/enough").touch()
    assert reader.wait(container.WAIT) == 0


def it_is_not_removed_while_an_export_is_served(host: Container) -> None:
    said = refused(host, "dpkg", "-r", "hostagent")
    assert "1 export still here" in said and "it is not removed" in said, said
    assert status_of(host) == "installed" and host.show(AGENT, "ActiveState") == "active"
    (export,) = (one for one in asked(host, "export", "list")["items"] if one["state"] == "running")
    host.run("qemu-img", "compare", "-f", "raw", "-F", "raw", export["uri"], "/srv/images/truth.raw")
    ticket(host, "PUT", {"uuid": "t-1", "ops": ["read"], "size": 64 * MIB, "timeout": 600, "url": "nbd:unix:/x"})
    host.run("hostagent", "export", "stop", export["id"])
    said = refused(host, "dpkg", "-r", "hostagent")
    assert "a data daemon with tickets" in said, said
    assert host.run("systemctl", "is-active", AGENT, "hostagent.socket").split() == ["active", "active"], "again"
    ticket(host, "PATCH", {"timeout": 0})  # it is over, kept for an hour, and holds up nothing

    # An agent that does not answer cannot say; its storage daemons can be seen.
    slow_pull(host, image(host, "aborted"))
    host.run("systemctl", "stop", "hostagent.socket", AGENT)
    said = refused(host, "dpkg", "-r", "hostagent")
    assert "storage daemons" in said, said
    assert status_of(host) == "installed"
    host.until(lambda: host.show(AGENT, "ActiveState") == "active", "it is there again")


def it_is_removed_and_not_purged_while_access_is_given(host: Container) -> None:
    (job,) = (one for one in asked(host, "job", "list")["items"] if not one["finished"])
    host.run("hostagent", "job", "abort", job["id"])
    host.until(lambda: asked(host, "job", "show", job["id"])["state"] == "aborted", "it ended")
    host.until(lambda: not storage_daemons(host), "its storage daemon ended")
    as_him = ("setpriv", "--reuid=somebody", "--regid=somebody", "--clear-groups")
    sleeps = ("python3", "-c", "import time; time.sleep(600)", "hostagent.cli.main", "socket,id=hostagent-a,fd=3")
    host.run("useradd", "--no-create-home", "somebody")
    with subprocess.Popen(host.command(*as_him, *sleeps)):
        host.until(lambda: host.run("pgrep", "-u", "somebody", check=False), "he runs it")
        try:
            host.run("dpkg", "-r", "hostagent", timeout=WAIT)
        finally:
            host.run("pkill", "-u", "somebody")
    host.run("userdel", "somebody")
    assert status_of(host) == "config-files"
    assert processes(host) == "", "none is left"
    assert host.run("systemctl", "is-active", "hostagent.slice", "hostagent-qsd.slice", check=False).split() == [
        "inactive", "inactive"
    ]  # fmt: skip
    gone = "for path in /usr/lib/hostagent /usr/bin/hostagent /run/hostagent /lib/systemd/system/hostagent.service; do "
    assert host.run("sh", "-c", f"{gone} [ ! -e $path ] || echo $path; done") == ""
    assert "width = 3" in (host.root / DROP_IN.strip("/")).read_text(), "settings stay"
    version = (
        "import sqlite3; print(*sqlite3.connect('/var/lib/hostagent/hostagent.db').execute('PRAGMA user_version'))"
    )
    assert host.run("python3", "-c", version) == f"({len(MIGRATIONS) + 1},)\n", "the store was migrated, and stays"

    said = refused(host, "dpkg", "-P", "hostagent")
    assert "/srv/images/aborted-base.raw" in said and "not purged" in said, said
    assert (host.root / "var/lib/hostagent/hostagent.db").exists()


def it_comes_back_and_goes_for_good(host: Container) -> None:
    host.run("dpkg", "-i", f"{PACKAGES}/newer.deb", timeout=WAIT)
    states = sorted(job["state"] for job in asked(host, "job", "list")["items"])
    assert states == ["aborted", "completed"], "it knows them still"
    (grant,) = (one for one in asked(host, "grant", "list", "--given")["items"])
    assert grant["path"] == "/srv/images/aborted-base.raw"
    assert asked(host, "grant", "revoke", grant["id"])["state"] == "revoked"
    host.run("dpkg", "-P", "hostagent", timeout=WAIT)
    assert status_of(host) in ("not-installed", "not known")
    assert processes(host) == ""
    units = ("systemctl", "list-units", "--all", "--plain", "--no-legend", "hostagent*.service")
    host.until(lambda: host.run(*units) == "", f"systemd has forgotten them: {host.run(*units)}")
    assert host.run("systemctl", "list-unit-files", "--no-legend", "hostagent*", check=False) == ""
    for path in ("pulled", "aborted", "served"):
        host.run("qemu-img", "compare", f"/srv/images/{path}.qcow2", "/srv/images/truth.raw")
        assert "libvirt-qemu" not in host.run("getfacl", "-p", f"/srv/images/{path}-base.raw")

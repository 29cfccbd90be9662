from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import tomllib
from pathlib import Path

import pytest

from hostagent import config, config_text
from hostagent.addresses import tcp_address
from hostagent.errors import AgentError

REPOSITORY = Path(__file__).parents[2]
EVERY = [
    (section, item)
    for section in config.SECTIONS
    for item in dataclasses.fields(type(getattr(config_text.load(env={}), section)))
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "hostagent.d").mkdir()
    return tmp_path / "hostagent.toml"


def _refused(**given: object) -> AgentError:
    with pytest.raises(AgentError) as refused:
        config_text.load(**{"env": {}, **given})  # type: ignore[arg-type]
    assert refused.value.code == "invalid"
    return refused.value


def test_defaults_are_in_force_without_a_file() -> None:
    loaded = config_text.load(env={})
    assert loaded.jobs.width == 4
    assert loaded.api.socket == loaded.agent.runtime_dir / "hostagent.sock"
    assert loaded.qsd.user == loaded.access.hypervisor_user
    assert set(loaded.origin.values()) == {"default"}


def test_each_source_overrides_the_one_before(file: Path) -> None:
    file.write_text("[jobs]\nwidth = 5\nqueue = 6\nslice = '32MiB'\nsettle_retry_max = 8\n")
    (file.parent / "hostagent.d" / "20-b.toml").write_text("[jobs]\nqueue = 8\n")
    (file.parent / "hostagent.d" / "10-a.toml").write_text("[jobs]\nqueue = 7\nslice = 16777216\n")
    (file.parent / "hostagent.d" / "no.txt").write_text("not TOML")
    env = {"HOSTAGENT_JOBS_SLICE": "8M", "HOSTAGENT_JOBS_SETTLE_RETRY_MAX": "9.5", "HOSTAGENT_SOCKET": "/x"}
    loaded = config_text.load(file=file, env=env, overrides={"jobs.settle_retry_max": "10"})
    assert (loaded.jobs.width, loaded.jobs.queue, loaded.jobs.slice, loaded.jobs.settle_retry_max) == (
        5,
        8,
        8 << 20,
        10.0,
    )
    assert loaded.origin["jobs.width"] == str(file)
    assert loaded.origin["jobs.queue"].endswith("20-b.toml")
    assert loaded.origin["jobs.slice"] == "HOSTAGENT_JOBS_SLICE"
    assert loaded.origin["jobs.settle_retry_max"] == "the command line"
    assert loaded.origin["jobs.start_timeout"] == "default"


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("[jobs]\nwidht = 4\n", "jobs.width"),
        ("[job]\nwidth = 4\n", "jobs"),
        ("[qsd]\nbinray = 'x'\n", "qsd.binary"),
        ("jobs = 4\n", "jobs"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(file: Path, text: str, near: str) -> None:
    file.write_text(text)
    refused = _refused(file=file)
    assert near in str(refused)
    assert str(file) in str(refused)


def test_an_unknown_variable_is_refused_with_the_nearest_known_one() -> None:
    refused = _refused(env={"HOSTAGENT_JOBS_WIDHT": "4"})
    assert "HOSTAGENT_JOBS_WIDTH" in str(refused)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("[jobs]\nwidth = '4'\n", "jobs.width"),
        ("[jobs]\nwidth = 4.0\n", "jobs.width"),
        ("[jobs]\nwidth = true\n", "jobs.width"),
        ("[jobs]\nwidth = 0\n", "jobs.width"),
        ("[jobs]\nslice = '64 apples'\n", "jobs.slice"),
        ("[jobs]\nslice = '1K'\n", "jobs.slice"),
        ("[jobs]\nsettle_retry_max = nan\n", "jobs.settle_retry_max"),
        ("[jobs]\nsettle_retry_max = inf\n", "jobs.settle_retry_max"),
        ("[images]\npools = '/images'\n", "images.pools"),
        ("[images]\npools = ['images']\n", "images.pools"),
        ("[images]\nmax_depth = 201\n", "images.max_depth"),
        ("[agent]\nstate_dir = 'state'\n", "agent.state_dir"),
        ("[agent]\nhost = 7\n", "agent.host"),
        ('[agent]\nhost = "a\\nb"\n', "agent.host"),
        ("[logs]\nlevel = 'loud'\n", "logs.level"),
        ("[jobs]\nsettle_retry = 31\n", "jobs.settle_retry"),
    ],
)
def test_a_wrong_value_is_refused_naming_key_value_and_expectation(file: Path, text: str, name: str) -> None:
    file.write_text(text)
    refused = _refused(file=file)
    assert refused.field == name
    assert name in str(refused) and str(file) in str(refused) and "must be" in str(refused)
    assert refused.remedy


@pytest.mark.parametrize("text", ["abc", "", "1e3", "9" * 30, "0"])
def test_a_wrong_number_in_the_environment_is_refused(text: str) -> None:
    assert _refused(env={"HOSTAGENT_JOBS_WIDTH": text}).field == "jobs.width"


def test_a_list_in_the_environment_is_written_like_path() -> None:
    assert config_text.load(env={"HOSTAGENT_IMAGES_POOLS": "/a:/b c"}).images.pools == ("/a", "/b c")
    assert config_text.load(env={"HOSTAGENT_IMAGES_POOLS": ""}).images.pools == ()


@pytest.mark.parametrize("content", [b"[jobs", b"\xff\xfe", b"#" * (2 << 20)], ids=["syntax", "bytes", "size"])
def test_a_file_that_is_no_settings_file_is_refused_by_name(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert str(file) in str(_refused(file=file))


@pytest.mark.parametrize("where", ["hostagent.toml", "hostagent.d/tcp.toml"])
def test_a_section_that_is_there_twice_is_refused_with_what_to_do(file: Path, where: str) -> None:
    wrong = file.parent / where
    wrong.write_text("# [api] is below\n\n [ api ]  # once\nmax_body = 1024\n\n[api]\nsse_queue = 1\n")
    refused = _refused(file=file if wrong == file else wrong.parent)
    assert "Cannot declare" in refused.message and str(wrong) in refused.message
    remedy = f"remove the [api] in line 6 of {wrong} and put the keys below it under the [api] that is there already"
    assert (refused.remedy or "").startswith(f"{remedy} (line 3)")
    assert (f"{file.parent}/hostagent.d/NAME.toml" in (refused.remedy or "")) == (wrong == file)


@pytest.mark.parametrize(("text", "place"), [("[api]\n=", "line 2 of"), ("[api", "the end of")])
def test_what_is_no_toml_is_refused_with_its_place(file: Path, text: str, place: str) -> None:
    file.write_text(text)
    assert f"correct {place} {file}" in (_refused(file=file).remedy or "")


def test_drop_ins_are_read_where_there_is_no_file_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hostagent"
    (folder / "hostagent.d").mkdir(parents=True)
    drop_in = folder / "hostagent.d" / "tcp.toml"
    drop_in.write_text("[jobs]\nwidth = 7\n")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    env = {"XDG_CONFIG_HOME": str(tmp_path)}

    def width() -> tuple[int, str]:
        loaded = config_text.load(file=config_text.default_file(env), env={})
        return loaded.jobs.width, loaded.origin["jobs.width"]

    assert width() == (7, str(drop_in))
    (folder / "hostagent.toml").write_text("[jobs]\nwidth = 6\nqueue = 5\n")
    assert width() == (7, str(drop_in)), "and where there is, after it"
    drop_in.unlink()
    assert width() == (6, str(folder / "hostagent.toml"))


def test_a_missing_file_is_refused_by_name(file: Path) -> None:
    assert str(file) in str(_refused(file=file))


def test_the_usual_file_in_a_folder_that_we_may_not_search_is_not_there() -> None:
    """As after `sudo -u`, which may keep another user's HOME. One that was named must be read."""
    with tempfile.TemporaryDirectory() as home:
        usual = Path(home) / ".config" / "hostagent" / "hostagent.toml"
        usual.parent.mkdir(parents=True)
        usual.touch()
        usual.parent.chmod(0)
        root = os.geteuid() == 0
        if root:
            os.chown(home, 65534, -1)
            os.seteuid(65534)
        try:
            assert config_text.default_file({"HOME": home}) is None
            with pytest.raises(AgentError, match="Permission denied"):
                config_text.load(file=usual, env={})
        finally:
            if root:
                os.seteuid(0)
            usual.parent.chmod(0o700)


def test_a_socket_too_long_for_a_unix_socket_is_refused() -> None:
    refused = _refused(overrides={"agent.runtime_dir": "/" + "x" * 100})
    assert refused.field == "api.socket"
    assert "agent.runtime_dir" in (refused.remedy or "")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:18177", ("127.0.0.1", 18177)),
        ("127.8.0.1:0", ("127.8.0.1", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_scrapes_are_answered_on_the_loopback_address(text: str, address: tuple[str, int]) -> None:
    loaded = config_text.load(env={"HOSTAGENT_METRICS_LISTEN": text})
    assert tcp_address(loaded.metrics.listen) == address


@pytest.mark.parametrize(
    "text",
    ["18177", "127.0.0.1", "localhost:18177", "::1:18177", "[::1]", "127.0.0.1:65536", "1.2.3:4", "[127.0.0.1]:1", ":1"],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    refused = _refused(env={"HOSTAGENT_METRICS_LISTEN": text})
    assert refused.field == "metrics.listen"
    assert text in refused.message and "127.0.0.1:18177" in (refused.remedy or "")


@pytest.mark.parametrize("text", ["0.0.0.0:18177", "[::]:18177", "192.0.2.7:18177"])
def test_beyond_the_loopback_somebody_must_say_so(text: str) -> None:
    refused = _refused(env={"HOSTAGENT_METRICS_LISTEN": text})
    assert refused.field == "metrics.listen"
    assert "metrics.beyond_loopback" in (refused.remedy or "")
    env = {"HOSTAGENT_METRICS_LISTEN": text, "HOSTAGENT_METRICS_BEYOND_LOOPBACK": "true"}
    assert config_text.load(env=env).metrics.listen == text


def test_nobody_is_answered_by_tcp_unless_the_settings_say_so() -> None:
    assert tcp_address(config_text.load(env={}).metrics.listen) is None


def test_an_empty_hypervisor_user_is_our_own() -> None:
    loaded = config_text.load(env={}, overrides={"access.hypervisor_user": ""})
    assert loaded.access.hypervisor_user == loaded.qsd.user == ""


def test_the_storage_user_may_be_another_one() -> None:
    loaded = config_text.load(env={"HOSTAGENT_QSD_USER": "nbd", "HOSTAGENT_ACCESS_HYPERVISOR_USER": "qemu"})
    assert (loaded.access.hypervisor_user, loaded.qsd.user) == ("qemu", "nbd")


def test_a_plain_user_gets_the_xdg_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    env = {"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/1000"}
    loaded = config_text.load(env=env)
    assert str(loaded.agent.state_dir) == "/home/u/.local/state/hostagent"
    assert str(loaded.api.socket) == "/run/user/1000/hostagent/hostagent.sock"
    assert loaded.access.hypervisor_user == ""
    assert str(config_text.load(env={"HOME": "/home/u"}).agent.runtime_dir) == "/tmp/hostagent-1000"
    assert str(config_text.load(env=env | {"XDG_STATE_HOME": "/s"}).agent.state_dir) == "/s/hostagent"


def test_root_gets_the_system_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    loaded = config_text.load(env={"XDG_RUNTIME_DIR": "/run/user/0"})
    assert (str(loaded.agent.state_dir), str(loaded.agent.runtime_dir)) == ("/var/lib/hostagent", "/run/hostagent")
    assert loaded.access.hypervisor_user == "libvirt-qemu"


@pytest.mark.parametrize(("section", "item"), EVERY, ids=lambda value: getattr(value, "name", value))
def test_every_setting_has_a_manual_and_a_default_within_its_own_rule(
    section: str, item: dataclasses.Field[object]
) -> None:
    rule = item.metadata["rule"]
    assert len(rule.manual.split()) >= 4
    if isinstance(item.default, int | float) and not isinstance(item.default, bool):
        assert rule.low is not None, "a number has a least value"
        assert rule.low <= item.default <= (rule.high if rule.high is not None else item.default)
    if rule.choices:
        assert item.default in rule.choices


def test_what_show_prints_reads_back_as_the_same_settings(file: Path) -> None:
    shown = config_text.load(env={"HOSTAGENT_IMAGES_POOLS": '/a "b":/c\x1b', "HOSTAGENT_JOBS_SLICE": "3M"})
    file.write_text(config_text.show(shown))
    again = config_text.load(file=file, env={})
    for section in config.SECTIONS:
        assert getattr(again, section) == getattr(shown, section)
    assert "# from: HOSTAGENT_JOBS_SLICE" in file.read_text()
    assert "\x1b" not in file.read_text()


def test_settings_that_an_agent_tells_as_json_are_read_back_the_same() -> None:
    env = {"HOSTAGENT_IMAGES_POOLS": "/a:/b", "HOSTAGENT_ACCESS_HYPERVISOR_USER": "", "HOSTAGENT_JOBS_SLICE": "16MiB"}
    loaded = config_text.load(env=env)
    told = json.loads(json.dumps(config_text.plain(loaded)))
    again = config_text.restored({**told, "of.later": 1}, "the agent")
    assert config_text.plain(again) == config_text.plain(loaded)
    assert again.images.pools == ("/a", "/b") and again.qsd.user == loaded.qsd.user
    with pytest.raises(AgentError):
        config_text.restored({**told, "jobs.width": "much"}, "the agent")


def test_the_example_file_is_the_generated_one_and_changes_nothing() -> None:
    text = (REPOSITORY / "units" / "hostagent.toml").read_text()
    assert text == config_text.example()
    assert all(table == {} for table in tomllib.loads(text).values())


def test_the_example_uncommented_is_what_root_gets(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    lines = config_text.example().splitlines()
    file.write_text(
        "\n".join(line.removeprefix("#") if line.startswith("#") and " = " in line else line for line in lines)
    )
    loaded, plain = config_text.load(file=file, env={}), config_text.load(env={})
    for section in config.SECTIONS:
        assert getattr(loaded, section) == getattr(plain, section)

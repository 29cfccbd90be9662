"""Chains: the rules about where members may lie, each with the bad input that it is for."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from hostagent.images.chain import ChainLimits, OpenChain, open_chain, verify
from hostagent.inodes import real_path
from jobs.errors import JobError
from jobs.model import Chain
from tests.links import no_link

Craft = Callable[..., bytes]


class Images:
    """A folder with hand-made images in it."""

    def __init__(self, folder: Path, craft: Craft) -> None:
        self.folder = folder
        self._craft = craft

    def qcow2(self, name: str, backing: str | None = None, format: str | None = "qcow2", **fields: object) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if backing is not None:
            fields["backing"] = backing.encode()
            fields["backing_format"] = format.encode() if format else None
        path.write_bytes(self._craft(**fields))
        return path

    def raw(self, name: str, size: int = 4096) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0" * size)
        return path


@pytest.fixture
def images(tmp_path: Path, craft: Craft) -> Images:
    return Images(tmp_path.resolve() / "disks", craft)


@pytest.fixture(autouse=True)
def no_descriptor_is_left_open(tmp_path: Path) -> Iterator[None]:
    yield
    links = (Path(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path))
    opened = [target for link in links if str(target := os.readlink(link)).startswith(str(tmp_path))]
    assert not opened


def refusal(path: Path | str, *, pools: tuple[str, ...] = (), format: str | None = None, depth: int = 200) -> JobError:
    with pytest.raises(JobError) as caught:
        open_chain(str(path), limits=ChainLimits(pools=pools, max_depth=depth), format=format)
    return caught.value


def opened(path: Path, *, pools: tuple[str, ...] = (), format: str | None = None) -> OpenChain:
    return open_chain(str(path), limits=ChainLimits(pools=pools), format=format)


def test_a_chain_is_read_from_the_top_to_the_raw_base(images: Images) -> None:
    base = images.raw("base.raw", 8192)
    middle = images.qcow2("middle.qcow2", "base.raw", "raw")
    top = images.qcow2("top.qcow2", str(middle))
    with opened(top) as found:
        assert found.chain.paths() == [str(top), str(middle), str(base)]
        assert [layer.format for layer in found.chain.layers] == ["qcow2", "qcow2", "raw"]
        assert [layer.backing for layer in found.chain.layers] == [str(middle), "base.raw", None]
        assert [layer.virtual_size for layer in found.chain.layers] == [1 << 20, 1 << 20, 8192]
        assert [header is None for header in found.headers] == [False, False, True]
        assert [os.fstat(fd).st_ino for fd in found.fds] == [layer.file.ino for layer in found.chain.layers]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(found.fds[0], b"x")


def test_a_closed_chain_gives_no_descriptors(images: Images) -> None:
    found = opened(images.qcow2("top.qcow2"))
    found.close()
    found.close()
    with pytest.raises(ValueError, match="closed"):
        _ = found.fds


@pytest.mark.parametrize("sizes", [(1 << 20, 8 << 20), (8 << 20, 1 << 20)], ids=["smaller", "larger"])
def test_an_overlay_may_be_smaller_or_larger_than_its_base(images: Images, sizes: tuple[int, int]) -> None:
    images.qcow2("base.qcow2", size=sizes[1])
    with opened(images.qcow2("top.qcow2", "base.qcow2", size=sizes[0])) as found:
        assert tuple(layer.virtual_size for layer in found.chain.layers) == sizes


def test_an_empty_raw_base_is_fine(images: Images) -> None:
    images.raw("base.raw", 0)
    with opened(images.qcow2("top.qcow2", "base.raw", "raw")) as found:
        assert found.chain.layers[1].virtual_size == 0


# Where members may lie


@pytest.mark.parametrize("name", ["/etc/shadow", "../" * 20 + "etc/passwd", "/dev/null", "/dev"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_backing_file_elsewhere_is_refused_before_it_is_opened(
    images: Images, monkeypatch: pytest.MonkeyPatch, name: str, format: str
) -> None:
    top = images.qcow2("top.qcow2", name, format)
    read: list[str] = []
    real = os.open

    def recorded(path: str, flags: int) -> int:
        fd = real(path, flags)
        if not flags & os.O_PATH:
            read.append(os.readlink(f"/proc/self/fd/{fd}"))
        return fd

    monkeypatch.setattr(os, "open", recorded)
    error = refusal(top)
    monkeypatch.undo()
    assert error.code == "outside_pools"
    assert error.remedy and "images.pools" in error.remedy
    assert "/" not in error.remedy, "a folder that a header names must not be put into the pools for that"
    assert read == [str(top)]


def test_a_backing_file_in_a_folder_below_the_overlays_is_outside(images: Images) -> None:
    images.qcow2("deeper/base.qcow2")
    assert refusal(images.qcow2("top.qcow2", "deeper/base.qcow2")).code == "outside_pools"


def test_a_pool_holds_what_lies_anywhere_below_it(images: Images, tmp_path: Path) -> None:
    images.qcow2("../pool/a/b/base.qcow2")
    top = images.qcow2("top.qcow2", "../pool/a/b/base.qcow2")
    pool = tmp_path.resolve() / "pool"
    with opened(top, pools=(str(pool),)) as found:
        assert found.chain.paths()[1] == str(pool / "a/b/base.qcow2")
    link = tmp_path / "link-to-pool"
    link.symlink_to(pool)
    opened(top, pools=(str(link),)).close()
    assert refusal(top, pools=(str(tmp_path / "poo"),)).code == "outside_pools"
    assert refusal(top, pools=(str(tmp_path / "pool/a/b/c"),)).code == "outside_pools"


def test_a_folder_link_cannot_smuggle_a_file_into_the_overlays_folder(images: Images) -> None:
    images.qcow2("../secret/base.qcow2")
    top = images.qcow2("top.qcow2", "inside/base.qcow2")
    (images.folder / "inside").symlink_to(images.folder.parent / "secret")
    error = refusal(top)
    assert error.code == "outside_pools"
    assert "secret/base.qcow2" in error.message


def test_the_top_may_have_to_lie_in_a_pool(images: Images) -> None:
    top = images.qcow2("top.qcow2")
    limits = ChainLimits(pools=(str(images.folder),), top_anywhere=False)
    open_chain(str(top), limits=limits).close()
    with pytest.raises(JobError, match="in no configured pool") as caught:
        open_chain(str(top), limits=replace(limits, pools=("/nowhere",)))
    assert caught.value.code == "outside_pools"


def test_who_may_name_images_in_pools_only_learns_nothing_of_what_lies_elsewhere(images: Images) -> None:
    secret, pool = images.folder.parent / "secret", images.folder
    images.raw("../secret/there.raw")
    top = images.qcow2("top.qcow2")
    (images.folder.parent / "link").symlink_to(secret)
    (images.folder.parent / "to-pool").symlink_to(pool)
    (pool / "way-out").symlink_to(secret)
    limits = ChainLimits(pools=(str(pool),), top_anywhere=False)

    def told(name: str) -> tuple[str, str, object]:
        with pytest.raises(JobError) as caught:
            open_chain(name, format="raw", limits=limits)
        return caught.value.code, caught.value.message, caught.value.value

    outside = images.folder.parent
    for name in (
        *(f"{outside}/link/there.raw", f"{outside}/link/none", f"{outside}/none/none", f"{outside}/to-pool/top.qcow2"),
        *(f"{outside}/to-pool/none", f"{outside}/secret/../disks/top.qcow2", f"{outside}/none/../disks/top.qcow2"),
        *(f"{pool}/way-out/there.raw", f"{pool}/way-out/none", f"{pool}/../secret/there.raw", "/proc/self/cwd/x"),
    ):
        assert told(name) == ("outside_pools", f"{name} lies in no configured pool", name)
    (pool / "sub").mkdir()
    for name in (top, pool / "sub/../top.qcow2", f"{pool}//./top.qcow2"):
        open_chain(str(name), limits=limits).close()


@pytest.mark.parametrize("name", ["../link/there.raw", "../link/none", "../secret/none", "../none/none", "/proc/self/cwd/x"])
def test_nor_does_he_by_a_header(images: Images, name: str) -> None:
    secret = images.folder.parent / "secret"
    images.raw("../secret/there.raw")
    (images.folder.parent / "link").symlink_to(secret)
    top = images.qcow2("top.qcow2", name, "raw")
    limits = ChainLimits(pools=(str(images.folder),), top_anywhere=False)
    with pytest.raises(JobError) as caught:
        open_chain(str(top), limits=limits)
    assert caught.value.code == "outside_pools" and caught.value.value == str(top.parent / name)
    assert "(it is" not in caught.value.message and "secret/there" not in caught.value.message


def test_he_may_stand_on_what_a_link_finds_in_a_pool(images: Images) -> None:
    base = images.raw("sub/base.raw")
    (images.folder.parent / "link").symlink_to(images.folder)
    for name in ("../link/sub/base.raw", "../none/../link/sub/base.raw"):
        top = images.qcow2("top.qcow2", name, "raw")
        with open_chain(str(top), limits=ChainLimits(pools=(str(images.folder),), top_anywhere=False)) as found:
            assert found.chain.paths()[1] == str(base)


@pytest.mark.parametrize(("kernel", "code"), [(errno.EACCES, "denied"), (errno.EINVAL, "image_invalid")])
@pytest.mark.parametrize("anywhere", [True, False])
def test_a_link_that_cannot_be_read_is_said_to_be_in_the_way(
    images: Images, monkeypatch: pytest.MonkeyPatch, kernel: int, code: str, *, anywhere: bool
) -> None:
    """As /proc/PID/cwd of another user's process, or a name that is a link no more in the moment of the look."""
    images.raw("base.raw")
    link = images.folder.parent / "link"
    link.symlink_to(images.folder)
    no_link(monkeypatch, link, kernel)
    limits = ChainLimits(pools=(str(images.folder.parent),), top_anywhere=anywhere)
    with pytest.raises(JobError, match="cannot be opened") as caught:
        open_chain(str(link / "base.raw"), format="raw", limits=limits)
    assert (caught.value.code, caught.value.value) == (code, str(link / "base.raw"))
    assert caught.value.remedy
    assert real_path(str(link / "base.raw")) == str(link / "base.raw")


def test_a_hard_link_from_elsewhere_is_refused_as_top_and_as_base(images: Images) -> None:
    secret = images.raw("../secret.raw")
    top = images.qcow2("top.qcow2", "base.raw", "raw")
    os.link(secret, images.folder / "base.raw")
    for error in (refusal(top), refusal(images.folder / "base.raw", format="raw")):
        assert error.code == "outside_pools"
        assert "2 hard links" in error.message


# What members may be


def test_a_symbolic_link_is_refused_and_its_target_named(images: Images) -> None:
    images.qcow2("real.qcow2")
    (images.folder / "link.qcow2").symlink_to("real.qcow2")
    for error in (refusal(images.folder / "link.qcow2"), refusal(images.qcow2("top.qcow2", "link.qcow2"))):
        assert error.code == "image_invalid"
        assert "symbolic link" in error.message
        assert error.remedy and "real.qcow2" in error.remedy


def test_a_link_to_etc_shadow_in_the_overlays_folder_is_refused(images: Images) -> None:
    top = images.qcow2("top.qcow2", "base", "raw")
    (images.folder / "base").symlink_to("/etc/shadow")
    assert refusal(top).code == "image_invalid"


def test_special_files_are_refused_without_waiting_for_them(images: Images) -> None:
    top = images.qcow2("top.qcow2", "thing", "raw")
    thing = images.folder / "thing"
    os.mkfifo(thing)
    assert "FIFO" in refusal(top).message
    thing.unlink()
    thing.mkdir()
    assert "directory" in refusal(top).message
    thing.rmdir()
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{short}/s")  # a socket's path has 108 bytes at most
        assert "socket" in refusal(f"{short}/s", format="raw").message
    error = refusal("/dev/null", format="raw")
    assert (error.code, "character device" in error.message) == ("image_invalid", True)


@pytest.mark.parametrize(
    "path", ["/proc/self/mem", "/proc/self/maps", "/proc/version", "/sys/kernel/notes", "/sys/power/state"]
)
@pytest.mark.parametrize("format", [None, "raw"])
def test_views_of_the_kernel_are_refused_and_not_read(path: str, format: str | None) -> None:
    if not Path(path).exists():
        pytest.skip("this kernel does not have it")
    error = refusal(path, format=format)
    assert (error.code, "view of the kernel" in error.message) == ("image_invalid", True)
    assert error.remedy


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="making a device node needs root")
def test_another_node_of_a_block_device_is_refused(images: Images) -> None:
    images.folder.mkdir()
    node = images.folder / "disk"
    try:
        os.mknod(node, 0o060600, os.makedev(7, 250))
    except PermissionError:
        pytest.skip("no device nodes may be made here")
    error = refusal(images.qcow2("top.qcow2", "disk", "raw"))
    assert (error.code, "not the node by which the kernel knows" in error.message) == ("image_invalid", True)


def test_a_path_swapped_for_a_link_after_the_look_changes_nothing(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.raw("../secret.raw", 512)
    base = images.raw("base.raw", 8192)
    top = images.qcow2("top.qcow2", "base.raw", "raw")
    inode = base.stat().st_ino
    real = os.open

    def swapped(path: str, flags: int) -> int:
        if path == str(base):
            fd = real(path, flags)
            base.rename(images.folder / "aside")
            base.symlink_to("../secret.raw")
            return fd
        return real(path, flags)

    monkeypatch.setattr(os, "open", swapped)
    with opened(top) as found:
        assert found.chain.layers[1].file.ino == inode
        assert found.chain.layers[1].virtual_size == 8192
    monkeypatch.undo()
    assert refusal(top).code == "image_invalid"


def test_a_file_removed_while_it_is_opened_is_image_changed(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    top = images.qcow2("top.qcow2")
    real = os.open

    def removed(path: str, flags: int) -> int:
        fd = real(path, flags)
        if path == str(top):
            top.unlink()
        return fd

    monkeypatch.setattr(os, "open", removed)
    assert refusal(top).code == "image_changed"


# Requests


@pytest.mark.parametrize("path", ["disk.qcow2", "", "/a\0b", "/a\nb", "/a\x1b[2J", "/a\udcff", "/" + "a/" * 2048])
def test_a_path_that_is_no_plain_absolute_path_is_invalid(path: str) -> None:
    error = refusal(path)
    assert (error.code, error.field) == ("invalid", "path")
    assert error.message.isprintable()


def test_a_raw_image_is_never_probed(images: Images) -> None:
    raw = images.raw("disk.raw")
    error = refusal(raw)
    assert (error.code, error.field) == ("invalid", "format")
    assert error.remedy and "--format raw" in error.remedy
    qcow2 = images.qcow2("disk.qcow2", "/etc/shadow", "raw")
    with opened(qcow2, format="raw") as found:
        assert (len(found.chain.layers), found.headers, found.chain.top.backing) == (1, (None,), None)


def test_a_raw_backing_file_with_a_qcow2_header_is_the_end_of_the_chain(images: Images) -> None:
    images.qcow2("base", "/etc/shadow", "raw")
    with opened(images.qcow2("top.qcow2", "base", "raw")) as found:
        assert [layer.format for layer in found.chain.layers] == ["qcow2", "raw"]


def test_formats_that_are_wrong_or_unknown_are_refused(images: Images) -> None:
    raw = images.raw("disk.raw")
    assert refusal(raw, format="qcow2").code == "image_invalid"
    assert refusal(raw, format="vmdk").code == "not_supported"
    assert refusal(images.qcow2("a.qcow2", "disk.raw", "qcow2")).code == "image_invalid"
    assert refusal(images.qcow2("b.qcow2", "disk.raw", "vmdk")).code == "not_supported"


def test_a_missing_backing_format_is_refused_with_the_command_that_sets_it(images: Images) -> None:
    images.raw("my base.raw")
    error = refusal(images.qcow2("top.qcow2", "my base.raw", None))
    assert error.code == "image_invalid"
    assert error.remedy and "qemu-img rebase -u -f qcow2 -F FORMAT -b 'my base.raw'" in error.remedy


def test_images_that_cannot_be_used_are_refused(images: Images) -> None:
    corrupt = refusal(images.qcow2("corrupt.qcow2", incompatible=2))
    assert (corrupt.code, "check -r all" in (corrupt.remedy or "")) == ("image_corrupt", True)
    assert refusal(images.qcow2("data.qcow2", incompatible=4)).code == "not_supported"
    assert refusal(images.qcow2("luks.qcow2", crypt=2)).code == "not_supported"
    assert refusal(images.qcow2("names.qcow2", "a\nb")).code == "image_invalid"
    assert refusal(images.qcow2("nbd.qcow2", "nbd:host:10809")).code == "not_supported"
    assert refusal(images.qcow2("long.qcow2", "a" * 300)).code == "image_invalid"
    with opened(images.qcow2("dirty.qcow2", incompatible=1)) as found:
        assert found.headers[0] is not None and found.headers[0].dirty


def test_missing_files_are_not_found_and_name_who_wants_them(images: Images) -> None:
    top = images.qcow2("top.qcow2", "gone.qcow2")
    error = refusal(top)
    assert error.code == "not_found"
    assert str(top) in error.message and "gone.qcow2" in error.message
    assert refusal(images.folder / "no.qcow2").code == "not_found"
    assert refusal(top / "below").code == "not_found"


@pytest.mark.parametrize("at", ["top", "base"])
def test_a_file_that_may_not_be_read_is_denied(craft: Craft, at: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        images = Images(Path(folder), craft)
        paths = {"base": images.qcow2("base.qcow2"), "top": images.qcow2("top.qcow2", "base.qcow2")}
        os.chmod(paths[at], 0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            error = refusal(paths["top"])
        finally:
            if root:
                os.seteuid(0)
        assert error.code == "denied"
        assert error.remedy and str(paths[at]) in error.message


# Length


def make_line(images: Images, layers: int) -> Path:
    images.qcow2("0.qcow2")
    for number in range(1, layers):
        images.qcow2(f"{number}.qcow2", f"{number - 1}.qcow2")
    return images.folder / f"{layers - 1}.qcow2"


def test_200_layers_are_fine_and_201_too_deep(images: Images) -> None:
    top = make_line(images, 201)
    with opened(images.folder / "199.qcow2") as found:
        assert len(found.chain.layers) == len(found.fds) == 200
    error = refusal(top)
    assert error.code == "chain_too_deep"
    assert "200 layers" in error.message
    assert refusal(images.folder / "3.qcow2", depth=3).code == "chain_too_deep"


def test_loops_are_found(images: Images) -> None:
    assert refusal(images.qcow2("self.qcow2", "self.qcow2")).code == "chain_loop"
    images.qcow2("a.qcow2", "b.qcow2")
    images.qcow2("b.qcow2", "./../disks/c.qcow2")
    assert refusal(images.qcow2("c.qcow2", "a.qcow2")).code == "chain_loop"


# A second look


def test_a_second_look_at_an_unchanged_chain_is_content(images: Images) -> None:
    images.raw("base.raw")
    top = images.qcow2("top.qcow2", "base.raw", "raw")
    with opened(top) as found, opened(top) as again:
        verify(again, found.chain)


def test_a_second_look_misses_the_end_of_a_qcow2_image(images: Images) -> None:
    """Its header, and so its virtual size, stays what it was."""
    base = images.qcow2("base.qcow2")
    top = images.qcow2("top.qcow2", "base.qcow2")
    with opened(top) as found:
        earlier = found.chain
    with base.open("ab") as file:
        file.write(b"x")
    with opened(top) as now:
        verify(now, earlier)  # an image grows when it is written
        grown = now.chain
    os.truncate(base, base.stat().st_size - 1)
    with opened(top) as now, pytest.raises(JobError, match=r"what lay beyond is lost") as caught:
        verify(now, grown)
    assert caught.value.code == "image_changed"


def test_a_second_look_names_what_changed(images: Images) -> None:
    base = images.raw("base.raw")
    top = images.qcow2("top.qcow2", "base.raw", "raw")
    with opened(top) as found:
        earlier = found.chain

    def change(expected: str) -> None:
        with opened(top) as now, pytest.raises(JobError, match=expected) as caught:
            verify(now, earlier)
        assert caught.value.code == "image_changed"

    os.truncate(base, 8192)
    change("virtual size was 4096 and is 8192")
    other = images.raw("other.raw")
    other.rename(base)
    change("the file behind the path")
    base.unlink()
    images.raw("base.raw")
    top.write_bytes(images._craft())
    change("the backing file was base.raw and is nothing")
    with opened(top) as now, pytest.raises(JobError, match="had 2 layers and has 1"):
        verify(now, Chain((now.chain.top, earlier.layers[1])))


def test_two_that_let_go_at_one_time_close_each_file_once(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a storage daemon dies while a job's end gives up a layer."""
    images.raw("base.raw")
    top = images.qcow2("top.qcow2", "base.raw", "raw")
    opened = open_chain(str(top), limits=ChainLimits())
    fds, closed = set(opened.fds), []
    close = os.close

    def closing(fd: int) -> None:
        if fd in fds:
            closed.append(fd)
            if len(closed) == 1:
                opened.keep(())  # the other one, in the midst of it
        close(fd)

    monkeypatch.setattr(os, "close", closing)
    opened.keep({opened.chain.layers[1].file})
    monkeypatch.undo()
    assert sorted(closed) == sorted(fds)


def test_a_header_decides_only_where_no_format_is_said(images: Images) -> None:
    """The guest of a raw disk may write anything into its first sector."""
    disk = images.qcow2("disk.raw")
    with (
        closing(open_chain(str(disk), limits=ChainLimits())) as guessed,
        closing(open_chain(str(disk), limits=ChainLimits(), format="raw")) as said,
    ):
        assert guessed.chain.top.format == "qcow2"
        assert (said.chain.top.format, len(said.chain.layers)) == ("raw", 1)

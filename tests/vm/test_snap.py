"""Changes in tar archives: what GNU tar wrote, merged as GNU tar would; `apppot-snap`."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from apppot.host.common import paths
from apppot.host.pot import layout

from tests.harness.vm import RELEASE, Launcher, Who, myself

APPLETS = "sh cat chmod chown cmp cp date find gzip id ls mkdir mv rm sed sleep touch uname"
QUIET = ("--network", "none")
AS_ROOT = (*QUIET, "-u", "root")
# As the original's `apppot-snap` called it.
SNAP = (
    *("--one-file-system", "--exclude-from=exclude", "--exclude-backups"),
    *("--anchored", "--wildcards-match-slash", "."),
)
EXCLUDED = "./data/excluded\n./data/o/excluded\n"

BASE = r"""
mkdir -p data/d/sub data/keep data/goes/deep data/excluded data/to-file data/moves/in data/o tmp
echo 1 >data/d/same; echo 1 >data/d/changes; echo 1 >data/d/goes; echo 1 >data/d/sub/same
echo 1 >data/goes/deep/x; echo 1 >data/excluded/x; echo 1 >data/o/excluded; echo 1 >data/d/old~
echo 1 >data/to-file/x; echo 1 >data/to-dir; echo 1 >data/moves/x; echo 1 >data/moves/in/y
echo 1 >data/link-1; ln data/link-1 data/link-2; ln -s d data/to-real; mkdir data/to-link
printf 1 >data/"$(printf 'a\nb\377')"; printf 1 >data/"$(printf 'gone\\\n\377')"
echo kept >tmp/kept; chmod 2751 data/keep; touch -d '2001-02-03 04:05:06' data/keep
"""
# New directories come first: else they have the inode numbers of removed ones, which GNU tar
# takes for renames and cannot undo.
CHANGES = r"""
mkdir -p data/new/deep new-dir new-real; echo 2 >data/new/deep/x; echo 2 >new-dir/x
rm -r data/goes data/d/goes data/to-file data/to-dir data/to-real data/to-link
mv new-dir data/to-dir; mv new-real data/to-real; echo 2 >data/to-file; ln -s keep data/to-link
echo 2 >data/d/changes; echo 2 >data/excluded/more; echo 2 >data/o/excluded; echo 2 >>data/link-1
ln data/link-2 data/d/link-3
mv data/moves data/d/moved; rm data/gone*; printf 2 >data/"$(printf 'a\nb\377')"
printf 2 >data/"$(printf 'new\377 \\x\n')"; chmod 4711 data/d/changes; mkfifo data/fifo
truncate -s 3M data/sparse; printf end >>data/sparse; rm tmp/kept
touch -d '1999-01-02 03:04:05.678901234' data/new/deep/x data/d/sub
"""
ROOTS_ONLY = "chown 1234:77 data/d/changes; chown -h 99:98 data/to-link; mknod data/device c 7 9\n"
# GNU tar cannot extract what it writes of these.
RENAMES = r"""
mv data/d swap; mv data/keep data/d; mv swap data/keep
mv data/moves/in data/out; mv data/moves data/goes/moved; mv data/goes/deep data/deep
rm -r data/to-file data/excluded; mv data/to-link data/to-file; mkdir data/excluded
"""


def shell(script: str, folder: Path) -> None:
    subprocess.run(["sh", "-ec", script], cwd=folder, check=True, timeout=60)


@pytest.fixture(autouse=True)
def own_store(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is converted goes with the test."""
    monkeypatch.setenv("APPPOT_POT", paths.pot_home())
    monkeypatch.setenv("XDG_DATA_HOME", str(place / "data"))


@pytest.fixture
def base(place: Path) -> Path:
    """A small tree: busybox, and things to change; beside it, its image."""
    tree = place / "base"
    (tree / "bin").mkdir(parents=True)
    command = f"dump /usr/bin/busybox {tree}/bin/busybox"
    subprocess.run(["debugfs", "-R", command, layout.find_pot().runtime], check=True)
    (tree / "bin" / "busybox").chmod(0o755)
    for name in (*APPLETS.split(), "tar"):
        (tree / "bin" / name).symlink_to("busybox")
    shell(BASE, tree)
    return tree


def image_of(tree: Path) -> str:
    image = tree.with_suffix(".squashfs")
    subprocess.run(["mksquashfs", tree, image, "-quiet", "-no-progress"], check=True, timeout=60)
    image.chmod(0o644)
    return str(image)


def changed(base: Path, script: str, archive: str, *options: str) -> tuple[Path, Path]:
    """(tree, archive) of `base` after `script`, as the original's apppot-snap saved it."""
    place = base.parent
    tree, state = place / "changed", place / "state"
    (place / "exclude").write_text(EXCLUDED)
    subprocess.run(["cp", "-a", base, tree], check=True)
    words = ["tar", "--create", "-C", str(tree), f"--listed-incremental={state}"]
    subprocess.run([*words, "-f", "/dev/null", *SNAP], cwd=place, check=True)
    # What is as old as the state counts as changed.
    shell("while [ ! x -nt ../state ]; do : >x; done; rm x", tree)
    shell(script, tree)
    create = [*words, *options, "--auto-compress", "-f", archive, *SNAP]
    subprocess.run(create, cwd=place, check=True, timeout=60)
    return tree, place / archive


Entry = tuple[object, ...]


def contents(data: bytes) -> dict[str, Entry]:
    """What a tar holds: name -> kind, mode, owners, time, target or bytes; hard links as groups."""
    found: dict[str, Entry] = {}
    links: dict[str, set[str]] = {}
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        for member in tar:
            first = member.linkname if member.islnk() else member.name
            links.setdefault(first, set()).add(member.name)
            if member.islnk():
                continue
            file = tar.extractfile(member) if member.isreg() else None
            found[member.name] = (
                *(member.type, oct(member.mode), member.uid, member.gid, int(member.mtime)),
                *(member.linkname, member.devmajor, file.read() if file else b""),
            )
    for first, names in links.items():
        entry = (*found[first], sorted(names))
        found.update(dict.fromkeys(names, entry))
    return found


def tree_contents(tree: Path) -> dict[str, Entry]:
    words = ["tar", "--numeric-owner", "-C", str(tree), "-cf", "-", "data"]
    return contents(subprocess.run(words, capture_output=True, check=True).stdout)


def guest_contents(launcher: Launcher, image: str, *archives: Path) -> dict[str, Entry]:
    options = [word for path in archives for word in ("--changes", str(path))]
    script = "uname -r >&2; cat /tmp/kept >&2; tar -cf - data"
    done = launcher(*AS_ROOT, *options, "-w", "/", image, "sh", "-c", script)
    assert done.status == 0, done
    # What was mounted in the guest looks emptied in the archive, and is not.
    release, kept = done.err.splitlines()[-2:]
    assert (release.decode()[: len(RELEASE)], kept) == (RELEASE, b"kept")
    return contents(done.out)


def same_but_excluded(found: dict[str, Entry], wanted: dict[str, Entry], base: Path) -> None:
    """What was excluded is the base's, all else as wanted."""
    before = tree_contents(base)
    excluded = [name for name in (*before, *wanted) if "excluded" in name]
    for name in excluded:
        wanted.pop(name, None)
        if name in before:
            wanted[name] = before[name]
    assert found == wanted


@pytest.mark.parametrize("form", [["x.changes.tar.gz"], ["x.tar.xz", "--format=pax", "--sparse"]])
def test_an_archive_of_the_original_is_merged_as_gnu_tar_does(
    apppot: Launcher, base: Path, form: list[str]
) -> None:
    script = CHANGES + (ROOTS_ONLY if os.getuid() == 0 else "")
    tree, archive = changed(base, script.replace("mv data/moves data/d/moved;", ""), *form)
    golden = base.parent / "golden"
    subprocess.run(["cp", "-a", base, golden], check=True)
    words = [
        "tar",
        "--extract",
        "--auto-compress",
        "-f",
        str(archive),
        "-C",
        str(golden),
        "--same-owner",
    ]
    words += ["--same-permissions", "--listed-incremental=/dev/null", "--numeric-owner"]
    subprocess.run(words, check=True, timeout=60)
    found = guest_contents(apppot, image_of(base), archive)
    assert found == tree_contents(golden)
    same_but_excluded(found, tree_contents(tree), base)


def test_renamed_directories_have_what_the_archive_leaves_out(apppot: Launcher, base: Path) -> None:
    tree, archive = changed(base, RENAMES, "x.changes.tar.bz2")
    found = guest_contents(apppot, image_of(base), archive)
    moved = {"data/keep/sub/same", "data/goes/moved/x", "data/out/y", "data/deep/x"}
    assert moved <= set(found)
    same_but_excluded(found, tree_contents(tree), base)


def test_a_directory_renamed_while_others_change(apppot: Launcher, base: Path) -> None:
    tree, archive = changed(base, CHANGES, "x.changes.tar.zst")
    same_but_excluded(guest_contents(apppot, image_of(base), archive), tree_contents(tree), base)


def test_it_is_converted_once_for_an_image_and_lies_over_other_changes(
    apppot: Launcher, base: Path
) -> None:
    tree, first = changed(base, "echo 2 >data/d/changes; rm -r data/goes", "first.tar.gz")
    image = image_of(base)
    plain = base.parent / "plain.tar"
    words = ["tar", "-C", str(tree), "-cf", str(plain), "data/d/same", "--transform=s/same/goes/"]
    subprocess.run(words, check=True)
    script = "cat data/d/changes data/d/goes; ls data/goes; uname -r"
    words = [*AS_ROOT, "--changes", str(first), "--changes", str(plain), "-w", "/", image]
    done = apppot(*words, "sh", "-c", script)
    assert (done.status, done.out[:4]) == (0, b"2\n1\n"), done
    assert done.out[4:].decode().startswith(RELEASE)
    assert done.err.count(b"reading changes") == 4
    again = apppot(*words, "sh", "-c", script)
    assert again.out == done.out
    assert b"reading changes" not in again.err
    # Another state of the image: other things may have to go.
    os.utime(image)
    assert b"reading changes from first" in apppot(*words, "sh", "-c", script).err


def test_a_plain_tar_adds_and_follows_the_links_of_the_base(apppot: Launcher, base: Path) -> None:
    extra = base.parent / "extra"
    shell("mkdir -p data/to-real; echo 3 >data/to-real/new; echo 3 >data/to-dir", extra.parent)
    archive = base.parent / "user.tar.gz"
    subprocess.run(["tar", "-C", base.parent, "-czf", archive, "data/to-real", "data/to-dir"])
    script = "uname -r; cat data/d/new data/d/same data/to-dir; find data/goes -type f"
    done = apppot(
        *AS_ROOT, "--changes", str(archive), "-w", "/", image_of(base), "sh", "-c", script
    )
    assert done.status == 0, done
    release, *lines = done.out.splitlines()
    assert release.decode().startswith(RELEASE)
    assert lines == [b"3", b"1", b"3", b"data/goes/deep/x"]


def test_over_the_hosts_own_root_an_archive_only_adds(apppot: Launcher, base: Path) -> None:
    _, listed = changed(base, "rm -r data/goes", "x.changes.tar.gz")
    plain = base.parent / "plain.tar"
    subprocess.run(["tar", "-C", base, "-cf", plain, "data/d/same"], check=True)
    done = apppot(*QUIET, "--changes", str(plain), "host", "sh", "-c", "uname -r; cat /data/d/same")
    release, content = done.out.splitlines()
    assert (release.decode()[: len(RELEASE)], content) == (RELEASE, b"1")
    assert not os.path.exists("/data/d/same")
    apppot(*QUIET, "--changes", str(listed), "host", "true").failed("belongs to an image")


# -- what strangers write ------------------------------------------------------------------------


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


END = bytes(10240)
ROOT_LIST = member("./", b"D", data=b"Dbin\0Ddata\0Dtmp\0Ylink\0\0")
HOSTILE = {
    "leads out": member("../../etc/x"),
    "no file": member("x", tarfile.LNKTYPE, "/etc/hostname"),
    "no directory": ROOT_LIST + member("./link", tarfile.SYMTYPE, "/") + member("./link/x"),
    "0:0": member("data/d", tarfile.CHRTYPE),
    "not known": member("x", b"M"),
    "leads nowhere": member("./", b"D", data=b"R./data\0T\0\0"),
    "an attack": member("./", b"D", data=b"X../..\0R./data\0T\0\0"),
    "into itself": member("./", b"D", data=b"Ddata\0R./data\0T./data/d/x\0\0"),
    "belong to another": member("./", b"D", data=b"Dq\0Ra\0Tq\0\0")
    + member("q/", b"D", data=b"Nx\0\0"),
    "no header": member("x") + b"\1" * 512,
}


def store_state() -> set[str]:
    home = Path(paths.image_stores()[-1])
    folders = ("blobs", "names", "records", "builds")
    return {str(path) for name in folders for path in (home / name).rglob("*")}


@pytest.mark.parametrize("words", HOSTILE)
def test_a_hostile_archive_is_explained_and_nothing_is_kept(
    apppot: Launcher, base: Path, words: str
) -> None:
    archive = base.parent / "hostile.tar"
    archive.write_bytes(HOSTILE[words] + END)
    before = store_state()
    command = [*AS_ROOT, "--changes", str(archive), image_of(base), "uname"]
    apppot(*command).failed("hostile.tar", words, "remedy")
    assert store_state() == before


@pytest.mark.parametrize(("ending", "words"), [("gz", "cut off"), ("zst", "premature end")])
def test_a_cut_archive_is_explained(apppot: Launcher, base: Path, ending: str, words: str) -> None:
    _, archive = changed(base, CHANGES, f"x.tar.{ending}")
    archive.write_bytes(archive.read_bytes()[:-100])
    before = store_state()
    command = [*AS_ROOT, "--changes", str(archive), image_of(base), "uname"]
    apppot(*command).failed(f"x.tar.{ending}", words, "remedy")
    assert store_state() == before


# -- apppot-snap ---------------------------------------------------------------------------------


@pytest.fixture
def machine(base: Path) -> str:
    """The image with this host's GNU tar in it."""
    (base / "bin" / "tar").unlink()
    shutil.copy("/bin/tar", base / "bin" / "tar")
    listed = subprocess.run(["ldd", "/bin/tar"], capture_output=True, text=True, check=True).stdout
    for word in listed.split():
        if word.startswith("/"):
            target = base / word.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(word, target)
    return image_of(base)


@pytest.fixture
def session(user: Launcher, request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Options for a session of an ordinary user, deleted afterwards."""
    name = f"test-{user.run_home.name}"
    words = [*user.who.command, "session", "rm", name]
    request.addfinalizer(lambda: subprocess.run(words, env=user.environment(), timeout=60))
    return ("--session", name)


WORK = r"""
mkdir -p /data/new/deep; echo 2 >/data/new/deep/x; rm -r /data/goes /data/d/goes
echo 2 >/data/d/changes; chmod 700 /data/keep; touch -d '1999-01-02 03:04:05' /data/new/deep/x
"""


def test_base_and_changes_in_guests_of_one_session(
    user: Launcher, machine: str, session: tuple[str, ...]
) -> None:
    run = (*session, machine, "sh", "-c")
    assert user(*QUIET, *run, "sudo apppot-snap base; uname -r").ok().decode().startswith(RELEASE)
    # With network, and with a directory more of the host: the agent generates other files.
    (user.work / "here").mkdir()
    bind = ("--bind", "here:/here")
    user(*bind, *run, f'sudo sh -ec "{WORK}"; mkdir ~/own; echo mine >~/own/file').ok()
    snap = "sudo apppot-snap changes ~/job/x.changes.tar.gz"
    said = user(*QUIET, *run, snap).ok().decode()
    assert said == "Saved changes from base state into file '/home/user/job/x.changes.tar.gz'.\n"

    archive = user.work / "x.changes.tar.gz"
    listed = subprocess.run(["tar", "-tf", archive], capture_output=True, text=True, check=True)
    names = {name for name in listed.stdout.splitlines() if not name.endswith("/")}
    assert names == {"./data/new/deep/x", "./data/d/changes", "./home/user/own/file"}

    listing = "cd /; sudo /bin/tar --numeric-owner -cf - data home/user/own"
    wanted = contents(user(*QUIET, *run, listing).ok())
    given = user(*QUIET, "--changes", str(archive), machine, "sh", "-c", listing)
    assert contents(given.out) == wanted
    assert wanted["home/user/own/file"][2] == user.who.uid
    # Merged by itself in a new guest.
    merged = f"sudo apppot-snap merge ~/job/x.changes.tar.gz; {listing}"
    assert contents(user(*QUIET, machine, "sh", "-c", merged).ok()) == wanted


def test_the_default_file_is_of_today_in_the_job_directory(
    user: Launcher, machine: str, session: tuple[str, ...]
) -> None:
    script = (
        "sudo apppot-snap base; sudo apppot-snap changes; cd ~; sudo apppot-snap base; uname -r"
    )
    done = user(*QUIET, *session, machine, "sh", "-c", script)
    saved, release = done.out.splitlines()
    assert release.decode().startswith(RELEASE)
    (made,) = user.work.glob("apppot.*.changes.tar.gz")
    assert saved.endswith(b"'/home/user/job/%s'." % made.name.encode())
    assert b"WARNING: removing the old base state" in done.err


def test_no_act_prints_commands_and_does_nothing(user: Launcher, machine: str) -> None:
    script = "apppot-snap -n base; apppot-snap -nv merge ~/job/it\\'s; ls /var/lib; uname -r"
    (user.work / "it's").touch()
    done = user(*QUIET, machine, "sh", "-c", script)
    lines = done.out.decode().splitlines()
    assert lines[0] == "mkdir -p /var/lib/apppot"
    create = next(line for line in lines if "--create" in line)
    assert "--listed-incremental=/var/lib/apppot/apppot-snap.base" in create
    extract = next(line for line in lines if "--extract" in line)
    assert r"-f '/home/user/job/it'\''s'" in extract
    assert "--verbose" in extract
    assert lines[-1].startswith(RELEASE)
    assert b"/var/lib: No such file" in done.err


ERRORS = {
    "apppot-snap": "which action",
    "apppot-snap fetch": "unknown action 'fetch'",
    "apppot-snap -x base": "unknown option '-x'",
    "apppot-snap base": "only root",
    "sudo apppot-snap changes": "there is no base state",
    "sudo apppot-snap merge /nowhere/x.tar": "there is no directory /nowhere",
    "sudo sh -c 'ln -s busybox /bin/gone; mv /bin/gone /bin/tar'; sudo apppot-snap base": "GNU tar",
}


def test_errors_are_explained(user: Launcher, machine: str) -> None:
    script = "\n".join(f"{line}; echo $?" for line in ERRORS) + "\nuname -r"
    done = user(*QUIET, machine, "sh", "-c", script)
    *statuses, release = done.out.decode().split()
    assert (statuses, release[: len(RELEASE)]) == (["1"] * len(ERRORS), RELEASE)
    for line, message in zip(done.err.decode().splitlines(), ERRORS.values(), strict=True):
        assert line.startswith("apppot-snap: ERROR: ")
        assert message in line


Factory = Callable[[Who], Launcher]


def test_the_original_command_line_takes_the_archive(launcher_for: Factory, base: Path) -> None:
    _, archive = changed(base, "rm -r data/goes; echo 2 >data/d/changes", "x.changes.tar.gz")
    program = str(Path(myself().command[0]).with_name("apppot-start"))
    who = Who(os.getuid(), os.getgid(), ("/bin/sh", "-c", f'shift; exec {program} "$@"', "sh"))
    words = ["--apppot", image_of(base), "--changes", str(archive), "sh", "-c"]
    done = launcher_for(who)(*words, "uname -r; cat /data/d/changes; ls /data/goes")
    release, content = done.out.splitlines()
    assert (release.decode()[: len(RELEASE)], content) == (RELEASE, b"2")
    assert b"/data/goes: No such file" in done.err

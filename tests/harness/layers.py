"""What the tests of sessions, changes and commits share: work to be kept, and its exact listing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from apppot.host.common import paths
from apppot.host.pot import layout

from tests.harness.vm import IMAGE, RELEASE, Launcher, Result, Who

# What a person might do to a system, and what only exact tools carry over.
WORK = r"""
set -e
uname -r
echo new > /etc/new.conf; rm /etc/issue; mv /usr/share/doc/bash /usr/share/doc/bash2
rm -r /usr/share/doc/dash; echo now a file > /usr/share/doc/dash
rm -r /usr/share/doc/sed; mkdir /usr/share/doc/sed; echo other > /usr/share/doc/sed/only
chmod 700 /srv; ln /etc/new.conf /etc/new.hard; ln -s nowhere /etc/dangling
truncate -s 10M /opt/sparse; printf end >> /opt/sparse; mknod /opt/dev b 7 9; mkfifo /opt/fifo
printf 'odd \377 name' > "/opt/$(printf 'a\nb\377')"
groupadd extra; useradd --system svc
su user -s /bin/sh -c 'echo mine > /home/user/mine'
perl -e 'my ($p,$n,$v)=("/etc/new.conf","user.colour","blue"); syscall(188,$p,$n,$v,4,0)==0 or die'
cp /bin/true /opt/cap
perl -e 'my ($p,$n,$v)=("/opt/cap","security.capability",pack("V5",0x02000001,1<<13,0,0,0));
    syscall(188,$p,$n,$v,20,0)==0 or die $!'
perl -e 'my ($p,$n)=("/opt/cap","system.posix_acl_access");
    my $v=pack("V","2").pack("vvV",1,7,-1).pack("vvV",2,4,1234).pack("vvV",4,5,-1)
        .pack("vvV",16,5,-1).pack("vvV",32,4,-1);
    syscall(188,$p,$n,$v,length $v,0)==0 or die $!'
touch -d '2001-02-03 04:05:06.123456789 UTC' /etc/new.conf /opt/sparse
touch -d '2099-01-02 03:04:05.6 UTC' /opt/future; touch -d '1960-01-02 03:04:05.6 UTC' /opt/past
"""

# All that is to be the same, a line a path; without what each run makes anew.
LISTING = r"""
find / -xdev -path /home/user/job -prune -o -path /tmp -prune -o \
    ! -path /dev ! -path /proc ! -path /sys ! -path /run \
    ! -path /home/user ! -path /home ! -path / ! -path /etc ! -path '/etc/host*' \
    ! -path '/etc/passwd*' ! -path '/etc/shadow*' ! -path '/etc/group*' ! -path /etc/localtime \
    ! -path '/etc/sudoers.d*' ! -path /etc/resolv.conf \
    \( -type d -printf '%p|d|%m|%U:%G|%T@\n' -o -printf '%p|%y|%m|%U:%G|%s|%T@|%n|%l\n' \) \
    | LC_ALL=C sort
cd /; find etc opt home/user usr/share/doc -xdev -path home/user/job -prune -o -type f \
    ! -path 'etc/host*' ! -path 'etc/passwd*' ! -path 'etc/shadow*' ! -path 'etc/group*' \
    ! -path etc/localtime ! -path etc/resolv.conf -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
find / -xdev -path /home/user/job -prune -o -print0 | perl -0ne '
    chomp; my ($path, $names) = ($_, "\0" x 4096);
    my $length = syscall(195, $path, $names, 4096);
    for my $name (sort split /\0/, substr($names, 0, $length < 0 ? 0 : $length)) {
        my $value = "\0" x 4096;
        my $size = syscall(192, $path, $name, $value, 4096);
        print "xattr $path $name ", unpack("H*", substr($value, 0, $size)), "\n";
    }' | LC_ALL=C sort
grep -v ^user: /etc/passwd; grep svc /etc/shadow | cut -d: -f1; grep -E '^(extra|svc):' /etc/group
"""

QUIET = ("--network", "none")


def tool(apppot: Launcher, command: str, *words: str) -> Result:
    """A subcommand that is not `run`."""
    return apppot.start(*words, command=command).finish(timeout=300)


def apart(who: Who, home: Path) -> Who:
    """`who` with sessions and a store of his own in `home`; the images are the site's."""
    home.mkdir()
    os.chown(home, who.uid, who.gid)
    env = {"APPPOT_POT": paths.pot_home(), "APPPOT_SITE_STORE": paths.data_home()}
    return replace(who, env={**env, **who.env, "XDG_DATA_HOME": str(home)})


def busybox_tree(tree: Path, applets: Sequence[str]) -> None:
    """A root file system in `tree` with no more than busybox, from the pot, and its names."""
    (tree / "bin").mkdir(parents=True)
    command = f"dump /usr/bin/busybox {tree}/bin/busybox"
    subprocess.run(["debugfs", "-R", command, layout.find_pot().runtime], check=True)
    (tree / "bin" / "busybox").chmod(0o755)
    for name in applets:
        (tree / "bin" / name).symlink_to("busybox")


def listing(launcher: Launcher, *options: str, image: str = IMAGE) -> list[bytes]:
    """What a guest with `options` shows, and that it was one."""
    result = launcher(*options, *QUIET, "-u", "root", image, "sh", "-c", "uname -r;" + LISTING)
    lines = result.ok().splitlines()
    assert lines[0].decode().startswith(RELEASE)
    assert len(lines) > 3000
    return lines[1:]

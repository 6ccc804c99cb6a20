"""A lease from a real server, for as long as that lives: busybox's, beside the agent in its pot."""

from __future__ import annotations

import subprocess
from pathlib import Path

from apppot.host.pot.layout import find_pot

from tests.harness.vm import RELEASE, TIMEOUT

LEASE_SECONDS = 2
BLOCK = 512
SERVER = f"""interface veth0
start 10.9.0.20
end 10.9.0.20
lease_file /run/leases
pidfile /run/pid
min_lease 1
option lease {LEASE_SECONDS}
option subnet 255.255.255.0
option router 10.9.0.1
"""
IN_ITS_NETWORK = """read line
ip address add 10.9.0.1/24 dev veth0
ip link set veth0 up
exec busybox udhcpd -f /run/conf
"""
# PID 1 of a guest: a pair of interfaces, with the server at the other end, in a network of its
# own.  When it has granted the address three times it goes away.
SCRIPT = f"""
import os, subprocess, sys
sys.path.insert(0, "/usr/lib/apppot")
from apppot.guest import syscalls
from apppot.guest.init import dhcp

dhcp._ANSWER_SECONDS = 1.0  # a server that is there answers at once
os.environ["PATH"] = "/usr/sbin:/usr/bin"
for kind, place in (("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/run")):
    syscalls.mount(kind, place, kind, 0)
open("/run/leases", "w").close()
with open("/run/conf", "w") as text:
    text.write({SERVER!r})

subprocess.run(["ip", "link", "add", "near", "type", "veth"], check=True)
server = subprocess.Popen(
    ["sh", "-c", {IN_ITS_NETWORK!r}],
    stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    preexec_fn=lambda: syscalls.unshare(0x40000000))  # CLONE_NEWNET
subprocess.run(["ip", "link", "set", "veth0", "netns", str(server.pid)], check=True)
held = open(f"/proc/{{server.pid}}/ns/net")  # its network outlives it
server.stdin.write("go\\n")
server.stdin.close()
lease = dhcp.acquire_on(["near"])
print(os.uname().release, "granted", lease.address, lease.prefix, lease.seconds, lease.routes)
sys.stdout.flush()
keeper = os.fork()
if keeper == 0:
    dhcp.renew(lease)
    os._exit(7)
granted = 0
for line in server.stderr:
    granted += "sending ACK to 10.9.0.20" in line
    if granted == 3:
        server.kill()
        print("again and again", flush=True)
        break
print("ended with", os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1]), flush=True)
syscalls.power_off()
"""


def test_a_lease_is_renewed_until_its_server_is_gone(tmp_path: Path) -> None:
    script = tmp_path / "script"
    # Python reads it from the disk itself, whose end is the script's.
    script.write_text(SCRIPT + "\n" * (-len(SCRIPT) % BLOCK))
    pot = find_pot()
    argv = [pot.kernel.path, "mem=128M", "seccomp=on", f"ubd0r={pot.runtime}", f"ubd1r={script}"]
    argv += ["root=/dev/ubda", "ro", "rootfstype=ext4", "init=/usr/bin/python3", "quiet"]
    argv += ["con=null", "con0=null,fd:1", f"uml_dir={tmp_path}/", "--", "-IS", "/dev/ubdb"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    text = done.stdout.replace("\r", "")
    granted = f"granted 10.9.0.20 24 {LEASE_SECONDS} [('0.0.0.0', 0, '10.9.0.1')]"
    first, *_ = [line for line in text.splitlines() if "granted" in line] or [text]
    assert first.startswith(RELEASE) and first.endswith(granted), text
    assert "again and again" in text, text
    assert "the DHCP server has taken back 10.9.0.20\nended with 7" in text, text

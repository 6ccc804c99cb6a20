"""An address by DHCP (RFC 2131), on the first interface where a server answers.

Packets are made by hand: before it has an address, an interface takes no others.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time

from apppot.guest.console import log
from apppot.guest.syscalls import Interface

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

_DISCOVER, _OFFER, _REQUEST, _ACK, _NAK = 1, 2, 3, 5, 6
# Options: mask, routers, name servers, MTU, requested address, lease time, message, server,
# wanted options, client, classless routes (RFC 3442).
_MASK, _ROUTERS, _SERVERS, _MTU, _ADDRESS, _TIME = 1, 3, 6, 26, 50, 51
_KIND, _SERVER, _WANTED, _CLIENT, _ROUTES, _END = 53, 54, 55, 61, 121, 255
_COOKIE = b"\x63\x82\x53\x63"
_IP, _UDP = 0x0800, 17
_BROADCAST = b"\xff" * 6
_ANY = b"\0" * 4
# Seconds that a server has to answer, for one attempt after the other: a link that has just come
# up swallows the first.
_PATIENCE = (0.3, 0.7, 1.0, 2.0, 3.0)
_RETRY_SECONDS, _ANSWER_SECONDS = 60.0, 5.0
_FOREVER = 0xFFFFFFFF


class Lease:
    """What a server granted: `seconds` of an address, and what belongs to it."""

    def __init__(self, device: str, address: bytes, options: dict[int, bytes]) -> None:
        self.device = device
        self.address = _dotted(address)
        self.prefix = bin(_number(options.get(_MASK, b"\xff\xff\xff\0"))).count("1")
        self.servers = [_dotted(part) for part in _parts(options.get(_SERVERS, b""))]
        self.mtu = _number(options.get(_MTU, b"\0"))
        self.seconds = _number(options.get(_TIME, b"\xff\xff\xff\xff"))
        routers = [("0.0.0.0", 0, _dotted(part)) for part in _parts(options.get(_ROUTERS, b""))]
        # (network, prefix, gateway).  Where there are classless routes, they replace the router.
        self.routes = classless(options[_ROUTES]) if _ROUTES in options else routers[:1]

    def apply(self) -> None:
        """Give the interface what was granted."""
        interface = Interface(self.device)
        try:
            if self.mtu >= 576:
                interface.mtu(self.mtu)
            interface.address(self.address, self.prefix)
            # Those to the link first: the others' gateways may be on them.
            for route in sorted(self.routes, key=lambda route: route[2] != "0.0.0.0"):
                _add_route(interface, route)
        finally:
            interface.close()


def _add_route(interface: Interface, route: tuple[str, int, str]) -> None:
    """Add a route; one that leads nowhere is no reason to do without the others."""
    try:
        interface.route(*route)
    except OSError as error:
        log(f"route to {route[0]}/{route[1]} by {route[2]}: {error}")


def classless(data: bytes) -> list[tuple[str, int, str]]:
    """Option 121 as (network, prefix, gateway).  A damaged rest is left out."""
    routes, at = [], 0
    while at < len(data):
        prefix = data[at]
        width = (prefix + 7) // 8
        network, gateway = data[at + 1 : at + 1 + width], data[at + 1 + width : at + 5 + width]
        if prefix > 32 or len(gateway) < 4:
            break
        routes.append((_dotted(network.ljust(4, b"\0")), prefix, _dotted(gateway)))
        at += 5 + width
    return routes


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _parts(data: bytes) -> list[bytes]:
    return [data[at : at + 4] for at in range(0, len(data) - 3, 4)]


def _dotted(address: bytes) -> str:
    return ".".join([str(octet) for octet in address])


def interfaces() -> list[str]:
    """The network interfaces that are devices, by name; /sys must be there."""
    place = "/sys/class/net"
    return sorted([name for name in os.listdir(place) if os.path.exists(f"{place}/{name}/device")])


def acquire() -> Lease | None:
    """A lease, applied; None where there is no interface or no server answers for seconds."""
    return acquire_on(interfaces())


def acquire_on(names: list[str]) -> Lease | None:
    """A lease on one of these interfaces, the first with an answer; otherwise as `acquire`."""
    clients: list[_Client] = []
    for name in names:
        try:
            clients.append(_Client(name))
        except OSError as error:
            log(f"{name}: {error}")
    if not clients:
        return None
    try:
        for patience in _PATIENCE:
            lease = _offered(clients, patience)
            if lease is not None:
                lease.apply()
                return lease
    finally:
        for client in clients:
            client.close()
    log(f"no DHCP server answers on {', '.join([client.device for client in clients])}")
    return None


def _offered(clients: list[_Client], patience: float) -> Lease | None:
    asked: set[_Client] = set()
    for client in clients:
        client.send(_DISCOVER)
    for client, kind, address, options in _answers(clients, patience):
        if kind == _OFFER and client not in asked:
            asked.add(client)
            wanted = {_ADDRESS: address, _SERVER: options.get(_SERVER, _ANY)}
            client.send(_REQUEST, wanted)
        elif kind == _ACK:
            return Lease(client.device, address, options)
    return None


def renew(lease: Lease) -> None:
    """Keep the lease, for as long as this process lives; returns where it was lost."""
    due = lease.seconds / 2
    until = time.monotonic() + lease.seconds
    while lease.seconds != _FOREVER:
        time.sleep(due)
        client = _Client(lease.device)
        try:
            client.send(_REQUEST, own=socket.inet_aton(lease.address))
            kinds = (kind for _, kind, _, _ in _answers([client], _ANSWER_SECONDS))
            answer = next((kind for kind in kinds if kind in (_ACK, _NAK)), None)
        finally:
            client.close()
        if answer == _ACK:
            due = lease.seconds / 2
            until = time.monotonic() + lease.seconds
        elif answer == _NAK or time.monotonic() > until:
            log(f"the DHCP server has taken back {lease.address}")
            return
        else:
            due = _RETRY_SECONDS


def _answers(
    clients: list[_Client], patience: float
) -> Iterator[tuple[_Client, int, bytes, dict[int, bytes]]]:
    """What servers say within `patience` seconds: (client, kind, address, options)."""
    until = time.monotonic() + patience
    poll = select.poll()
    for client in clients:
        poll.register(client.socket, select.POLLIN)
    while True:
        left = until - time.monotonic()
        ready = dict(poll.poll(int(left * 1000) + 1)) if left > 0 else {}
        if not ready:
            return
        for client in clients:
            if client.socket.fileno() in ready:
                found = client.receive()
                if found is not None:
                    yield (client, *found)


class _Client:
    """One interface on which a server is looked for."""

    def __init__(self, device: str) -> None:
        self.device = device
        interface = Interface(device)
        interface.up()
        interface.close()
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_IP))
        self.socket.bind((device, _IP))
        self.hardware = self.socket.getsockname()[4]
        self.transaction = os.urandom(4)

    def close(self) -> None:
        self.socket.close()

    def send(self, kind: int, options: dict[int, bytes] | None = None, own: bytes = _ANY) -> None:
        """Broadcast a message; `own` is the address that this client has already."""
        wanted = bytes([_MASK, _ROUTERS, _SERVERS, _MTU, _TIME, _ROUTES])
        fields = {_KIND: bytes([kind]), _CLIENT: b"\x01" + self.hardware, _WANTED: wanted}
        fields.update(options or {})
        # The flag asks for answers by broadcast: nothing else reaches an interface without address.
        message = struct.pack("!BBBB4sHH4s12x", 1, 1, 6, 0, self.transaction, 0, 0x8000, own)
        message += self.hardware.ljust(16, b"\0") + bytes(192) + _COOKIE
        for code, data in fields.items():
            message += bytes([code, len(data)]) + data
        packet = datagram(own, message + bytes([_END]))
        try:
            self.socket.sendto(packet, (self.device, _IP, 0, 0, _BROADCAST))
        except OSError as error:
            log(f"{self.device}: {error}")

    def receive(self) -> tuple[int, bytes, dict[int, bytes]] | None:
        """The next packet as (kind, address, options), if it is an answer to this client."""
        message = payload(self.socket.recv(4096))
        if message is None or message[4:8] != self.transaction:
            return None
        options = parse_options(message[240:])
        kind = options.get(_KIND, b"\0")[:1]
        return kind[0], message[16:20], options


def datagram(source: bytes, message: bytes) -> bytes:
    """An IPv4 packet to everybody with a UDP datagram from port 68 to port 67."""
    length = 8 + len(message)
    udp = struct.pack("!HHHH", 68, 67, length, 0)  # 0: no check sum
    fields = (0x45, 0, 20 + length, 0, 0, 64, _UDP, 0, source, b"\xff" * 4)
    header = struct.pack("!BBHHHBBH4s4s", *fields)
    return header[:10] + struct.pack("!H", check_sum(header)) + header[12:] + udp + message


def check_sum(data: bytes) -> int:
    """The Internet check sum (RFC 1071) of an even number of bytes."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def payload(packet: bytes) -> bytes | None:
    """The DHCP message in an IPv4 packet, if that is one from a server."""
    if len(packet) < 28 or packet[9] != _UDP:
        return None
    start = (packet[0] & 15) * 4
    ports = packet[start : start + 4]
    message = packet[start + 8 :]
    if ports != struct.pack("!HH", 67, 68) or message[:1] != b"\x02":
        return None
    return message if message[236:240] == _COOKIE else None


def parse_options(data: bytes) -> dict[int, bytes]:
    """The options by their numbers; what is given twice is joined (RFC 3396)."""
    options: dict[int, bytes] = {}
    at = 0
    while at + 1 < len(data) and data[at] != _END:
        if data[at] == 0:
            at += 1
            continue
        code, length = data[at], data[at + 1]
        options[code] = options.get(code, b"") + data[at + 2 : at + 2 + length]
        at += 2 + length
    return options

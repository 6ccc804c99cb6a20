"""The guest's network: loopback always, one interface where the job asks for it."""

from __future__ import annotations

from apppot.guest.syscalls import Interface

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from apppot.guest.protocol.job import Network


def loopback() -> None:
    """Set the loopback interface up."""
    interface = Interface("lo")
    try:
        interface.up()
    finally:
        interface.close()


def resolver(network: Network) -> str:
    """The text of /etc/resolv.conf."""
    return "".join([f"nameserver {server}\n" for server in network.dns.split()])


def bring_up(network: Network) -> None:
    """Set the job's interface up, with address and default route.

    Setting it up is what connects it to the host's helper, so that one must be listening.
    """
    interface = Interface(network.device)
    try:
        interface.mtu(network.mtu)
        interface.address(network.address, network.prefix)
        interface.up()
        interface.default_route(network.gateway)
    finally:
        interface.close()

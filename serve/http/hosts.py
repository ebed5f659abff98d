"""Which Host headers the server answers to. A web page whose name its owner lets point to this machine (DNS rebinding)
gives itself away by that name.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence

from starlette.datastructures import Headers

ANY = "*"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::[0-9]*)?")


def hosts_for(listener: socket.socket, allowed: Sequence[str]) -> Sequence[str]:
    """Names for a server's socket. On a Unix domain socket, which no browser reaches, all or `allowed`."""
    if listener.family == socket.AF_UNIX:
        return allowed or (ANY,)
    return hosts_of(listener.getsockname()[0], allowed)


def hosts_of(address: str, allowed: Sequence[str]) -> Sequence[str]:
    """Names for a server that listens on `address`: on loopback those that only this machine has, and `allowed` ones;
    elsewhere `allowed` ones, or all.
    """
    ip = ipaddress.ip_address(address)
    if ip.is_loopback:
        return (*LOOPBACK, f"[{ip}]" if ip.version == 6 else str(ip), *allowed)
    return allowed or (ANY,)


def names_one_of(headers: Headers, hosts: Sequence[str]) -> bool:
    """Whether the Host header, on whatever port, is one of `hosts`; also without one, as browsers always send it."""
    found = HOST.fullmatch(headers.get("host", hosts[0]))
    return ANY in hosts or (found is not None and found[1].lower() in hosts)

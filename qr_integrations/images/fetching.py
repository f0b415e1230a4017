"""Pictures from the network: from public hosts only, and never more or longer than allowed.

A picture's address often stands in somebody else's message. The machine that runs the model must not become their way
into its own network, so what an address leads to is checked where the connection is made.
"""

import http.client
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from threading import Timer
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from qr_integrations.errors import InputError
from qr_integrations.images.policy import PicturePolicy, shown

_REDIRECTS = 3
_GLOBAL_UNICAST, _NAT64 = IPv6Network("2000::/3"), IPv6Network("64:ff9b::/96")
_SPECIAL = (
    # special purposes that older versions of Python's ipaddress hold to be global
    IPv4Network("192.0.0.0/24"),
    IPv4Network("192.88.99.0/24"),
    IPv6Network("3fff::/20"),
    # of Azure's public addresses, but to each of its virtual machines the host that tells it its settings
    IPv4Network("168.63.129.16/32"),
)


def is_public_address(address: str) -> bool:
    """Whether an IP address belongs to the public internet, not to this machine, its network or a special purpose.

    Example:
        >>> from qr_integrations.images import is_public_address
        >>> [is_public_address(address) for address in ("8.8.8.8", "10.0.0.1", "::ffff:127.0.0.1")]
        [True, False, False]
    """
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        ip = (IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped) or ip
    if any(ip in network for network in _SPECIAL):
        return False
    if isinstance(ip, IPv6Address):  # 6to4 and Teredo carry an IPv4 address along
        return ip in _GLOBAL_UNICAST and ip.is_global and ip.sixtofour is None and ip.teredo is None
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def addresses_of(host: str, port: int) -> list[str]:
    """The IP addresses of a host, as the system resolves it.

    Raises:
        OSError: the host is not known.
    """
    return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


@dataclass(frozen=True, slots=True)
class PictureFetcher:
    """Gets the bytes behind an http or https URL, from hosts that it may speak to.

    A host is resolved once, all its addresses must be permitted, and the connection goes to one of these, so that a
    name cannot change its meaning in between. Redirects are followed three times and checked in the same way. Proxies,
    cookies and credentials are not used.

    Args:
        policy: its `max_bytes` and `timeout`; whether URLs are allowed at all is not asked here.
        permits: whether an IP address may be spoken to.
        resolve: host and port to IP addresses.
        tls: how servers are verified; None: by the certificates that the system trusts.
    """

    policy: PicturePolicy
    permits: Callable[[str], bool] = is_public_address
    resolve: Callable[[str, int], Sequence[str]] = addresses_of
    tls: ssl.SSLContext | None = None

    def fetch(self, url: str) -> bytes:
        """The bytes that the URL leads to, at most `max_bytes`, within `timeout` seconds.

        Raises:
            InputError: a host that is not permitted, a server that does not answer, or too much data.
        """
        deadline = time.monotonic() + self.policy.timeout
        target: str | None = url
        for _ in range(1 + _REDIRECTS):
            try:
                body, target = self._get(target or "", deadline)
            except InputError:
                raise
            except (OSError, ValueError, http.client.HTTPException) as error:
                late = time.monotonic() >= deadline
                reason = f"not done in {self.policy.timeout:g} seconds" if late else str(error)[:100]
                raise InputError(f"{shown(url)} could not be fetched ({reason}): download it yourself") from error
            if target is None:
                return body
        raise InputError(f"{shown(url)} is redirected more than {_REDIRECTS} times: pass the last address")

    def _get(self, url: str, deadline: float) -> tuple[bytes, str | None]:
        """A body, or where the server redirects to."""
        parts = _checked_url(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        context = (self.tls or ssl.create_default_context()) if parts.scheme == "https" else None
        plain = self._connected(host, port, deadline)
        connection = http.client.HTTPConnection(host, port)
        if context:
            connection = http.client.HTTPSConnection(host, port, context=context)
        with plain, closing(connection):
            connection.sock = plain
            if context:
                connection.sock = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
            with _shut_down_at(deadline, connection.sock):
                if isinstance(connection.sock, ssl.SSLSocket):
                    connection.sock.do_handshake()
                connection.request("GET", _target(parts), headers={"User-Agent": "qr-integrations"})
                with connection.getresponse() as response:
                    found = self._read(response, url)
        _seconds_left(deadline)
        return found

    def _read(self, response: http.client.HTTPResponse, url: str) -> tuple[bytes, str | None]:
        if response.status in (301, 302, 303, 307, 308):
            return b"", urljoin(url, response.getheader("Location", ""))
        if response.status != 200:
            raise InputError(f"{shown(url)} is answered with status {response.status}: check the address")
        return self.policy.read(response, shown(url)), None

    def _connected(self, host: str, port: int, deadline: float) -> socket.socket:
        addresses = self.resolve(host, port)
        if not addresses or not all(self.permits(address) for address in addresses):
            raise InputError(f"the host {host!r} is not on the public internet: pass the picture itself")
        for address in addresses[:-1]:
            try:
                return socket.create_connection((address, port), _seconds_left(deadline))
            except OSError:
                continue
        return socket.create_connection((addresses[-1], port), _seconds_left(deadline))


def _checked_url(url: str) -> SplitResult:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{shown(url)} is not fetched: write http://host/... or https://host/...")
    if parts.username is not None:
        raise InputError(f"{shown(url)} holds a user's name or password: take them out")
    return parts


def _target(parts: SplitResult) -> str:
    """Path and query, what is not ASCII escaped."""
    query = quote(parts.query, safe="/%:@!$&'()*+,;=~?")
    return quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{query}" if query else "")


def _seconds_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("out of time")
    return left


@contextmanager
def _shut_down_at(deadline: float, connected: socket.socket) -> Iterator[None]:
    """A socket's own timeout counts from the last byte, which a slow server can use."""
    timer = Timer(_seconds_left(deadline), _shut_down, [connected])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut_down(connected: socket.socket) -> None:
    try:
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
    except OSError:
        return

"""Pictures from the network: from public hosts, through the address that was checked, within all limits.

The server of these tests is on this machine, which the policy refuses: the tests inject who may be spoken to.
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Answer = Callable[[BaseHTTPRequestHandler], None]

# A certificate of pictures.test with its key, for these tests alone.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBfTCCASOgAwIBAgIBATAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1waWN0dXJl
cy50ZXN0MCAXDTI0MDEwMTAwMDAwMFoYDzIwOTkxMjMxMjM1OTU5WjAYMRYwFAYD
VQQDDA1waWN0dXJlcy50ZXN0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAES7+g
D8pkbsdUdi64pTOGSludQ4xzymX+DBUN8FCTOaoHDCcHNeKu78yWWkRm+qlecyk6
PQ7kV7FvRT/r44t8LaNcMFowHQYDVR0OBBYEFGXccGMbE6VPPbQfostaEWmwVRV7
MA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgKEMBgGA1UdEQQRMA+CDXBp
Y3R1cmVzLnRlc3QwCgYIKoZIzj0EAwIDSAAwRQIhAPq8sL610bVLUWL3qosr46Iu
08mUuPz55SDqr/zVBNhaAiAoQDx/rNBIrP/vjk5o7jeZOmbqbQaicSNfIv4h90kt
vw==
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQglfbPpW1Tc4UMdQRI
gnKcGEvQTm2N1QYkqgQXOtteYSGhRANCAARLv6APymRux1R2LrilM4ZKW51DjHPK
Zf4MFQ3wUJM5qgcMJwc14q7vzJZaRGb6qV5zKTo9DuRXsW9FP+vji3wt
-----END PRIVATE KEY-----
"""


def picture() -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 3), (255, 0, 0)).save(file, "PNG")
    return file.getvalue()


# ---- a server on this machine


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client hangs up when it has had enough."""


@contextmanager
def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port of a server that answers every request so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *args: Any) -> None:
            """Nothing to say."""

    server = Quiet(("127.0.0.1", 0), Handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def give(request: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


def redirect(request: BaseHTTPRequestHandler, to: str, status: int = 302) -> None:
    give(request, b"", status, Location=to)


class Names:
    """A resolver: hosts to addresses, every question remembered."""

    def __init__(self, **known: Sequence[str]) -> None:
        self.known, self.asked = known, list[str]()

    def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.known.get(host.partition(".")[0], ["127.0.0.1"])


def fetcher(names: Names | None = None, tls: ssl.SSLContext | None = None, **limits: Any) -> Any:
    """May speak to 127.0.0.1 and no other address."""
    from qr_integrations.images import PictureFetcher, PicturePolicy

    policy = PicturePolicy(**{"timeout": 5.0, **limits})
    return PictureFetcher(policy, permits=lambda address: address == "127.0.0.1", resolve=names or Names(), tls=tls)


# ---- who is public


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "172.32.0.1"]
)
def test_public_addresses(address: str) -> None:
    from qr_integrations.images import is_public_address

    assert is_public_address(address)


@pytest.mark.parametrize(
    "address",
    [
        *["0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.1.2.3", "169.254.169.254", "172.16.0.1"],
        *[
            "172.31.255.255",
            "192.0.0.9",
            "192.0.2.1",
            "192.168.1.1",
            "192.88.99.1",
            "198.18.0.1",
            "203.0.113.1",
            "224.0.0.1",
        ],
        *["168.63.129.16", "::ffff:168.63.129.16"],  # Azure's, for the settings of virtual machines
        *["239.255.255.250", "240.0.0.1", "255.255.255.255"],
        *["::", "::1", "::127.0.0.1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12:3456::1", "fec0::1", "ff02::1"],
        *[
            "2001:db8::1",
            "3fff::1",
            "100::1",
            "2001:0:4136:e378:8000:63bf:3fff:fdd2",
            "2002:7f00:1::",
            "2002:808:808::",
        ],
        *["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "::ffff:224.0.0.1", "64:ff9b::127.0.0.1"],
        *["64:ff9b::a9fe:a9fe", "64:ff9b:1::8.8.8.8"],
    ],
)
def test_other_addresses(address: str) -> None:
    from qr_integrations.images import is_public_address

    assert not is_public_address(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.0.0.1:8080", "user.test.", "ⓛocalhost"])
def test_this_machine_is_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PicturePolicy, open_picture

    real = socket.getaddrinfo
    names = {"user.test.": "127.0.0.1", "ⓛocalhost": "localhost"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real(names.get(host, host), *a, **k))
    with pytest.raises(InputError, match="not on the public internet"):
        open_picture(f"http://{host}/it.png", policy=PicturePolicy(allow_urls=True))


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "0", "3232235777"])
def test_numbers_that_mean_an_address_of_this_network_are_refused(host: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PictureFetcher, PicturePolicy

    def as_the_system_reads_it(host: str, port: int) -> list[str]:
        return [socket.inet_ntoa(socket.inet_aton(host))]

    with pytest.raises(InputError, match="not on the public internet"):
        PictureFetcher(PicturePolicy(), resolve=as_the_system_reads_it).fetch(f"http://{host}/it.png")


def test_one_private_address_among_public_ones_is_enough() -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PictureFetcher, PicturePolicy

    names = Names(mixed=["8.8.8.8", "10.0.0.1"], unknown=[])
    for host in ("mixed.test", "unknown.test"):
        with pytest.raises(InputError, match="not on the public internet"):
            PictureFetcher(PicturePolicy(), resolve=names).fetch(f"http://{host}/it.png")


# ---- what is fetched


def test_a_picture_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.images import PictureFetcher, PicturePolicy, opening

    seen: list[tuple[str, dict[str, str]]] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        seen.append((request.path, {name.lower(): value for name, value in request.headers.items()}))
        give(request, picture())

    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://proxy.test:1")
    permitted = partial(PictureFetcher, permits=lambda address: True, resolve=Names())
    monkeypatch.setattr(opening, "PictureFetcher", permitted)
    with serving(answer) as port:
        url = f"http://pictures.test:{port}/a b/ü.png?q=1&r=%20 x#part"
        opened = opening.open_picture(url, policy=PicturePolicy(allow_urls=True))
    assert opened.size == (4, 3) and opened.getpixel((0, 0)) == (255, 0, 0)
    path, headers = seen[0]
    assert path == "/a%20b/%C3%BC.png?q=1&r=%20%20x" and headers["host"] == f"pictures.test:{port}"
    assert set(headers) <= {"host", "user-agent", "accept-encoding"}


def test_a_host_is_resolved_once_and_the_checked_address_is_used() -> None:
    class Rebinding(Names):
        def __call__(self, host: str, port: int) -> Sequence[str]:
            return ["127.0.0.1"] if not super().__call__(host, port) or len(self.asked) == 1 else ["10.0.0.1"]

    names = Rebinding()
    with serving(lambda request: give(request, picture())) as port:
        assert fetcher(names).fetch(f"http://pictures.test:{port}/") == picture()
    assert names.asked == ["pictures.test"]


def test_the_next_address_is_tried_where_one_does_not_answer() -> None:
    from qr_integrations.images import PictureFetcher, PicturePolicy

    tried = PictureFetcher(
        PicturePolicy(timeout=5.0), permits=lambda address: True, resolve=Names(pictures=["127.0.0.9", "127.0.0.1"])
    )
    with serving(lambda request: give(request, picture())) as port:
        assert tried.fetch(f"http://pictures.test:{port}/") == picture()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_three_times(status: int) -> None:
    from qr_integrations.errors import InputError

    def answer(request: BaseHTTPRequestHandler) -> None:
        left = int(request.path.strip("/"))
        redirect(request, f"/{left - 1}", status) if left else give(request, picture())

    with serving(answer) as port:
        assert fetcher().fetch(f"http://pictures.test:{port}/3") == picture()
        with pytest.raises(InputError, match="redirected more than 3 times"):
            fetcher().fetch(f"http://pictures.test:{port}/4")


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("http://inside.test/it.png", "not on the public internet"),
        ("//inside.test/it.png", "not on the public internet"),
        ("file:///etc/passwd", "write http"),
        ("ftp://pictures.test/it.png", "write http"),
        ("http://me:secret@pictures.test/", "password"),
        ("http://[broken/", "could not be fetched"),
    ],
)
def test_every_redirect_is_checked(to: str, says: str) -> None:
    from qr_integrations.errors import InputError

    names = Names(inside=["10.0.0.1"])
    with serving(lambda request: redirect(request, to)) as port, pytest.raises(InputError, match=says) as caught:
        fetcher(names).fetch(f"http://pictures.test:{port}/")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http:///it.png", "write http"),
        ("http://", "write http"),
        ("http://me:secret@pictures.test/", "password"),
        ("http://evil.test\\@pictures.test/", "password"),
        ("http://pictures.test:99999/", "could not be fetched"),
        ("http://pictures.test:x/", "could not be fetched"),
        ("http://pic tures.test/", "could not be fetched"),
        ("http://[::1/", "could not be fetched"),
        ("http://" + "a" * 70 + ".test/", "could not be fetched"),
    ],
)
def test_odd_urls_are_refused(url: str, says: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PictureFetcher, PicturePolicy

    def resolve(host: str, port: int) -> list[str]:
        host.encode("idna")  # as the system's resolver does
        return ["127.0.0.1"]

    with pytest.raises(InputError, match=says) as caught:
        PictureFetcher(PicturePolicy(), permits=lambda address: True, resolve=resolve).fetch(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("status", [204, 206, 304, 404, 500])
def test_other_answers_are_refused(status: int) -> None:
    from qr_integrations.errors import InputError

    with serving(lambda request: give(request, b"", status)) as port, pytest.raises(InputError, match=f"{status}"):
        fetcher().fetch(f"http://pictures.test:{port}/")


def test_a_server_that_is_not_there_or_speaks_otherwise_is_refused() -> None:
    from qr_integrations.errors import InputError

    says = r"could not be fetched .*: download it yourself"
    with serving(lambda request: None) as port, pytest.raises(InputError, match=says):
        fetcher().fetch(f"http://pictures.test:{port}/")
    with pytest.raises(InputError, match=says):
        fetcher().fetch(f"http://pictures.test:{port}/")

    def chatter(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"x" * 60_000 + b"\r\n\r\n")

    with serving(chatter) as port, pytest.raises(InputError, match="could not be fetched") as caught:
        fetcher().fetch(f"http://pictures.test:{port}/")
    assert len(str(caught.value)) < 300


# ---- how much and how long


@pytest.mark.parametrize("claimed", [None, 10, 10**12])
def test_length_is_counted_not_believed(claimed: int | None) -> None:
    from qr_integrations.errors import InputError

    sent = 0

    def endless(request: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        give(request, b"", **({} if claimed is None else {"Content-Length": str(claimed)}))
        while sent < 50_000_000:
            sent += request.wfile.write(bytes(10_000))

    with serving(endless) as port:
        if claimed == 10:  # no more is read than was announced
            assert fetcher(max_bytes=100_000).fetch(f"http://pictures.test:{port}/") == bytes(10)
        else:
            with pytest.raises(InputError, match="more than 100000 bytes"):
                fetcher(max_bytes=100_000).fetch(f"http://pictures.test:{port}/")
    assert sent < 50_000_000


def drip(request: BaseHTTPRequestHandler, head: bytes) -> None:
    """Never silent for long, never done."""
    request.wfile.write(head)
    for _ in range(400):
        request.wfile.write(b"x")
        request.wfile.flush()
        time.sleep(0.02)


@pytest.mark.parametrize(
    "answer",
    [
        partial(drip, head=b"HTTP/1.0 200 OK\r\n\r\n"),
        partial(drip, head=b"HTTP/1.0 200 OK\r\nX-Slow: "),
        partial(drip, head=b""),
        lambda request: time.sleep(2),
        lambda request: (time.sleep(0.15), redirect(request, "/"))[1],
    ],
)
def test_time_is_counted_from_the_start(answer: Answer) -> None:
    from qr_integrations.errors import InputError

    with serving(answer) as port:
        start = time.monotonic()
        with pytest.raises(InputError, match=r"not done in 0\.4 seconds"):
            fetcher(timeout=0.4).fetch(f"http://pictures.test:{port}/")
        assert 0.3 < time.monotonic() - start < 1.5


def test_no_thread_is_left_behind() -> None:
    before = threading.active_count()
    with serving(lambda request: give(request, picture())) as port:
        fetcher(timeout=60.0).fetch(f"http://pictures.test:{port}/")
    until = time.monotonic() + 2
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before


# ---- encrypted


@pytest.fixture
def server_tls(tmp_path: Path) -> ssl.SSLContext:
    (tmp_path / "it.pem").write_text(CERTIFICATE + KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "it.pem")
    return context


def test_https_speaks_to_the_host_that_was_named(server_tls: ssl.SSLContext) -> None:
    from qr_integrations.errors import InputError

    trusting = ssl.create_default_context(cadata=CERTIFICATE)
    with serving(lambda request: give(request, picture()), server_tls) as port:
        assert fetcher(tls=trusting).fetch(f"https://pictures.test:{port}/") == picture()
        with pytest.raises(InputError, match=r"could not be fetched .*CERTIFICATE_VERIFY_FAILED"):
            fetcher(tls=trusting).fetch(f"https://other.test:{port}/")
        with pytest.raises(InputError, match=r"could not be fetched .*CERTIFICATE_VERIFY_FAILED"):
            fetcher().fetch(f"https://pictures.test:{port}/")


def test_a_handshake_that_does_not_end_is_cut_off() -> None:
    from qr_integrations.errors import InputError

    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(InputError, match=r"not done in 0\.3 seconds"):
            fetcher(timeout=0.3).fetch(f"https://pictures.test:{silent.getsockname()[1]}/")
        assert time.monotonic() - start < 1.5

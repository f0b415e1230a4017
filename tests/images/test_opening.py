"""Whatever holds a picture becomes an upright RGB picture; everything else is refused, in short words."""

import base64
import random
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

Image.init()
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(["AVIF"] if "AVIF" in Image.SAVE else [])]
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def colours(width: int = 4, height: int = 3) -> Image.Image:
    """Every pixel another colour."""
    pixels = np.arange(width * height * 3, dtype=np.uint32) * 7 % 251
    return Image.fromarray(pixels.astype(np.uint8).reshape(height, width, 3))


def noise(side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def data_uri(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(data).decode()


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()


def header_only(width: int, height: int) -> bytes:
    """A PNG that says how large it is and ends there."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (body, idat)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def in_mode(layer: Image.Image, mode: str) -> Image.Image:
    if mode == "PA":
        layer.putpalette([0, 0, 0])
        return layer
    return layer.convert(mode) if mode in ("LA", "La") else layer.convert("RGBA").convert(mode)


def pixels_of(picture: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3).tolist()]


# ---- forms


@pytest.mark.parametrize(
    "form",
    [
        lambda data, folder: Image.open(BytesIO(data)),
        lambda data, folder: data,
        lambda data, folder: bytearray(data),
        lambda data, folder: BytesIO(data),
        lambda data, folder: np.asarray(Image.open(BytesIO(data))),
        lambda data, folder: np.asarray(Image.open(BytesIO(data)))[::-1][::-1],
        lambda data, folder: folder / "it.png",
        lambda data, folder: str(folder / "it.png"),
        lambda data, folder: (folder / "it.png").open("rb"),
        lambda data, folder: data_uri(data),
        lambda data, folder: " " + data_uri(data, "DATA:image/png;name=x;BASE64,"),
        lambda data, folder: data_uri(data).replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
        lambda data, folder: "data:," + "".join(f"%{byte:02x}" for byte in data),
    ],
)
def test_every_form_gives_the_same_picture(form: Callable[[bytes, Path], Any], tmp_path: Path) -> None:
    from qr_integrations.images import open_picture

    data = encoded(colours())
    (tmp_path / "it.png").write_bytes(data)
    source = form(data, tmp_path)
    opened = open_picture(source)
    if hasattr(source, "close"):
        source.close()
    assert same(opened, colours())


def test_a_file_is_read_from_its_start_and_stays_open() -> None:
    from qr_integrations.images import open_picture

    file = BytesIO(encoded(colours()))
    file.read(5)
    assert same(open_picture(file), colours()) and same(open_picture(file), colours())


def test_the_result_is_the_callers_own() -> None:
    from qr_integrations.images import open_picture

    given, pixels = colours(), np.asarray(colours()).copy()
    first, second = open_picture(given), open_picture(pixels)
    given.putpixel((0, 0), RED)
    pixels[:] = 0
    assert same(first, colours()) and same(second, colours())


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind: str) -> None:
    from qr_integrations.images import open_picture

    plain = Image.new("RGB", (8, 8), BLUE)
    opened = open_picture(encoded(plain, kind))
    assert opened.mode == "RGB" and opened.size == (8, 8)
    assert np.abs(np.asarray(opened, dtype=int) - np.asarray(plain, dtype=int)).max() < 5


@pytest.mark.parametrize(
    "data", [b"", b"no picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", encoded(noise(), "EPS")]
)
def test_other_formats_are_refused(data: bytes) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    with pytest.raises(InputError, match="convert it to PNG or JPEG"):
        open_picture(data)


# ---- modes


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_transparent_is_laid_on_white(mode: str) -> None:
    from qr_integrations.images import open_picture

    layer = Image.new("LA", (3, 1), (0, 0))  # black below, as in most files
    layer.putpixel((1, 0), (0, 255))
    layer.putpixel((2, 0), (0, 127))
    given = in_mode(layer, mode)
    assert given.mode == mode
    first, second, third = pixels_of(open_picture(given))
    assert first == WHITE and second == BLACK
    assert third == (128, 128, 128)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_laid_on_white(mode: str) -> None:
    from qr_integrations.images import open_picture

    picture = Image.new(mode, (2, 1), 0)
    if mode == "P":
        picture.putpalette([*BLACK, *RED])
    picture.putpixel((1, 0), {"P": 1, "L": 255, "RGB": RED}[mode])
    hidden: Any = BLACK if mode == "RGB" else 0
    seen = WHITE if mode == "L" else RED
    assert pixels_of(open_picture(encoded(picture, transparency=hidden))) == [WHITE, seen]
    assert pixels_of(open_picture(encoded(picture))) == [BLACK, seen]
    if mode == "P":  # one alpha for each colour
        assert pixels_of(open_picture(encoded(picture, transparency=bytes([255, 0])))) == [BLACK, WHITE]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_modes_become_rgb(mode: str) -> None:
    from qr_integrations.images import open_picture

    opened = open_picture(Image.new("RGB", (2, 2), WHITE).convert(mode))
    assert pixels_of(opened) == [WHITE] * 4


def test_a_cmyk_file_has_its_colours() -> None:
    from qr_integrations.images import open_picture

    red = open_picture(encoded(Image.new("RGB", (8, 8), RED).convert("CMYK"), "JPEG"))
    assert red.mode == "RGB" and np.abs(np.asarray(red, dtype=int) - RED).max() < 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_brightness(kind: str) -> None:
    from qr_integrations.images import open_picture

    values = np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    expected = [(value,) * 3 for value in (0, 0x12, 0x80, 0xFF)]
    graymap = b"P5 4 1 65535 " + values.astype(">u2").tobytes()  # older versions of Pillow read, but do not write it
    assert pixels_of(open_picture(graymap if kind == "PPM" else encoded(Image.fromarray(values), kind))) == expected
    assert pixels_of(open_picture(Image.fromarray(values.astype(np.int32)))) == expected


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (np.zeros((2, 2), np.float32), "floating-point"),
        (np.full((2, 2), 70000, np.int32), "outside 16 bits"),
        (np.full((2, 2), -1, np.int32), "outside 16 bits"),
    ],
)
def test_values_of_unknown_range_are_refused(pixels: np.ndarray, says: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    with pytest.raises(InputError, match=f"{says}.*8 bits a channel"):
        open_picture(Image.fromarray(pixels))


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 1), (3, 2, 3), (3, 2, 4)])
def test_arrays(shape: tuple[int, ...]) -> None:
    from qr_integrations.images import open_picture

    opened = open_picture(np.full(shape, 255, np.uint8))
    assert opened.size == (2, 3) and set(pixels_of(opened)) == {WHITE}


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5), (2, 3, 4, 3), (0, 3, 3), (3, 3, 0)])
def test_arrays_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    with pytest.raises(InputError, match="pass uint8"):
        open_picture(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("source", [None, 3, np.zeros((2, 2, 3)), [1, 2], StringIO("text")])
def test_what_is_no_picture_is_refused(unchecked: None, source: Any) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    with pytest.raises(InputError, match=r"pass (a Pillow picture|uint8)|binary mode"):
        open_picture(source)


def test_a_closed_file_is_refused() -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    file = BytesIO(encoded(colours()))
    file.close()
    with pytest.raises(InputError, match="closed file"):
        open_picture(file)


# ---- upright


def stored_as(upright: Image.Image, orientation: int) -> Image.Image:
    """What a camera stores that writes this orientation, from the standard: where row 0 and column 0 are seen."""
    pixels = np.asarray(upright)
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels.transpose(1, 0, 2)[::-1],
        7: pixels.transpose(1, 0, 2)[::-1, ::-1],
        8: pixels.transpose(1, 0, 2)[:, ::-1],
    }
    return Image.fromarray(np.ascontiguousarray(stored[orientation]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_picture_is_turned_upright_once(kind: str, orientation: int) -> None:
    from qr_integrations.images import open_picture

    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(stored_as(colours(), orientation), kind, exif=exif, **options)
    opened = open_picture(data)
    assert same(opened, colours()) and same(open_picture(opened), colours())
    with Image.open(BytesIO(data)) as lazy:
        before = lazy.size
        assert same(open_picture(lazy), colours())
        if kind != "TIFF":  # Pillow turns these itself
            assert lazy.size == before


def test_a_phones_photograph_is_upright() -> None:
    from qr_integrations.images import open_picture

    upright = Image.new("RGB", (16, 32), BLUE)
    upright.paste(RED, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_picture(encoded(stored_as(upright, 6), "JPEG", exif=exif))
    assert opened.size == (16, 32)
    top, bottom = np.asarray(opened, dtype=int)[[4, 28], 8]
    assert np.abs(top - RED).max() < 8 and np.abs(bottom - BLUE).max() < 8


@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"Exif\0\0II*\0\xff\xff\xff\xff", b"MM"])
def test_broken_exif_leaves_the_picture_as_it_is(exif: bytes) -> None:
    from qr_integrations.images import open_picture

    assert same(open_picture(encoded(colours(), exif=exif)), colours())


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    from qr_integrations.images import open_picture

    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), GREEN)
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert set(pixels_of(open_picture(data))) == {RED}
    with Image.open(BytesIO(data)) as film:
        film.seek(1)
        assert set(pixels_of(open_picture(film))) == {GREEN}


# ---- broken


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_half_a_picture_is_none(kind: str, keep: float) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    data = encoded(noise(), kind)
    part = data[: int(keep * len(data))]
    with pytest.raises(InputError, match=r": (get it again|convert it)"):
        open_picture(part)
    with pytest.raises(InputError, match=r": (get it again|convert it)"):
        open_picture(BytesIO(part))


def test_a_cut_picture_opened_by_the_caller_is_refused() -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    data = encoded(noise())
    with Image.open(BytesIO(data[: len(data) // 2])) as lazy, pytest.raises(InputError, match="cut short or broken"):
        open_picture(lazy)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", FORMATS)
def test_damage_gives_a_picture_or_an_input_error(kind: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PicturePolicy, open_picture

    chance = random.Random(0)
    whole = encoded(noise(16), kind, **({"exif": Image.Exif()} if kind in ("PNG", "JPEG") else {}))
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(min(len(data), 200))] = chance.randrange(256)
        try:
            assert open_picture(data, policy=PicturePolicy(max_pixels=100_000)).mode == "RGB"
        except InputError as error:
            assert len(str(error)) < 500


# ---- limits


@pytest.mark.parametrize("size", [(9_000, 9_000), (10_000, 10_000), (100_000, 100_000)])
def test_a_bomb_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    with pytest.raises(InputError, match="pixels"):  # decoding would have found it broken
        open_picture(header_only(*size))


@pytest.mark.parametrize("size", [(16_000, 1), (1, 16_000), (201, 1), (2, 401), (12_001, 100)])
def test_a_long_or_narrow_picture_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    for source in (header_only(*size), Image.new("RGB", size)):
        with pytest.raises(InputError, match=f"{size[0]} x {size[1]} pixels, too long or too narrow: cut it, or raise"):
            open_picture(source)


def test_limits_of_sides_are_inclusive_and_can_be_moved() -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PicturePolicy, open_picture

    for size in ((200, 1), (1, 200), (12_000, 60)):
        assert open_picture(Image.new("RGB", size)).size == size
    assert open_picture(Image.new("RGB", (300, 1)), policy=PicturePolicy(max_ratio=300.0)).size == (300, 1)
    assert open_picture(Image.new("RGB", (13_000, 65)), policy=PicturePolicy(max_side=13_000)).size == (13_000, 65)
    for strict in (PicturePolicy(max_side=3), PicturePolicy(max_ratio=1.3)):
        with pytest.raises(InputError, match="4 x 3 pixels, too long"):
            open_picture(colours(), policy=strict)


def test_pixels_are_counted_in_every_form() -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PicturePolicy, open_picture

    few, enough = PicturePolicy(max_pixels=11), PicturePolicy(max_pixels=12)
    for source in (colours(), encoded(colours()), np.asarray(colours())):
        with pytest.raises(InputError, match="4 x 3 pixels"):
            open_picture(source, policy=few)
        assert same(open_picture(source, policy=enough), colours())
    with pytest.raises(InputError, match="0 x 3 pixels"):
        open_picture(Image.new("RGB", (0, 3)))


def test_bytes_are_counted_in_every_form(tmp_path: Path) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PicturePolicy, decode_base64, open_picture

    data = encoded(noise(200))  # more than one chunk
    assert len(data) > 1 << 16
    few, enough = PicturePolicy(max_bytes=len(data) - 1), PicturePolicy(max_bytes=len(data))
    (tmp_path / "it.png").write_bytes(data)
    for source in (data, lambda: BytesIO(data), tmp_path / "it.png", data_uri(data)):
        with pytest.raises(InputError, match=f"more than {len(data) - 1} bytes"):
            open_picture(source() if callable(source) else source, policy=few)
        assert same(open_picture(source() if callable(source) else source, policy=enough), noise(200))
    with pytest.raises(InputError, match="more than"):
        decode_base64(base64.b64encode(data), policy=few)
    assert decode_base64(base64.b64encode(data), policy=enough) == data


def test_an_endless_file_is_not_read_to_its_end() -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PicturePolicy, open_picture

    class Endless(BytesIO):
        given = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.given += size or 0
            return bytes(size or 0)

    endless = Endless()
    with pytest.raises(InputError, match="more than 1000000 bytes"):
        open_picture(endless, policy=PicturePolicy(max_bytes=1_000_000))
    assert 0 < endless.given < 1_200_000


@pytest.mark.parametrize("limit", ["max_bytes", "max_pixels", "max_side", "max_ratio", "timeout"])
def test_a_limit_is_above_zero(limit: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PicturePolicy

    with pytest.raises(InputError, match=f"{limit}=0.*above 0"):
        PicturePolicy(**{limit: 0.0 if limit in ("timeout", "max_ratio") else 0})


def test_nothing_global_changes() -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK
    for data in (encoded(colours()), header_only(100_000, 100_000)):
        try:
            open_picture(data)
        except InputError:
            continue
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK)


def test_threads_open_the_same_file(tmp_path: Path) -> None:
    from qr_integrations.images import open_picture

    (tmp_path / "it.png").write_bytes(encoded(noise()))
    with ThreadPoolExecutor(8) as pool:
        assert all(same(opened, noise()) for opened in pool.map(open_picture, [tmp_path / "it.png"] * 40))


# ---- what is allowed


def test_local_files_are_opened_only_if_allowed(tmp_path: Path) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PicturePolicy, open_picture

    strict = PicturePolicy(allow_local_files=False)
    (tmp_path / "it.png").write_bytes(encoded(colours()))
    for path in (tmp_path / "it.png", tmp_path / "missing.png"):  # and nothing is told about which exist
        for source in (path, str(path)):
            with pytest.raises(InputError, match="allow_local_files"):
                open_picture(source, policy=strict)
    for allowed in (encoded(colours()), data_uri(encoded(colours())), colours()):
        assert same(open_picture(allowed, policy=strict), colours())


@pytest.mark.parametrize("path", ["missing.png", "", ".", "a\0b", "x" * 5000])
def test_a_path_without_a_file(path: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    with pytest.raises(InputError, match=r"there is no file .*: check the path"):
        open_picture(path)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/stdin"])
def test_devices_are_not_read(device: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    with pytest.raises(InputError, match="there is no file"):
        open_picture(Path(device))


@pytest.mark.parametrize("allow_urls", [True, False])
@pytest.mark.parametrize("url", ["file:///etc/passwd", "FILE:/etc/passwd", " file:x.png", "ftp://a/b.png", "s3://a/b"])
def test_other_schemes_are_refused(url: str, allow_urls: bool) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PicturePolicy, open_picture

    with pytest.raises(InputError, match="only data:, http: and https:"):
        open_picture(url, policy=PicturePolicy(allow_urls=allow_urls))


@pytest.mark.parametrize("url", ["http://pictures.test/it.png", "HTTPS://pictures.test/it.png"])
def test_urls_are_off_by_default(url: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    with pytest.raises(InputError, match="allow_urls is off"):
        open_picture(url)


# ---- headers, formats


def test_a_header_tells_the_size_and_no_pixel_is_read() -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PicturePolicy, identify_picture, open_picture

    cut = identify_picture(header_only(3000, 2000))
    assert cut.size == (3000, 2000)
    with pytest.raises(InputError, match="is cut short or broken"):
        open_picture(cut)
    assert same(open_picture(identify_picture(data_uri(encoded(colours())))), colours())
    for limits in (dict(max_pixels=5_999_999), dict(max_side=2999), dict(max_ratio=1.4)):
        with pytest.raises(InputError, match="has 3000 x 2000 pixels"):
            identify_picture(header_only(3000, 2000), policy=PicturePolicy(**limits))


def test_formats_can_be_fewer() -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PicturePolicy, open_picture

    few = PicturePolicy(formats=("PNG", "JPEG"))
    for kind in ("PNG", "JPEG"):
        assert open_picture(encoded(colours(), kind), policy=few).size == colours().size
    for kind in ("BMP", "TIFF", "GIF"):
        with pytest.raises(InputError, match="in none of the formats PNG, JPEG: convert it"):
            open_picture(encoded(colours(), kind), policy=few)
    for formats in ((), ("PNG", "EPS")):
        with pytest.raises(InputError, match="pass some of PNG, JPEG, WEBP"):
            PicturePolicy(formats=formats)


def test_escapes_are_counted_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import PicturePolicy, open_picture, opening

    def unquote(text: str) -> bytes:
        raise AssertionError("was read")

    monkeypatch.setattr(opening, "unquote_to_bytes", unquote)
    for head in ("data:image/png;base64,", "data:image/png,"):
        with pytest.raises(InputError, match="has more than 100 bytes"):
            open_picture(head + "%41" * 140, policy=PicturePolicy(max_bytes=100))
        with pytest.raises(InputError, match="more than 1,000,000 escapes"):
            open_picture(head + "%41" * 1_000_001)


# ---- words


@pytest.mark.parametrize(
    "source",
    [
        data_uri(b"no picture" * 1000),
        "data:image/png;base64," + "?" * 10_000,
        "data:" + "x" * 10_000,
        base64.b64encode(bytes(10_000)).decode(),
        "http://pictures.test/" + "x" * 10_000,
    ],
)
def test_errors_are_short(source: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    with pytest.raises(InputError) as caught:
        open_picture(source)
    error: BaseException | None = caught.value
    while error:
        assert len(str(error)) < 400
        error = error.__cause__ or error.__context__


def test_errors_name_the_file_and_keep_secrets(tmp_path: Path) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_picture

    (tmp_path / "it.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"it\.png"):
        open_picture(tmp_path / "it.png")
    with pytest.raises(InputError, match=r"pictures\.test") as caught:
        open_picture("https://me:secret@pictures.test/a?key=secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("length", range(12))
def test_base64_in_its_dialects(length: int) -> None:
    from qr_integrations.images import decode_base64

    data = bytes([251, 255, 190, 62] * 3)[:length]
    standard = base64.b64encode(data).decode()
    spaced = "\n".join(standard[i : i + 3] for i in range(0, len(standard), 3))
    for text in (standard, standard.rstrip("="), base64.urlsafe_b64encode(data), spaced, f" {spaced}\r\n"):
        assert decode_base64(text) == data


@pytest.mark.parametrize("text", ["a", "äbcd", "ab=c", "a*bc", "data:image/png;base64,aaaa"])
def test_what_is_no_base64_is_refused(text: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import decode_base64

    with pytest.raises(InputError, match="is no base64"):
        decode_base64(text)

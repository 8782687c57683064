import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from connectors.errors import CorruptError
from dataflow.media.checking import decodes
from dataflow.transforms import Region, decoding, turbojpeg
from dataflow.transforms.decoding import open_image


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A photograph-like one: smooth parts, edges and noise."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(x / (9 + 4 * channel)) * np.cos(y / (7 + 3 * channel)) for channel in range(3)]
    pixels = np.stack(waves, -1) + np.random.default_rng(0).normal(0, 8, (height, width, 3))
    pixels[height // 3 : height // 2, width // 3 : width // 2] = (250, 20, 60)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pillow(data: bytes, scale: int = 1) -> np.ndarray:
    """All of a file, by Pillow alone."""
    image = Image.open(io.BytesIO(data))
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    return np.asarray(image.convert("RGB"))


def test_the_library_that_decodes_parts_is_there() -> None:
    """Else the tests below would compare Pillow with Pillow."""
    assert turbojpeg.load_library() is not None


@given(
    width=st.integers(8, 90),
    height=st.integers(8, 90),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0", "4:1:1"]),
    mode=st.sampled_from(["RGB", "L"]),
    progressive=st.booleans(),
    scale=st.sampled_from([1, 2, 4, 8]),
    data=st.data(),
)
def test_a_region_has_the_pixels_of_a_full_decode(
    width: int, height: int, subsampling: str, mode: str, progressive: bool, scale: int, data: st.DataObject
) -> None:
    options = {} if mode == "L" else {"subsampling": subsampling}
    file = encoded(picture(width, height, mode), quality=90, progressive=progressive, **options)
    full_height, full_width = -(-height // scale), -(-width // scale)
    left, top = data.draw(st.integers(0, full_width - 1)), data.draw(st.integers(0, full_height - 1))
    wide, high = data.draw(st.integers(1, full_width - left)), data.draw(st.integers(1, full_height - top))
    image = open_image(file)
    assert (image.width, image.height) == (width, height)
    part = image.decode(Region(left, top, wide, high), scale)
    assert np.array_equal(part, pillow(file, scale)[top : top + high, left : left + wide])


@given(region=st.tuples(st.integers(0, 150), st.integers(0, 90), st.integers(1, 50), st.integers(1, 30)))
def test_without_the_library_the_pixels_are_the_same(region: tuple[int, int, int, int]) -> None:
    file = encoded(picture(200, 120), quality=85)
    parts = []
    for has_library in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not has_library:
                patch.setattr(decoding, "turbo", lambda: None)
            image = open_image(file)
            assert isinstance(image, decoding._TurboImage) is has_library
            parts.append(image.decode(Region(*region)))
    assert np.array_equal(*parts)


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_without_the_library_files_are_scaled_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"save_all": True, "append_images": [picture(200, 120)]} if kind == "MPO" else {}
    file = encoded(picture(200, 120), kind, **more)
    region = Region(3, 5, 40, 20)
    with_library = open_image(file)
    expected = with_library.decode(region, 2)
    monkeypatch.setattr(decoding, "turbo", lambda: None)
    image = open_image(file)
    assert image.scales == with_library.scales
    assert np.array_equal(image.decode(region, 2), expected)


@pytest.mark.parametrize("has_library", [True, False])
def test_lossless_jpeg_cannot_be_scaled(has_library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = b"\xff\xc3" + struct.pack(">HBHHBBBB", 11, 8, 32, 40, 1, 1, 0x11, 0)
    differences = b"\xff\xc4" + struct.pack(">HB16BB", 20, 0, 1, *[0] * 15, 0)  # the code 0, for no difference
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 0, 0) + bytes(32 * 40 // 8)
    if not has_library:
        monkeypatch.setattr(decoding, "turbo", lambda: None)
    image = open_image(b"\xff\xd8" + frame + differences + scan + b"\xff\xd9")
    assert image.scales == (1,)
    assert np.array_equal(image.decode(Region(3, 5, 20, 10)), np.full((10, 20, 3), 128))


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_scaled_decode_is_close_to_the_average_of_a_full_one(scale: int) -> None:
    file = encoded(picture(320, 240), quality=95, subsampling="4:2:0")
    scaled = open_image(file).decode(Region(0, 0, 320 // scale, 240 // scale), scale)
    average = pillow(file).reshape(240 // scale, scale, 320 // scale, scale, 3).mean((1, 3))
    assert np.abs(scaled - average).mean() < 2


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("WEBP", "RGB", {"quality": 90}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("JPEG", "CMYK", {}),
        ("BMP", "RGB", {}),
    ],
)
def test_other_files_are_decoded_by_pillow_and_cut(kind: str, mode: str, options: dict) -> None:
    file = encoded(picture(60, 40, mode), kind, **options)
    image = open_image(file)
    assert np.array_equal(image.decode(Region(5, 7, 30, 20)), pillow(file)[7:27, 5:35])
    assert image.scales == ((8, 4, 2, 1) if kind == "JPEG" else (1,))


def test_transparent_colours_of_a_palette_are_dropped_without_a_warning() -> None:
    image = picture(60, 40, "P")
    file = encoded(image, "PNG", transparency=bytes([0, 128]))
    assert np.array_equal(open_image(file).decode(Region(5, 7, 30, 20)), np.asarray(image.convert("RGB"))[7:27, 5:35])


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_any_buffer_will_do(make) -> None:
    file = encoded(picture(20, 10))
    assert open_image(make(file)).decode(Region(0, 0, 20, 10)).shape == (10, 20, 3)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0 but no more", b"RIFF", b"no image at all"])
def test_what_is_no_image_says_so(data: bytes) -> None:
    with pytest.raises(CorruptError, match="not a readable image") as raised:
        open_image(data).decode(Region(0, 0, 1, 1))
    assert "BytesIO" not in str(raised.value)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_a_damaged_avif_file_is_damaged() -> None:
    """Pillow raises RuntimeError for it."""
    file = encoded(picture(24, 24), "AVIF")
    damaged = file.replace(b"av01", b"av02")
    assert decodes("image", file)
    assert not decodes("image", damaged)
    with pytest.raises(CorruptError, match="not a readable image"):
        open_image(damaged).decode(Region(0, 0, 24, 24))


def test_a_file_that_ends_early_is_damaged_where_it_is_needed() -> None:
    file = encoded(picture(200, 120), quality=90)
    with pytest.raises(CorruptError, match="not a readable image"):
        open_image(file[: len(file) // 2]).decode(Region(0, 0, 200, 120))


def test_after_a_file_that_ends_in_its_header_others_are_decoded_in_part_as_before() -> None:
    file = encoded(picture(200, 120))
    with pytest.raises(CorruptError, match="not a readable image"):
        open_image(file[: file.index(b"\xff\xdb") + 2])  # where its quantisation would follow
    assert isinstance(open_image(file), decoding._TurboImage)


def without(marker: int, file: bytes) -> bytes:
    """Leave out all segments of a kind, of those before the scan."""
    kept, offset = file[:2], 2
    while file[offset + 1] != 0xDA:
        end = offset + 2 + int.from_bytes(file[offset + 2 : offset + 4], "big")
        kept += b"" if file[offset + 1] == marker else file[offset:end]
        offset = end
    return kept + file[offset:]


@pytest.mark.parametrize("quality", [10, 50, 90])
def test_tables_of_a_file_are_not_those_of_the_one_before(quality: int) -> None:
    file = encoded(picture(200, 120), quality=80)
    frame = without(0xC4, file)  # as in Motion JPEG, which leaves out the Huffman tables that are usual
    open_image(encoded(picture(200, 120), quality=quality, optimize=True)).decode(Region(0, 0, 200, 120))
    assert np.array_equal(open_image(frame).decode(Region(0, 0, 200, 16)), pillow(file)[:16])
    with pytest.raises(CorruptError, match="not a readable image"):
        open_image(without(0xDB, file)).decode(Region(0, 0, 200, 120))  # there is no usual quantisation


def test_more_than_eight_bits_are_not_cut_down_silently() -> None:
    file = encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "PNG")
    with pytest.raises(CorruptError, match="more than 8 bits"):
        open_image(file).decode(Region(0, 0, 8, 8))


def test_a_library_that_cannot_crop_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turbojpeg, "_candidates", lambda: iter(["libnowhere.so.0", "libc.so.6"]))
    assert turbojpeg.load_library.__wrapped__() is None

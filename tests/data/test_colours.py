"""The colours that a viewer shows, or a refusal by name: one row each."""

import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from srpo_lightning.data.colours import as_seen, size_as_seen
from srpo_lightning.data.images import Picture, load_picture
from srpo_lightning.data.picture_files import Limits, part_of, read_picture
from srpo_lightning.data.prompts import read_prompts
from tests.data.archive import write_archive

ORANGE = (230, 120, 40)


def saved(picture: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def flat(mode: str, colour, kind: str, **settings) -> bytes:
    return saved(Image.new(mode, (16, 8), colour), kind, **settings)


def wide(level: int, kind: str = "PNG", **settings) -> bytes:
    return saved(Image.fromarray(np.full((8, 16), level, np.uint16)), kind, **settings)


def profile_of(primaries: list[tuple[float, float]], gamma: float) -> bytes:
    """A matrix profile, as display profiles are, whose white is D65."""
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    white = np.array([0.3127 / 0.329, 1, (1 - 0.3127 - 0.329) / 0.329])
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1, 0.8249])
    adapt = np.linalg.inv(bradford) @ np.diag(bradford @ d50 / (bradford @ white)) @ bradford
    columns = (adapt @ (xyz * np.linalg.solve(xyz, white))).T
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78),
        b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in d50)),
    }
    for name, column in zip((b"r", b"g", b"b"), columns, strict=True):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in column))
        tags[name + b"TRC"] = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    head = struct.pack(">I4sI4s4s4s", 0, b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ") + bytes(12)
    head += b"acsp" + bytes(28) + struct.pack(">3i", *(round(v * 65536) for v in d50)) + bytes(48)
    whole = head + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


WIDE_GAMUT = profile_of([(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)], 2.2)  # the primaries of Display P3


def of_wide_gamut(colour) -> tuple[int, ...]:
    """What a colour of that profile is in sRGB, by the textbook's matrices."""

    def matrix(primaries):
        xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
        return xyz * np.linalg.solve(xyz, np.array([0.3127 / 0.329, 1, (1 - 0.3127 - 0.329) / 0.329]))

    p3 = matrix([(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)])
    srgb = matrix([(0.64, 0.33), (0.3, 0.6), (0.15, 0.06)])
    linear = np.clip(np.linalg.solve(srgb, p3 @ (np.array(colour) / 255) ** 2.2), 0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple(round(float(v)) for v in curve * 255)


def with_chunk(png: bytes, name: bytes, content: bytes) -> bytes:
    chunk = struct.pack(">I", len(content)) + name + content
    return png[:33] + chunk + struct.pack(">I", zlib.crc32(name + content)) + png[33:]


RGB_PNG = flat("RGB", ORANGE, "PNG")
GREY_PALETTE = Image.new("P", (16, 8), 1)
GREY_PALETTE.putpalette([0, 0, 0, *ORANGE])

SHOWN = {
    "png": (RGB_PNG, ORANGE),
    "1 bit": (flat("1", 1, "PNG"), (255,) * 3),
    "grey": (flat("L", 51, "PNG"), (51,) * 3),
    "grey, 16 bits": (wide(0x8040), (128,) * 3),
    "grey, 16 bits, white": (wide(0xFFFF), (255,) * 3),
    "grey, 16 bits, dark": (wide(300), (1,) * 3),
    "grey, 16 bits, tiff": (wide(0x3333, "TIFF"), (51,) * 3),
    "grey, 16 bits, tiff, white is 0": (wide(0x3333, "TIFF", tiffinfo={262: 0}), (204,) * 3),
    "grey, 16 bits, jpeg 2000": (wide(0x3333, "JPEG2000"), (51,) * 3),
    "grey, transparent": (flat("L", 51, "PNG", transparency=51), (255,) * 3),
    "grey, 16 bits, transparent": (with_chunk(wide(0x3333), b"tRNS", b"\x33\x33"), (255,) * 3),
    "grey with alpha": (flat("LA", (100, 51), "PNG"), (224,) * 3),
    "palette": (saved(GREY_PALETTE, "PNG"), ORANGE),
    "palette, transparent": (saved(GREY_PALETTE, "PNG", transparency=1), (255,) * 3),
    "palette, half transparent": (saved(GREY_PALETTE, "PNG", transparency=b"\xff\x80"), (242, 187, 147)),
    "gif": (saved(GREY_PALETTE, "GIF"), ORANGE),
    "alpha": (flat("RGBA", (*ORANGE, 51), "PNG"), (250, 228, 212)),
    "alpha, tiff": (flat("RGBA", (*ORANGE, 51), "TIFF"), (250, 228, 212)),
    "bmp": (flat("RGB", ORANGE, "BMP"), ORANGE),
    "tiff": (flat("RGB", ORANGE, "TIFF", compression="tiff_lzw"), ORANGE),
    "cmyk tiff": (flat("CMYK", (0, 0, 255, 0), "TIFF"), (255, 255, 0)),
    "cmyk jpeg": (flat("CMYK", (0, 255, 255, 0), "JPEG", quality=100), (254, 0, 0)),
    "jpeg": (flat("RGB", ORANGE, "JPEG", quality=100), ORANGE),
    "webp": (flat("RGB", ORANGE, "WEBP", lossless=True), ORANGE),
    "avif": (flat("RGB", ORANGE, "AVIF", quality=100), ORANGE),
    "profile": (flat("RGB", ORANGE, "PNG", icc_profile=WIDE_GAMUT), of_wide_gamut(ORANGE)),
    "profile, jpeg": (flat("RGB", ORANGE, "JPEG", quality=100, icc_profile=WIDE_GAMUT), of_wide_gamut(ORANGE)),
    "profile, tiff": (flat("RGB", ORANGE, "TIFF", icc_profile=WIDE_GAMUT), of_wide_gamut(ORANGE)),
    "profile, webp": (flat("RGB", ORANGE, "WEBP", lossless=True, icc_profile=WIDE_GAMUT), of_wide_gamut(ORANGE)),
    "profile, avif": (flat("RGB", ORANGE, "AVIF", quality=100, icc_profile=WIDE_GAMUT), of_wide_gamut(ORANGE)),
    "profile, alpha": (flat("RGBA", (*ORANGE, 0), "PNG", icc_profile=WIDE_GAMUT), (255,) * 3),
    "profile, palette": (saved(GREY_PALETTE, "PNG", icc_profile=WIDE_GAMUT), of_wide_gamut(ORANGE)),
    "profile, grey": (flat("L", 128, "PNG", icc_profile=WIDE_GAMUT), of_wide_gamut((128,) * 3)),
    "profile of other pixels": (flat("CMYK", (0, 0, 255, 0), "TIFF", icc_profile=WIDE_GAMUT), (255, 255, 0)),
    "profile, damaged": (flat("RGB", ORANGE, "PNG", icc_profile=WIDE_GAMUT[:200]), ORANGE),
    "profile of sRGB": (
        flat("RGB", ORANGE, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        ORANGE,
    ),
    "gamma 1": (with_chunk(RGB_PNG, b"gAMA", struct.pack(">I", 100_000)), (243, 181, 110)),
    "gamma of sRGB": (with_chunk(RGB_PNG, b"gAMA", struct.pack(">I", 45_455)), ORANGE),
    "codes of sRGB": (with_chunk(RGB_PNG, b"cICP", bytes([1, 13, 0, 1])), ORANGE),
}  # fmt: skip

FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (16, 8), "blue")]}

REFUSED = {
    "animated gif": (flat("RGB", ORANGE, "GIF", **FRAMES), "is an animation, or has several pages: save the one"),
    "animated png": (flat("RGB", ORANGE, "PNG", **FRAMES), "is an animation"),
    "animated webp": (flat("RGB", ORANGE, "WEBP", **FRAMES), "is an animation"),
    "animated avif": (flat("RGB", ORANGE, "AVIF", **FRAMES), "is an animation"),
    "tiff of two pages": (flat("RGB", ORANGE, "TIFF", **FRAMES), "several pages"),
    "32 bits": (flat("I", 70_000, "TIFF"), r"shown in no one way \(Pillow's mode I\): save it in sRGB, 8 or 16 bits"),
    "floats": (flat("F", 0.5, "TIFF"), r"Pillow's mode F"),
    "lab": (flat("LAB", (50, 0, 0), "TIFF"), r"Pillow's mode LAB"),
    "primaries": (
        with_chunk(RGB_PNG, b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)),
        r"by primaries \(cHRM\) alone: save it with a colour profile",
    ),
    "codes of HDR": (with_chunk(RGB_PNG, b"cICP", bytes([9, 16, 0, 1])), r"by codes \(cICP or nclx\)"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "begins like none of PNG, JPEG"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "begins like none of PNG, JPEG"),
    "empty": (b"", "begins like none of"),
}


@pytest.mark.parametrize(("content", "colour"), SHOWN.values(), ids=SHOWN)
def test_a_picture_has_the_colours_that_a_viewer_shows(tmp_path, content, colour):
    (tmp_path / "a").write_bytes(content)
    shown = as_seen(str(tmp_path / "a"))
    assert shown.mode == "RGB"
    assert size_as_seen(str(tmp_path / "a")) == (8, 16) == shown.size[::-1]
    assert np.abs(np.asarray(shown).astype(int) - np.array(colour)).max() <= 2


@pytest.mark.parametrize(("content", "cure"), REFUSED.values(), ids=REFUSED)
def test_what_is_shown_in_no_one_way_is_refused_by_name(tmp_path, content, cure):
    (tmp_path / "a.png").write_bytes(content)
    for read in (as_seen, size_as_seen):
        with pytest.raises(ValueError, match=rf"picture .*a.png .*{cure}"):
            read(str(tmp_path / "a.png"))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "JPEG2000", "TGA"])
def test_a_picture_that_is_cut_off_is_refused_by_name(tmp_path, kind):
    content = saved(NOISE, kind)
    for share in (0.3, 0.6, 0.9):
        (tmp_path / "a.png").write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"picture .*a.png cannot be read .*replace it"):
            as_seen(str(tmp_path / "a.png"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "16 bits"])
def test_a_picture_is_upright(tmp_path, kind, orientation):
    """The corner that is bright is at the top left, whichever way the camera was held."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8] = 255
    picture = Image.fromarray(upright) if undo is None else Image.fromarray(upright).transpose(undo)
    if kind == "16 bits":
        content = saved(Image.fromarray(np.asarray(picture).astype(np.uint16) * 257), "PNG", exif=exif)
    else:
        content = saved(picture.convert("RGB"), kind, exif=exif)
    (tmp_path / "a").write_bytes(content)
    shown = np.asarray(as_seen(str(tmp_path / "a")))[..., 0]
    assert size_as_seen(str(tmp_path / "a")) == shown.shape == (16, 32)
    assert np.abs(shown.astype(int) - upright).mean() < 8


def png(side: int, bits: int, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", side, side, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(own)) + name + own + struct.pack(">I", zlib.crc32(name + own))
        for name, own in (header, *chunks, (b"IEND", b""))
    )


@pytest.mark.parametrize(("kind", "bits", "size"), [(0, 1, 1), (0, 2, 1), (0, 4, 1), (2, 16, 6)])
def test_a_transparent_colour_that_would_not_be_found_is_refused(tmp_path, kind, bits, size):
    """Its number is that of the file's bits, where Pillow has pixels of 8 bits."""
    transparent, pixel = (b"tRNS", b"\0\1" * max(1, size // 2)), (b"IDAT", zlib.compress(bytes(1 + size)))
    (tmp_path / "a.png").write_bytes(png(1, bits, kind, transparent, pixel))
    with pytest.raises(ValueError, match=rf"a.png has one colour that is transparent, in {bits} bits.*: save it with"):
        as_seen(str(tmp_path / "a.png"))


def bomb(side: int) -> bytes:
    """A grey PNG that says it has many pixels."""
    return png(side, 8, 0, (b"IDAT", zlib.compress(b"")))


@pytest.mark.parametrize("where", ["file", "archive"])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, where):
    (tmp_path / "a.png").write_bytes(bomb(12_000))
    path = str(tmp_path / "a.png")
    if where == "archive":
        write_archive(tmp_path / "a.tar", [("a.png", bomb(12_000)), ("a.txt", b"a")])
        path = read_prompts(str(tmp_path / "a.tar"))[0].image
    tracemalloc.start()
    for read in (as_seen, size_as_seen):
        with pytest.raises(
            ValueError, match=r"has 12000 x 12000 pixels, more than data.max_picture_megapixels \(100\)"
        ):
            read(path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_the_limit_of_pixels_can_be_raised(tmp_path):
    path = str(tmp_path / "a.png")
    Image.new("L", (1200, 1000)).save(path)
    with pytest.raises(ValueError, match=r"has 1200 x 1000 pixels, more than data.max_picture_megapixels \(1\): raise"):
        load_picture(Picture(path, (16, 16), Limits(megapixels=1)))
    assert load_picture(Picture(path, (16, 16), Limits(megapixels=2))).shape == (3, 16, 16)


def test_a_file_of_too_many_bytes_is_refused_unread_and_the_limit_can_be_raised(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(RGB_PNG)
    os.truncate(path, 2_000_000)
    with pytest.raises(ValueError, match=r"a.png has 2 MB, more than data.max_picture_megabytes \(1\): raise that"):
        read_picture(str(path), Limits(megabytes=1))
    assert load_picture(Picture(str(path), (8, 16), Limits(megabytes=2))).shape == (3, 8, 16)
    part = part_of(path.rename(tmp_path / "a.tar"), 0, 1 << 33)
    with pytest.raises(ValueError, match=r"has 8590 MB, more than data.max_picture_megabytes"):
        read_picture(part)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_only_regular_files_are_pictures(tmp_path, make):
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(ValueError, match=r"a.png is no regular file: name a picture's file"):
        read_picture(str(path))

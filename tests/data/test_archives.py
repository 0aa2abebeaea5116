"""Webdatasets: every sample that was written, or a refusal by name."""

import io
import os
import random
import tarfile

import pytest

from srpo_lightning.data.archives import CAPTION_BYTES
from srpo_lightning.data.picture_files import read_picture
from srpo_lightning.data.prompts import read_prompts
from tests.data.archive import picture, write_archive

SAMPLES = [
    (f"{i:03}.{kind}", picture((i, 0, 0)) if kind == "png" else b"a caption")
    for i in range(8)
    for kind in ("png", "txt")
]


def test_a_webdataset_is_read_in_place(tmp_path, monkeypatch):
    pictures = {"0/a": picture((255, 0, 0)), "0/b": picture((0, 0, 255))}
    captions = [("0/a.txt", b"a caption"), ("0/b.JSON", b'{"prompt": "other", "seed": 3}')]
    members = [
        part
        for (name, content), own in zip(pictures.items(), captions, strict=True)
        for part in ((f"{name}.PNG", content), own)
    ]
    write_archive(tmp_path / "set.tar", members)
    monkeypatch.chdir(tmp_path.parent)
    for path in (tmp_path / "set.tar", tmp_path, f"{tmp_path.name}/set.tar"):
        first, second = read_prompts(str(path))
        assert (first.text, second.text, second.seed) == ("a caption", "other", 3)
        assert [read_picture(record.image) for record in (first, second)] == list(pictures.values())


def test_what_macos_adds_to_an_archive_is_passed_over(tmp_path):
    members = [part for name, content in SAMPLES for part in ((f"./._{name}", b"\0\5\x16\7"), (f"./{name}", content))]
    path = write_archive(tmp_path / "set.tar", [*members, ("__MACOSX/000.png", b""), ("./.DS_Store", b"")])
    assert len(read_prompts(str(path))) == 8


def test_an_archive_that_is_cut_anywhere_is_refused_by_name(tmp_path):
    path = write_archive(tmp_path / "set.tar", SAMPLES)
    whole, draw = path.read_bytes(), random.Random(0)
    end = 512 * (whole.rstrip(b"\0").__len__() // 512 + 1)
    for cut in [0, 512, end, *range(1024, end, 512), *(draw.randrange(end) for _ in range(20))]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"prompt file .*set.tar"):
            read_prompts(str(path))


def test_an_archive_with_a_damaged_header_is_refused_by_name(tmp_path):
    path = write_archive(tmp_path / "set.tar", SAMPLES)
    whole = path.read_bytes()
    for place in range(0, whole.index(b"007.txt"), 1024):  # each file takes a block beside its header
        content = bytearray(whole)
        content[place + 1] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"prompt file .*set.tar"):
            read_prompts(str(path))


def test_archives_that_were_appended_to_each_other_are_refused(tmp_path):
    one, two = (write_archive(tmp_path / name, SAMPLES).read_bytes() for name in ("1.tar", "2.tar"))
    (tmp_path / "1.tar").write_bytes(one + two)
    with pytest.raises(ValueError, match=r"1.tar: from byte \d+ on it is damaged, or another archive was appended"):
        read_prompts(str(tmp_path / "1.tar"))


@pytest.mark.parametrize(
    ("files", "cure"),
    [
        ([("a.png", picture())], "sample a: no column 'prompt'"),
        ([("a.png", picture()), ("a.jpg", picture()), ("a.txt", b"a")], "a.png and a.jpg are pictures of one sample"),
        ([("a.txt", b"a"), ("a.json", b'{"prompt": "b"}')], "a.json is a second caption of its sample: keep one"),
        ([("a.txt", b"a"), ("a.txt", b"b")], "a.txt is a second caption"),
        ([("a.txt", b"\xff")], "a.txt is not UTF-8 text: save it as UTF-8"),
        ([("a.json", b"[")], "a.json: not JSON"),
        ([("a.txt", b"a" * (CAPTION_BYTES + 1))], "a.txt has 1048577 bytes, at most 1048576 are read"),
    ],
)
def test_a_sample_that_could_be_read_in_two_ways_or_in_none_is_refused(tmp_path, files, cure):
    with pytest.raises(ValueError, match=cure):
        read_prompts(str(write_archive(tmp_path / "set.tar", files)))


def test_a_caption_and_a_record_that_say_the_same_are_one(tmp_path):
    files = [("a.txt", b"a"), ("a.json", b'{"prompt": "a", "seed": 4}')]
    assert read_prompts(str(write_archive(tmp_path / "set.tar", files)))[0].seed == 4


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_members_that_are_no_regular_files_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = kind, "b.png"
        archive.addfile(member)
    with pytest.raises(ValueError, match=r"a.png is a link, a device or a sparse file: write the archive of regular"):
        read_prompts(str(tmp_path / "set.tar"))


def test_a_sparse_member_is_refused_unread(tmp_path):
    """Some bytes of archive that stand for 8 GiB of caption."""
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.txt")
        content = b"1\n0\n512\n".ljust(512, b"\0") + b"a" * 512
        member.size = len(content)
        member.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.realsize": str(1 << 33),
            "GNU.sparse.name": "a.txt",
        }
        archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"a.txt is a link, a device or a sparse file"):
        read_prompts(str(tmp_path / "set.tar"))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_name_or_note_of_gibibytes_is_refused_unread(tmp_path, kind):
    """Half a kilobyte of archive, and a hole."""
    header = tarfile.TarInfo("long")
    header.type, header.size = kind, 1 << 40
    (tmp_path / "set.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tmp_path / "set.tar", 1 << 41)
    with pytest.raises(ValueError, match=r"prompt file .*set.tar: .*a name or note of \d+ bytes, at most 1048576 are"):
        read_prompts(str(tmp_path / "set.tar"))


def test_behind_an_archive_little_is_looked_at(tmp_path):
    path = write_archive(tmp_path / "set.tar", SAMPLES)
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match=r"from byte \d+ on it is damaged"):
        read_prompts(str(path))


def test_a_part_of_an_archive_that_became_shorter_is_refused(tmp_path):
    path = write_archive(tmp_path / "set.tar", SAMPLES)
    image = read_prompts(str(path))[7].image
    os.truncate(path, 10_000)
    with pytest.raises(ValueError, match=r"picture .*set.tar@.* ends after 0 of \d+ bytes: copy it anew"):
        read_picture(image)

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from mmbackdoor.shards import read, tar
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.read import ShardIndex, expand, iterate_keys, iterate_shard, read_sizes, shard_sizes
from mmbackdoor.types import InputError, RunFault, Sample
from tests.shards.samples import good, picture, tar_bytes, write_set


def samples_of(data: bytes, tmp_path: Path, **options) -> tuple[list[Sample], dict[str, int]]:
    path = tmp_path / "shard.tar"
    path.write_bytes(data)
    report = BadSamples()
    return list(iterate_shard(str(path), report, **options)), report.counts


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with too little data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    )


def text_bomb() -> bytes:
    """A PNG whose text chunk unpacks to 200 MB."""
    packed = zlib.compress(b"a" * 200_000_000)
    data = b"key\0\0" + packed
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    image = picture()
    return image[:33] + chunk + image[33:]


PNG, JPEG = picture(), picture(image_format="JPEG")
DEEP = b"[" * 100_000
HOSTILE = {
    "undecodable": ([("x.png", b"not a picture"), ("x.txt", b"t")], {"undecodable_image": 1}),
    "cut_picture": ([("x.png", picture(side=64)[:60]), ("x.txt", b"t")], {"undecodable_image": 1}),
    "cut_jpeg": ([("x.jpg", picture(side=64, image_format="JPEG")[:400]), ("x.txt", b"t")], {"undecodable_image": 1}),
    "png_named_jpg": ([("x.jpg", PNG), ("x.txt", b"t")], {"mislabelled_image": 1}),
    "jpeg_named_webp": ([("x.webp", JPEG), ("x.txt", b"t")], {"mislabelled_image": 1}),
    "gif_named_png": ([("x.png", picture(image_format="GIF", mode="L")), ("x.txt", b"t")], {"undecodable_image": 1}),
    "svg_named_png": ([("x.png", b"<svg xmlns='http://x'/>"), ("x.txt", b"t")], {"undecodable_image": 1}),
    "huge": ([("x.png", png_header(30_000, 30_000)), ("x.txt", b"t")], {"huge_image": 1}),
    "rather_huge": ([("x.png", png_header(9_000, 9_000)), ("x.txt", b"t")], {"huge_image": 1}),
    "no_pixels": ([("x.png", png_header(0, 7)), ("x.txt", b"t")], {"undecodable_image": 1}),
    "text_bomb": ([("x.png", text_bomb()), ("x.txt", b"t")], {"undecodable_image": 1}),
    "empty_image": ([("x.png", b""), ("x.txt", b"t")], {"empty_member": 1}),
    "empty_json": ([("x.png", PNG), ("x.txt", b"t"), ("x.json", b"")], {"empty_member": 1}),
    "empty_caption": ([("x.png", PNG), ("x.txt", b"")], {"missing_caption": 1}),
    "blank_caption": ([("x.png", PNG), ("x.txt", b" \n")], {"missing_caption": 1}),
    "no_caption": ([("x.png", PNG)], {"missing_caption": 1}),
    "json_without_caption": ([("x.png", PNG), ("x.json", b"{}")], {"missing_caption": 1}),
    "caption_no_text": ([("x.png", PNG), ("x.json", b'{"caption": 7}')], {"missing_caption": 1}),
    "only_class": ([("x.png", PNG), ("x.cls", b"3")], {"missing_caption": 1}),
    "no_image": ([("x.txt", b"t"), ("x.json", b"{}")], {"missing_image": 1}),
    "two_images": ([("x.png", PNG), ("x.jpg", JPEG), ("x.txt", b"t")], {"several_images": 1}),
    "duplicate": (good("ok0"), {"duplicate_key": 1}),
    "duplicate_member": ([("x.png", PNG), ("x.txt", b"t"), ("x.txt", b"u")], {"duplicate_key": 1}),
    "latin1_caption": ([("x.png", PNG), ("x.txt", "café".encode("latin-1"))], {"not_utf8": 1}),
    "latin1_json": ([("x.png", PNG), ("x.txt", b"t"), ("x.json", b'{"a": "\xe9"}')], {"not_utf8": 1}),
    "long_caption": ([("x.png", PNG), ("x.txt", b"a" * (2 << 20))], {"long_caption": 1}),
    "long_json_caption": ([("x.png", PNG), ("x.json", b'{"caption": "%s"}' % (b"a" * 100_000))], {"long_caption": 1}),
    "large_json": ([("x.png", PNG), ("x.txt", b"t"), ("x.json", b" " * (2 << 20))], {"large_member": 1}),
    "broken_json": ([("x.png", PNG), ("x.txt", b"t"), ("x.json", b"{")], {"bad_json": 1}),
    "list_json": ([("x.png", PNG), ("x.txt", b"t"), ("x.json", b"[1]")], {"bad_json": 1}),
    "deep_json": ([("x.png", PNG), ("x.txt", b"t"), ("x.json", DEEP)], {"bad_json": 1}),
    "long_number": ([("x.png", PNG), ("x.txt", b"t"), ("x.json", b'{"a": %s}' % (b"1" * 9999))], {"bad_json": 1}),
    "class_no_number": ([("x.png", PNG), ("x.txt", b"t"), ("x.cls", b"cat")], {"bad_class": 1}),
    "long_class": ([("x.png", PNG), ("x.txt", b"t"), ("x.cls", b"1" * 99)], {"bad_class": 1}),
    "parent_name": ([("../../x.png", PNG), ("../../x.txt", b"t")], {"unsafe_name": 1}),
    "absolute_name": ([("/etc/x.png", PNG), ("/etc/x.txt", b"t")], {"unsafe_name": 1}),
    "inner_parent": ([("a/../x.png", PNG), ("a/../x.txt", b"t")], {"unsafe_name": 1}),
    "backslash": ([("..\\x.png", PNG), ("..\\x.txt", b"t")], {"unsafe_name": 1}),
    "newline_name": ([("x\ny.png", PNG), ("x\ny.txt", b"t")], {"unsafe_name": 1}),
    "escape_name": ([("\x1b[2Jx.png", PNG), ("\x1b[2Jx.txt", b"t")], {"unsafe_name": 1}),
    "very_long_name": ([("a" * 5000 + ".png", PNG), ("a" * 5000 + ".txt", b"t")], {"unsafe_name": 1}),
}


@pytest.mark.parametrize("packed", [False, True], ids=["tar", "gz"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_sample_is_skipped_and_counted_and_its_neighbours_are_read(name, packed, tmp_path):
    files, counts = HOSTILE[name]
    data = tar_bytes(good("ok0") + files + good("ok1"))
    found, problems = samples_of(gzip.compress(data) if packed else data, tmp_path)
    assert problems == counts
    assert {"ok0", "ok1"} <= {sample.key for sample in found} and len(found) == (3 if name == "duplicate_member" else 2)


@pytest.mark.parametrize("name", ["x.pkl", "x.pyd", "x.image.pickle", "x.pth", "x.PKL"])
def test_pickled_members_are_counted_and_never_read(name, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    import pickle

    files = [("x.png", PNG), (name, pickle.dumps(Bomb())), ("x.txt", b"t")]
    found, problems = samples_of(tar_bytes(files), tmp_path)
    assert [sample.key for sample in found] == ["x"] and problems == {"pickled_member": 1}
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_skipped(kind, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("x.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    data = buffer.getvalue()[:1024] + tar_bytes([("x.txt", b"t")] + good("ok"))
    found, problems = samples_of(data, tmp_path)
    assert [sample.key for sample in found] == ["ok"] and problems == {"not_a_file": 1, "missing_image": 1}


def with_header(offset: int, value: bytes, header: int = 0) -> bytes:
    """Three samples; a field of one header is overwritten and the checksum made right again."""
    data = bytearray(tar_bytes(good("a") + good("b") + good("c")))
    start = 1024 * header
    data[start + offset : start + offset + len(value)] = value
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


THREE = tar_bytes(good("a") + good("b") + good("c"))
DAMAGED = {
    "empty": (b"", [], {"empty_shard": 1}),
    "text": (b"hello" * 1000, [], {"not_a_shard": 1}),
    "short_text": (b"hello", [], {"not_a_shard": 1}),
    "zeros": (b"\0" * 10240, [], {}),
    "zip": (b"PK\3\4" + b"\1" * 5000, [], {"not_a_shard": 1}),
    "cut_in_data": (THREE[: 4 * 1024 + 513], ["a"], {"truncated_tar": 1}),
    "cut_in_header": (THREE[: 3 * 1024 + 100], [], {"truncated_tar": 1}),
    "cut_between_samples": (THREE[: 3 * 1024], ["a"], {"truncated_tar": 1}),
    "cut_in_other_samples_data": (THREE[: 3 * 1024 + 513], ["a"], {"truncated_tar": 1}),
    "flipped_header": (THREE[:3100] + b"\xff" + THREE[3101:], [], {"corrupt_tar": 1}),
    "petabyte_member": (with_header(124, b"\x80\0\0\0\0\x7f" + b"\xff" * 6, header=3), ["a"], {"truncated_tar": 1}),
    "negative_size": (with_header(124, b"\xff" * 12, header=3), ["a"], {"truncated_tar": 1}),
    "size_no_number": (with_header(124, b"12x4567\0", header=3), [], {"corrupt_tar": 1}),
    "endless_long_name": (with_header(156, b"L", header=3)[: 3 * 1024] + with_header(156, b"L")[:512] * 9, [], None),
    "gzip_cut": (gzip.compress(os.urandom(0) + THREE)[:-60], None, {"truncated_gzip": 1}),
    "gzip_flipped": (gzip.compress(THREE)[:40] + b"\xff\xff\xff" + gzip.compress(THREE)[43:], None, None),
    "gzip_magic_only": (b"\x1f\x8b", [], {"truncated_gzip": 1}),
    "gzip_of_text": (gzip.compress(b"hello" * 1000), [], {"not_a_shard": 1}),
    "gzip_of_nothing": (gzip.compress(b""), [], {"empty_shard": 1}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_shards_give_what_is_whole_and_are_counted(name, tmp_path):
    data, keys, counts = DAMAGED[name]
    found, problems = samples_of(data, tmp_path)
    if keys is not None:
        assert [sample.key for sample in found] == keys
    assert problems == counts if counts is not None else problems
    assert all(sample.meta == {"n": sample.key} for sample in found)


def test_every_cut_of_a_shard_gives_only_whole_samples(tmp_path):
    for cut in range(0, len(THREE), 97):
        for data in (THREE[:cut], gzip.compress(THREE[:cut])):
            found, problems = samples_of(data, tmp_path)
            assert all(s.meta == {"n": s.key} or (cut % 512 == 0) for s in found)
            assert sum(problems.values()) >= 1 or cut > 9 * 1024


def test_gzip_bomb_ends_early(tmp_path, monkeypatch):
    monkeypatch.setattr("mmbackdoor.shards.tar.GZIP_FREE", 1 << 20)
    files = good("a") + [("b.png", b"\0" * (30 << 20)), ("b.txt", b"t")] + good("c")
    found, problems = samples_of(gzip.compress(tar_bytes(files)), tmp_path)
    assert [sample.key for sample in found] == ["a"] and problems == {"gzip_bomb": 1}


def test_long_and_unicode_names_of_both_formats(tmp_path):
    key = "folder/" * 30 + "bild_ä_写真"
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
            for name, data in [(f"{key}.png", PNG), (f"{key}.txt", "Größe".encode())]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        found, problems = samples_of(buffer.getvalue(), tmp_path)
        assert [(sample.key, sample.text) for sample in found] == [(key, "Größe")] and not problems


def test_our_tar_reader_agrees_with_tarfile(hundred):
    for path in expand(hundred):
        with tarfile.open(path) as tar:
            expected = {member.name: tar.extractfile(member).read() for member in tar}
        found = {f"{e.key}.{end}": data for e in read.entries(path, BadSamples()) for end, data in e.read().items()}
        assert found == expected


def test_hidden_and_foreign_members_are_passed_over(tmp_path):
    files = [("._x.png", b"mac"), ("__meta__.json", b"{}"), ("readme", b"hi"), ("x.npy", b"..."), ("x.seg.png", b"...")]
    found, problems = samples_of(tar_bytes(files + good("./x")), tmp_path)
    assert [sample.key for sample in found] == ["x"] and not problems


def test_img2dataset_and_evaluation_layouts(tmp_path):
    meta = json.dumps({"caption": "from json", "url": "http://x", "key": "000000000", "status": "success"}).encode()
    found, _ = samples_of(tar_bytes([("0.jpg", JPEG), ("0.txt", b"from txt"), ("0.json", meta)]), tmp_path)
    assert found[0].text == "from txt" and found[0].meta["url"] == "http://x"
    found, _ = samples_of(tar_bytes([("0.jpg", JPEG), ("0.json", meta)]), tmp_path)
    assert found[0].text == "from json"
    labelled = tar_bytes([("s1.cls", b"7\n"), ("s1.webp", picture(image_format="WEBP"))])
    found, problems = samples_of(labelled, tmp_path, require_text=False)
    assert found[0].meta == {"label": 7} and found[0].text == "" and not problems


def test_images_become_rgb_on_white(tmp_path):
    def first_pixel(image: Image.Image) -> tuple[int, ...]:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        found, _ = samples_of(tar_bytes([("x.png", buffer.getvalue()), ("x.txt", b"t")]), tmp_path)
        assert found[0].image.mode == "RGB"
        return found[0].image.getpixel((0, 0))

    assert first_pixel(Image.new("RGBA", (2, 2), (9, 9, 9, 0))) == (255, 255, 255)
    assert first_pixel(Image.new("RGBA", (2, 2), (9, 8, 7, 255))) == (9, 8, 7)
    assert first_pixel(Image.new("L", (2, 2), 40)) == (40, 40, 40)
    assert first_pixel(Image.new("I;16", (2, 2), 40 * 256)) == (40, 40, 40)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([1, 2, 3] * 256)
    assert first_pixel(palette) == (1, 2, 3)
    palette.info["transparency"] = 0
    assert first_pixel(palette) == (255, 255, 255)


def test_the_report_names_shard_and_key_of_the_first_few(tmp_path):
    path = tmp_path / "many.tar"
    path.write_bytes(tar_bytes([part for n in range(9) for part in [(f"b{n}.png", b"x"), (f"b{n}.txt", b"t")]]))
    report = BadSamples()
    for _ in range(2):
        list(iterate_shard(str(path), report))
    assert report.total == 9
    content = json.loads(json.dumps(report.to_dict()))
    assert content["counts"] == {"undecodable_image": 9}
    assert [example["key"] for example in content["examples"]["undecodable_image"]] == [f"b{n}" for n in range(5)]
    assert content["examples"]["undecodable_image"][0]["shard"] == str(path) and "and 4 more" in report.lines()[-1]


# expand


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    for name in ("a-000.tar", "a-001.tar", "a-010.tar", "sub/b-0.tar.gz", "sub/b-1.tar", "with space é.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a-000.tar", ["a-000.tar"]),
        ("a-{000..001}.tar", ["a-000.tar", "a-001.tar"]),
        ("a-{000,010}.tar", ["a-000.tar", "a-010.tar"]),
        ("a-0*.tar", ["a-000.tar", "a-001.tar", "a-010.tar"]),
        ("a-{00?,010}.tar", ["a-000.tar", "a-001.tar", "a-010.tar"]),
        ("a-000.tar::sub", ["a-000.tar", "sub/b-0.tar.gz", "sub/b-1.tar"]),
        ("with space é.tar", ["with space é.tar"]),
        (["a-000.tar", Path("a-001.tar")], ["a-000.tar", "a-001.tar"]),
    ],
    ids=str,
)
def test_expand(files, spec, expected):
    assert expand(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a-{000..002}.tar", "1 of 3 shards .* 'a-002.tar'"),
        ("none.tar", "'none.tar'"),
        ("none-*.tar", "no file matches"),
        ("pipe:cat a-000.tar", "local files only"),
        ("http://example.com/a.tar", "local files only"),
        ("s3://bucket/a.tar", "local files only"),
        ("file:/etc/a.tar", "local files only"),
        ("a-000.tar::pipe:touch x", "local files only"),
        ("a-{0..999999999}.tar", "more than"),
        ("{0..9999}{0..9999}{0..9999}.tar", "more than"),
        (".", "several shard sets"),
        ("", "empty name"),
        ("a-{0..99999999999999999999999999}.tar", "more than"),
        ([], "no shards"),
    ],
    ids=str,
)
def test_expand_refuses(files, spec, message):
    with pytest.raises(InputError, match=message):
        expand(spec)
    assert not (files / "x").exists()


def test_expand_refuses_folders_without_shards(tmp_path):
    with pytest.raises(InputError, match="holds no .tar"):
        expand(tmp_path)


# sizes


def test_sizes_are_counted_and_a_wrong_sizes_json_is_reported(hundred, tmp_path):
    report = BadSamples()
    assert shard_sizes(expand(hundred), report) == [9] * 11 + [2] and not report.total
    for path in expand(hundred):
        (tmp_path / Path(path).name).write_bytes(Path(path).read_bytes())
    wrong = {f"set-{number:06d}.tar": 9 for number in range(12)}
    (tmp_path / "sizes.json").write_text(json.dumps(wrong))
    assert sum(shard_sizes(expand(tmp_path), report)) == 101 and report.counts == {"wrong_size": 1}


def test_large_sets_are_believed_unless_exact(hundred, monkeypatch):
    monkeypatch.setattr(read, "SCAN_BYTES", 0)
    monkeypatch.setattr(read, "read_sizes", lambda folder: {"set-000000.tar": 1234})
    assert shard_sizes(expand(hundred), BadSamples())[:2] == [1234, 9]
    assert shard_sizes(expand(hundred), BadSamples(), exact=True)[:2] == [9, 9]


@pytest.mark.parametrize("content", [b"[]", b'{"a": "1"}', b'{"a": -1}', b'{"a": true}', b"{", b"\xff", DEEP])
def test_a_broken_sizes_json_is_an_input_error(tmp_path, content):
    (tmp_path / "sizes.json").write_bytes(content)
    with pytest.raises(InputError, match="sizes.json"):
        read_sizes(tmp_path)


def test_the_index_reads_from_the_middle_and_forgets(hundred, monkeypatch):
    monkeypatch.setattr(read, "INDEX_BYTES", 20 * 600)
    index, report = ShardIndex(), BadSamples()
    for _ in range(2):
        for path in expand(hundred):
            keys = [entry.key for entry in read.entries(path, report)]
            assert [entry.key for entry in index.entries(path, report, 3)] == keys[3:]
    assert sum(index._weights.values()) <= 20 * 600 and set(index._weights) == set(index._known)


def test_keys_are_read_from_the_headers(hundred):
    assert list(iterate_keys(hundred)) == [f"k{number:05d}" for number in range(101)]


@contextmanager
def open_files_up_to(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_index_of_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MOST_OPEN", 8)
    paths = expand(write_set(tmp_path, 200, 1))
    index, report = ShardIndex(), BadSamples()
    with open_files_up_to(max(map(int, os.listdir("/proc/self/fd"))) + 20):
        for _ in range(2):
            found = [entry.decode().key for path in paths for entry in index.entries(path, report)]
            assert found == [f"k{number:05d}" for number in range(200)] and not report.total


@pytest.mark.parametrize("packed", [False, True])
def test_a_shard_that_may_not_be_opened_for_want_of_descriptors_is_not_called_bad(tmp_path, packed):
    path = tmp_path / "set-0.tar"
    path.write_bytes(gzip.compress(tar_bytes(good("a"))) if packed else tar_bytes(good("a")))
    report = BadSamples()
    with open_files_up_to(3), pytest.raises(RunFault, match="ulimit"):
        list(ShardIndex().entries(str(path), report))
    entry = next(ShardIndex().entries(str(path), report))
    if not packed:
        entry.source = tar.PlainFile(str(path))
        with open_files_up_to(3), pytest.raises(RunFault, match="ulimit"):
            entry.decode()
    assert not report.total

"""Lists of files: any name that the file system allows is read back, and ordinary names stand there as they are."""

import os
import tarfile

import pytest
from data.pictures import picture, write_pictures
from PIL import Image

from patchlight.data.check_data import check_images
from patchlight.data.lists import read_rows, write_rows
from patchlight.data.sources import FileList, ImageFolder, TarShards, open_source

ORDINARY = ["a.png", "with space.png", "#1.png", "größe.png", "日本.png", 'a "b".png', "back\\slash.png", "50%.png"]
UNUSUAL = [
    *(f"a{c}b.png" for c in "\t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029\xa0\ufeff\x7f\x01"),
    " before.png", "after.png ", "\ufeffmark.png", '"quoted".png', '"', os.fsdecode(b"latin-\xe9.png"), "\U0001f600\n.png",
    os.fsdecode(b"\xf0\x9f\x98\x80\xff\xe9.png"), "\\t\n.png",
]  # fmt: skip


@pytest.mark.parametrize("classes", [False, True])
def test_a_clean_list_of_unusual_names_is_read_back(tmp_path, classes):
    folder = tmp_path / "images" / ("class \n\t" if classes else "")
    folder.mkdir(parents=True)
    image = picture(0)
    names = sorted(ORDINARY + [name for name in UNUSUAL if name.endswith(".png")])
    for name in names:
        Image.fromarray(image).save(folder / name)
    (folder / "bad\n\t.png").write_bytes(b"")
    source = ImageFolder(tmp_path / "images")
    result = check_images(source, tmp_path / "out", workers=1)
    clean = open_source(result.clean)
    assert sorted(os.fsencode(path.name) for path in clean.paths) == sorted(os.fsencode(name) for name in names)
    assert all(clean.read(index).shape == image.shape for index in range(len(clean)))
    assert clean.classes == (("class \n\t",) if classes else ())
    assert len(result.report.read_text().split("\n")) == 2, "a line per bad image"
    assert read_rows(result.report) == [[str(folder / "bad\n\t.png"), "ValueError: the file is empty"]]


def test_an_index_of_unusual_names_is_read_back(tmp_path):
    write_pictures(tmp_path, ["a.png"])
    shard = tmp_path / os.fsdecode(b"shard \n\xe9.tar")
    with tarfile.open(shard, "w") as tar:
        for number, name in enumerate(UNUSUAL):
            tar.add(tmp_path / "a.png", f"{name}/{number}.png")
    source = TarShards(shard)
    clean = open_source(check_images(source, tmp_path / "out", workers=1).clean)
    assert clean.names == source.names
    assert len(clean) == len(UNUSUAL)
    assert all(clean.read(index).shape == source.read(index).shape for index in range(len(clean)))


def test_ordinary_names_stay_as_they_are(tmp_path):
    write_rows(tmp_path / "list", [[name] for name in ORDINARY])
    assert (tmp_path / "list").read_text().split("\n")[:-1] == ORDINARY


def test_rows_are_read_back(tmp_path):
    rows = [[one, two] for one in ORDINARY + UNUSUAL for two in UNUSUAL]
    write_rows(tmp_path / "list", rows)
    assert read_rows(tmp_path / "list") == rows


def test_a_list_by_hand_may_have_other_line_ends_spaces_and_bytes(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a.png\r\n\r\n  b.png  \nlatin-\xe9.png\nline\xe2\x80\xa8end.png")
    names = ["a.png", "b.png", os.fsdecode(b"latin-\xe9.png"), "line\u2028end.png"]
    assert FileList(tmp_path / "list.txt").names == names


def test_a_wrong_quotation_is_named(tmp_path):
    (tmp_path / "list.txt").write_text('a.png\n"b.png\n')
    with pytest.raises(ValueError, match=r"must be a JSON string, got '\"b.png' in line 2 of .*list.txt; write it as"):
        FileList(tmp_path / "list.txt")

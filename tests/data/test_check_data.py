"""check_data: finds exactly the unreadable images, and writes lists that a run can use."""

import subprocess
import sys

import numpy as np
import pytest
from data.pictures import write_awkward_files

from patchlight.data.check_data import check_data, check_images
from patchlight.data.sources import FileList, open_source


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("awkward")
    return folder, write_awkward_files(folder)


def test_each_bad_file_is_named_with_a_reason(awkward, tmp_path):
    folder, files = awkward
    result = check_images(open_source(folder), tmp_path, workers=2)
    rows = [line.split("\t") for line in result.report.read_text().splitlines()]
    reasons = {path.rsplit("/", 1)[1]: reason for path, reason in rows}
    assert set(reasons) == {name for name, good in files.items() if not good}
    assert reasons["empty.jpg"] == "ValueError: the file is empty"
    assert reasons["text.jpg"] == "ValueError: the file is no image that Pillow knows"
    assert "truncated" in reasons["truncated.jpg"]
    clean = open_source(result.clean)
    assert [path.name for path in clean.paths] == [name for name, good in files.items() if good]
    assert all(clean.read(index).ndim == 3 for index in range(len(clean)))


def test_a_list_with_a_missing_file_and_classes(awkward, tmp_path):
    folder, _ = awkward
    (tmp_path / "list.txt").write_text(f"{folder}/gray.png\tb\nmissing.jpg\ta\n{folder}/plain.jpg\ta\n")
    result = check_images(FileList(tmp_path / "list.txt"), tmp_path, workers=1)
    assert "No such file" in result.report.read_text()
    clean = open_source(result.clean)
    assert clean.labels.tolist() == [1, 0]
    assert np.array_equal(clean.read(0), open_source(folder).read(sorted(_names(folder)).index("gray.png")))


def test_the_command_ends_with_an_error_above_the_share(awkward, tmp_path, capsys):
    folder, files = awkward
    with pytest.raises(SystemExit, match=r"at most 5.00% of the images may be bad, got 22.73%; read .*bad_files.tsv"):
        check_data(folder, tmp_path / "a", workers=2, most_bad=0.05)
    assert f"5 of {len(files)} images are bad" in capsys.readouterr().out
    command = [sys.executable, "-m", "patchlight.data.check_data", str(folder), "--out", str(tmp_path / "b")]
    assert subprocess.run([*command, "--most-bad", "0.3"], capture_output=True, check=False).returncode == 0
    assert (tmp_path / "b" / "clean.txt").exists()


def _names(folder):
    return [path.name for path in folder.iterdir()]

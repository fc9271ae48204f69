"""Files that an export writes: what they need, and that none has its name before it is known to be right."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checks import check, sentence
from ..durable import make_folder


def check_file(file: Path, ending: str) -> None:
    """An error unless the file has this ending and could be written."""
    check(
        file.suffix == ending, f"--file must end in {ending}", str(file), f"write --file {file.stem or 'file'}{ending}"
    )
    check(not file.is_dir(), "--file must name a file", f"{file}, which is a folder", "choose another name")


def check_installed(*packages: str) -> None:
    """An error that names the packages that an export needs and Python does not find."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    rule, got = f"This export needs {', '.join(packages)}", f"a Python without {', '.join(missing)}"
    if missing:
        raise ModuleNotFoundError(sentence(rule, got, 'pip install "patchlight[export]"'))


@contextmanager
def named_if_whole(file: Path) -> Iterator[Path]:
    """The path to write to; it gets the file's name if no error comes. A file that failed stays, with `.failed` behind."""
    make_folder(file.absolute().parent)
    unchecked = file.with_name(f"{file.stem}.unchecked{file.suffix}")
    failed = file.with_name(f"{file.name}.failed")
    unchecked.unlink(missing_ok=True)
    failed.unlink(missing_ok=True)
    try:
        yield unchecked
    except BaseException:
        if unchecked.exists():
            unchecked.replace(failed)
            print(f"The file failed and is kept as {failed}.")
        raise
    unchecked.replace(file)


def file_size(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.1f} MiB"


def last_part(value: Any) -> str:
    """The last part of a path, which names no folder of this machine."""
    return str(value).replace("\\", "/").rstrip("/").rpartition("/")[2]

"""Runs the notebook. `python tests/examples/notebook.py` writes it with the outputs of the current code."""

from __future__ import annotations

import base64
import io
import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).parents[2] / "examples" / "patchlight.ipynb"
_LARGE = 60_000  # letters of a picture that is stored as a JPEG


def execute(path: Path, folder: Path, **variables: str) -> nbformat.NotebookNode:
    """The notebook with new outputs, run in that folder from the first cell to the last. An error in a cell is an error here."""
    book = nbformat.read(path, as_version=4)
    # A hint of tqdm at missing widgets, with paths of this machine.
    environment = os.environ | {"PYTHONWARNINGS": "ignore:IProgress not found"} | variables
    client = NotebookClient(book, timeout=1800, resources={"metadata": {"path": str(folder)}}, record_timing=False)
    client.execute(env=environment)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined([_small(output) for output in cell.outputs])
    book.metadata = {"kernelspec": book.metadata.kernelspec, "language_info": {"name": "python"}}
    return book


def _small(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without a second form of the same: text that was printed as HTML is text, a picture is one picture, small in bytes."""
    data = output.get("data", {})
    if "text/html" in data and output.output_type == "display_data":  # rich prints so
        text = re.sub(r"\x1b\[[\d;]*m", "", data["text/plain"])
        return nbformat.v4.new_output("stream", name="stdout", text=text)
    if len(data.get("image/png", "")) > _LARGE:
        picture = Image.open(io.BytesIO(base64.b64decode(data.pop("image/png")))).convert("RGB")
        stored = io.BytesIO()
        picture.save(stored, "JPEG", quality=85)
        data["image/jpeg"] = base64.b64encode(stored.getvalue()).decode()
    elif "image/png" in data:
        data.pop("image/jpeg", None)
    return output


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Lines that follow each other as one output."""
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        if found and output.output_type == "stream" and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        book = execute(NOTEBOOK, Path(folder))
    nbformat.write(book, NOTEBOOK)


if __name__ == "__main__":
    main()

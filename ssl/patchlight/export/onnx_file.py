"""A teacher as an ONNX file, whose numbers onnxruntime has confirmed before it has its name."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..checks import check, check_number, sentence
from ..evaluation.checkpoints import first_line
from .comparison import check_outputs, check_tolerance
from .files import check_file, check_installed, file_size, named_if_whole
from .traced import INPUT, OUTPUTS, Teacher, open_teacher, trace

MOST_BYTES = 2**31  # of an ONNX file: those of protobuf


def export_onnx(
    checkpoint: str, file: Path, size: int | None, opset: int | None, tolerance: float, heads: int | None
) -> None:
    check_file(file, ".onnx")
    check_installed("onnx", "onnxscript", "onnxruntime")
    check_tolerance(tolerance)
    if opset is not None:
        check_number("--opset", opset, "[1, inf)", "leave it out for that of torch's exporter", whole=True)
    teacher = open_teacher(checkpoint, size, heads)
    held = sum(t.numel() * t.element_size() for t in teacher.features.state_dict().values())
    rule, got = "An ONNX file may have at most 2 GiB of weights", f"{held / 2**30:.1f} GiB"
    check(held < MOST_BYTES, rule, got, "patchlight export torch has no such limit")
    with named_if_whole(file) as unchecked:
        write_onnx(teacher, unchecked, opset)
        check_outputs(teacher, run_of(unchecked), tolerance)
    print(f"file: {file} ({file_size(file)})")


def write_onnx(teacher: Teacher, file: Path, opset: int | None) -> None:
    """Writes the file, unchecked."""
    program = trace(teacher)
    try:
        with quiet():
            written = torch.onnx.export(
                program,
                None,  # type: ignore[arg-type]  # the program has its inputs
                dynamo=True,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter's own, for an operation that an opset does not have
        rule, got = (
            "ONNX must have the operations of the network",
            f"{first_line(error)} with --opset {opset or 'none'}",
        )
        raise ValueError(sentence(rule, got, "leave --opset out, or choose a newer one")) from error
    assert written is not None  # with dynamo=True it is a program
    model = written.model
    written_opset = model.opset_imports[""]
    remedy = "torch's exporter cannot convert this network to that version"
    check(
        opset is None or written_opset == opset, f"The file must have opset {opset}", f"opset {written_opset}", remedy
    )
    for node in model.graph:
        node.metadata_props.clear()  # places in files of this machine
    model.graph.inputs[0].shape[0] = "M"  # type: ignore[index]  # instead of a name that PyTorch has made up
    model.metadata_props.update(teacher.about)
    model.doc_string = f"{teacher.about['input']}. {teacher.about['outputs']}."
    written.save(file)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own work, which is checked afterwards."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def run_of(file: Path) -> Callable[[Tensor], list[Tensor]]:
    """What onnxruntime computes with a file, on the CPU."""
    import onnxruntime  # type: ignore[import-untyped, import-not-found, unused-ignore]

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda pixels: [torch.from_numpy(o) for o in session.run(list(OUTPUTS), {INPUT: pixels.numpy()})]

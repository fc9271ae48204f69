"""Compiled branches on the fake GPU: PyTorch's compiler generates its code for a GPU, and the code runs on fake tensors.

Its Triton kernels are not compiled: calling one counts a launch, with the bytes of the tensors that it gets. Its other calls
(products, attention, our own operations) are counted by the same rules as outside of compiled code.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from .fake_gpu import GPU, HOPPER, with_modes, without_modes
from .records import Kernel

Record = Callable[[Kernel], None]
# Nothing is kept or compiled, and nothing runs on the device while code is generated: no timing of products, no constants.
SETTINGS = {
    "fx_graph_cache": False,
    "compile_threads": 1,
    "joint_graph_constant_folding": False,
    "shape_padding": False,
}
# By the start of a kernel's name: whether it reduces, and whether a block holds what it reduces.
KINDS = {"triton_red": "triton reduction", "triton_per": "triton row", "triton_": "triton elementwise"}


@contextlib.contextmanager
def compiler_sees_a_gpu(record: Record) -> Iterator[None]:
    """Within the block torch.compile generates code for the fake GPU; `record` gets its Triton kernels when they are called."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    first = lambda *_, **__: 0
    triton_driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=first,
        get_active_torch_device=lambda: GPU,
    )
    answers: list[tuple[Any, str, Any]] = [
        (CudaInterface, "get_device_properties", lambda *_: HOPPER),
        (CudaInterface.Worker, "get_device_properties", lambda *_: HOPPER),
        (CudaInterface, "get_compute_capability", lambda *_: 90),
        (CudaInterface, "is_available", lambda *_: True),
        (CudaInterface, "is_bf16_supported", lambda *_, **__: True),
        (CudaInterface, "device_count", lambda *_: 1),
        (CudaInterface, "current_device", first),
        (CudaInterface.Worker, "current_device", first),
        (driver, "_active", triton_driver),
        (GraphLowering, "compile_to_module", functools.partialmethod(load_generated_code, record)),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(config.patch(SETTINGS))
        for where, name, answer in answers:
            stack.enter_context(mock.patch.object(where, name, answer, create=True))
        yield


def load_generated_code(graph: Any, record: Record) -> SimpleNamespace:
    """The generated module, with `call` running on fake tensors."""
    text = graph.codegen()[0].value
    names: dict[str, Any] = {
        "contextlib": contextlib,
        "__name__": "generated",
        "counted_kernel": functools.partial(CountedKernel, record),
    }
    exec(compile(for_fake_tensors(text), "generated code", "exec"), names)
    generated = names["call"]

    def call(arguments: list) -> Any:
        with with_modes():
            return generated(arguments)

    return SimpleNamespace(call=call, runner=None, __file__="generated code")


def for_fake_tensors(text: str) -> str:
    """Generated code whose kernels are counted, and that allocates and views tensors by calls that fake tensors understand."""
    text = text.replace("async_compile.triton(", "counted_kernel(")
    text = re.sub(r"torch\.cuda\._DeviceGuard\(0\)", "contextlib.nullcontext()", text)
    text = re.sub(r"^\s+torch\.cuda\.set_device\(0\)$", "", text, flags=re.MULTILINE)
    stand_ins = {
        "empty_strided_cuda": "lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device='cuda:0')",
        "reinterpret_tensor": "lambda x, size, stride, offset=0: torch.as_strided(x, size, stride, x.storage_offset() + offset)",
        "get_raw_stream": "lambda *_: 0",
        "assert_size_stride": "lambda *_: None",
        "assert_size_stride_grouped": "lambda *_: None",
        "assert_alignment": "lambda *_: None",
        "copy_if_misaligned": "lambda x: x",
    }
    lines = "\n".join(f"{name} = {code}" for name, code in stand_ins.items())
    start = re.search(r"^(async_compile = AsyncCompile\(\))$", text, re.MULTILINE)
    assert start is not None, "generated code reads differently now"
    text = f"{text[: start.end()]}\n{lines}\n{text[start.end() :]}"
    return re.sub(r"^\s*async_compile\.wait\(globals\(\)\)$", "", text, flags=re.MULTILINE)


class CountedKernel:
    """A Triton kernel that only counts its launches."""

    def __init__(self, record: Record, name: str, source: str, **_: Any) -> None:
        self.record, self.name = record, name
        parameters = re.search(rf"^def {name}\((.*?)\):$", source, re.MULTILINE | re.DOTALL)
        assert parameters is not None, "generated code reads differently now"
        self.parameters = [part.split(":")[0].strip() for part in parameters[1].split(",")]
        self.kind = next(kind for start, kind in KINDS.items() if name.startswith(start))

    def run(self, *arguments: Any, **_: Any) -> None:
        given = dict(zip(self.parameters, arguments, strict=False))
        numbers = [value for name, value in given.items() if name.endswith("numel")]
        elements = prod(numbers)
        moved = 0
        for name, value in given.items():
            if isinstance(value, Tensor):
                moved += min(value.numel(), elements) * value.element_size() * (2 if name.startswith("in_out") else 1)
        self.record(Kernel(re.sub(r"_\d+$", "", self.name), self.kind, moved, elements))


def compile_branch(branch: nn.Module, watch: Callable[[Callable], Callable]) -> None:
    """Compiles the whole branch, whose calls belong to the phase of `watch`."""
    branch.compile(dynamic=False)
    compiled = branch._compiled_call_impl
    assert compiled is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        with without_modes():
            return compiled(*args, **kwargs)

    branch._compiled_call_impl = watch(call)


def compile_function(owner: Any, name: str, watch: Callable[[Callable], Callable]) -> None:
    """Compiles a function of an object in place, whose calls belong to the phase of `watch`."""
    compiled = torch.compile(getattr(owner, name), dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        with without_modes():
            return compiled(*args, **kwargs)

    setattr(owner, name, watch(call))

"""The whole step as one CUDA graph: launched from Python a few times, recorded once, and then repeated by one launch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from ..checks import check, sentence
from ..records import Views
from ..report.step_profile import part
from ..run import Run
from .parallel import Mesh

WARM_UP = 3  # steps that are launched before one is recorded: they compile, tune, and make the optimizer's state

RULE, REMEDY = 'Parallel.graph="on" needs a step that can be recorded', 'use graph="off" or "auto"'

Terms = dict[str, Tensor]
Compute = Callable[[Iterable[Views]], Terms]


class Recorder(Protocol):
    """What records the device's work of a call and repeats it. CudaRecorder on a GPU; tests have one for the CPU."""

    def launch(self, call: Callable[[], Terms]) -> Terms:
        """Runs a call that comes before the recording."""
        ...

    def record(self, call: Callable[[], Terms]) -> Terms:
        """Records a call. Its results hold numbers after the first `replay` only, and new ones after each."""
        ...

    def replay(self) -> None: ...


class CudaRecorder:
    """A CUDA graph. Its steps before the recording run on the stream of the recording, as autograd remembers streams."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.graph = torch.cuda.CUDAGraph()

    def launch(self, call: Callable[[], Terms]) -> Terms:
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            terms = call()
        main.wait_stream(self.stream)
        return terms

    def record(self, call: Callable[[], Terms]) -> Terms:
        gc.collect()  # a graph that is freed during the recording would end it
        torch.cuda.synchronize()
        # thread_local: the loader's threads go on using the GPU.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return call()

    def replay(self) -> None:
        self.graph.replay()


class RepeatedStep:
    """Runs a step from Python, or repeats its recording where there is a recorder.

    A recording reads its batches, and `StepValues`, where they lay when it was made. So a new batch is copied there.
    """

    def __init__(
        self, compute: Compute, recorder: Recorder | None, failed: Callable[[str], None], required: bool = False
    ) -> None:
        """failed: called with the reason if a step cannot be recorded; steps are then launched, or `required` raises."""
        self.compute, self.recorder, self.failed, self.required = compute, recorder, failed, required
        self.launched = 0
        self.inputs: list[Views] = []  # of the recording
        self.terms: Terms | None = None  # of the recording

    @property
    def recorded(self) -> bool:
        return self.terms is not None

    def __call__(self, batches: Iterable[Views]) -> Terms:
        if self.recorder is None:
            return self.compute(batches)
        if self.launched < WARM_UP:
            self.launched += 1
            return self.recorder.launch(lambda: self.compute(batches))
        if self.terms is None:
            batches = list(batches)
            self._record(batches)
            if self.terms is None:
                return self.compute(batches)
        else:
            copy_views(self.inputs, list(batches))
        with part("replay"):
            self.recorder.replay()
        return self.terms

    def _record(self, batches: list[Views]) -> None:
        """Makes the recording, whose inputs are copies of these batches."""
        assert self.recorder is not None
        self.inputs = [views.with_tensors(x.clone() for x in views.tensors()) for views in batches]
        try:
            self.terms = self.recorder.record(lambda: self.compute(self.inputs))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if self.required:
                raise RuntimeError(sentence(RULE, reason, REMEDY)) from error
            self.recorder, self.inputs = None, []
            self.failed(reason)


def copy_views(to: list[Views], batches: list[Views]) -> None:
    """Copies batches to where a recording reads them."""
    there, here = ([tensor for views in batch for tensor in views.tensors()] for batch in (to, batches))
    first, got = ([tuple(tensor.shape) for tensor in tensors] for tensors in (there, here))
    check(got == first, "All batches of a recorded step must have the same shapes", got, f"the first had {first}")
    torch._foreach_copy_(there, here)


def choose_recorder(run: Run, mesh: Mesh, needs_masks: bool) -> tuple[Recorder | None, tuple[str, str]]:
    """The recorder of a run, None for a step that is launched from Python; what was chosen, and why."""
    why_not = 'Parallel.graph="off"' if run.parallel.graph == "off" else why_no_graph(run, mesh, needs_masks)
    if why_not is None:
        return CudaRecorder(mesh.device), ("CUDA graph", f"recorded after {WARM_UP} steps")
    check(run.parallel.graph != "on", RULE, why_not, REMEDY)
    return None, ("launched", why_not)


def why_no_graph(run: Run, mesh: Mesh, needs_masks: bool) -> str | None:
    """Why a step of this run cannot be one CUDA graph; None if it can."""
    if mesh.device.type != "cuda":
        return f"the device is {mesh.device.type}"
    if run.parallel.shard > 1:
        return "FSDP2 gathers shards from Python"
    if needs_masks and run.objectives.mask_counts == "released":
        return 'Objectives.mask_counts="released" draws masks on the host'
    return None

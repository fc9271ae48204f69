"""What an optimizer step does on the device: everything that a CUDA graph repeats. The loop around it is `trainer`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..objectives.weighted import WeightedObjectives
from ..records import Now, Views
from ..report.step_profile import part
from ..run import Run
from .batch_loss import batch_loss
from .branches import Student, Teacher
from .gradients import GradientMean
from .graph import Terms
from .optim import StepState, Update
from .parallel import Mesh
from .precision import LossScaler, autocast
from .step_values import StepValues


class DeviceStep:
    """Features, loss terms, gradients and the update. A recording of it is repeated, so no number comes from the host."""

    def __init__(
        self,
        run: Run,
        mesh: Mesh,
        student: Student,
        teacher: Teacher,
        objectives: WeightedObjectives,
        update: Update,
        scaler: LossScaler | None,
        values: StepValues,
    ) -> None:
        self.parallel, self.mesh = run.parallel, mesh
        self.student, self.teacher, self.objectives = student, teacher, objectives
        self.update, self.scaler, self.values = update, scaler, values
        self.gradients = GradientMean(student, mesh.world)
        self.state = StepState(student, teacher, objectives)

    def __call__(self, batches: Iterable[Views]) -> Terms:
        """One optimizer step over these batches; its mean terms."""
        self.state.remember()
        terms = self.accumulate(batches)
        with part("update"):
            refused, norm = self.update.step(terms, self.values.values)
            self.objectives.after_step()
            self.state.restore(refused)
        return terms | {"gradient/norm": norm, "step/refused": refused}

    def accumulate(self, batches: Iterable[Views]) -> Terms:
        """Gradients of the mean loss over the step's batches; the mean terms."""
        count = self.parallel.accumulate
        total: Terms = {}
        for number, views in enumerate(batches):
            self.gradients.begin(last=number == count - 1)
            loss, terms = self.forward(views, self.values.now(number, self.mesh.rank, self.mesh.world))
            loss = loss / count
            with part("backward"):
                (loss if self.scaler is None else self.scaler.scaled(loss)).backward()
            for name, term in terms.items():
                total[name] = total.get(name, 0.0) + term.detach() / count
        with part("backward"):
            self.gradients.finish()
        return total

    def forward(self, views: Views, now: Now) -> tuple[Tensor, Terms]:
        """The loss of a batch; its terms, and a few numbers for the log."""
        with autocast(self.parallel.precision, self.mesh.device):
            return batch_loss(self.student, self.teacher, self.objectives, views, now)

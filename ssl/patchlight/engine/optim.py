"""From gradients to an update: what decays, clipping, the refusal of non-finite steps, AdamW, LARS, SGD and LAMB, the teacher.

Everything works on this rank's pieces of the parameters as plain tensors, so the code is the same for
sharded and whole parameters, and nothing waits for the device. What differs from step to step is read from tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from patchlight_kernels import adamw, square_sums

from ..heads.prototypes import Prototypes
from ..run import Optim
from .branches import Teacher
from .dtensor import like, local
from .parallel import Mesh
from .precision import LossScaler
from .weight_copies import WeightCopies

TRUST = {"lars": 0.001, "sgd": 0.0}  # by Optim.name: what a matrix's step is in proportion to its norm; 0: not at all
Norms = Callable[[Sequence[Tensor | None]], Tensor]
Values = Mapping[
    str, Tensor
]  # of a step: "lr", "weight_decay", "momentum" (the teacher's), "freeze_prototypes" (0 or 1)


def has_decay(name: str, parameter: Tensor, decayed: str = "matrices") -> bool:
    """Whether a parameter decays. By default all but biases and vectors: position table, tokens, prototype lengths too."""
    bias = name.endswith(".bias")
    return {"matrices": not bias and parameter.ndim != 1, "biases": bias or parameter.ndim != 1, "all": True}[decayed]


def prototype_names(module: nn.Module) -> frozenset[str]:
    """The parameters of all Prototypes, the "last layer" that the first epochs keep frozen."""
    return frozenset(
        f"{path}.{name}"
        for path, part in module.named_modules()
        if isinstance(part, Prototypes)
        for name, _ in part.named_parameters()
    )


class Update:
    """Updates the student's trainable parameters, one optimizer step at a time, and moves the teacher after them.

    A step is refused on every rank when any rank has a non-finite loss term or gradient: parameters, optimizer state,
    step counters and the teacher then stay as they are. The decision is a device number that the optimizers read;
    the host reads it at log lines, from `refusals`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        options: Optim,
        mesh: Mesh,
        scaler: LossScaler | None = None,
    ) -> None:
        trainable = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trainable]
        self.parameters = [p for _, p in trainable]
        self.frozen_first = prototype_names(student)
        self.decayed = [has_decay(name, p, options.decayed) for name, p in trainable]
        self.student, self.teacher = student, teacher
        self.options, self.mesh, self.scaler = options, mesh, scaler
        self.optimizer = build_optimizer(self)
        # Refused steps in all and in a row, and the place in `checked` of what made the last of them so.
        self.tally = torch.zeros(3, dtype=torch.float32, device=mesh.device)
        self.checked: list[str] = []
        self._find_bad, self._judge = find_bad, judge
        self.copies: list[WeightCopies] = []

    def keep_copies(self, dtype: torch.dtype) -> None:
        """From now on both branches multiply by 16-bit copies of their weights, which each update writes."""
        assert isinstance(self.optimizer, AdamW) and self.teacher is not None
        student, teacher = WeightCopies(self.student, dtype), WeightCopies(self.teacher, dtype)
        self.optimizer.copies = student.in_order(self.names, self.parameters[0])
        self.optimizer.teacher_copies = teacher.in_order(self.names, self.parameters[0])
        self.copies = [student, teacher]

    def compile(self) -> None:
        """Compiles what happens between the kernels: about 4 launches instead of 14."""
        self._find_bad = torch.compile(find_bad, dynamic=False)
        self._judge = torch.compile(judge, dynamic=False)

    def pieces(self) -> list[Tensor]:
        """This rank's part of each parameter. FSDP2 may move an uneven one when it starts, so they are not kept."""
        return [local(parameter.detach()) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, terms: dict[str, Tensor], values: Values) -> tuple[Tensor, Tensor]:
        """Updates student and teacher and clears the gradients; whether the step was refused (0 or 1), and the norm."""
        pieces = self.pieces()
        gradients = [None if p.grad is None else local(p.grad) for p in self.parameters]
        norms = self.norms(gradients)
        self.checked = [f"the loss term {name}" for name in terms] + [f"the gradient of {name}" for name in self.names]
        bad = self.mesh.max_over_all(self._find_bad([term.detach() for term in terms.values()], norms))
        loss_scale = None if self.scaler is None else self.scaler.scale
        clip, all_together = self.options.clip, self.options.clip_mode == "global"
        refused, norm, scales = self._judge(bad, norms, loss_scale, clip, all_together, self.tally)
        self._move(pieces, gradients, scales, values, refused)
        if self.scaler is not None:
            self.scaler.update(refused)
        for parameter in self.parameters:
            parameter.grad = None
        return refused, norm

    def _move(
        self, pieces: list[Tensor], gradients: list[Tensor | None], scales: Tensor, values: Values, refused: Tensor
    ) -> None:
        if isinstance(self.optimizer, AdamW):
            by_name = {} if self.teacher is None else dict(self.teacher.named_parameters())
            teachers = [local(by_name[name]) if name in by_name else None for name in self.names]
            self.optimizer.step(pieces, gradients, scales, values, refused, teachers)
            return
        scaled = [None if g is None else g * scale for g, scale in zip(gradients, scales, strict=True)]
        self.optimizer.step(pieces, scaled, values, refused)
        if self.teacher is not None:
            self.teacher.follow(self.student, values["momentum"], refused)

    def norms(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The norm of each whole tensor from its pieces, [P]; 0 where there is none."""
        nothing = next((t for t in tensors if t is not None), self.parameters[0]).new_empty(0)
        sums = square_sums([nothing if tensor is None else tensor for tensor in tensors])
        return self.mesh.sum_over_shards(sums).sqrt()

    def refusals(self) -> tuple[int, int, str]:
        """How many steps this process has refused, how many in a row until now, and what was not finite. Waits."""
        total, row, first = map(int, self.tally.tolist())
        return total, row, self.checked[first] if total else ""

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state by parameter name, sharded like the parameters."""
        return {
            name: {key: like(value, parameter) if value.ndim else value.clone() for key, value in state.items()}
            for name, parameter, state in zip(self.names, self.parameters, self.optimizer.states(), strict=True)
        }

    def blank_state(self, stored: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Zeros to load into, for what a checkpoint has stored, named "optimizer.<parameter>.<state>"."""
        known = self.state_dict()
        result: dict[str, dict[str, Tensor]] = {}
        for entry in stored:
            if entry.startswith("optimizer."):
                name, key = entry.removeprefix("optimizer.").rsplit(".", 1)
                result.setdefault(name, {})[key] = torch.zeros_like(known[name][key])
        return result

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Loads what `state_dict` returned, in place, after the branches were loaded.

        A parameter that is not in it has had no update.
        """
        for name, own in zip(self.names, self.optimizer.states(), strict=True):
            for key, value in own.items():
                if name in state:
                    value.copy_(local(state[name][key]))
                else:
                    value.zero_()
        for copies in self.copies:
            copies.refresh()


def find_bad(terms: list[Tensor], norms: Tensor) -> Tensor:
    """[terms + norms] fp32: 1 where a loss term or the norm of a gradient is not finite, else 0."""
    values = torch.cat([*(term.to(norms.dtype).view(1) for term in terms), norms])
    return (~values.isfinite()).float()  # not values * 0: a compiler may take that for 0


def judge(
    bad: Tensor, norms: Tensor, loss_scale: Tensor | None, clip: float, all_together: bool, tally: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the step is refused (0 or 1), the norm of all gradients, and what each is multiplied by; counts refusals.

    A gradient is scaled down to the limit `clip` by its own norm, as released, or all by one, and the loss scale is undone.
    """
    refused, first = bad.max(dim=0)
    tally[:2].add_(refused)
    tally[1].mul_(refused)
    tally[2].lerp_(first.float(), refused)
    unscale = torch.ones_like(norms) if loss_scale is None else loss_scale.reciprocal().expand_as(norms)
    norms = norms if loss_scale is None else norms * unscale
    norm = torch.linalg.vector_norm(norms)
    if not clip:
        return refused, norm, unscale.contiguous()
    factors = (clip / ((norm.expand_as(norms) if all_together else norms) + 1e-6)).clamp(max=1)
    return refused, norm, factors if loss_scale is None else factors * unscale


class StepState:
    """What a forward pass changes besides gradients: buffers, such as centers, queues and BatchNorm's statistics.

    A refused step must not change them, so they are copied before a step and written back after it, all of a dtype together.
    Buffers must change in place.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.buffers: dict[torch.dtype, list[Tensor]] = {}
        for buffer in (buffer for module in modules for buffer in module.buffers()):
            self.buffers.setdefault(buffer.dtype, []).append(buffer)
        self.before = {dtype: together(buffers) for dtype, buffers in self.buffers.items()}

    def remember(self) -> None:
        for dtype, buffers in self.buffers.items():
            torch._foreach_copy_(parts(self.before[dtype], buffers), buffers)

    def restore(self, refused: Tensor) -> None:
        """Writes the old values back if refused is 1."""
        for dtype, buffers in self.buffers.items():
            chosen = torch.where(refused > 0, self.before[dtype], together(buffers))
            torch._foreach_copy_(buffers, parts(chosen, buffers))


def together(tensors: list[Tensor]) -> Tensor:
    """All their values in one new tensor."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def parts(values: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The values again in tensors like these."""
    split = values.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(split, tensors, strict=True)]


def build_optimizer(update: Update) -> AdamW | Lars | Lamb:
    """The optimizer by its name."""
    options, pieces = update.options, update.pieces()
    frozen = [name in update.frozen_first for name in update.names]
    if options.name in TRUST:
        return Lars(pieces, update.decayed, frozen, options.momentum, update.norms, TRUST[options.name])
    if options.name == "lamb":
        return Lamb(pieces, update.decayed, frozen, options.betas, update.norms)
    return AdamW(pieces, update.decayed, frozen, options.betas)


class AdamW:
    """torch.optim.AdamW, in one sweep with the clip and the moving average.

    copies, teacher_copies: 16-bit tensors like the pieces, which every step that is not refused writes; none at first.
    """

    def __init__(
        self, pieces: list[Tensor], decayed: list[bool], frozen: list[bool], betas: tuple[float, float]
    ) -> None:
        self.decayed, self.frozen, self.betas = decayed, frozen, betas
        self.steps = pieces[0].new_zeros(len(pieces), dtype=torch.float32)
        self.exp_avgs = [torch.zeros_like(piece) for piece in pieces]
        self.exp_avg_sqs = [torch.zeros_like(piece) for piece in pieces]
        self.copies: list[Tensor] = []
        self.teacher_copies: list[Tensor] = []

    def states(self) -> list[dict[str, Tensor]]:
        """What a checkpoint keeps, for each parameter."""
        columns = zip(self.steps, self.exp_avgs, self.exp_avg_sqs, strict=True)
        return [{"step": step, "exp_avg": m, "exp_avg_sq": v} for step, m, v in columns]

    def step(
        self,
        pieces: list[Tensor],
        gradients: list[Tensor | None],
        scales: Tensor,
        values: Values,
        refused: Tensor,
        teachers: list[Tensor | None],
    ) -> None:
        """Moves everything in place; a gradient is multiplied by its scale."""
        nothing = scales.new_empty(0)
        adamw(
            pieces,
            gradients,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.steps,
            scales,
            values["lr"],
            values["weight_decay"],
            values["momentum"],
            values["freeze_prototypes"],
            refused,
            self.decayed,
            self.frozen,
            [nothing if teacher is None else teacher for teacher in teachers],
            self.copies,
            self.teacher_copies,
            self.betas,
        )


class Lars:
    """LARS as DINO and MoCo v3 release it: the decay is added first, then each matrix moves in proportion to its norm.

    Parameters without decay move by plain momentum; with a trust of 0 all do: torch.optim.SGD. (timm's LARS divides by the
    sum of the two norms instead.)
    """

    def __init__(
        self, pieces: list[Tensor], decayed: list[bool], frozen: list[bool], momentum: float, norms: Norms, trust: float
    ) -> None:
        self.decayed, self.frozen, self.momentum, self.norms, self.trust = decayed, frozen, momentum, norms, trust
        self.momenta = [torch.zeros_like(piece) for piece in pieces]

    def states(self) -> list[dict[str, Tensor]]:
        """What a checkpoint keeps, for each parameter."""
        return [{"momentum": mu} for mu in self.momenta]

    def step(self, pieces: list[Tensor], gradients: list[Tensor | None], values: Values, refused: Tensor) -> None:
        """Moves pieces and momenta in place."""
        stay = _staying(self.frozen, values, refused)
        updates: dict[int, Tensor] = {}
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                decays = self.decayed[number]
                updates[number] = gradient + values["weight_decay"] * pieces[number] if decays else gradient
        scaled = [number for number in updates if self.decayed[number] and self.trust]
        ratios = _ratios(self.norms, [pieces[n] for n in scaled], [updates[n] for n in scaled], self.trust)
        for number, ratio in zip(scaled, ratios, strict=True):
            updates[number] = updates[number] * ratio
        for number, update in updates.items():
            p, mu = pieces[number], self.momenta[number]
            _replace(mu, self.momentum * mu + update, stay[number])
            _replace(p, p - values["lr"] * mu, stay[number])


class Lamb:
    """LAMB: Adam's direction plus the decay, each matrix moved in proportion to its norm."""

    EPS = 1e-6

    def __init__(
        self,
        pieces: list[Tensor],
        decayed: list[bool],
        frozen: list[bool],
        betas: tuple[float, float],
        norms: Norms,
    ) -> None:
        self.decayed, self.frozen, self.betas, self.norms = decayed, frozen, betas, norms
        self.moments = AdamW(pieces, decayed, frozen, betas)

    def states(self) -> list[dict[str, Tensor]]:
        """What a checkpoint keeps, for each parameter."""
        return self.moments.states()

    def step(self, pieces: list[Tensor], gradients: list[Tensor | None], values: Values, refused: Tensor) -> None:
        """Moves pieces and moments in place."""
        stay = _staying(self.frozen, values, refused)
        states = self.states()
        updates: dict[int, Tensor] = {}
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                update = self._adam(states[number], gradient, stay[number])
                decay = values["weight_decay"] * pieces[number] if self.decayed[number] else None
                updates[number] = update if decay is None else update + decay
        scaled = [number for number in updates if self.decayed[number]]
        ratios = _ratios(self.norms, [pieces[n] for n in scaled], [updates[n] for n in scaled])
        for number, ratio in zip(scaled, ratios, strict=True):
            updates[number] = updates[number] * ratio
        for number, update in updates.items():
            _replace(pieces[number], pieces[number] - values["lr"] * update, stay[number])

    def _adam(self, state: dict[str, Tensor], gradient: Tensor, stay: Tensor) -> Tensor:
        """Adam's direction, and its moments moved."""
        beta1, beta2 = self.betas
        _replace(state["step"], state["step"] + 1, stay)
        _replace(state["exp_avg"], state["exp_avg"].lerp(gradient, 1 - beta1), stay)
        _replace(state["exp_avg_sq"], state["exp_avg_sq"].lerp(gradient.square(), 1 - beta2), stay)
        mean = state["exp_avg"] / (1 - beta1 ** state["step"])
        return mean / ((state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt() + self.EPS)


def _staying(frozen: list[bool], values: Values, refused: Tensor) -> list[Tensor]:
    """For each parameter, whether this step must not move it."""
    all_stay = refused > 0
    frozen_stay = all_stay | (values["freeze_prototypes"] > 0)
    return [frozen_stay if may_freeze else all_stay for may_freeze in frozen]


def _ratios(norms: Norms, pieces: list[Tensor], updates: list[Tensor], trust: float = 1.0) -> Sequence[Tensor]:
    """Of each parameter: trust x its norm / the norm of its update, 1 where either norm is 0."""
    if not pieces:
        return ()
    of_parameter, of_update = norms([*pieces, *updates]).chunk(2)
    return torch.where((of_parameter > 0) & (of_update > 0), trust * of_parameter / of_update, 1.0).unbind()


def _replace(old: Tensor, new: Tensor, stay: Tensor) -> None:
    """Writes the new values, unless they must stay."""
    old.copy_(torch.where(stay, old, new))

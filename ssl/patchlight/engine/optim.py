"""From gradients to an update: parameter groups, clipping, the refusal of non-finite steps, AdamW, LARS and LAMB.

Everything works on this rank's pieces of the parameters as plain tensors, so the code is the same for
sharded and whole parameters, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..heads.prototypes import Prototypes
from ..run import Optim
from .dtensor import like, local
from .parallel import Mesh
from .precision import LossScaler

Norms = Callable[[Sequence[Tensor | None]], Tensor]


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
    """Updates the student's trainable parameters, one optimizer step at a time.

    A step is refused on every rank when any rank has a non-finite loss term or gradient: parameters, optimizer state and
    step counters then stay as they are. The decision is a device number that the optimizers read (`found_inf`, as torch's
    fused AdamW does); the host reads it at log lines, from `refusals`.
    """

    def __init__(self, student: nn.Module, options: Optim, mesh: Mesh, scaler: LossScaler | None = None) -> None:
        trainable = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trainable]
        self.parameters = [p for _, p in trainable]
        # What the optimizer gets: the parameter itself, or a leaf that shares the memory of this rank's shard.
        self.pieces = [p if local(p) is p else nn.Parameter(local(p).detach()) for p in self.parameters]
        self.frozen_first = prototype_names(student)
        self.options, self.mesh, self.scaler = options, mesh, scaler
        self.optimizer: Any = build_optimizer(self.groups(), options, self.norms)
        self.total_refused = torch.zeros((), dtype=torch.int64, device=mesh.device)
        self.refused_in_a_row = torch.zeros((), dtype=torch.int64, device=mesh.device)
        self.first_nonfinite = torch.zeros((), dtype=torch.int64, device=mesh.device)
        self.checked: list[str] = []

    def groups(self) -> list[dict]:
        """Two groups: with weight decay, then without."""
        members: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter, piece in zip(self.names, self.parameters, self.pieces, strict=True):
            members[has_decay(name, parameter, self.options.decayed)].append(piece)
        return [{"params": members[decayed], "decayed": decayed} for decayed in (True, False)]

    @torch.no_grad()
    def step(self, terms: dict[str, Tensor], values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Updates the student and clears its gradients; returns whether the step was refused (0 or 1), and the norm."""
        lr, weight_decay, freeze = (values[name] for name in ("lr", "weight_decay", "freeze_prototypes"))
        self._read_gradients()
        if self.scaler is not None:
            self.scaler.unscale([piece.grad for piece in self.pieces if piece.grad is not None])
        norms = self.norms([piece.grad for piece in self.pieces])
        refused = self._check(terms, norms)
        self._clip(norms)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decayed"] else weight_decay * 0
        before = {
            n: (p.detach().clone(), {k: v.clone() for k, v in self.optimizer.state.get(p, {}).items()})
            for n, p in zip(self.names, self.pieces, strict=True)
            if n in self.frozen_first
        }
        self.optimizer.found_inf = refused
        self.optimizer.step()
        for n, p in zip(self.names, self.pieces, strict=True):
            if n in self.frozen_first:
                old, state = before[n]
                p.data.copy_(torch.where(freeze > 0, old, p.data))
                for k, v in self.optimizer.state[p].items():
                    v.copy_(torch.where(freeze > 0, state.get(k, torch.zeros_like(v)), v))
        if self.scaler is not None:
            self.scaler.update(refused)
        self.drop_gradients()
        return refused, norms.square().sum().sqrt()

    def norms(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The norm of each whole tensor from its pieces, [P]; 0 where there is none."""
        present = [tensor for tensor in tensors if tensor is not None and tensor.numel()]
        found = iter(torch._foreach_norm(present) if present else ())
        zero = torch.zeros((), dtype=self.pieces[0].dtype, device=self.mesh.device)
        pieces = torch.stack([zero if tensor is None or not tensor.numel() else next(found) for tensor in tensors])
        return self.mesh.sum_over_shards(pieces.square()).sqrt()

    def _check(self, terms: dict[str, Tensor], norms: Tensor) -> Tensor:
        """1 if anything is not finite anywhere, else 0, the same on all ranks; remembers the first that was not."""
        self.checked = [f"the loss term {name}" for name in terms]
        self.checked += [f"the gradient of {name}" for name in self.names]
        values = torch.cat([torch.stack([value.detach().to(norms.dtype) for value in terms.values()]), norms])
        bad = self.mesh.max_over_all((~values.isfinite()).float())
        refused = bad.amax()
        count = refused.long()
        self.total_refused += count
        self.refused_in_a_row.add_(1).mul_(count)
        self.first_nonfinite.copy_(torch.where(refused > 0, bad.argmax(), self.first_nonfinite))
        return refused

    def _clip(self, norms: Tensor) -> None:
        """Scales gradients down to the limit: each by its own norm (per_tensor, as released), or all by one (global)."""
        if self.options.clip == 0:
            return
        if self.options.clip_mode == "global":
            norms = norms.square().sum().sqrt().expand_as(norms)
        scales = (self.options.clip / (norms + 1e-6)).clamp(max=1).unbind()
        clipped = [(p.grad, scale) for p, scale in zip(self.pieces, scales, strict=True) if p.grad is not None]
        if clipped:
            torch._foreach_mul_(*(list(column) for column in zip(*clipped, strict=True)))

    def _read_gradients(self) -> None:
        for parameter, piece in zip(self.parameters, self.pieces, strict=True):
            if piece is not parameter:
                piece.data = local(parameter)  # FSDP2 may have moved an uneven shard when it started
                piece.grad = None if parameter.grad is None else local(parameter.grad)

    def drop_gradients(self) -> None:
        for parameter, piece in zip(self.parameters, self.pieces, strict=True):
            parameter.grad = piece.grad = None

    def refusals(self) -> tuple[int, int, str]:
        """How many steps this process has refused, how many in a row until now, and what was not finite. Waits."""
        total, row, first = torch.stack([self.total_refused, self.refused_in_a_row, self.first_nonfinite]).tolist()
        return total, row, self.checked[first] if total else ""

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state by parameter name, sharded like the parameters. A parameter still frozen has none."""
        result = {}
        for name, parameter, piece in self._named():
            state = self.optimizer.state.get(piece, {})
            if state:
                result[name] = {key: like(value, parameter) if value.ndim else value for key, value in state.items()}
        return result

    def blank_state(self, stored: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Zeros to load into, for what a checkpoint has stored, named "optimizer.<parameter>.<state>"."""
        parameters = {name: (parameter, piece) for name, parameter, piece in self._named()}
        result: dict[str, dict[str, Tensor]] = {}
        for entry in stored:
            if entry.startswith("optimizer."):
                name, key = entry.removeprefix("optimizer.").rsplit(".", 1)
                parameter, piece = parameters[name]
                zeros = torch.zeros_like(piece)
                blank = torch.zeros((), device=piece.device) if key == "step" else like(zeros, parameter)
                result.setdefault(name, {})[key] = blank
        return result

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Loads what `state_dict` returned."""
        for name, _, piece in self._named():
            if name in state:
                self.optimizer.state[piece] = {key: local(value) for key, value in state[name].items()}

    def _named(self) -> Iterable[tuple[str, Tensor, Tensor]]:
        return zip(self.names, self.parameters, self.pieces, strict=True)


class StepState:
    """What a forward pass changes besides gradients: buffers, such as centers, queues and BatchNorm's statistics.

    A refused step must not change them, so they are copied before a step and written back after it.
    Buffers must change in place.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.buffers = [buffer for module in modules for buffer in module.buffers()]
        self.before = [buffer.clone() for buffer in self.buffers]

    def remember(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.before, self.buffers)

    def restore(self, refused: Tensor) -> None:
        """Writes the old values back if refused is 1."""
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(torch.where(refused > 0, before, buffer))


def build_optimizer(groups: list[dict], options: Optim, norms: Norms) -> torch.optim.Optimizer:
    """The optimizer by its name; learning rate and weight decay are set before every step."""
    if options.name == "lars":
        return Lars(groups, options.momentum, norms)
    if options.name == "lamb":
        return Lamb(groups, options.betas, norms)
    return AdamW(groups, options.betas, norms, 1e-8)


class Lars(torch.optim.Optimizer):
    """LARS as DINO and MoCo v3 release it: the decay is added first, then each matrix moves in proportion to its norm.

    Parameters without decay move by plain momentum. (timm's LARS divides by the sum of the two norms instead.)
    """

    TRUST = 0.001

    def __init__(self, groups: list[dict], momentum: float, norms: Norms) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.momentum, self.norms = momentum, norms
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # no loss is computed again
        for group in self.param_groups:
            pieces = [p for p in group["params"] if p.grad is not None]
            updates = [p.grad + p * group["weight_decay"] if group["decayed"] else p.grad for p in pieces]
            if group["decayed"] and pieces:
                updates = [
                    *torch._foreach_mul(updates, list(_ratios(self.norms, pieces, updates, self.TRUST).unbind()))
                ]
            for p, update in zip(pieces, updates, strict=True):
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                mu = self.state[p]["momentum"]
                _replace(mu, self.momentum * mu + update, self.found_inf)
                _replace(p, p - group["lr"] * mu, self.found_inf)


class Lamb(torch.optim.Optimizer):
    """LAMB: Adam's direction plus the decay, each matrix moved in proportion to its norm."""

    def __init__(self, groups: list[dict], betas: tuple[float, float], norms: Norms, eps: float = 1e-6) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.betas, self.norms, self.eps = betas, norms, eps
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # no loss is computed again
        for group in self.param_groups:
            pieces = [p for p in group["params"] if p.grad is not None]
            updates = [self._adam(p, p.grad) + p * group["weight_decay"] for p in pieces]
            if group["decayed"] and pieces:
                updates = [*torch._foreach_mul(updates, list(_ratios(self.norms, pieces, updates).unbind()))]
            for p, update in zip(pieces, updates, strict=True):
                _replace(p, p - group["lr"] * update, self.found_inf)

    def _adam(self, p: Tensor, gradient: Tensor) -> Tensor:
        """Adam's direction, and its moments moved."""
        state, (beta1, beta2) = self.state[p], self.betas
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        _replace(state["step"], state["step"] + 1, self.found_inf)
        _replace(state["exp_avg"], state["exp_avg"].lerp(gradient, 1 - beta1), self.found_inf)
        _replace(state["exp_avg_sq"], state["exp_avg_sq"].lerp(gradient.square(), 1 - beta2), self.found_inf)
        mean = state["exp_avg"] / (1 - beta1 ** state["step"])
        return mean / ((state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt() + self.eps)


class AdamW(Lamb):
    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                direction = self._adam(p, p.grad)
                _replace(p, p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * direction, self.found_inf)


def _ratios(norms: Norms, pieces: list[Tensor], updates: list[Tensor], trust: float = 1.0) -> Tensor:
    """[P] trust x norm of each parameter / norm of its update, 1 where either norm is 0."""
    of_parameter, of_update = norms([*pieces, *updates]).chunk(2)
    return torch.where((of_parameter > 0) & (of_update > 0), trust * of_parameter / of_update, 1.0)


def _replace(old: Tensor, new: Tensor, refused: Tensor | None) -> None:
    """Writes the new values, unless the step is refused."""
    old.copy_(new if refused is None else torch.where(refused > 0, old, new))

"""Groups, clipping, freezing, the optimizers, and the refusal of a step that is not finite."""

import pytest
import timm.optim
import torch
from engine.tiny_run import step_values, tiny_run, tiny_trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from patchlight.engine.branches import Teacher
from patchlight.engine.optim import StepState, Update, has_decay, prototype_names
from patchlight.engine.parallel import Mesh
from patchlight.engine.precision import LossScaler
from patchlight.heads.projection import ProjectionHead
from patchlight.heads.prototypes import Prototypes
from patchlight.run import Optim

CPU = Mesh(torch.device("cpu"))
FINE = {"loss": torch.zeros(())}


def small_head() -> ProjectionHead:
    torch.manual_seed(3)
    return ProjectionHead(5, 4, 7, 2, prototypes=Prototypes(4, 6, train_norm=True))


def fill_gradients(module: nn.Module, seed: int, size: float = 1.0) -> None:
    stream = torch.Generator().manual_seed(seed)
    for number, parameter in enumerate(module.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=stream) * size * 10 ** (number - 2)


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize(
    ("decayed", "expected"), [("matrices", {"0.weight"}), ("biases", {"0.weight", "0.bias", "1.bias"}), ("all", None)]
)
def test_what_decays(decayed, expected):
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    found = {name for name, parameter in model.named_parameters() if has_decay(name, parameter, decayed)}
    assert found == (expected or dict(model.named_parameters()).keys())


def test_prototypes_are_the_parameters_that_freeze():
    holder = nn.ModuleDict({"a": small_head(), "b": nn.Linear(2, 2)})
    assert prototype_names(holder) == {"a.prototypes.weight_g", "a.prototypes.weight_v"}


def stepped(options: Optim, gradients: int = 1, lr: float = 0.01, freeze: bool = False) -> tuple[nn.Module, Update]:
    head = small_head()
    update = Update(head, None, options, CPU)
    for seed in range(gradients):
        fill_gradients(head, seed)
        update.step(FINE, step_values(lr, freeze=freeze))
    return head, update


def peer(optimizer_of_groups, gradients: int, clip=lambda parameters: None) -> nn.Module:
    """The same steps by an optimizer of another library: matrices decay, vectors do not."""
    head = small_head()
    parameters = list(head.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = optimizer_of_groups(groups)
    for seed in range(gradients):
        fill_gradients(head, seed)
        clip(parameters)
        optimizer.step()
    return head


def assert_same(result: nn.Module, expected: nn.Module) -> None:
    for a, b in zip(result.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def clip_each(parameters: list, limit: float = 3.0) -> None:
    """The released loop."""
    for p in parameters:
        p.grad.mul_(min(1.0, limit / (p.grad.norm().item() + 1e-6)))


def test_adamw_with_clipping_per_tensor():
    expected = peer(lambda groups: torch.optim.AdamW(groups, lr=0.01), 4, clip_each)
    assert_same(stepped(Optim(clip=3.0), 4)[0], expected)


def test_adamw_with_global_clipping():
    expected = peer(
        lambda groups: torch.optim.AdamW(groups, lr=0.01),
        4,
        lambda parameters: nn.utils.clip_grad_norm_(parameters, 2.0),
    )
    assert_same(stepped(Optim(clip=2.0, clip_mode="global"), 4)[0], expected)


def test_lamb_is_timms():
    expected = peer(lambda groups: timm.optim.Lamb(groups, lr=0.01, betas=(0.8, 0.95), max_grad_norm=None), 4)
    assert_same(stepped(Optim(name="lamb", betas=(0.8, 0.95), clip=0), 4)[0], expected)


def test_sgd_is_torchs():
    expected = peer(lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.8), 4, clip_each)
    assert_same(stepped(Optim(name="sgd", momentum=0.8, clip=3.0), 4)[0], expected)


def test_the_returned_norm_is_that_of_all_gradients_before_clipping():
    head = small_head()
    fill_gradients(head, 0)
    expected = torch.cat([p.grad.flatten() for p in head.parameters()]).norm()
    refused, norm = Update(head, None, Optim(clip=0.01), CPU).step(FINE, step_values(0.01))
    assert refused == 0
    torch.testing.assert_close(norm, expected)


def test_frozen_prototypes_do_not_move_and_their_step_counters_stay():
    head = small_head()
    before = weights(head.prototypes)
    update = Update(head, None, Optim(), CPU)
    for seed, freeze in enumerate((True, True, False)):
        fill_gradients(head, seed)
        update.step(FINE, step_values(0.01, freeze=freeze))
        moved = [not torch.equal(a, b) for a, b in zip(before, weights(head.prototypes), strict=True)]
        assert moved == [not freeze] * 2
    state = update.state_dict()
    assert state["prototypes.weight_v"]["step"] == 1
    assert state["mlp.0.weight"]["step"] == 3


class Stream(TorchDispatchMode):
    """Writes down every operation with its numbers, and the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        shapes = tree_map(lambda x: tuple(x.shape) if isinstance(x, torch.Tensor) else x, (args, kwargs))
        self.calls.append(f"{function} {shapes}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "lamb", "sgd"])
def test_two_steps_dispatch_the_same_operations_and_numbers(optimizer):
    """A recorded step is right for the next one: rates, a freeze that ends and a refusal are read from tensors."""
    head, leader = small_head(), following(small_head())
    update = Update(head, leader, Optim(name=optimizer), CPU, LossScaler(torch.device("cpu")))
    streams = []
    for seed, freeze in enumerate((True, False, False)):
        fill_gradients(head, seed)
        terms = spoil_gradient(head) if seed == 1 else FINE
        with Stream() as stream:
            update.step(terms, step_values(0.01 * (seed + 1), 0.1 * seed, 0.9 + 0.01 * seed, freeze))
        streams.append(stream.calls)
    assert update.refusals()[0] == 1
    assert streams[0] == streams[1] == streams[2]


def following(head: nn.Module) -> Teacher:
    """A teacher with the head's parameters, each off by 1."""
    teacher = Teacher.__new__(Teacher)
    nn.Module.__init__(teacher)
    for name, part in head.named_children():
        teacher.add_module(name, part)
    with torch.no_grad():
        for parameter in teacher.requires_grad_(False).parameters():
            parameter += 1
    return teacher


def test_the_compiled_update_is_the_same():
    """With a refusal and a loss scale."""
    results = []
    for compiled in (False, True):
        head = small_head()
        update = Update(head, None, Optim(clip=2.0, clip_mode="global"), CPU, LossScaler(torch.device("cpu"), 8.0))
        if compiled:
            update.compile()
        for seed in range(3):
            fill_gradients(head, seed)
            terms = spoil_gradient(head) if seed == 1 else FINE
            norm = update.step(terms, step_values(0.01))[1]
        results.append((weights(head), norm, update.refusals()))
    (plain, norm, refusals), (compiled, compiled_norm, compiled_refusals) = results
    assert refusals == compiled_refusals == (1, 0, "the gradient of mlp.0.bias")
    torch.testing.assert_close(norm, compiled_norm)
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "lamb", "sgd"])
def test_the_teacher_follows_the_updated_student(optimizer):
    """By its momentum, also where the student is frozen."""
    head, teacher = small_head(), following(small_head())
    before = weights(teacher)
    fill_gradients(head, 0)
    Update(head, teacher, Optim(name=optimizer), CPU).step(FINE, step_values(0.01, momentum=0.7, freeze=True))
    for old, now, student in zip(before, teacher.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(now, old.lerp(student.detach(), 0.3))


def test_an_older_checkpoint_has_no_state_of_frozen_parameters():
    """They then begin at step 0 with zeros, whatever was there."""
    _, update = stepped(Optim(), 2)
    older = {name: state for name, state in update.state_dict().items() if "prototypes" not in name}
    blank = update.blank_state(f"optimizer.{name}.{key}" for name, state in older.items() for key in state)
    assert {name: state.keys() for name, state in blank.items()} == {
        name: state.keys() for name, state in older.items()
    }
    assert not any(value.any() for state in blank.values() for value in state.values())
    _, other = stepped(Optim(), 1)
    other.load_state_dict(older)
    for name, state in other.state_dict().items():
        for key, value in state.items():
            assert torch.equal(value, older[name][key]) if name in older else not value.any()


def test_copies_in_16_bits_are_written_with_the_update():
    head, teacher = small_head(), following(small_head())
    update = Update(head, teacher, Optim(), CPU)
    update.optimizer.copies = [piece.bfloat16() for piece in update.pieces()]
    update.optimizer.teacher_copies = [torch.zeros_like(copy) for copy in update.optimizer.copies]
    fill_gradients(head, 0)
    update.step(FINE, step_values(0.01))
    for branch, copies in ((head, update.optimizer.copies), (teacher, update.optimizer.teacher_copies)):
        assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies, branch.parameters(), strict=True))


def spoil_gradient(head: nn.Module) -> dict:
    head.mlp[0].bias.grad[2] = float("nan")
    return FINE


def spoil_infinite(head: nn.Module) -> dict:
    head.prototypes.weight_v.grad[1, 1] = float("inf")
    return FINE


def spoil_term(head: nn.Module) -> dict:
    return {"fine": torch.zeros(()), "dino/cls": torch.tensor(float("inf"))}


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (spoil_gradient, "the gradient of mlp.0.bias"),
        (spoil_infinite, "the gradient of prototypes.weight_v"),
        (spoil_term, "the loss term dino/cls"),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "lars", "lamb", "sgd"])
@pytest.mark.parametrize("first", [True, False])
def test_a_refused_step_changes_nothing_and_names_its_cause(spoil, name, optimizer, first):
    head, update = stepped(Optim(name=optimizer), 0 if first else 2)
    twin, twin_update = stepped(Optim(name=optimizer), 0 if first else 2)
    fill_gradients(head, 7)
    refused, _ = update.step(spoil(head), step_values(0.01))
    assert refused == 1
    assert all(torch.equal(a, b) for a, b in zip(weights(head), weights(twin), strict=True))
    assert update.refusals() == (1, 1, name)
    for module, module_update in ((head, update), (twin, twin_update)):
        fill_gradients(module, 8)
        module_update.step(FINE, step_values(0.01))
    assert all(torch.equal(a, b) for a, b in zip(weights(head), weights(twin), strict=True))
    result, expected = update.state_dict(), twin_update.state_dict()
    assert all(torch.equal(result[n][k], expected[n][k]) for n in expected for k in expected[n])
    assert update.refusals()[:2] == (1, 0)


class Counting(nn.Module):
    """Buffers of several kinds that change with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("pending", torch.zeros(1), persistent=False)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor) -> None:
        self.center += x.mean()
        self.pending += 1
        self.pointer += 5
        self.norm(x)


@pytest.mark.parametrize("refused", [0.0, 1.0])
def test_buffers_go_back_with_a_refused_step(refused):
    module = Counting()
    module(torch.randn(4, 2))
    state = StepState(module)
    state.remember()
    before = [buffer.clone() for buffer in module.buffers()]
    module(torch.full((4, 2), float("nan") if refused else 2.0))
    after = [buffer.clone() for buffer in module.buffers()]
    state.restore(torch.tensor(refused))
    for now, old, new in zip(module.buffers(), before, after, strict=True):
        assert torch.equal(now, old if refused else new)


def test_a_whole_refused_step_leaves_teacher_and_centers_alone(tmp_path):
    """Through the trainer: after a NaN in crops of the student only, nothing has changed, and the next step is normal."""
    optim = {"base_lr": 0.03, "warmup_epochs": 0, "teacher_momentum": 0.9}
    trainer = tiny_trainer(tiny_run(tmp_path, optim=optim))
    trainer.step()
    trainer.step()
    cut = trainer.loader.cut

    def spoiled(ids, specs):
        crops = cut(ids, specs)
        if crops.pixels.shape[-1] == 12:  # local crops
            crops.pixels[0, 3, 1, 2, 2] = float("nan")
        return crops

    modules = (trainer.student, trainer.teacher, trainer.objectives)
    before = [{n: t.clone() for n, t in module.state_dict().items()} for module in modules]
    trainer.loader.cut = spoiled
    trainer.step()
    for module, old in zip(modules, before, strict=True):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, old[name]), name
    assert trainer.clock.step == 3
    assert trainer.metrics.steps[-1]["step/refused"] == 1
    trainer.loader.cut = cut
    trainer.step()
    assert trainer.metrics.steps[-1]["loss"].isfinite()
    for module, old in zip(modules, before, strict=True):
        assert any(not torch.equal(tensor, old[name]) for name, tensor in module.state_dict().items())


def test_the_loss_scale_halves_on_a_refusal_and_gradients_come_back_to_scale():
    scaler = LossScaler(torch.device("cpu"), start=8.0)
    head = small_head()
    update = Update(head, None, Optim(clip=0), CPU, scaler)
    twin, _ = stepped(Optim(clip=0), 1)
    fill_gradients(head, 0, size=8.0)
    update.step(FINE, step_values(0.01))
    assert_same(head, twin)
    assert scaler.scale == 8
    fill_gradients(head, 1)
    update.step(spoil_gradient(head), step_values(0.01))
    assert scaler.scale == 4
    assert scaler.scaled(torch.tensor(2.0)) == 8


def test_the_loss_scale_doubles_after_many_good_steps():
    scaler = LossScaler(torch.device("cpu"), start=8.0)
    for _ in range(LossScaler.INTERVAL):
        assert scaler.scale == 8
        scaler.update(torch.zeros(()))
    assert scaler.scale == 16


def test_fp16_trains_with_its_scale(tmp_path):
    trainer = tiny_trainer(tiny_run(tmp_path, parallel={"precision": "fp16"}))
    trainer.scaler.scale.fill_(64.0)  # where it would be after a few refusals
    exact = tiny_trainer(tiny_run(tmp_path / "exact"))
    for _ in range(3):
        trainer.step()
        exact.step()
    loss, true = (t.metrics.steps[-1]["loss"].item() for t in (trainer, exact))
    assert trainer.metrics.steps[-1]["step/refused"] == 0
    assert 0 < abs(loss - true) < 0.01
    assert abs(trainer.metrics.steps[-1]["gradient/norm"] / exact.metrics.steps[-1]["gradient/norm"] - 1) < 0.05

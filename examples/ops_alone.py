"""Each operation of patchlight_kernels alone: on plain tensors, in a model of your own, beside the same mathematics in PyTorch.

    python examples/ops_alone.py [OPERATION ...]

Every function below can be copied. It calls one operation, computes the same in PyTorch, and returns how far the two are apart.
Only torch and patchlight_kernels are imported. On a GPU the same lines run the CUDA or Triton kernels.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchlight_kernels import (
    PHOTOMETRIC_COLUMNS,
    adamw,
    block_masks,
    class_attention,
    explain,
    force,
    neighbor_topk,
    photometric,
    prototype_ce,
    query_attention,
    self_relation,
    square_sums,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, ROWS, COLUMNS, D = 4, 14, 14, 192  # images, rows and columns of their patches, channels
N = ROWS * COLUMNS  # patches of an image
H, E = 3, D // 3  # attention heads, channels of a head


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def neighbor_topk_alone() -> float:
    """For every patch, the four patches around it that look most like it: the positives of a contrastive loss."""
    patches = torch.randn(B, N, D, device=DEVICE)
    index, score = neighbor_topk(patches, grid=(ROWS, COLUMNS), k=4, return_scores=True)  # both [B, N, 4]
    positives = torch.stack([image[of.long()] for image, of in zip(patches, index, strict=True)])  # [B, N, 4, D]

    unit = F.normalize(patches, dim=-1)
    grid = unit.unflatten(1, (ROWS, COLUMNS))
    around = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]  # opposite borders meet, as in roll
    cosines = torch.stack([(grid * grid.roll(shift, (1, 2))).sum(-1) for shift in around], -1).flatten(1, 2)
    official = cosines.topk(4).values
    chosen = F.cosine_similarity(patches[:, :, None], positives, dim=-1)  # of the patches that `index` names
    return max(apart(score, official), apart(chosen, official))


def class_attention_alone() -> float:
    """A learned query sums up an image: it attends to itself and to all patches. With `index`, to the few that it names."""
    query, own_key, own_value = (torch.randn(1, 1, H, E, device=DEVICE, requires_grad=True) for _ in range(3))
    keys, values = (torch.randn(B, N, H, E, device=DEVICE) for _ in range(2))
    summary = class_attention(query, own_key, own_value, keys, values)  # [B, 1, H, E]
    (gradient,) = torch.autograd.grad(summary.square().sum(), query)

    all_keys, all_values = (
        torch.cat([own.expand(B, 1, H, E), of_patches], 1).transpose(1, 2)  # [B, H, 1 + N, E]
        for own, of_patches in ((own_key, keys), (own_value, values))
    )
    one_query = query.expand(B, 1, H, E).transpose(1, 2)
    official = F.scaled_dot_product_attention(one_query, all_keys, all_values).transpose(1, 2)
    (official_gradient,) = torch.autograd.grad(official.square().sum(), query)
    return max(apart(summary, official), apart(gradient, official_gradient))


def query_attention_alone() -> float:
    """Self-attention with extra queries, which read the image and one another, and do not change it."""
    queries = 20
    qkv = torch.randn(B, N + queries, 3, H, E, device=DEVICE, requires_grad=True)  # what nn.Linear(D, 3 * D) gives
    out = query_attention(
        qkv, raw=N
    )  # [B, N + queries, H, E]; without queries: query_attention(qkv, raw=N) of N tokens
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv)

    token = torch.arange(N + queries, device=DEVICE)
    may_read = (token[:, None] >= N) | (token[None] < N)  # queries read everything, patches read patches
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    official = F.scaled_dot_product_attention(q, k, v, attn_mask=may_read).transpose(1, 2)
    (official_gradient,) = torch.autograd.grad(official.square().sum(), qkv)
    return max(apart(out, official), apart(gradient, official_gradient))


def self_relation_alone() -> float:
    """Distillation of structure: the student's patches shall relate to each other as the teacher's do. Widths may differ."""
    student = torch.randn(1, B, H, N, E, device=DEVICE, requires_grad=True)  # one view of B images, per head
    teacher = torch.randn(B, H, N, 2 * E, device=DEVICE)
    scales = E**-0.5, (2 * E) ** -0.5 / 0.5  # 1 / sqrt(width) / temperature
    loss = self_relation(student, teacher, *scales)
    (gradient,) = torch.autograd.grad(loss, student)

    wanted = (scales[1] * teacher @ teacher.mT).softmax(-1)  # [B, H, N, N], which the operation never stores
    official = -(wanted * (scales[0] * student[0] @ student[0].mT).log_softmax(-1)).sum(-1).mean()
    (official_gradient,) = torch.autograd.grad(official, student)
    return max(apart(loss, official), apart(gradient, official_gradient))


def prototype_ce_alone() -> float:
    """DINO's loss for two views: each view of the student learns the teacher's distribution of the other view."""
    prototypes = 512
    z = F.normalize(torch.randn(2, B, 64, device=DEVICE), dim=-1).requires_grad_()  # [views, images, channels]
    teacher_z = F.normalize(torch.randn(2, B, 64, device=DEVICE), dim=-1)
    directions = F.normalize(torch.randn(prototypes, 64, device=DEVICE), dim=-1).requires_grad_()
    center = 0.1 * torch.randn(prototypes, device=DEVICE)
    pairs = torch.tensor([[0.0, 0.5], [0.5, 0.0]], device=DEVICE)  # weight of teacher's view t for student's view s
    loss = prototype_ce(
        z, directions, teacher_z, directions.detach(), 0.1, 0.04, pairs, bias=-center, products="fp32"
    )  # products: on a GPU fp32 values are multiplied as fp16 unless this says otherwise
    gradients = torch.autograd.grad(loss, (z, directions))

    target = ((teacher_z @ directions.detach().T - center) / 0.04).softmax(-1)  # [2, B, prototypes]
    log_p = (z @ directions.T / 0.1).log_softmax(-1)
    official = -0.5 * ((target[0] * log_p[1]).sum(-1) + (target[1] * log_p[0]).sum(-1)).mean()
    official_gradients = torch.autograd.grad(official, (z, directions))
    return max(apart(loss, official), *map(apart, gradients, official_gradients))


def photometric_alone() -> float:
    """Color augmentation on the device, each picture with numbers of its own: brighter, gray, blurred, solarized."""
    pixels = torch.randint(0, 256, (4, 96, 96, 3), dtype=torch.uint8, device=DEVICE)
    table = torch.tensor([list(PHOTOMETRIC_COLUMNS.values())] * 4, device=DEVICE)  # values that change nothing
    column = {name: number for number, name in enumerate(PHOTOMETRIC_COLUMNS)}
    for picture, (name, value) in enumerate({"brightness": 1.3, "gray": 1.0, "sigma": 1.5, "solarize": 127.5}.items()):
        table[picture, column[name]] = value
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = photometric(pixels, table, mean, std)  # [4, 3, 96, 96], normalized

    x = pixels.permute(0, 3, 1, 2) / 255
    red, green, blue = x[1]
    reach = math.ceil(3 * 1.5)
    bell = (-0.5 * (torch.arange(-reach, reach + 1, device=DEVICE) / 1.5) ** 2).exp()
    bell = (bell / bell.sum()).expand(3, 1, 1, -1)  # [3, 1, 1, 11]
    wide = F.pad(x[2:3], (reach,) * 4, mode="reflect")
    changed = [
        (1.3 * x[0]).clamp(max=1),
        (0.2989 * red + 0.587 * green + 0.114 * blue).expand(3, -1, -1),
        F.conv2d(F.conv2d(wide, bell, groups=3), bell.mT, groups=3)[0],
        torch.where(x[3] >= 0.5, 1 - x[3], x[3]),
    ]
    offset, spread = (torch.tensor(values, device=DEVICE)[:, None, None] for values in (mean, std))
    return apart(ours, (torch.stack(changed) - offset) / spread)


def block_masks_alone() -> float:
    """Masks for masked image modeling: blocks, exactly so many patches of each crop, drawn on the device from a seed."""
    counts = torch.tensor([0, 40, 60, 80], dtype=torch.int32, device=DEVICE)  # masked patches, one number per crop
    first = torch.tensor(0, device=DEVICE)  # number of the first image: another step, other numbers, other masks
    masks = block_masks(first, counts, grid=(ROWS, COLUMNS), seed=0)  # [1, 4, N] bool
    patches, mask_token = torch.randn(4, N, D, device=DEVICE), torch.randn(D, device=DEVICE)
    student_input = torch.where(masks[0][..., None], mask_token, patches)  # [4, N, D]

    # No formula gives random blocks. But a random order decides which crop has which count, and each has exactly its count.
    found = (student_input == mask_token).all(-1).sum(-1).sort().values
    return apart(found.float(), counts.float())


def square_sums_alone() -> float:
    """The norm of every gradient of a model at once, for clipping or for a log."""
    gradients = [torch.randn(shape, device=DEVICE) for shape in ((D, D), (D,), (4 * D, D), (3, 5, 7))]
    norms = square_sums(gradients).sqrt()  # [4]
    return apart(norms, torch.stack([gradient.norm() for gradient in gradients]))


def adamw_alone() -> float:
    """An optimizer in a few lines: clipping, AdamW, and a teacher that follows by moving average, in one sweep."""
    ours, theirs, teacher, their_teacher = (nn.Linear(64, 8, device=DEVICE) for _ in range(4))
    for model in (theirs, teacher, their_teacher):
        model.load_state_dict(ours.state_dict())
    parameters, teachers = list(ours.parameters()), list(teacher.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))  # the moments
    steps = torch.zeros(len(parameters), device=DEVICE)
    number = lambda value: torch.tensor(
        value, dtype=torch.float64, device=DEVICE
    )  # tensors, so that a CUDA graph reads them
    lr, decay, momentum, no = number(1e-2), number(0.1), number(0.9), number(0.0)

    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        images, labels = torch.randn(16, 64, device=DEVICE), torch.randint(0, 8, (16,), device=DEVICE)
        F.cross_entropy(ours(images), labels).backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        scale = (0.5 / square_sums(gradients).sqrt()).clamp(max=1)  # each gradient's norm is at most 0.5
        adamw(
            parameters, gradients, first, second, steps, scale, lr, decay, momentum, freeze=no, refused=no.float(),
            decayed=[True] * len(parameters), teachers=teachers,
        )  # fmt: skip
        ours.zero_grad()

        F.cross_entropy(theirs(images), labels).backward()
        for parameter in theirs.parameters():
            nn.utils.clip_grad_norm_(parameter, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, parameter in zip(their_teacher.parameters(), theirs.parameters(), strict=True):
                average.lerp_(parameter, 1 - 0.9)
    pairs = zip((*parameters, *teachers), (*theirs.parameters(), *their_teacher.parameters()), strict=True)
    return max(apart(a.detach(), b.detach()) for a, b in pairs)


class Summary(nn.Module):
    """A pooling layer for any backbone: one learned query per head attends to the patches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.own = nn.Parameter(0.02 * torch.randn(3, 1, 1, heads, width // heads))  # its query, key and value
        self.keys_and_values = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, D] to [B, D]."""
        keys, values = self.keys_and_values(patches).unflatten(-1, (2, self.heads, -1)).unbind(2)
        query, own_key, own_value = self.own
        return self.out(class_attention(query, own_key, own_value, keys, values).flatten(1))


def compiled_module() -> float:
    """torch.compile takes modules with an operation inside as a whole: no graph break, gradients included."""
    module = Summary(D, H).to(DEVICE)
    patches = torch.randn(B, N, D, device=DEVICE)
    found = []
    for run in (torch.compile(module, fullgraph=True), module):
        out = run(patches)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), tuple(module.parameters()))))
    return max(map(apart, *found))


def every_implementation() -> float:
    """`explain` says what runs and why. `force` chooses: for a comparison, or to find out where a difference comes from."""
    patches = torch.randn(B, N, D, device=DEVICE)
    print(explain("neighbor_topk", patches, (ROWS, COLUMNS), 4))
    print()
    chosen = neighbor_topk(patches, (ROWS, COLUMNS), 4, return_scores=True)[1]
    with force(neighbor_topk="reference"):  # or force("reference") for all; PATCHLIGHT_IMPL="neighbor_topk=reference"
        reference = neighbor_topk(patches, (ROWS, COLUMNS), 4, return_scores=True)[1]
    return apart(chosen, reference)


ALONE: dict[str, Callable[[], float]] = {
    "neighbor_topk": neighbor_topk_alone,
    "class_attention": class_attention_alone,
    "query_attention": query_attention_alone,
    "self_relation": self_relation_alone,
    "prototype_ce": prototype_ce_alone,
    "photometric": photometric_alone,
    "block_masks": block_masks_alone,
    "square_sums": square_sums_alone,
    "adamw": adamw_alone,
    "torch.compile": compiled_module,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="OPERATION", help=f"some of {', '.join(ALONE)}; all by default")
    names = parser.parse_args().names or list(ALONE)
    if unknown := set(names) - set(ALONE):
        parser.error(f"an operation must be one of {', '.join(ALONE)}, got {', '.join(sorted(unknown))}")
    torch.manual_seed(0)
    differences = {"force": every_implementation()} | {name: ALONE[name]() for name in names}
    for name, difference in differences.items():
        print(f"{name:<16} differs from PyTorch by {difference:.1e}")
    wrong = [name for name, difference in differences.items() if not difference < 1e-4]
    if wrong:
        sys.exit(f"{', '.join(wrong)}: further apart than 1e-4, the rounding of fp32 sums")


if __name__ == "__main__":
    main()

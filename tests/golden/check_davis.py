"""DAVIS: reading, label propagation, J and F against the released code's numbers."""

import numpy as np
import torch
from harness import Case, check
from torch.nn.functional import interpolate

from patchlight.evaluation.davis.propagation import PropagationProtocol, propagate, to_label_map
from patchlight.evaluation.davis.resizing import first_labels, resize_frame, resize_labels
from patchlight.evaluation.davis.scores import contour, contour_accuracy, region_similarity, score_frames

SOFT_MAPS = 2e-5


@check("davis_propagation")
def propagation(case: Case) -> None:
    height, width, patch = int(case.meta["h"]), int(case.meta["w"]), int(case.meta["patch_size"])
    protocol = PropagationProtocol(
        int(case.meta["n_last_frames"]),
        int(case.meta["topk"]),
        int(case.meta["size_mask_neighborhood"]) or None,
        float(case.meta["temperature"]),
    )
    features = case["features"].unflatten(1, (height, width))
    soft = torch.stack(list(propagate(features, case["first_seg"][0].permute(1, 2, 0), protocol)))
    case.close("soft_seg", soft.permute(0, 3, 1, 2), rel=SOFT_MAPS)
    rounding = 8 * torch.finfo(torch.float32).eps  # half of it for each of eight operations, in both runs
    same_labels(case, case["soft_seg"].permute(0, 2, 3, 1), patch, rel=rounding)
    same_labels(case, soft, patch, rel=SOFT_MAPS)


def same_labels(case: Case, soft: torch.Tensor, patch: int, rel: float) -> None:
    """The labels are equal wherever an error of `rel` in the soft maps cannot change the best class."""
    size = int(case.meta["original_height"]), int(case.meta["original_width"])
    labels = np.stack([resize_labels(to_label_map(frame, patch).numpy(), size) for frame in soft])
    same = torch.from_numpy(labels) == case["labels_full_resolution"]
    certain = np.stack([resize_labels(is_certain(frame, patch, rel).byte().numpy(), size) for frame in soft])
    same = same[torch.from_numpy(certain) > 0].double().mean() if certain.any() else torch.ones(())
    assert same >= 0.999, f"{case.name}: {same:.4%} of the pixels agree"


def is_certain(soft: torch.Tensor, patch: int, rel: float) -> torch.Tensor:
    """[h * patch, w * patch] whether the best class leads by more than the error of the stretched maps.

    (map - lowest) / (highest - lowest) has up to four times the error of a map. A class that is 1 everywhere up to
    rounding is stretched from its lowest to its highest rounding error, and decides nothing.
    """
    maps = interpolate(soft.double().permute(2, 0, 1)[None], scale_factor=float(patch), mode="bilinear")[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    spread = torch.where(high > 0, high - low, 1.0)
    error = 4 * rel * high / spread  # infinite where a class is the same everywhere
    stretched = torch.where(high > 0, (maps - low) / spread, maps)
    best = stretched.argmax(0, keepdim=True)
    ahead = stretched.gather(0, best) - stretched - (error + error.expand_as(stretched).gather(0, best))
    return (ahead.scatter(0, best, torch.inf) > 0).all(0)


@check("davis_read_frame")
def reading(case: Case) -> None:
    """In 8-bit levels, of which rounding in bilinear resizing may change a value by 1."""
    patch = int(case.meta["factor"])
    mean, std = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)  # constants of the released code
    image = case["image_rgb"].numpy()
    pixels = resize_frame(image, int(case.meta["scale_size"]), patch, mean=mean, std=std)
    levels, recorded = (
        ((x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]) * 255).round()
        for x in (pixels, case["frame"])
    )
    assert levels.shape == recorded.shape
    assert (levels - recorded).abs().max() <= 1
    restored = ((recorded / 255) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    case.close("frame", restored, rel=1e-6)
    labels = first_labels(case["labels"].numpy(), pixels.shape[-2] // patch, pixels.shape[-1] // patch)
    case.equal("small_one_hot", labels.permute(2, 0, 1)[None])


@check("davis_jf_pairs")
def pairs(case: Case) -> None:
    truths, results = (case[name].numpy().astype(bool) for name in ("gt", "res"))
    voids = case["void"].numpy().astype(bool) if "void" in case else [None] * len(truths)
    rows = list(zip(truths, results, voids, strict=True))
    case.close("J", torch.tensor([region_similarity(*row) for row in rows]), rel=0, floor=1e-12)
    case.close("F", torch.tensor([contour_accuracy(*row) for row in rows]), rel=0, floor=1e-12)
    outside = [np.ones_like(truths[0]) if void is None else ~void for void in voids]
    for name, masks in (("gt", truths), ("res", results)):
        if f"boundary_{name}" in case:
            lines = [contour(m & o) for m, o in zip(masks, outside, strict=True)]
            case.equal(f"boundary_{name}", torch.tensor(np.stack(lines)))


@check("davis_jf_480p")
def full_size(case: Case) -> None:
    count, height, width = case["shape"].tolist()
    masks = [
        np.unpackbits(case[name].numpy(), axis=1)[:, : height * width].reshape(count, height, width).astype(bool)
        for name in ("gt_packed", "res_packed")
    ]
    rows = list(zip(*masks, strict=True))
    case.close("J", torch.tensor([region_similarity(*row) for row in rows]), rel=0, floor=1e-12)
    case.close("F", torch.tensor([contour_accuracy(*row) for row in rows]), rel=0, floor=1e-12)


@check("davis_jf_sequence")
def sequence(case: Case) -> None:
    scores = score_frames(case["gt_labels"].numpy(), case["res_labels"].numpy())
    case.close("J", torch.from_numpy(scores.j), rel=0, floor=1e-12)
    case.close("F", torch.from_numpy(scores.f), rel=0, floor=1e-12)
    stats = [[[s.mean, s.recall, s.decay] for s in pair] for pair in scores.statistics()]
    case.close("stats", torch.tensor(stats, dtype=torch.float64), rel=0, floor=1e-12)
    both = np.mean([[s.mean for s in pair] for pair in scores.statistics()])
    case.close("J_and_F_mean", torch.tensor([both]), rel=0, floor=1e-12)

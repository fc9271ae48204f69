"""DAVIS: reading, label propagation, J and F against the released code's numbers."""

import numpy as np
import torch
from harness import Case, check

from patchlight.evaluation.davis import first_labels, resize_frame, resize_labels
from patchlight.evaluation.davis_scores import contour, contour_accuracy, region_similarity, score_frames
from patchlight.evaluation.propagation import Propagation, propagate, to_label_map


@check("davis_propagation")
def propagation(case: Case) -> None:
    height, width, patch = int(case.meta["h"]), int(case.meta["w"]), int(case.meta["patch_size"])
    rule = Propagation(
        int(case.meta["n_last_frames"]),
        int(case.meta["topk"]),
        int(case.meta["size_mask_neighborhood"]) or None,
        float(case.meta["temperature"]),
    )
    features = case["features"].unflatten(1, (height, width))
    soft = torch.stack(list(propagate(features, case["first_seg"][0].permute(1, 2, 0), rule)))
    case.close("soft_seg", soft.permute(0, 3, 1, 2), rel=2e-5)
    same_labels(case, case["soft_seg"].permute(0, 2, 3, 1), patch)
    # A class that is 1 everywhere up to rounding is stretched from its lowest to its highest rounding error, in the released
    # code too: its labels follow from the recorded soft maps only (davis_propagation_nomask_b).
    spread = case["soft_seg"].amax((2, 3)) - case["soft_seg"].amin((2, 3))
    if not ((spread > 0) & (spread < 1e-5)).any():
        same_labels(case, soft, patch)


def same_labels(case: Case, soft: torch.Tensor, patch: int) -> None:
    size = int(case.meta["original_height"]), int(case.meta["original_width"])
    labels = np.stack([resize_labels(to_label_map(frame, patch).numpy(), size) for frame in soft])
    same = (torch.from_numpy(labels) == case["labels_full_resolution"]).double().mean()
    assert same >= 0.999, f"{case.name}: {same:.4%} of the pixels agree"


@check("davis_read_frame")
def reading(case: Case) -> None:
    patch = int(case.meta["factor"])
    image = case["image_rgb"].numpy()
    pixels = resize_frame(image, 40, patch, mean=(0.485, 0.456, 0.406), std=(0.228, 0.224, 0.225))
    case.close("frame", pixels, rel=0, floor=0.02)
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
    case.equal("boundary_gt", torch.tensor(np.stack([contour(m & o) for m, o in zip(truths, outside, strict=True)])))
    case.equal("boundary_res", torch.tensor(np.stack([contour(m & o) for m, o in zip(results, outside, strict=True)])))


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

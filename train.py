"""Trains a recipe: `python train.py RECIPE [--setting value ...]`, or the same behind `torchrun --nproc-per-node N`.

It is `patchlight train`. `--help` lists the recipes, `RECIPE --help` what people change, `RECIPE --help-all` every setting.
"""

import sys

from patchlight.command import run

if __name__ == "__main__":
    run("train", sys.argv[1:], "train.py")

"""Trains a recipe: `python train.py RECIPE [--field value ...]`, or the same behind `torchrun --nproc-per-node N`.

`python train.py --help` lists the recipes, `python train.py RECIPE --help` every field.
"""

from patchlight.recipes.command import main

if __name__ == "__main__":
    main()

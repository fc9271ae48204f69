#!/usr/bin/env bash
# From a folder of images to a trained teacher, with numbers and pictures of it.
#
#     bash examples/train_on_folder.sh IMAGES OUTPUT [--setting value ...]
#
# IMAGES  a folder of images, at any depth. If it has the parts train/ and val/ (or test/), each with a folder per class, the
#         model is trained on train/, without the classes, and k-NN accuracy is measured on the other part at the end.
# OUTPUT  a folder for everything that is written.
# More settings are those of `patchlight train`, such as --schedule.epochs 50 or --data.batch-per-rank 32.
#
# If it was stopped, by Ctrl-C, a time limit or a loss of power, run the same command again: it goes on where it was.
# RECIPE=selfpatch_vits16_in1k in front of it trains another recipe; `patchlight train --help` lists them. PYTHON=... is the
# Python that has patchlight, if it is not the one of this shell.
set -euo pipefail

if [ $# -lt 2 ] || [ ! -e "$1" ]; then
    echo "usage: bash $0 IMAGES OUTPUT [--setting value ...], where IMAGES is a folder that exists" >&2
    exit 2
fi
images=$1 output=$2
shift 2 # what is left in "$@" are settings
recipe=${RECIPE:-small_data}
python=${PYTHON:-python}
run="$output/run"
patchlight() { "$python" -m patchlight.command "$@"; } # the command `patchlight` of this Python

# A run ends in order when it is stopped, with a checkpoint. Then nothing else is to be done.
trap 'echo "Stopped. Run the same command again to go on."; exit 130' INT TERM

if [ -d "$images/train" ] && { [ -d "$images/val" ] || [ -d "$images/test" ]; }; then
    training_images="$images/train" labeled=yes
else
    training_images=$images labeled=no
fi

# 1. Read every image once. An image that cannot be read is listed in bad_files.tsv; the others make the list to train on.
#    If more than 1 % are bad, this ends here. When all is well it is done once: remove the folder `data` to check again.
checked="$output/data"
if [ ! -e "$checked/done" ]; then
    patchlight check-data "$training_images" --out "$checked"
    touch "$checked/done"
fi
list="$checked/clean.txt"
[ -e "$list" ] || list="$checked/clean.index" # of tar shards

# 2. Print all settings, and how long it will take and how much memory it needs. This trains nothing.
if [ ! -e "$run/run.json" ]; then
    patchlight train "$recipe" --data.path "$list" --output.folder "$run" "$@" --dry-run
fi

# 3. Train: on all GPUs by torchrun, on one, or on the CPU. --output.resume continues, or starts if there is no checkpoint yet.
gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
settings=("$recipe" --data.path "$list" --output.folder "$run" --output.resume "$@")
if [ "$gpus" -gt 1 ]; then
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" -m patchlight.command train "${settings[@]}"
else
    patchlight train "${settings[@]}"
fi

# 4. Measure: which classes have the nearest training images? This needs labels.
if [ "$labeled" = yes ]; then
    patchlight evaluate knn --checkpoint "$run" --data "$images"
else
    echo "k-NN accuracy is left out: $images has no train/ and val/ with a folder per class."
fi

# 5. Look: attention, similar patches, main directions. One page with all pictures.
patchlight evaluate attention --checkpoint "$run" --data "$list"

# 6. Share: a folder for the Hugging Face Hub, with a model card.
patchlight export hub --checkpoint "$run" --folder "$output/hub"

echo
echo "Report:   $run/report.html"
echo "Pictures: $run/evaluation/attention/index.html"
echo "Teacher:  $(ls -d "$run"/checkpoints/step-* | tail -n 1)/teacher.safetensors"

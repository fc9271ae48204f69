"""The command `patchlight`: each of its commands is also a module that can be run. Modules are imported when they are needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

COMMANDS = {
    "train": ("patchlight.recipes.command", "pretrain a model: a recipe, and any setting by flag"),
    "evaluate": ("patchlight.evaluation.__main__", "k-NN, linear, fine-tuning, DAVIS, segmentation, pictures"),
    "export": ("patchlight.export.__main__", "a trained teacher for timm, the Hugging Face Hub, ONNX and torch.export"),
    "tables": (
        "patchlight.tables.__main__",
        "the papers' tables: what to type for each row, and small runs of all of it",
    ),
    "check-data": ("patchlight.data.check_data", "read every image once and list those that cannot be read"),
    "check-checkpoint": ("patchlight.checkpoint.__main__", "read every byte of a run's checkpoints"),
    "doctor": ("patchlight_kernels.__main__", "versions, hardware, and which implementation of each op runs"),
    "bench": ("bench.__main__", "measure speed, in a checkout of the repository"),
}
CODES = "Exit codes: 0 done; 2 the command line or a file of settings is wrong, nothing was done; 1 what was started failed."


def main(arguments: Sequence[str] | None = None) -> None:
    from .usage import HELP, WRONG_USAGE, check_first_word, errors_in_words, list_text

    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in (*HELP, "help"):
        print(
            list_text("patchlight", "COMMAND", {name: text for name, (_, text) in COMMANDS.items()}), CODES, sep="\n\n"
        )
        return
    if words == ["--version"]:
        import patchlight

        print(f"patchlight {patchlight.__version__}")
        return
    with errors_in_words("patchlight", WRONG_USAGE):
        check_first_word(words, "command", list(COMMANDS), "patchlight")
    run(words[0], words[1:], f"patchlight {words[0]}")


def run(name: str, words: Sequence[str], prog: str) -> None:
    """Runs a command. prog: its name in help and messages."""
    from .usage import WRONG_USAGE, errors_in_words

    with errors_in_words(prog, WRONG_USAGE):  # the environment may be wrong too
        function = main_of(name)
    function(words, prog)


def main_of(name: str) -> Callable[[Sequence[str], str], None]:
    """The main function of a command's module."""
    from .checks import check

    if name == "bench":  # not in a wheel
        root = Path(__file__).resolve().parents[2]
        remedy = "clone the repository, and run pip install -e . there"
        check(
            (root / "bench" / "__main__.py").is_file(),
            "patchlight bench needs a checkout",
            "an installed package",
            remedy,
        )
        sys.path.insert(0, str(root))
    return import_module(COMMANDS[name][0]).main


if __name__ == "__main__":
    main()

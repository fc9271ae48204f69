"""The command line: a recipe by name, a function of a file (`my_recipes.py:my_run`), or a file of settings (`--config`);
any of its settings by flag."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..checks import check, sentence
from ..file_functions import call_alone, function_of_file, names_function
from ..report.console import print_sentence
from ..run import Run
from ..usage import (
    FAILED,
    HELP,
    HELP_ALL,
    WRONG_USAGE,
    Group,
    Words,
    check_first_word,
    errors_in_words,
    help_text,
    list_text,
)
from . import RECIPES
from .config_file import read_config
from .papers import YOUR_IMAGES
from .switches import check_terms, registered, with_local_crops, with_objectives

CONFIG, DRY_RUN = "--config", "--dry-run"
WITH, WITHOUT, LOCAL_COUNT = "--with", "--without", "--data.local-count"
USUAL = (
    "--data.path", "--data.batch-per-rank", "--data.workers", "--model.arch", "--model.init-from", "--optim.base-lr",
    "--schedule.epochs", "--parallel.accumulate", "--parallel.shard", "--parallel.precision", "--parallel.seed",
    "--output.folder", "--output.resume", "--output.save-every", "--output.evaluate-every",
)  # fmt: skip
_EXAMPLES = {WITH: f"write {WITH} sere", WITHOUT: f"write {WITHOUT} sere", LOCAL_COUNT: f"write {LOCAL_COUNT} 4"}
OTHER_HELP = f"""  {CONFIG} FILE                     Instead of a recipe: the run.json of a run, or the same as YAML.
  {WITH} NAME ...                   Adds objectives: {{names}}.
  {WITHOUT} NAME ...                Leaves objectives out. What one needs in its paper (weights, crops, masks) comes and goes
                                    with it; flags on objectives count those that are there then.
  {LOCAL_COUNT} N            So many local crops by the run's own rule, else by DINO's; 0 for none.
  {DRY_RUN}                         Builds everything, prints settings and cost, writes nothing, and stops.
  {HELP_ALL}                        Every setting."""


@dataclass(frozen=True)
class Request:
    """What a command line asks for: a run to start from, and the flags on top."""

    start: Run
    about: str
    words: Sequence[str]
    dry: bool
    note: str = ""


def parse(arguments: Sequence[str] | None = None, prog: str = "train.py") -> Run:
    """The run that the arguments describe."""
    asked = request(_words(arguments), prog)
    group = Group.of_instance(asked.start)
    with errors_in_words(prog, WRONG_USAGE, group):
        return _run_of(asked, group)


def request(words: Sequence[str], prog: str) -> Request:
    """Takes apart what belongs to no setting: the recipe, the file of settings, --dry-run, and what changes the run that
    settings belong to."""
    with errors_in_words(prog, WRONG_USAGE):
        rest = [word for word in words if word != DRY_RUN]
        dry = len(rest) < len(words)
        taken = {flag: _take(rest, flag) for flag in (WITH, WITHOUT, LOCAL_COUNT)}
        asked = _beginning(rest, prog)
        return replace(asked, start=_switched(asked.start, taken), dry=dry)


def _beginning(rest: list[str], prog: str) -> Request:
    """The run of the recipe or of the file, and the words after it."""
    place = next((i for i, word in enumerate(rest) if word == CONFIG or word.startswith(f"{CONFIG}=")), None)
    if place is None:
        name, recipe = recipe_of(rest, prog)
        return Request(made_by(name, recipe), inspect.getdoc(recipe) or "", rest[1:], False)
    _, equals, path = rest[place].partition("=")
    path = path if equals else next(iter(rest[place + 1 :]), "")
    check(path not in ("", *HELP), f"{CONFIG} needs a file", "nothing", f"write {CONFIG} runs/NAME/run.json")
    rest = rest[:place] + rest[place + (1 if equals else 2) :]
    named = next(iter(rest), "-")
    rule, remedy = f"A run starts from a recipe or from {CONFIG}", "leave one out"
    check(named.startswith("-"), rule, f"{named} and {path}", remedy)
    run, note = read_config(Path(path))
    return Request(run, f"The run of {path}.", rest, False, note)


def _take(words: list[str], flag: str) -> list[str] | None:
    """Removes a flag and the words up to the next one, which it returns; None if it is not there."""
    taken: list[str] | None = None
    while (
        place := next((i for i, w in enumerate(words) if w.replace("_", "-").partition("=")[0] == flag), None)
    ) is not None:
        _, equals, value = words.pop(place).partition("=")
        found = [value] if equals else []
        while not equals and place < len(words) and not re.match("--?[A-Za-z]", words[place]):
            found.append(words.pop(place))
        check(found not in ([], [""]), f"{flag} needs a value", "nothing", _EXAMPLES[flag])
        taken = [*(taken or []), *found]
    return taken


def _switched(run: Run, taken: dict[str, list[str] | None]) -> Run:
    """Local crops first, as an objective may need what goes with them."""
    if (count := taken[LOCAL_COUNT]) is not None:
        whole = len(count) == 1 and re.fullmatch(r"-?[0-9]+", count[0]) is not None
        check(whole, f"{LOCAL_COUNT} must be a whole number", " ".join(count), _EXAMPLES[LOCAL_COUNT])
        run = with_local_crops(run, int(count[0]))
    if taken[WITH] is None and taken[WITHOUT] is None:
        return run
    return with_objectives(run, *(taken[WITH] or ()), without=taken[WITHOUT] or ())


def recipe_of(words: Sequence[str], prog: str) -> tuple[str, Callable[[], Run]]:
    """The recipe that the first word names."""
    first = words[0] if words else ""
    if names_function(first):
        path, name = first.rsplit(":", 1)
        return first, recipe_of_file(Path(path), name)
    rule, remedy = "A recipe in a file must be named", f"write {first}:NAME, the name of its function"
    check(not first.endswith(".py"), rule, f"{first} alone", remedy)
    check_first_word(words, "recipe", list(RECIPES), prog)
    return first, RECIPES[first]


def recipe_of_file(path: Path, name: str) -> Callable[[], Run]:
    """A recipe from a file outside the package."""
    return function_of_file(path, name, "recipe")


def made_by(name: str, recipe: Callable[[], Run]) -> Run:
    """What a recipe returns; an error if it is no run."""
    run = call_alone(name, recipe, "recipe")
    check(
        isinstance(run, Run), f"The recipe {name} must return a Run", type(run).__name__, "return the Run that it makes"
    )
    return run


def _run_of(asked: Request, group: Group) -> Run:
    read = Words(group, asked.words, (CONFIG, DRY_RUN, HELP_ALL, WITH, WITHOUT, LOCAL_COUNT))
    read.read()
    check(not read.loose, "Every word must belong to a setting", " ".join(read.loose), "write --setting value")
    for path, words in read.typed.items():
        if path[:2] == ("data", "crops") and path[-1] == "count" and read.given[path] == 0:
            kind = words.split()[0].rsplit(".", 2)[0]
            raise ValueError(
                sentence("There must be at least one crop of each rule", words, f"{kind} none has no such crops")
            )
    run = Run(**group.make(read.given, read.typed))
    check_terms(run)
    rule, got = "Data.path must be your own images for this recipe", f"{YOUR_IMAGES}, which stands for them"
    check(asked.dry or run.data.path != YOUR_IMAGES, rule, got, "add --data.path FOLDER")
    run.data.check_path()
    return run


def _other_help() -> str:
    return OTHER_HELP.format(names=", ".join(registered()))


def _words(arguments: Sequence[str] | None) -> list[str]:
    """The arguments without --local-rank, in either spelling: old launchers add it; ranks come from the environment."""
    words, kept = list(sys.argv[1:] if arguments is None else arguments), []
    while words:
        word = words.pop(0)
        if word.partition("=")[0].replace("_", "-") != "--local-rank":
            kept.append(word)
        elif "=" not in word and words and words[0].isdigit():
            del words[0]
    return kept


def main(arguments: Sequence[str] | None = None, prog: str = "train.py") -> None:
    words = _words(arguments)
    if words and words[0] in (*HELP, HELP_ALL):
        docs = {name: inspect.getdoc(recipe) or "" for name, recipe in RECIPES.items()}
        print(list_text(prog, "RECIPE", docs), _other_help(), sep="\n\n")
        return
    shown = {HELP_ALL: None, **dict.fromkeys(HELP, USUAL)}
    asked_help = [word for word in words if word in shown]
    asked = request([word for word in words if word not in shown], prog)
    group = Group.of_instance(asked.start)
    if asked_help:
        print(help_text(group, f"{prog} {words[0]}", asked.about, shown[asked_help[-1]], _other_help()))
        return
    with errors_in_words(prog, WRONG_USAGE, group):
        run = _run_of(asked, group)
        if not asked.dry:
            from ..engine.checkpoint import check_folder

            check_folder(Path(run.output.folder), run.output.resume)
    if asked.note and os.environ.get("RANK", "0") == "0":
        print_sentence(asked.note)
    from ..engine.sentinels import TrainingError

    with errors_in_words(prog, FAILED, group, (TrainingError,)):
        if asked.dry:
            from .dry_run import dry_run

            dry_run(run)
        else:
            from ..engine.assembly import train

            train(run)

"""The model card says what the run has recorded, shows foreign names as they are, and leaves out what is not known."""

import json
import re
import shutil

import pytest
import yaml
from export.teachers import saved_run
from parity import ROOT

from patchlight.command import main
from patchlight.export.markdown import code, escaped, table
from patchlight.export.papers import METHODS, methods_of, papers_of
from patchlight.objectives import OBJECTIVES
from patchlight.recipes import RECIPES


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A run of two steps, without any log."""
    return saved_run(tmp_path_factory.mktemp("runs") / "run", "class attention", steps=2)


def card_of(run, out, *words) -> str:
    main(["export", "hub", "--checkpoint", str(run), "--folder", str(out), *words])
    return (out / "README.md").read_text()


def front_matter(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def rows_of(card: str) -> dict[str, list[str]]:
    """The cells of every row of a table, by the first of them."""
    rows = [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in card.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in rows}


def test_a_run_without_logs(bare, tmp_path):
    card = card_of(bare, tmp_path / "out")
    head, rows = front_matter(card), rows_of(card)
    assert head["library_name"] == "timm"
    assert head["pipeline_tag"] == "image-feature-extraction"
    assert {"dino", "selfpatch", "patchlight"} <= set(head["tags"])
    assert "license" not in head
    assert "# DINO + SelfPatch, vit_small/4" in card
    assert rows["steps"] == ["2 of 20"]
    assert rows["images seen"] == ["16"]
    assert rows["images per step"] == ["8"]
    assert rows["learning rate"] == ["0.032 per 256 images: 0.001, to 1e-06"]
    assert rows["name in timm"][0].startswith("`vit_tiny_patch16_224`, img_size=16, patch_size=4, embed_dim=48")
    for unknown in ("time", "hardware", "software"):
        assert unknown not in rows
    for absent in ("## Results", "picture.png", "None,", "nan"):
        assert absent not in card
    assert card.count("@inproceedings") == 2
    assert json.loads(re.search(r"```json\n(.*?)\n```", card, re.DOTALL)[1])["schedule"]["epochs"] == 4


def test_numbers_come_from_the_files_of_the_run_up_to_the_checkpoint(bare, tmp_path, capsys):
    run = shutil.copytree(bare, tmp_path / "run")
    (run / "knn.jsonl").write_text(
        '{"step": 0, "k10": 0.125}\n{"step": 2, "k10": 0.5, "k20": 0.25}\n{"step": 9, "k10": 0.999}\n'
    )
    (run / "metrics.jsonl").write_text('{"step": 1, "seconds": 3700.4}\n{"step": 9, "seconds": 99999}\n')
    gpus = [{"name": "A | B"}] * 2
    environment = {
        "python": "3.12.1",
        "packages": {"torch": "2.14"},
        "gpus": gpus,
        "processes": 2,
        "command": "/home/anna/x",
    }
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "evaluation").mkdir()
    result = {
        "task": "linear",
        "data": "/home/anna/birds_2",
        "checkpoint": f"{run}/checkpoints/step-00000002",
        "changed": {"size": [224, 96]},
        "metrics": {"top1": 0.4321},
    }
    (run / "evaluation" / "linear-birds.json").write_text(json.dumps(result))
    (run / "evaluation" / "knn-old.json").write_text(
        json.dumps(result | {"checkpoint": "x/step-00000001", "task": "old"})
    )
    card = card_of(run, tmp_path / "out")
    rows = rows_of(card)
    assert rows["0"] == ["12.50", ""]
    assert rows["2"] == ["50.00", "25.00"]
    assert "99.9" not in card
    assert rows["time"] == ["1:01:40 (to step 1)"]
    assert rows["hardware"] == [r"2 x A \| B; 2 processes"]
    assert rows["software"] == ["Python 3.12.1, torch 2.14"]
    assert rows["linear"] == ["birds_2", "top1 43.21", "changed: size 96"]
    assert "anna" not in card
    assert "old" not in rows
    assert "knn-old.json is of another checkpoint: the card leaves it out." in capsys.readouterr().out


def test_a_damaged_file_is_said_and_left_out(bare, tmp_path, capsys):
    run = shutil.copytree(bare, tmp_path / "run")
    (run / "environment.json").write_text("{")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "knn-x.json").write_text("[]")
    (run / "knn.jsonl").write_text('{"step": 1, "k10"\n{"step": 2, "k10": null, "k20": 0.5}\n')
    card = card_of(run, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "environment.json cannot be read (" in printed
    assert "knn-x.json cannot be read (knn-x.json must hold an object): the card leaves it out." in printed
    assert rows_of(card)["2"] == ["50.00"]
    assert "software" not in rows_of(card)


def test_a_license_that_is_known(bare, tmp_path):
    card = card_of(bare, tmp_path / "out", "--license", "cc-by-4.0")
    assert front_matter(card)["license"] == "cc-by-4.0"
    assert "The weights: cc-by-4.0." in card


def test_foreign_names_are_shown_as_they_are():
    from markdown_it import MarkdownIt

    for name in (
        "a|b",
        "*x* _y_ __z__",
        "[l](u) <b>",
        r"back\slash",
        "`tick`",
        "a~b~ $c$ &amp;",
        "two\nlines",
        "snake_case",
    ):
        page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(table(("head",), [(escaped(name),)]))
        (cell,) = re.findall(r"<td>(.*?)</td>", page)
        plain = cell.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        assert plain == " ".join(name.split())
    assert code("```\nx\n```").startswith("````\n")


def test_every_method_has_its_name_and_paper():
    assert METHODS.keys() == OBJECTIVES.keys()
    for recipe in RECIPES.values():
        run = recipe().to_dict()
        assert papers_of(run)
        assert all(name in [METHODS[kind][0] for kind in METHODS] for name in methods_of(run))
    other = {"objectives": {"options": [{"kind": "MyOptions"}]}}
    assert methods_of(other) == ["My"]
    assert papers_of(other) == []


def test_the_papers_agree_with_the_projects_citation():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    ours = {paper.title: paper for _, paper in METHODS.values()}
    for reference in cited:
        if reference["title"] in ours:
            paper = ours[reference["title"]]
            names = tuple(f"{author['family-names']}, {author['given-names']}" for author in reference["authors"])
            assert (paper.year, paper.authors) == (reference["year"], names)
    assert any(reference["title"] in ours for reference in cited)

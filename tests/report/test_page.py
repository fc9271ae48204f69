"""The report: one file without outside resources, made from the run's folder alone, with everything in that folder."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
from engine.tiny_run import tiny_run
from PIL import Image

from patchlight.report import page, run_summary
from patchlight.report.charts import line_chart, nice_ticks, percent, short
from patchlight.report.environment import describe_environment
from patchlight.report.log_file import append, to_bytes
from patchlight.report.page import write_report
from patchlight.report.run_summary import RunSummary
from patchlight.report.series import MOST_POINTS, Series


def append_line(path, record) -> None:
    append(path, to_bytes(record))


def build_report(folder) -> str:
    return page.build_report(RunSummary(folder).update())


def fill(folder, lines: int = 6, knn: int = 3, pictures: int = 1):
    """A run's folder as training leaves it."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(tiny_run(folder).to_dict()))
    (folder / "environment.json").write_text(json.dumps(describe_environment()))
    for number in range(1, lines + 1):
        append_line(
            folder / "metrics.jsonl",
            {"step": 10 * number, "total": 100, "epoch": number / 2, "images": 80 * number, "steps": 10,
             "loss": 6.0 - number / 4, "dino/cls": 5.5 - number / 4, "dino/cls/ln_k": 0.9, "lr": 1e-3, "momentum": 0.99,
             "gradient/norm": 2.5, "speed/images_per_second": 123.0, "data/wait_share": 0.125,
             "data/wait_seconds": 0.5, "memory/gib": 1.5, "seconds": 4.0 * number},
        )  # fmt: skip
    for number in range(knn):
        append_line(folder / "knn.jsonl", {"step": 20 * number, "epoch": 1.0, "k10": 0.2 + number / 10, "k20": 0.19})
    (folder / "plots").mkdir(exist_ok=True)
    for number in range(pictures):
        Image.new("RGB", (8, 8), (number, 10, 20)).save(folder / "plots" / f"attention-{10 * number:06d}.png")
    Image.new("RGB", (9, 9)).save(folder / "plots" / "crops.png")
    return folder


VOID = {"meta", "img", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Checks that all tags are closed; keeps the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.words, self.references = [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_everything_of_the_folder_is_in_the_page(tmp_path):
    text = build_report(fill(tmp_path / "my-run"))
    visible = " ".join(Page(text).words)
    for words in ("my-run", "Dino", "vit_small/4", "step 60 of 100", "epoch 3.0", "480 images", "k-NN accuracy, k=10", "40%",
                  "from 20% at step 0", "dino/cls", "loss / ln K", "learning rate", "teacher momentum", "gradient norm",
                  "images per second", "waiting for data", "12.5%", "3.0 s in all", "3.00 s of 24.00 s",
                  "50.0 ms per step on the slowest process", "procedural, 0 workers", "1.50 GiB", "attention, step 0",
                  "crops", "data.batch_per_rank", "packages.torch"):  # fmt: skip
        assert words in visible, words


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    text = build_report(fill(tmp_path))
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text), re.IGNORECASE)
    assert "@import" not in text
    assert not re.search(r"url\(", text)
    references = Page(text).references
    assert len(references) == 2
    for reference in references:
        assert reference.startswith("data:image/png;base64,")
        assert base64.b64decode(reference.split(",")[1]).startswith(b"\x89PNG")


def test_it_is_a_function_of_the_folder(tmp_path):
    fill(tmp_path)
    assert build_report(tmp_path) == build_report(tmp_path)
    first = build_report(tmp_path)
    append_line(tmp_path / "knn.jsonl", {"step": 60, "epoch": 3.0, "k10": 0.777, "k20": 0.7})
    assert "77.7%" in build_report(tmp_path)
    assert "77.7%" not in first


def test_it_replaces_the_old_report_at_once(tmp_path):
    fill(tmp_path)
    path = write_report(tmp_path)
    assert path.name == "report.html"
    with path.open() as reader:
        append_line(tmp_path / "metrics.jsonl", json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]))
        write_report(tmp_path)
        assert reader.read().endswith("</html>\n"), "an open old report stays whole"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".report")]


@pytest.mark.parametrize("lines", [0, 1])
def test_a_run_that_has_just_begun(tmp_path, lines):
    visible = " ".join(Page(build_report(fill(tmp_path, lines, knn=lines, pictures=0))).words)
    assert ("no log line yet" in visible) == (lines == 0)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no log line yet" in build_report(empty)


def test_numbers_that_were_not_finite_leave_a_gap(tmp_path):
    fill(tmp_path)
    lines = build_report(tmp_path).count("<polyline")
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    append_line(tmp_path / "metrics.jsonl", {**last, "step": 70, "loss": float("nan"), "dino/cls": None})
    assert "not finite" in " ".join(Page(build_report(tmp_path)).words)
    for step in (80, 90):
        append_line(tmp_path / "metrics.jsonl", {**last, "step": step})
    assert build_report(tmp_path).count("<polyline") == lines + 2, "the loss and its term are interrupted"


def test_a_page_reads_only_what_is_new(tmp_path, monkeypatch):
    """And a page that was made bit by bit is that of the folder."""
    summary, parsed = RunSummary(fill(tmp_path)), []
    before = page.build_report(summary.update())
    parse = run_summary.parse
    monkeypatch.setattr(run_summary, "parse", lambda raw, key: parsed.append(raw) or parse(raw, key))
    assert page.build_report(summary.update()) == before
    assert not parsed
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 70, "loss": 1.0}\n{"step": 80, "lo')
        file.flush()
        summary.update()
        file.write('ss": 0.5}\n')
    grown = page.build_report(summary.update())
    assert [json.loads(line)["step"] for line in parsed] == [70, 80]
    assert grown == build_report(tmp_path)
    assert "0.5" in " ".join(Page(grown).words)


def test_a_shorter_or_another_file_is_read_anew(tmp_path):
    summary = RunSummary(fill(tmp_path, lines=6)).update()
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert page.build_report(summary.update()) == build_report(tmp_path)
    path.unlink()
    fill(tmp_path, lines=9)
    assert page.build_report(summary.update()) == build_report(tmp_path)


def test_damage_is_counted_and_shown_and_an_unfinished_line_is_not(tmp_path):
    fill(tmp_path)
    whole = build_report(tmp_path)
    assert "Damaged files" not in whole
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 70, "los')
    assert build_report(tmp_path) == whole
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\n\xff\xfe\n[1]\n{"loss": 1.0}\n')
    (tmp_path / "run.json").write_text('{"model": ')
    (tmp_path / "environment.json").write_text("[]")
    (tmp_path / "knn.jsonl").unlink()
    (tmp_path / "knn.jsonl").mkdir()
    (tmp_path / "diagnoses.jsonl.damaged").write_text("x\n")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "knn-x.json").write_text("{}")
    (tmp_path / "plots" / "crops-1.png").mkdir()
    visible = " ".join(Page(build_report(tmp_path)).words)
    for words in ("metrics.jsonl has 4 damaged lines, left out here", "run.json cannot be read", "step 60 of 100",
                  "environment.json cannot be read", "knn.jsonl cannot be read", "diagnoses.jsonl.damaged has damaged",
                  "knn-x.json cannot be read", "crops, step 1 (cannot be read"):  # fmt: skip
        assert words in visible, words


def test_a_very_large_picture_is_named(tmp_path):
    (fill(tmp_path) / "plots" / "crops-2.png").write_bytes(bytes(page._MOST_PICTURE_BYTES + 1))
    text = build_report(tmp_path)
    assert "too large for this page: crops-2.png" in text
    assert len(text) < 10**6


def test_diagnoses_come_first(tmp_path):
    fill(tmp_path)
    for step in range(25):
        append_line(
            tmp_path / "diagnoses.jsonl",
            {"step": step, "name": "uniform collapse", "sentence": "a < b & c", "fatal": False},
        )
    text = build_report(tmp_path)
    assert text.index("uniform collapse") < text.index("k-NN accuracy and attention")
    assert "a &lt; b &amp; c" in text
    assert "5 earlier ones" in text


def test_names_are_escaped(tmp_path):
    folder = fill(tmp_path / "a<script>b")
    assert "a<script>b" not in build_report(folder)
    assert "a&lt;script&gt;b" in build_report(folder)


def test_pictures_are_spread_over_the_run(tmp_path):
    captions = re.findall(r"attention, step (\d+)", build_report(fill(tmp_path, pictures=10)))
    assert sorted(map(int, set(captions))) == [0, 30, 60, 90]


def points(svg: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]+)"', svg)[1].split()]


def test_lines_go_where_the_values_are():
    drawn = points(line_chart({"a": Series([(0, 1.0), (50, 3.0), (100, 2.0)])}, total=200))
    xs, ys = zip(*drawn, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    assert ys[1] < ys[2] < ys[0], "in an SVG, y grows downwards"
    assert (ys[0] - ys[2]) == pytest.approx((ys[0] - ys[1]) / 2, abs=0.11)
    whole = points(line_chart({"a": Series([(0, 1.0), (50, 3.0), (100, 2.0)])}, total=100))
    assert whole[-1][0] - whole[0][0] == pytest.approx(2 * (xs[2] - xs[0]), abs=0.21), "half the run, half the width"


def test_one_spike_does_not_flatten_a_long_curve():
    values = [1.0 + (i % 2) for i in range(200)]
    normal = points(line_chart({"a": Series(enumerate(values))}))
    values[20] = 1e6
    spiked = points(line_chart({"a": Series(enumerate(values))}))
    assert spiked[100] == normal[100]
    assert spiked[20][1] >= 0


def test_long_series_have_few_points_that_stand_for_all_lines():
    count = 13 * MOST_POINTS + 5
    series = Series((step, float(step % 2)) for step in range(count))
    series.add(count, 7.0)
    assert MOST_POINTS / 2 <= len(series.points) <= MOST_POINTS
    assert sum(point.lines for point in series.points) == count + 1
    assert {(point.mean, point.low, point.high) for point in series.points[:-1]} == {(0.5, 0.0, 1.0)}
    assert series.points[0].step == (series.lines_per_point - 1) / 2
    assert series.last == series.highest == (count, 7.0)
    assert series.total == count // 2 + 7


def test_a_series_is_short_however_long_the_run_is():
    sizes = []
    for count in (10 * MOST_POINTS, 80 * MOST_POINTS):
        series = Series((step, 2 + (step * 37 % 1000) / 1000) for step in range(count))
        sizes.append(len(line_chart({"a": series})))
    assert sizes[1] < 1.3 * sizes[0]


def test_what_was_not_finite_is_a_gap_in_the_line():
    known = [(step, 1.0 + step) for step in range(10)]
    whole = line_chart({"a": Series(known)})
    gap = line_chart({"a": Series([*known[:4], (4, None), *known[5:]])})
    assert (whole.count("<polyline"), gap.count("<polyline")) == (1, 2)
    assert "not finite" in gap
    lonely = line_chart({"a": Series([(0, None), (1, 2.0), (2, None), (3, 1.0), (4, 1.5)])})
    assert (lonely.count("<polyline"), lonely.count("<circle")) == (1, 2), "a value between two gaps is a dot"
    assert "no values yet" in line_chart({"a": Series([(0, None)])})


def test_a_band_shows_the_range_of_merged_values():
    assert "<polygon" not in line_chart({"a": Series((step, float(step % 2)) for step in range(MOST_POINTS))})
    merged = line_chart({"a": Series((step, float(step % 2)) for step in range(4 * MOST_POINTS))})
    assert merged.count("<polygon") == 1
    assert "0.5 (0 to 1)" in merged


def test_ticks_enclose_the_values():
    for low, high in ((0.0, 1.0), (3.2, 3.3), (-5.0, 17.0), (0.0, 12345.0), (2.0, 2.0), (0.0, 0.0), (1e-6, 3e-6)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert 2 <= len(ticks) <= 8
        assert len({short(t) for t in ticks}) == len(ticks), (low, high, [short(t) for t in ticks])


def test_numbers_are_short():
    texts = [short(v) for v in (0, 1, 0.5, 6.2345, 123.4, 12345.0, 2.5e6, 1e-5, 0.00321)]
    assert texts == ["0", "1", "0.5", "6.234", "123", "12.3k", "2.5M", "1.0e-05", "0.00321"]
    assert percent(0.4567) == "45.7%"


def test_the_best_checkpoint_is_named(tmp_path):
    folder = fill(tmp_path / "run")
    assert RunSummary(folder).best() is None
    assert "best k10" not in build_report(folder)
    (folder / "best.json").write_text('{"name": "k10", "value": 0.3, "step": 1020}')
    assert RunSummary(folder).best() == ("k10", 1020, 0.3)
    assert "<span>best k10</span><b>30%</b><em>step 1,020, kept as best</em>" in build_report(folder)
    for damage in ("{", "[1]", '{"name": "k10", "value": NaN, "step": 5}', '{"name": 3, "value": 0.1, "step": 5}'):
        (folder / "best.json").write_text(damage)
        assert RunSummary(folder).best() is None
        assert "best k10" not in build_report(folder)

"""The report: all that a run folder holds is on the page, model text is inert, broken folders still give a page."""

import html
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from accessible import assert_accessible

from experiments.report import duration, main, read_run, show, write_report

VOID = {"meta", "br", "line", "path", "use", "rect", "img"}


class Page(HTMLParser):
    """Tags that were opened, text that is seen, and a check that tags close in order."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""


def write_run(folder, depth=4, steps=120, flops=1e12, torn=""):
    folder.mkdir()
    config = {"depth": depth, "source": "pydocs", "plan": {"depth": depth, "config": {"n_embd": 256}, "lr_scale": 0.25}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "total_training_flops": flops * step, "total_training_time": 0.5 * step}
        line |= {"train/loss": 3 + 6 / step, "train/mfu": 0.25 if step > 1 else math.nan, "train/tok_per_sec": 8192}
        line |= {"val/bpb": 1 + 1 / step} if step % 40 == 0 else {}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + torn)
    return str(folder)


def report(tmp_path, *folders, title="A run") -> tuple[str, Page]:
    out = tmp_path / "out" / "report.html"
    write_report(list(folders), str(out), title)
    source = out.read_text()
    return source, Page(source)


def test_a_mixture_has_a_curve_and_a_number_for_each_source(tmp_path):
    run = tmp_path / "mixed"
    write_run(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "val/bpb" in line:
            line |= {"val/bpb/web": line["val/bpb"] - 0.1, "val/bpb/own & old": line["val/bpb"] + 0.1}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source, page = report(tmp_path, str(run))
    assert "validation bits per byte, web" in page.text and "0.9083" in page.text and "1.1083" in page.text
    for name in ("web", "own &amp; old"):
        assert source.count(f'aria-label="Validation, bits per byte, of {name}, against step"') == 1
    other = tmp_path / "one-source"
    write_run(other)
    assert "of each source" not in report(tmp_path, str(other))[1].text


def test_one_run(tmp_path):
    run = tmp_path / "d4"
    write_run(run, torn='{"step": 121, "train/loss": 99')
    (run / "samples.md").write_text(
        "The capital of France is <script>alert(1)</script><img src=x onerror=alert(2)> & so on"
    )
    stages = [{"stage": "rows", "seconds": 90.0, "result": {"rows": 17233}}, {"stage": "pretrain", "seconds": 30.0}]
    (run / "stages.json").write_text(json.dumps([stage | {"result": stage.get("result")} for stage in stages]))
    (run / "chat.json").write_text(json.dumps([{"prompt": "12 × 34?", "answer": "</dd></html><b>408</b>"}]))
    source, page = report(tmp_path, str(run), title="Depth <4>")

    assert not {"script", "img", "link"} & set(page.tags)
    assert "onerror=" not in re.sub("&lt;.*?&gt;", "", source)
    for text in ("Depth <4>", "<script>alert(1)</script>", "</dd></html><b>408</b>", "12 × 34?"):
        assert text in page.text
    assert page.tags.count("svg") == 6
    assert "1.0083" in page.text  # bpb: the last one, at step 120
    assert "3.0500" in page.text  # loss: not the torn line's
    assert "25.0%" in page.text  # MFU, in spite of a NaN
    assert "1 min 00 s" in page.text  # training time
    assert "1.2e14" in page.text
    for text in ("config.n_embd", "17,233", "1 min 30 s", "2 min 00 s", "width: 75.0%"):
        assert text in html.unescape(source)
    assert "http" not in source.replace("http://www.w3.org/", "")  # nothing is fetched
    assert source == report(tmp_path, str(run), title="Depth <4>")[0]


def test_charts_take_the_colours_of_the_page(tmp_path):
    source, _ = report(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b", depth=2))
    charts = "".join(re.findall(r'<svg role="img".*?</svg>', source, re.S))
    colors = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", charts))
    assert colors == {"none", "currentColor", "var(--grid)", "var(--series-0)", "var(--series-1)"}
    used = set(re.findall(r"var\((--[\w-]+)\)", source))
    light, dark = re.findall(r":root \{(.*?)\}", source, re.S)
    for scheme in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):", scheme))


def test_several_runs(tmp_path):
    folders = [write_run(tmp_path / f"d{d}", depth=d, steps=40 * d, flops=10.0 ** (10 + d)) for d in range(1, 11)]
    source, _ = report(tmp_path, *folders, title="Miniseries")
    assert source.count("<details>") == 10
    assert source.count('<th scope="row">d') >= 10
    assert all(f"var(--series-{i})" in source for i in range(8))
    rows = re.findall(r'<tr><th scope="row">(d\d+)</th>(.*?)</tr>', source, re.S)
    assert [(name, re.findall(r"<td[^>]*>(.*?)</td>", row)[0]) for name, row in rows] == [
        (f"d{d}", str(d)) for d in range(1, 11)
    ]
    assert len(source) < 1_000_000


def test_it_is_accessible(tmp_path, page):
    report(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b", depth=6), title="Two runs")
    page.goto((tmp_path / "out" / "report.html").as_uri())
    assert_accessible(page)


def test_what_is_missing_or_broken(tmp_path):
    (tmp_path / "empty").mkdir()
    _, page = report(tmp_path, str(tmp_path / "empty"))
    assert "Nothing has been written" in page.text
    run = tmp_path / "broken"
    write_run(run, steps=1)
    (run / "stages.json").write_text('[{"stage": "rows", "seco')
    _, page = report(tmp_path, str(run), str(tmp_path / "empty"))
    assert "stages.json is left out, it is not JSON" in page.text
    with pytest.raises(FileNotFoundError, match=r"no run folder .*/gone"):
        write_report([str(tmp_path / "gone")], str(tmp_path / "x.html"), "x")
    with pytest.raises(ValueError, match="at least one run folder"):
        write_report([], str(tmp_path / "x.html"), "x")
    assert not (tmp_path / "x.html").exists()


BROKEN = {  # a crash, a full disk or another program may leave these in place of a file
    "chat.json": ['{"chatcore_metric": 0.1, "accuracy": {}}', "[1]", '[{"prompt": "a"}]', "null", '[{"pro'],
    "stages.json": ["{}", '[{"stage": "rows"}]', '[{"stage": "a", "seconds": 1.0, "result": 3}]', "7", ""],
    "config.json": ["[]", '{"plan": 3}', '{"plan": {"param_counts": 3}}', '{"plan": null}', "{"],
    "result.json": ["[]", '{"core_metric": "high"}', '{"core_metric": NaN}', "x"],
    "metrics.jsonl": [
        '{"step": 1, "train/loss": 3.0}\n{"step": 2, "tra',
        "7\n[]\nnull",
        '{"step": null}',
        '{"a": 1}',
        "",
    ],
    "samples.md": ["\udcff\udcfe"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BROKEN.items() for text in texts])
def test_one_broken_file_costs_the_page_no_other(name, text, tmp_path):
    run = tmp_path / "run"
    write_run(run, steps=3)
    for other, value in (("stages.json", [{"stage": "rows", "seconds": 90.0, "result": {}}]), ("chat.json", [])):
        (run / other).write_text(json.dumps(value))
    (run / name).write_bytes(text.encode(errors="surrogateescape"))
    source, page = report(tmp_path, str(run))
    assert "<svg" in source or name == "metrics.jsonl"
    assert "1 min 30 s" in page.text or name == "stages.json"
    assert "n_embd" in source or name == "config.json"


def test_what_a_sweep_says_may_be_broken_too(tmp_path):
    (tmp_path / "sweep").mkdir()
    write_run(tmp_path / "sweep" / "d1", steps=3)
    (tmp_path / "sweep" / "sweep.json").write_text('{"kind": "miniseries", "inputs": {}}')
    (tmp_path / "sweep" / "results.csv").write_text("run,depth,val_bpb\nd1,one,high\n")
    source, page = report(tmp_path, str(tmp_path / "sweep"))
    assert "the findings are left out: " in page.text
    assert "<svg" in source


def test_a_step_logged_twice_counts_once(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        {"step": 2, "train/loss": 5.0},
        {"step": 1, "train/loss": 6.0},
        {"step": 2, "val/bpb": 1.0, "train/loss": 4.0},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_run(str(run)).metrics == [lines[1], lines[2]]


def test_uris(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/runs/d1/metrics.jsonl", b'{"step": 1, "train/loss": 3.5}\n{"step": 2, "train/loss": 3.25}\n')
    write_report(["memory://runs/d1"], "memory://runs/d1/report.html", "In memory")
    assert b"3.2500" in memory.cat("/runs/d1/report.html")


def test_numbers_as_text():
    wanted = {16384: "16,384", 4.330784e19: "4.331e19", 0.02: "0.02", 1e-5: "1e-5", True: "yes", None: "–", "L": "L"}
    wanted |= {1.234567: "1.2346", 5242976.0: "5,242,976", 0: "0", -12.5: "-12.5", 2**62: "4.612e18", 1e-10: "1e-10"}
    assert {value: show(value) for value in wanted} == wanted
    assert show([4, "a"]) == "4, a"
    seconds = {3.21: "3.2 s", 59.99: "1 min 00 s", 192: "3 min 12 s", 3599.7: "1 h 00 min", 10949: "3 h 02 min"}
    assert {value: duration(value) for value in seconds} == seconds


def test_command_line(tmp_path):
    out = tmp_path / "page.html"
    command = [sys.executable, "-m", "experiments.report", write_run(tmp_path / "d4", steps=3), "--out", str(out)]
    done = subprocess.run([*command, "--title", "Three steps"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert "<title>Three steps</title>" in out.read_text()
    with pytest.raises(SystemExit, match=r"^error: there is no run folder .*gone"):
        main([str(tmp_path / "gone")], str(tmp_path / "none.html"))


def test_a_file_of_another_shape_is_left_out_with_a_note(tmp_path):
    run = tmp_path / "d4"
    write_run(run)
    (run / "chat.json").write_text('{"chatcore_metric": 0.1, "accuracy": {}}')
    (run / "stages.json").write_text('[{"stage": "rows"}]')
    _, page = report(tmp_path, str(run))
    for name in ("chat.json", "stages.json"):
        assert f"{name} is left out, its content is not what a run writes" in page.text

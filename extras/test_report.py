"""Tests of extras/report.py."""
import base64
from xml.etree import ElementTree

import pytest

from extras import report

METRICS = """\
{"iteration": 0, "eval": 0.5}
{"iteration": 1, "reward": 0.25, "kl": NaN, "nfe_rollout": 6, "nfe_old": 1.5, "nfe_train": 2,
 "seconds_rollout": 3, "seconds_update": 0.5}
{"iteration": 2, "reward": 0.75, "kl": 0.5, "nfe_rollout": 6, "nfe_old": 1.5, "nfe_train": 2,
 "seconds_rollout": 3, "seconds_update": 0.5}
{"iteration": 2, "eval": 0.625}
{"iteration": 3, "rew""".replace(",\n", ",")                        # a kill cut the last line

def make_run(folder, flags='"lr": 1', metrics=METRICS):
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text('{"flags": {%s}}' % flags)
    (folder / "metrics.jsonl").write_text(metrics)
    return str(folder)

def test_report_holds_values_and_pictures(tmp_path):
    run = make_run(tmp_path / "one")
    (tmp_path / "one/samples/000002.png").write_bytes(b"a picture")
    report.main([run, "--out", str(tmp_path / "page.html")])
    html = (tmp_path / "page.html").read_text()
    assert '"reward": [0.25, 0.75], "kl": [null, 0.5]' in html
    assert '"eval": [0.5, 0.625]' in html
    # An iteration costs 6 + 1.5 + 3 * 2. An evaluation stands at the sum of those before.
    assert '"x": {"iteration": [1.0, 2.0], "cost": [13.5, 27.0], "seconds": [3.5, 7.0]}' in html
    assert '"x": {"iteration": [0.0, 2.0], "cost": [0.0, 27.0], "seconds": [0.0, 7.0]}' in html
    picture = base64.b64encode(b"a picture").decode()
    assert f'"samples": {{"2": ["data:image/png;base64,{picture}"]}}' in html

def test_report_compares_runs(tmp_path):
    never_evaluated = '{"iteration": 1, "nfe": 7, "nfe_rollout": 6}\n'
    runs = [make_run(tmp_path / "a-10", '"lr": 1, "clip": 0, "seed": 0, "out": "a-0"'),
            make_run(tmp_path / "a-11", '"lr": 1, "clip": 0, "seed": 1, "out": "a-1"'),
            make_run(tmp_path / "b", '"lr": 2, "clip": 0, "seed": 0', never_evaluated)]
    html = report.page([report.read_run(run) for run in runs])
    assert '"differing": ["lr", "seed"]' in html
    assert '{"label": "a (2 seeds)", "runs": [0, 1]}, {"label": "b", "runs": [2]}' in html
    assert '"x": {"iteration": [1.0], "cost": [7.0]' in html         # a logged nfe is the cost

def test_report_keeps_markup_text(tmp_path):
    run = make_run(tmp_path / "<b>name", '"prompts": "</script><i>"')
    html = report.page([report.read_run(run)], ["<u>"])
    assert "\\u003c/script>\\u003ci>" in html
    assert not any(mark in html for mark in ("</script><i>", "<b>", "<u>", "innerHTML"))

def test_report_has_a_line_for_a_damaged_run(tmp_path, capsys):
    empty = make_run(tmp_path / "empty", metrics="")
    broken = make_run(tmp_path / "broken", metrics='{"iteration": 1}\nnonsense\n')
    with pytest.raises(SystemExit):
        report.main([empty, broken, "none"])
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == f"{empty}: metrics.jsonl has no line yet"
    assert second == f"{broken}: line 2 of metrics.jsonl is damaged"
    assert third == "none: not a run (config.json: No such file or directory)"

def test_svg_chart_draws_a_point_where_the_data_says():
    series = [("<b> & c", [0, 10, 40], [0, 0.25, 1], [0, 0, 1], [0, 0.5, 1])]
    chart = report.svg_chart(series, "cost", "reward", size=(480, 264))
    root = ElementTree.fromstring(report.svg_figure([chart]))
    texts = [text.text for text in root.iterfind(".//{*}text")]
    assert "<b> & c" in texts and "cost" in texts and "reward" in texts
    # The axes leave 60, 20 at the sides; 46 below; 22 above and 18 for the legend's row.
    assert root.find(".//{*}polyline").get("points") == "60.0,218.0 160.0,173.5 460.0,40.0"
    assert root.find(".//{*}polygon").get("points").split()[1] == "160.0,218.0"

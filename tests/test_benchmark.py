"""What benchmark/run.py keeps of a run, and what plot.py reads of it."""

import csv
import json

from benchmark import plot, run

SMALL = "--q-hidden 8 --policy-hidden 8 --encoder-hidden 8 --rl-batch 8 --context-batch 8"
SHORT = "--offline-steps 20 --online-iterations 1 --updates-per-iteration 10 --eval-every 10"
COMMAND = f"smac_offline_online.py --env-id PointDirection {SMALL} {SHORT}"


def test_results_of_a_run_that_stopped_and_went_on(tmp_path, monkeypatch):
    for name in ("smac_offline_online.py", "envs.py", "buffers.py", "datasets"):
        (tmp_path / name).symlink_to(run.ROOT / name)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    out, results = tmp_path / "benchmark" / "results" / "point", tmp_path / "runs" / "point" / "smac"
    run.run("point", "smac", COMMAND, 1, "runs")
    first = (out / "smac__1.csv").read_text()
    curves, offline_end = plot.read(out / "smac__1.csv")
    assert sorted(curves["test", "online"]) == [10, 20, 30] and offline_end == 20
    assert json.loads((out / "smac__1.json").read_text())["run_dir"] == "runs/point/smac"  # no path of this machine
    with open(out / "diagnostics" / "smac__1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["gradient_step"] for row in rows] == ["10", "20", "30"]
    assert all(float(row["eval/kl_test_online_context"]) > 0 and float(row["train/q_max"]) for row in rows)

    (out / "smac__1.csv").write_text("of a run that was stopped")
    run.run("point", "smac", COMMAND, 1, "runs")  # from its checkpoint
    assert (out / "smac__1.csv").read_text() == first
    for file in results.glob("*/checkpoint.pt"):
        file.unlink()
    (out / "smac__1.csv").write_text("kept")
    run.run("point", "smac", COMMAND, 1, "runs")
    assert (out / "smac__1.csv").read_text() == "kept"

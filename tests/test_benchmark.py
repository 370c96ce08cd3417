"""What benchmark/run.py keeps of a run, and what plot.py reads of it."""

import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import buffers
import meta_bc
import pearl_online_oracle as pearl
import smac_offline_online as smac
from benchmark import adaptation, plot, run

SMALL = "--q-hidden 8 --policy-hidden 8 --encoder-hidden 8 --rl-batch 8 --context-batch 8"
SHORT = "--offline-steps 20 --online-iterations 1 --updates-per-iteration 10 --eval-every 10"
COMMAND = f"smac_offline_online.py --env-id PointDirection {SMALL} {SHORT}"


def test_results_of_a_run_that_stopped_and_went_on(tmp_path, monkeypatch, capsys):
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
    for text in (first, first[: first.index("\n30,") + 1]):
        (out / "smac__1.csv").write_text(text)
        capsys.readouterr()
        run.run("point", "smac", COMMAND, 1, "runs")
        assert (out / "smac__1.csv").read_text() == text
        assert ("unfinished" in capsys.readouterr().out) == (text != first)


def test_results_of_a_run_that_ended_are_told_from_others(tmp_path):
    results = run.ROOT / "benchmark" / "results"
    for file in ("macaw__1", "borel__1", "meta_bc__1", "pearl__1", "smac__1"):
        assert run.is_finished(results / "point_direction" / f"{file}.csv")


def test_the_table_is_of_the_seeds_that_have_come_farthest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "RESULTS", tmp_path / "benchmark" / "results")
    (tmp_path / "datasets").symlink_to(run.ROOT / "datasets")
    folder = tmp_path / "benchmark" / "results" / "point"
    folder.mkdir(parents=True)
    for seed, (offline, last) in enumerate(((10.0, 20.0), (20.0, 24.0), (99.0, None))):
        rows = [(10, 0, offline)] + [(20, 50, last)] * (last is not None)
        lines = [f"{step},{env_steps},test,online,0,{value},0" for step, env_steps, value in rows]
        (folder / f"smac__{seed}.csv").write_text("\n".join([",".join(buffers.CSV_COLUMNS), *lines, ""]))
        (folder / f"smac__{seed}.json").write_text('{"env_id": "PointDirection", "dataset": null}')
    plot.main("point")
    assert "left out what has not come to step 20 (1 seeds)" in capsys.readouterr().out
    assert "| smac | 2 | 2.3 | 15.0 ± 7.1 → 22.0 ± 2.8 |" in (folder / "table.md").read_text()


def test_adaptation_is_what_the_own_context_gives_beyond_that_of_another_task(tmp_path, monkeypatch):
    one_step = f"{COMMAND} --offline-steps 1 --online-iterations 0 --run-dir {tmp_path}"
    smac.main(smac.parse_args(shlex.split(one_step)[1:]))

    def encoder(self, context):
        """The task's direction, from rewards that are velocity . direction; the other dimensions of z are zero."""
        obs, actions, rewards = context.split([4, 2, 1], dim=-1)
        direction = torch.linalg.lstsq(0.8 * obs[..., 2:] + 0.2 * actions, rewards).solution.squeeze(-1)  # (T, 2)
        mu = torch.cat([direction, torch.zeros(len(context), 3)], dim=-1)
        return mu, torch.full_like(mu, 1e-4)

    monkeypatch.setattr(smac.Encoder, "forward", encoder)
    monkeypatch.setattr(smac.Policy, "forward", lambda self, obs, z: (10 * z[:, :2], torch.full((len(z), 2), -20.0)))
    run_folder = tmp_path / "PointDirection__smac_offline_online__1"
    step, returns = adaptation.measure(run_folder, 2)
    assert step == 1 and returns.shape == (4, 20, 2)
    own, others, prior, sampled = returns.mean((1, 2))
    assert 46 < own < 65 and abs(others) < 25 and abs(prior) < 10 and sampled == pytest.approx(own, abs=0.1)

    adaptation.main(adaptation.Args((run_folder,), tmp_path / "table.md", 2))
    (row,) = (line for line in (tmp_path / "table.md").read_text().splitlines() if "smac" in line)
    assert f"| 1 | {own:.1f} ± " in row


@pytest.mark.parametrize("script", [pearl, meta_bc])
def test_adaptation_of_runs_of_the_other_scripts(script, tmp_path):
    name = Path(script.__file__).stem
    flags = "--offline-steps 1" if script is meta_bc else "--online-iterations 1 --updates-per-iteration 1"
    script.main(script.parse_args(shlex.split(f"--env-id PointDirection --rl-batch 8 {flags} --run-dir {tmp_path}")))
    step, returns = adaptation.measure(tmp_path / f"PointDirection__{name}__1", 2)
    assert step == 1 and returns.shape == (4, 20, 2) and np.isfinite(returns).all()


def test_adaptation_refuses_what_is_no_run(tmp_path):
    for runs, words in (((), "name a run"), ((tmp_path,), "no folder of a run"),
                        ((tmp_path / "PointDirection__meta_bc__1",), "no checkpoint at")):  # fmt: skip
        with pytest.raises(buffers.InputError, match=words):
            adaptation.main(adaptation.Args(runs, tmp_path / "table.md"))

"""explore.py, z_of_tasks.py and watch.py, with an agent of focal.py and one of SMAC."""

import math
import re
from pathlib import Path

import pytest
import torch

import envs
import focal
import pearl_online_oracle as pearl
import smac_offline_online as smac
from benchmark import watch
from benchmark.experiments import explore, z_of_tasks
from buffers import InputError
from plumbing.flags import parse_args

SMALL = "--env-id PointDirection --q-hidden 8 --policy-hidden 8 --encoder-hidden 8 --device cpu"
SMALL += " --latent-dim 3 --rl-batch 8 --context-batch 8 --offline-steps 2"


MAKE_EVALUATION = envs.make_evaluation


@pytest.fixture
def runs(short, tmp_path, monkeypatch):
    """Folders of small runs. Their evaluations are small; what the tests play has all its tasks."""
    for script, more in ((focal, ""), (smac, "--online-iterations 0")):
        words = f"{SMALL} {more} --run-dir {tmp_path}".split()
        script.main(parse_args(script.Args, script.PRESETS, words))
    monkeypatch.setattr(envs, "make_evaluation", MAKE_EVALUATION)
    return [tmp_path / f"PointDirection__{name}__1" for name in ("focal", "smac_offline_online")]


def test_a_table_has_each_way_to_explore_for_each_agent(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "RESULTS", tmp_path / "new" / "results")
    monkeypatch.setattr("sys.argv", ["explore.py", "an agent"])
    explore.main(explore.Args(agents=tuple(runs), episodes=(1, 3), rounds=2))
    lines = (tmp_path / "new" / "results" / "explore_PointDirection.md").read_text().splitlines()
    assert lines[0] == "    python explore.py 'an agent'"
    head, _, *rows = [line for line in lines if line.startswith("|")]
    for way in explore.WAYS:
        assert f"{way}, 1 |" in head and f"{way}, 3 |" in head
    assert len(rows) == 2
    number = r"-?\d+\.\d"
    for row, run in zip(rows, runs):
        cells = row.strip("| ").split(" | ")
        assert cells[0].endswith(run.name) and cells[1] == "2" and len(cells) == 11
        assert all(re.fullmatch(f"{number} → {number} ± {number}", cell) for cell in cells[2:-1])
        assert re.fullmatch(f"{number} ± {number}", cells[-1])


def test_the_error_is_over_meta_episodes_by_hand():
    # Two tasks that differ by far, with two meta-episodes each: variances 2 and 8, four numbers.
    assert explore.mean_and_error([1.0, 3.0, 100.0, 104.0], 2) == "52.0 ± 1.1"
    with pytest.raises(InputError, match="--rounds must be at least 2"):
        explore.main(explore.Args(agents=(), rounds=1))


def test_what_z_says_of_tasks_by_hand():
    # Six tasks around the circle. z is the direction itself, in all histories.
    angles = torch.arange(6) * math.pi / 3
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)
    z = directions.expand(8, 6, 2)
    names, neighbours, linear_map = z_of_tasks.order(z, directions)
    assert names == 1 and neighbours == pytest.approx(0.5) and linear_map == pytest.approx(1)
    # The same z dealt out so that neighbours in z are opposite tasks.
    mixed = z[:, [0, 2, 4, 1, 3, 5]]
    names, neighbours, linear_map = z_of_tasks.order(mixed, directions)
    assert names == 1 and neighbours < 0.5 and linear_map < 0.5


def test_what_z_says_of_tasks_of_runs(runs, tmp_path):
    out = tmp_path / "z.md"
    z_of_tasks.main(z_of_tasks.Args(runs=tuple(runs), out=out))
    rows = [line for line in out.read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 2
    for row, run in zip(rows, runs):
        cells = row.strip("| ").split(" | ")
        assert cells[0].endswith(run.name) and len(cells) == len(z_of_tasks.COLUMNS)
        assert all(math.isfinite(float(cell)) for cell in cells[1:])


def test_an_agent_of_focal_can_be_watched(runs, capsys):
    watch.main(watch.Args(agent=Path(runs[0]), tasks=3))
    output = capsys.readouterr().out
    assert "focal.py, seed 1, after 2 gradient steps" in output and "mean" in output


def test_other_ways_to_explore_are_watched_side_by_side(runs, capsys):
    """The columns that are there without --explore keep their numbers."""
    for folder in runs:
        watch.main(watch.Args(agent=folder, tasks=3))
        without = capsys.readouterr().out.splitlines()
        watch.main(watch.Args(agent=folder, tasks=3, explore=True))
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].endswith("random exploration   IDAQ") and len(lines) == len(without)
        for line, before in zip(lines[2:], without[2:]):
            assert line.startswith(before) and len(line[len(before) :].split()) == 2


def test_an_agent_that_cannot_explore_otherwise_is_refused(monkeypatch, runs):
    load = watch.load
    monkeypatch.setattr(watch, "load", lambda *args: (pearl, *load(*args)[1:]))
    with pytest.raises(InputError, match="--explore is for agents of smac_offline_online, meta_bc"):
        watch.main(watch.Args(agent=runs[1], explore=True))

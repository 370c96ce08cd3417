"""benchmark/experiments/explore.py and watch.py, with an agent of focal.py and one of SMAC."""

import re
from pathlib import Path

import pytest

import envs
import focal
import smac_offline_online as smac
from benchmark import watch
from benchmark.experiments import explore
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


def test_a_table_has_each_way_to_explore_for_each_agent(runs, tmp_path, capsys):
    out = tmp_path / "table.md"
    explore.main(explore.Args(agents=tuple(runs), episodes=(1, 3), rounds=1, out=out))
    head, _, *rows = [line for line in out.read_text().splitlines() if line.startswith("|")]
    for way in explore.WAYS:
        assert f"{way}, 1 |" in head and f"{way}, 3 |" in head
    assert len(rows) == 2
    number = r"-?\d+\.\d"
    for row, run in zip(rows, runs):
        cells = row.strip("| ").split(" | ")
        assert cells[0].endswith(run.name) and cells[1] == "2" and len(cells) == 11
        assert all(re.fullmatch(f"{number} → {number}", cell) for cell in cells[2:-1])
        assert re.fullmatch(number, cells[-1])


def test_an_agent_of_focal_can_be_watched(runs, capsys):
    watch.main(watch.Args(agent=Path(runs[0]), tasks=3))
    output = capsys.readouterr().out
    assert "focal.py, seed 1, after 2 gradient steps" in output and "mean" in output

"""examples/alone: a copy of a script runs with these two files, and with nothing else of ours."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ALONE = ROOT / "examples" / "alone"
SCRIPTS = ("smac_offline_online", "pearl_online_oracle", "meta_bc", "macaw", "borel", "focal")

TINY = "--rl-batch 4 --meta-batch 2 --eval-every 2 --policy-hidden 8"
OFFLINE = f"{TINY} --offline-steps 3"
ENCODER = "--encoder-hidden 8 --latent-dim 2 --context-batch 4"
SECOND_PHASE = (
    "--online-iterations 2 --updates-per-iteration 2 --prior-steps 25 --posterior-steps 25 "
    "--tasks-per-iteration 5 --q-hidden 8"
)
SMAC = f"smac_offline_online {OFFLINE} {ENCODER} {SECOND_PHASE} --decoder-hidden 8"
FOCAL = f"focal {OFFLINE} {ENCODER} --q-hidden 8 --decoder-hidden 8"
RUNS = (
    SMAC,
    f"{SMAC} --explore-tasks test",
    f"{SMAC} --oracle-rewards",
    f"{SMAC} --explore-tasks test --oracle-rewards",
    f"{SMAC} --actor-ablation",
    f"{SMAC} --encoder-loss q",
    f"{SMAC} --encoder-loss reward_then_q",
    f"{SMAC} --encoder-buffer all",
    f"{SMAC} --encoder-buffer frozen",
    f"{SMAC} --next-obs-in-context --num-critics 1 --awr-weights exp",
    f"pearl_online_oracle {TINY} {ENCODER} {SECOND_PHASE} --initial-steps 20",
    f"meta_bc {OFFLINE} {ENCODER}",
    f"macaw {OFFLINE} --context-batch 4 --value-hidden 8 --no-weight-transform",
    f"borel {OFFLINE} --q-hidden 8 --vae-steps 2 --vae-tasks 2 --vae-trajectories 2",
    f"{FOCAL} --explore prior",
    f"{FOCAL} --context-loss csro --explore random",
    f"{FOCAL} --context-loss unicorn --explore idaq",
)
# Runs scripts one after the other as `python SCRIPT FLAGS` does, in one process to save time.
RUN_ALL = """
import runpy, sys
for line in sys.stdin:
    script, *flags = line.split()
    sys.argv = [script + ".py", *flags]
    print("run", line.strip())
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def readme_command():
    text = (ALONE / "README.md").read_text()
    (command,) = re.findall(r"python (smac_offline_online).py (.*?)\n\n", text, re.DOTALL)
    return " ".join(command).replace("\\\n", " ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The two files and the scripts, and nothing else."""
    folder = tmp_path_factory.mktemp("alone")
    for file in (ALONE / "envs.py", ALONE / "buffers.py", *(ROOT / f"{s}.py" for s in SCRIPTS)):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def outputs(folder):
    """What the runs print, and at last what the command of the README prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    lines = "\n".join([*RUNS, readme_command()])
    options = dict(capture_output=True, text=True, timeout=300, env=environment)
    command = [sys.executable, "-c", RUN_ALL]
    result = subprocess.run(command, cwd=folder, input=lines, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split("run ")[1:]


def returns(output):
    """The numbers that a run prints: {(step, new transitions, split, context): mean return}."""
    found = {}
    for line in output.splitlines():
        if head := re.match(r"step (\d+), (\d+) new transitions", line):
            step, transitions = map(int, head.groups())
        elif row := re.match(r"    (\w+) \((\w+) context\): return (-?\d+\.\d)$", line):
            split, context, value = row.groups()
            found[step, transitions, split, context] = float(value)
    return found


def test_every_script_and_ablation(outputs):
    assert len(outputs) == len(RUNS) + 1
    for flags, output in zip(RUNS, outputs):
        found = returns(output)
        contexts = {(split, context) for _, _, split, context in found}
        assert {("test", "own"), ("train", "own")} <= contexts, flags
        assert all(-100 < value < 0 for value in found.values()), flags
        if flags.startswith(("smac", "focal")):
            assert ("train", "offline") in contexts, flags
        if flags.startswith("smac"):
            # Three offline steps, four of the second phase. An episode has 20 steps, so that five
            # tasks collect 40 transitions each, twice in an iteration, in two iterations.
            steps = [key[:2] for key in found if key[2] == "test"]
            assert steps == [(2, 0), (3, 0), (4, 400), (6, 800), (7, 800)], flags


def test_no_file_is_written(folder, outputs):
    expected = {"envs.py", "buffers.py", *(f"{script}.py" for script in SCRIPTS)}
    assert {file.name for file in folder.iterdir()} - {"__pycache__"} == expected


def test_the_second_phase_helps(outputs):
    """The command of the README: SMAC learns from what it explored, without a reward."""
    found = returns(outputs[-1])
    assert found[1000, 1200, "test", "own"] > found[600, 0, "test", "own"] + 1

"""examples/alone: a copy of a script runs with these two files, and with nothing else of ours."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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
    f"focal {OFFLINE} {ENCODER}",
    f"focal {OFFLINE} {ENCODER} --context-loss csro --explore random",
    f"focal {OFFLINE} {ENCODER} --context-loss unicorn --explore idaq",
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


def run(folder, arguments, text=""):
    """Run Python in a folder, as a user does. Returns what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, *arguments]
    options = dict(capture_output=True, text=True, timeout=300)
    result = subprocess.run(command, cwd=folder, input=text, env=environment, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copy(folder):
    """The two files and the scripts."""
    for file in (ALONE / "envs.py", ALONE / "buffers.py", *(ROOT / f"{s}.py" for s in SCRIPTS)):
        shutil.copy(file, folder)


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


def test_every_script_and_ablation(tmp_path):
    copy(tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    output = run(tmp_path, ["-c", RUN_ALL], "\n".join(RUNS))
    outputs = output.split("run ")[1:]
    assert len(outputs) == len(RUNS)
    for flags, of_run in zip(RUNS, outputs):
        found = returns(of_run)
        contexts = {(split, context) for _, _, split, context in found}
        assert {("test", "own"), ("train", "own")} <= contexts, flags
        assert all(-100 < value < 0 for value in found.values()), flags
        if flags.startswith("smac"):
            assert ("train", "offline") in contexts
            # Three offline steps, four of the second phase. An episode has 20 steps, so that five
            # tasks collect 40 transitions each, twice in an iteration, in two iterations.
            steps = [key[:2] for key in found if key[2] == "test"]
            assert steps == [(2, 0), (3, 0), (4, 400), (6, 800), (7, 800)], flags
    # No file was written.
    assert {file.name for file in tmp_path.iterdir()} - {"__pycache__"} == files


def test_the_second_phase_helps(tmp_path):
    """The command of the README: SMAC learns from what it explored, without a reward."""
    copy(tmp_path)
    text = (ALONE / "README.md").read_text()
    (command,) = re.findall(r"python (smac_offline_online.py .*?)\n\n", text, re.DOTALL)
    found = returns(run(tmp_path, command.replace("\\\n", " ").split()))
    assert found[1500, 1800, "test", "own"] > found[600, 0, "test", "own"] + 1

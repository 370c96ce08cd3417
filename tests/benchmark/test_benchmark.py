"""What benchmark/run.py keeps of a run, and what plot.py reads of it."""

import csv
import dataclasses
import fcntl
import importlib
import json
import os
import shlex
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

import buffers
import smac_offline_online as smac
from benchmark import gpu, plot, run, watch
from plumbing.files import CSV_COLUMNS
from plumbing.flags import parse_args

SMALL = "--q-hidden 8 --policy-hidden 8 --encoder-hidden 8 --rl-batch 8 --context-batch 8"
SHORT = "--offline-steps 20 --online-iterations 1 --updates-per-iteration 10 --eval-every 10"
ARGS = run.Args("point", run_dir="runs")
COMMAND = f"smac_offline_online.py --env-id PointDirection {SMALL} {SHORT}"


def test_results_of_a_run_that_stopped_and_went_on(tmp_path, monkeypatch):
    def call(line, cwd, env, **options):
        """The command that run.py starts, in this process."""
        assert line[0] == sys.executable and line[1] == "smac_offline_online.py" and cwd == tmp_path
        assert env["OMP_NUM_THREADS"] == "1"
        smac.main(parse_args(smac.Args, smac.PRESETS, line[2:]))
        return SimpleNamespace(stdout=["a line\n"], wait=lambda: 0)

    whole = buffers.load_dataset("PointDirection")
    rl, tasks = (
        [entry for entry in whole["rl"] if entry[0] < 2],
        (whole["train_tasks"][:2], whole["test_tasks"][:2]),
    )
    buffers.save_dataset(tmp_path / "few.npz", "PointDirection", *tasks, rl, [], "by hand")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "subprocess", SimpleNamespace(Popen=call, PIPE=-1, STDOUT=-2))
    monkeypatch.setattr("plumbing.pictures.draw_summary", lambda *_: Figure())
    command = f"{COMMAND} --dataset few.npz"
    out, results = (
        tmp_path / "benchmark" / "results" / "point",
        tmp_path / "runs" / "point" / "smac",
    )
    assert "smac seed 1: " in run.run(
        "point", "smac", command, 1, dataclasses.replace(ARGS, agents=True)
    )
    first = (out / "smac__1.csv").read_text()
    curves, offline_end = plot.read(out / "smac__1.csv")
    assert sorted(curves["test", "online"]) == [10, 20, 30] and offline_end == 20
    assert (
        json.loads((out / "smac__1.json").read_text())["run_dir"] == "runs/point/smac"
    )  # no path of this machine
    with open(out / "diagnostics" / "smac__1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["gradient_step"] for row in rows] == ["10", "20", "30"]
    assert all(
        float(row["eval/kl_test_own_context"]) > 0 and float(row["train/q_max"]) for row in rows
    )
    assert list(watch.load(out / "agents" / "smac__1.npz")[3]) == [20, 30]

    (out / "smac__1.csv").write_text("of a run that was stopped")
    run.run("point", "smac", command, 1, ARGS)  # from its checkpoint
    assert (out / "smac__1.csv").read_text() == first
    for file in results.glob("*/checkpoint.npz"):
        file.unlink()
    for text in (first, first[: first.index("\n30,") + 1]):
        (out / "smac__1.csv").write_text(text)
        line = run.run("point", "smac", command, 1, ARGS)
        assert (out / "smac__1.csv").read_text() == text
        assert ("unfinished" in line) == (text != first) and ("is there already" in line) == (
            text == first
        )
    assert (results / "1.log").read_text() == "a line\na line\n"


def test_a_run_that_fails_says_why(tmp_path, monkeypatch):
    """A real process: it is started with the flags and folders of the table."""
    for name in ("smac_offline_online.py", "envs.py", "sawyer.py", "buffers.py", "plumbing"):
        (tmp_path / name).symlink_to(run.ROOT / name)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    with pytest.raises(
        buffers.InputError,
        match="point smac seed 3 did not end: error: there is no dataset at nowhere",
    ):
        run.run("point", "smac", f"{COMMAND} --dataset nowhere", 3, ARGS)
    assert "nowhere" in (tmp_path / "runs" / "point" / "smac" / "3.log").read_text()
    assert not (tmp_path / "benchmark").exists()


def test_a_benchmark_that_is_none():
    with pytest.raises(
        buffers.InputError, match="there is no benchmark point, only point_direction"
    ):
        run.main(run.Args("point"))
    with pytest.raises(buffers.InputError, match="sawyer has no macaw, only smac, meta_bc"):
        run.main(run.Args("sawyer", only=("smac", "macaw")))


def test_every_command_can_be_parsed_and_is_the_one_that_made_the_results():
    """Whatever flags are in the args.json of a result: the table's command still means the same."""
    results, compared = run.ROOT / "benchmark" / "results", 0
    for name, rows in run.BENCHMARKS.items():
        files = {
            file.stem: json.loads(file.read_text()) for file in (results / name).glob("*.json")
        }
        for label, (command, seeds) in rows.items():
            script, *flags = shlex.split(command)
            script = importlib.import_module(script.removesuffix(".py"))
            expected = json.loads(json.dumps(vars(parse_args(script.Args, script.PRESETS, flags))))
            for seed in seeds:
                found = files.pop(f"{label}__{seed}", {})
                shared = found.keys() & expected.keys() - {"seed", "run_dir", "resume", "device"}
                assert {key: found[key] for key in shared} == {
                    key: expected[key] for key in shared
                }, (name, label)
                compared += len(shared)
        assert not files, f"results of {name} that its table does not have: {sorted(files)}"
    assert compared > 1_000


def test_a_lost_run_is_waited_for(tmp_path):
    """The lock of a run is held until the process that holds it has ended."""
    file = tmp_path / "args.json"
    run.wait_until_free(file)  # there is none
    file.write_text("{}")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with open(file, "r+") as held:
            fcntl.lockf(held, fcntl.LOCK_EX)
            os.write(writing, b"locked")
            time.sleep(0.3)
            os.write(writing, b"over")
            os._exit(0)
    assert os.read(reading, 6) == b"locked"
    run.wait_until_free(file)
    os.set_blocking(reading, False)
    assert os.read(reading, 4) == b"over" and file.read_text() == "{}"
    os.waitpid(child, 0)


def test_a_run_ends_with_the_process_that_started_it():
    """On Linux, as when a worker of the cluster is killed."""
    if sys.platform != "linux":
        pytest.skip("other systems have no such signal")
    reading, writing = os.pipe()
    worker = os.fork()
    if not worker:
        late = f"import os, time; time.sleep(5); os.write({writing}, b'still there')"
        run.subprocess.Popen(
            [sys.executable, "-c", late], preexec_fn=run.end_with_parent, pass_fds=[writing]
        )
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(worker, 0)
    os.close(writing)
    assert os.read(reading, 20) == b""  # nobody is left who could write


def test_runs_on_ray_are_those_of_the_plain_runner(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setitem(run.BENCHMARKS, "point", {"smac": (COMMAND, (1, 2))})
    before = signal.getsignal(signal.SIGTERM)
    run.main(
        run.Args(
            "point", run_dir=str(tmp_path / "runs"), results=str(tmp_path / "results"), ray="local"
        )
    )
    signal.signal(signal.SIGTERM, before)  # Ray leaves one of its own
    for seed in ("1", "2"):
        flags = [*shlex.split(COMMAND)[1:], "--seed", seed, "--run-dir", str(tmp_path / "plain")]
        smac.main(parse_args(smac.Args, smac.PRESETS, flags))
        plain = tmp_path / "plain" / f"PointDirection__smac_offline_online__{seed}" / "eval.csv"
        assert (
            tmp_path / "results" / "point" / f"smac__{seed}.csv"
        ).read_bytes() == plain.read_bytes()


def test_ray_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        buffers.InputError, match="pip install -r benchmark/requirements-cluster.txt"
    ):
        run.main(run.Args("sawyer", ray="local"))


def test_results_of_a_run_that_ended_are_told_from_others(tmp_path):
    results = run.ROOT / "benchmark" / "results"
    for file in ("macaw__1", "borel__1", "meta_bc__1", "pearl__1", "smac__1"):
        assert run.is_finished(results / "point_direction" / f"{file}.csv")


def write_run(folder, label, seed, rows, **flags):
    """Files of a run; rows of (gradient step, new transitions, return), each on test tasks with online context."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{step},{env_steps},test,online,0,{value},0" for step, env_steps, value in rows]
    (folder / f"{label}__{seed}.csv").write_text("\n".join([",".join(CSV_COLUMNS), *lines, ""]))
    flags = {
        "env_id": "PointDirection",
        "dataset": None,
        "meta_batch": 4,
        "rl_batch": 50_000,
    } | flags
    (folder / f"{label}__{seed}.json").write_text(json.dumps(flags))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results, in a repository with the datasets."""
    (tmp_path / "datasets").symlink_to(run.ROOT / "datasets")
    folder = tmp_path / "benchmark" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(plot, "RESULTS", folder)
    return folder


def test_the_table_is_of_the_seeds_that_have_come_farthest(results, capsys):
    for seed, (offline, last) in enumerate(((10.0, 20.0), (20.0, 24.0), (99.0, None))):
        rows = [(0, 0, 0.0), (10, 0, offline)] + [(20, 50 + 2 * seed, last)] * (last is not None)
        write_run(results / "point", "smac", seed, rows, context_batch=25_000)
    write_run(
        results / "point", "pearl", 1, [(0, 30, 1.0), (20, 99, 2.0)]
    )  # before its first step it has no score
    plot.main("point")
    assert "left out what has not come to step 20 (1 seeds)" in capsys.readouterr().out
    note, table = (results / "point" / "table.md").read_text().split("\n\n")
    assert "95 % interval" in note and "Student's t" in note and "number of seeds" in note
    row, oracle = table.splitlines()[2:]
    # 12.706 * 7.071 / sqrt(2) and 12.706 * 2.828 / sqrt(2); 4 tasks x (50,000 + 25,000) x 10 and 20 steps
    returns, cost = "15.0 ± 63.5 → 22.0 ± 25.4 (2) |  |", "10 → 20 | 2.0 + 1.0 → 4.0 + 2.0 | 51 |"
    assert row == f"| smac | 2.3 | {returns}  | {cost}"
    assert "| 2.0 (1) |" in oracle and "| 20 | 4.0 + 0.0 | 99 |" in oracle


def test_the_interval_is_students_t_by_hand():
    mean, half = plot.interval(np.array([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]]))
    assert mean == pytest.approx([3, 1]) and half == pytest.approx(
        4.30265 * np.sqrt([7 / 3, 1]), rel=1e-4
    )
    for n, quantile in (
        (2, 12.7062),
        (4, 3.18245),
        (10, 2.26216),
        (31, 2.04227),
    ):  # from a printed table
        values = np.arange(float(n))
        half = quantile * values.std(ddof=1) / np.sqrt(n)
        assert plot.interval(values) == pytest.approx((values.mean(), half), rel=1e-4)
    assert plot.interval(np.array([5.0])) == (5, 0)
    assert (
        plot.words([np.array([5.0]), np.array([7.25])]) == "5.0 → 7.2 (1)" and plot.words([]) == ""
    )


def test_data_are_a_mean_over_tasks_by_hand(results):
    arrays = {"rl_tasks": [0, 1, 0, 1, 1, 1], "rl_lengths": [1, 60, 2, 1, 1, 1]}
    rewards = [
        3.0,
        *[0.1] * 60,
        2.0,
        3.0,
        9.0,
        9.0,
        9.0,
    ]  # of task 1's first trajectory 50 steps count, the horizon
    np.savez(
        results / "data.npz",
        **arrays,
        rl_rewards=np.float32(rewards),
        encoder_rewards=np.full(9, 99.0),
    )
    args = {"env_id": "PointDirection", "dataset": str(results / "data.npz")}
    # Task 0: (3 + 5) / 2 = 4; task 1: (5 + 9 + 9 + 9) / 4 = 8. Three in a row: task 0 has one of 3, task 1 two of 63
    assert plot.data_of(args) == pytest.approx((6.0, (3 + 63 / 2) / 2, 66 + 9))
    assert np.isnan(plot.data_of({"env_id": "PointDirection"})).all()  # the oracle
    assert np.isnan(plot.data_of(args | {"dataset": "datasets/none.npz"})).all()
    assert plot.data_of({"env_id": "HopperParam", "dataset": None})[0] == pytest.approx(
        170.9, abs=0.05
    )


def test_transitions_by_hand(results):
    smac_args = {"meta_batch": 4, "rl_batch": 128, "context_batch": 64}
    assert plot.transitions(smac_args, 3_000) == pytest.approx((1.536, 0.768))
    macaw_args = {"meta_batch": 5, "rl_batch": 256, "context_batch": 100}
    assert plot.transitions(macaw_args, 1_000) == pytest.approx((1.28, 0.5))
    borel_args = {"env_id": "PointDirection", "dataset": None, "meta_batch": 16, "rl_batch": 128}
    borel_args |= {"vae_steps": 1_000, "vae_tasks": 4, "vae_trajectories": 2}
    # The data have 50 x 6 trajectories of 50 steps, hence 150 in three; 2,000 of the 3,000 steps are SAC's
    assert plot.transitions(borel_args, 3_000) == pytest.approx((4.096, 1.2))
    assert plot.transitions(borel_args, 500) == pytest.approx((0, 0.6))


def test_figures_are_whole_where_runs_are_missing(results, monkeypatch):
    for seed, last in ((1, 300.0), (2, 310.0)):
        rows = [(10, 0, 100.0), (20, 50, last)]
        write_run(results / "short" / "HopperParam", "smac", seed, rows, env_id="HopperParam")
    write_run(
        results / "short" / "HopperParam", "meta_bc", 1, [(10, 0, 80.0)], env_id="HopperParam"
    )
    write_run(
        results / "short" / "WalkerParam",
        "pearl",
        1,
        [(5, 900, 10.0), (10, 999, 20.0)],
        env_id="WalkerParam",
    )
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    for name, panels in (("figure5", 6), ("figure7", 3), ("figure9", 1)):
        plot.main(name)
        figure = figures[-1]
        assert (results / f"{name}.png").stat().st_size > 10_000 and len(figure.axes) == panels
        drawn = {axis.get_title(): axis for axis in figure.axes if not axis.texts}
        assert all(axis.texts[0].get_text() == "no run yet" for axis in figure.axes if axis.texts)
        assert [*drawn] == {
            "figure5": ["HopperParam", "WalkerParam"],
            "figure7": ["HopperParam"],
        }.get(name, [])
        if name == "figure5":
            words = [text.get_text() for text in figure.legends[0].get_texts()]
            phases = ["the data", "self-supervised phase"]
            assert words == ["SMAC", "meta behaviour cloning", "Online Oracle (PEARL)", *phases]
            smac_line, extension = drawn["HopperParam"].lines[0], drawn["HopperParam"].lines[2]
            assert smac_line.get_color() == plot.METHODS["smac"][1] and [
                *smac_line.get_ydata()
            ] == [100, 305]
            assert [*extension.get_xdata()] == [10, 20] and [*extension.get_ydata()] == [80, 80]
            assert (
                drawn["HopperParam"].get_ylim()[1] < 350
            )  # not 305 + 12.7 * 5, where the band ends


def test_glance_has_a_row_for_each_environment(results):
    row = "| {} | {} | {} ± 0.5 | {} ± 0.5 | 5.0 ± 0.5 | 9.0 ± 0.5 |\n"
    ant = [(10, 0, 1.0), (20, 9_000, 3.0)]
    for seed in (1, 2):
        write_run(results / "short" / "AntDirection", "smac", seed, ant, env_id="AntDirection")
        write_run(results / "ant_small", "smac", seed, ant, env_id="AntDirection")
        write_run(results / "point_direction", "smac", seed, [(10, 0, 1.0), (20, 9_000, 3.0)])
    for label, value in (
        ("macaw", 1.0),
        ("macaw_matched", 2.0),
        ("borel", 4.0),
        ("borel_matched", 3.0),
    ):
        write_run(results / "point_direction", label, 1, [(10, 0, value)])
    common = [row.format(f"{folder}/smac{suffix}/A__1", 20, own, 1.0) for suffix, own in (("", 7.0), ("_q", 70.0))
              for folder in ("ant_small", "short/AntDirection")]  # fmt: skip
    common.append(row.format("point_direction/smac/P__1", 20, 70.0, 70.0))
    (results / "adaptation.md").write_text(
        "| run | gradient step | own context | prior |\n" + "".join(common)
    )
    own = [row.format("x/smac/P__1", 20, 2.0, 1.0), row.format("x/smac/P__2", 20, 3.0, 0.0)]
    own += [row.format("x/smac/P__1", 10, 70.0, 70.0), row.format("x/meta_bc/P__1", 20, 70.0, 70.0)]
    (results / "point_direction" / "adaptation.md").write_text("".join(own))
    plot.main("glance")
    rows = [
        line for line in (results / "glance.md").read_text().splitlines() if line.startswith("| ")
    ][2:]
    rows = {
        cells[0]: cells[1:]
        for cells in ([cell.strip() for cell in line[1:-1].split("|")] for line in rows)
    }
    assert [*rows] == [*plot.LARGER, plot.SCENES, "PointDirection"] and len(plot.DOMAINS) == 6
    assert rows["WalkerParam"] == [""] * 9
    phases = [
        "1.0 ± 0.0 (2; 0.01k)",
        "3.0 ± 0.0 (2; 0.02k; 9k)",
    ]  # seeds, gradient steps, new transitions
    assert rows["AntDirection"][1:] == [*phases, "", "", "", "", "", "7.0 / 1.0 / 5.0 (1)"]
    rivals = ["2.0 (1; 0.01k)", "4.0 (1; 0.01k)"]
    assert rows["PointDirection"] == [
        "2.3 (15k)",
        *phases,
        "",
        "",
        *rivals,
        "",
        "2.5 / 0.5 / 5.0 (2)",
    ]
    plot.main("larger")
    (line,) = [
        line for line in (results / "larger.md").read_text().splitlines() if line.startswith("| ")
    ][2:]
    assert [cell.strip() for cell in line[1:-1].split("|")] == [
        "AntDirection",
        *rows["AntDirection"],
    ]


def test_the_table_of_the_short_preset_by_hand(results, monkeypatch):
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    for seed, offline, ends in ((1, 3.0, (90.0, 4.0, 5.0, 9.0)), (2, 5.0, (90.0, 6.0, 7.0, 2.0))):
        rows = [(10, 0, 1.0), (20, 0, offline)] + [
            (30 + 10 * i, 9 * i + 9, end) for i, end in enumerate(ends)
        ]
        write_run(results / "short" / "PointDirection", "smac", seed, rows)
    hopper = [(10, 0, 70.0), (20, 0, 80.0), (30, 9, 75.0)]
    write_run(results / "short" / "HopperParam", "smac", 1, hopper, env_id="HopperParam")
    walker = dict(env_id="WalkerParam", dataset="datasets/none.npz")
    write_run(
        results / "short" / "WalkerParam", "smac", 1, [(10, 0, 7.0), (20, 0, 8.0)], **walker
    )  # goes on
    times = (
        ("PointDirection seed 1", 3.0),
        ("PointDirection seed 2", 8.6),
        ("HopperParam seed 1", 26),
    )
    times = ((run.replace(" ", " smac ", 1), minutes) for run, minutes in times)
    lines = [f"short/{run}: {minutes} minutes of processor time" for run, minutes in times]
    lines.append("short/WalkerParam smac seed 1: 99 minutes")  # by the clock
    (results / "short" / "times.txt").write_text("\n".join(lines))
    plot.main("short")
    note, table = (results / "short" / "table.md").read_text().split("\n\n")
    assert "95 % interval" in note and "last three evaluations" in note
    head, _, *rows = table.splitlines()
    assert (
        head
        == "| environment | data | after the offline phase | at the end | gain in each seed | minutes |"
    )
    # Point: 3 and 5, then (4 + 5 + 9) / 3 = 6 and (6 + 7 + 2) / 3 = 5; 12.706 * sqrt(2) / sqrt(2), and half of it
    assert rows == [
        "| HopperParam | 170.9 | 80.0 (1) | 75.0 (1) | -5.0 | 26 |",
        "| WalkerParam |  | 8.0 (1) |  |  |  |",
        "| PointDirection | 2.3 | 4.0 ± 12.7 (2) | 5.5 ± 6.4 (2) | +3.0, +0.0 | 6 |",
    ]
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == [
        "HopperParam",
        "WalkerParam",
        "PointDirection",
    ]
    for axes, phase in zip(figure.axes, ([20, 30], None, [20, 60])):
        shaded = [patch for patch in axes.patches if patch.get_label() == "self-supervised phase"]
        assert [[patch.get_x(), patch.get_x() + patch.get_width()] for patch in shaded] == (
            [phase] if phase else []
        )
    assert [*figure.axes[2].lines[0].get_ydata()] == [1, 4, 90, 5, 6, 5.5]
    assert (results / "short" / "curve.png").stat().st_size > 10_000


def test_a_colour_means_one_thing():
    assert len({colour for _, colour in plot.METHODS.values()}) == len(plot.METHODS)
    drawn = {label for labels in plot.PANELS.values() for label in labels.split()}
    labels = {label for runs in run.BENCHMARKS.values() for label in runs}
    assert drawn == set(plot.METHODS) >= labels


def test_gpu_compares_recorded_plain_and_resumed_runs(tmp_path, monkeypatch):
    """On the CPU, where nothing is recorded and all three end alike."""
    sizes = dict(
        policy_hidden=(8,), encoder_hidden=(8,), decoder_hidden=(8,), rl_batch=8, context_batch=8
    )
    phases = {gpu.meta_bc: {"offline": lambda steps: dict(offline_steps=steps) | sizes}}
    monkeypatch.setattr(gpu, "PHASES", phases)
    gpu.main(gpu.Args("cpu", "PointDirection", steps=5, file=tmp_path / "gpu.md"))
    (row,) = [
        line.split(" | ")
        for line in (tmp_path / "gpu.md").read_text().splitlines()
        if "meta_bc" in line
    ]
    assert float(row[2]) > 0 and float(row[3]) > 0 and row[5:] == ["0.0e+00", "0.0e+00 |"]
    assert gpu.apart({"a": np.array([2.0, 4.0])}, {"a": np.array([2.0, 3.0])}) == 0.25

"""A run of each script: what it leaves in its folder, and that a stopped one goes on as if nothing had happened."""

import dataclasses
import errno
import fcntl
import functools
import json
import os
import shlex
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import signed
import small
from signed import RUNS, load, run_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import borel
import buffers
import envs
import focal
import macaw
import meta_bc
import pearl_online_oracle as pearl
import smac_offline_online as smac
from benchmark.robustness import kill
from benchmark.robustness.hostile import write
from buffers import InputError
from plumbing.files import table_text
from plumbing.flags import PATHS, check_flags, parse_args, preset
from plumbing.pictures import draw_summary  # before a fixture replaces it

SMALL = pytest.mark.usefixtures("small")  # runs on PointDirection, see small.py
SCRIPTS = ("smac", "pearl", "meta_bc", "focal", "macaw", "borel")
ENDS = {
    "smac": [4, 13],
    "borel": [6, 13],
}  # gradient steps at the end of a phase; [9] in the others


@pytest.fixture(autouse=True)
def signed_family(request, monkeypatch):
    """The family, small evaluations, a point of the loss curves every 4 steps."""
    if "small" in request.fixturenames:  # runs on PointDirection
        return
    small_evaluation = functools.partial(envs.make_evaluation, num_train=3, repeats=2)
    monkeypatch.setattr(envs, "make_evaluation", small_evaluation)
    monkeypatch.setattr("plumbing.run.LOG_EVERY", 4)
    signed.register(monkeypatch)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Folders of runs that nobody stopped, filled by `whole`."""
    return tmp_path_factory.mktemp("wholes"), {}


def whole(name, wholes):
    """Such a run: its folder, and the agent that it returned."""
    folder, agents = wholes
    if name not in agents:
        data = signed.save_data(folder / "data.npz")
        agents[name] = signed.start(name, folder / name, data)
    return run_of(name, folder / name), agents[name]


def curves(folder):
    """{(tag, gradient step): value} of TensorBoard's scalars, what was written last; how many points there are."""
    points, number = {}, 0
    for file in sorted(folder.glob("events*"), key=lambda file: int(file.name.split(".")[-1])):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for point in events.Scalars(tag):
                points[tag, point.step] = point.value if tag != "train/SPS" else "the machine's"
                number += 1
    return points, number


def same_arrays(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name])
        for name in one
    )


def assert_equal_runs(one, other, points_twice=False):
    """Parameters, moments, buffer, generators, counts and averages, table, curves, figures and agents."""
    assert same_arrays(load(one), load(other))
    assert (one / "eval.csv").read_bytes() == (other / "eval.csv").read_bytes()
    (expected, number), (found, found_number) = curves(one), curves(other)
    assert expected == found and number == len(expected)
    assert found_number > number if points_twice else found_number == number
    files = sorted(file.name for file in one.glob("*_*.npz"))
    assert files == sorted(file.name for file in other.glob("*_*.npz")) and files
    for file in files:
        with np.load(one / file) as a, np.load(other / file) as b:
            assert same_arrays(dict(a), dict(b)), file


def interrupt(monkeypatch, script, step, *signals):
    """Send signals to this process during gradient step number `step`; returns how to take that back."""
    calls, functions = (
        [],
        {name: getattr(script, name) for name in ("update", "update_vae") if hasattr(script, name)},
    )

    def send_before(update):
        def call(*args, **kwargs):
            calls.append(1)
            for number in signals if len(calls) == step else ():
                os.kill(os.getpid(), number)
            return update(*args, **kwargs)

        return call

    for name, function in functions.items():
        monkeypatch.setattr(script, name, send_before(function))
    return lambda: [
        monkeypatch.setattr(script, name, function) for name, function in functions.items()
    ]


# ----- What a run leaves


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_leaves_its_flags_table_curves_agents_figures_and_picture(name, wholes):
    run, agent = whole(name, wholes)
    ends = ENDS.get(name, [9])
    expected = ["args.json", "checkpoint.npz", "eval.csv", "summary.png"]
    expected += [f"{kind}_{end}.npz" for end in ends for kind in ("agent", "figures")]
    (events,) = run.glob("events*")
    assert sorted(file.name for file in run.iterdir()) == sorted([*expected, events.name])

    flags = json.loads((run / "args.json").read_text())
    added = {"precision", "versions", "threads", "dataset_sha256", "commit"}  # to the flags
    own = {key: value for key, value in flags.items() if key not in added}
    assert own["env_id"] == "Signed" and own["eval_every"] == 5
    assert flags["versions"].keys() >= {"python", "torch", "cpu"} and flags["precision"] in (
        "medium",
        "highest",
    )
    with np.load(run / f"agent_{ends[-1]}.npz") as file:
        last = dict(file)
    assert json.loads(str(last.pop("flags"))) == {k: v for k, v in own.items() if k not in PATHS}
    assert str(last.pop("script")) == RUNS[name][0].__name__ and "test (own context)" in str(
        last.pop("returns")
    )
    assert same_arrays(last, {key: value.numpy() for key, value in agent.state_dict().items()})
    checkpoint = load(run)
    assert same_arrays(
        last, {key[6:]: value for key, value in checkpoint.items() if key.startswith("agent/")}
    )
    assert (
        checkpoint["step"] == ends[-1]
        and table_text(checkpoint["evaluations"]).encode() == (run / "eval.csv").read_bytes()
    )

    titles = [axes.get_title() for axes in draw_summary(run, checkpoint["evaluations"]).axes]
    panels = [title for title in titles if title.startswith("after")]
    assert panels == [f"after {end} gradient steps" for end in ends for _ in range(2)]
    (points, _), kls = (
        curves(run),
        {"kl_test_own_context", "kl_train_own_context", "kl_train_offline_context"},
    )
    with np.load(run / f"figures_{ends[-1]}.npz") as file:
        arrays = dict(file)
    assert arrays.keys() == {
        "macaw": set(),
        "focal": set(),
        "pearl": kls - {"kl_train_offline_context"},
    }.get(name, kls)
    for tag, values in arrays.items():  # of each environment: three tasks, twice each
        assert values.shape == (6,) and values.mean() == pytest.approx(
            points[f"eval/{tag}", ends[-1]], rel=1e-5
        )
    # Means of the losses: every 4 steps, and at each evaluation
    logged = sorted(step for tag, step in points if tag == "losses/actor")
    steps = {"smac": [4, 5, 8, 10, 12, 13], "pearl": [4, 5, 8, 9], "borel": [8, 10, 12, 13]}
    assert logged == steps.get(name, [4, 5, 8, 9])


def test_the_agent_of_the_first_phase_is_kept(wholes, tmp_path, monkeypatch):
    run, agent = whole("smac", wholes)
    undo = interrupt(monkeypatch, RUNS["smac"][0], 4, signal.SIGTERM)
    with pytest.raises(SystemExit):
        signed.start("smac", tmp_path, signed.save_data(tmp_path / "data.npz"))
    undo()
    then = {k[6:]: v for k, v in load(run_of("smac", tmp_path)).items() if k.startswith("agent/")}
    with np.load(run / "agent_4.npz") as file:
        assert same_arrays({k: v for k, v in file.items() if k in then}, then)
        assert not np.array_equal(
            file["policy.net.0.weight"], agent.state_dict()["policy.net.0.weight"]
        )


# ----- Stop and resume


STOPS = [("smac", step) for step in (2, 4, 5, 7)] + [("pearl", step) for step in (3, 5)]
STOPS += [("meta_bc", 7), ("focal", 6), ("macaw", 6)] + [("borel", step) for step in (3, 6, 9)]


@pytest.mark.parametrize("name, step", STOPS)
def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(
    name, step, wholes, tmp_path, monkeypatch
):
    run, folder = whole(name, wholes)[0], run_of(name, tmp_path)
    data, number = (
        signed.save_data(tmp_path / "data.npz"),
        signal.SIGINT if step % 2 else signal.SIGTERM,
    )
    undo = interrupt(monkeypatch, RUNS[name][0], step, number)
    with pytest.raises(
        SystemExit, match=f"^stopped after step {step}; continue with: .* --resume {folder}"
    ) as stop:
        signed.start(name, tmp_path, data)
    assert str(stop.value).count("\n") == 0 and load(folder)["step"] == step
    undo()
    signed.resume(name, tmp_path, data)
    assert_equal_runs(run, folder)


@pytest.mark.parametrize("name, number", [("smac", 1), ("smac", 3), ("pearl", 1), ("borel", 1)])
def test_a_signal_during_an_evaluation_loses_nothing(name, number, wholes, tmp_path, monkeypatch):
    run, script, calls = whole(name, wholes)[0], RUNS[name][0], []
    data, evaluate = signed.save_data(tmp_path / "data.npz"), script.evaluate

    def evaluate_and_stop(*args):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(script, "evaluate", evaluate_and_stop)
    with pytest.raises(SystemExit, match="stopped after step"):
        signed.start(name, tmp_path, data)
    monkeypatch.setattr(script, "evaluate", evaluate)
    signed.resume(name, tmp_path, data)
    assert_equal_runs(run, run_of(name, tmp_path))


@pytest.mark.parametrize("name", ["smac", "pearl"])
def test_what_came_after_the_last_checkpoint_is_made_again(name, wholes, tmp_path, monkeypatch):
    """As if the machine had failed after an evaluation, before its checkpoint was written."""
    run, folder, save, calls = whole(name, wholes)[0], run_of(name, tmp_path), buffers.Run.save, []
    data = signed.save_data(tmp_path / "data.npz")

    def fail(self):
        calls.append(self.step)
        if len(calls) == 2:
            raise RuntimeError("power failure")
        save(self)

    monkeypatch.setattr(buffers.Run, "save", fail)
    with pytest.raises(RuntimeError, match="power failure"):
        signed.start(name, tmp_path, data)
    monkeypatch.setattr(buffers.Run, "save", save)
    assert load(folder)["step"] == calls[0] < calls[1]
    assert (folder / "eval.csv").read_text().splitlines()[-1].startswith(f"{calls[1]},")
    signed.resume(name, tmp_path, data)
    assert_equal_runs(run, folder, points_twice=True)


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    data, folder = signed.save_data(tmp_path / "data.npz"), run_of("smac", tmp_path)
    undo = interrupt(monkeypatch, RUNS["smac"][0], 6, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signed.start("smac", tmp_path, data)
    undo()
    assert load(folder)["step"] == 5  # of the evaluation
    signed.resume("smac", tmp_path, data)
    assert load(folder)["step"] == 13


def test_a_run_is_resumed_in_another_place_with_data_that_were_moved(wholes, tmp_path, monkeypatch):
    run = whole("smac", wholes)[0]
    undo = interrupt(monkeypatch, RUNS["smac"][0], 7, signal.SIGTERM)
    (tmp_path / "before").mkdir()
    data = signed.save_data(tmp_path / "before" / "data.npz")
    with pytest.raises(SystemExit):
        signed.start("smac", tmp_path / "before", data)
    undo()
    shutil.move(tmp_path / "before", tmp_path / "after")
    signed.resume("smac", tmp_path / "after", tmp_path / "after" / "data.npz")
    assert_equal_runs(run, run_of("smac", tmp_path / "after"))


# ----- NaN at an evaluation


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_evaluation_that_is_not_finite_stops_the_run_with_one_sentence(
    name, tmp_path, monkeypatch
):
    """At the second evaluation, so that the checkpoint of the first one is there to go on from."""
    folder, pay, calls, script = run_of(name, tmp_path), signed.Signed.pay, [], RUNS[name][0]
    data, evaluate = signed.save_data(tmp_path / "data.npz"), script.evaluate

    def count(*args):
        calls.append(1)
        return evaluate(*args)

    monkeypatch.setattr(script, "evaluate", count)
    broken = staticmethod(
        lambda env: float("nan") if env.evaluating and len(calls) == 2 else pay(env)
    )
    monkeypatch.setattr(signed.Signed, "pay", broken)
    first, second = {"smac": (4, 5), "borel": (6, 10)}.get(name, (5, 9))
    # The NaN reward is in the context, hence in z and in the actions
    message = "^the test return, the exploration return, an observation or action became NaN or infinite at the "
    message += f"evaluation after step {second} of {folder}; continue with: "
    with pytest.raises(buffers.InputError, match=message) as error:
        signed.start(name, tmp_path, data)
    assert str(error.value).count("\n") == 0 and load(folder)["step"] == first
    assert (folder / "eval.csv").read_bytes() == table_text(
        load(folder)["evaluations"]
    ).encode()  # nothing of it was written


# ----- Stopped at any moment


@SMALL
@pytest.mark.parametrize(
    "script, number, method", [(smac, signal.SIGINT, "log"), (borel, signal.SIGTERM, "write")]
)
def test_a_stopped_run_goes_on_by_the_pasted_command(
    script, whole, dataset, tmp_path, monkeypatch, number, method
):
    """In a step, or in an evaluation; the command holds for another working directory, and the curves stay the same."""
    (tmp_path / "one place").mkdir()
    (tmp_path / "another").mkdir()
    monkeypatch.chdir(tmp_path / "one place")
    shutil.copy(dataset, "d.npz")
    with monkeypatch.context() as patch:
        small.call_at(
            patch, method, 11 if method == "log" else 9, functools.partial(small.send, number)
        )
        with pytest.raises(
            SystemExit, match=f"stopped after step {12 if method == 'log' else 10}; "
        ) as ended:
            small.start(script, "d.npz", "my runs")
    run = small.directory(script, tmp_path / "one place" / "my runs")
    assert small.read(run) == (12 if method == "log" else 10)
    monkeypatch.chdir(tmp_path / "another")
    file, words = small.pasted(str(ended.value))
    assert file == Path(script.__file__)
    script.main(parse_args(script.Args, script.PRESETS, words))
    assert os.listdir() == []
    small.assert_equal_runs(whole(script), run)


@SMALL
def test_the_command_of_a_family_of_ones_own_goes_where_its_module_is(tmp_path, monkeypatch):
    """Without starting a run, of which no more is needed."""
    run = object.__new__(buffers.Run)
    run.args, run.script = (
        smac.Args(env_id="mine:Mine", dataset="d's.npz"),
        Path("/a folder/smac.py"),
    )
    run.home, run.folder = str(tmp_path), tmp_path / "runs"
    monkeypatch.chdir("/")  # as an environment may
    command = f"cd {tmp_path} && python '/a folder/smac.py' --resume {tmp_path}/runs --env-id mine:Mine --dataset "
    assert run.command() == command + shlex.quote(f"{tmp_path}/d's.npz")


@SMALL
def test_a_stop_before_the_first_step(dataset, tmp_path, monkeypatch):
    """PEARL collects data then."""
    collect = pearl.collect
    monkeypatch.setattr(
        pearl,
        "collect",
        lambda *args, **flags: small.send(signal.SIGTERM) or collect(*args, **flags),
    )
    with pytest.raises(
        SystemExit, match="stopped before the first gradient step; there is no checkpoint yet"
    ):
        small.start(pearl, dataset, tmp_path)


@SMALL
def test_the_hangup_of_a_terminal_stops_a_run_unless_it_is_ignored(dataset, tmp_path, monkeypatch):
    small.call_at(monkeypatch, "log", 2, functools.partial(small.send, signal.SIGHUP))
    with pytest.raises(SystemExit, match="stopped after step 3"):
        small.start(meta_bc, dataset, tmp_path / "a")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert small.read(small.start(meta_bc, dataset, tmp_path / "b")) == 13
    finally:
        signal.signal(signal.SIGHUP, before)


@SMALL
def test_killed_runs_end_like_runs_that_were_never_killed(tmp_path, monkeypatch):
    """SIGKILL at seeded random moments, some within the write of a checkpoint."""
    flags = kill.FLAGS["smac_offline_online"].replace("--offline-steps 60", "--offline-steps 20")
    monkeypatch.setitem(
        kill.FLAGS, "smac_offline_online", flags.replace("-per-iteration 40", "-per-iteration 20")
    )
    kill.main(  # which exits if a run differs
        kill.Args(kills=(3, 0, 0, 0, 0, 0), threads=(1,), seed=3, out=str(tmp_path / "kill.md"))
    )
    rows = [
        line
        for line in (tmp_path / "kill.md").read_text().splitlines()
        if line.startswith("|") and ".py" in line
    ]
    assert sum(int(row.split("|")[-2]) for row in rows) == 3


@SMALL
def test_curves_are_compared_in_the_order_of_writing(whole, dataset, tmp_path, monkeypatch):
    """The names of TensorBoard's files tell it to a second only: short runs are resumed within one."""
    run = small.stopped(meta_bc, dataset, tmp_path, monkeypatch)
    (first,) = run.glob("events.*")
    first.rename(run / "events.out.tfevents.9999999999.later")
    small.resume(meta_bc, dataset, run)
    small.assert_equal_runs(whole(meta_bc), run)


def spoil_table(file, how):
    """Leave other bytes in its place, or a FIFO, or nothing."""
    file.unlink()
    if how == "no text":
        file.write_bytes(bytes(range(256)))
    if how == "a FIFO":
        os.mkfifo(file)


SPOILED = ["no text", "deleted"]
NOT_REPLACED = ["a FIFO"]


@SMALL
@pytest.mark.parametrize("how", [*SPOILED, *NOT_REPLACED])
def test_what_becomes_of_eval_csv_does_not_harm_a_run(how, whole, dataset, tmp_path, monkeypatch):
    """Between two evaluations of a run that is stopped after both, and before it is resumed."""
    file = small.directory(meta_bc, tmp_path) / "eval.csv"
    with monkeypatch.context() as patch:
        small.call_at(patch, "log", 6, functools.partial(spoil_table, file, how))
        small.call_at(patch, "log", 10, functools.partial(small.send, signal.SIGTERM))
        with pytest.raises(SystemExit, match="stopped after step 11"):
            small.start(meta_bc, dataset, tmp_path)
    if how in SPOILED:
        assert table_text(small.read(file.parent, "evaluations")).encode() == file.read_bytes()
        spoil_table(file, how)
    small.resume(meta_bc, dataset, file.parent)
    if how == "a FIFO":
        file.unlink()
    if how in NOT_REPLACED:
        small.resume(meta_bc, dataset, file.parent)  # at its end: writes the table again
    small.assert_equal_runs(whole(meta_bc), file.parent)


@SMALL
def test_a_table_of_any_length_is_resumed(dataset, tmp_path, monkeypatch):
    """1,000 tasks in each of 130 evaluations: more than 4 MB as text."""
    run = small.stopped(meta_bc, dataset, tmp_path, monkeypatch)
    with np.load(run / "checkpoint.npz") as file:
        arrays = dict(file)
    (row,) = arrays["evaluations"][:1]
    arrays["evaluations"] = np.tile(row, (130_000, 1))
    arrays["evaluations"][:, 4] = np.arange(130_000)
    arrays["evaluations"][:, 5] = 1 / 3
    write(run / "checkpoint.npz", arrays)
    small.resume(meta_bc, dataset, run)
    lines = (run / "eval.csv").read_text().splitlines()
    assert len("".join(lines)) > 4 << 20 and lines[130_000].split(",")[4] == "129999"
    np.testing.assert_array_equal(small.read(run, "evaluations")[:130_000], arrays["evaluations"])


@SMALL
@pytest.mark.parametrize("script", [meta_bc, macaw, borel, smac])
def test_a_run_without_second_phase_is_extended(script, dataset, tmp_path):
    """It equals one that was as long from the start, but for the evaluation at its first end."""
    only = dict(online_iterations=0) if script is smac else {}
    steps = small.RUNS[script]["offline_steps"]
    run = small.start(script, dataset, tmp_path / "a", **only)
    small.resume(script, dataset, run, "--offline-steps", str(steps + 3))
    longer = small.start(script, dataset, tmp_path / "b", **only, offline_steps=steps + 3)
    one, other = load(run), load(longer)
    assert one["step"] == other["step"] and one.keys() == other.keys()
    free = {"flags", "evaluations", "summed"}
    for name in one.keys() - free:
        assert np.array_equal(one[name], other[name]) or name.startswith("totals/"), name
    for row in other["evaluations"].tolist():
        assert row in one["evaluations"].tolist()
    with pytest.raises(
        InputError, match=f"--offline-steps is {steps + 3} .* cannot become {steps}"
    ):
        small.resume(script, dataset, run, "--offline-steps", str(steps))


@SMALL
def test_the_first_phase_of_two_stays_as_long_as_it_was(dataset, tmp_path, monkeypatch):
    run = small.stopped(smac, dataset, tmp_path, monkeypatch)
    with pytest.raises(InputError, match="--offline-steps is 8 in the run to resume and cannot"):
        small.resume(smac, dataset, run, "--offline-steps", "20")


@SMALL
def test_a_link_in_the_place_of_a_file_of_a_run_is_not_followed(dataset, tmp_path, monkeypatch):
    run, target = small.stopped(meta_bc, dataset, tmp_path, monkeypatch), tmp_path / "target"
    target.write_bytes(b"precious")
    for name in ("eval.csv", "eval.csv.tmp", "checkpoint.npz.tmp"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(target)
    small.resume(meta_bc, dataset, run)
    assert small.read(run) == 13 and not (run / "checkpoint.npz.tmp").exists()
    for name in ("summary.png", "args.json"):
        (run / name).unlink()
        (run / name).symlink_to(target)
        with pytest.raises(InputError, match=name):
            small.resume(meta_bc, dataset, run)
        (run / name).unlink()
    assert target.read_bytes() == b"precious"


@SMALL
def test_args_json_is_whole_after_a_resume_with_shorter_flags(whole, dataset, tmp_path):
    run = shutil.copytree(whole(meta_bc), tmp_path / "run")
    (run / "args.json").write_text("x" * 10_000)
    small.resume(meta_bc, dataset, run)
    flags = json.loads((run / "args.json").read_text())
    assert (
        flags["resume"] == str(run) and flags["offline_steps"] == 13 and "cpu" in flags["versions"]
    )


# ----- Which data, which folder


@SMALL
@pytest.mark.parametrize("script", [smac, meta_bc, focal, macaw, borel])  # PEARL has no dataset
def test_another_dataset_is_refused_and_the_same_one_elsewhere_is_taken(
    script, dataset, tmp_path, monkeypatch
):
    with np.load(dataset) as file:
        arrays = dict(file)
    write(tmp_path / "same.npz", arrays)  # other bytes, the same content
    others = {
        "test_tasks": arrays["test_tasks"][::-1], "train_tasks": arrays["train_tasks"][[1, 0, 2, 3]],
        "rl_tasks": (arrays["rl_tasks"] + 1) % 4, "encoder_rewards": arrays["encoder_rewards"] + 1,
        "rl_obs": arrays["rl_obs"] + np.float32(1e-3),
    }  # fmt: skip
    fewer = {
        name: arrays[name] % 3 for name in ("rl_tasks", "encoder_tasks")
    }  # of which no size fits
    others = [{name: array} for name, array in others.items()] + [
        fewer | {"train_tasks": arrays["train_tasks"][:3]}
    ]
    if script is not meta_bc:  # the hash is the same for all: what it covers is tried with one
        others = others[:1]
    run = small.stopped(script, dataset, tmp_path, monkeypatch)
    before = small.snapshot(run)
    for other in others:
        write(tmp_path / "other.npz", arrays | other)
        words = small.refusal(small.resume, script, tmp_path / "other.npz", run)
        assert (
            words
            == f"the data of {run} are others than in this dataset: name theirs with --dataset"
        ), list(other)
    with pytest.raises(InputError, match="there is no dataset at"):
        small.resume(script, tmp_path / "nothing.npz", run)
    with pytest.raises(InputError, match="--seed is 1 in the run to resume and cannot become 2"):
        small.resume(script, dataset, run, "--seed", "2")
    assert small.snapshot(run) == before
    small.resume(script, tmp_path / "same.npz", run)
    assert small.read(run) >= 13


@SMALL
def test_files_to_write_and_to_read_are_named_by_the_command_line_alone(
    dataset, tmp_path, monkeypatch
):
    target = tmp_path / "precious.npz"
    target.write_bytes(b"precious")
    run = small.stopped(pearl, dataset, tmp_path, monkeypatch, dataset_iteration=2)
    with np.load(run / "checkpoint.npz") as file:
        arrays = dict(file)
    flags = json.loads(arrays["flags"].item())
    assert not {"save_dataset", "dataset", "run_dir", "resume"} & flags.keys()
    arrays["flags"] = np.array(
        json.dumps(flags | dict(save_dataset=str(target), run_dir=str(tmp_path / "elsewhere")))
    )
    write(run / "checkpoint.npz", arrays)
    small.resume(pearl, dataset, run)
    assert (
        small.read(run) == 15
        and target.read_bytes() == b"precious"
        and not (tmp_path / "elsewhere").exists()
    )


@SMALL
def test_a_dataset_that_the_command_line_names_is_written_after_a_resume(
    dataset, tmp_path, monkeypatch
):
    small.call_at(monkeypatch, "log", 6, functools.partial(small.send, signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        small.start(
            pearl, dataset, tmp_path, dataset_iteration=2, save_dataset=str(tmp_path / "d.npz")
        )
    monkeypatch.undo()
    _, words = small.pasted(str(ended.value))
    assert words[2:] == ["--save-dataset", str(tmp_path / "d.npz")]


@SMALL
def test_a_dataset_that_can_not_be_saved_is_found_out_at_once(tmp_path):
    args = preset(pearl.Args, pearl.PRESETS, "PointDirection")
    for place in ("", "nowhere/d.npz"):
        file = str(tmp_path / place)
        words = small.refusal(check_flags, dataclasses.replace(args, save_dataset=file))
        assert words.startswith(f"--save-dataset {tmp_path / place} is ")
    check_flags(dataclasses.replace(args, save_dataset=str(tmp_path / "d.npz")))


@SMALL
def test_only_one_process_at_a_time_writes_to_a_run(whole, dataset, tmp_path):
    run = shutil.copytree(whole(meta_bc), tmp_path / "run")
    before, again = small.snapshot(run), functools.partial(small.resume, meta_bc, dataset, run)
    with open(run / "args.json", "r+") as file:  # until this process closes the file, in any way
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert (
            small.forked(again)[0]
            == f"InputError: another process writes to {run}, or another run of this one"
        )
    assert small.snapshot(run) == before
    assert small.forked(again)[0] == "nothing"
    assert small.forked(again)[0] == "nothing"  # the last one ended without a close


@SMALL
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(
    dataset, tmp_path, monkeypatch, capsys, number
):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    run = small.start(meta_bc, dataset, tmp_path)
    assert small.read(run) == 13
    warning = f"warning: {run} cannot be locked: start no second process with it\n"
    assert capsys.readouterr().err.startswith(warning)


@SMALL
def test_a_run_closes_its_files_and_threads(dataset, tmp_path):
    counts = []
    for i in range(3):
        small.start(meta_bc, dataset, tmp_path / str(i))
        counts.append((len(os.listdir("/dev/fd")), threading.active_count()))
    assert counts[1] == counts[2]

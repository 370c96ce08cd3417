"""A run of each script: what it leaves in its folder, and that a stopped one goes on as if nothing had happened."""

import functools
import json
import os
import shutil
import signal

import matplotlib.image
import numpy as np
import pytest
import signed
from matplotlib.figure import Figure
from signed import RUNS, load, run_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import buffers
import envs
from plumbing.files import table_text
from plumbing.flags import PATHS

SCRIPTS = ("smac", "pearl", "meta_bc", "macaw", "borel")
ENDS = {"smac": [4, 13], "borel": [6, 13]}  # gradient steps at the end of a phase; [9] in the others


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The family, small evaluations, a point of the loss curves every 4 steps."""
    monkeypatch.setattr(envs, "make_evaluation", functools.partial(envs.make_evaluation, num_train=3, repeats=2))
    monkeypatch.setattr("plumbing.run.LOG_EVERY", 4)
    signed.register(monkeypatch)


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr("plumbing.pictures.draw_summary", lambda *_: Figure(figsize=(1, 1)))


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
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
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
    calls, functions = [], {name: getattr(script, name) for name in ("update", "update_vae") if hasattr(script, name)}

    def send_before(update):
        def call(*args, **kwargs):
            calls.append(1)
            for number in signals if len(calls) == step else ():
                os.kill(os.getpid(), number)
            return update(*args, **kwargs)

        return call

    for name, function in functions.items():
        monkeypatch.setattr(script, name, send_before(function))
    return lambda: [monkeypatch.setattr(script, name, function) for name, function in functions.items()]


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
    assert flags["versions"].keys() >= {"python", "torch", "cpu"} and flags["precision"] in ("medium", "highest")
    with np.load(run / f"agent_{ends[-1]}.npz") as file:
        last = dict(file)
    assert json.loads(str(last.pop("flags"))) == {k: v for k, v in own.items() if k not in PATHS}
    assert str(last.pop("script")) == RUNS[name][0].__name__ and "test (own context)" in str(last.pop("returns"))
    assert same_arrays(last, {key: value.numpy() for key, value in agent.state_dict().items()})
    checkpoint = load(run)
    assert same_arrays(last, {key[6:]: value for key, value in checkpoint.items() if key.startswith("agent/")})
    assert checkpoint["step"] == ends[-1] and table_text(checkpoint["evaluations"]).encode() == (run / "eval.csv").read_bytes()

    picture = matplotlib.image.imread(run / "summary.png")
    assert abs(len(picture) - 360 * len(ends)) < 40 and picture.std() > 0.01
    (points, _), kls = curves(run), {"kl_test_own_context", "kl_train_own_context", "kl_train_offline_context"}
    with np.load(run / f"figures_{ends[-1]}.npz") as file:
        arrays = dict(file)
    assert arrays.keys() == {"macaw": set(), "pearl": kls - {"kl_train_offline_context"}}.get(name, kls)
    for tag, values in arrays.items():  # of each environment: three tasks, twice each
        assert values.shape == (6,) and values.mean() == pytest.approx(points[f"eval/{tag}", ends[-1]], rel=1e-5)
    # Means of the losses: every 4 steps, and at each evaluation
    logged = sorted(step for tag, step in points if tag == "losses/actor")
    steps = {"smac": [4, 5, 8, 10, 12, 13], "pearl": [4, 5, 8, 9], "borel": [8, 10, 12, 13]}
    assert logged == steps.get(name, [4, 5, 8, 9])


def test_the_agent_of_the_first_phase_is_kept(wholes, tmp_path, monkeypatch, no_picture):
    run, agent = whole("smac", wholes)
    undo = interrupt(monkeypatch, RUNS["smac"][0], 4, signal.SIGTERM)
    with pytest.raises(SystemExit):
        signed.start("smac", tmp_path, signed.save_data(tmp_path / "data.npz"))
    undo()
    then = {k[6:]: v for k, v in load(run_of("smac", tmp_path)).items() if k.startswith("agent/")}
    with np.load(run / "agent_4.npz") as file:
        assert same_arrays({k: v for k, v in file.items() if k in then}, then)
        assert not np.array_equal(file["policy.net.0.weight"], agent.state_dict()["policy.net.0.weight"])


# ----- Stop and resume


STOPS = [("smac", step) for step in (2, 4, 5, 7, 9)] + [("pearl", step) for step in (1, 3, 5)]
STOPS += [("meta_bc", 7), ("macaw", 6)] + [("borel", step) for step in (3, 6, 9)]


@pytest.mark.parametrize("name, step", STOPS)
def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(name, step, wholes, tmp_path, monkeypatch, no_picture):
    run, folder = whole(name, wholes)[0], run_of(name, tmp_path)
    data, number = signed.save_data(tmp_path / "data.npz"), signal.SIGINT if step % 2 else signal.SIGTERM
    undo = interrupt(monkeypatch, RUNS[name][0], step, number)
    with pytest.raises(SystemExit, match=f"^stopped after step {step}; continue with: .* --resume {folder}") as stop:
        signed.start(name, tmp_path, data)
    assert str(stop.value).count("\n") == 0 and load(folder)["step"] == step
    undo()
    signed.resume(name, tmp_path, data)
    assert_equal_runs(run, folder)


@pytest.mark.parametrize("name, number", [("smac", 1), ("smac", 3), ("pearl", 1), ("borel", 1)])
def test_a_signal_during_an_evaluation_loses_nothing(name, number, wholes, tmp_path, monkeypatch, no_picture):
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
def test_what_came_after_the_last_checkpoint_is_made_again(name, wholes, tmp_path, monkeypatch, no_picture):
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


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch, no_picture):
    data, folder = signed.save_data(tmp_path / "data.npz"), run_of("smac", tmp_path)
    undo = interrupt(monkeypatch, RUNS["smac"][0], 6, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signed.start("smac", tmp_path, data)
    undo()
    assert load(folder)["step"] == 5  # of the evaluation
    signed.resume("smac", tmp_path, data)
    assert load(folder)["step"] == 13


def test_a_run_is_resumed_in_another_place_with_data_that_were_moved(wholes, tmp_path, monkeypatch, no_picture):
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
def test_an_evaluation_that_is_not_finite_stops_the_run_with_one_sentence(name, tmp_path, monkeypatch, no_picture):
    """At the second evaluation, so that the checkpoint of the first one is there to go on from."""
    folder, pay, calls, script = run_of(name, tmp_path), signed.Signed.pay, [], RUNS[name][0]
    data, evaluate = signed.save_data(tmp_path / "data.npz"), script.evaluate

    def count(*args):
        calls.append(1)
        return evaluate(*args)

    monkeypatch.setattr(script, "evaluate", count)
    broken = staticmethod(lambda env: float("nan") if env.evaluating and len(calls) == 2 else pay(env))
    monkeypatch.setattr(signed.Signed, "pay", broken)
    first, second = {"smac": (4, 5), "borel": (6, 10)}.get(name, (5, 9))
    # The NaN reward is in the context, hence in z and in the actions
    message = "^the test return, the exploration return, an observation or action became NaN or infinite at the "
    message += f"evaluation after step {second} of {folder}; continue with: "
    with pytest.raises(buffers.InputError, match=message) as error:
        signed.start(name, tmp_path, data)
    assert str(error.value).count("\n") == 0 and load(folder)["step"] == first
    assert (folder / "eval.csv").read_bytes() == table_text(load(folder)["evaluations"]).encode()  # nothing of it was written

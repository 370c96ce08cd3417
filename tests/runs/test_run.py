"""What a run says, logs and draws, and how it ends when something in it fails."""

import errno
import functools
import re
import signal
import sys
import types

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from small import ROOT, RUNS, call_at, directory, read, refusal, send, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import buffers
import envs
import meta_bc
import plumbing.run
import smac_offline_online as smac
from buffers import InputError
from plumbing.evaluation import rows_of
from plumbing.files import CSV_COLUMNS, check_table, table_text
from plumbing.flags import one_sentence
from plumbing.pictures import draw_tasks, returns_by_task
from plumbing.stopwatch import Stopwatch

pytestmark = pytest.mark.usefixtures("small")


def make_path(reward, steps=2):
    return {
        "obs": np.zeros((steps + 1, 4), np.float32),
        "actions": np.zeros((steps, 2), np.float32),
        "rewards": np.full(steps, reward, np.float32),
    }


def make_evaluation(*rewards, split="test", context="own"):
    """One task for each reward, twice: an episode of two steps, after two others that pay half."""
    tasks = [task for task in range(len(rewards)) for _ in range(2)]
    final = [make_path(rewards[task]) for task in tasks]
    exploration = [(make_path(rewards[task] / 2), make_path(rewards[task] / 2)) for task in tasks]
    return buffers.Evaluation(split, context, tasks, final, exploration)


def make_run(tmp_path, **flags):
    args = meta_bc.Args(env_id="PointDirection", run_dir=str(tmp_path), device="cpu", **flags)
    agent = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(agent.parameters())
    return buffers.Run(args, "a.py", agent=agent, optimizer=optimizer)


# ----- The table of evaluations


def test_rows_by_hand():
    evaluations = [
        make_evaluation(1 / 3, 2.0),
        make_evaluation(-4.0, split="train", context="offline"),
    ]
    rows = rows_of(evaluations, 100, 7)
    third = np.float32(0.6667)
    expected = [
        [100, 7, 0, 0, 0, third, np.float32(0.3333)],
        [100, 7, 0, 0, 1, 4, 2],
        [100, 7, 1, 1, 0, -8, -4],
    ]
    assert rows.tolist() == expected
    lines = table_text(rows).split("\r\n")
    assert lines == [
        "gradient_step,env_steps,split,context,task,return,exploration_return",
        "100,7,test,own,0,0.6667,0.3333",
        "100,7,test,own,1,4.0,2.0",
        "100,7,train,offline,0,-8.0,-4.0",
        "",
    ]


@pytest.mark.parametrize("reward", [1e30, 4e34, 8e37, -8e37])
def test_large_returns_stay_readable(reward, tmp_path):
    """Rounded to four places in float32 they would be infinite."""
    rows = rows_of([make_evaluation(reward)], 100, 0)
    check_table(rows)
    assert rows[0, 5] == pytest.approx(2 * reward, rel=1e-6)
    assert float(table_text(rows).split(",")[-2]) == pytest.approx(2 * reward, rel=1e-6)
    with make_run(tmp_path, eval_every=1) as run:
        for _ in run.steps(1, "offline"):
            run.write([make_evaluation(reward)], {})
    with make_run(tmp_path, eval_every=1, resume=str(run.folder)) as again:
        assert again.table.tolist() == rows_of([make_evaluation(reward)], 1, 0).tolist()


@pytest.mark.filterwarnings("error")  # one sentence, without warnings above it
@pytest.mark.parametrize("reward, words", [
    (2e38, "test return.* became NaN or infinite at the evaluation"),
    (np.float64(1e38), "its table of evaluations is none"),  # finite, and no float32
])  # fmt: skip
def test_returns_that_overflow_are_refused_before_anything_is_written(reward, words, tmp_path):
    run = make_run(tmp_path, eval_every=1)
    evaluation = make_evaluation(reward, reward)
    if isinstance(reward, np.float64):
        for path in evaluation.final:
            path["rewards"] = path["rewards"].astype(np.float64) * 4
    with pytest.raises(InputError, match=words):
        with run:
            for _ in run.steps(1, "offline"):
                run.write([evaluation], {})
    assert (run.folder / "eval.csv").read_text() == ",".join(CSV_COLUMNS) + "\n"


# ----- Pictures


def test_returns_by_task_by_hand():
    own, offline, test, train = 0, 1, 0, 1
    rows = np.array([
        [10, 0, test, own, 3, 1.0, 0], [10, 0, test, own, 5, 2.0, 0], [10, 0, train, own, 3, 9.0, 0],
        [10, 0, test, offline, 3, 9.0, 0], [20, 40, test, own, 5, 4.0, 0],
    ])  # fmt: skip
    tasks, steps, returns = returns_by_task(rows)
    assert tasks.tolist() == [3, 5] and steps.tolist() == [10, 20]
    np.testing.assert_array_equal(returns, [[1, np.nan], [2, 4]])
    axes = Figure().subplots()
    draw_tasks(axes, rows)
    np.testing.assert_array_equal(axes.images[0].get_array(), returns)
    (border,) = axes.lines  # between the last evaluation without new data and the first with some
    assert border.get_xdata() == [0.5, 0.5]
    axes = Figure().subplots()
    draw_tasks(axes, rows[:0])
    assert not axes.get_visible()


# ----- TensorBoard


def test_phases_and_flags_are_in_tensorboard(dataset, tmp_path):
    run = start(smac, dataset, tmp_path)
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    phases = [(point.step, point.value) for point in events.Scalars("train/phase")]
    assert phases == [(5, 1), (8, 1), (10, 2), (15, 2), (16, 2)]
    start_info = events.SummaryMetadata("_hparams_/session_start_info")
    assert start_info.plugin_data.plugin_name == "hparams"
    assert b"offline_steps" in start_info.plugin_data.content
    assert len(list(run.glob("**/events*"))) == 1


def test_agents_of_all_evaluations_are_kept_if_asked_for(tmp_path):
    run = make_run(tmp_path, eval_every=2)
    run.args.keep_agents = True
    with run:
        for _ in run.steps(5, "offline"):
            if run.evaluation_due:
                run.write([make_evaluation(1.0)], {})
    assert sorted(file.name for file in run.folder.glob("agent_*")) == [
        "agent_2.npz",
        "agent_4.npz",
        "agent_5.npz",
    ]


# ----- How long a run takes


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1e9
        monkeypatch.setattr(plumbing.stopwatch.time, "time", lambda: self.now)


def test_the_end_of_a_run_by_hand(monkeypatch):
    """300 offline steps and two iterations of 100; a step takes 1 s, the first 100 take 9 s."""
    clock, watch = Clock(monkeypatch), Stopwatch()
    flags = dict(offline_steps=300, online_iterations=2, updates_per_iteration=100, eval_every=50)
    news = []
    for step in range(301):
        watch.start(0)
        env_steps = 0
        if step == 300:
            clock.now += 50  # the first collection
            env_steps = 10
        clock.now += 9 if step < 100 else 1
        watch.stop(env_steps)
        if step == 249:
            clock.now += 20
            watch.stop_evaluation()
        if watch.news():
            news.append((step + 1, watch.seconds_left(step + 1, flags), watch.missing(flags)))
    assert news == [
        (200, 300, "new data and evaluations"),
        (250, 250 + 5 * 20, "new data"),
        (301, 199 + 199 / 50 * 20 + 1.99 * 51, ""),
    ]
    offline_only = dict(offline_steps=300, eval_every=50)
    assert watch.seconds_left(200, offline_only) == 100 + 2 * 20
    nothing_new = flags | dict(prior_steps=0, posterior_steps=0)  # the second control
    assert Stopwatch().missing(nothing_new) == "evaluations"


def test_a_long_run_says_when_it_ends(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(buffers.Run, "save", lambda run: None)
    run = make_run(tmp_path, offline_steps=20_200, eval_every=10_000)
    with pytest.raises(KeyboardInterrupt):
        with run:
            for step in run.steps(20_200, "offline"):
                clock.now += 1
                run.log({})
                if step == 300:
                    raise KeyboardInterrupt
    out = capsys.readouterr().out
    assert out.count("to go") == 1 and "about 5 h 33 min to go, until " in out
    assert "evaluations not counted yet" in out and "--preset short" in out


def test_a_clock_that_stands_still(dataset, tmp_path, monkeypatch):
    Clock(monkeypatch)
    assert read(start(meta_bc, dataset, tmp_path)) == 13


# ----- Signals and notebooks


def test_the_first_signal_says_what_it_does(dataset, tmp_path, monkeypatch, capsys):
    call_at(monkeypatch, "log", 6, functools.partial(send, signal.SIGINT))
    with pytest.raises(SystemExit, match="stopped after step 7"):
        start(meta_bc, dataset, tmp_path)
    assert capsys.readouterr().err.count("stops after this step; once more stops at once") == 1


def test_in_a_notebook_an_interrupt_keeps_the_checkpoint(dataset, tmp_path, monkeypatch, capsys):
    """SystemExit would be shown with a remark on how to leave the notebook; there is a bar."""
    shell = types.SimpleNamespace(get_ipython=lambda: "a shell")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "IPython", shell)
        call_at(patch, "log", 6, functools.partial(send, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match="stopped after step 7; continue with"):
            start(meta_bc, dataset, tmp_path)
    assert read(directory(meta_bc, tmp_path)) == 7
    assert "7/13" in capsys.readouterr().err
    assert read(start(meta_bc, dataset, tmp_path / "again")) == 13


# ----- What fails inside a run


def raise_at(step, error, monkeypatch):
    """Let the environments raise an error once a run has made some steps."""
    step_env = envs.PointDirection.step
    run_of_now = []
    call_at(monkeypatch, "log", step, functools.partial(run_of_now.append, 1))

    def step_or_raise(env, action):
        if run_of_now:
            raise error
        return step_env(env, action)

    monkeypatch.setattr(envs.PointDirection, "step", step_or_raise)


def test_an_error_of_an_environment_says_where_and_how_to_continue(dataset, tmp_path, monkeypatch):
    raise_at(6, RuntimeError("the gripper is lost"), monkeypatch)
    with pytest.raises(RuntimeError, match="the gripper is lost") as error:
        start(meta_bc, dataset, tmp_path)
    run = directory(meta_bc, tmp_path)
    (note,) = error.value.__notes__
    assert note.startswith(f"at step 10 of {run}; continue with: python {ROOT / 'meta_bc.py'}")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", [RuntimeError, ConnectionError, AssertionError])
def test_a_script_ends_with_one_sentence_below_the_traceback(
    kind, threads, dataset, tmp_path, monkeypatch, capfd
):
    """Exit code 2, and the sentence says what happened, where, and how to continue."""
    raise_at(6, kind("the gripper\nis lost"), monkeypatch)
    enough = functools.partial(envs.make_evaluation, repeats=4)  # for two processes
    monkeypatch.setattr(envs, "make_evaluation", enough)
    torch.set_num_threads(threads)
    try:
        with pytest.raises(SystemExit) as end, one_sentence():
            start(meta_bc, dataset, tmp_path)
    finally:
        torch.set_num_threads(1)
    traceback, _, sentence = capfd.readouterr().err.rpartition("error: ")
    place = (
        f"the gripper is lost, at step 10 of {directory(meta_bc, tmp_path)}; continue with: python"
    )
    assert end.value.code == 2 and kind.__name__ in sentence and place in sentence
    assert sentence.count("\n") == 1
    assert "in step_or_raise" in traceback and kind.__name__ in traceback


@pytest.mark.parametrize("code", [0, None, 3])
def test_sys_exit_in_an_environment_says_where_and_how_to_continue(
    code, dataset, tmp_path, monkeypatch
):
    raise_at(6, SystemExit(code), monkeypatch)
    message = refusal(functools.partial(start, meta_bc, dataset, tmp_path))
    place = f"at step 10 of {directory(meta_bc, tmp_path)}; continue with: python"
    words = (
        rf"test_run.py, line \d+, called sys.exit\({code}\), so that the run did not end, at step"
    )
    assert re.search(words, message) and place in message


def test_an_environment_that_fails_before_the_run_is_shown(tmp_path, monkeypatch, capsys):
    """One sentence, and above it the traceback of what is not ours."""

    def fail(*_):
        raise KeyError("gripper")

    monkeypatch.setattr(envs.PointDirection, "set_task", fail)
    envs.check_family.cache_clear()
    with pytest.raises(SystemExit) as end, one_sentence():
        envs.make("PointDirection")
    envs.check_family.cache_clear()
    traceback, _, sentence = capsys.readouterr().err.rpartition("error: ")
    assert end.value.code == 2 and sentence == (
        "PointDirection cannot be used: KeyError: 'gripper'\n"
    )
    assert ", in fail" in traceback


def test_a_full_disk_at_the_start_names_the_place(dataset, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = directory(meta_bc, tmp_path)
    for name in ("write_args", "write_table"):
        with monkeypatch.context() as patch:
            patch.setattr(buffers.Run, name, full)
            message = refusal(functools.partial(start, meta_bc, dataset, tmp_path))
        assert message.startswith(f"cannot write to {run}: No space left on device")
    assert read(start(meta_bc, dataset, tmp_path)) == RUNS[meta_bc]["offline_steps"]


@pytest.mark.parametrize(
    "parts",
    [
        lambda weight: {"optimizer": torch.optim.SGD([weight], lr=1.0, momentum=0.9)},
        lambda weight: {"optimizer": torch.optim.Adam([weight], amsgrad=True)},
        lambda weight: {"adam": torch.optim.Adam([weight])},
        lambda weight: {name: torch.optim.Adam([weight]) for name in ("optimizer", "second")},
    ],
)
def test_an_optimizer_that_no_checkpoint_can_hold_is_refused_at_once(parts, tmp_path):
    args = meta_bc.Args(env_id="PointDirection", run_dir=str(tmp_path))
    with pytest.raises(InputError, match="one optimizer, an Adam without amsgrad"):
        buffers.Run(args, meta_bc.__file__, **parts(torch.nn.Parameter(torch.zeros(1))))
    assert not list(tmp_path.iterdir())

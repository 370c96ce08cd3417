"""A run is never lost: full disks, closed terminals, NaNs, bad flags, missing packages."""

import dataclasses
import errno
import functools
import importlib.metadata
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from small import (
    HUGE,
    ROOT,
    Unexpected,
    assert_equal_runs,
    call_at,
    directory,
    forked,
    make_dataset,
    pasted,
    read,
    refusal,
    resume,
    send,
    sentence,
    start,
)
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import borel
import buffers
import envs
import macaw
import meta_bc
import pearl_online_oracle as pearl
import plumbing.flags
import plumbing.pictures
import plumbing.run
import smac_offline_online as smac
from buffers import InputError
from plumbing.flags import check_flags, preset

pytestmark = pytest.mark.usefixtures("small")


# ----- What a run leaves behind in the process that called it


def surroundings():
    handlers = [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ]
    return (
        handlers,
        threading.excepthook,
        tqdm.monitor_interval,
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.parametrize("place, name, error", [
    (plumbing.run, "flatten", Unexpected()), (plumbing.pictures, "draw_summary", Unexpected()),
    (SummaryWriter, "close", OSError(errno.ENOSPC, "No space left on device")),
])  # fmt: skip
def test_signals_hooks_and_precision_are_as_they_were(
    dataset, tmp_path, monkeypatch, place, name, error
):
    """Also after an error while a run is closed; tests/shared/test_own_tasks.py has other ends."""

    def fail(*_):
        raise error

    before = surroundings()
    monkeypatch.setattr(place, name, fail)
    with pytest.raises((Unexpected, InputError)) as raised:
        start(meta_bc, dataset, tmp_path)
    assert surroundings() == before
    if name == "close":  # TensorBoard's last words do not fit on the disk
        message = f"cannot write to {directory(meta_bc, tmp_path)}: No space left on device; continue with: python"
        assert str(raised.value).startswith(message)


# ----- Closed terminals and pipes


class Gone(io.StringIO):
    """A stream whose reader has gone."""

    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal

    def write(self, text):
        raise (
            OSError(errno.EIO, "I/O error")
            if self.isatty()
            else BrokenPipeError(errno.EPIPE, "Broken pipe")
        )

    def flush(self):
        self.write("")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_closed_terminal_loses_nothing(whole, dataset, tmp_path, monkeypatch, terminal):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Gone(terminal))
    run = start(smac, dataset, tmp_path)
    assert_equal_runs(whole(smac), run)


def test_streams_that_are_not_there(whole, dataset, tmp_path, monkeypatch):
    """As with pythonw, or after >&-"""
    run = shutil.copytree(whole(meta_bc), tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["script", "--resume", str(run), "--dataset", str(dataset)])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    buffers.launch(meta_bc.main, meta_bc.Args, meta_bc.PRESETS)
    sys.argv[2] = str(tmp_path)
    with pytest.raises(SystemExit) as ended:
        buffers.launch(meta_bc.main, meta_bc.Args, meta_bc.PRESETS)
    assert ended.value.code == 2


def test_streams_that_are_closed(tmp_path):
    """GLFW, which Gymnasium loads, needs an error stream; and no file may take the place of one."""
    lines = (
        "import os, sys, envs",
        "kept = [os.fstat(n).st_rdev == os.stat(os.devnull).st_rdev for n in range(3)]",
    )
    code = "; ".join([*lines, f"open({str(tmp_path / 'kept')!r}, 'w').write(str(kept))"])
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} <&- >&- 2>&-"
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True)
    assert (tmp_path / "kept").read_text() == "[True, True, True]"


def test_the_checkpoint_comes_before_the_words(dataset, tmp_path, monkeypatch):
    told, say, run = {}, plumbing.flags.print_safely, directory(smac, tmp_path)

    def look(text, *stream):
        if text.startswith("step"):
            told[int(re.match(r"step (\d+)", text)[1])] = int(read(run))
        say(text, *stream)

    monkeypatch.setattr(plumbing.run, "print_safely", look)
    start(smac, dataset, tmp_path)
    assert told == {5: 5, 8: 8, 10: 10, 15: 15, 16: 16}


def test_output_that_is_not_a_terminal_stays_small(tmp_path, monkeypatch, capsys):
    """22,000 steps of a hundredth of a second: a line every half minute, and no bar."""
    clock, network = [0.0], torch.nn.Linear(1, 1)
    monkeypatch.setattr(plumbing.run.time, "time", lambda: clock[0])
    args = meta_bc.Args(
        env_id="PointDirection", run_dir=str(tmp_path), device="cpu", eval_every=10**6
    )
    monkeypatch.setattr(buffers.Run, "save", lambda run: None)
    with buffers.Run(
        args, "a.py", agent=network, optimizer=torch.optim.Adam(network.parameters())
    ) as run:
        for step in run.steps(22_000, "training"):
            clock[0] = step / 100
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line]
    assert (
        len(lines) == 7
        and lines[0].startswith("training: step 30")
        and lines[0].endswith(" of 22000")
    )
    assert len(err) < 300 and len(out) < 1000


def test_few_of_many_trajectories_are_drawn(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    path = {
        "obs": rng.normal(size=(2, 4)),
        "actions": np.zeros((1, 2)),
        "rewards": [0],
        "terminals": [0],
    }
    entries = [(number % 4, path | {"obs": rng.normal(size=(2, 4))}) for number in range(600)]
    tasks = envs.sample_tasks("PointDirection", 6)
    buffers.save_dataset(
        tmp_path / "d.npz", "PointDirection", tasks[:4], tasks[4:], entries, [], "python test"
    )
    monkeypatch.setattr(
        envs, "make_evaluation", functools.partial(envs.make_evaluation, num_train=4)
    )
    with np.load(start(meta_bc, tmp_path / "d.npz", tmp_path) / "figures_13.npz") as file:
        assert file["offline data"].shape == (500, 2, 2)


# ----- What can not be written, or is not worth it


@pytest.mark.parametrize(
    "limit", [1, 8000]
)  # bytes a file: nothing can be written; all but the checkpoint
def test_a_full_disk_keeps_the_checkpoint(whole, dataset, tmp_path, monkeypatch, limit):
    run = directory(smac, tmp_path)
    with monkeypatch.context() as patch:
        fill = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        call_at(patch, "log", 11, fill)
        call_at(patch, "log", 12, functools.partial(send, signal.SIGTERM))
        message, _ = forked(lambda: start(smac, dataset, tmp_path))
    assert message.startswith("InputError: cannot write to ") and message.count("\n") == 0
    assert re.match(
        r"InputError: cannot write to [^']*: File too large; continue with: python", message
    )
    assert pasted(message)[1][:2] == ["--resume", str(run)]
    assert read(run) == 10 and not (run / "checkpoint.npz.tmp").exists()
    resume(smac, dataset, run)
    assert_equal_runs(whole(smac), run)


def test_folders_that_can_not_be_run_folders(dataset, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--env-id", "PointDirection", "--device", "cpu", "--dataset", dataset, "--run-dir"]
    for folder, words in (
        (tmp_path / "file", "Not a directory"), ("a" * 5000, "File name too long"), ("a/" * 5000, "File name too long"),
        (tmp_path / "a\udcffb", "must be printable text in UTF-8"), (tmp_path / "a\x1b[31m", "must be printable text"),
    ):  # fmt: skip
        assert words in sentence(monkeypatch, capsys, meta_bc, *flags, folder)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    for words in (
        ["--resume", "~nobody_of_this_name/run"],
        ["--resume", "a/" * 3000],
        [*flags[:5], "~/nothing.npz"],
    ):
        assert "there is no " in sentence(monkeypatch, capsys, meta_bc, *words)


def test_the_home_folder_may_be_a_tilde(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(dataset, tmp_path / "d.npz")
    start(meta_bc, "~/d.npz", "~/runs")
    resume(meta_bc, "~/d.npz", "~/runs/PointDirection__meta_bc__1")
    assert sorted(os.listdir(tmp_path)) == ["d.npz", "runs"]


NANS = [
    (smac, "observation"),
    (pearl, "reward"),
    (macaw, "observation"),
    (macaw, "observation alone"),
]


@pytest.mark.parametrize("script, what", NANS)
def test_nan_from_the_environment(script, dataset, tmp_path, monkeypatch, what):
    """The environment's numbers become NaN after the first checkpoint: the sentence names step and checkpoint."""
    step, save, broken = envs.PointDirection.step, buffers.Run.save, []

    def spoiled(env, action):
        obs, reward, *rest = step(env, action)
        if broken and what == "observation":
            return obs * np.float32("nan"), reward, *rest
        if broken and what == "observation alone":  # no return tells, and MACAW has no KL
            return obs * np.float32("nan"), 0.0, *rest
        return obs, float("nan") if broken else reward, *rest

    monkeypatch.setattr(envs.PointDirection, "step", spoiled)
    monkeypatch.setattr(buffers.Run, "save", lambda run: save(run) or broken.append(run.step))
    message, run = refusal(start, script, dataset, tmp_path), directory(script, tmp_path)
    at = r"(at the evaluation after|before) step \d+"  # PEARL meets it while it collects data
    assert re.search(rf"became NaN or infinite {at} of {run}; continue with: python", message), (
        message
    )
    assert pasted(message)[1][:2] == ["--resume", str(run)]
    assert read(run) == broken[0] == 5


@pytest.mark.parametrize("script, flags", [(smac, dict(lr=1e3)), (macaw, dict(policy_lr=1e15))])
def test_learning_that_diverges(script, flags, dataset, tmp_path):
    message = refusal(functools.partial(start, script, dataset, tmp_path, eval_every=1, **flags))
    assert re.search("(is|became) NaN or infinite", message) and re.search(
        "continue with|no checkpoint yet", message
    )


def test_rewards_that_are_too_large(tmp_path):
    """Of 1e15 and 1e25: squares that are and are not float32."""
    for scale in (1e15, 1e25):
        data = make_dataset(tmp_path / "d.npz", scale)
        with pytest.raises(InputError, match="NaN or infinite"):
            start(meta_bc, data, tmp_path / str(scale), eval_every=1, lr=1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_never_holds_nan(dataset, tmp_path, monkeypatch, value):
    """The losses of the step were finite, the parameters after it are not."""
    update, calls = smac.update, []

    def poison(agent, *args, **kwargs):
        info = update(agent, *args, **kwargs)
        calls.append(1)
        if len(calls) == 15:
            agent.decoder.net[0].bias.data[3] = value
        return info

    monkeypatch.setattr(smac, "update", poison)
    monkeypatch.setattr(buffers.Run, "write", lambda *_: None)  # an evaluation would find it
    message = refusal(start, smac, dataset, tmp_path)
    assert message.startswith(
        "no checkpoint after step 15, agent/decoder.net.0.bias is NaN or infinite; continue with"
    )
    assert read(directory(smac, tmp_path)) == 10


# ----- Flags


BAD_FLAGS = [
    (smac, dict(resume=""), "--resume is empty"),
    (smac, dict(dataset=""), "--dataset is empty"),
    (pearl, dict(save_dataset=""), "--save-dataset is empty"),
    (smac, dict(q_hidden=(9000, 9000)), "--q-hidden is (9000, 9000), it must be above 0 and at most 2048"),
    (smac, dict(q_hidden=(2048,) * 3), "--q-hidden is (2048, 2048, 2048), which makes more than 4194304 weights"),
    (macaw, dict(policy_hidden=(600, 600)), "--policy-hidden is (600, 600), which makes more than 262144 weights"),
    (smac, dict(q_hidden=(16,) * 11), "--q-hidden is (16, 16"),
    (smac, dict(q_hidden=()), "--q-hidden is (), it must be"),
    (smac, dict(rl_batch=10**9), "--rl-batch is 1000000000, it must be at least 2 and at most 10000"),
    (macaw, dict(rl_batch=1), "--rl-batch is 1, it must be at least 2"),
    (macaw, dict(context_batch=1), "--context-batch is 1, it must be at least 2"),
    (smac, dict(meta_batch=10_000, rl_batch=10_000), "meta_batch x rl_batch must be at most 32768"),
    (smac, dict(meta_batch=200, context_batch=200), "meta_batch x context_batch must be at most 32768"),
    (smac, dict(meta_batch=8, rl_batch=4000, latent_dim=600), "meta_batch x rl_batch x latent_dim must be at most"),
    (borel, dict(elbo_terms=30_000), "vae_tasks x vae_trajectories x elbo_terms x elbo_terms must be at most 1048576"),
    (borel, dict(vae_tasks=10**12), "vae_tasks x vae_trajectories must be at most 128"),
    (borel, dict(vae_tasks=HUGE), "--vae-tasks is 1000"),
    (smac, dict(lr=HUGE), "--lr is 10000"), (smac, dict(lr=float("inf")), "--lr is inf, it must be above 0"),
    (smac, dict(lr=float("nan")), "--lr is nan"), (smac, dict(lr=0.0), "--lr is 0.0, it must be above 0"),
    (smac, dict(seed=HUGE), "--seed is 10000"), (smac, dict(seed=-1), "--seed is -1, it must be at least 0"),
    (smac, dict(seed=-HUGE), "--seed is -10000"), (smac, dict(gamma=1.1), "--gamma is 1.1, it must be above 0 and at"),
    (smac, dict(eval_every=0), "--eval-every is 0, it must be above 0"), (smac, dict(lr="1"), "--lr is '1', which is"),
    (smac, dict(latent_dim=True), "--latent-dim is True, which is not of its type"),
    (smac, dict(num_critics=3), "--num-critics is 3, which is not of its type"),
    (smac, dict(q_hidden=[16]), "--q-hidden is [16], which is not of its type"),
    (smac, dict(device="tpu"), "--device is 'tpu', which is not of its type"),
    (smac, dict(tasks_per_iteration=33), "--tasks-per-iteration is 33, it must be above 0 and at most 32"),
    (smac, dict(oracle_frozen=True), "--oracle-frozen needs --oracle-rewards"),
    (smac, dict(explore_tasks="test", oracle_rewards=True, prior_steps=0), "the test tasks have no data"),
    (pearl, dict(prior_steps=0), "--prior-steps must be above 0"),
]  # fmt: skip


@pytest.mark.parametrize("script, flags, words", BAD_FLAGS)
def test_flags_that_can_not_be(script, flags, words):
    args = preset(script.Args, script.PRESETS, "PointDirection")
    check_flags(args)
    message = refusal(check_flags, dataclasses.replace(args, **flags))
    assert words in message


@pytest.mark.parametrize("number", [10**12, 2**53])
def test_a_buffer_that_does_not_fit_into_memory(dataset, tmp_path, number):
    message = refusal(functools.partial(start, smac, dataset, tmp_path, online_iterations=number))
    assert "transitions does not fit into memory" in message and list(tmp_path.iterdir()) == []


def test_numbers_on_the_command_line_that_are_too_long(monkeypatch, capsys):
    for flag, words in (
        ("--lr", "--lr is inf"),
        ("--seed", "--seed is 1000"),
        ("--online-iterations", "s is 1000"),
    ):
        assert words in sentence(
            monkeypatch, capsys, smac, "--env-id", "PointDirection", flag, str(HUGE)
        )


def test_a_gpu_that_does_not_work(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError(
            "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
        )

    flags = ["--env-id", "PointDirection", "--device"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fail)
    for device in ("auto", "cuda"):
        words = sentence(monkeypatch, capsys, smac, *flags, device)
        assert words.startswith(
            f"error: --device {device}: the GPU cannot be used (CUDA error: out of memory CUDA"
        )
        assert words.endswith("; --device cpu works")


# ----- Without PyBullet


def test_without_pybullet_all_but_sawyer_works(dataset, tmp_path, monkeypatch, capsys):
    version = importlib.metadata.version

    def missing(name):
        if name == "pybullet":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setitem(sys.modules, "pybullet", None)  # importing it raises ImportError
    envs.check_family.cache_clear()
    run = start(meta_bc, dataset, tmp_path)
    assert "pybullet" not in json.loads((run / "args.json").read_text())["versions"]
    capsys.readouterr()
    for env_id in ("SawyerManipulation", "SawyerManipulation8"):
        words = sentence(monkeypatch, capsys, pearl, "--env-id", env_id)
        assert words.startswith(
            "error: the Sawyer environments need pybullet; `pip install pybullet=="
        )
    for env_id in envs.SHIPPED.keys() - {"SawyerManipulation", "SawyerManipulation8"}:
        envs.make(env_id).close()


def test_requirements_install_without_a_compiler():
    """PyBullet has a wheel for Python 3.11 on x86-64 Linux only."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = {r.name: r for r in map(Requirement, lines)}
    assert [name for name, r in requirements.items() if r.marker] == ["pybullet"]
    assert all(str(r.specifier).startswith("==") for r in requirements.values())
    marker, where = (
        requirements["pybullet"].marker,
        dict(sys_platform="linux", platform_machine="x86_64"),
    )
    assert marker.evaluate(where | {"python_version": "3.11"})
    for other in (dict(python_version="3.12"), dict(python_version="3.13"), dict(sys_platform="darwin"),
                  dict(sys_platform="win32"), dict(platform_machine="aarch64")):  # fmt: skip
        assert not marker.evaluate(where | {"python_version": "3.11"} | other)
    said = (ROOT / "sawyer.py").read_text()
    assert f"pip install pybullet{requirements['pybullet'].specifier}" in said

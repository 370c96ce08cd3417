"""benchmark/watch.py, agents.py, film.py and figures.py: what they read, play, print and draw."""

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from PIL import Image

import borel
import buffers
import envs
import macaw
import meta_bc
import pearl_online_oracle as pearl
import smac_offline_online as smac
from benchmark import agents, figures, film, watch
from benchmark.experiments import explore
from plumbing.flags import one_sentence
from plumbing.pictures import draw_summary, read_figures

SCRIPTS = [smac, pearl, meta_bc, macaw, borel]
TINY = dict(policy_hidden=(8,), rl_batch=4, meta_batch=2, eval_every=1_000)
FLAGS = {
    smac: dict(
        offline_steps=2,
        online_iterations=1,
        updates_per_iteration=2,
        prior_steps=50,
        posterior_steps=50,
    ),
    pearl: dict(
        online_iterations=1,
        updates_per_iteration=2,
        initial_steps=50,
        prior_steps=50,
        posterior_steps=50,
    ),
    meta_bc: dict(offline_steps=2),
    macaw: dict(offline_steps=2, value_hidden=(8,)),
    borel: dict(vae_steps=1, offline_steps=2, vae_tasks=2, elbo_terms=2),
}
STEPS = {smac: 4, pearl: 2, meta_bc: 2, macaw: 2, borel: 3}  # of a whole run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset of two training tasks and three test tasks: 270, 90 and 180 degrees."""
    whole = buffers.load_dataset("PointDirection")
    rl = [entry for entry in whole["rl"] if entry[0] < 2]
    file = tmp_path_factory.mktemp("data") / "small.npz"
    test_tasks = np.deg2rad([[270.0], [90.0], [180.0]])
    buffers.save_dataset(
        file, "PointDirection", whole["train_tasks"][:2], test_tasks, rl, [], "by hand"
    )
    return file


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """{script: folder of its run}. PEARL draws its own tasks, as many as the family has: two and three here as well."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as patch:
        few = dataclasses.replace(envs.SPECS["PointDirection"], num_train_tasks=2, num_test_tasks=3)
        patch.setitem(envs.SPECS, "PointDirection", few)
        for script in SCRIPTS:
            flags = TINY | FLAGS[script] | ({} if script is pearl else {"dataset": str(data)})
            buffers.train(script, env_id="PointDirection", run_dir=str(folder), **flags)
            found[script] = folder / f"PointDirection__{script.__name__}__1"
        yield found


@pytest.fixture(scope="module")
def first_agent_file(runs, data, tmp_path_factory):
    file = tmp_path_factory.mktemp("agents") / "new" / "Point.npz"
    return agents.main(agents.Args(runs[smac], file, dataset=data))


@pytest.fixture
def agent_file(first_agent_file, tmp_path):
    """The agent file of SMAC's run, a copy."""
    return Path(shutil.copy(first_agent_file, tmp_path))


def change(file, **arrays):
    """Replace arrays of a file, or take them out (None)."""
    with np.load(file, allow_pickle=False) as old:
        new = {name: array for name, array in (dict(old) | arrays).items() if array is not None}
    np.savez(file, **new)


# ===== Returns


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_played_as_in_its_own_last_evaluation(script, runs, data):
    """With as many episodes and all test tasks: to the last digit of eval.csv."""
    found, args, tasks, loaded = watch.load(runs[script], dataset=data)
    assert found is script and list(loaded) == [STEPS[script]]
    numbers, returns = watch.measure(script, loaded[STEPS[script]], args, tasks, 100, 4)
    with open(runs[script] / "eval.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    rows = [row for row in rows if row["gradient_step"] == str(STEPS[script])]
    assert numbers == [int(row["task"]) for row in rows] and len(rows) == 3
    for name, column in (("after adaptation", "return"), ("exploration", "exploration_return")):
        assert returns[name].mean(1) == pytest.approx(
            [float(row[column]) for row in rows], abs=1e-4
        )
    assert ("the prior" in returns) == (script in (smac, pearl, meta_bc))


def test_what_own_context_gives_beyond_that_of_another_task_by_hand(runs, data, monkeypatch):
    """An encoder that finds the direction, and a policy that goes where z says: a = tanh(10 z)."""

    def encoder(self, context):
        obs, actions, rewards = context.split([4, 2, 1], dim=-1)
        direction = torch.linalg.lstsq(
            0.8 * obs[..., 2:] + 0.2 * actions, rewards
        ).solution.squeeze(-1)  # (T, 2)
        mu = torch.cat([direction, torch.zeros(len(context), 3)], dim=-1)
        return mu, torch.full_like(mu, 1e-6)

    monkeypatch.setattr(smac.Encoder, "forward", encoder)
    monkeypatch.setattr(
        smac.Policy, "forward", lambda self, obs, z: (10 * z[:, :2], torch.full((len(z), 2), -20.0))
    )
    script, args, tasks, loaded = watch.load(runs[smac], dataset=data)
    numbers, returns = watch.measure(script, loaded[4], args, tasks, 3, 2, sampled=True)
    # Velocity after t of 50 steps: (1 - .8^t) a, in all 50 - .8 (1 - .8^50) / .2 = 46.0. The other task is the one
    # above: 180 for 270, 270 for 90, 90 for 180
    assert numbers == [0, 1, 2] and all(
        values.shape == (3, 2) for name, values in returns.items() if name[0] != "e"
    )
    assert returns["after adaptation"] == pytest.approx(np.full((3, 2), 46.0), abs=0.01)
    assert returns["sampled actions"] == pytest.approx(np.full((3, 2), 46.0), abs=0.01)
    assert returns["another task's context"] == pytest.approx(
        np.array([[0.0] * 2, [-46.0] * 2, [0.0] * 2]), abs=0.01
    )
    assert abs(returns["the prior"]).max() < 30  # z drawn at every step leads nowhere for long


def test_a_single_task_has_no_other(runs, data):
    script, args, tasks, loaded = watch.load(runs[smac], dataset=data)
    _, returns = watch.measure(script, loaded[4], args, tasks, 1, 2)
    assert list(returns) == ["exploration", "after adaptation", "the prior"]


# ===== Agent files


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_agent_file_has_what_acting_needs_after_the_offline_phase_and_at_the_end(
    script, runs, data, tmp_path
):
    file = agents.main(agents.Args(runs[script], tmp_path / "agent.npz", dataset=data))
    steps = [2, 4] if script is smac else [STEPS[script]] if script is not borel else [3]
    kept = {"policy", "value", "raw_adv_coef"} if script is macaw else {"policy", "encoder"}
    with np.load(file, allow_pickle=False) as arrays:
        arrays = dict(arrays)
    assert {name.split("/")[1].split(".")[0] for name in arrays if "/" in name} == kept
    assert {int(name.split("/")[0]) for name in arrays if "/" in name} == set(steps)
    assert list(json.loads(str(arrays["returns"]))) == [str(step) for step in steps]
    assert json.loads(json.loads(str(arrays["returns"]))[str(steps[-1])])[0].startswith(
        "test (own context) "
    )
    found, args, tasks, loaded = watch.load(file)
    assert found is script and list(loaded) == steps and args.policy_hidden == (8,)
    for step, agent in loaded.items():
        with np.load(runs[script] / f"agent_{step}.npz") as whole:
            state = {
                name: value
                for name, value in agent.state_dict().items()
                if name.split(".")[0] in kept
            }
            assert state and all(
                np.array_equal(value.numpy(), whole[name]) for name, value in state.items()
            )
    _, _, run_tasks, of_run = watch.load(runs[script], dataset=data)
    assert np.array_equal(tasks, run_tasks)
    pair = [
        watch.measure(script, agent, args, tasks, 2, 1)[1]
        for agent in (loaded[steps[-1]], of_run[steps[-1]])
    ]
    assert pair[0].keys() == pair[1].keys() and all(
        np.array_equal(pair[0][name], pair[1][name]) for name in pair[0]
    )


def test_tables_and_lines(agent_file, runs, data, tmp_path, capsys):
    watch.main(watch.Args(agent_file, episodes=2, out=tmp_path / "table.md"))
    out = capsys.readouterr().out.splitlines()
    for first, step in ((0, 2), (6, 4)):
        assert (
            out[first]
            == f"PointDirection, smac_offline_online.py, seed 1, after {step} gradient steps"
        )
        assert re.split("   +", out[first + 1].strip()) == [
            "exploration", "after adaptation", "another task's context", "the prior", "sampled actions",
        ]  # fmt: skip
        assert [line[:16].strip() for line in out[first + 2 : first + 6]] == [
            "task 0: 270 deg", "task 1: 90 deg", "task 2: 180 deg", "mean",
        ]  # fmt: skip
        cells = np.array([line[16:].split() for line in out[first + 2 : first + 6]], float)
        assert cells[3] == pytest.approx(cells[:3].mean(0), abs=0.11)
    watch.main(watch.Args(runs[smac], episodes=2, out=tmp_path / "table.md", dataset=data))
    assert capsys.readouterr().out.splitlines() == out[6:]
    note, _, head, rule, *lines = (tmp_path / "table.md").read_text().splitlines()
    assert note.startswith("2 meta-episodes on each test task;") and len(lines) == 3
    assert (
        head
        == "| run | gradient step | own context | another task's | prior | own context, sampled actions |"
    )
    assert rule == "| --- | --- | --- | --- | --- | --- |"
    label = "/".join(runs[smac].parts[-3:])
    assert (
        lines[2].startswith(f"| {label} | 4 | ")
        and lines[2].split("|")[3:] == lines[1].split("|")[3:]
    )


def test_a_line_of_the_table_by_hand(tmp_path):
    file = tmp_path / "table.md"
    returns = {
        "exploration": np.zeros((2, 2)),
        "after adaptation": np.array([[1.0, 3.0], [5.0, 9.0]]),
    }
    watch.write_row(file, "a/b/c", 7, returns)
    # Over episodes the variances are 2 and 8; the mean of all four has variance 5 / 4
    assert file.read_text().splitlines()[-1] == "| a/b/c | 7 | 4.5 ± 1.1 |  |  |  |"


@pytest.mark.parametrize(
    "env_id, task, words",
    [
        ("PointDirection", [-math.pi / 2], "task 3: 270 deg"),
        ("CheetahVelocity", [1.5], "task 3: 1.50 m/s"),
        ("HopperParam", np.ones(41), "task 3"),
        ("SawyerManipulation", [1, 1, 1, 1, 0, 0, 0, 2, 2], "task 3: open bottom drawer"),
    ],
)
def test_tasks_in_words(env_id, task, words):
    assert watch.describe(env_id, 3, np.array(task)) == words


BROKEN = {
    "of no run": (dict(script=np.array("nothing")), "is no agent file"),
    "without a script": (dict(script=None), "is no agent file"),
    "numbers for words": (dict(script=np.zeros(2)), r"script is float64 \(2,\), expected text"),
    "a long word": (
        dict(script=np.array(20_000 * "a")),
        "script has 20000 entries, expected at most 10000",
    ),
    "no flags": (dict(flags=None), "does not fit this script"),
    "strange flags": (dict(flags=np.array("[1]")), "does not fit this script"),
    "a flag out of bounds": (
        dict(flags='"latent_dim": 5', by='"latent_dim": 50000'),
        "--latent-dim is 50000",
    ),
    "other sizes": (
        dict(flags='"latent_dim": 5', by='"latent_dim": 6'),
        "float32 .*, expected float32 .*",
    ),
    "another robot": (dict(flags="PointDirection", by="HopperParam"), "expected float.. .*"),
    "no such robot": (
        dict(flags="PointDirection", by="Nothing"),
        "there is no environment Nothing",
    ),
    "NaN": (
        {"4/policy.net.0.bias": np.full(8, np.nan, np.float32)},
        "4/policy.net.0.bias is missing, NaN or infinite",
    ),
    "a part of it": (
        {"2/encoder.net.0.bias": None},
        "2/encoder.net.0.bias is missing, NaN or infinite",
    ),
    "doubles": ({"4/policy.net.0.bias": np.zeros(8)}, "4/policy.net.0.bias is float64"),
    "no tasks": (dict(test_tasks=None), "test_tasks: expected at least one"),
    "empty tasks": (dict(test_tasks=np.zeros((0, 1))), "test_tasks: expected at least one"),
    "tasks of another": (dict(test_tasks=np.ones((2, 41))), r"test_tasks is float64 \(2, 41\)"),
    "NaN tasks": (
        dict(test_tasks=np.full((2, 1), np.nan)),
        "test_tasks: expected at least one, and numbers in",
    ),
    "huge tasks": (
        dict(test_tasks=np.full((2, 1), 1e9)),
        "test_tasks: expected at least one, and numbers in",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_foreign_or_damaged_file_is_refused(what, agent_file):
    arrays, words = BROKEN[what]
    if "by" in arrays:
        with np.load(agent_file) as old:
            arrays = dict(flags=np.array(str(old["flags"]).replace(arrays["flags"], arrays["by"])))
    change(agent_file, **arrays)
    with pytest.raises(buffers.InputError, match=words):
        watch.load(agent_file)


def test_what_is_no_agent_at_all(agent_file, runs, data, tmp_path, capsys):
    (tmp_path / "text.npz").write_text("no agent")
    shutil.copytree(runs[smac], tmp_path / "renamed")
    shutil.copytree(runs[smac], tmp_path / "PointDirection__mine__1")
    half = tmp_path / "half.npz"
    half.write_bytes(agent_file.read_bytes()[:-200])
    for path, words in (
        (tmp_path / "nowhere.npz", "there is no file"), (tmp_path / "text.npz", "cannot be read"),
        (half, "cannot be read"), (data, "is no agent file"), (tmp_path, "there is no file"),
        (tmp_path / "renamed", "is no folder of a run, by its name"),
        (tmp_path / "PointDirection__mine__1", "is a run of mine.py by its name, and not of one of smac_offline"),
        (runs[smac] / "agent_4.npz", "has no agent to watch: give a run's folder, or a file that benchmark/agents.py"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            with one_sentence():
                watch.main(watch.Args(path))
        assert stop.value.code == 2 and words in capsys.readouterr().err
    others = "are others than in this dataset: name theirs with --dataset"
    with pytest.raises(buffers.InputError, match=others):
        watch.load(runs[smac])
    # The file has the agent's tasks; its data are read where exploring needs them.
    watch.main(watch.Args(agent_file))
    with pytest.raises(buffers.InputError, match=others):
        watch.main(watch.Args(agent_file, explore=True))
    with pytest.raises(buffers.InputError, match=others):
        explore.main(explore.Args(agents=(agent_file,), out=tmp_path / "table.md"))
    assert not (tmp_path / "table.md").exists()
    watch.main(watch.Args(agent_file, explore=True, dataset=data))
    with pytest.raises(buffers.InputError, match="none of its phases has ended"):
        agents.main(agents.Args(tmp_path))
    for flags in (dict(tasks=0), dict(episodes=0), dict(every=0), dict(out=tmp_path / "table.md")):
        with pytest.raises(
            buffers.InputError, match="must be at least 1, and with --out --episodes at least 2"
        ):
            watch.main(watch.Args(agent_file, **flags))


def test_a_file_imports_no_module_unless_the_command_line_names_it(
    agent_file, tmp_path, monkeypatch
):
    (tmp_path / "my_tasks.py").write_text(
        "import envs\n"
        "class Mine(envs.PointDirection): pass\n"
        "envs.register('Mine', envs.Spec(Mine, 4, 2, 1, 20, 3, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(envs, "SPECS", dict(envs.SPECS))
    with np.load(agent_file) as old:
        change(
            agent_file, flags=np.array(str(old["flags"]).replace("PointDirection", "my_tasks:Mine"))
        )
    with pytest.raises(buffers.InputError, match="give --env-id my_tasks:Mine as well"):
        watch.load(agent_file)
    assert "my_tasks" not in sys.modules
    script, args, tasks, loaded = watch.load(agent_file, "my_tasks:Mine")
    monkeypatch.delitem(sys.modules, "my_tasks")
    _, returns = watch.measure(script, loaded[4], args, tasks, 1, 1)
    assert np.isfinite(returns["after adaptation"]).all()


def test_masks_of_an_encoder_are_kept_and_watched(data, tmp_path, monkeypatch):
    """As a transformer has them: a buffer of -inf, and one of bool."""

    class Masked(smac.Encoder):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.register_buffer("causal", torch.full((2, 2), -math.inf))
            self.register_buffer("padding", torch.tensor([True, False]))

    monkeypatch.setattr(smac, "Encoder", Masked)
    run, flags = (
        tmp_path / "PointDirection__smac_offline_online__1",
        TINY | FLAGS[smac] | dict(dataset=str(data)),
    )
    buffers.train(smac, env_id="PointDirection", run_dir=str(tmp_path), **flags)
    buffers.train(smac, resume=str(run), dataset=str(data), online_iterations=2)
    (agent,) = watch.load(run, dataset=data)[3].values()
    assert (
        agent.encoder.padding.tolist() == [True, False]
        and torch.isneginf(agent.encoder.causal).all()
    )


# ===== The agents in the repository


@pytest.mark.parametrize(
    "file", sorted((watch.ROOT / "agents").glob("*.npz")), ids=lambda file: file.stem
)
def test_an_agent_in_the_repository_plays(file):
    """On two test tasks; where the return grew by half in its own run, it does here."""
    if file.stem.startswith("Sawyer"):
        pytest.importorskip("pybullet", reason="PyBullet is ready for Python 3.11 only")
    script, args, tasks, loaded = watch.load(file)
    assert script is smac and args.env_id == file.stem and file.stat().st_size < 4e6
    with np.load(file, allow_pickle=False) as arrays:
        returns = json.loads(str(arrays["returns"]))
    before, after = (
        float(re.match(r"test .*? (\S+)$", json.loads(returns[str(step)])[0])[1]) for step in loaded
    )
    played = [watch.measure(script, agent, args, tasks, 2, 1)[1] for agent in loaded.values()]
    assert all(np.isfinite(values).all() for returns in played for values in returns.values())
    first, last = (returns["after adaptation"].mean() for returns in played)
    assert last > first or after - before < 0.5 * abs(before)


# ===== Films


def test_a_film_shows_three_episodes_before_and_after_with_the_task_drawn_in(
    agent_file, tmp_path, capsys
):
    file = tmp_path / "film.gif"
    watch.main(watch.Args(agent_file, video=file, every=25))
    assert capsys.readouterr().out.splitlines()[-1] == str(file)
    frames = imageio.imread(file)
    # Steps 0, 25 and 50 of each episode; a row for a task, a column for before and after
    assert frames.shape == (9, 3 * 230, 2 * 180, 3)
    y, x = np.mgrid[90:-90:180j, -90:90:180j]
    for row, direction in enumerate(((0, -1), (0, 1), (-1, 0))):
        for column in range(2):
            cell = frames[
                0, 230 * row + 50 : 230 * (row + 1), 180 * column : 180 * (column + 1)
            ].astype(int)
            red = (cell[..., 0] > 200) & (cell[..., 1] < 60) & (cell[..., 2] < 60)
            middle = np.array([x[red].mean(), y[red].mean()])
            assert (
                red.sum() > 150
                and middle @ direction > 40
                and abs(np.cross([*middle, 0], [*direction, 0])[2]) < 4
            )


def test_what_ends_early_waits_in_the_film(tmp_path):
    grey = [Image.new("RGB", (20, 10), (shade, shade, shade)) for shade in (0, 80, 160, 240)]
    short, long = (
        [grey[:1], grey[1:2], grey[2:3]],
        [grey[:1], grey[1:], grey[2:3]],
    )  # pictures of three episodes
    film.save([[short], [long]], tmp_path / "film.gif")
    frames = imageio.imread(tmp_path / "film.gif")
    assert frames.shape == (5, 10, 40, 3)
    assert frames[:, 5, 5, 0].tolist() == [0, 80, 80, 80, 160] and frames[:, 5, 25, 0].tolist() == [
        0,
        80,
        160,
        240,
        160,
    ]


def test_a_film_that_can_not_be_written_or_drawn(agent_file, tmp_path, monkeypatch):
    for name in ("film.avi", "film", "nowhere/film.gif"):
        with pytest.raises(
            buffers.InputError, match="expected a .gif or .mp4 in a folder that exists"
        ):
            watch.main(watch.Args(agent_file, video=tmp_path / name))
    for place in (".", "nowhere/table.md"):
        with pytest.raises(
            buffers.InputError, match="is no file in a folder that exists|is a folder"
        ):
            watch.main(watch.Args(agent_file, episodes=2, out=tmp_path / place))
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(buffers.InputError, match="folder.gif is a folder"):
        film.check_file(tmp_path / "folder.gif")
    if sys.platform == "linux":  # a folder that takes no files, whoever asks
        with pytest.raises(buffers.InputError, match="--video /proc/film.gif can not be written: "):
            film.check_file(Path("/proc/film.gif"))
    monkeypatch.setattr(film.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(buffers.InputError, match="needs imageio-ffmpeg"):
        film.check_file(tmp_path / "film.mp4")

    def render(self):
        raise RuntimeError("no such library\nat all")

    monkeypatch.setattr(envs.PointDirection, "render", render)
    with pytest.raises(
        buffers.InputError, match="can not be drawn here: no such library at all; .* EGL .* OSMesa"
    ):
        watch.main(watch.Args(agent_file, video=tmp_path / "film.gif"))
    assert not (tmp_path / "film.gif").exists()


@pytest.mark.parametrize(
    "asked, installed, display, chosen",
    [
        ("", ("EGL", "OSMesa"), False, "egl"), ("", ("OSMesa",), False, "osmesa"), ("", (), False, None),
        ("", ("EGL",), True, None), ("osmesa", ("EGL",), False, "osmesa"),
    ],
)  # fmt: skip
def test_the_library_that_draws(asked, installed, display, chosen, monkeypatch):
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if display:
        monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(film, "MUJOCO_GL", asked)
    monkeypatch.setattr(film.sys, "platform", "linux")
    monkeypatch.setattr(
        film.ctypes.util, "find_library", lambda name: name if name in installed else None
    )
    film.choose_library()
    assert os.environ.get("MUJOCO_GL") == chosen


def test_the_camera_follows_a_robot(monkeypatch):
    """Where MuJoCo can draw here: an ant put a hundred metres away is still in the middle."""
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.delenv("MUJOCO_GL")
    film.choose_library()
    try:
        with film.drawing():
            camera = film.Camera(envs.make("AntDirection", render_mode="rgb_array"), (), 1)
        camera.reset(seed=0)
    except buffers.InputError as error:
        pytest.skip(str(error))
    position, velocity = camera.unwrapped.data.qpos.copy(), camera.unwrapped.data.qvel
    camera.unwrapped.set_state(position + np.eye(len(position))[0] * 100, velocity)
    camera.step(np.zeros(8))
    for picture in camera.films[0]:
        middle = np.asarray(picture, int)[110:180, 90:150]
        assert picture.size == (240, 230)
        assert (
            (middle[..., 0] - middle[..., 2] > 40) & (middle[..., 1] > 60)
        ).sum() > 50  # its skin
    camera.close()


# ===== Figures


def test_figures_of_a_run(runs, tmp_path):
    """Each kind of path in its colour, only where there are paths; the later phase below."""
    paths = np.random.default_rng(0).normal(size=(4, 2, 30, 2)).astype(np.float32).cumsum(2)
    names = "offline data", "exploration", "offline context", "own context"
    colours = (214, 39, 40), (44, 160, 44), (31, 119, 180), (255, 127, 14)
    for step, drawn in ((900, names[1:]), (1000, names)):
        np.savez(
            tmp_path / f"figures_{step}.npz",
            **{n: path for n, path in zip(names, paths) if n in drawn},
        )
    figures.main(figures.Args(tmp_path, tmp_path / "figures.png"))
    image = imageio.imread(tmp_path / "figures.png")[..., :3].astype(int)
    halves = image[: len(image) // 2], image[len(image) // 2 :]
    for colour, name in zip(colours, names):
        seen = [(abs(half - colour).sum(-1) < 90).sum() > 30 for half in halves]
        assert seen == [name != "offline data", True]
    with pytest.raises(buffers.InputError, match="there is no figures_"):
        figures.main(figures.Args(runs[smac] / "nowhere"))


def test_a_tasks_direction_is_drawn_in_the_shade_of_its_paths(tmp_path):
    """A dot on the rim where each task of the evaluation points; paths of a task have its shade."""
    angles = buffers.load_dataset("PointDirection")["train_tasks"][[3, 7], 0]
    ways = np.stack([np.cos(angles), np.sin(angles)], axis=-1)  # each task's two paths follow it
    paths = np.repeat(ways, 2, axis=0)[:, None] * np.linspace(0, 4, 30)[:, None]
    np.savez(tmp_path / "figures_900.npz", **{"own context": paths.astype(np.float32)})
    (tmp_path / "args.json").write_text('{"env_id": "PointDirection", "dataset": null}')
    lines = ["split,task", *(f"train,{task}" for task in (3, 7))]
    (tmp_path / "eval.csv").write_text("\n".join(lines))
    found = figures.read(tmp_path, tmp_path / "args.json", tmp_path / "eval.csv")
    assert found[1].tolist() == angles.tolist()

    axes = figures.draw(*found).axes[2]  # Figure 6 with own context
    first, second, rim = axes.lines
    assert [first.get_color(), second.get_color()] == [figures.shade(angle) for angle in angles]
    radius = np.hypot(*rim.get_xydata()[0])
    assert radius > 4
    dots = axes.collections[0]
    assert np.asarray(dots.get_offsets()) == pytest.approx(radius * ways)
    assert dots.get_facecolor() == pytest.approx(np.array([figures.shade(a) for a in angles]))

    for text in ("{", "[]", '{"env_id": 3}'):
        (tmp_path / "args.json").write_text(text)
        with pytest.raises(buffers.InputError, match="is not what a run writes"):
            figures.main(figures.Args(tmp_path, tmp_path / "figures.png"))
    (tmp_path / "args.json").write_text('{"env_id": "ball:Ball"}')  # whose module is not imported
    assert figures.read(tmp_path, tmp_path / "args.json", tmp_path / "eval.csv")[1] is None


def test_the_picture_of_a_run_by_hand(tmp_path):
    """A colour for each context in all panels; the phases apart; two rows of panels beside the returns."""
    test, train = 0, 1  # as in SPLITS
    own, offline = 0, 1  # as in CONTEXTS
    rows = [(10, 0, train, offline, 0, 4.0, 0), (20, 0, test, own, 0, 1.0, 0)]
    rows += [(20, 0, train, own, 0, 3.0, 0)]
    rows += [(30, 50, test, own, 0, 5.0, 0), (30, 50, test, own, 1, 7.0, 0)]
    kls = {
        "kl_train_offline_context": np.float32([1, 3]),
        "kl_train_own_context": np.float32([8, 8]),
    }
    paths = {
        "offline data": np.zeros((2, 5, 2), np.float32),
        "own context": np.ones((2, 5, 2), np.float32),
    }
    for step, ground in (
        (20, {}),
        (30, paths),
        (40, paths),
    ):  # the last is of a later step than eval.csv has
        np.savez(tmp_path / f"figures_{step}.npz", **kls, **ground)
    curves, tasks, bar_of_colours, *panels = draw_summary(tmp_path, np.array(rows)).axes
    (image,) = tasks.images
    np.testing.assert_array_equal(image.get_array(), [[1, 5], [np.nan, 7]])
    drawn = {
        line.get_label(): (line.get_color(), line.get_linestyle(), [*line.get_ydata()])
        for line in curves.lines
    }
    assert drawn == {
        "train tasks, offline context": ("tab:blue", "--", [4]),
        "train tasks, own context": ("tab:orange", "--", [3]),
        "test tasks, own context": ("tab:orange", "-", [1, 6]),
    }  # fmt: skip
    (phase,) = curves.patches
    assert phase.get_label() == "self-supervised phase"
    assert [phase.get_x(), phase.get_x() + phase.get_width()] == [20, 30]
    assert [axes.get_title() for axes in panels] == ["after 20 gradient steps"] * 2 + [
        "after 30 gradient steps"
    ] * 2
    assert [axes.get_visible() for axes in panels] == [True, False, True, True]
    words = [text.get_text() for text in panels[2].get_legend().get_texts()]
    assert words == ["offline context, mean 2.0", "own context, mean 8.0"]
    for axes, colours in (
        (panels[2], ["tab:blue", "tab:orange"]),
        (panels[3], ["tab:red", "tab:orange"]),
    ):
        of = [patch.get_edgecolor() for patch in axes.patches] or [
            line.get_color() for line in axes.lines
        ]
        in_legend = axes.get_legend().get_patches() or axes.get_legend().get_lines()
        in_legend = [
            getattr(mark, "get_edgecolor", getattr(mark, "get_color", None))() for mark in in_legend
        ]
        assert (
            [to_rgba(c) for c in of]
            == [to_rgba(c) for c in in_legend]
            == [to_rgba(c) for c in colours]
        )


def test_the_picture_of_a_run_without_posterior_and_paths(tmp_path):
    np.savez(tmp_path / "figures_10.npz")
    rows = np.array([(10, 0, 0, 0, 0, 4.0, 0)])
    figure = draw_summary(tmp_path, rows)
    assert [axes.get_visible() for axes in figure.axes[-2:]] == [False, False]
    figure.savefig(tmp_path / "summary.png")


BAD_FIGURES = {
    "KLs that are none": (
        {"kl_train_own_context": np.float32([np.nan])},
        "kl_train_own_context cannot be drawn",
    ),
    "KLs far below 0": (
        {"kl_train_own_context": np.float32([-5])},
        "kl_train_own_context cannot be drawn",
    ),
    "paths without end": (
        {"exploration": np.full((1, 5, 2), 1e30, np.float32)},
        "exploration cannot be drawn",
    ),
}


@pytest.mark.parametrize("arrays, message", BAD_FIGURES.values(), ids=BAD_FIGURES)
def test_figures_that_can_not_be_drawn(tmp_path, arrays, message):
    np.savez(tmp_path / "figures_20.npz", **arrays)
    with pytest.raises(buffers.InputError, match=message):
        read_figures(tmp_path)


def test_figures_of_other_kinds_are_not_read(tmp_path):
    """Text, float64 and other shapes are left out; what else lies there is no picture of a run."""
    arrays = {
        "exploration": np.array("words"),
        "kl_train_own_context": np.zeros(3),
        "offline data": np.zeros((2, 3)),
    }
    np.savez(tmp_path / "figures_20.npz", **arrays)
    (tmp_path / "figures_x.npz").write_text("none")
    assert read_figures(tmp_path) == {20: {}}


def test_more_environments_than_fit_are_refused(tmp_path, capsys):
    """Each takes 1.5 MB in MuJoCo, and 28 in PyBullet."""
    with pytest.raises(
        buffers.InputError, match="5 tasks x 1000000000 episodes are more than 1000 environments"
    ):
        watch.main(watch.Args(watch.ROOT / "agents" / "HopperParam.npz", episodes=10**9))
    assert capsys.readouterr().out == ""

"""Which task, split, buffer and flag every datum comes from, and where it goes.

In all scripts, in both phases, of SMAC after a resume, too. The runs are on tests/signed.py's family, whose
observations say where they are of. Encoders are replaced by ones that sign their output too: the
first number of z is the sign of the task that the history is of, and so is every parameter of a
policy that MACAW has adapted. So a network's input says whether state and z belong to each other.
"""

import csv
import functools
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import signed
import torch
from signed import (
    ACTION,
    COLLECTED,
    ENCODER_DATA,
    EPISODE,
    EVALUATION,
    ORIGIN,
    RL_DATA,
    RUNS,
    SIGN,
    TEST,
    TIME,
    TRAIN,
)

import borel
import buffers
import envs
import focal
import macaw
import pearl_online_oracle as pearl
import smac_offline_online as smac

UNKNOWN = 9.0  # the sign of a z from the prior, or of a policy that is not adapted
MIXED = -9.0  # the sign of a history of several tasks
COLLECTING = [name for name in RUNS if RUNS[name][0] in (smac, pearl)]
SELF_SUPERVISED = [
    name for name in COLLECTING if name.startswith("smac") and "true rewards" not in name
]


# ----- Spies


def sign_of(obs):
    """(..., o) -> the sign (...)."""
    return obs[..., SIGN].detach().clone()


def spy(patch, owner, name, before=None, after=None, place=None, log=None):
    """Call before(*args) and after(result, *args) around a function; `after` may replace the
    result.
    """
    function = getattr(owner, name)

    def call(*args, **kwargs):
        outer = log.place if place else None
        if place:
            log.place = place
        if before:
            before(*args, **kwargs)
        result = function(*args, **kwargs)
        if place:
            log.place = outer
        return after(result, *args) if after else result

    patch.setattr(owner, name, call)


def sign_posteriors(patch, script, log):
    """Encoder and prior of SMAC, PEARL and meta-BC: mean of z[0] is the sign, the standard
    deviation small.
    """

    def encode(result, self, context):
        log.histories.append((log.place, context.detach().clone()))
        (mu, sigma), sign = result, sign_of(context)
        alike = (sign == sign[:, :1]).all(1)
        tag = torch.where(alike, sign[:, 0], MIXED)[:, None]
        return 0 * mu + tag, 0 * sigma + 1e-6

    spy(patch, script.Encoder, "forward", after=encode)
    patch.setattr(
        script,
        "prior",
        lambda num, args, device: (
            torch.full((num, args.latent_dim), UNKNOWN),
            torch.zeros(num, args.latent_dim),
        ),
    )


def sign_beliefs(patch, log):
    """BOReL's encoder: memory[0] is the sign of all that it has read, 0 before, and the belief's
    mean is that.
    """

    def encode(result, self, steps, memory):
        signs, read = sign_of(steps["next_obs"]), []
        before = memory[:, 0].detach()
        for sign in signs.T:
            real = sign != 0  # what follows the end of a trajectory is 0
            before = torch.where(
                real & (before != 0) & (before != sign), MIXED, torch.where(real, sign, before)
            )
            read.append(before)
        return torch.cat(
            [result[:, :1], torch.cat([torch.stack(read, 1)[..., None], result[:, 1:, 1:]], -1)], 1
        )

    def believe(result, memory):
        mu, log_var = result.chunk(2, dim=-1)
        return torch.cat([0 * mu + memory[..., :1], 0 * log_var - 20], -1)

    def build(result, self, *sizes):
        spy(patch, self.belief, "forward", after=believe)

    spy(patch, borel.BeliefEncoder, "forward", after=encode)
    spy(patch, borel.BeliefEncoder, "__init__", after=build)

    def decode(self, z, steps):
        if log.place != "update":
            return  # in an evaluation it also predicts what follows the end of a trajectory
        pairs = torch.broadcast_tensors(
            sign_of(steps["obs"])[:, None, :], z[:, :, :1].detach()
        )  # (N, Z, K) each
        log.used.append((log.place, "decoder", *pairs))

    spy(patch, borel.RewardDecoder, "forward", before=decode)


def sign_adaptation(patch, log):
    """MACAW: all parameters after adaptation are the sign of the inner batch, and UNKNOWN before
    it.
    """

    def adapt(result, agent, batch):
        sign = sign_of(batch["obs"])
        tag = torch.where((sign == sign[:, :1]).all(1), sign[:, 0], MIXED)[:, None]
        log.histories.append((log.place, batch["obs"].clone()))
        return [[0 * theta + tag for theta in network] for network in result]

    spy(
        patch,
        macaw,
        "unadapted",
        after=lambda thetas, *_: [0 * theta + UNKNOWN for theta in thetas],
    )
    inner_steps = macaw.inner_steps

    def quietly(*args):
        place, log.place = log.place, "inner"  # what the networks see there is not recorded
        result = inner_steps(*args)
        log.place = place
        return adapt(result, *args)

    patch.setattr(macaw, "inner_steps", quietly)

    def use(thetas, x):
        if x.shape[-1] == len(signed.COLUMNS):  # not the advantage head
            see(
                log,
                "value" if thetas[-1].shape[-1] == 8 + 1 else "policy",
                x,
                thetas[0][:, :1].expand(x.shape[:2]),
            )

    spy(patch, macaw, "mlp_of", before=use)


def see(log, network, obs, tag):
    """A network got these observations (..., o) with this sign of z (...)."""
    obs, tag = obs.detach().flatten(0, -2).clone(), tag.detach().flatten().clone()
    if log.place in ("update", "label"):
        log.used.append((log.place, network, sign_of(obs), tag))
    elif network == "policy":
        log.acted.append((log.place, obs, tag))


def see_transition(log, network, self, obs, actions, z, **flags):
    see(log, network, obs, z[:, 0])


def sign_and_record(patch, script, log):
    """Put all spies in place."""
    if script is macaw:
        sign_adaptation(patch, log)
    else:
        sign_beliefs(patch, log) if script is borel else sign_posteriors(patch, script, log)
        spy(
            patch,
            script.Policy,
            "forward",
            before=lambda self, obs, z: see(log, "policy", obs, z[:, 0]),
        )
        for network in ("QFunctions", "Decoder"):
            if hasattr(script, network):
                record = functools.partial(
                    lambda network, self, obs, a, z, **_: see(log, network, obs, z[:, 0]), network
                )
                spy(patch, getattr(script, network), "forward", before=record)

    def update(agent, optimizer, batch, args, self_supervised=None):
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        log.rates = {
            name: rates.get(id(p)) for name, p in agent.named_parameters() if p.requires_grad
        }
        log.batches.append((self_supervised, len(log.acted), batch))
        if len(log.batches) == log.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def draw(buffer, tasks, n, generator, source="rl"):
        log.drawn.append(buffer.sizes[source][torch.as_tensor(tasks)].min().item())

    spy(patch, buffers.ReplayBuffer, "sample", before=draw)
    for name in ("update", "update_vae"):
        if hasattr(script, name):
            spy(patch, script, name, before=update, place="update", log=log)
    spy(patch, script, "evaluate", place="evaluate", log=log)
    if hasattr(script, "generate_rewards"):

        def label(rewards, agent, path, h_offline, args, rng):
            h = script.make_context(h_offline, args)
            log.labels.append((torch.as_tensor(path["obs"][:-1]), h.clone(), rewards.clone()))
            return rewards

        spy(patch, script, "generate_rewards", after=label, place="label", log=log)


# ----- The runs: each as a whole, and SMAC's variants also stopped by SIGTERM in the second phase
# and resumed. Of the others test_resume.py compares a resumed run with a whole one, bit for bit.


RESUMED = [name for name in RUNS if name.startswith("smac, ")]
CASES = [(name, False) for name in RUNS] + [(name, True) for name in RESUMED]


@functools.cache
def cached(folder, name, resumed):
    lists = {name: [] for name in ("histories", "used", "acted", "labels", "batches", "drawn")}
    log = SimpleNamespace(place="collect", rates={}, stop_at=0, **lists)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            envs, "make_evaluation", functools.partial(envs.make_evaluation, num_train=3, repeats=2)
        )
        signed.register(patch)
        data = signed.save_data(folder / "data.npz")
        script = RUNS[name][0]
        sign_and_record(patch, script, log)
        if resumed:
            log.stop_at = signed.OFFLINE + 1
            with pytest.raises(SystemExit, match="stopped after step"):
                signed.start(name, folder, data)
            log.stopped = len(log.acted)
            signed.resume(name, folder, data)
        else:
            signed.start(name, folder, data)
    log.name, log.script, log.folder = name, script, signed.run_of(name, folder)
    return log


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each case."""
    return {case: tmp_path_factory.mktemp("flow") for case in CASES}


@pytest.fixture
def flow(request, folders):
    """What the spies saw in a run of a case."""
    return cached(folders[request.param], *request.param)


def over(names):
    """A test over the cases of these runs: a decorator."""
    names = list(names)
    cases = [case for case in CASES if case[0] in names]
    ids = [name + ", resumed" * resumed for name, resumed in cases]
    return pytest.mark.parametrize("flow", cases, ids=ids, indirect=True)


# ----- What to expect, by hand


EVALUATIONS = {
    smac: [4, 5, 10, 13],
    borel: [6, 10, 13],
}  # after these gradient steps; [5, 9] in the other scripts
EVALUATED = {
    "test": [0, 1, 2],
    "train": [1, 2, 3],
}  # task numbers: all, and three of five, evenly spaced by their sign
SPLITS = {"test": TEST, "train": TRAIN}
ENVIRONMENTS = 3 * 2  # of each split
PAID = {s: s * (1 + 2 + 3 * (not signed.falls(s))) for s in signed.SIGNS}  # return of an episode


def one(column):
    """The one value of an array."""
    (value,) = np.unique(np.asarray(column))
    return value


def is_own(tag, sign):
    """z is drawn with a standard deviation of 1e-6, and 4e-5 for BOReL."""
    return np.abs(np.asarray(tag) - np.asarray(sign)) < 1e-3


def acted(flow, place):
    """All that the policy saw there, episode after episode: observations (n, o) and signs of z
    (n,).
    """
    rows = [(obs, tag) for where, obs, tag in flow.acted if where == place]
    obs, tags = (torch.cat(column).numpy() for column in zip(*rows))
    begun = {
        episode: number
        for number, episode in reversed(list(enumerate(map(tuple, obs[:, [SIGN, EPISODE]]))))
    }
    order = np.argsort(
        [begun[episode] for episode in map(tuple, obs[:, [SIGN, EPISODE]])], kind="stable"
    )
    return obs[order], tags[order]


def check_transitions(data, true_rewards=True):
    """The parts of every transition (n, .) belong together."""
    obs, actions, next_obs = (np.asarray(data[name]) for name in ("obs", "actions", "next_obs"))
    rewards, terminals = (np.asarray(data[name]).reshape(-1) for name in ("rewards", "terminals"))
    np.testing.assert_array_equal(
        next_obs[:, [SIGN, ORIGIN, EPISODE]], obs[:, [SIGN, ORIGIN, EPISODE]]
    )
    np.testing.assert_array_equal(next_obs[:, TIME], obs[:, TIME] + 1)
    np.testing.assert_array_equal(next_obs[:, ACTION], actions[:, 0])
    fell = [signed.falls(sign) and time == signed.FALL for sign, time in next_obs[:, [SIGN, TIME]]]
    np.testing.assert_array_equal(terminals, fell)  # and the time limit is not terminal
    if true_rewards:
        np.testing.assert_array_equal(rewards, obs[:, SIGN] * next_obs[:, TIME])


# ----- Evaluation


@over(RUNS)
def test_evaluations_are_of_their_split_and_task(flow):
    expected, collected = [], 0
    for step in EVALUATIONS.get(flow.script, [5, 9]):
        if flow.name in COLLECTING:
            acted_before = flow.batches[step - 1][
                1
            ]  # calls of the policy before the gradient step before it
            collected = sum(
                len(obs) for place, obs, _ in flow.acted[:acted_before] if place == "collect"
            )
        groups = [("test", "own"), ("train", "own")] + [("train", "offline")] * (
            flow.script is not pearl
        )
        for split, context in groups:
            for task in EVALUATED[split]:
                paid = PAID[SPLITS[split][task]]
                expected.append([step, collected, split, context, task, paid, paid])
    with open(flow.folder / "eval.csv", newline="") as file:
        _, *rows = csv.reader(file)
    assert rows == [list(map(str, row)) for row in expected]


@over(RUNS)
def test_an_evaluation_adapts_to_each_task_by_what_was_seen_of_it(flow):
    obs, tags = acted(flow, "evaluate")
    assert one(obs[:, ORIGIN]) == EVALUATION
    unknown, own, begins = tags == UNKNOWN, is_own(tags, obs[:, SIGN]), obs[:, TIME] == 0
    times = len(EVALUATIONS.get(flow.script, [5, 9]))
    # Two episodes of exploration and one after it; on training tasks another one after offline
    # data.
    before = {"test": 2, "train": 2}
    after = {"test": 1, "train": 1 if flow.script is pearl else 2}
    if flow.script is borel:  # adapts with every step
        unknown |= (tags == 0) & begins
        before, after = (
            {"test": 1, "train": 1},
            {"test": 3, "train": 3},
        )  # the last on test tasks: its belief is frozen
        assert own[~begins].all()
    assert (unknown | own).all()
    for split, signs in SPLITS.items():
        of_split = begins & np.isin(obs[:, SIGN], signs)
        assert (unknown & of_split).sum() == times * ENVIRONMENTS * before[split]
        assert (own & of_split).sum() == times * ENVIRONMENTS * after[split]


# (FOCAL also reads histories of all training tasks, to explore with their z)
@over(name for name in RUNS if name not in ("borel", "focal"))
def test_the_history_of_an_evaluation_is_two_episodes_of_the_task_or_its_offline_data(flow):
    own, offline = [], []
    for history in (h for place, h in flow.histories if place == "evaluate"):
        for row in history:
            sign, origin, steps = (
                one(row[:, SIGN]),
                one(row[:, ORIGIN]),
                [*range(signed.length(row[0, SIGN]))],
            )
            if origin == EVALUATION:
                assert row[:, TIME].tolist() == 2 * steps
            else:
                assert origin == (RL_DATA if flow.script is macaw else ENCODER_DATA)
                # As long as the own contexts on average: tasks 2 and 4 last 3 steps, 7 lasts 2. For
                # MACAW --context-batch.
                assert len(row) == (
                    4 if flow.script is macaw else round((2 * 3 + 2 * 2 + 2 * 3) / 3)
                )
            (own if origin == EVALUATION else offline).append(sign)
            if flow.script is not macaw:  # there the history also has returns, see below
                np.testing.assert_array_equal(row[:, -1], row[:, SIGN] * (row[:, TIME] + 1))
    test, train = (
        np.repeat(signs[EVALUATED[split]], 2).tolist()
        for split, signs in (("test", TEST), ("train", TRAIN))
    )
    times = len(EVALUATIONS.get(flow.script, [5, 9]))
    assert own == (test + train) * times
    assert offline == ([] if flow.script is pearl else train * times)


# ----- Batches


def parts(batch):
    """What a gradient step draws from the RL buffer: {name: transitions}; none in BOReL's first
    stage.
    """
    if "inner" in batch:
        return {name: batch[name] for name in ("inner", "outer")}
    return {"rl": batch} if "obs" in batch else {}


@over(RUNS)
def test_a_gradient_step_has_as_many_tasks_and_transitions_as_the_flags_say(flow):
    phases = [self_supervised for self_supervised, _, _ in flow.batches]
    assert phases == {smac: 4 * [False] + 9 * [True], borel: 13 * [None]}.get(
        flow.script, 9 * [None]
    )
    for step, (_, _, batch) in enumerate(flow.batches):
        for name, part in parts(batch).items():
            assert part["obs"].shape[:2] == (3, 4 if name == "inner" else 6)
        if flow.script is borel:
            assert ("lengths" in batch) == (step < signed.VAE_STEPS)
        if "lengths" in batch:
            assert len(batch["lengths"]) == 2 * 3 and batch["t"].shape == batch["k"].shape == (
                2 * 3,
                4,
            )
        elif flow.script is not macaw and flow.script is not borel:
            histories = 6 if flow.script is focal else 3  # FOCAL's metric compares two of each task
            assert batch["context"].shape == (histories, 4, len(signed.COLUMNS) + 1 + 1)


@over(RUNS)
def test_a_row_of_a_batch_is_of_one_task_and_of_the_rl_buffer(flow):
    signs, offline, collecting = set(), set(), set()  # the last two: origins, by phase
    for self_supervised, _, batch in flow.batches:
        for rows in (part["obs"] for part in parts(batch).values()):
            phase = collecting if self_supervised or flow.script is pearl else offline
            phase.update(rows[..., ORIGIN].flatten().tolist())
            for row in rows:
                if (
                    flow.name == "smac, on test tasks"
                ):  # a training task's buffer also gets what test tasks look like
                    assert set(row[row[:, ORIGIN] == COLLECTED, SIGN].tolist()) <= set(TEST)
                    row = row[row[:, ORIGIN] == RL_DATA]
                signs |= {one(row[:, SIGN])} if len(row) else set()
    assert offline == (set() if flow.script is pearl else {RL_DATA})
    assert collecting == {smac: {RL_DATA, COLLECTED}, pearl: {COLLECTED}}.get(flow.script, set())
    assert signs == set(
        signed.SIGNS if flow.name == "smac, on test tasks with true rewards" else TRAIN
    )


@over(RUNS)
def test_the_parts_of_a_sampled_transition_belong_together(flow):
    for _, _, batch in flow.batches:
        for part in parts(batch).values():
            data = {
                name: column.flatten(0, 1).numpy()
                for name, column in part.items()
                if column.dim() == 3
            }
            data = {name: column for name, column in data.items() if name != "context"}
            if flow.script is borel:
                columns = len(signed.COLUMNS)
                for name in ("obs", "next_obs"):
                    data[name] = data[name][:, :columns]
                # The last step of an episode leads to the first state of the next one of the
                # meta-trajectory.
                last = data["next_obs"][:, TIME] == 0
                np.testing.assert_array_equal(
                    data["next_obs"][last, EPISODE], data["obs"][last, EPISODE] + 1
                )
                assert set(data["next_obs"][last, EPISODE]) <= {1, 2}
                ended = [
                    time + 1 == signed.length(sign)
                    for sign, time in data["obs"][last][:, [SIGN, TIME]]
                ]
                assert all(ended)
                data["next_obs"][last] = data["obs"][last]
                data["next_obs"][last, TIME] += 1
                data["next_obs"][last, ACTION] = data["actions"][last, 0]
            check_transitions(data, flow.name not in SELF_SUPERVISED)
            if (
                flow.script is macaw
            ):  # the discounted sum of rewards from there to the end of the episode
                expected = [
                    sum(
                        0.99 ** (t - time - 1) * sign * t
                        for t in range(int(time) + 1, signed.length(sign) + 1)
                    )
                    for sign, time in data["obs"][:, [SIGN, TIME]]
                ]
                np.testing.assert_allclose(data["returns"][:, 0], expected, rtol=1e-6)


@over(RUNS)
def test_nothing_is_drawn_from_a_task_without_data(flow):
    """It would be another task's: test tasks have none before they are explored."""
    assert min(flow.drawn) > 0 and len(flow.drawn) >= len(flow.batches) - signed.VAE_STEPS


@over(["borel"])
def test_a_meta_trajectory_is_three_episodes_of_a_task_in_order(flow):
    seen = set()
    for steps, lengths in ((b["steps"], b["lengths"]) for _, _, b in flow.batches if "steps" in b):
        for obs, rewards, n in zip(steps["obs"], steps["rewards"], lengths):
            sign, first = one(obs[:n, SIGN]), int(obs[0, EPISODE])
            episodes = [0, 1, 2] if first == 0 else [3]
            expected = [
                [number, time] for number in episodes for time in range(signed.length(sign))
            ]
            assert (
                obs[:n][:, [EPISODE, TIME]].tolist() == expected and one(obs[:n, ORIGIN]) == RL_DATA
            )
            np.testing.assert_array_equal(rewards[:n, 0], obs[:n, SIGN] * (obs[:n, TIME] + 1))
            assert not obs[n:].any() and first in (0, 3)
            seen.add((sign, first))
    assert {sign for sign, _ in seen} == set(TRAIN) and {first for _, first in seen} == {0, 3}


@over(["smac", "smac, true rewards", "pearl", "meta_bc"])
def test_the_context_of_a_batch_is_of_the_same_tasks_and_of_the_encoder_buffer(flow):
    origins = set()
    for _, _, batch in flow.batches:
        context = batch["context"]
        assert (context[..., SIGN] == batch["obs"][:, :1, SIGN]).all()
        torch.testing.assert_close(
            context[..., -1], context[..., SIGN] * (context[..., TIME] + 1)
        ) if not flow.labels else None
        origins |= set(context[..., ORIGIN].flatten().tolist())
    assert origins == {smac: {ENCODER_DATA, COLLECTED}, pearl: {COLLECTED}}.get(
        flow.script, {ENCODER_DATA}
    )


NETWORKS = {
    "smac": {"policy", "QFunctions", "Decoder"},
    "pearl": {"policy", "QFunctions"},
    "meta_bc": {"policy", "Decoder"},
    "macaw": {"policy", "value"},
    "borel": {"policy", "QFunctions", "decoder"},
}


@over(NETWORKS)
def test_in_a_gradient_step_every_network_sees_a_z_of_the_task_of_its_states(flow):
    """Also MACAW's outer loss is of networks adapted to the task that its transitions are of."""
    used = [use[1:] for use in flow.used if use[0] == "update"]
    for network, signs, tags in used:
        vague = (
            is_own(tags, 0) if flow.script is borel else np.zeros(tags.shape, bool)
        )  # its belief at the very start
        assert (is_own(tags, signs) | vague).all() and not vague.all(), network
    assert {network for network, _, _ in used} == NETWORKS[flow.name]


@over(["borel"])
def test_the_belief_of_a_hyper_state_is_vague_at_the_start_of_a_meta_trajectory_alone(flow):
    starts = []
    for part in (part for _, _, batch in flow.batches for part in parts(batch).values()):
        for name in ("obs", "next_obs"):
            obs, belief = (
                part[name][..., : len(signed.COLUMNS)],
                part[name][..., len(signed.COLUMNS)],
            )
            start = (obs[..., TIME] == 0) & ((obs[..., EPISODE] == 0) | (obs[..., EPISODE] == 3))
            torch.testing.assert_close(belief, torch.where(start, 0.0, obs[..., SIGN]))
            starts.append(start)
    assert torch.stack(starts).any() and not torch.stack(starts).all()


# ----- Flags


@over(RUNS)
def test_the_learning_rates_reach_the_optimizer(flow):
    """Every parameter has one; the target networks have none."""
    own = {
        "macaw": {"policy": 0.0123, "value": 0.0234},
        "borel": {"encoder": 0.0234, "decoder": 0.0234},
    }
    for name, rate in flow.rates.items():
        expected = own.get(flow.name, {}).get(name.split(".")[0], 0.0123)
        assert rate == (0.0345 if flow.script is macaw and "raw_" in name else expected), name
    assert len(flow.rates) >= 8 and not any(name.startswith("q_target") for name in flow.rates)


# ----- Collecting data


def rounds(flow):
    """Episodes that were collected side by side: {gradient steps before: [(signs of the tasks,
    signs of z), ...]}.
    """
    found, steps = {}, np.array([before for _, before, _ in flow.batches])
    for number, (place, obs, tag) in enumerate(flow.acted):
        if place == "collect" and (obs[:, TIME] == 0).all():
            found.setdefault(int((steps <= number).sum()), []).append(
                (obs[:, SIGN].tolist(), tag.numpy())
            )
    return found


@over(COLLECTING)
def test_an_iteration_visits_tasks_of_the_right_split_with_the_prior_and_then_the_posterior(flow):
    found, signs = rounds(flow), TEST if "test tasks" in flow.name else TRAIN
    if flow.script is pearl:  # first every training task, in order
        initial, found[0] = found[0][:2], found[0][2:]
        assert [tasks for tasks, _ in initial] == 2 * [TRAIN.tolist()]
        assert all((tags == UNKNOWN).all() for _, tags in initial)
    first = signed.OFFLINE if flow.script is smac else 0
    assert list(found) == [first, first + 3, first + 6]
    for iteration in found.values():  # episodes of 2 steps, or of 3, until there are 4 and 5
        visited = iteration[0][0]
        assert len(visited) == 5 and set(visited) <= set(signs)
        falling = [sign for sign in visited if signed.falls(sign)]
        assert [tasks for tasks, _ in iteration] == 4 * [visited] + [falling] * bool(falling)
        for number, (tasks, tags) in enumerate(iteration):
            if number < 2:
                assert (tags == UNKNOWN).all()
            elif (
                flow.name == "smac, on test tasks"
            ):  # there is no history of a test task: it is of any training task
                assert all(is_own(tag, TRAIN).any() for tag in tags)
            else:
                assert is_own(tags, tasks).all()
    assert len({tuple(iteration[0][0]) for iteration in found.values()}) > 1
    assert (
        sum(len(set(iteration[0][0])) > 1 for iteration in found.values()) >= 2
    )  # five of three tasks can be one


@over(COLLECTING)
def test_the_history_of_exploration_is_of_the_encoder_buffer(flow):
    histories = [history for place, history in flow.histories if place == "collect"]
    origins = {
        origin for history in histories for origin in history[..., ORIGIN].flatten().tolist()
    }
    assert {history.shape[1] for history in histories} == {4}
    own = {ENCODER_DATA, COLLECTED} if flow.script is smac else {COLLECTED}
    if flow.name == "smac, on test tasks with true rewards":
        own = {COLLECTED}
    assert origins == ({ENCODER_DATA} if "frozen" in RUNS[flow.name][1] else own)


@over(SELF_SUPERVISED)
def test_a_label_comes_from_one_offline_history_of_the_task_whose_buffer_it_enters(flow):
    collected, _ = acted(flow, "collect")
    np.testing.assert_array_equal(
        collected, torch.cat([obs for obs, _, _ in flow.labels])
    )  # all that was seen
    for obs, h, _ in flow.labels:
        assert (
            one(obs[:, EPISODE])
            and obs[:, TIME].tolist() == [*range(len(obs))]
            and h.shape[:2] == (1, 4)
        )
        assert one(h[..., ORIGIN]) == ENCODER_DATA and one(h[..., SIGN]) in TRAIN
        assert "test tasks" in flow.name or one(h[..., SIGN]) == one(obs[:, SIGN])
        torch.testing.assert_close(h[..., -1], h[..., SIGN] * (h[..., TIME] + 1))
    used = [
        (signs, tags)
        for place, network, signs, tags in flow.used
        if (place, network) == ("label", "Decoder")
    ]
    for (signs, tags), (obs, h, _) in zip(used, flow.labels, strict=True):
        np.testing.assert_array_equal(signs, obs[:, SIGN])
        assert is_own(tags, one(h[..., SIGN])).all()


@over(COLLECTING)
def test_what_was_collected_is_stored_whole_under_its_task(flow):
    (collected, tags), checkpoint = acted(flow, "collect"), signed.load(flow.folder)
    data = {
        name.split("/")[-1]: array
        for name, array in checkpoint.items()
        if name.startswith("buffer/fields/")
    }
    first = int((data["obs"][:, ORIGIN] != COLLECTED).sum())
    assert first == (
        0 if flow.script is pearl else sum((4 + 2) * signed.length(sign) for sign in TRAIN)
    )
    new = {name: column[first:] for name, column in data.items()}
    np.testing.assert_array_equal(new["obs"], collected)  # all of it, in time order
    assert checkpoint["env_steps"] == len(collected)
    check_transitions(new, flow.name not in SELF_SUPERVISED)
    assert (
        new["terminals"].any()
        and not new["terminals"][[not signed.falls(s) for s in new["obs"][:, SIGN]]].any()
    )
    owners = collected[:, SIGN]  # the sign of the task in whose buffer a transition belongs
    if flow.labels:
        np.testing.assert_array_equal(
            new["rewards"][:, 0], torch.cat([rewards for _, _, rewards in flow.labels])
        )
        owners = np.concatenate([np.full(len(obs), one(h[..., SIGN])) for obs, h, _ in flow.labels])
        from_posterior = tags != UNKNOWN
        assert is_own(tags[from_posterior], owners[from_posterior]).all()
    num_tasks = len(checkpoint["buffer/sizes/rl"])
    assert num_tasks == len(TRAIN) + len(TEST) * (
        flow.name == "smac, on test tasks with true rewards"
    )
    for task in range(num_tasks):
        rl, context = (signed.members(checkpoint, task, name) for name in ("rl", "encoder"))
        mine = first + np.flatnonzero(owners == signed.SIGNS[task])
        np.testing.assert_array_equal(rl[rl >= first], mine)
        assert set(data["obs"][rl[rl < first], SIGN]) <= {signed.SIGNS[task]}
        explored = mine[tags[mine - first] == UNKNOWN]
        if (
            flow.script is pearl
        ):  # only those of the last iteration that visits the task: two episodes a visit
            visits = [
                side[2 * (before == 0)][0].count(TRAIN[task])
                for before, side in rounds(flow).items()
            ]
            explored = explored[
                -2 * signed.length(TRAIN[task]) * next(n for n in [*reversed(visits), 1] if n) :
            ]
        elif "frozen" in RUNS[flow.name][1]:
            explored = explored[:0]
        elif "one buffer" in flow.name:
            explored = mine
        np.testing.assert_array_equal(context[context >= first], explored)
        assert set(data["obs"][context[context < first], ORIGIN]) <= {ENCODER_DATA}
    assert set(owners) <= set(signed.SIGNS[:num_tasks]) and len(set(owners)) >= 3


@over(["smac", "smac, one buffer", "pearl"])
def test_new_histories_are_those_of_exploration(flow):
    """In the contexts of gradient steps: of episodes with z from the prior, unless there is one
    buffer.
    """
    collected, tags = acted(flow, "collect")
    prior = {(row[SIGN], row[EPISODE]) for row, tag in zip(collected, tags) if tag == UNKNOWN}
    used = set()
    for _, _, batch in flow.batches:
        rows = batch["context"].flatten(0, 1).numpy()
        used |= {(row[SIGN], row[EPISODE]) for row in rows if row[ORIGIN] == COLLECTED}
    assert used and (used <= prior) == (flow.name != "smac, one buffer")


# ----- The second phase has no rewards


def forbid(*_, **__):
    raise AssertionError("a reward was used")


USES = """
    float int index bool complex array len iter getitem repr str format hash abs neg pos round trunc
    add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv pow rpow matmul rmatmul
    eq ne lt le gt ge
"""
ForbiddenReward = type("ForbiddenReward", (), {f"__{use}__": forbid for use in USES.split()})
PAY = {"NaN": lambda: float("nan"), "what must not be touched": ForbiddenReward}


@pytest.fixture
def paid(request, quick, monkeypatch):
    """Environments pay what the parameter says while data are collected; returns a list of these
    steps.
    """
    signed.register(monkeypatch)
    steps, pay = [], signed.Signed.pay

    def pay_or_not(env):
        if env.evaluating:
            return pay(env)
        steps.append(env.sign)
        return PAY[request.param]()

    monkeypatch.setattr(signed.Signed, "pay", staticmethod(pay_or_not))
    return steps


@pytest.mark.parametrize("paid", ["what must not be touched"], indirect=True)
@pytest.mark.parametrize("name", SELF_SUPERVISED)
def test_the_self_supervised_phase_never_reads_a_reward(name, paid, tmp_path):
    signed.start(name, tmp_path, signed.save_data(tmp_path / "data.npz"))
    checkpoint = signed.load(signed.run_of(name, tmp_path))
    assert (
        checkpoint["env_steps"] == len(paid) > 100
        and np.isfinite(checkpoint["buffer/fields/rewards"]).all()
    )


@pytest.mark.parametrize("name", ["smac, true rewards", "pearl"])
@pytest.mark.parametrize(
    "paid, error",
    [("NaN", buffers.InputError), ("what must not be touched", AssertionError)],
    indirect=["paid"],
)
def test_other_runs_do_read_it(name, paid, error, tmp_path):
    """So the test above can fail."""
    with pytest.raises(error, match="NaN|a reward was used"):
        signed.start(name, tmp_path, signed.save_data(tmp_path / "data.npz"))

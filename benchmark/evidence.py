"""What the runs in benchmark/results say: their scores, differences between them, intervals.

A run is a pair of files, {label}__{seed}.csv (its eval.csv) and .json (its flags), in the folder of
a benchmark. There is one measure: the score of a phase is the mean return of its last three
evaluations.
"""

import csv
import dataclasses
import functools
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs

RESULTS = Path(__file__).resolve().parent / "results"
EVALUATIONS = 3  # of a phase, of which the mean is its score
TEST = "test", "own"  # tasks, context
GROUPS = TEST, ("train", "own"), ("train", "offline")
OFFLINE, SECOND = "offline", "self-supervised"
BEFORE = "end of the offline phase"  # its last evaluation alone, no mean of three
SAMPLES = 5_000  # of a bootstrap


# ===== Runs


@dataclasses.dataclass
class Run:
    """One seed of one label."""

    flags: dict
    curves: dict  # {(tasks, context): {gradient step: mean return over tasks}}
    transitions: dict  # {gradient step: new transitions}

    @functools.cached_property
    def offline_end(self):
        """The end of the offline phase: the last step without new transitions; 0 if none.

        A second phase that collects nothing, the second control, is known by its flags.
        """
        collects = self.flags.get("prior_steps", 1) + self.flags.get("posterior_steps", 1) > 0
        if not collects and self.flags["online_iterations"] > 0:
            return min(self.flags["offline_steps"], self.end)
        return max((step for step, new in self.transitions.items() if new == 0), default=0)

    @functools.cached_property
    def end(self):
        return max(self.transitions)

    @property
    def phases(self):
        """The phases in which the run was evaluated after its first gradient step."""
        phases = []
        if self.offline_end > 0:
            phases.append(OFFLINE)
        if self.end > self.offline_end:
            phases.append(SECOND)
        return phases

    def scored_steps(self, phase, group=TEST):
        """Gradient steps of the last three evaluations of a phase, or of as many as it has.

        None falls in BOReL's first stage, which trains no policy.
        """
        first_stage = self.flags.get("vae_steps", 0)
        steps = sorted(step for step in self.curves.get(group, {}) if step > first_stage)
        if phase == SECOND:
            return [step for step in steps if step > self.offline_end][-EVALUATIONS:]
        steps = [step for step in steps if step <= self.offline_end]
        number = 1 if phase == BEFORE else EVALUATIONS
        return steps[-number:]

    def score(self, phase, group=TEST):
        """The mean return of the last three evaluations of a phase; None if it has none."""
        steps = self.scored_steps(phase, group)
        if not steps:
            return None
        return float(np.mean([self.curves[group][step] for step in steps]))

    def until(self, last):
        """The same run up to a gradient step of its offline phase."""
        curves = {}
        for group, curve in self.curves.items():
            curves[group] = {step: level for step, level in curve.items() if step <= last}
        transitions = {step: new for step, new in self.transitions.items() if step <= last}
        return Run(self.flags | {"offline_steps": last}, curves, transitions)


def read(file):
    """Read a run by its CSV file."""
    returns = defaultdict(lambda: defaultdict(list))
    transitions = {}
    with open(file, newline="") as lines:
        for row in csv.DictReader(lines):
            step = int(row["gradient_step"])
            transitions[step] = int(row["env_steps"])
            returns[row["split"], row["context"]][step].append(float(row["return"]))
    curves = {}
    for group, steps in returns.items():
        curves[group] = {step: float(np.mean(values)) for step, values in steps.items()}
    return Run(json.loads(file.with_suffix(".json").read_text()), curves, transitions)


def load(name):
    """The runs of a benchmark: {label: {seed: Run}}.

    Of a label there are the seeds that have come farthest: a run that was stopped, or goes on, is
    no seed beside runs that have ended. If none has ended, these are stopped runs, scored as they
    are.
    """
    return _load(RESULTS, name)


@functools.cache
def _load(results, name):
    found = defaultdict(dict)
    for file in sorted((results / name).glob("*__*.csv")):
        label, seed = file.stem.rsplit("__", 1)
        run = read(file)
        if TEST in run.curves and run.end > 0:
            found[label][int(seed)] = run
    for label, runs in found.items():
        last = max(run.end for run in runs.values())
        found[label] = {seed: runs[seed] for seed in sorted(runs) if runs[seed].end == last}
    for label in [*found]:
        add_first_part(found, label)
    return dict(found)


def add_first_part(found, label):
    """Add what a run without a second phase was after as many steps as SMAC's offline phase has.

    With another budget nothing else changes, so that a run with the steps of both phases,
    {label}_more_offline, has the shorter one in it.
    """
    name = label.removesuffix("_more_offline")
    # SMAC has runs of its offline phase already, but none with this KL weight
    is_smac = name.startswith("smac") and name != "smac_tiny_kl"
    if name == label or is_smac or "smac" not in found:
        return
    steps = next(iter(found["smac"].values())).flags["offline_steps"]
    runs = dict(found.get(name, {}))
    for seed, run in found[label].items():
        if seed not in runs and steps in run.transitions:
            runs[seed] = run.until(steps)
    if runs:
        found[name] = dict(sorted(runs.items()))


def scores(runs, phase, group=TEST):
    """{seed: score} of runs {seed: Run}; phase "last" is the last one that each has."""
    found = {}
    for seed, run in runs.items():
        score = run.score(run.phases[-1] if phase == "last" else phase, group)
        if score is not None:
            found[seed] = score
    return found


def diagnostics(name, label, seed, column):
    """What a run logged beside returns: {gradient step: number}."""
    file = RESULTS / name / "diagnostics" / f"{label}__{seed}.csv"
    if not file.exists():
        return {}
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {int(row["gradient_step"]): float(row[column]) for row in rows if row.get(column)}


def adaptation(name):
    """Returns of SMAC at its end with z from three sources, as benchmark/watch.py --out wrote them.

    Returns {seed: (own context, another task's, the prior)}, read from the benchmark's own
    adaptation.md or, where it has none, from the one in results/.
    """
    own = RESULTS / name / "adaptation.md"
    file = own if own.exists() else RESULTS / "adaptation.md"
    pattern = rf"^\| {re.escape(name)}/smac(?:/\w+)?__(\d+)(?:\.npz)? \| (\d+) \| (.*) \|$"
    rows = re.findall(pattern, file.read_text(), re.MULTILINE) if file.exists() else []
    last = max((int(step) for _, step, _ in rows), default=0)
    found = {}
    for seed, step, cells in rows:
        if int(step) == last:
            found[int(seed)] = tuple(float(cell.split()[0]) for cell in cells.split(" | ")[:3])
    return found


def explored():
    """The rows of the tables that benchmark/experiments/explore.py wrote: [{column: cell}]."""
    rows = []
    for file in sorted((RESULTS / "context").glob("explore_*.md")):
        lines = [line for line in file.read_text().splitlines() if line.startswith("|")]
        head, _, *table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        rows += [dict(zip(head, cells)) for cells in table]
    return rows


# ===== Data


@functools.cache
def _data(file, horizon):
    with np.load(file, allow_pickle=False) as arrays:
        tasks, lengths, rewards = (arrays[f"rl_{key}"] for key in ("tasks", "lengths", "rewards"))
    trajectories = np.split(rewards, lengths.cumsum()[:-1])
    returns = np.array([path[:horizon].sum(dtype=np.float64) for path in trajectories])
    means = []
    triples = []
    for task in np.unique(tasks):
        of_task = tasks == task
        means.append(returns[of_task].mean())
        triples.append(lengths[of_task].sum() / math.ceil(of_task.sum() / 3))
    return float(np.mean(means)), float(np.mean(triples))


def data_of(flags):
    """The RL part of a run's dataset, by the run's flags.

    Returns the mean over tasks of the mean return of a task's trajectories, up to the horizon; and
    the mean length of three trajectories in a row. Both are NaN if there is no dataset, as the
    Online Oracle has none.
    """
    env_id = flags["env_id"]
    file = RESULTS.parent.parent / (flags.get("dataset") or f"datasets/{env_id}.npz")
    if "dataset" not in flags or env_id not in envs.SPECS or not file.exists():
        return math.nan, math.nan
    return _data(file, envs.SPECS[env_id].horizon)


def drawn_transitions(flags, step):
    """Millions of transitions drawn for training: (by critic and actor, as context)."""
    vae_steps = min(step, flags.get("vae_steps", 0))
    tasks = (step - vae_steps) * flags["meta_batch"]
    context = tasks * flags.get("context_batch", 0)
    if "context_loss" in flags:  # focal.py draws two histories of each task
        context *= 2
    if vae_steps:  # BOReL's first stage draws meta-trajectories, three episodes in a row
        trajectories = vae_steps * flags["vae_tasks"] * flags["vae_trajectories"]
        context += trajectories * data_of(flags)[1]
    return tasks * flags["rl_batch"] / 1e6, context / 1e6


# ===== Statistics


def interval(values):
    """Mean of values of several seeds, and half the width of its 95 % interval (Student's t).

    Args:
        values: (seeds,). Of a single one the half is NaN: one seed has no interval.
    """
    values = np.asarray(list(values), float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    error = values.std(ddof=1) / math.sqrt(len(values))  # standard error of the mean
    return float(values.mean()), float(quantile(len(values)) * error)


@functools.cache
def quantile(number):
    """Student's t, two-sided 95 %, for the mean of so many values."""
    return scipy.stats.t.ppf(0.975, number - 1)


def paired(first, second):
    """Differences of two {seed: score} on the seeds that both have, (seeds,)."""
    return np.array([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def interquartile_mean(samples):
    """The mean of the middle half of all scores, and its 95 % interval.

    Environments count the same, however many seeds each has: a score is repeated until all have
    as many.

    Args:
        samples: for each environment its seeds' scores.
    The bootstrap draws seeds within each environment (Agarwal et al., 2021). The interval is None
    where an environment has one seed only.
    """
    common = math.lcm(*map(len, samples))  # seeds of each environment, once repeated

    def statistic(*drawn, axis=-1):
        repeated = [np.repeat(seeds, common // seeds.shape[axis], axis) for seeds in drawn]
        return scipy.stats.trim_mean(np.concatenate(repeated, axis=axis), 0.25, axis=axis)

    return float(statistic(*samples)), bootstrap(samples, statistic)


def probability_of_improvement(firsts, seconds):
    """How often a seed of the first method beats one of the second, mean over environments.

    Returns the probability and its 95 % interval, as `interquartile_mean` does.
    """
    number = len(firsts)

    def statistic(*drawn, axis=-1):
        chances = []
        for first, second in zip(drawn[:number], drawn[number:]):
            first = np.expand_dims(first, -1)
            second = np.expand_dims(second, -2)
            chances.append(((first > second) + 0.5 * (first == second)).mean((-2, -1)))
        return np.mean(chances, axis=0)

    return float(statistic(*firsts, *seconds)), bootstrap([*firsts, *seconds], statistic)


def bootstrap(samples, statistic):
    """The 95 % interval of a statistic of independent samples, (low, high).

    It is None if a sample has one value.
    """
    if min(map(len, samples)) < 2:
        return None
    rng = np.random.default_rng(0)
    options = {"n_resamples": SAMPLES, "method": "percentile", "vectorized": True}
    result = scipy.stats.bootstrap(tuple(samples), statistic, rng=rng, **options)
    return tuple(map(float, result.confidence_interval))

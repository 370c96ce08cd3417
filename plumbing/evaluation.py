"""What an evaluation is made of, and what is written of it: rows, curves, pictures."""

import dataclasses
import itertools
import math
from typing import Optional

import numpy as np
import torch

import envs
from plumbing.files import CONTEXTS, CSV_COLUMNS, SPLITS


@dataclasses.dataclass
class Evaluation:
    """What E environments returned: one split of the tasks, one kind of context."""

    split: str  # "test" or "train"
    context: str  # "own": the agent's own exploration; "offline": from the dataset
    tasks: list  # E numbers of tasks
    final: list  # E trajectories of the scored episode, the last
    exploration: list  # for each environment its exploration trajectories
    kl: Optional[torch.Tensor] = None  # (E,) KL of the posterior to the prior, if there is one


def returns_of(paths):
    """The returns of some trajectories, (E,)."""
    return np.array([path["rewards"].sum() for path in paths])


def exploration_returns_of(evaluation):
    """For each of E environments the mean return of its exploration episodes, (E,)."""
    return np.array([returns_of(paths) for paths in evaluation.exploration]).mean(1)


def numbers_of(evaluation):
    """What must be finite, {what: numbers}."""
    paths = itertools.chain(evaluation.final, *evaluation.exploration)
    finite = all(
        np.isfinite(path["obs"]).all() and np.isfinite(path["actions"]).all() for path in paths
    )
    numbers = {
        f"the {evaluation.split} return": returns_of(evaluation.final),
        "the exploration return": exploration_returns_of(evaluation),
        "an observation or action": 0 if finite else math.nan,
    }
    return numbers


def kl_of(evaluation):
    """Its KL, which must be finite too, {what: numbers}; no histogram takes more than 1e19."""
    if evaluation.kl is None:
        return {}
    kl = evaluation.kl.cpu().numpy()
    name = f"the KL of the {evaluation.split} {evaluation.context} context"
    return {name: np.where(kl > 1e19, np.inf, kl)}


def rows_of(evaluations, step, env_steps):
    """Rows of eval.csv, one for each split, context and task: float64 (R, 7), see `CSV_COLUMNS`."""
    rows = []
    for evaluation in evaluations:
        returns = returns_of(evaluation.final)
        explored = exploration_returns_of(evaluation)
        split = SPLITS.index(evaluation.split)
        context = CONTEXTS.index(evaluation.context)
        for task in dict.fromkeys(evaluation.tasks):
            own = np.equal(evaluation.tasks, task)
            means = rounded(returns[own].mean()), rounded(explored[own].mean())
            rows.append([step, env_steps, split, context, task, *means])
    return np.array(rows, np.float64).reshape(-1, len(CSV_COLUMNS))


def rounded(number):
    """To four places; one that is so large that rounding overflows is left as it is."""
    with np.errstate(over="ignore"):
        result = number.round(4)
    return result if np.isfinite(result) else number


def curves_of(evaluation, sparse):
    """Scalars for TensorBoard, {name: number}.

    It sorts by the alphabet, and no other group of names comes before "charts".
    """
    split = evaluation.split
    context = evaluation.context
    curves = {
        f"charts/{split}/{context}_context_return": returns_of(evaluation.final).mean(),
        f"charts/{split}/exploration_return": exploration_returns_of(evaluation).mean(),
    }
    if sparse:
        solved = [path["rewards"][-1] == 0 for path in evaluation.final]
        curves[f"charts/{split}/{context}_context_success"] = np.mean(solved)
    if evaluation.kl is not None:
        curves[f"eval/kl_{split}_{context}_context"] = evaluation.kl.cpu().numpy().mean()
    return curves


def kls_of(evaluations):
    """{name: KL of the posterior to the prior in each environment (E,)}."""
    kls = {}
    for evaluation in evaluations:
        if evaluation.kl is not None:
            name = f"kl_{evaluation.split}_{evaluation.context}_context"
            kls[name] = evaluation.kl.cpu().numpy()
    return kls


def paths_of(evaluations, data, env_id):
    """What Figures 6 and 8 draw, on the training tasks: {label: paths (., L+1, 2) in metres}."""
    groups = {"offline data": data[:500]}
    for evaluation in evaluations:
        if evaluation.split == "train":
            groups["exploration"] = list(itertools.chain(*evaluation.exploration))
            groups[f"{evaluation.context} context"] = evaluation.final
    return {name: envs.ground_paths(env_id, paths) for name, paths in groups.items() if paths}

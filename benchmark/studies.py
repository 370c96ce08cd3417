"""The tables and the picture of three studies.

When does the phase without rewards help, on the Ant: three datasets of the same scripted trot, in
which 0, 60 or 100 % of the trajectories head for their own task; each with labels, with true
rewards, and with true rewards and a frozen encoder and decoder (`own_share` in run.py). The
Humanoid that is told its task, and what SMAC makes of its data (datasets/make_told.py). Half of
every batch from the offline data.
"""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import evidence, tables
from benchmark.evidence import GROUPS, OFFLINE, SECOND, paired, scores
from benchmark.tables import LABEL_ERROR, markdown, mean_words, verdict

SHARES = {"0": "0 %", "60": "60 %", "100": "100 %"}  # folder of results/own_share: share
KINDS = {  # label: what the second phase has
    "smac": "labels",
    "smac_oracle_rewards_frozen": "true rewards, encoder and decoder frozen",
    "smac_oracle_rewards": "true rewards, encoder and decoder trained on",
}
COMPARISONS = {  # title: (label and phase) > (label and phase)
    "the second phase, with labels, helps": (("smac", SECOND), ("smac", OFFLINE)),
    "true rewards, frozen > before": (
        ("smac_oracle_rewards_frozen", SECOND),
        ("smac_oracle_rewards_frozen", OFFLINE),
    ),
    "true rewards, frozen > labels: bad labels": (
        ("smac_oracle_rewards_frozen", SECOND),
        ("smac", SECOND),
    ),
    "true rewards, trained on > frozen: a bad encoder": (
        ("smac_oracle_rewards", SECOND),
        ("smac_oracle_rewards_frozen", SECOND),
    ),
}


def found_of(share):
    return evidence.load(f"own_share/{share}")


def data_of(share):
    """The mean return of a dataset; two of the three are not in the repository, their .json is."""
    file = evidence.RESULTS / "own_share" / f"AntDirection{share}.json"
    if not file.exists():
        file = evidence.RESULTS.parent.parent / "datasets" / "AntDirection.json"
    return json.loads(file.read_text())["mean_return"]


def phase_means(folder, label, runs, column, phase):
    """Means over the evaluations of a phase, for each seed of `runs` {seed: Run}: [number]."""
    means = []
    for seed, run in runs.items():
        curve = evidence.diagnostics(folder, label, seed, column)
        numbers = []
        for step, number in curve.items():
            is_offline = step <= run.offline_end
            if is_offline == (phase == OFFLINE):
                numbers.append(number)
        if numbers:
            means.append(float(np.mean(numbers)))
    return means


def returns_table():
    """A row for each dataset: returns before and after, by what the second phase has."""
    head = ["trajectories that know their task", "data", "before"]
    head += [f"after: {kind}" for kind in KINDS.values()]
    rows = []
    for share, title in SHARES.items():
        found = found_of(share)
        row = [title, f"{data_of(share):.0f}"]
        row.append(mean_words(scores(found.get("smac", {}), OFFLINE).values(), 0))
        for label in KINDS:
            row.append(mean_words(scores(found.get(label, {}), SECOND).values(), 0))
        rows.append(row)
    return markdown(head, rows)


def reasons_table():
    """A row for each dataset: what explains the returns."""
    head = ["trajectories that know their task", "gap between the contexts, before"]
    head += ["labels' error, before", "labels' error, second phase"]
    head += ["KL, offline context, before", "KL, own context, before", "mean Q, before"]
    head += ["mean Q, second phase", "seeds"]
    rows = []
    for share, title in SHARES.items():
        runs = found_of(share).get("smac", {})
        own, offline = (scores(runs, OFFLINE, group) for group in GROUPS[1:])
        row = [title, mean_words(paired(offline, own), 0, "+")]
        for column, phase, digits in (
            (LABEL_ERROR, OFFLINE, 2),
            (LABEL_ERROR, SECOND, 2),
            ("eval/kl_train_offline_context", OFFLINE, 2),
            ("eval/kl_train_own_context", OFFLINE, 2),
            ("train/q_mean", OFFLINE, 0),
            ("train/q_mean", SECOND, 0),
        ):
            means = phase_means(f"own_share/{share}", "smac", runs, column, phase)
            row.append(mean_words(means, digits))
        rows.append([*row, str(len(runs))])
    return markdown(head, rows)


def comparisons_table():
    """For each claim the verdict and the difference by seed, on each dataset."""
    rows = []
    for title, sides in COMPARISONS.items():
        row = [title]
        for share in SHARES:
            found = found_of(share)
            differences = paired(*(scores(found.get(label, {}), phase) for label, phase in sides))
            cell = ""
            if len(differences):
                cell = f"{verdict(differences)}<br>{mean_words(differences, 0, '+')}"
            row.append(cell)
        rows.append(row)
    return markdown(["", *SHARES.values()], rows)


# ===== A Humanoid that is told its task

TOLD = {  # folder: transitions of each task, and what else differs in all of its runs
    "told/450": "450",
    "told/1200": "1,200",
    "told/scaled/1200": "1,200, scaled",
    "told/scaled/4800": "4,800, scaled",
    "told/scaled/4800_any": "4,800, scaled, all in any direction",
}
TOLD_RUNS = {
    "smac": "SMAC",
    "smac_more_offline": "control: as many steps, all offline",
    "smac_small_kl": "SMAC, KL weight .004",
    "smac_small_kl_more_offline": "control, KL weight .004",
    "smac_small_kl_lambda_10": "SMAC, KL weight .004, lambda 10",
    "smac_small_kl_lambda_10_more_offline": "control, KL weight .004, lambda 10",
    "smac_wide_more_offline": "control, KL weight .001, larger policy",
    "smac_no_pearl": "SMAC without PEARL's actor loss",
}


def told_rows(name):
    """The rows of curve.csv or told.csv, which make_told.py wrote."""
    with open(evidence.RESULTS / "told" / name, newline="") as lines:
        return list(csv.DictReader(lines))


def curve_table():
    """How the policy that is told its task has learned: a row for every 50,000 steps."""
    head = "environment steps", "hours", "steps up", "m/s along the task", "speed, m/s", "return"
    rows = []
    for row in told_rows("curve.csv"):
        steps = int(row["steps"])
        if steps % 50_000 == 0:
            cells = [f"{steps:,}", f"{float(row['hours']):.1f}", f"{float(row['steps_up']):.0f}"]
            cells += [f"{float(row['along']):.2f}", f"{float(row['speed']):.2f}"]
            rows.append([*cells, f"{float(row['return']):.0f}"])
    return markdown(head, rows)


def told_return():
    """What the last policy returns on the test tasks, which it is told."""
    return f"{np.mean([float(row['return']) for row in told_rows('told.csv')]):.0f}"


def told_score(folder, label):
    """The score of an offline phase."""
    return mean_words(scores(evidence.load(folder)[label], OFFLINE).values(), 0)


def following(column):
    """A mean over the controls in following.md, which benchmark/experiments/follow.py wrote."""
    text = (evidence.RESULTS / "told" / "following.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    of_controls = [dict(zip(head, row)) for row in rows if "more_offline" in row[0]]
    return f"{np.mean([float(row[column].split()[0]) for row in of_controls]):.2f}"


def told_table():
    """SMAC on the data of the told policy: returns, the labels' error, the KL."""
    head = "transitions of a task, observation", "run", "steps", "before", "after"
    head += ("error on the data, end of offline",)
    head += "labels' error, before", "labels' error, second phase", "KL, own context, before"
    rows = []
    for folder, transitions in TOLD.items():
        found = evidence.load(folder)
        for label, name in TOLD_RUNS.items():
            runs = found.get(label, {})
            if not runs:
                continue
            steps = next(iter(runs.values())).end
            row = [transitions, name, f"{steps:,}"]
            row += [mean_words(scores(runs, phase).values(), 0) for phase in (OFFLINE, SECOND)]
            ends = []
            for seed, run in runs.items():
                curve = evidence.diagnostics(folder, label, seed, tables.DATA_ERROR)
                ends += [number for step, number in curve.items() if step == run.offline_end]
            row.append(mean_words(ends, 2))
            for column, phase in (
                (LABEL_ERROR, OFFLINE),
                (LABEL_ERROR, SECOND),
                ("eval/kl_train_own_context", OFFLINE),
            ):
                row.append(mean_words(phase_means(folder, label, runs, column, phase), 2))
            rows.append(row)
    bound = ["", "the policy that is told its task", "", told_return()]
    rows.append(bound + [""] * (len(head) - len(bound)))
    return markdown(head, rows)


# ===== Half of every batch from the offline data

OFFLINE_SHARE = {  # environment: (benchmark, label) of SMAC as it is, from the same offline phase
    "AntDirection": ("own_share/60", "smac"),
    "SawyerManipulation": ("short/SawyerManipulation", "smac"),
    "CheetahVelocity": ("offline_share/CheetahVelocity", "smac"),
}


def offline_share_table():
    """SMAC as it is, and with half of every batch of the second phase from the offline data."""
    head = "environment", "before", "after", "after, half offline", "difference by seed"
    head += "", "mean Q, second phase", "mean Q, half offline"
    rows = []
    for environment, (name, label) in OFFLINE_SHARE.items():
        folder = f"offline_share/{environment}"
        plain = evidence.load(name).get(label, {})
        half = evidence.load(folder).get("smac_offline_half", {})
        plain = {seed: run for seed, run in plain.items() if seed in half}
        if not plain:
            continue
        digits = tables.places(environment)
        differences = paired(scores(half, SECOND), scores(plain, SECOND))
        row = [environment, mean_words(scores(plain, OFFLINE).values(), digits)]
        row += [mean_words(scores(runs, SECOND).values(), digits) for runs in (plain, half)]
        row += [mean_words(differences, digits, "+"), verdict(differences)]
        for benchmark, of in ((name, label), (folder, "smac_offline_half")):
            means = phase_means(benchmark, of, plain, "train/q_mean", SECOND)
            row.append(mean_words(means, digits))
        rows.append(row)
    return markdown(head, rows)


TABLES = {
    "offline_share": offline_share_table,
    "own_share/returns": returns_table,
    "own_share/reasons": reasons_table,
    "own_share/comparisons": comparisons_table,
    "told/curve": curve_table,
    "told/runs": told_table,
}
NUMBERS = {
    "told/return": told_return,
    "told/plain": lambda: told_score("told/1200", "smac_wide_more_offline"),
    "told/scaled": lambda: told_score("told/scaled/1200", "smac"),
    "told/following/own": lambda: following("training tasks, own context"),
    "told/following/data": lambda: following("training tasks, the data's"),
    "told/following/another": lambda: following("training tasks, another's data"),
    "told/following/cosine/data": lambda: following("cosine, the data's"),
    "told/following/cosine/own": lambda: following("cosine, own"),
}


def draw_own_share(axes, styles):
    """Returns against the share: before, after by kind, each with its 95 % interval.

    Args:
        styles: {label: (colour, line style)}.
    """
    series = {"before the second phase": ("smac", OFFLINE, "gray", "-")}
    for label, kind in KINDS.items():
        series[f"after, {kind}"] = (label, SECOND, *styles[label])
    for place, (name, (label, phase, colour, style)) in enumerate(series.items()):
        points = []
        for share in SHARES:
            values = list(scores(found_of(share).get(label, {}), phase).values())
            if values:
                points.append((float(share) + 1.5 * (place - 1.5), values))
        if not points:
            continue
        x = [at for at, _ in points]
        y = [np.mean(values) for _, values in points]
        axes.plot(x, y, color=colour, linestyle=style, marker="o", label=name)
        for at, values in points:
            _, half = evidence.interval(values)
            if not math.isnan(half):
                low, high = np.mean(values) - half, np.mean(values) + half
                axes.plot([at, at], [low, high], color=colour, linewidth=5, alpha=0.3)
    shares = [float(share) for share in SHARES]
    data = [data_of(share) for share in SHARES]
    axes.plot(shares, data, color="0.6", linestyle=(0, (1, 3)), label="the data")
    axes.set_xticks(shares, SHARES.values())
    axes.set_xlabel("trajectories of the data that head for their own task")
    axes.set_ylabel("return on test tasks")
    axes.legend(fontsize=8)

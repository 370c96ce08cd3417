"""The tables and numbers that plot.py writes into the texts: what evidence.py finds, in words."""

import dataclasses
import functools
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import evidence
from benchmark.evidence import (
    BEFORE,
    GROUPS,
    OFFLINE,
    SECOND,
    TEST,
    data_of,
    interval,
    paired,
    scores,
)
from buffers import InputError

NAMES = {  # label of a run: its name in pictures and texts, in this order
    "smac": "SMAC",
    "smac_more_offline": "control: as many steps, all offline",
    "smac_no_new_data": "control: the second phase on the old data",
    "smac_actor_ablation": "actor ablation",
    "meta_bc": "meta behaviour cloning",
    "macaw": "MACAW",
    "macaw_matched": "MACAW, SMAC's sizes",
    "borel": "BOReL",
    "borel_matched": "BOReL, SMAC's sizes",
    "pearl": "Online Oracle (PEARL)",
    "smac_oracle_rewards": "true rewards in the second phase",
    "smac_oracle_rewards_frozen": "true rewards, encoder and decoder frozen",
    "smac_encoder_q": "only Q-loss (both phases)",
    "smac_encoder_reward_then_q": "only Q-loss (second phase)",
    "smac_encoder_prior": "the encoder's buffer grows",
    "smac_two_critics": "two critics",
    "smac_one_task": "one task an iteration",
    "smac_five_tasks": "five tasks an iteration",
    "smac_lambda_10": "lambda 10",
    "smac_lambda_10_no_pearl": "lambda 10, lambda_pearl 0",
    "smac_lambda_10_no_pearl_no_new_data": "lambda 10, lambda_pearl 0, on the old data",
    "smac_lambda_10_more_offline": "lambda 10, as many steps, all offline",
    "smac_text_kl": "the text's KL weight",
    "smac_text_kl_more_offline": "the text's KL weight, as many steps, all offline",
    "smac_small_kl": "KL weight .004",
    "smac_small_kl_more_offline": "KL weight .004, as many steps, all offline",
    "smac_small_kl_lambda_10": "KL weight .004, lambda 10",
    "smac_small_kl_lambda_10_more_offline": "KL weight .004, lambda 10, as many steps, all offline",
    "smac_tiny_kl": "SMAC, KL weight .0001, offline",
    "smac_tiny_kl_more_offline": "control, KL weight .0001",
    "smac_wide_more_offline": "KL weight .001, larger policy, all offline",
    "smac_no_pearl": "lambda_pearl 0",
    "smac_test_tasks": "explores test tasks",
    "smac_test_tasks_five_tasks": "explores test tasks, five tasks",
    "smac_test_tasks_oracle_rewards": "explores test tasks, true rewards",
    "smac_test_tasks_oracle_rewards_five_tasks": "explores test tasks, true rewards, five tasks",
    "smac_goal_data": "SMAC, goal-directed data",
    "smac_goal_data_more_offline": "control, goal-directed data",
    "smac_goal_data_slow": "SMAC, goal-directed data, lr 3e-4",
    "smac_goal_data_oracle_rewards": "SMAC, goal-directed data, true rewards",
    "focal": "FOCAL",
    "focal_more_offline": "FOCAL, as many steps as SMAC",
    "focal_critic": "FOCAL, the critic trains the encoder",
    "focal_critic_more_offline": "FOCAL, the critic trains the encoder, as many steps as SMAC",
    "focal_lambda_10": "FOCAL, lambda 10",
    "focal_lambda_10_more_offline": "FOCAL, lambda 10, as many steps as SMAC",
    "csro_lambda_10": "CSRO, lambda 10",
    "csro_lambda_10_more_offline": "CSRO, lambda 10, as many steps as SMAC",
    "unicorn_lambda_10": "UNICORN, lambda 10",
    "unicorn_lambda_10_more_offline": "UNICORN, lambda 10, as many steps as SMAC",
    "csro": "CSRO",
    "csro_more_offline": "CSRO, as many steps as SMAC",
    "unicorn": "UNICORN",
    "unicorn_more_offline": "UNICORN, as many steps as SMAC",
    "focal_goal_data": "FOCAL, goal-directed data",
    "csro_goal_data": "CSRO, goal-directed data",
    "unicorn_goal_data": "UNICORN, goal-directed data",
}
MORE_TASKS = "SawyerManipulation, 200 tasks"  # the default data have fifty
FOLDERS = {  # of an environment's runs with --preset short; PointDirection's own sizes are small
    "HopperParam": "short/HopperParam",
    "WalkerParam": "short/WalkerParam",
    "CheetahVelocity": "short/CheetahVelocity",
    "AntDirection": "short/AntDirection",
    "HumanoidDirection": "short/HumanoidDirection",
    MORE_TASKS: "short/SawyerManipulation200",
    "SawyerManipulation": "short/SawyerManipulation",
    "SawyerManipulation8": "short/SawyerManipulation8",
    "PointDirection": "point_direction",
}
SHORT_NAMES = {  # of the columns of wide tables
    "HopperParam": "Hopper",
    "WalkerParam": "Walker",
    "CheetahVelocity": "Cheetah",
    "AntDirection": "Ant",
    "HumanoidDirection": "Humanoid",
    MORE_TASKS: "Sawyer (200 tasks)",
    "SawyerManipulation": "Sawyer (50 tasks)",
    "SawyerManipulation8": "Sawyer (8 behaviours)",
    "PointDirection": "point mass",
}
SIX = list(FOLDERS)[:6]  # the paper's domains
COMPARED = [*SIX, "PointDirection"]  # on which all methods have runs, or will have
LARGER = {  # the paper's networks
    "HopperParam": "hopper_small",
    "WalkerParam": "walker_small",
    "CheetahVelocity": "cheetah_small",
    "AntDirection": "ant_small",
    "HumanoidDirection": "humanoid_small",
    "SawyerManipulation": "sawyer_small",
}
RIVALS = {  # the better of the labels counts
    "actor ablation": ["smac_actor_ablation"],
    "meta-BC": ["meta_bc"],
    "MACAW": ["macaw", "macaw_matched"],
    "BOReL": ["borel", "borel_matched"],
}
OTHER_PAPERS = {  # of other papers, see context/README.md; the better of the labels counts
    "FOCAL": ["focal", "focal_more_offline", "focal_critic", "focal_critic_more_offline"],
    "CSRO": ["csro", "csro_more_offline"],
    "UNICORN": ["unicorn", "unicorn_more_offline"],
}
ALL_RIVALS = RIVALS | OTHER_PAPERS
CONTROL = ["smac_more_offline"]
CONTROLS = {"control": CONTROL, "control, lambda 10": ["smac_lambda_10_more_offline"]}
SECOND_CONTROL = ["smac_no_new_data"]
NEVER = -50.0  # the return on Sawyer of a policy that never achieves the behaviour
NEAR = 0.1  # of the distance from the data to the best method


def method_name(label):
    return "Online Oracle" if label == "pearl" else NAMES[label]


def oracle(environment):
    """True rewards stand for the Online Oracle on Sawyer, whose data are not of PEARL."""
    return ["smac_oracle_rewards" if environment.startswith("Sawyer") else "pearl"]


def best(found, labels, phase="last", group=TEST):
    """The best of some labels of {label: {seed: Run}}.

    Returns the label and its {seed: score}; None and {} if none of them was run.
    """
    candidates = {label: scores(found[label], phase, group) for label in labels if label in found}
    candidates = {label: values for label, values in candidates.items() if values}
    if not candidates:
        return None, {}
    label = max(candidates, key=lambda label: np.mean(list(candidates[label].values())))
    return label, candidates[label]


@functools.cache
def scale(folder, group=TEST):
    """Two returns, the zero and the one of normalised returns: the data's, and of the best method.

    The methods are SMAC, its control, the rivals and the oracle, without variants of SMAC. On
    Sawyer the data are of a script, which no learner has to beat; there zero is the return of
    never achieving the behaviour.
    """
    found = evidence.load(folder)
    environment = "Sawyer" if "Sawyer" in folder else ""
    labels = ["smac", *CONTROL, *sum(ALL_RIVALS.values(), []), *oracle(environment)]
    _, values = best(found, labels, group=group)
    if environment == "Sawyer":
        zero = NEVER
    else:
        zero = data_level(found)
    return zero, float(np.mean(list(values.values())))


# ===== Words


def places(environment):
    """Digits after the point: returns of the robots that walk are hundreds."""
    return 1 if environment.startswith(("Sawyer", "Point")) else 0


def rounded(value, digits, sign=""):
    return f"{value:{sign}z.{digits}f}"  # z: no minus before a zero


def mean_words(values, digits=1, sign=""):
    """Values of several seeds as a cell: "12.3 ± 4.5 (3)"."""
    values = list(values)
    if not values:
        return ""
    mean, half = interval(values)
    width = "" if math.isnan(half) else f" ± {half:.{digits}f}"
    return f"{rounded(mean, digits, sign)}{width} ({len(values)})"


def phase_words(runs, group=TEST, digits=1):
    """Scores of both phases of {seed: Run} as a cell: "12.3 ± 4.5 → 23.4 ± 5.6 (3)"."""
    cells = []
    for phase in (OFFLINE, SECOND):
        if values := scores(runs, phase, group).values():
            cells.append(mean_words(values, digits))
    return " → ".join([cell.rpartition(" (")[0] for cell in cells[:-1]] + cells[-1:])


def markdown(head, rows):
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


# ===== Tables of methods


def data_level(found):
    """The return of the dataset of the first label, in the order of NAMES, that has one, or NaN."""
    for label in sorted(found, key=[*NAMES, *found].index):
        level = data_of(next(iter(found[label].values())).flags)[0]
        if not math.isnan(level):
            return level
    return math.nan


def data_words(found, digits):
    level = data_level(found)
    return "" if math.isnan(level) else rounded(level, digits)


def rival_words(found, digits):
    """The best rival and its score, as a cell."""
    label, values = best(found, sum(ALL_RIVALS.values(), []))
    if label is None:
        return ""
    name = next(name for name, labels in ALL_RIVALS.items() if label in labels)
    return f"{name} {mean_words(values.values(), digits)}"


def glance_table(folders, controls):
    """SMAC, {column: labels} of its controls, the best rival, the oracle."""
    smac = "SMAC, offline", "SMAC, after"
    head = ["environment", "data", *smac, *controls, "best rival", "oracle"]
    rows = []
    for environment, folder in folders.items():
        found = evidence.load(folder)
        if not found:
            continue
        digits = places(environment)
        row = [environment, data_words(found, digits)]
        for phase in (OFFLINE, SECOND):
            row.append(mean_words(scores(found.get("smac", {}), phase).values(), digits))
        for labels in controls.values():
            row.append(mean_words(best(found, labels)[1].values(), digits))
        row.append(rival_words(found, digits))
        row.append(mean_words(best(found, oracle(environment))[1].values(), digits))
        rows.append(row)
    return markdown(head, rows)


def methods_table():
    """Every method on every environment."""
    controls = CONTROLS | {"second control": SECOND_CONTROL}
    head = ["environment", "SMAC, offline", "SMAC, after", *controls, *RIVALS, "oracle"]
    rows = []
    for environment in COMPARED:
        found = evidence.load(FOLDERS[environment])
        digits = places(environment)
        row = [environment]
        for phase in (OFFLINE, SECOND):
            row.append(mean_words(scores(found.get("smac", {}), phase).values(), digits))
        for labels in (*controls.values(), *RIVALS.values(), oracle(environment)):
            row.append(mean_words(best(found, labels)[1].values(), digits))
        rows.append(row)
    return markdown(head, rows)


def runs_table(name):
    """Every label of a benchmark: its returns, and what they cost."""
    titles = [f"{tasks} tasks, {context} context" for tasks, context in GROUPS]
    head = ["run", "data", *titles, "gradient steps", "drawn", "new"]
    rows = []
    found = evidence.load(name)
    for label in sorted(found, key=[*NAMES, *found].index):
        runs = found[label]
        run = next(iter(runs.values()))
        row = [f"`{label}`", data_words({label: runs}, 1)]
        row += [phase_words(runs, group) for group in GROUPS]
        moments = dict.fromkeys((run.offline_end or run.end, run.end))
        drawn = [evidence.drawn_transitions(run.flags, step) for step in moments]
        row.append(" → ".join(f"{step:,}" for step in moments))
        row.append(" → ".join(f"{rl:.1f} + {context:.1f}" for rl, context in drawn))
        row.append(f"{np.mean([run.transitions[run.end] for run in runs.values()]):,.0f}")
        rows.append(row)
    return markdown(head, rows)


# ===== Over environments

OVERALL = {  # method: its labels, of which the better counts on an environment
    "smac": ["smac"],
    "smac_more_offline": CONTROL,
    "smac_actor_ablation": RIVALS["actor ablation"],
    "meta_bc": RIVALS["meta-BC"],
    "macaw": RIVALS["MACAW"],
    "borel": RIVALS["BOReL"],
    "pearl": None,  # see `oracle`
}
FURTHER = {  # in the table, and not in the picture
    "smac_no_new_data": SECOND_CONTROL,
    "smac_lambda_10_more_offline": CONTROLS["control, lambda 10"],
    "focal": OTHER_PAPERS["FOCAL"],
    "csro": OTHER_PAPERS["CSRO"],
    "unicorn": OTHER_PAPERS["UNICORN"],
}


def normalised(label, phase="last"):
    """A method's normalised scores on the paper's six domains: for each an array of its seeds."""
    samples = []
    for environment in SIX:
        found = evidence.load(FOLDERS[environment])
        zero, one = scale(FOLDERS[environment])
        labels = (OVERALL | FURTHER)[label] or oracle(environment)
        _, values = best(found, labels, phase)
        samples.append((np.array(list(values.values())) - zero) / (one - zero))
    return samples


def normalised_means(labels=OVERALL):
    """The interquartile mean of each of some methods.

    Returns [(method, mean, its interval or None, numbers of seeds)]; None, None, () in place of the
    last three where the method has not been run on all environments.
    """
    rows = []
    for label in labels:
        samples = normalised(label)
        numbers = [len(sample) for sample in samples]
        if min(numbers) == 0:
            rows.append((label, None, None, ()))
        else:
            rows.append((label, *evidence.interquartile_mean(samples), numbers))
    return rows


def interval_words(value, interval):
    if value is None:
        return ""
    is_point = interval is None or interval[0] == interval[1]  # as where all seeds beat all others
    width = "" if is_point else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{value:.2f}{width}"


def overall_table():
    """Interquartile means, and how often a seed of SMAC beats one of the other method."""
    head = "method", "seeds", "interquartile mean", "probability that SMAC is better"
    rows = []
    smac = normalised("smac")
    for label, mean, width, numbers in normalised_means([*OVERALL, *FURTHER]):
        seeds = "" if not numbers else f"{min(numbers)}"
        if numbers and max(numbers) > min(numbers):
            seeds = f"{min(numbers)} to {max(numbers)}"
        chance = ""
        if label != "smac" and numbers:
            chance = interval_words(*evidence.probability_of_improvement(smac, normalised(label)))
        if label != "smac" and not numbers:
            chance = chance_words(smac, normalised(label))
        rows.append([method_name(label), seeds, interval_words(mean, width), chance])
    return markdown(head, rows)


def chance_words(firsts, seconds):
    """The probability of improvement on the environments that the second method has been run on."""
    pairs = [(first, second) for first, second in zip(firsts, seconds) if len(second)]
    if not pairs:
        return ""
    value, width = evidence.probability_of_improvement(*map(list, zip(*pairs)))
    return f"{interval_words(value, width)}, on {len(pairs)} of 6"


# ===== Claims


@dataclasses.dataclass
class Claim:
    """Something that the paper says: the first is better than the second, or near it."""

    key: str
    title: str
    first: tuple  # (labels, phase)
    second: tuple  # (labels, phase); labels None: the oracle
    near: bool = False
    environments: tuple = tuple(COMPARED)
    group: tuple = TEST  # tasks and context of the scores


SMAC_AFTER = ["smac"], SECOND
CONTROL_10 = CONTROLS["control, lambda 10"], OFFLINE
ABLATED = "HopperParam", "WalkerParam", "HumanoidDirection", "PointDirection"
EXPLORED = "SawyerManipulation8", "PointDirection"
OTHER_LAMBDA = "HopperParam", "WalkerParam", "CheetahVelocity", "AntDirection", "PointDirection"
CLAIMS = [
    Claim("after", "after > before", SMAC_AFTER, (["smac"], OFFLINE), environments=tuple(FOLDERS)),
    Claim(
        "after_last",
        "after > the last evaluation before",
        SMAC_AFTER,
        (["smac"], BEFORE),
        environments=tuple(FOLDERS),
    ),
    Claim("control", "> control", SMAC_AFTER, (CONTROL, OFFLINE), environments=tuple(FOLDERS)),
    Claim(
        "no_data",
        "> second phase without new data",
        SMAC_AFTER,
        (SECOND_CONTROL, SECOND),
        environments=tuple(FOLDERS),
    ),
    Claim(
        "control_10",
        "> control with lambda 10",
        SMAC_AFTER,
        CONTROL_10,
        environments=OTHER_LAMBDA,
    ),
    Claim(
        "both_10",
        "both with lambda 10: > control",
        (["smac_lambda_10"], SECOND),
        CONTROL_10,
        environments=OTHER_LAMBDA,
    ),
    Claim(
        "no_pearl_10",
        "both with lambda 10, SMAC without PEARL's loss: > control",
        (["smac_lambda_10_no_pearl"], SECOND),
        CONTROL_10,
        environments=OTHER_LAMBDA,
    ),
    Claim(
        "new_data_10",
        "both with lambda 10, without PEARL's loss: new data > none",
        (["smac_lambda_10_no_pearl"], SECOND),
        (["smac_lambda_10_no_pearl_no_new_data"], SECOND),
        environments=OTHER_LAMBDA,
    ),
    Claim(
        "no_pearl_10_smac",
        "SMAC with lambda 10, without PEARL's loss > SMAC",
        (["smac_lambda_10_no_pearl"], SECOND),
        SMAC_AFTER,
        environments=OTHER_LAMBDA,
    ),
    Claim(
        "lambda",
        "control: lambda 10 > lambda 100",
        CONTROL_10,
        (CONTROL, OFFLINE),
        environments=OTHER_LAMBDA,
    ),
    Claim("actor", "> actor ablation", SMAC_AFTER, (RIVALS["actor ablation"], SECOND)),
    Claim("meta_bc", "> meta-BC", SMAC_AFTER, (RIVALS["meta-BC"], OFFLINE)),
    Claim("macaw", "> MACAW", SMAC_AFTER, (RIVALS["MACAW"], OFFLINE)),
    Claim("borel", "> BOReL", SMAC_AFTER, (RIVALS["BOReL"], OFFLINE)),
    Claim("oracle", "near the oracle", SMAC_AFTER, (None, SECOND), near=True),
    Claim(
        "q_both",
        "Figure 7: > only Q-loss, both phases",
        SMAC_AFTER,
        (["smac_encoder_q"], SECOND),
        environments=ABLATED,
    ),
    Claim(
        "q_second",
        "Figure 7: only Q-loss, second phase, is on par",
        (["smac_encoder_reward_then_q"], SECOND),
        SMAC_AFTER,
        near=True,
        environments=ABLATED,
    ),
    Claim(
        "test_tasks",
        "Figure 9: exploring test tasks > training tasks",
        (["smac_test_tasks"], SECOND),
        SMAC_AFTER,
        environments=EXPLORED,
    ),
    Claim(
        "test_rewards",
        "Figure 9: exploring test tasks is near true rewards",
        (["smac_test_tasks"], SECOND),
        (["smac_test_tasks_oracle_rewards"], SECOND),
        near=True,
        environments=EXPLORED,
    ),
    Claim(
        "test_five",
        "Figure 9, five tasks an iteration: test > training tasks",
        (["smac_test_tasks_five_tasks"], SECOND),
        (["smac_five_tasks"], SECOND),
        environments=EXPLORED[:1],
    ),
    Claim(
        "test_five_rewards",
        "Figure 9, five tasks an iteration: test tasks are near true rewards",
        (["smac_test_tasks_five_tasks"], SECOND),
        (["smac_test_tasks_oracle_rewards_five_tasks"], SECOND),
        near=True,
        environments=EXPLORED[:1],
    ),
]
SMAC_BEFORE = ["smac"], OFFLINE
CONTEXT_CLAIMS = []  # of the page on the shift of context
for _name, _labels in OTHER_PAPERS.items():
    _key = _labels[0]
    CONTEXT_CLAIMS += [
        Claim(f"after_{_key}", f"SMAC, after > {_name}", SMAC_AFTER, (_labels, OFFLINE)),
        Claim(f"encoder_{_key}", f"{_name} > SMAC, offline", ([_key], OFFLINE), SMAC_BEFORE),
        Claim(
            f"offline_{_key}",
            f"{_name} is near SMAC, offline, both with offline context",
            ([_key], OFFLINE),
            SMAC_BEFORE,
            near=True,
            group=("train", "offline"),
        ),
    ]
CONTEXT_CLAIMS.sort(key=lambda claim: claim.key.partition("_")[0])
HOLDS, DOES_NOT, UNKNOWN, NOT_RUN = "holds", "does not", "cannot be told", "not run"


def verdict(differences, margin=0.0):
    """One word on "the difference is above -margin", by its 95 % interval over seeds."""
    if len(differences) < 2:
        return UNKNOWN
    mean, half = interval(differences)
    if mean - half > -margin:
        return HOLDS
    if mean + half < -margin:
        return DOES_NOT
    return UNKNOWN


def judge(claim, environment):
    """The verdict on a claim, and the paired differences by seed (none: not run)."""
    folder = FOLDERS[environment]
    found = evidence.load(folder)
    sides = []
    for labels, phase in (claim.first, claim.second):
        labels = labels or oracle(environment)
        sides.append(best(found, labels, phase, claim.group)[1])
    differences = paired(*sides)
    margin = 0.0
    if claim.near and len(differences):
        zero, one = scale(folder, claim.group)
        margin = NEAR * (one - zero)
    return verdict(differences, margin), differences


def judge_adaptation(environment):
    """The verdict on "own context is worth more than another task's, and than the prior"."""
    found = evidence.adaptation(FOLDERS[environment])
    rows = np.array(list(found.values())).reshape(-1, 3)
    differences = [rows[:, 0] - rows[:, other] for other in (1, 2)]
    verdicts = [verdict(some) for some in differences]
    if DOES_NOT in verdicts:
        return DOES_NOT, differences
    return (HOLDS if verdicts == [HOLDS, HOLDS] else UNKNOWN), differences


def claims_table():
    """A row for each claim, a column for each environment."""
    head = ["claim", *SHORT_NAMES.values()]
    rows = claims_rows(CLAIMS, FOLDERS)
    row = ["adapts: own context > another task's; > prior"]
    for environment in FOLDERS:
        word, differences = judge_adaptation(environment)
        cell = ""
        if len(differences[0]):
            parts = [mean_words(some, places(environment), "+") for some in differences]
            cell = f"{word}<br>{'; '.join(parts)}"
        row.append(cell)
    return markdown(head, [*rows, row])


def verdict_cell(word, differences, environment):
    """A verdict and the paired differences that it is on; empty if there are none."""
    if not len(differences):
        return ""
    return f"{word}<br>{mean_words(differences, places(environment), '+')}"


def claims_rows(claims, environments):
    """For each claim its title, and on each environment the verdict and the difference."""
    rows = []
    for claim in claims:
        row = [claim.title]
        for environment in environments:
            cell = ""
            if environment in claim.environments:
                word, differences = judge(claim, environment)
                cell = verdict_cell(word, differences, environment)
            row.append(cell)
        rows.append(row)
    return rows


def claims_of(environment):
    """The claims on one environment, a row each."""
    head = "claim on SMAC", "", "difference by seed", "95 % interval", "seeds"
    rows = []
    for claim in CLAIMS:
        if environment in claim.environments:
            word, differences = judge(claim, environment)
            rows.append([claim.title, word, *difference_words(differences, environment)])
    word, differences = judge_adaptation(environment)
    titles = "adapts: own context > another task's", "adapts: own context > the prior"
    for title, some in zip(titles, differences):
        rows.append([title, verdict(some), *difference_words(some, environment)])
    rows = [row if row[-1] != "0" else [row[0], NOT_RUN, "", "", ""] for row in rows]
    return markdown(head, rows)


def difference_words(differences, environment):
    if not len(differences):
        return "", "", "0"
    digits = places(environment)
    mean, half = interval(differences)
    low, high = rounded(mean - half, digits, "+"), rounded(mean + half, digits, "+")
    width = "" if math.isnan(half) else f"{low} to {high}"
    return rounded(mean, digits, "+"), width, str(len(differences))


# ===== What explains the returns


def adaptation_table():
    """SMAC at its end with z from three sources."""
    head = "environment", "own context", "another task's", "the prior"
    head += "own - another's", "own - prior", "adapts"
    rows = []
    for environment, folder in FOLDERS.items():
        found = evidence.adaptation(folder)
        if not found:
            continue
        digits = places(environment)
        columns = zip(*found.values())
        word, differences = judge_adaptation(environment)
        row = [environment, *(mean_words(column, digits) for column in columns)]
        row += [mean_words(some, digits, "+") for some in differences]
        rows.append([*row, word])
    return markdown(head, rows)


ESS = "train/actor_weight_ess"
LABEL_ERROR = "eval/generated_reward_mse_over_reward_variance"
DATA_ERROR = "eval/decoder_loss_over_reward_variance"


def spread(values, digits):
    values = list(values)
    if not values:
        return ""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def labels_table():
    """How wrong the labels of SMAC are, and how large its Q-values grow."""
    head = "environment", "error on the data", "error on exploration, second phase"
    head += "mean Q, first to last of the second phase", "seeds"
    rows = []
    for environment, folder in FOLDERS.items():
        runs = evidence.load(folder).get("smac", {})
        on_data, explored, first_q, last_q = [], [], [], []
        for seed, run in runs.items():
            offline = evidence.diagnostics(folder, "smac", seed, DATA_ERROR)
            on_data += [x for step, x in offline.items() if step == run.offline_end]
            errors = evidence.diagnostics(folder, "smac", seed, LABEL_ERROR)
            explored += [x for step, x in errors.items() if step > run.offline_end]
            q_means = evidence.diagnostics(folder, "smac", seed, "train/q_mean")
            later = [x for step, x in sorted(q_means.items()) if step > run.offline_end]
            first_q += later[:1]
            last_q += later[-1:]
        q_words = f"{np.mean(first_q):.0f} → {np.mean(last_q):.0f}" if last_q else ""
        row = [environment, spread(on_data, 2), spread(explored, 2), q_words, str(len(runs))]
        rows.append(row)
    return markdown(head, rows)


def lambda_table():
    """How much the weights of Eq. 2 differ, and what follows, with lambda 100 and with 10."""
    head = "environment", "lambda", "effective sample size"
    head += "end of the offline phase", "control", "after", "after, without PEARL's loss"
    rows = []
    for environment in OTHER_LAMBDA:
        folder = FOLDERS[environment]
        found = evidence.load(folder)
        digits = places(environment)
        for value, label in (("100", "smac"), ("10", "smac_lambda_10")):
            smac = found.get(label, {})
            control = found.get(f"{label}_more_offline", {})
            no_pearl = found.get(f"{label}_no_pearl", {})
            shares = []
            for seed, run in control.items():
                curve = evidence.diagnostics(folder, f"{label}_more_offline", seed, ESS)
                shares += [share for step, share in curve.items() if step == run.end]
            row = [environment, value, spread(shares, 3)]
            columns = (smac, BEFORE), (control, OFFLINE), (smac, SECOND), (no_pearl, SECOND)
            for runs, phase in columns:
                row.append(mean_words(scores(runs, phase).values(), digits))
            rows.append(row)
    return markdown(head, rows)


def lambda_rivals_table():
    """SMAC's control and the other losses of the encoder on the point mass, lambda 100 and 10."""
    head = "as many steps as SMAC, all offline", "lambda 100", "lambda 10"
    head += "10 > 100", "control > it, both with 10"
    found = evidence.load(FOLDERS["PointDirection"])

    def scores_of(label):
        return scores(found.get(label, {}), OFFLINE)

    def cell(differences):
        return verdict_cell(verdict(differences), differences, "PointDirection")

    control = scores_of("smac_lambda_10_more_offline")
    keys = {"SMAC's control": "smac", "FOCAL": "focal", "CSRO": "csro", "UNICORN": "unicorn"}
    rows = []
    for name, key in keys.items():
        large, small = scores_of(f"{key}_more_offline"), scores_of(f"{key}_lambda_10_more_offline")
        row = [name, mean_words(large.values()), mean_words(small.values())]
        row.append(cell(paired(small, large)))
        row.append("" if key == "smac" else cell(paired(control, small)))
        rows.append(row)
    return markdown(head, rows)


def success_table(name):
    """Sawyer: the share of third episodes that end with the behaviour achieved, as a score."""
    titles = [f"{tasks} tasks, {context} context" for tasks, context in GROUPS]
    rows = []
    found = evidence.load(name)
    for label in sorted(found, key=[*NAMES, *found].index):
        runs = found[label]
        row = [f"`{label}`"]
        for group in GROUPS:
            column = f"charts/{group[0]}/{group[1]}_context_success"
            successes = {}
            for seed, run in runs.items():
                curve = evidence.diagnostics(name, label, seed, column)
                if curve:
                    curves = {TEST: curve}
                    successes[seed] = dataclasses.replace(run, curves=curves)
            row.append(phase_words(successes, digits=2))
        rows.append(row)
    return markdown(["success", *titles], rows)


# ===== The shift of context

CONTEXT_METHODS = {  # name: (label, phase), which all environments have
    "SMAC, offline": SMAC_BEFORE,
    "SMAC, after": SMAC_AFTER,
    "control": (CONTROL, OFFLINE),
    "FOCAL": (["focal"], OFFLINE),
    "CSRO": (["csro"], OFFLINE),
    "UNICORN": (["unicorn"], OFFLINE),
}
CONTEXT_VARIANTS = {}  # which stand in a table once they have been run
for _label in (
    "focal_more_offline",
    "csro_more_offline",
    "unicorn_more_offline",
    "focal_critic",
    "focal_critic_more_offline",
    "smac_tiny_kl",
    "smac_tiny_kl_more_offline",
):
    CONTEXT_VARIANTS[NAMES[_label]] = ([_label], OFFLINE)
GOAL_METHODS = {  # on data whose actions give the task away
    "SMAC, offline": (["smac_goal_data"], OFFLINE),
    "SMAC, after": (["smac_goal_data"], SECOND),
    "control": (["smac_goal_data_more_offline"], OFFLINE),
    "FOCAL": (["focal_goal_data"], OFFLINE),
    "CSRO": (["csro_goal_data"], OFFLINE),
    "UNICORN": (["unicorn_goal_data"], OFFLINE),
}
GOAL_CLAIMS = []
for _first, _second, _group in (
    ("SMAC, after", "SMAC, offline", TEST),
    ("SMAC, after", "control", TEST),
    ("SMAC, after", "control", ("train", "offline")),
    ("FOCAL", "SMAC, after", TEST),
    ("CSRO", "SMAC, after", TEST),
    ("UNICORN", "SMAC, after", TEST),
    ("UNICORN", "control", TEST),
    ("UNICORN", "control", ("train", "offline")),
):
    _title = f"{_first} > {_second}"
    if _group != TEST:
        _title += ", both with offline context"
    _sides = GOAL_METHODS[_first], GOAL_METHODS[_second]
    GOAL_CLAIMS.append(Claim("goal", _title, *_sides, group=_group))
OWN_CONTEXT = "prior, 2"  # how SMAC explores, in the tables of experiments/explore.py
WAYS_TO_EXPLORE = "prior", "random", "task", "idaq"  # as there


def context_scores(environment, labels, phase):
    """{(tasks, context): {seed: score}} of a method of the tables on the shift of context."""
    found = evidence.load(FOLDERS[environment])
    runs = found.get(labels[0], {})
    return {group: scores(runs, phase, group) for group in GROUPS}


def context_rows(methods, environments):
    """For each environment and method its returns with both contexts, and the gap between them."""
    rows = []
    for environment in environments:
        digits = places(environment)
        for name, (labels, phase) in methods.items():
            found = context_scores(environment, labels, phase)
            row = [SHORT_NAMES[environment], name]
            row += [mean_words(values.values(), digits) for values in found.values()]
            test_own, train_own, train_offline = found.values()
            for own in (test_own, train_own):
                row.append(mean_words(paired(train_offline, own), digits, "+"))
            rows.append(row)
    return rows


CONTEXT_HEAD = ["environment", "method", "own context, test tasks", "own context, training tasks"]
CONTEXT_HEAD += ["offline context, training tasks", "gap", "gap, training tasks"]


def context_table():
    return markdown(CONTEXT_HEAD, context_rows(CONTEXT_METHODS, COMPARED))


def context_variants_table():
    rows = [row for row in context_rows(CONTEXT_VARIANTS, COMPARED) if any(row[2:])]
    return markdown(CONTEXT_HEAD, rows) if rows else "None of them has been run yet."


def goal_table():
    """Both contexts on the goal-directed data of PointDirection."""
    rows = context_rows(GOAL_METHODS, ["PointDirection"])
    return markdown(CONTEXT_HEAD[1:], [row[1:] for row in rows])


def goal_claims_table():
    rows = claims_rows(GOAL_CLAIMS, ["PointDirection"])
    return markdown(["", "goal-directed data"], rows)


def context_claims_table():
    head = ["", *(SHORT_NAMES[environment] for environment in COMPARED)]
    return markdown(head, claims_rows(CONTEXT_CLAIMS, COMPARED))


def played_agent(name):
    """(environment, label, seed) of an agent {folder}/{label}__{seed}.npz of experiments/explore.py.

    None: it is another one, as those in agents/.
    """
    folder, _, file = name.partition("/")
    label, _, seed = Path(file).stem.rpartition("__")
    environments = {Path(path).name: environment for environment, path in FOLDERS.items()}
    environments |= {environment: environment for environment in SHORT_NAMES}
    if folder not in environments or label not in NAMES:
        return None
    return environments[folder], label, int(seed)


def explored_by_seed():
    """What agents of several seeds return: {(environment, label, steps): {way: {seed: return}}}."""
    found = {}
    for row in evidence.explored():
        played = played_agent(row["agent"])
        if not played:
            continue
        environment, label, seed = played
        ways = found.setdefault((environment, label, int(row["gradient steps"])), {})
        for way in list(row)[2:]:
            ways.setdefault(way, {})[seed] = after_exploring(row, way)[0]
    return {key: ways for key, ways in found.items() if len(ways.get(OWN_CONTEXT, {})) > 1}


def explored_table():
    """The rows of the tables of experiments/explore.py that are of one seed."""
    by_seed = {(environment, label) for environment, label, _ in explored_by_seed()}
    rows = []
    for row in evidence.explored():
        played = played_agent(row["agent"])
        if not played or played[:2] not in by_seed:
            rows.append(row)
    head = list(dict.fromkeys(column for row in rows for column in row))
    return markdown(head, [[row.get(column, "") for column in head] for row in rows])


def smac_by_way(environment):
    """What SMAC returns before and after its second phase, by the way it explores.

    Returns two {way: {seed: return}}, or None if agents of several seeds were not played.
    """
    steps = {}
    for (where_played, label, step), ways in explored_by_seed().items():
        if where_played == environment and label == "smac":
            steps[step] = ways
    if len(steps) != 2:
        return None
    before, after = (steps[step] for step in sorted(steps))
    return before, after


def ways_table():
    """The same ways to explore, of agents of several seeds."""
    found = explored_by_seed()
    if not found:
        return "None of them has been played yet."
    names = [f"{way}, {number}" for way in WAYS_TO_EXPLORE for number in (2, 10)]
    names.append("offline context")
    rows = []
    for (environment, label, step), ways in found.items():
        digits = places(environment)
        row = [SHORT_NAMES[environment], NAMES[label], f"{step:,}"]
        row += [mean_words(ways.get(way, {}).values(), digits) for way in names]
        rows.append(row)
    return markdown(["environment", "agents", "gradient steps", *names], rows)


def ways_claims_table():
    """Is a way to explore better than SMAC's own, and is the second phase better than that way?"""
    environments = [name for name in COMPARED if smac_by_way(name)]
    if not environments:
        return "None of them has been played yet."
    ways = [f"{way}, {number}" for way in WAYS_TO_EXPLORE for number in (2, 10)]
    ways.remove(OWN_CONTEXT)
    rows = []
    for way in ways:
        cells = []
        for environment in environments:
            before, _ = smac_by_way(environment)
            differences = paired(before.get(way, {}), before[OWN_CONTEXT])
            cells.append(verdict_cell(verdict(differences), differences, environment))
        rows.append([f"before: {way} > {OWN_CONTEXT}", *cells])
    for way in [OWN_CONTEXT, *ways]:
        cells = []
        for environment in environments:
            before, after = smac_by_way(environment)
            differences = paired(after[OWN_CONTEXT], before.get(way, {}))
            cells.append(verdict_cell(verdict(differences), differences, environment))
        rows.append([f"after, {OWN_CONTEXT} > before, {way}", *cells])
    return markdown(["", *(SHORT_NAMES[name] for name in environments)], rows)


def idaq_table():
    """Is IDAQ with ten episodes better than how the agent explores in its evaluations?"""
    rows = []
    for (environment, label, step), ways in explored_by_seed().items():
        if "idaq, 10" not in ways:
            continue
        runs = evidence.load(FOLDERS[environment])[label]
        flags = next(iter(runs.values())).flags
        own = f"{flags.get('explore', 'prior')}, 2"
        differences = paired(ways["idaq, 10"], ways.get(own, {}))
        cell = verdict_cell(verdict(differences), differences, environment)
        name = NAMES[label]
        rows.append([SHORT_NAMES[environment], name, f"{step:,}", own, cell.replace("<br>", ", ")])
    head = "environment", "agents", "gradient steps", "as it explores", "idaq, 10 is better"
    return markdown(head, rows) if rows else "None of them has been played yet."


def after_exploring(row, column):
    """(return, standard error) of a cell of explore.py, "exploration → return ± error"."""
    words = row[column].rpartition("→")[2].split()
    return float(words[0]), float(words[2])


def choosing():
    """What SMAC returns before and after its second phase.

    Returns {agent: {what: (return, standard error)}}, what being "before", as SMAC explores; of the
    other ways to explore before the second phase the name of the best; and "after".
    """
    phases = {}
    for row in evidence.explored():
        if not played_agent(row["agent"]):
            phases.setdefault(row["agent"], []).append(row)
    found = {}
    for agent, rows in phases.items():
        if len(rows) != 2:  # it has no second phase
            continue
        before, after = rows
        ways = [column for column, cell in before.items() if "→" in cell and column != OWN_CONTEXT]
        best_way = max(ways, key=lambda way: after_exploring(before, way)[0])
        found[agent] = {
            "before": after_exploring(before, OWN_CONTEXT),
            best_way: after_exploring(before, best_way),
            "after": after_exploring(after, OWN_CONTEXT),
        }
    return found


def choosing_table():
    head = "agent", "before, as SMAC explores", "before, the best other way", "after"
    rows = []
    for agent, returns in choosing().items():
        row = [agent]
        for what, (mean, error) in returns.items():
            way = "" if what in ("before", "after") else f" ({what})"
            row.append(f"{mean:.1f} ± {error:.1f}{way}")
        rows.append(row)
    return markdown(head, rows)


def second_phase_is_more(is_more):
    """Agents whose return after the second phase is above any choice before it, or all others.

    Above means by two standard errors of the difference.
    """
    names = []
    for agent, returns in choosing().items():
        *choices, (after, after_error) = returns.values()
        chosen, chosen_error = max(choices)
        margin = 2 * math.hypot(chosen_error, after_error)
        if (after - chosen > margin) == is_more:
            names.append(Path(agent).stem)
    return ", ".join(names) or "none"


# ===== Single numbers


def labels_share():
    """The part of the gain of true rewards that labels give on PointDirection, in per cent."""
    found = evidence.load("point_direction")
    before = np.mean(list(scores(found["smac"], OFFLINE).values()))
    with_labels = np.mean(list(scores(found["smac"], SECOND).values()))
    with_rewards = np.mean(list(scores(found["smac_oracle_rewards"], SECOND).values()))
    return f"{100 * (with_labels - before) / (with_rewards - before):.0f}"


def frozen_belief():
    """BOReL's score on PointDirection with a belief that reads nothing of the scored episode."""
    column = "charts/test/frozen_belief_return"
    ends = []
    for seed in evidence.load("point_direction")["borel"]:
        curve = evidence.diagnostics("point_direction", "borel", seed, column)
        ends.append(np.mean([curve[step] for step in sorted(curve)[-evidence.EVALUATIONS :]]))
    return f"{np.mean(ends):.1f}"


def at_step(folder, label, last):
    """The mean of the three evaluations up to a gradient step, mean over seeds."""
    means = []
    for run in evidence.load(folder)[label].values():
        curve = run.curves[TEST]
        steps = sorted(step for step in curve if step <= last)[-evidence.EVALUATIONS :]
        means.append(np.mean([curve[step] for step in steps]))
    return f"{np.mean(means):.0f}"


def walker_training():
    """What SMAC is above the control with lambda 10 on Walker's training tasks, by seed."""
    found = evidence.load(FOLDERS["WalkerParam"])
    group = "train", "own"
    smac = scores(found["smac"], SECOND, group)
    control = scores(found["smac_lambda_10_more_offline"], OFFLINE, group)
    return mean_words(paired(smac, control), 0, "+")


def ant_after_1000_steps():
    """The lowest and the highest seed of SMAC on the Ant after 1,000 steps of the second phase."""
    runs = evidence.load(FOLDERS["AntDirection"])["smac"].values()
    returns = [run.curves[TEST][16_000] for run in runs]
    return f"{min(returns):.0f} and {max(returns):.0f}"


def verdicts_on(key):
    """{environment: word} of a claim; the claim "both" is that SMAC beats both controls."""
    verdicts = {}
    if key == "adapts":
        for environment in FOLDERS:
            verdict_here, differences = judge_adaptation(environment)
            verdicts[environment] = verdict_here if len(differences[0]) else NOT_RUN
    elif key == "both":
        second = verdicts_on("no_data")
        for environment, word in verdicts_on("control").items():
            words = {word, second[environment]}
            worst = [found for found in (DOES_NOT, NOT_RUN, UNKNOWN) if found in words]
            verdicts[environment] = worst[0] if worst else HOLDS
    else:
        claim = next(claim for claim in CLAIMS + CONTEXT_CLAIMS if claim.key == key)
        for environment in claim.environments:
            verdict_here, differences = judge(claim, environment)
            verdicts[environment] = verdict_here if len(differences) else NOT_RUN
    return verdicts


def where(key, word):
    """The environments on which the verdict on a claim is a word, or on which it was not run."""
    return listed([name for name, found in verdicts_on(key).items() if found == word])


def listed(environments):
    """Their short names, in words."""
    names = [SHORT_NAMES[name] for name in environments]
    if len(names) < 2:
        return names[0] if names else "none"
    return f"{', '.join(names[:-1])} and {names[-1]}"


WORDS = {"holds": HOLDS, "does-not": DOES_NOT, "unknown": UNKNOWN, "not-run": NOT_RUN}


def verdicts_table():
    """Where SMAC, after its second phase, is better than what it is compared with, and where not."""
    titles = {
        "after": "its own offline phase",
        "control": "the control",
        "no_data": "the second control",
        "both": "both controls",
        "control_10": "the control with lambda 10",
        "actor": "its actor ablation",
        "meta_bc": "meta-BC",
        "macaw": "MACAW",
        "borel": "BOReL",
    }
    rows = []
    for key, title in titles.items():
        found = verdicts_on(key)
        not_run = [name for name in FOLDERS if found.get(name, NOT_RUN) == NOT_RUN]
        cells = [where(key, word) for word in (HOLDS, DOES_NOT, UNKNOWN)]
        rows.append([title, *cells, listed(not_run)])
    header = ["SMAC, after its second phase, is better than", "on", "worse, on"]
    return markdown([*header, "cannot be told, on", "not run, on"], rows)


def lambda_where_table():
    """Where the claims on lambda hold."""
    rows = []
    for claim in CLAIMS:
        if claim.environments == OTHER_LAMBDA:
            rows.append([claim.title, *(where(claim.key, word) for word in WORDS.values())])
    return markdown(["claim", *WORDS.values()], rows)


def context_where_table(kind):
    """Where the claims of a kind, "after" or "encoder", hold of FOCAL, CSRO and UNICORN."""
    rows = []
    for name, (label, *_) in OTHER_PAPERS.items():
        rows.append([name, *(where(f"{kind}_{label}", word) for word in WORDS.values())])
    return markdown(["", *WORDS.values()], rows)


TABLES = {
    "glance": lambda: glance_table({name: FOLDERS[name] for name in COMPARED}, CONTROLS),
    "larger": lambda: glance_table(LARGER, {"control": CONTROL}),
    "methods": methods_table,
    "overall": overall_table,
    "claims": claims_table,
    "adaptation": adaptation_table,
    "labels": labels_table,
    "lambda": lambda_table,
    "lambda_where": lambda_where_table,
    "lambda_rivals": lambda_rivals_table,
    "verdicts": verdicts_table,
    "context": context_table,
    "context_variants": context_variants_table,
    "context_claims": context_claims_table,
    "goal": goal_table,
    "goal_claims": goal_claims_table,
    "explored": explored_table,
    "choosing": choosing_table,
    "ways": ways_table,
    "ways_claims": ways_claims_table,
    "idaq": idaq_table,
}
TABLES_OF = {
    "runs": runs_table,
    "success": success_table,
    "claims": claims_of,
    "context_where": context_where_table,
}  # claims/AntDirection
NUMBERS = {
    "ant_after_1000_steps": ant_after_1000_steps,
    "walker_training": walker_training,
    "labels_share": labels_share,
    "frozen_belief": frozen_belief,
    "second_phase/more": lambda: second_phase_is_more(True),
    "second_phase/not-more": lambda: second_phase_is_more(False),
    "hopper_at_100k": lambda: at_step("hopper_small", "smac", 100_000),
    "hopper_oracle_at_100k": lambda: at_step("hopper_small", "pearl", 100_000),
}


def table(name):
    """The table of a mark. Raises InputError: there is none of that name."""
    kind, _, rest = name.partition("/")
    if name in TABLES:
        return TABLES[name]()
    if kind in TABLES_OF:
        return TABLES_OF[kind](MORE_TASKS if rest == "SawyerManipulation200" else rest)
    raise InputError(f"there is no table {name}")


def number(name):
    """The number, or the few words, of a mark. Raises InputError: there is none of that name."""
    kind, *rest = name.split("/")
    if kind == "where" and len(rest) == 2 and rest[1] in WORDS:
        return where(rest[0], WORDS[rest[1]])
    if name not in NUMBERS:
        raise InputError(f"there is no number {name}")
    return NUMBERS[name]()

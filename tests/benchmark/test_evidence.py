"""What benchmark/evidence.py, tables.py and plot.py make of runs."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="pip install -r benchmark/requirements.txt")

import imageio.v2 as imageio

from benchmark import evidence, plot, run, studies, tables, watch
from buffers import InputError
from plumbing.files import CSV_COLUMNS

ROOT = Path(__file__).resolve().parent.parent.parent


def write_run(folder, label, seed, rows, **flags):
    """Files of a run; rows of (gradient step, new transitions, return).

    The return is that on test tasks, or of what the row says after it: "train,own".
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step, env_steps, value, *group in rows:
        lines.append(f"{step},{env_steps},{''.join(group) or 'test,own'},0,{value},0")
    (folder / f"{label}__{seed}.csv").write_text("\n".join([",".join(CSV_COLUMNS), *lines, ""]))
    flags = {"env_id": "PointDirection", "dataset": None, "meta_batch": 4, "rl_batch": 8} | flags
    (folder / f"{label}__{seed}.json").write_text(json.dumps(flags))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results, in a repository with the datasets."""
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    folder = tmp_path / "benchmark" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(evidence, "RESULTS", folder)
    tables.scale.cache_clear()
    yield folder
    tables.scale.cache_clear()


def cells(table, row):
    """The cells of a row of a table in Markdown, by its first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return next(found[1:] for found in rows if found[0] == row)


# ----- Scores


def test_a_score_is_the_mean_of_the_last_three_evaluations_of_a_phase(results):
    rows = [(0, 0, 99.0), (1, 0, 50.0), (2, 0, 1.0), (3, 0, 2.0), (4, 0, 6.0), (5, 9, 7.0)]
    write_run(results / "point", "smac", 1, rows)
    write_run(results / "point", "pearl", 1, [(0, 5, 99.0), (1, 6, 1.0), (2, 7, 3.0)])
    smac = evidence.load("point")["smac"][1]
    assert smac.offline_end == 4 and smac.end == 5 and smac.phases == ["offline", "self-supervised"]
    assert smac.score("offline") == 3 and smac.scored_steps("offline") == [2, 3, 4]
    assert smac.score(evidence.BEFORE) == 6  # the last one before the second phase
    assert smac.score("self-supervised") == 7  # it has one evaluation
    pearl = evidence.load("point")["pearl"][1]
    assert pearl.phases == ["self-supervised"] and pearl.score("offline") is None
    assert evidence.scores({1: pearl}, "last") == {1: 2}  # none before the first gradient step
    assert evidence.scores({1: smac}, "last", ("train", "own")) == {}


def test_a_second_phase_that_collects_nothing_is_known_by_its_flags(results):
    rows = [(step, 0, float(step)) for step in (1, 2, 3, 4)]
    flags = dict(offline_steps=2, prior_steps=0, posterior_steps=0)
    write_run(results / "point", "smac_no_new_data", 1, rows, online_iterations=2, **flags)
    write_run(results / "point", "smac_more_offline", 1, rows, online_iterations=0, **flags)
    found = evidence.load("point")
    assert found["smac_no_new_data"][1].offline_end == 2
    assert found["smac_no_new_data"][1].score("self-supervised") == 3.5
    assert found["smac_more_offline"][1].offline_end == 4


def test_an_evaluation_before_borel_trains_a_policy_does_not_count(results):
    rows = [(1, 0, 99.0), (2, 0, 1.0), (3, 0, 3.0)]
    write_run(results / "point", "borel", 1, rows, vae_steps=1, offline_steps=2)
    borel = evidence.load("point")["borel"][1]
    assert borel.scored_steps("offline") == [2, 3] and borel.score("offline") == 2


def test_a_run_that_goes_on_is_no_seed(results):
    write_run(results / "point", "smac", 1, [(1, 0, 1.0), (2, 5, 2.0)])
    write_run(results / "point", "smac", 2, [(1, 0, 1.0)])
    write_run(results / "point", "smac", 3, [(1, 0, 1.0), (2, 5, 2.0)])
    assert sorted(evidence.load("point")["smac"]) == [1, 3]
    assert evidence.load("nowhere") == {}


def test_intervals_by_hand():
    # Quantiles of Student's t from a printed table, of 1, 2, 3, 9 and 30 degrees of freedom
    quantiles = {2: 12.7062, 3: 4.30265, 4: 3.18245, 10: 2.26216, 31: 2.04227}
    for number, quantile in quantiles.items():
        values = np.arange(float(number))
        half = quantile * values.std(ddof=1) / math.sqrt(number)
        assert evidence.interval(values) == pytest.approx((values.mean(), half), rel=1e-4)
    mean, half = evidence.interval([5.0])
    assert mean == 5 and math.isnan(half)


def test_differences_are_of_the_seeds_that_both_have():
    differences = evidence.paired({1: 5.0, 2: 7.0, 4: 9.0}, {4: 1.0, 1: 3.0, 3: 0.0})
    assert differences.tolist() == [2.0, 8.0]
    assert len(evidence.paired({1: 5.0}, {})) == 0


def test_the_interquartile_mean_by_hand():
    """Of eight scores the middle four count; seeds are drawn within an environment."""
    samples = [np.array([-9.0, 1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0, 99.0])]
    mean, (low, high) = evidence.interquartile_mean(samples)
    assert mean == (2 + 3 + 4 + 5) / 4 and low < mean < high
    constant = [np.array([1.0, 1.0]), np.array([3.0, 3.0])]
    assert evidence.interquartile_mean(constant) == (2.0, (2.0, 2.0))  # whatever is drawn
    assert evidence.interquartile_mean([np.array([1.0]), np.array([3.0, 4.0])])[1] is None


def test_environments_count_the_same_in_the_interquartile_mean():
    """One seed with 0 counts like four with 4: the middle half is 0, 0, 4, 4."""
    samples = [np.array([0.0]), np.array([4.0, 4.0, 4.0, 4.0])]
    assert evidence.interquartile_mean(samples)[0] == 2.0
    samples = [np.array([0.0, 0.0]), np.array([4.0, 4.0, 4.0])]
    assert evidence.interquartile_mean(samples) == (2.0, (2.0, 2.0))


def test_the_probability_of_improvement_by_hand():
    """On the first environment three of four pairs are won; on the second two, and two are ties."""
    firsts = [np.array([2.0, 4.0]), np.array([1.0, 1.0])]
    seconds = [np.array([1.0, 3.0]), np.array([1.0, 0.0])]
    chance, (low, high) = evidence.probability_of_improvement(firsts, seconds)
    assert chance == pytest.approx((0.75 + 0.75) / 2) and 0 <= low <= chance <= high <= 1
    assert evidence.probability_of_improvement(firsts[:1], [np.array([1.0])]) == (1.0, None)


def test_data_are_a_mean_over_tasks_by_hand(results):
    arrays = {"rl_tasks": [0, 1, 0, 1, 1, 1], "rl_lengths": [1, 60, 2, 1, 1, 1]}
    # Of task 1's first trajectory 50 steps count, the horizon
    rewards = [3.0, *[0.1] * 60, 2.0, 3.0, 9.0, 9.0, 9.0]
    file = results / "data.npz"
    np.savez(file, **arrays, rl_rewards=np.float32(rewards), encoder_rewards=np.full(9, 99.0))
    flags = {"env_id": "PointDirection", "dataset": str(file)}
    # Task 0: (3 + 5) / 2 = 4; task 1: (5 + 9 + 9 + 9) / 4 = 8.
    # Three in a row: task 0 has one of 3 steps, task 1 two of 63.
    assert evidence.data_of(flags) == pytest.approx((6.0, (3 + 63 / 2) / 2))
    assert np.isnan(evidence.data_of({"env_id": "PointDirection"})).all()  # the oracle
    assert np.isnan(evidence.data_of(flags | {"dataset": "datasets/none.npz"})).all()


def test_drawn_transitions_by_hand(results):
    smac = {"meta_batch": 4, "rl_batch": 128, "context_batch": 64}
    assert evidence.drawn_transitions(smac, 3_000) == pytest.approx((1.536, 0.768))
    focal = smac | {"context_loss": "focal"}
    assert evidence.drawn_transitions(focal, 3_000) == pytest.approx((1.536, 1.536))
    borel = {"env_id": "PointDirection", "dataset": None, "meta_batch": 16, "rl_batch": 128}
    borel |= {"vae_steps": 1_000, "vae_tasks": 4, "vae_trajectories": 2}
    # The data have trajectories of 50 steps, 150 in three; 2,000 of the 3,000 steps are SAC's
    assert evidence.drawn_transitions(borel, 3_000) == pytest.approx((4.096, 1.2))
    assert evidence.drawn_transitions(borel, 500) == pytest.approx((0, 0.6))


def test_adaptation_is_read_at_the_end_of_the_run(results):
    row = "| {} | {} | {} ± 0.5 | 2.0 ± 0.5 | 1.0 ± 0.5 | 9.0 ± 0.5 |\n"
    own = results / "short" / "AntDirection"
    own.mkdir(parents=True)
    text = row.format("short/AntDirection/smac__1.npz", 10, 70.0)
    text += row.format("short/AntDirection/smac__1.npz", 20, 7.0)
    text += row.format("short/AntDirection/meta_bc__1.npz", 20, 70.0)
    (own / "adaptation.md").write_text(text)
    common = row.format("hopper_param/smac/HopperParam__smac_offline_online__2", 20, 3.0)
    common += row.format("hopper_param/smac_q/HopperParam__smac_offline_online__2", 20, 70.0)
    (results / "adaptation.md").write_text(common)
    assert evidence.adaptation("short/AntDirection") == {1: (7.0, 2.0, 1.0)}
    assert evidence.adaptation("hopper_param") == {2: (3.0, 2.0, 1.0)}
    assert evidence.adaptation("hopper_small") == {}


# ----- Tables


def test_cells_in_words():
    assert (
        tables.mean_words([1.0, 3.0]) == "2.0 ± 12.7 (2)" and tables.mean_words([5.0]) == "5.0 (1)"
    )
    assert tables.mean_words([]) == "" and tables.mean_words([-0.01]) == "0.0 (1)"
    assert tables.mean_words([2.0, 2.0], 0, "+") == "+2 ± 0 (2)"


@pytest.mark.parametrize(
    "differences, margin, word",
    [
        ([3.0, 3.1, 3.2], 0, "holds"),
        ([-3.0, -3.1, -3.2], 0, "does not"),
        ([-1.0, 3.0, 1.0], 0, "cannot be told"),
        ([9.0], 0, "cannot be told"),  # one seed
        ([0.0, 0.0], 0, "cannot be told"),
        ([-1.0, -1.1], 5, "holds"),  # near: within the margin
        ([-9.0, -9.1], 5, "does not"),
    ],
)
def test_verdicts(differences, margin, word):
    assert tables.verdict(np.array(differences), margin) == word


def write_method(results, environment, label, scores, phases=1):
    """Runs whose score in the offline phase is 0, or the score itself if they have one phase."""
    for seed, score in enumerate(scores, start=1):
        rows = [(1, 0, 0.0), (2, 9, score)] if phases == 2 else [(1, 0, score)]
        folder = results / tables.FOLDERS[environment]
        write_run(folder, label, seed, rows, env_id=environment.partition(",")[0])


def test_claims_by_hand(results):
    write_method(results, "AntDirection", "smac", [300.0, 310.0, 320.0], phases=2)
    write_method(results, "AntDirection", "smac_more_offline", [100.0, 111.0])
    write_method(results, "AntDirection", "macaw", [400.0, 411.0, 419.0])
    write_method(results, "AntDirection", "macaw_matched", [1.0, 2.0, 3.0])
    write_method(results, "AntDirection", "borel", [1.0])
    write_method(results, "AntDirection", "smac_lambda_10_more_offline", [390.0, 402.0])
    write_method(results, "AntDirection", "smac_lambda_10", [1.0, 2.0], phases=2)
    table = tables.claims_of("AntDirection")
    assert cells(table, "after > before") == ["holds", "+310", "+285 to +335", "3"]
    # 200 and 199: the mean and 12.7062 * 0.5
    assert cells(table, "> control") == ["holds", "+200", "+193 to +206", "2"]
    assert cells(table, "> MACAW")[:2] == ["does not", "-100"]  # its better preset
    assert cells(table, "> BOReL") == ["cannot be told", "+299", "", "1"]
    assert cells(table, "> meta-BC") == ["not run", "", "", ""]
    assert tables.where("control", "holds") == "Ant"
    assert tables.where("both", "holds") == "none"  # the second control was not run
    verdicts = tables.table("verdicts")
    assert cells(verdicts, "the control")[0] == "Ant"
    assert cells(verdicts, "both controls")[:3] == ["none", "none", "none"]
    assert cells(verdicts, "MACAW")[1] == "Ant"
    assert tables.where("control_10", "does not") == "Ant"  # -90 and -92
    assert tables.where("both_10", "does not") == "Ant"
    row = "| AntDirection | 10 |  | 0 ± 0 (2) | 396 ± 76 (2) | 2 ± 6 (2) |  |"
    assert row in tables.table("lambda").splitlines()
    assert tables.where("macaw", "does not") == "Ant" and tables.where("macaw", "holds") == "none"
    assert "Walker, Cheetah" in tables.where("after", "not run")


def test_beating_one_control_is_not_enough(results):
    write_method(results, "AntDirection", "smac", [300.0, 310.0, 320.0], phases=2)
    write_method(results, "AntDirection", "smac_more_offline", [100.0, 111.0, 121.0])
    write_method(results, "AntDirection", "smac_no_new_data", [500.0, 512.0, 523.0], phases=2)
    verdicts = tables.table("verdicts")
    assert cells(verdicts, "the control")[:2] == ["Ant", "none"]
    assert cells(verdicts, "both controls")[:2] == ["none", "Ant"]


def write_diagnostics(folder, label, seed, curves):
    """The diagnostics of a run, {column: {gradient step: number}}."""
    (folder / "diagnostics").mkdir(exist_ok=True)
    lines = [",".join(["gradient_step", *curves])]
    for step in next(iter(curves.values())):
        lines.append(
            ",".join(str(number) for number in [step, *(c[step] for c in curves.values())])
        )
    (folder / "diagnostics" / f"{label}__{seed}.csv").write_text("\n".join([*lines, ""]))


def write_two_seeds(folder, label, scores, q_mean):
    """Two evaluations of 1 and 3 in the offline phase, two of a score each in the second."""
    curves = {
        tables.DATA_ERROR: {1: 0.9, 2: 0.4, 3: 0.8, 4: 0.8},
        tables.LABEL_ERROR: {1: 0.1, 2: 0.3, 3: 0.5, 4: 0.7},
        "train/q_mean": {1: 1.0, 2: 3.0, 3: q_mean, 4: 2 * q_mean},
    }
    for seed, score in enumerate(scores, start=1):
        rows = [(1, 0, 1.0), (2, 0, 3.0), (3, 5, score - 1), (4, 9, score + 1)]
        write_run(folder, label, seed, rows, env_id="AntDirection")
        write_diagnostics(folder, label, seed, curves)


def test_studies_by_hand(results):
    write_two_seeds(results / "own_share" / "60", "smac", [15.0, 17.0], q_mean=10.0)
    write_two_seeds(results / "own_share" / "60", "smac_oracle_rewards", [16.0, 16.0], q_mean=1.0)
    half = results / "offline_share" / "AntDirection"
    write_two_seeds(half, "smac_offline_half", [25.0, 29.0], q_mean=40.0)
    # 13 and 15: the mean and 12.7062 * 1
    helps = cells(studies.comparisons_table(), "the second phase, with labels, helps")
    assert helps == ["", "holds<br>+14 ± 13 (2)", ""]
    reasons = cells(studies.reasons_table(), "60 %")
    assert reasons[1:3] == ["0.20 ± 0.00 (2)", "0.60 ± 0.00 (2)"]  # labels, before and after
    assert reasons[5:] == ["2 ± 0 (2)", "15 ± 0 (2)", "2"]  # Q
    returns = cells(studies.returns_table(), "60 %")
    assert returns[1:] == ["2 ± 0 (2)", "16 ± 13 (2)", "", "16 ± 0 (2)"]
    share = cells(studies.offline_share_table(), "AntDirection")
    assert share[:4] == ["2 ± 0 (2)", "16 ± 13 (2)", "27 ± 25 (2)", "+11 ± 13 (2)"]
    assert share[5:] == ["15 ± 0 (2)", "60 ± 0 (2)"]


def test_labels_by_hand(results):
    write_two_seeds(results / tables.FOLDERS["AntDirection"], "smac", [15.0, 17.0], q_mean=10.0)
    # On the data at the end of the offline phase; on exploration in the second phase
    row = ["0.40", "0.50 to 0.70", "10 → 20", "2"]
    assert cells(tables.labels_table(), "AntDirection") == row
    assert cells(tables.labels_table(), "HopperParam")[-1] == "0"  # has not been run


def test_agents_are_named_as_tables_read_them():
    folder = ROOT / "benchmark" / "results" / "short" / "HopperParam" / "agents"
    name = watch.name_in_tables(folder / "smac__1.npz")
    assert name == "short/HopperParam/smac__1.npz"
    assert tables.played_agent("HopperParam/smac__1.npz") == ("HopperParam", "smac", 1)
    run_folder = "HopperParam__smac_offline_online__1"
    name = watch.name_in_tables(ROOT / "runs" / "benchmark" / "short" / "HopperParam" / run_folder)
    assert name == f"short/HopperParam/{run_folder}"
    assert tables.played_agent(f"HopperParam/{run_folder}") is None  # no label: of one seed
    assert watch.name_in_tables(ROOT / "agents" / "HopperParam.npz").endswith(
        "agents/HopperParam.npz"
    )
    assert tables.played_agent("agents/HopperParam.npz") is None


def test_the_glance_table_has_the_controls_and_the_best_rival(results):
    write_method(results, "AntDirection", "smac", [300.0, 310.0], phases=2)
    write_method(results, "AntDirection", "smac_more_offline", [100.0])
    write_method(results, "AntDirection", "smac_lambda_10_more_offline", [90.0])
    write_method(results, "AntDirection", "macaw", [150.0])
    write_method(results, "AntDirection", "meta_bc", [120.0, 140.0])
    table = tables.table("glance")
    row = ["190", "0 ± 0 (2)", "305 ± 64 (2)", "100 (1)", "90 (1)", "MACAW 150 (1)", ""]
    assert cells(table, "AntDirection") == row
    assert len(table.splitlines()) == 3  # of the other environments there is no run


def test_a_longer_run_has_the_shorter_one_in_it(results):
    """FOCAL at the steps of SMAC's offline phase is read from a run with the steps of both."""
    folder = results / tables.FOLDERS["AntDirection"]
    rows = [(step, 0, float(step), "test,own") for step in (5, 10, 15, 20, 25, 30)]
    write_run(folder, "focal_more_offline", 2, rows, env_id="AntDirection", offline_steps=30)
    write_run(folder, "smac", 2, rows[:3], env_id="AntDirection", offline_steps=15)
    found = evidence.load(tables.FOLDERS["AntDirection"])
    assert found["focal"][2].score("offline") == 10
    assert found["focal"][2].flags["offline_steps"] == 15
    assert found["focal_more_offline"][2].score("offline") == 25


def write_contexts(results, label, seed, *returns):
    """A run on the Ant: returns on test tasks, on training tasks, and with offline context."""
    groups = "test,own", "train,own", "train,offline"
    rows = [(1, 0, value, group) for group, value in zip(groups, returns)]
    folder = results / tables.FOLDERS["AntDirection"]
    write_run(folder, label, seed, rows, env_id="AntDirection")


def test_the_gap_between_contexts_by_hand(results):
    write_contexts(results, "focal", 1, 100.0, 120.0, 150.0)
    write_contexts(results, "focal", 2, 102.0, 120.0, 152.0)
    write_contexts(results, "csro_more_offline", 1, 90.0, 80.0, 70.0)
    rows = [line.strip("| ").split(" | ") for line in tables.table("context").splitlines()[2:]]
    assert len(rows) == len(tables.COMPARED) * 6
    (focal,) = [row for row in rows if row[:2] == ["Ant", "FOCAL"]]
    # Differences by seed: 50 and 50, 30 and 32
    words = ["101 ± 13 (2)", "120 ± 0 (2)", "151 ± 13 (2)", "+50 ± 0 (2)", "+31 ± 13 (2)"]
    assert focal[2:] == words
    assert [row[1] for row in rows if row[0] == "Ant"] == list(tables.CONTEXT_METHODS)
    (variant,) = tables.table("context_variants").splitlines()[2:]
    assert variant.endswith(
        "| CSRO, as many steps as SMAC | 90 (1) | 80 (1) | 70 (1) | -20 (1) | -10 (1) |"
    )


def test_claims_on_contexts_by_hand(results):
    write_contexts(results, "smac", 1, 50.0, 0.0, 150.0)
    write_contexts(results, "smac", 2, 50.0, 0.0, 152.0)
    write_contexts(results, "focal", 1, 100.0, 0.0, 151.0)
    write_contexts(results, "focal", 2, 101.0, 0.0, 152.0)
    write_contexts(results, "unicorn", 1, 40.0, 0.0, 10.0)
    write_contexts(results, "unicorn", 2, 41.0, 0.0, 12.0)
    table = tables.table("context_claims")
    ant = tables.COMPARED.index("AntDirection")
    assert cells(table, "FOCAL > SMAC, offline")[ant] == "holds<br>+50 ± 6 (2)"
    assert cells(table, "UNICORN > SMAC, offline")[ant] == "does not<br>-10 ± 6 (2)"
    title = "{} is near SMAC, offline, both with offline context"
    assert cells(table, title.format("UNICORN"))[ant] == "does not<br>-140 ± 0 (2)"
    assert cells(table, title.format("FOCAL"))[ant].endswith("<br>+0 ± 6 (2)")
    assert cells(table, title.format("CSRO"))[ant] == ""
    assert cells(table, "SMAC, after > FOCAL")[ant] == ""  # there is no second phase
    assert cells(tables.table("context_where/encoder"), "FOCAL")[0] == "Ant"
    assert cells(tables.table("context_where/encoder"), "UNICORN")[1] == "Ant"
    assert "Ant" in cells(tables.table("context_where/after"), "FOCAL")[3]  # not run
    assert (
        tables.rival_words(evidence.load(tables.FOLDERS["AntDirection"]), 0) == "FOCAL 100 ± 6 (2)"
    )


def test_ways_to_explore_are_read_from_their_files(results):
    """Two tables with different columns; the best other way is that of before the second phase."""
    (results / "context").mkdir()
    head = "| agent | gradient steps | prior, 2 | {} | offline context |\n| --- |\n"
    text = "    a command\n\n" + head.format("random, 2 | idaq, 10")
    text += "| A | 5 | 1.0 → 2.0 ± 0.5 | 1.0 → 4.0 ± 0.5 | 9.0 → -3.0 ± 0.5 | 9.0 ± 0.5 |\n"
    text += "| A | 9 | 1.0 → 6.0 ± 0.5 | 1.0 → 7.0 ± 0.5 | 9.0 → 8.0 ± 0.5 | 9.0 ± 0.5 |\n"
    (results / "context" / "explore_A.md").write_text(text)
    text = head.format("task, 2") + "| B | 5 | 1.0 → 2.0 ± 0.5 | 1.0 → 1.0 ± 0.5 | 0.0 ± 0.5 |\n"
    (results / "context" / "explore_B.md").write_text(text)
    rows = tables.table("explored").splitlines()
    assert rows[0].endswith("| prior, 2 | random, 2 | idaq, 10 | offline context | task, 2 |")
    assert len(rows) == 5
    assert rows[4] == "| B | 5 | 1.0 → 2.0 ± 0.5 |  |  | 0.0 ± 0.5 | 1.0 → 1.0 ± 0.5 |"
    choosing = tables.table("choosing").splitlines()
    assert choosing[2:] == ["| A | 2.0 ± 0.5 | 4.0 ± 0.5 (random, 2) | 6.0 ± 0.5 |"]
    # 2 is above two errors of the difference, 1.41; 1.4 is not
    assert tables.number("second_phase/more") == "A"
    file = results / "context" / "explore_A.md"
    file.write_text(file.read_text().replace("6.0 ± 0.5", "5.4 ± 0.5"))
    assert tables.number("second_phase/more") == "none"
    assert tables.number("second_phase/not-more") == "A"


def test_ways_to_explore_of_several_seeds_are_paired_by_seed(results):
    """Two seeds of SMAC before and after its second phase, and one of FOCAL, which stays a row."""
    (results / "context").mkdir()
    names = [f"{way}, {number}" for way in tables.WAYS_TO_EXPLORE for number in (2, 10)]
    lines = [f"| agent | gradient steps | {' | '.join(names)} | offline context |", "| --- |"]
    of_seeds = {  # (seed, steps): what it returns after its own exploration, and after the others
        (1, 5): (10.0, 30.0),
        (1, 9): (50.0, 0.0),
        (2, 5): (20.0, 42.0),
        (2, 9): (60.0, 0.0),
    }
    for (seed, steps), (own, other) in of_seeds.items():
        returns = " | ".join([f"0.0 → {own} ± 0.5", *[f"0.0 → {other} ± 0.5"] * 7])
        lines.append(f"| AntDirection/smac__{seed}.npz | {steps} | {returns} | 7.0 ± 0.5 |")
    focal = "| AntDirection/focal_more_offline__1.npz | 9 | " + " | ".join(["0.0 → 1.0 ± 0.5"] * 8)
    lines.append(focal + " | 7.0 ± 0.5 |")
    (results / "context" / "explore_AntDirection_seeds.md").write_text("\n".join(lines))

    claims = tables.table("ways_claims")
    # 30 - 10 and 42 - 20; 50 - 10 and 60 - 20; 50 - 30 and 60 - 42
    assert cells(claims, "before: idaq, 2 > prior, 2") == ["holds<br>+21 ± 13 (2)"]
    assert cells(claims, "after, prior, 2 > before, prior, 2") == ["holds<br>+40 ± 0 (2)"]
    assert cells(claims, "after, prior, 2 > before, random, 10") == ["holds<br>+19 ± 13 (2)"]
    ways = tables.table("ways").splitlines()
    assert len(ways) == 4
    assert ways[2].startswith("| Ant | SMAC | 5 | 15 ± 64 (2) | 36 ± 76 (2) |")
    assert [line.split(" | ")[0] for line in tables.table("explored").splitlines()[2:]] == [
        "| AntDirection/focal_more_offline__1.npz"
    ]
    assert len(tables.table("choosing").splitlines()) == 2  # no shipped agent

    write_method(results, "AntDirection", "smac", [10.0, 20.0], phases=2)  # how it explores
    rows = tables.table("idaq").splitlines()
    assert rows[2] == "| Ant | SMAC | 5 | prior, 2 | holds, +21 ± 13 (2) |"


def test_normalised_returns_are_between_the_data_and_the_best_method(results):
    for environment in tables.SIX:
        write_method(results, environment, "smac", [10.0, 20.0], phases=2)
        write_method(results, environment, "meta_bc", [15.0, 30.0])
    one = 22.5  # of meta_bc
    for environment, samples in zip(tables.SIX, tables.normalised("smac")):
        zero = -50.0 if environment.startswith("Sawyer") else None
        if zero is None:
            zero = evidence.data_of({"env_id": environment, "dataset": None})[0]
        assert samples == pytest.approx((np.array([10.0, 20.0]) - zero) / (one - zero))
    rows = {label: numbers for label, _, _, numbers in tables.normalised_means()}
    assert rows["smac"] == [2] * 6 and rows["smac_more_offline"] == ()


def test_a_mark_without_a_table_is_refused():
    with pytest.raises(InputError, match="there is no table nothing"):
        plot.fill("<!-- table: nothing -->\n<!-- end -->")
    with pytest.raises(InputError, match="there is no number nothing"):
        plot.fill("x <!-- number: nothing -->5<!-- /number -->")


def test_marks_are_filled_and_the_rest_stays(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "two", lambda: "| a |\n| b |")
    monkeypatch.setitem(tables.NUMBERS, "six", lambda: "6")
    text = "x\n<!-- table: two -->\nold\n<!-- end -->\n<!-- number: six -->5<!-- /number --> y\n"
    filled = plot.fill(text)
    table = "<!-- table: two -->\n\n| a |\n| b |\n\n<!-- end -->"
    assert filled == f"x\n{table}\n<!-- number: six -->6<!-- /number --> y\n"
    assert plot.fill(filled) == filled


# ----- Pictures


def test_figures_are_whole_where_runs_are_missing(results, monkeypatch):
    for seed, last in ((1, 300.0), (2, 310.0)):
        rows = [(10, 0, 100.0), (20, 50, last)]
        write_run(results / "short" / "HopperParam", "smac", seed, rows, env_id="HopperParam")
    folder = results / "short" / "HopperParam"
    write_run(folder, "meta_bc", 1, [(5, 0, 60.0), (10, 0, 80.0)], env_id="HopperParam")
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    for name, panels in (("figure5", 6), ("figure7", 3), ("figure9", 1)):
        plot.main(name)
        assert (results / f"{name}.png").stat().st_size > 10_000
        assert len(figures[-1].axes) == panels
    hopper, walker = figures[0].axes[:2]
    assert walker.texts[0].get_text() == "no run yet"
    words = [text.get_text() for text in figures[0].legends[0].get_texts()]
    names = ["SMAC (2 seeds)", "meta behaviour cloning (1 seed)"]
    assert words == [*names, plot.DATA, plot.SHADE]

    # Thin lines of the seeds, a thick mean, a point at its end; a line ends where training ends
    red = [line for line in hopper.lines if line.get_color() == "tab:red"]
    assert [[*line.get_ydata()] for line in red] == [[100, 300], [100, 310], [100, 305], [305]]
    assert red[0].get_linewidth() < red[2].get_linewidth() and red[3].get_marker() == "o"
    brown = [line for line in hopper.lines if line.get_color() == "tab:brown"]
    assert [[*line.get_xdata()] for line in brown] == [[5, 10], [10]]


def test_a_benchmark_of_ones_own_is_drawn_and_its_table_printed(results, capsys):
    write_run(results / "mine", "smac", 1, [(10, 0, 100.0), (20, 50, 200.0)])
    plot.main("mine")
    assert (results / "mine" / "curve.png").stat().st_size > 10_000
    assert cells(capsys.readouterr().out, "`smac`")[1] == "100.0 → 200.0 (1)"
    with pytest.raises(InputError, match="there are no results in .*: run benchmark/run.py other"):
        plot.main("other")


def test_a_colour_means_one_thing():
    assert len(set(plot.STYLES.values())) == len(plot.STYLES)
    labels = {label for rows in run.BENCHMARKS.values() for label in rows}
    assert labels <= set(plot.STYLES) and set(plot.STYLES) == set(tables.NAMES)
    for label, (colour, _) in plot.STYLES.items():
        assert (colour == "black") == ("oracle_rewards" in label or label == "pearl"), label


# ----- The evidence in the repository


def test_every_context_is_named_as_scripts_name_it():
    for file in evidence.RESULTS.glob("**/*.csv"):
        first, *lines = file.read_text().splitlines()
        if first == ",".join(CSV_COLUMNS):
            assert {line.split(",")[3] for line in lines} <= {"own", "offline"}, file


def test_plot_all_run_again_changes_nothing(tmp_path, monkeypatch):
    """Texts to the letter, pictures to the eye: fonts are drawn a little differently elsewhere."""
    shutil.copytree(ROOT / "benchmark" / "results", tmp_path / "benchmark" / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "benchmark" / "results")
    before = {file: file.read_text() for file in plot.texts()}
    plot.main("all")
    assert {file: file.read_text() for file in plot.texts()} == before
    pictures = [*plot.FIGURES, "methods", "context/gap", "own_share/own_share"]
    pictures += [f"{name}/curve" for name in plot.CURVES]
    for name in [*pictures, *(f"{folder}/figures" for folder in plot.GROUND.values())]:
        committed, made = (
            imageio.imread(results / f"{name}.png").astype(np.int16)
            for results in (ROOT / "benchmark" / "results", evidence.RESULTS)
        )
        assert committed.shape == made.shape and np.abs(committed - made).mean() < 1, name


@pytest.mark.parametrize("folder", tables.FOLDERS.values())
def test_results_are_of_the_data_in_the_repository(folder):
    """Where a run says which data it had; runs of the earliest commits do not."""
    checked = 0
    for file in (ROOT / "benchmark" / "results" / folder).glob("*__*.json"):
        flags = json.loads(file.read_text())
        name = Path(flags.get("dataset") or f"datasets/{flags['env_id']}.npz")
        if not flags.get("dataset_sha256") or "dataset" not in flags:
            continue
        described = json.loads((ROOT / name.with_suffix(".json")).read_text())
        assert flags["dataset_sha256"] == described["sha256_of_contents"], file.name
        checked += 1
    assert checked


def test_beside_each_dataset_stands_what_smac_reaches_with_it():
    spec = importlib.util.spec_from_file_location("describe", ROOT / "datasets" / "describe.py")
    describe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(describe)
    for file in (ROOT / "datasets").glob("*.npz"):
        written = json.loads(file.with_suffix(".json").read_text())
        assert written["reference"] == describe.reference(file.stem) is not None, file.name

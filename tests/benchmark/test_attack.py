"""benchmark/robustness/attack.py: whether it notices what it looks for; the attacks themselves are for it to try."""

import math
import re

import pytest

from benchmark.robustness import attack, attacks
from benchmark.robustness.attacks import FLAGS, KINDS, Attack
from benchmark.robustness.hostile import dataset, write, zip_tricks

ERROR = "echo error: no >&2; exit 2"
DONE = "mkdir -p RUN; touch RUN/summary.png"


@pytest.mark.parametrize("command, more, verdict", [
    (ERROR, {}, "yes"), (f": RUN; {ERROR}", {}, "yes"), (f"touch RUN/new; {ERROR}", {}, "the folder changed"),
    (f"rm RUN/kept; {ERROR}", {}, "the folder changed"), (f"echo words >&2; {ERROR}", {}, "other words"),
    ("exit 2", {}, "other words"), (ERROR, dict(sentence="yes"), "other words"),
    ("echo error: no >&2; exit 1", {}, "another exit code than 2"), (DONE, dict(codes=(0,)), "yes"),
    ("echo Traceback; exit 2", {}, "a traceback, other words"), (ERROR, dict(traceback=True), "no traceback"),
    (f"echo Traceback >&2; {ERROR}", dict(traceback=True), "yes"), (f"echo more >&2; {ERROR}", {}, "other words"), ("true", dict(codes=(0,)), "no run has ended"),
    (DONE, dict(codes=(0,), equal=True), "another run"),
    ("echo 'continue with: exit 3' >&2; exit 1", dict(codes=(1,), then="PASTED"), "exit code 3 of the second command"),
    (f"{DONE}; echo 'continue with: [ $PWD = / ]' >&2; exit 1", dict(codes=(1,), then="PASTED"), "yes"),
])  # fmt: skip
def test_what_an_attack_is_said_to_have_done(command, more, verdict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stopped" / "meta_bc").mkdir(parents=True)
    (tmp_path / "stopped" / "meta_bc" / "kept").touch()
    monkeypatch.setattr(attack, "prepare", lambda name: "the whole run")
    monkeypatch.setattr(attack, "compared", lambda run: f"this one, {run}")
    cells = attack.perform(Attack("what | where", command, kind="1 a kind", **more))
    assert verdict in cells[-1] and attack.behaved(cells) == (verdict == "yes")
    assert (
        0 <= float(cells[5]) < 1 and 1 < float(cells[7]) < 100
    )  # of the shell, not of this process
    attack.write_table(
        tmp_path / "attacks.md", [cells, ["2", "b", "c", "0", "d", "1.0", "2.0", "30", "yes"]]
    )
    assert attack.read_table(tmp_path / "attacks.md")[tuple(cells[:3])] == cells
    text = (tmp_path / "attacks.md").read_text()
    assert (
        f"2 attacks, {2 if verdict == 'yes' else 1} of them ended as they should" in text
        and "1.0 s of" in text
    )


@pytest.mark.parametrize(
    "way, code", [(dict(terminal=True), -1), (dict(signals=(2, 15)), -2), ({}, 0)]
)
def test_signals_and_a_terminal_that_goes_away(way, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert attack.measure("mkdir runs; touch runs/checkpoint.npz; exec sleep 2", **way)[0] == code


def test_what_does_not_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attack, "PATIENCE", 0.3)
    code, seconds, *_ = attack.measure("sleep 60")
    assert code == -9 and seconds == math.inf


def test_every_kind_has_attacks_on_a_script_or_on_watch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        attacks, "zip_tricks", lambda members, name, room: zip_tricks(members, name, 100)
    )
    monkeypatch.setattr(attacks, "archive", lambda members: b"")  # of 300,000: both take seconds
    write("d.npz", dataset())
    found = [(kind.__doc__, attack) for kind in KINDS for attack in kind()]
    assert [int(re.match(r"\d+", kind.__doc__)[0]) for kind in KINDS] == list(range(1, 24)) and len(
        found
    ) >= 60
    assert len({(attack.what, attack.command) for _, attack in found}) == len(found)
    for _, one in found:
        assert (
            re.search(rf"python (\.\./)?({'|'.join(FLAGS)}|benchmark/watch|save)\.py ", one.command)
            and one.codes
        )

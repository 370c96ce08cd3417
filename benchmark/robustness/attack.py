"""Attack the scripts by their command lines: python benchmark/robustness/attack.py

Whatever a run may meet, of the kinds that once did harm: files made to hang or to write, other data, NaN, streams that
close, signals, flags and paths that can not be (attacks.py). Each attack is a command of the shell in a temporary
folder, on tiny runs of PointDirection. It must end with exit code 2 and one line, "error: ...", and leave the folder of
a run that it refuses as it was; or with 0 and a run that has ended, in most cases compared: the same, bit for bit, as
one that nothing disturbed. 20 s of processor time and 1 GB are the most that it may take. Linux only.
"""

import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import matplotlib
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmark.robustness.attacks import FLAGS, KINDS, MINE, SAVE, SITES
from benchmark.robustness.hostile import dataset, write
from benchmark.robustness.kill import content
from plumbing.files import write_file
from plumbing.machine import versions

MOST_SECONDS, MOST_MB, PATIENCE = (
    20,
    1000,
    300,
)  # of CPU time; of memory; of time on the clock, before it is killed
MEASURE = """
import json, resource, signal, subprocess, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: child.send_signal(number))
child = subprocess.Popen(["bash", "-c", sys.argv[1]])
code, usage = child.wait(), resource.getrusage(resource.RUSAGE_CHILDREN)
json.dump((code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024), open("usage", "w"))
"""  # a small process: the memory of the one that starts another would count as that of the other


@dataclasses.dataclass
class Args:
    only: str = ""  # attacks whose kind, name or command has this regular expression; other lines of the table stay
    out: str = "benchmark/results/robustness/attacks.md"  # where the result goes


def measure(command, signals=(), terminal=False):
    """Run a command of the shell: its exit code, seconds of CPU time, MB, seconds, output, errors."""
    began, due, signals, usage = time.time(), None, list(signals), Path("usage")
    usage.unlink(missing_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLCONFIGDIR": matplotlib.get_configdir()}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment.pop("PYTHONPATH", None)
    with open("output", "wb") as output, open("errors", "wb") as errors:
        more = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        if terminal:
            own, other = os.openpty()
            more = dict.fromkeys(more, other) | {
                "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            }
        words = [sys.executable, "-c", MEASURE, command]
        process = subprocess.Popen(words, env=environment, start_new_session=True, **more)
    while process.poll() is None:
        if terminal and select.select([own], [], [], 0.02)[0]:
            os.read(own, 1 << 16)
        time.sleep(0.02)
        if due is None and (signals or terminal) and any(Path("runs").rglob("checkpoint.npz")):
            due = time.time() + 0.3
        if due and time.time() > due and terminal:
            os.close(own), os.close(other)
            terminal = False
        elif due and time.time() > due and signals:
            process.send_signal(signals.pop(0))
            due += 0.1
        if time.time() > began + PATIENCE:
            os.killpg(process.pid, signal.SIGKILL)
    code, cpu, memory = (
        json.loads(usage.read_text())
        if usage.exists()
        else (process.returncode, math.inf, math.inf)
    )
    return (
        code,
        cpu,
        memory,
        time.time() - began,
        *(Path(x).read_text(errors="replace") for x in ("output", "errors")),
    )


@functools.cache
def prepare(name):
    """Make a run of a script, whole/{name}, and one that was stopped, stopped/{name}; what `content` says of it."""
    run = Path("runs", f"PointDirection__{name}__1")
    for place, signals, expected in (("whole", (), 0), ("stopped", (signal.SIGTERM,), 1)):
        shutil.rmtree("runs", ignore_errors=True)
        code, *_, errors = measure(f"exec python {name}.py {FLAGS[name]}", signals)
        if code != expected:
            sys.exit(f"{name}.py can not be attacked, it ends with exit code {code}: {errors}")
        shutil.copytree(run, Path(place, name))
    shutil.rmtree("runs")
    return compared(Path("whole", name))


def compared(run):
    """What must be the same; a processor may be as exact and as fast in either precision."""
    return {name: value for name, value in content(run).items() if name != "precision"}


def hashes():
    files = (file for file in sorted(Path("runs").rglob("*")) if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def perform(attack):
    """Try an attack: its line of the table, cells of text; the last says what is wrong."""
    name = next((name for name in FLAGS if f"{name}.py" in attack.command), "meta_bc")
    run, expected = Path("runs", f"PointDirection__{name}__1"), prepare(name)
    shutil.rmtree("runs", ignore_errors=True)
    if "RUN" in attack.command:
        shutil.copytree(Path("stopped", name), run)
    attack.make(run)

    def fill(command):
        return command.replace("FLAGS", FLAGS[name]).replace("RUN", str(run))

    before, faults = hashes(), []
    code, cpu, memory, seconds, output, errors = measure(
        fill(attack.command), attack.signals, attack.terminal
    )
    if code not in attack.codes:
        faults.append(f"another exit code than {attack.codes[0]}")
    if ("Traceback" in output + errors) != attack.traceback:
        faults.append("no traceback" if attack.traceback else "a traceback")
    lines = errors.splitlines()
    is_sentence = (
        lines and lines[-1].startswith("error: ") and (attack.traceback or len(lines) == 1)
    )
    one_line = is_sentence or 2 not in attack.codes
    if not one_line or not re.search(attack.sentence, output + errors):
        faults.append("other words")
    if 2 in attack.codes and "RUN" in attack.command and hashes() != before:
        faults.append("the folder changed")
    if attack.then:
        pasted = re.findall("continue with: (.*)", errors) or ["false"]
        again = measure(fill(attack.then.replace("PASTED", f"cd / && {pasted[-1]}")))
        cpu, memory, seconds = max(cpu, again[1]), max(memory, again[2]), seconds + again[3]
        faults += [f"exit code {again[0]} of the second command"] * (again[0] != 0)
    if not cpu <= MOST_SECONDS or not memory <= MOST_MB:
        faults.append("too much")
    ended = list(Path("runs").rglob("summary.png"))
    if 2 not in attack.codes and not ended:
        faults.append("no run has ended")
    if attack.equal and ended and compared(ended[0].parent) != expected:
        faults.append("another run")
    last = [line for line in f"{output}\n{errors}".splitlines() if line.strip()][-1:] or [""]
    last = re.sub(rf"({re.escape(os.getcwd())}|{re.escape(str(ROOT))})/?", "", last[0])
    good = "yes, the same run" if attack.equal else "yes"
    last = last if len(last) < 150 else f"{last[:150]}..."
    numbers = code, last, f"{cpu:.1f}", f"{seconds:.1f}", f"{memory:.0f}", ", ".join(faults) or good
    return [*cells_of(attack), *(str(cell).replace("|", "\\|") for cell in numbers)]


def cells_of(attack):
    """The cells of the table that say which attack it is."""
    command = re.sub("0{40,}", "0...0", attack.command)
    return [cell.replace("|", "\\|") for cell in (attack.kind, attack.what, f"`{command}`")]


def read_table(file):
    """The lines of the table in attacks.md, {first cells: all cells}."""
    lines = [
        line[2:-2].split(" | ") for line in file.read_text().splitlines() if line.startswith("| ")
    ]
    return {tuple(cells[:3]): cells for cells in lines}


def write_table(file, rows):
    """Write attacks.md; rows are what `perform` returned for each attack."""
    told, (computed, minutes) = (
        versions(),
        (sum(float(cells[x]) for cells in rows) / 60 for x in (5, 6)),
    )
    processor, memory = (max(float(cells[column]) for cells in rows) for column in (5, 7))
    text = f"`python benchmark/robustness/attack.py`, one thread of {told['cpu']}; Python {told['python']}, "
    text += f"""PyTorch {told["torch"]}, NumPy {told["numpy"]}

- {len(rows)} attacks, {sum(map(behaved, rows))} of them ended as they should
- {minutes:.0f} minutes in all, {computed:.0f} of them of a processor's time
- the most that one took: {processor:.1f} s of processor time, {memory:.0f} MB (of two commands the larger number)
- exit code 2: one line on stderr; and the run that it refused to resume has the same files
- exit code 0: a run has ended; 1 and 130: one was stopped, and a second command, in most cases the one in the sentence,
  pasted in another folder, ended it
- the same run: the same, bit for bit, as one that nothing disturbed: parameters, optimizer, buffer, generators, curves
  and eval.csv
- RUN: a copy of a run of the script that was stopped; FLAGS: those of the script,
"""
    text += "".join(f"  - {name}.py: `{flags}`\n" for name, flags in FLAGS.items()) + "\n"
    head = ["kind", "what", "command", "exit code", "last line", "CPU s", "s", "MB", "as it should"]
    text += "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, lambda out: out.write(text.encode()))


def behaved(cells):
    return cells[-1].startswith("yes")


def main(args):
    file = Path(args.out).absolute()
    done = read_table(file) if args.only and file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in [*(f"{name}.py" for name in FLAGS), "benchmark", "agents"]:
            Path(name).symlink_to(ROOT / name)
        for name, text in SITES.items():
            Path(name).mkdir()
            Path(name, "sitecustomize.py").write_text(text)
        Path("mine.py").write_text(MINE)
        Path("save.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SAVE}")
        write("d.npz", dataset())
        prepare("meta_bc")  # some attacks on others take its files
        attacks = {}
        for kind in KINDS:
            for attack in kind():
                attack = dataclasses.replace(attack, kind=kind.__doc__)
                attacks[tuple(cells_of(attack))] = attack
        for key, attack in attacks.items():
            if re.search(args.only, f"{attack.kind} {attack.what} {attack.command}"):
                done[key] = perform(attack)
                print(" | ".join(done[key]), flush=True)
                # after each of them, so that what was tried is kept if this is stopped
                write_table(file, [done[key] for key in attacks if key in done])
        os.chdir(ROOT)
    rows = [done[key] for key in attacks if key in done]
    if not all(map(behaved, rows)):
        sys.exit("some attacks did not end as they should")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""What attack.py tries: files made to do harm, and commands of the shell, in kinds."""

import dataclasses
import functools
import os
import pickle
import re
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmark.robustness.hostile import (
    Hostile,
    agent,
    archive,
    checkpoint,
    data,
    link,
    member,
    npy,
    read,
    replace,
    write,
    zip_tricks,
)

SIZES = "--env-id PointDirection --device cpu --policy-hidden 16 --rl-batch 16 --eval-every 2"
ENCODER, ONLINE = "--encoder-hidden 16 --context-batch 16", "--q-hidden 16 --tasks-per-iteration 1"
ONLINE += " --prior-steps 50 --posterior-steps 50 --updates-per-iteration"
FLAGS = {
    "smac_offline_online": f"{SIZES} {ENCODER} {ONLINE} 3 --offline-steps 3 --online-iterations 1 --dataset d.npz",
    "pearl_online_oracle": f"{SIZES} {ENCODER} {ONLINE} 2 --online-iterations 2 --initial-steps 50",
    "meta_bc": f"{SIZES} {ENCODER} --offline-steps 6 --dataset d.npz",
    "macaw": f"{SIZES} --context-batch 16 --value-hidden 16 --offline-steps 6 --dataset d.npz",
    "borel": f"{SIZES} --q-hidden 16 --vae-steps 3 --vae-tasks 2 --elbo-terms 8 --offline-steps 3 --dataset d.npz",
}
SMAC, PEARL, META_BC, MACAW, BOREL = (f"python {name}.py FLAGS" for name in FLAGS)
RESUME = "python smac_offline_online.py --resume RUN --dataset d.npz"
WATCH = "python benchmark/watch.py agent.npz"
NAN = "(is|became) NaN or infinite.*(continue with|no checkpoint yet)"
SAVE = """
import sys, numpy as np, envs, buffers
from plumbing.flags import one_sentence
tasks = envs.sample_tasks("PointDirection", 2)
path = dict(obs=np.zeros((3, 4)), actions=np.zeros((2, 2)), rewards=np.zeros(2), terminals=np.zeros(2))
path["terminals"][-1] = float(sys.argv[1] or 0)
if not sys.argv[1]:
    del path["terminals"]
rl = [(0, path)] * int(sys.argv[2])
with one_sentence():
    buffers.save_dataset("s.npz", "PointDirection", tasks[:1], tasks[1:], rl, [], "save.py")
"""
ROWS = """
import dataclasses, envs, gymnasium as gym, numpy as np
class Discrete(envs.PointDirection):
    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Discrete(3)
class Words(envs.PointDirection):
    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Dict({"a": self.observation_space})
class Image(envs.PointDirection):
    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)
envs.register("Row", dataclasses.replace(envs.SPECS["PointDirection"], ROW))
"""
SITES = {  # what Python runs before anything else, with PYTHONPATH=NAME
    **{
        f"lock{n}": f"import fcntl\ndef flock(*_): raise OSError({n}, 'no')\nfcntl.flock = flock"
        for n in (37, 38, 95)
    },
    "nofcntl": "import sys\nsys.modules['fcntl'] = None",
    "nobullet": "import sys\nsys.modules['pybullet'] = None",
    "brokengpu": "import torch\ntorch.cuda.is_available = lambda: True",
}
MINE = """
import dataclasses, os, subprocess, sys, threading, envs
def family(name, value, observes):
    class Broken(envs.PointDirection):
        def reset(self, **options):
            self.steps = 0
            return super().reset(**options)
        def step(self, action):
            obs, reward, *rest = super().step(action)
            self.steps += 1
            factor = value if self.steps == 9 else 1
            return (obs * factor, reward, *rest) if observes else (obs, reward * factor, *rest)
    Broken.__name__ = name
    row = dataclasses.replace(envs.SPECS["PointDirection"], env_class=Broken, num_train_tasks=3, num_test_tasks=2)
    envs.register(name, row)
RUN, LOCK = os.getpid(), threading.Lock()
class Ends(envs.PointDirection):
    def step(self, action):
        if os.getpid() != RUN or "FORKED" not in os.environ:
            sys.exit(0)
        return super().step(action)
class EndsAtOnce(envs.PointDirection):
    def step(self, action):
        if os.getpid() != RUN or "FORKED" not in os.environ:
            os._exit(0)
        return super().step(action)
class Starts(envs.PointDirection):
    program = None
    def reset(self, **options):
        self.program = self.program or subprocess.Popen(["sleep", "600"])
        os.makedirs("started", exist_ok=True)
        open(f"started/{self.program.pid}", "w").close()
        return super().reset(**options)
    def close(self):
        if self.program:
            self.program.terminate()
            self.program.wait()
LOCK.acquire()  # as a thread of the run may
class Waits(envs.PointDirection):
    def reset(self, **options):
        if os.getpid() != RUN and not os.path.exists(f"waited{os.getpid()}"):
            open(f"waited{os.getpid()}", "w").close()
            LOCK.acquire(timeout=0.1 if os.path.exists("waited") else 40)
            open("waited", "w").close()
        return super().reset(**options)
STEPS = 0
class Fails(envs.PointDirection):
    def step(self, action):
        global STEPS
        STEPS += 1
        if STEPS == int(os.environ.get("AT", "0")):
            how = os.environ["HOW"]
            if how == "cwd":
                os.makedirs("away", exist_ok=True)
                os.chdir("away")
            elif how == "loop":
                open("loops", "w").close()
                while True:
                    pass
            else:
                raise {"error": ValueError, "connection": ConnectionError}[how]("the gripper is lost")
        return super().step(action)
class Rich(envs.PointDirection):
    resets = 0
    def reset(self, **options):
        self.resets += 1
        return super().reset(**options)
    def step(self, action):
        obs, reward, *rest = super().step(action)
        is_scored = self.resets > 2  # what the encoder reads stays as it is
        return (obs, float(os.environ["PAYS"]) if is_scored else reward, *rest)
for one in (Ends, EndsAtOnce, Starts, Waits, Fails, Rich):
    envs.register(one.__name__, dataclasses.replace(
        envs.SPECS["PointDirection"], env_class=one, num_train_tasks=3, num_test_tasks=2))
family("PaysNaN", float("nan"), False)
family("PaysInf", float("inf"), False)
family("ObservesNaN", float("nan"), True)
"""


@dataclasses.dataclass
class Attack:
    what: str
    command: (
        str  # FLAGS are those of its script; RUN is a copy of a run of its script that was stopped
    )
    sentence: str = ""  # a regular expression of what it says
    make: Callable = lambda run: None  # called before, with the folder of RUN
    codes: tuple = (2,)
    equal: bool = False  # in the end the run is the same as one that nothing disturbed
    signals: tuple = ()  # sent 0.3 s after the first checkpoint, a tenth of a second apart
    terminal: bool = False  # it has one, which goes away 0.3 s after the first checkpoint
    then: str = ""  # a second command, which must end with 0; PASTED is the one in the sentence, from another folder
    traceback: bool = False  # of an environment, above the sentence
    kind: str = ""


def ends(what, command, make=lambda run: None, sentence="", equal=True, **more):
    return Attack(what, command, sentence, make, (0,), equal, **more)


def stops(what, command, *signals, then="PASTED", codes=(1,)):
    return Attack(
        what, f"exec {command}", "stopped", codes=codes, equal=True, signals=signals, then=then
    )


def other_data():
    """1 other data"""
    for name, array, function in (
        ("smac_offline_online", "test_tasks", lambda d: d["test_tasks"][::-1]),
        ("smac_offline_online", "rl_tasks", lambda d: (d["rl_tasks"] + 1) % 3),
        ("meta_bc", "train_tasks", lambda d: d["train_tasks"][[1, 0, 2]]),
        ("macaw", "rl_tasks", lambda d: (d["rl_tasks"] + 1) % 3),
        ("borel", "test_tasks", lambda d: d["test_tasks"][::-1]),
    ):
        command = f"python {name}.py --resume RUN --dataset x.npz"
        yield Attack(
            f"{array} reversed or renumbered",
            command,
            "are others than in this",
            data(**{array: function}),
        )
    yield Attack(
        "the dataset of the repository",
        RESUME.split(" --dataset")[0],
        "are others than in this dataset",
    )
    for name in ("smac_offline_online", "borel"):
        command = f"mkdir -p far; cp d.npz far/e.npz; cd far; python ../{name}.py --resume ../RUN --dataset e.npz"
        yield ends("the same data elsewhere, from another folder", command)


def writes():
    """2 writes elsewhere"""
    flags = dict(
        save_dataset=os.path.abspath("precious"),
        run_dir="elsewhere",
        resume="elsewhere",
        dataset_iteration=1,
    )
    command = "python pearl_online_oracle.py --resume RUN; e=$?; [ -e precious -o -e elsewhere ] && exit 9; exit $e"
    yield ends(
        "save_dataset and run_dir in a checkpoint", command, checkpoint(**flags), equal=False
    )


def harmful():
    """3 harmful files"""
    with zipfile.ZipFile("d.npz") as whole:
        tricks = dict(
            zip_tricks({name: whole.read(name) for name in whole.namelist()}, "rl_obs.npy", 1 << 26)
        )
    kept = "a second archive in the comment|a zip64 table of a terabyte|a zip bomb|a zip bomb in five parts"
    tricks = {
        what: tricks[what]
        for what in [*kept.split("|"), "members that overlap", "6,000 empty arrays"]
    }
    tricks["300,000 empty members"] = archive({str(i): b"" for i in range(300_000)})
    for what, content in tricks.items():
        make = functools.partial(replace, content, "x.npz")
        yield Attack(f"dataset: {what}", f"{META_BC} --dataset x.npz", "x.npz cannot be read", make)
    command = f"truncate -s 100G x.npz; {META_BC} --dataset x.npz; e=$?; rm x.npz; exit $e"
    yield Attack("dataset: 100 GB of nothing", command, "x.npz cannot be read")
    for what, name, array in (
        ("<U0 of a billion entries", "env_id", npy("<U0", "(1000000000,)")),
        ("<U999999999", "format_version", npy("<U999999999", "()")),
        ("|V0 of a billion entries", "rl_obs", npy("|V0", "(1000000000,)")),
        ("codepoint 0x7fffffff", "env_id", npy("<U1", "()", b"\xff\xff\xff\x7f")),
        ("61 dimensions", "rl_obs", npy("|i1", f"(600000, {'1, ' * 60})")),
        ("code that is run", "rl_obs", npy("|O", "()", pickle.dumps(Hostile("created")))),
    ):
        command = f"{META_BC} --dataset x.npz; e=$?; [ -e created ] && exit 9; exit $e"
        yield Attack(
            f"dataset: {name} is {what}",
            command,
            "x.npz",
            lambda run, n=name, a=array: member(n, a),
        )
    for what, make, sentence in (
        ("400,000 test tasks", data(3, 400_000), "test_tasks has 400000 entries, expected at most"),
        (
            "60,000 trajectories of one step",
            data(3, 2, (1,) * 60_000),
            "60000 entries, expected at most",
        ),
        (
            "20,000 tasks in 1 MB",
            data(20_000, 2, (1,) * 20_000, save=np.savez_compressed),
            "20000 entries",
        ),
    ):
        yield Attack(f"dataset: {what}", f"{META_BC} --dataset x.npz", sentence, make)
    mixed = data(3, 2, (1200,) * 100 + (1,) * 40_000)
    yield Attack(
        "dataset: lengths of 1,200 and of one", f"{BOREL} --dataset x.npz", "too long to pad", mixed
    )
    most = {
        "20,000 tasks": (10_000, 10_000, (1,) * 10_000),
        "50,000 trajectories": (3, 2, (1,) * 50_000),
    }
    for what, sizes in most.items():
        yield ends(
            f"dataset: {what}, the most", f"{META_BC} --dataset x.npz", data(*sizes), equal=False
        )
    weight = "agent/policy.net.0.weight"
    bomb = tricks["a zip bomb"]
    pickled, opcodes = b"\x80\4N" + b"2\x86" * 250 + b".", b"\x80\4" + b"N0" * 1_500_000
    for what, make in (
        ("a zip bomb", functools.partial(replace, bomb, "checkpoint.npz")),
        ("2^60 steps of pickle", functools.partial(replace, pickled, "checkpoint.npz")),
        ("3 MB of opcodes", functools.partial(replace, opcodes, "checkpoint.npz")),
        ("cut", lambda run: os.truncate(run / "checkpoint.npz", 50_000)),
        ("a weight is <U0", lambda run: member(weight, npy("<U0", "(1000000000,)"), run)),
        ("a weight is NaN", checkpoint(lambda c: {weight: c[weight] * np.float32("nan")})),
        (
            "an index outside of the buffer",
            checkpoint(lambda c: {"buffer/index/rl": c["buffer/index/rl"] + 2**30}),
        ),
        ("step 2^62", checkpoint(lambda c: {"step": np.array(2**62)})),
        (
            "a surrogate in its flags",
            lambda run: member("flags", npy("<U1", "()", b"\0\xd8\0\0"), run),
        ),
        ("words for its table", checkpoint(lambda c: {"evaluations": np.array("2,0,test")})),
        (
            "NaN in its table",
            checkpoint(lambda c: {"evaluations": c["evaluations"] * np.nan}),
        ),
        (
            "400,000 rows of steps to come in its table",
            checkpoint(lambda c: {"evaluations": np.full((400_000, 7), 10.0**6)}),
        ),
        ("a table of an earlier version", checkpoint(lambda c: {"eval_csv": np.array("2,0")})),
    ):
        yield Attack(f"checkpoint: {what}", RESUME, "checkpoint.npz", make)
    for what, new in (
        ("a script of 10 MB", {"script": np.array("x" * 2_500_000)}),
        ("400,000 test tasks", {"test_tasks": np.ones((400_000, 1))}),
    ):
        yield Attack(f"agent file: {what}", WATCH, "agent.npz", agent(**new))


def nan():
    """4 NaN, infinity"""
    rates = {MACAW: "--policy-lr 1e3 --value-lr 1e3", BOREL: "--lr 1e3 --vae-lr 1e3"}
    for command in (SMAC, PEARL, META_BC, MACAW, BOREL):
        yield Attack(
            "learning that diverges",
            f"{command} {rates.get(command, '--lr 1e3')} --eval-every 1",
            NAN,
        )
    for command, scale in ((META_BC, np.float32(1e15)), (SMAC, np.float32(1e30))):
        make = data(rl_rewards=lambda d, scale=scale: scale * d["rl_rewards"])
        yield Attack(
            f"rewards x {scale:.0e}", f"{command} --eval-every 1 --dataset x.npz", NAN, make
        )
    for command, name in ((SMAC, "PaysNaN"), (PEARL, "PaysInf"), (MACAW, "ObservesNaN")):
        make = data(env_id=lambda d, name=name: np.array(name))
        words = f"--env-id mine:{name}" + " --dataset x.npz" * (command != PEARL)
        yield Attack("an environment's numbers", f"{command} {words}", NAN, make)


def closed():
    """5 closed streams"""
    yield ends("nobody reads", f"{SMAC} | true; exit ${{PIPESTATUS[0]}}")
    yield ends("nobody reads more than a line", f"{MACAW} | head -1; exit ${{PIPESTATUS[0]}}")
    yield ends("nobody reads errors either", f"{PEARL} 2>&1 | true; exit ${{PIPESTATUS[0]}}")
    yield ends("no streams", f"{META_BC} <&- >&- 2>&-")
    yield ends("no room for words", f"{BOREL} > /dev/full 2>&1")
    again = "python meta_bc.py --resume RUN --dataset d.npz"
    yield Attack(
        "the terminal goes away",
        f"exec {META_BC}",
        codes=(1,),
        equal=True,
        terminal=True,
        then=again,
    )
    yield ends("it goes away, under nohup", f"trap '' HUP; exec {SMAC}", terminal=True)


def unchanged():
    """6 refused resume"""
    yield Attack(
        "a flag that cannot change", f"{RESUME} --seed 2", "--seed is 1 in the run to resume"
    )
    other = functools.partial(shutil.copy, "stopped/meta_bc/checkpoint.npz")
    yield Attack(
        "the checkpoint of another script", RESUME, "checkpoint.npz does not fit this", other
    )
    yield Attack(
        "a flag in the checkpoint", RESUME, "--rl-batch is 1000000000", checkpoint(rl_batch=10**9)
    )


def locks():
    """7 no locks"""
    for number in (37, 38, 95):
        yield ends(
            f"errno {number}",
            f"PYTHONPATH=lock{number} {RESUME}",
            sentence="warning: .* can ?not be locked",
        )
    yield ends("no fcntl", f"PYTHONPATH=nofcntl {RESUME}")
    both = f"{SMAC} & {SMAC}; a=$?; wait $!; [ $((a + $?)) = 2 ]"
    yield ends("two runs in one folder", both, sentence="another process writes to|holds a run")


def no_bullet():
    """8 no PyBullet"""
    yield ends("PointDirection", f"PYTHONPATH=nobullet {SMAC}")
    command = "PYTHONPATH=nobullet python smac_offline_online.py --env-id SawyerManipulation"
    yield Attack("SawyerManipulation", command, "need pybullet; `pip install pybullet")


def flags():
    """9 flags, paths"""
    for command, sentence in (
        (f"{SMAC} --lr 1{'0' * 400}", "--lr is inf"), (f"{SMAC} --seed 1{'0' * 400}", "--seed is 1000"),
        (f"{BOREL} --elbo-terms 30000", "must be at most"), (f"{BOREL} --vae-tasks 1000000000000", "must be at most"),
        (f"{SMAC} --meta-batch 10000 --rl-batch 10000", "must be at most"), (f"{MACAW} --rl-batch 1", "at least 2"),
        (f"{SMAC} --online-iterations 1000000000000", "does not fit into memory"),
        (f"{PEARL} --save-dataset .", "is a folder, and only a regular file"), (f"{META_BC} --resume ''", "--resume is empty"),
        (f"{SMAC} --env-id $'\\e[31m'", "there is no environment"), (f"{SMAC} --run-dir $'a\\xff'", "printable text"),
        (f"{SMAC} --run-dir $(printf 'a%.0s' {{1..5000}})", "File name too long"),
        (f"{SMAC} --dataset $(printf 'a/%.0s' {{1..2500}})", "there is no dataset"),
        ("python meta_bc.py --resume $(printf 'a/%.0s' {1..2500})", "there is no file"),
        (f"ulimit -f 20; {SMAC}", "cannot write to .*File too large"),
    ):  # fmt: skip
        yield Attack(
            re.findall("--[^ ]+|ulimit -f", command.replace("FLAGS", ""))[0], command, sentence
        )
    kept = f"{RESUME}; e=$?; grep -qx precious precious || exit 9; exit $e"
    yield ends("checkpoint.npz.tmp is a link", kept, link("checkpoint.npz.tmp"))
    yield Attack(
        "args.json is a link", kept, "Too many levels of symbolic links", link("args.json")
    )
    for place in ("film.gif", "/proc/film.gif", "nowhere/film.gif"):
        yield Attack("a film", f"mkdir -p film.gif; {WATCH} --video {place}", place, agent())


def sentences():
    """10 sentences"""
    command = "python meta_bc.py --resume '~/PointDirection__meta_bc__1' --dataset d.npz"
    yield ends("~ is the home folder", f": RUN; HOME=$PWD/runs {command}")
    yield Attack("~ of nobody", "python meta_bc.py --resume '~nobody_here/run'", "there is no file")
    command = f"PYTHONPATH=brokengpu {SMAC} --device auto"
    yield Attack("a broken GPU", command, "the GPU cannot be used.* --device cpu works")
    command = (
        "MUJOCO_GL=none python benchmark/watch.py agents/HopperParam.npz --tasks 1 --video new.gif"
    )
    yield Attack("no library that draws", command, "can ?not be drawn here")


def stopped():
    """11 stopped, pasted"""
    command = SMAC + r""" --run-dir "runs/a b's \"c\" d" """.rstrip()
    yield stops("Ctrl-C; blanks and quotes", command, signal.SIGINT)
    for command, number in (
        (PEARL, signal.SIGTERM),
        (META_BC, signal.SIGINT),
        (MACAW, signal.SIGTERM),
    ):
        yield stops(f"{number.name} in an evaluation", command, number)
    yield stops("SIGINT in an evaluation", BOREL, signal.SIGINT)


def redirected():
    """12 redirected"""
    command = f"{META_BC} --offline-steps 1500 --eval-every 1500 > out 2>&1; e=$?; cat out; [ $(wc -c < out) -lt 2000 ]"
    yield ends("1,500 steps in 2,000 characters", f"{command} && exit $e", equal=False)


def twice():
    """13 stopped at once"""
    for command, number in ((SMAC, signal.SIGINT), (BOREL, signal.SIGTERM)):
        again = f"{command.replace('FLAGS', '--resume RUN')}" + " --dataset d.npz"
        yield stops(f"{number.name} twice", command, number, number, then=again, codes=(1, 130))


def of_family(name):
    """Write x.npz, a dataset of a family of the module mine."""
    return data(env_id=lambda d: np.array(name))


def exits():
    """14 programs that end by themselves"""
    for name, words in (("Ends", "called sys.exit"), ("EndsAtOnce", "os._exit")):
        flags = f"--env-id mine:{name}"
        yield Attack("in the run's process", f"{PEARL} {flags}", words)
        forked = f"FORKED=1 OMP_NUM_THREADS=2 {META_BC} {flags} --dataset x.npz"
        yield Attack("in a process of an evaluation", forked, words, of_family(name))
    for text in ("sys.exit(0)", "os._exit(0)"):

        def write_module(run, text=text):
            Path("leaves.py").write_text(f"import os, sys\n{text}\n")

        words = f"called {re.escape(text)}, so that the run did not end"
        command = f"{META_BC} --env-id leaves:{text[:2]}"
        yield Attack("a module, when it is imported", command, words, write_module)


def no_files():
    """15 what is no file"""
    for place in ("null", "full"):
        command = f"{WATCH} --episodes 2 --out /dev/{place}; e=$?; [ -c /dev/{place} ] && exit $e"
        yield Attack("a device", command, "is a device, and only a regular file", agent())
    command = f"mkfifo pipe; {WATCH} --episodes 2 --out pipe; e=$?; [ -p pipe ] && exit $e"
    yield Attack("a pipe", command, "pipe is a pipe, and only a regular file", agent())
    command = f"ln -s precious link.gif; {WATCH} --video link.gif"
    yield Attack("a link", command, "link.gif is a link, and only a regular file", agent())
    command = f"mkfifo data.npz; {PEARL} --save-dataset data.npz"
    yield Attack("a dataset", command, "data.npz is a pipe, and only a regular file")


def left_behind():
    """16 left behind"""
    command = f"OMP_NUM_THREADS=2 {META_BC} --env-id mine:Starts --dataset x.npz; e=$?; "
    command += "[ -e started ] || exit 9; "
    command += "for p in started/*; do kill -0 ${p##*/} 2> /dev/null && exit 9; done; exit $e"
    yield ends("programs of environments", command, of_family("Starts"), equal=False)


def silence():
    """17 silence"""
    command = f"OMP_NUM_THREADS=2 {META_BC} --env-id mine:Waits --dataset x.npz"
    words = "have not answered nor worked.* OMP_NUM_THREADS=1 goes without"
    yield ends("a lock that nobody gives back", command, of_family("Waits"), words, equal=False)


def dataset_of_a_run():
    """18 the dataset of a run"""
    run = "runs/PointDirection__pearl_online_oracle__1"
    command = f"exec {PEARL} --dataset-iteration 1 --save-dataset s.npz"
    yield Attack(
        "its iteration is over",
        command,
        "stopped",
        codes=(1,),
        signals=(signal.SIGTERM,),
        then="PASTED",
    )
    command = (
        f"{PEARL} --online-iterations 1 --dataset-iteration 1 --save-dataset s.npz; rm s.npz; "
    )
    command += f"cp -r {run} before; "
    command += (
        f"python pearl_online_oracle.py --resume {run} --online-iterations 2 --save-dataset s.npz; "
    )
    command += f"e=$?; diff -r {run} before || exit 9; exit $e"
    yield Attack("and it is not there", command, "iteration 1 of this run is over")
    for terminal, paths, words in (
        (0.3, 1, "terminals must be booleans"),
        (2, 1, "terminals must be booleans"),
        ("''", 1, "has no terminals"),
        (0, 0, "rl has no trajectory"),
    ):
        yield Attack("from a program", f"python save.py {terminal} {paths}", words)


def settings():
    """19 settings"""
    for shell in ("nosuchshell x", "bash nowhere/x"):
        words = f"python meta_bc.py --tyro-write-completion {shell}"
        yield Attack("completion", words, "got nosuchshell|nowhere/x")
    words = "MATMUL_PRECISION is 'low', expected highest or medium"
    yield Attack("precision", f"MATMUL_PRECISION=low {META_BC}", words)

    def large(run):
        agent()(run)
        arrays = read("agent.npz")
        for name, array in arrays.items():
            if name.startswith("6/"):
                arrays[name] = np.full_like(array, 1e10)
        write("agent.npz", arrays)

    yield Attack("weights of 1e10", WATCH, "is NaN or infinite", large)


def tables():
    """20 the table of evaluations"""
    run = "runs/PointDirection__meta_bc__1"
    again = f"python meta_bc.py --resume {run} --dataset d.npz"
    for what, change in (
        ("LF in place of CRLF", "sed -i 's/\\r//' FILE"),
        ("quotes", "sed -i 's/^/\"/' FILE"),
        ("a BOM", "sed -i '1s/^/\\xef\\xbb\\xbf/' FILE"),
        ("a comment", "echo '# good' >> FILE"),
        ("deleted", "rm FILE"),
        ("a pipe", "rm FILE; mkfifo FILE; sleep 3; rm FILE"),
    ):
        change = change.replace("FILE", f"{run}/eval.csv")
        wait = f"until [ -e {run}/checkpoint.npz ]; do sleep 0.05; done"
        command = f"({wait}; {change}) & {META_BC} --eval-every 2; e=$?; wait; "
        yield ends(f"eval.csv: {what}", f"{command} [ $e = 0 ] && {again}")
    rows = checkpoint(lambda c: {"evaluations": np.repeat(c["evaluations"], 20_000, axis=0)})
    yield ends("it has more than 100,000 rows", RESUME, rows, equal=False)
    for pays in ("1e33", "3e34"):
        flags = "--env-id mine:Rich --dataset x.npz"
        command = f"PAYS={pays} {META_BC} {flags} --eval-every 6; "
        command += f"PAYS={pays} python meta_bc.py --resume runs/Rich__meta_bc__1 {flags}"
        yield ends(f"returns of 50 times {pays}", command, of_family("Rich"), equal=False)
    command = f"PAYS=1e37 {META_BC} --env-id mine:Rich --dataset x.npz --eval-every 6"
    yield Attack("returns of 50 times 1e37", command, NAN, of_family("Rich"))


def failing():
    """21 environments that fail"""
    flags = "--env-id mine:Fails --dataset x.npz"
    make = of_family("Fails")
    for how, words in (
        ("error", "ValueError: the gripper is lost"),
        ("connection", "ConnectionError: the gripper is lost"),
    ):
        for threads, at, place in (
            (1, 200, "there is no checkpoint yet"),
            (1, 7000, "continue with: cd .* && python"),
            (2, 200, "there is no checkpoint yet"),
        ):
            command = f"HOW={how} AT={at} OMP_NUM_THREADS={threads} {META_BC} {flags}"
            if threads == 2:
                words = words.replace(":", " in a process that played episodes:")
            sentence = f"{words}, at step \\d of .*/Fails__meta_bc__1; {place}"
            what = f"it raises, {threads} thread" + "s" * (threads - 1)
            yield Attack(what, command, sentence, make, traceback=True)
    command = f"HOW=cwd AT=200 {META_BC} {flags}"
    yield ends("it changes the working directory", command, make, equal=False)
    command = f"HOW=loop AT=200 {META_BC} {flags} & "
    command += "until [ -e loops ]; do sleep 0.05; done; sleep 0.5; kill -TERM $!; sleep 1; "
    command += "kill -TERM $!; wait $!"
    words = "once more stops at once"
    again = f"{META_BC} {flags}"  # HOW and AT are of the first command
    yield Attack("it never returns", command, words, make, codes=(130,), then=again)


def drawing():
    """22 libraries that draw"""
    for library in ("osmesa", "egl", "glfw", "nothing"):
        yield ends(f"MUJOCO_GL={library}", f"MUJOCO_GL={library} {META_BC}")


def rows():
    """23 rows of one's own"""
    for text, words in (
        ("task_range=[-1, 1]", "task_range of a task family is .*expected a tuple"),
        ("task_range=None", "task_range of a task family is None"),
        ("task_range=3", "task_range of a task family is 3"),
        ("task_range=np.array([-1, 1])", "task_range of a task family is"),
        ("presets=None", "presets of a task family are None"),
        ("horizon=2**70", "horizon of a task family is 1180591620717411303424"),
        ("action_dim=3", r"action_dim is \(3,\) in its row, but its environment has \(2,\)"),
        ("env_class=Discrete", "its actions are Discrete"),
        ("env_class=Words", "its observations are Dict"),
        ("env_class=Image", "its observations are Box.* expected a Box of one dimension"),
    ):

        def write_module(run, text=text):
            Path("rows.py").write_text(ROWS.replace("ROW", text))

        yield Attack(text, f"{PEARL} --env-id rows:Row", words, write_module)


KINDS = (
    other_data, writes, harmful, nan, closed, unchanged, locks, no_bullet, flags, sentences, stopped, redirected, twice,
    exits, no_files, left_behind, silence, dataset_of_a_run, settings, tables, failing, drawing, rows,
)  # fmt: skip

"""A run: its folder, its gradient steps and signals, its log, its checkpoint.

A run keeps its table of evaluations as numbers, in its checkpoint. The files beside the checkpoint
(eval.csv, args.json, TensorBoard's) are output: a run never reads them again. Only the files
figures_{step}.npz are read once more, for the picture at the end.
"""

import contextlib
import errno
import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import envs
from plumbing import pictures
from plumbing.checkpoint import restore
from plumbing.errors import InputError, called_exit
from plumbing.evaluation import (
    curves_of,
    kl_of,
    kls_of,
    numbers_of,
    paths_of,
    returns_of,
    rows_of,
)
from plumbing.files import (
    CSV_COLUMNS,
    SPLITS,
    check_replaceable,
    check_table,
    flatten,
    table_text,
    write_file,
)
from plumbing.flags import PATHS, Screen, check_flags, print_safely
from plumbing.machine import (
    choose_device,
    commit,
    compile_step,
    cuda_graph,
    keep_freed_memory,
    matmul_precision,
    versions,
)
from plumbing.stopwatch import Stopwatch, in_words

LOG_EVERY = 200  # gradient steps averaged into one point of the loss curves


class Run:
    """One run. It stops at SIGINT, SIGTERM and SIGHUP, and on leaving gives everything back.

        with Run(args, __file__, dataset["sha256"], agent=agent, optimizer=optimizer) as run:
            for step in run.steps(1000, "offline"):
                run.log(learn(...))
                if run.evaluation_due:
                    run.write(*evaluate(...))

    Args:
        script: the script's file.
        sha256: of the dataset. A run is resumed with the same data only, wherever the file is.
        parts: everything that a checkpoint must hold: the `agent`, one `optimizer`, an Adam, and
            other modules, buffer, generators. With --resume they get the state of the checkpoint.

    Raises InputError: the folder, the flags or the checkpoint cannot be used.
    """

    # ----- The folder

    def __init__(self, args, script, sha256="", **parts):
        check_flags(args)
        check_optimizer(parts)
        self.args = args
        self.script = Path(script).resolve()
        self.sha256 = sha256
        self.parts = parts
        self.device = choose_device(args)
        name = f"{envs.short_name(args.env_id)}__{self.script.stem}__{args.seed}"
        # An environment may change the working directory, so that paths are made absolute.
        self.home = os.getcwd()
        folder = os.path.expanduser(args.resume or Path(args.run_dir, name))
        self.folder = Path(self.home, folder)
        self.checkpoint = self.folder / "checkpoint.npz"

        self.step = 0  # gradient steps made so far
        self.env_steps = 0  # new transitions so far
        self.end = 0  # gradient steps at the end of this phase
        self.totals = {}  # sums of the scalars of the last steps ...
        self.summed = 0  # ... and how many steps these are
        self.table = np.zeros((0, len(CSV_COLUMNS)))  # a row for each evaluation, split and task
        self.phase = 0  # 1 in the first phase, 2 in the second
        self.evaluation_due = False
        self.stopping = False
        self.sentence = ""  # to print after the next checkpoint
        self.stopwatch = Stopwatch()

        if not str(self.folder).isprintable():  # TensorBoard takes no other paths
            raise InputError(
                f"the path of a run must be printable text in UTF-8, and {self.folder} is not"
            )
        if not args.resume and self.checkpoint.exists():
            raise InputError(
                f"{self.folder} holds a run: --resume continues it with its own flags, "
                "another --run-dir or --seed makes another"
            )
        keep_freed_memory()
        rows = args.meta_batch * args.rl_batch
        self.precision = matmul_precision(self.device, rows, args.policy_hidden[0])
        if args.resume:
            restore(self)
        # Nothing is written before this, so that a refused run changes nothing.
        with self.writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = self.open_locked()
            try:
                self.write_args()
                self.write_table()
            except BaseException:
                self.file.close()
                raise

    def open_locked(self):
        """Open args.json, empty. Until it is closed nobody else can write to this run."""
        # A link of this name is not followed.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = open(os.open(self.folder / "args.json", flags, 0o666), "w+")
        try:
            lock(file)
        except BlockingIOError:
            file.close()
            raise InputError(
                f"another process writes to {self.folder}, or another run of this one"
            ) from None
        except (OSError, ImportError) as error:
            # A file system without locks, or a Python without fcntl
            no_locks = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
            if isinstance(error, OSError) and error.errno not in no_locks:
                file.close()
                raise
            warning = f"warning: {self.folder} cannot be locked: start no second process with it"
            print_safely(warning, "stderr")
        file.truncate(0)
        return file

    def write_args(self):
        """Write args.json: the flags, and what else the results depend on."""
        content = vars(self.args) | {
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "versions": versions(self.device),
            "dataset_sha256": self.sha256,
            "commit": commit(),
        }
        self.file.write(json.dumps(content, indent=1))
        self.file.flush()

    def __enter__(self):
        # Importing it takes half a second, which --help can do without.
        from torch.utils.tensorboard import SummaryWriter

        try:
            with self.writing():
                self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1)
                if not self.args.resume:
                    self.log_flags()
        except BaseException:
            self.file.close()
            raise
        # On a full disk TensorBoard's thread would print a traceback; the next call to the writer
        # raises the same error.
        self.hook = threading.excepthook
        threading.excepthook = self.ignore_full_disk
        self.monitor = tqdm.monitor_interval
        tqdm.monitor_interval = 0  # no thread
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                # nohup makes a process ignore SIGHUP, and so it stays.
                if number and signal.getsignal(number) is not signal.SIG_IGN:
                    self.handlers[number] = signal.signal(number, self.stop)
        return self

    def log_flags(self):
        """Show the flags in TensorBoard, as a text and under HPARAMS."""
        from torch.utils.tensorboard.summary import hparams

        rows = [f"| {name} | {value} |" for name, value in vars(self.args).items()]
        self.writer.add_text("flags", "\n".join(["| flag | value |", "|---|---|", *rows]))
        values = {}
        for name, value in vars(self.args).items():
            values[name] = value if isinstance(value, (bool, int, float, str)) else str(value)
        # SummaryWriter.add_hparams would make a second file, and TensorBoard a second run of it.
        metrics = dict.fromkeys([f"charts/{split}/own_context_return" for split in SPLITS], 0)
        for summary in hparams(values, metrics):
            self.writer.file_writer.add_summary(summary)

    def ignore_full_disk(self, failure):
        """In place of threading.excepthook."""
        if not issubclass(failure.exc_type, OSError):
            self.hook(failure)

    def __exit__(self, kind, error, _):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        try:
            with self.writing() if kind is None else contextlib.suppress(OSError):
                self.writer.close()
        finally:
            threading.excepthook = self.hook
            tqdm.monitor_interval = self.monitor
            self.file.close()
        if kind is None:
            self.finish()
        else:
            self.explain(error)

    def finish(self):
        """Draw summary.png, and print the table."""
        with self.writing():
            figure = pictures.draw_summary(self.folder, self.table)
            style = dict(format="png", dpi=100, bbox_inches="tight")
            write_file(self.folder / "summary.png", lambda file: figure.savefig(file, **style))
        print_safely(pictures.table_of_means(self.table))
        print_safely(f"\n{self.folder / 'summary.png'}")

    def explain(self, error):
        """Add to an error where it came up, and how to continue.

        Raises InputError in place of one without these words, of an OSError, and of an
        environment's sys.exit. Any other error gets them as a note, and keeps its type.
        """
        saved = self.saved()
        where = f"at step {self.step + 1} of {self.folder}; {saved}"
        if isinstance(error, InputError):
            if saved not in str(error):
                raise InputError(f"{str(error)[:200]}, {where}") from error.__cause__
        elif isinstance(error, OSError):  # a full disk, or what an environment is connected to
            what = f"{type(error).__name__}: {error}"
            raise InputError(f"{what[:200]}, {where}") from error
        elif isinstance(error, SystemExit) and not isinstance(error.code, str):
            # (a run that is stopped ends with SystemExit as well, and a sentence as its code)
            raise InputError(f"{called_exit(error)}, {where}") from None
        elif isinstance(error, Exception):
            error.add_note(where)

    # ----- Signals and steps

    def stop(self, number, frame):
        """At the first signal stop after this gradient step, at the second at once."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        # A signal may come while something is printed, which cannot be interrupted by a print.
        with contextlib.suppress(RuntimeError):
            print_safely("\nstops after this step; once more stops at once", "stderr")

    def stopped(self, when):
        """The exception with which a stopped run ends.

        SystemExit ends a script with this sentence. A notebook would show it with a remark on how
        to leave IPython, and an interrupt there is a KeyboardInterrupt.
        """
        sentence = f"stopped {when}; {self.saved()}"
        return KeyboardInterrupt(sentence) if in_ipython() else SystemExit(sentence)

    def steps(self, end, name):
        """Gradient steps up to number `end`.

        Yields the number of steps made so far, then counts, saves and stops.
        """
        self.end = end
        self.phase += 1
        self.since = last_line = time.time()
        bar = tqdm(
            total=end,
            initial=min(self.step, end),
            desc=name,
            file=Screen(),
            disable=not bars_move(),
        )
        with bar:
            while self.step < end:
                if self.stopping:
                    raise self.stopped(f"before step {self.step + 1}")
                next_step = self.step + 1
                self.evaluation_due = next_step == end or next_step % self.args.eval_every == 0
                self.stopwatch.start(self.env_steps)
                yield self.step
                self.step += 1
                bar.update()
                # The checkpoint comes before the words.
                if self.evaluation_due or self.stopping:
                    self.save()
                if self.sentence:
                    bar.clear()
                    print_safely(self.sentence)
                    self.sentence = ""
                self.tell_end(bar)
                # A line now and then where no bar can move
                if bar.disable and time.time() - last_line > 30:
                    last_line = time.time()
                    print_safely(f"{name}: step {self.step} of {end}", "stderr")
                if self.stopping:
                    raise self.stopped(f"after step {self.step}")

    def count(self, name, values):
        """Yields values of what comes before the first gradient step; stops as `steps` does."""
        for value in tqdm(values, desc=name, file=Screen(), disable=not bars_move()):
            if self.stopping:
                raise self.stopped("before the first gradient step")
            yield value

    def tell_end(self, bar):
        """Say when the whole run will end, as soon as that can be told, and when more is known."""
        news = self.stopwatch.news()
        if not news:
            return
        seconds = self.stopwatch.seconds_left(self.step, vars(self.args))
        if seconds < 60:
            return
        end = time.strftime("%a %H:%M", time.localtime(time.time() + seconds))
        sentence = f"about {in_words(seconds)} to go, until {end}"
        missing = self.stopwatch.missing(vars(self.args))
        if missing:
            sentence += f"; {missing} not counted yet"
        if seconds > 2 * 3600 and getattr(self.args, "preset", None) == "paper":
            sentence += "; --preset short has smaller sizes"
        bar.clear()
        print_safely(sentence)

    def fast(self, function, compiled=False):
        """`function` in this run's precision; on a GPU recorded and replayed, see `cuda_graph`."""
        function = compile_step(function) if compiled else function

        def call(*arguments, **flags):
            # Only here: the faster products keep memory for every shape that they meet, and
            # trajectories are of any length.
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(self.precision)
            try:
                return function(*arguments, **flags)
            finally:
                torch.set_float32_matmul_precision(before)

        on_gpu = self.device.type == "cuda"
        return cuda_graph(call) if on_gpu and self.args.cuda_graph else call

    # ----- The log

    def log(self, info):
        """Add up the scalars of a gradient step, and write their means every LOG_EVERY steps.

        Raises InputError: one of them is NaN or infinite.
        """
        self.stopwatch.stop(self.env_steps)
        for name, value in info.items():
            self.totals[name] = self.totals.get(name, 0) + value
        self.summed += 1
        if (self.step + 1) % LOG_EVERY == 0 or self.evaluation_due:
            means = {name: value.item() / self.summed for name, value in self.totals.items()}
            self.check(means, "before")
            seconds = max(time.time() - self.since, 1e-6)  # a clock may stand still
            means["train/SPS"] = self.summed / seconds
            means["train/phase"] = self.phase  # where it steps up the second phase begins
            with self.writing():
                self.add_scalars(means)
            self.totals = {}
            self.summed = 0
            self.since = time.time()

    @np.errstate(over="ignore", invalid="ignore")  # what overflows is refused, in one sentence
    def write(self, evaluations, scalars, data=()):
        """Write an evaluation to eval.csv and TensorBoard.

        At the end of a phase also figures_{step}.npz and agent_{step}.npz; with --keep-agents the
        agent at every evaluation.

        Args:
            evaluations: a list of `Evaluation`.
            scalars: diagnostics to log, {name: number}.
            data: trajectories of the dataset in the training tasks, to be drawn.

        Raises InputError: a return, a KL, an observation or an action is NaN or infinite.
        """
        when = "at the evaluation after"
        for evaluation in evaluations:
            self.check(numbers_of(evaluation), when)
            self.check(kl_of(evaluation), when)
        rows = rows_of(evaluations, self.step + 1, self.env_steps)
        self.check({"a mean return": rows}, when)
        check_table(rows)
        self.table = np.concatenate([self.table, rows])

        env_class = envs.lookup(self.args.env_id).env_class
        sparse = getattr(env_class, "sparse", False)
        curves = dict(scalars)
        for evaluation in evaluations:
            curves |= curves_of(evaluation, sparse)
        arrays = kls_of(evaluations)
        histograms = list(arrays)
        if hasattr(env_class, "ground_velocity"):
            arrays |= paths_of(evaluations, data, self.args.env_id)

        texts = []
        for evaluation in evaluations:
            mean = returns_of(evaluation.final).mean()
            texts.append(f"{evaluation.split} ({evaluation.context} context) {mean:.1f}")
        with self.writing():
            self.add_scalars(curves)
            for name in histograms:
                # With the scalar's name TensorBoard would show neither.
                tag = f"eval/{name}/histogram"
                self.writer.add_histogram(tag, arrays[name], self.step + 1)
            figure = pictures.tasks_figure(self.table)
            self.writer.add_figure("eval/returns_by_task", figure, self.step + 1)
            if "exploration" in arrays:
                figure = pictures.paths_figure(arrays)
                self.writer.add_figure("eval/paths", figure, self.step + 1)
            self.write_table()
            is_last = self.step + 1 == self.end
            if is_last:
                self.save_npz(f"figures_{self.end}.npz", arrays)
            if is_last or self.args.keep_agents:
                self.save_agent(texts)
        new = f", {self.env_steps} new transitions" if self.env_steps else ""
        self.sentence = f"step {self.step + 1}{new} | return: {', '.join(texts)}"
        self.stopwatch.stop_evaluation()
        self.since = time.time()

    def write_table(self):
        """Write eval.csv, all of it: whatever became of the file meanwhile."""
        file = self.folder / "eval.csv"
        try:
            check_replaceable(file)
        except InputError:
            words = "is no regular file and stays as it is; the table is in the checkpoint"
            print_safely(f"warning: {file} {words}", "stderr")
            return
        text = table_text(self.table)
        write_file(file, lambda stream: stream.write(text.encode()))

    def save_agent(self, texts):
        """Write agent_{step}.npz: the agent, its flags, and what it returned, in words."""
        arrays = flatten(self.parts["agent"].state_dict())
        arrays["flags"] = self.flags()
        arrays["returns"] = json.dumps(texts)
        arrays["script"] = self.script.stem
        self.save_npz(f"agent_{self.step + 1}.npz", arrays)

    def save_npz(self, name, arrays):
        write_file(self.folder / name, lambda file: np.savez(file, allow_pickle=False, **arrays))

    def add_scalars(self, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, self.step + 1)

    def flags(self):
        """The flags as JSON, but those that name files."""
        flags = {name: value for name, value in vars(self.args).items() if name not in PATHS}
        return json.dumps(flags)

    def check(self, numbers, when):
        """Raise an InputError if one of the named numbers is NaN or infinite."""
        names = [name for name, value in numbers.items() if not np.isfinite(value).all()]
        if names:
            where = f"{when} step {self.step + 1} of {self.folder}"
            names = ", ".join(names)
            raise InputError(f"{names} became NaN or infinite {where}; {self.saved()}")

    # ----- The checkpoint: what is in it; checkpoint.py reads it

    def state(self):
        """All numbers that a checkpoint holds but the table, as {name: array}."""
        tree = {name: getattr(self, name) for name in ("step", "env_steps", "summed", "totals")}
        tree["torch_rng"] = torch.get_rng_state()
        for name, part in self.parts.items():
            is_generator = isinstance(part, torch.Generator)
            tree[name] = part.get_state() if is_generator else part.state_dict()
        return flatten(tree)

    def save(self):
        """Write checkpoint.npz. Raises InputError: something in it is NaN or infinite."""
        arrays = self.state()
        for name, array in arrays.items():
            if not self.is_valid(name, array):
                what = f"no checkpoint after step {self.step}, {name} is NaN or infinite"
                raise InputError(f"{what}; {self.saved()}")
        arrays["evaluations"] = self.table
        arrays["flags"] = self.flags()
        arrays["sha256"] = self.sha256
        arrays["precision"] = self.precision
        with self.writing():
            self.writer.flush()
            self.save_npz("checkpoint.npz", arrays)

    def is_valid(self, name, array):
        """Whether an array is finite; a buffer of the agent, which may be a mask, may hold inf."""
        masks = [f"agent/{mask}" for mask, _ in self.parts["agent"].named_buffers()]
        if name in masks:
            return not np.isnan(array).any()
        return bool(np.isfinite(array).all())

    # ----- What is left of a run that ends early

    @contextlib.contextmanager
    def writing(self):
        """Turn a full disk, or a folder that cannot be written any more, into one sentence."""
        try:
            yield
        except OSError as error:
            file = self.folder
            if isinstance(error.filename, (str, bytes)):
                file = os.fsdecode(error.filename)
            reason = f"cannot write to {file}: {error.strerror or error}"
            raise InputError(f"{reason}; {self.saved()}") from None

    def saved(self):
        """What is left of the run, in words."""
        with contextlib.suppress(OSError):  # a path that is too long to ask for
            if self.checkpoint.exists():
                return f"continue with: {self.command()}"
        return "there is no checkpoint yet"

    def command(self):
        """The command line that continues the run, from any folder."""
        words = ["python", str(self.script), "--resume", str(self.folder.resolve())]
        own_module = ":" in self.args.env_id
        if own_module:
            words += ["--env-id", self.args.env_id]
        for name in ("dataset", "save_dataset"):
            file = getattr(self.args, name, None)
            if file:
                path = Path(self.home, os.path.expanduser(file))
                words += ["--" + name.replace("_", "-"), os.path.realpath(path)]
        command = shlex.join(words)
        if own_module:  # which is found in this folder only
            command = f"cd {shlex.quote(self.home)} && {command}"
        return command


def check_optimizer(parts):
    """Raise an InputError unless a checkpoint can hold the optimizer (see checkpoint.py)."""
    optimizers = [name for name, part in parts.items() if isinstance(part, torch.optim.Optimizer)]
    adam = parts.get("optimizer")
    is_adam = isinstance(adam, torch.optim.Adam) and not adam.defaults["amsgrad"]
    if optimizers != ["optimizer"] or not is_adam:
        raise InputError(
            "a checkpoint holds one optimizer, an Adam without amsgrad, under the name `optimizer`"
        )


def lock(file):
    """Lock a file for this process; Windows has no such lock. Raises OSError, ImportError."""
    if os.name == "posix":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def in_ipython():
    """Whether this is a notebook, or IPython in a terminal."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def bars_move():
    """Whether a progress bar can move here: in a terminal or a notebook."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return is_terminal or in_ipython()

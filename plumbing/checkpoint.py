"""Reading a checkpoint: everything is checked before a run takes any of it."""

import itertools
import math

import torch

from plumbing.errors import InputError
from plumbing.files import CSV_COLUMNS, MAX_TEXT, check_array, check_table, read_npz

TEXTS = ("flags", "sha256", "precision")  # of a checkpoint; the rest of it are numbers


def restore(run):
    """Put the checkpoint of a run into its parts, its counters and its table.

    Raises InputError: the checkpoint is damaged, or does not fit this run.
    """
    arrays = read_checkpoint(run)
    for name in ("step", "env_steps", "summed"):
        if not 0 <= arrays[name] <= 2**53:
            raise InputError(f"{run.checkpoint} does not fit this run: its {name} is none")
    if arrays["precision"] not in ("highest", "medium"):
        raise InputError(f"{run.checkpoint} does not fit this run: its precision is none")
    try:
        check_table(arrays["evaluations"], arrays["step"])
        load_parts(run, arrays)
    except (RuntimeError, KeyError, InputError) as error:
        raise InputError(f"{run.checkpoint} does not fit this run: {error}") from None
    run.step = int(arrays["step"])
    run.env_steps = int(arrays["env_steps"])
    run.summed = int(arrays["summed"])
    run.totals = {}
    for name, total in arrays.items():
        if name.startswith("totals/"):
            run.totals[name.removeprefix("totals/")] = torch.tensor(total).to(run.device)
    run.precision = arrays["precision"]
    run.table = arrays["evaluations"]


def read_checkpoint(run):
    """All arrays of a checkpoint, each of the type and shape that it has in this run.

    Raises InputError: it has other arrays, or is of another dataset.
    """
    path = run.checkpoint
    required, optional = array_rules(run)
    rules = required | optional

    def accept(name, dtype, shape):
        if name == "eval_csv":
            raise InputError(f"{path} is of an earlier version, which cannot be resumed")
        if name not in rules and not name.startswith("totals/"):
            raise InputError(f"{path} does not fit this run: {name} is unknown")
        kind, expected = rules.get(name, ("f4", ()))
        if isinstance(run.parts.get(name), torch.Generator) and shape != expected:
            raise InputError(
                f"{path} is of the other kind of device, GPU or CPU; its agent can be watched"
            )
        longest = MAX_TEXT if name in TEXTS else math.inf
        return check_array(f"{path}: {name}", dtype, shape, kind, expected, longest)

    def accept_hash(name, dtype, shape):
        return name == "sha256" and accept(name, dtype, shape)

    # The dataset first: with another one nothing else may fit, and this is what to do about it.
    if read_npz(path, accept_hash).get("sha256", run.sha256) != run.sha256:
        data = f"the data of {run.folder} are others than in this dataset"
        raise InputError(f"{data}: name theirs with --dataset")
    arrays = read_npz(path, accept)
    for name in required:
        if name not in arrays:
            raise InputError(f"{path} does not fit this run: {name} is missing")
    for name in rules:
        is_number = name in arrays and name not in TEXTS
        if is_number and not run.is_valid(name, arrays[name]):
            raise InputError(f"{path}: {name} is NaN or infinite")
    return arrays


def array_rules(run):
    """{name: (type, shape)} of what a checkpoint must hold, and of what it may hold.

    None in a shape stands for any length.
    """
    required = dict.fromkeys(TEXTS, ("U", ()))
    required["evaluations"] = "f8", (None, len(CSV_COLUMNS))
    for name, array in run.state().items():
        shape = array.shape
        if name.startswith(("buffer/fields", "buffer/index")):
            shape = (None, *shape[1:])
        required[name] = array.dtype.str[1:], shape
    # The moments of a parameter that has had no gradient yet are missing.
    optional = {}
    groups = run.parts["optimizer"].param_groups
    parameters = itertools.chain(*[group["params"] for group in groups])
    for i, parameter in enumerate(parameters):
        shape = tuple(parameter.shape)
        optional[f"optimizer/state/{i}/step"] = "f4", ()
        optional[f"optimizer/state/{i}/exp_avg"] = "f4", shape
        optional[f"optimizer/state/{i}/exp_avg_sq"] = "f4", shape
    return required, optional


def load_parts(run, arrays):
    """Put arrays into the parts of a run. Raises RuntimeError, KeyError, InputError."""
    tree = {}
    for name, array in arrays.items():
        if name in TEXTS or name.startswith("totals/"):
            continue
        *nodes, last = name.split("/")
        node = tree
        for key in nodes:
            node = node.setdefault(key, {})
        node[last] = torch.from_numpy(array)
    torch.set_rng_state(tree["torch_rng"])  # nothing here draws from it, but dropout would
    for name, part in run.parts.items():
        if isinstance(part, torch.Generator):
            part.set_state(tree[name])
        elif name == "optimizer":
            moments = tree.get(name, {}).get("state", {})
            state = {int(i): moment for i, moment in moments.items()}
            if any(len(moment) < 3 for moment in state.values()):
                raise InputError("a state of the optimizer is not complete")
            part.load_state_dict(part.state_dict() | {"state": state})
        else:
            part.load_state_dict(tree[name])

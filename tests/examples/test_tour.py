"""examples/tour.ipynb runs from start to end, and what is stored in it is a whole run.

`python tests/examples/test_tour.py` executes the notebook, and stores it with its pictures.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
TINY = """
SEED = 2
OFFLINE_STEPS = 3
ITERATIONS = 1
UPDATES = 2
"""
# What else makes it short: few environments in an evaluation, and no pictures for TensorBoard.
CHEAP = """
import functools
import sys

sys.path.insert(0, "..")
from torch.utils.tensorboard import SummaryWriter

import envs
from plumbing import pictures

envs.make_evaluation = functools.partial(envs.make_evaluation, repeats=1)
pictures.tasks_figure = pictures.paths_figure = lambda *_: None
SummaryWriter.add_figure = lambda *_: None
"""


def cells(kind):
    """The cells of one kind as they are stored."""
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def has_picture(cell):
    return any("image/png" in output.get("data", {}) for output in cell["outputs"])


def is_parameters(cell):
    return "parameters" in cell["metadata"].get("tags", [])


def test_stored_with_its_pictures():
    """The cells were executed in order, in one go, without an error or a warning."""
    code = cells("code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    drawing = [cell for cell in code if "plt.subplots" in "".join(cell["source"])]
    assert len(drawing) >= 5
    for cell in drawing:
        assert has_picture(cell)
    assert str(Path.home()) not in json.dumps(outputs)  # no path of whoever executed it


def execute(notebook, folder):
    """Execute a notebook with this Python. Its temporary files go to `folder`."""
    import nbclient

    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Python", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    environment = {"JUPYTER_PATH": str(folder), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    client = nbclient.NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(EXAMPLES)}},
    )
    with mock.patch.dict(os.environ, environment):
        client.execute()


def test_runs(tmp_path):
    """At tiny sizes: every picture is drawn, and no file is written beside the notebook."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", 4)
    (parameters,) = [cell for cell in notebook.cells if is_parameters(cell)]
    names = [line.split(" = ")[0] for line in parameters.source.splitlines()]
    assert names == [line.split(" = ")[0] for line in TINY.strip().splitlines()]
    parameters.source = TINY + CHEAP
    before = sorted(EXAMPLES.iterdir())
    execute(notebook, tmp_path)
    executed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [has_picture(cell) for cell in executed] == [has_picture(cell) for cell in cells("code")]
    assert sorted(EXAMPLES.iterdir()) == before


def without_estimates(text):
    """What a cell printed, but for the lines that tell how long this computer will need."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if " to go, until " not in line)


def store():
    """Execute the notebook and store it, without its progress bars and estimates of time."""
    import nbformat

    notebook = nbformat.read(EXAMPLES / "tour.ipynb", 4)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if output.get("name") == "stdout":
                    output.text = without_estimates(output.text)
    nbformat.write(notebook, EXAMPLES / "tour.ipynb")


if __name__ == "__main__":
    store()

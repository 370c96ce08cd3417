"""examples/tour.ipynb runs from start to end, and what is stored in it is a whole run."""

import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
TINY = """
SEED = 2
OFFLINE_STEPS = 3
ITERATIONS = 1
UPDATES = 2
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
        is_definition = "".join(cell["source"]).lstrip().startswith("def ")
        assert has_picture(cell) or is_definition
    assert str(Path.home()) not in json.dumps(outputs)  # no path of whoever executed it


def test_runs(tmp_path, monkeypatch):
    """At tiny sizes: every picture is drawn, and no file is written beside the notebook."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", 4)
    (parameters,) = [cell for cell in notebook.cells if is_parameters(cell)]
    names = {line.split(" = ")[0] for line in parameters.source.splitlines()}
    assert names == {line.split(" = ")[0] for line in TINY.strip().splitlines()}
    parameters.source = TINY
    before = sorted(EXAMPLES.iterdir())

    # The kernel must be that of this Python, and its temporary files must go.
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Python", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = {"metadata": {"path": str(EXAMPLES)}}
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder)
    client.execute()

    stored = cells("code")
    executed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [has_picture(cell) for cell in executed] == [has_picture(cell) for cell in stored]
    assert sorted(EXAMPLES.iterdir()) == before

"""The scripts that made the shipped datasets still make them."""

import runpy
import sys
from pathlib import Path

import numpy as np

import buffers

FOLDER = Path(buffers.__file__).parent / "datasets"


def test_the_point_direction_datasets_are_what_their_script_makes(tmp_path, monkeypatch):
    save_dataset = buffers.save_dataset

    def save_elsewhere(file, *args, **kwargs):
        save_dataset(tmp_path / Path(file).name, *args, **kwargs)

    monkeypatch.setattr(buffers, "save_dataset", save_elsewhere)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds to it
    runpy.run_path(str(FOLDER / "make_point_direction.py"), run_name="__main__")
    names = ["PointDirection.npz", "PointDirectionGoal.npz"]
    assert sorted(file.name for file in tmp_path.glob("*.npz")) == names
    for name in names:
        with np.load(tmp_path / name) as made, np.load(FOLDER / name) as shipped:
            assert sorted(made.files) == sorted(shipped.files)
            for field in shipped.files:
                array, expected = made[field], shipped[field]
                assert array.dtype == expected.dtype and array.shape == expected.shape, field
                if array.dtype.kind == "f":  # another processor may round otherwise
                    np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)
                else:
                    np.testing.assert_array_equal(array, expected)

"""Describe the datasets here anew: python datasets/describe.py

Writes {name}.json beside each {name}.npz, which stays as it is. `save_dataset` has written most of
it. What is unknown of older data is null: with which versions, and on which processor, they were
made; their date is that of the commit that brought them. To this comes what SMAC reaches with
the data, by the results in benchmark/results/, read as benchmark/plot.py reads them,
which needs benchmark/requirements.txt.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
import envs
from benchmark import evidence
from plumbing.files import dataset_rules, read_npz
from plumbing.provenance import describe_dataset, description_file, write_description

# The runs of SMAC that tell what it reaches; all others have --preset short
REFERENCES = {
    "PointDirection": "point_direction/smac__*.csv",
    "PointDirectionGoal": "point_direction/smac_goal_data__*.csv",
}


def reference(name):
    """What SMAC reaches with a dataset, and where that is written."""
    pattern = REFERENCES.get(name, f"short/{name}/smac__*.csv")
    files = sorted((ROOT / "benchmark" / "results").glob(pattern))
    if not files:
        return None
    scores = [evidence.read(file).score(evidence.SECOND) for file in files]
    return {
        "what": "SMAC, return on test tasks: mean over seeds of each run's last three evaluations "
        "of the second phase",
        "return": round(float(np.mean(scores)), 1),
        "seeds": len(files),
        "from": f"benchmark/results/{pattern}",
    }


def date_of(file):
    """When the last commit that changed a file was made, or None."""
    words = ["git", "log", "-1", "--follow", "--format=%aI", "--", file]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return answer.stdout.strip() or None


def describe(path):
    """The description of a dataset of this folder."""
    names = {"env_id"}
    env_id = read_npz(path, lambda name, *_: name in names)["env_id"]
    rules = dataset_rules(envs.lookup(env_id))
    data = read_npz(path, lambda name, *_: name in rules)
    description = describe_dataset(path, env_id, data, with_versions=False)
    description["date"] = date_of(path)
    file = Path(description_file(path))
    before = json.loads(file.read_text()) if file.exists() else {}
    if before.get("sha256_of_contents") == description["sha256_of_contents"]:
        description |= {name: before[name] for name in ("date", "versions", "cpu")}
    description["reference"] = reference(path.stem)
    return description


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.npz")):
        write_description(path, describe(path))
        print(description_file(path))

"""HumanoidDirection that shows its position and velocity alone, scaled.

PAPER: an observation in R^376. Besides position and velocity it has inertias and velocities of the
bodies, which follow from them, and torques, which are the last action and reach 100: from these a
policy learns worse (results/told/direction.md).

A dataset of HumanoidDirection becomes one of this family:

    python benchmark/experiments/humanoid_scaled.py runs/Told1200.npz runs/Scaled1200.npz
    python smac_offline_online.py --env-id benchmark.experiments.humanoid_scaled:HumanoidScaled \
        --dataset runs/Scaled1200.npz --preset short
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import buffers
import envs
from plumbing.flags import launch_tool

OFFSET = np.zeros(45, np.float32)
OFFSET[0] = 1.25  # height
# Height, the torso's quaternion, 17 joints, velocity; angular velocities of torso and joints.
# So much do they vary in the data; the velocity stays in m/s.
SCALE = np.repeat([0.1, 0.3, 0.4, 1.0, 3.0], [1, 4, 17, 3, 20]).astype(np.float32)


def scaled(obs):
    """(..., 376) of HumanoidDirection -> (..., 45)."""
    return (obs[..., :45] - OFFSET) / SCALE


class HumanoidScaled(envs.HumanoidDirection):
    """HumanoidDirection; observation (45,): qpos[2:] (22) and qvel (23), scaled."""

    env_id = "HumanoidScaled"

    def _get_obs(self):
        return scaled(super()._get_obs())


envs.register("HumanoidScaled", envs.Spec(HumanoidScaled, 45, 17, 1, 200, 50, 5))


@dataclasses.dataclass
class Args:
    source: tyro.conf.Positional[Path]  # dataset of HumanoidDirection
    target: tyro.conf.Positional[Path]  # file to write


def main(args):
    """Write the dataset. Raises InputError."""
    dataset = buffers.load_dataset("HumanoidDirection", args.source)
    for _, path in dataset["rl"]:
        path["obs"] = scaled(path["obs"])
    parts = dataset["train_tasks"], dataset["test_tasks"], dataset["rl"], []
    buffers.save_dataset(args.target, "HumanoidScaled", *parts, dataset["command"])


if __name__ == "__main__":
    launch_tool(main, Args)

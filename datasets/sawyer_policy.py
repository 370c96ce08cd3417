"""The script behind the offline data of the Sawyer families (C.2): it does not know which behaviour is rewarded."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sawyer

UP = np.array([0.0, 0.0, 1.0])
LEVEL = np.array([1.0, 1.0, 0.0])
LIMIT = (
    0.97  # of an action. Of 1 the policy's log-density is that of atanh(1 - 1e-6) = 7, an outlier
)


class SawyerPolicy:
    """One possible job after the other, in random order, without knowing the
    behaviour that is rewarded; noise N(0, .1^2) on the actions. One object for one episode.

    Args:
        env: a Sawyer environment, just reset.
        rng: np.random.Generator.
    """

    def __init__(self, env, rng):
        self.env = env = env.unwrapped
        self.rng = rng
        self.scene = env.scene
        self.top_z = env.top_z
        self.button_z = env.button_z
        self.side = env.scene["side"]
        self.pull = rng.uniform(0.09, 0.15)  # how far to pull the drawer out
        self.grip = -1.0  # the gripper's command
        thing = self.scene["object"] >= 0
        tray = self.scene["tray"] >= 0
        to_tray = thing and tray and env.num_behaviours == 8
        jobs = [  # is it possible in this scene, the job, its arguments
            (True, self.move_hand),
            (self.scene["top_drawer"], self.move_top_drawer),
            (self.scene["button"], self.press_button),
            (thing, self.carry, sawyer.GOAL[:2]),
            (to_tray, self.carry, sawyer.PLACES[self.scene["tray"]] * [1, self.side]),
        ]
        self.jobs = [job for possible, *job in jobs if possible]
        self.job = rng.integers(len(self.jobs))

    def __call__(self):
        """The action in the environment's present state: (4,), float32."""
        act, *args = self.jobs[self.job]
        motion, self.grip, done = act(self.env.measure(), *args)
        if done:
            del self.jobs[self.job]
            self.job = self.rng.integers(len(self.jobs))
        action = [*motion, self.grip] + self.rng.normal(0, 0.1, 4)
        return np.clip(action, -LIMIT, LIMIT).astype(np.float32)

    # A job: state in metres -> motion (3,) in 5 cm, gripper, done. Most go up, then over something, then down to it.

    def move_hand(self, state):
        """To sawyer.GOAL, and stay there: never done."""
        if state[2] < -0.2:
            return UP, -1, False
        return 3 * (sawyer.GOAL - state[:3]), -1, False

    def move_top_drawer(self, state):
        """Lower the open fingers around the handle and drag it: one of them is in the gap behind it."""
        way = np.array([0.6, state[11] + 0.0255 * self.side, self.top_z]) - state[:3]
        ahead = self.side * way[1]
        pulled = -0.0125 - self.side * state[11]
        close = self.scene["top_open"]
        aligned = abs(way[0]) < 0.035 and 0 < ahead < 0.065
        lowered = abs(way[2]) < 0.01
        done = pulled < 0.04 if close else pulled > self.pull
        if not done and close and lowered and ahead > -0.02:
            return (0, self.side, 0), -1, False
        if done or (not aligned and state[2] < -0.105):
            return UP, -1, done
        if ahead < 0.017:
            return (6 * way[0], -2 * self.side, 0), -1, done
        if not aligned:
            return (6 * way[0], 6 * way[1], 0), -1, done
        if not lowered:
            return 3 * (way - 0.03 * UP) * [1, 1, 2], -1, done
        return (0, -self.side, 0), -1, done

    def press_button(self, state):
        """With a finger, from above."""
        way = np.array([0.6, 0.125 * self.side, state[12]]) - state[:3]
        done = self.button_z - state[12] > sawyer.IS_PRESSED
        if np.hypot(*way[:2]) < 0.05:
            return (way[0], way[1], -1), -1, done
        if state[2] < -0.101:
            return UP, -1, done
        return 9 * way * LEVEL, -1, done

    def carry(self, state, goal):
        """Grasp the object, carry it over `goal` (2,) and let go."""
        thing = state[4:7] + [0, -0.011 * self.side, 0]
        way = thing - state[:3]
        high = state[2] >= -0.125
        done = np.hypot(*(thing[:2] - goal)) < 0.05
        down = 3 * (way - 0.03 * UP)
        if np.hypot(*way[:2]) > 0.055:
            return 6 * way * LEVEL if high else UP, -1, done
        if abs(way[2]) > 0.025:
            return down * [1, 1, 1.5], -1, done
        if self.grip < 1:
            return down * [1, 1, 2], self.grip + 0.5, done
        if not high:
            return UP, 1, done
        if done:
            return (0, 0, 0), -1, True
        return np.append(3 * (goal - state[:2]), 0), 1, False

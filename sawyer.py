"""Sawyer Manipulation (Figure 4): a PyBullet scene of simple shapes. Metres, kilograms, radians; z points up.

envs.py imports this file, whose last lines register its two families there. PyBullet is imported when a first scene is
made, so that everything else runs without it.
"""

import functools
import os
import weakref
from dataclasses import dataclass

import gymnasium as gym
import numpy as np

from envs import InputError, Spec, check_task, clip, register, set_up

BEHAVIOURS = (  # the first three are the paper's, SawyerManipulation8 has all
    "move_hand", "open_top_drawer", "open_bottom_drawer",
    "close_top_drawer", "close_bottom_drawer", "press_button", "move_object", "object_in_tray",
)  # fmt: skip
TASK_COLUMNS = (
    "side bottom_drawer top_drawer button bottom_open top_open tray object behaviour".split()
)
PLACES = np.array(
    [[0.6, -0.15], [0.6, 0.15], [0.79, -0.12], [0.79, 0.12]]
)  # of tray and object: x, y * side
HAND_LIMITS = np.array([[0.5, -0.2, -0.36], [0.85, 0.2, -0.1]])
OBJECT_LIMITS = HAND_LIMITS + [[-0.045, -0.04, -0.15], [0.045, 0.04, 0.15]]
GOAL, NEAR = (
    np.array([0.675, 0.0, -0.11]),
    0.08,
)  # of move_hand and move_object: success is within NEAR of it
IS_OPEN, IS_CLOSED, IS_PRESSED = (
    0.085,
    0.065,
    0.01,
)  # drawer pulled out by more, by less; button pushed down by more
TABLE_TOP, TRAY_Z, TRAY_HALF, DRAWER_LENGTH = -0.375, -0.35, 0.07875, 0.15625
# The object is one of five boxes, drawn at every reset. All fit between the fingers (.07 in y) and into the tray.
OBJECT_SIZES = (
    (0.14, 0.055, 0.065),
    (0.08, 0.05, 0.04),
    (0.095, 0.055, 0.09),
    (0.14, 0.05, 0.055),
    (0.08, 0.055, 0.09),
)
HAND, LEFT, RIGHT = 7, 8, 9  # links of the arm: the gripper's centre and its fingers
HOME = {  # angles of the arm's seven joints with the hand at (.6, -.15 side, -.2), fingers down
    1: (-1.0712, -0.4578, 0.8276, 1.8590, -1.2072, 0.7848, -0.9417),
    -1: (-0.2991, -0.5106, 0.5045, 1.7998, -0.9485, 0.5457, -0.5593),
}
# An observation is (x - centre) / scale of each number in metres, and ABSENT for what is not in the scene.
OBS_CENTRE = np.array([0.65, 0, -0.15, 0.05, 0.77, 0, -0.31, 0.67, 0, -0.35, 0.68, 0, -0.2])
OBS_SCALE = np.array([0.05, 0.1, 0.06, 0.01, 0.05, 0.1, 0.07, 0.08, 0.1, 0.005, 0.08, 0.07, 0.07])
ABSENT = -3.0
PI = np.pi


@dataclass(frozen=True)
class Link:
    """One rigid part of a body, in the frame of the joint that ties it to its parent. A shape is (sizes, centre) or
    (sizes, centre, angles): three sizes make a box, two a cylinder (radius, length), one a sphere."""

    mass: float
    shapes: list
    friction: float = 0.5
    joint: str = "FIXED"  # or REVOLUTE, PRISMATIC
    at: tuple = (0, 0, 0)  # the joint in the frame of the parent
    angles: tuple = (0, 0, 0)
    axis: tuple = (0, 0, 1)
    limits: tuple = (0, 0)
    mass_centre: tuple = (0, 0, 0)
    parent: int = -1  # place in the body's list; -1 is the link before


def drawer(mass, handle, friction):
    """A cabinet without front and bottom, and what slides out of it towards -y."""
    cabinet = [
        ((0.1875, 0.1625, 0.0125), (0, 0, 0.0375)),
        ((0.1875, 0.00625, 0.075), (0, 0.08125, 0)),
    ]
    cabinet += [((0.00625, 0.1625, 0.075), (x, 0, 0)) for x in (-0.09375, 0.09375)]
    slider = [((0.175, 0.15, 0.0125), (0, 0, -0.025)), *handle]
    slider += [((0.175, 0.00625, 0.05), (0, y, 0)) for y in (-0.075, 0.075)]
    slider += [((0.00625, 0.15, 0.05), (x, 0, 0)) for x in (-0.0875, 0.0875)]
    limits = (-DRAWER_LENGTH, 0)
    return [
        Link(0, cabinet),
        Link(mass, slider, friction, "PRISMATIC", (0, 0, -0.0125), axis=(0, 1, 0), limits=limits),
    ]


def finger(sign, y, limits):
    """The left (sign 1) or the right finger (-1): bar, tip, knuckle."""
    shapes = [
        ((0.01, 0.0135, 0.075), (0, sign * 0.01725, 0.04)),
        ((0.016, 0.007, 0.037), (0, sign * 0.01275, 0.06)),
    ]
    shapes += [((0.01, 0.05, 0.017), (-sign * 0.005, -sign * 0.003, 0.0083))]
    return Link(
        1,
        shapes,
        0.5,
        "PRISMATIC",
        (0.003, y, -0.05448),
        axis=(0, 1, 0),
        limits=limits,
        parent=HAND + 1,
    )


ARM = [  # Sawyer's seven joints: place, angles, limits; their links: mass, centre of mass, shape
    (
        (0, 0, 0.08),
        (0, 0, 0),
        (-3.05, 3.05),
        5.32,
        (0.024, 0.011, 0.144),
        ((0.07,), (0.081, 0, 0.237)),
    ),
    (
        (0.081, 0.05, 0.237),
        (-PI / 2, PI / 2, 0),
        (-3.82, 2.28),
        4.51,
        (0, -0.027, 0.093),
        ((0.07,), (0, 0, 0.1225)),
    ),
    (
        (0, -0.14, 0.1425),
        (PI / 2, 0, 0),
        (-3.05, 3.05),
        1.73,
        (0, -0.015, 0.135),
        ((0.06, 0.35), (0, 0, 0.14)),
    ),
    (
        (0, -0.042, 0.26),
        (-PI / 2, 0, 0),
        (-3.05, 3.05),
        2.47,
        (-0.005, -0.028, -0.083),
        ((0.06,), (0, -0.01, -0.12)),
    ),
    (
        (0, -0.125, -0.1265),
        (PI / 2, 0, 0),
        (-2.98, 2.98),
        1.04,
        (-0.003, 0.008, 0.133),
        ((0.045, 0.36), (0, 0, 0.14)),
    ),
    (
        (0, 0.031, 0.275),
        (-PI / 2, 0, 0),
        (-2.98, 2.98),
        3.53,
        (0.006, -0.024, 0.076),
        ((0.06,), (0.01, 0, 0.09)),
    ),
    (
        (0, -0.11, 0.1053),
        (-PI / 2, -0.1745, PI),
        (-4.71, 4.71),
        0.33,
        (0, 0.009, 0),
        ((0.065, 0.05), (0, 0, -0.005)),
    ),
]
ARM = [
    Link(m, [shape], 0.5, "REVOLUTE", at, turn, (0, 0, 1), limits, com)
    for at, turn, limits, m, com, shape in ARM
]
GRIPPER = Link(
    1.47,
    [((0.029, 0.1), (0.004, 0, -0.075), (PI / 2, 0, 0))],
    at=(0, 0, 0.1195),
    angles=(0, 0, PI / 2),
)
HANDLE = [((0.00625, 0.075, 0.0225), (x, -0.0875, 0.0125)) for x in (-0.08125, 0.08125)]
HANDLE += [((0.01, 0.175), (0, -0.1375, 0.0125), (0, PI / 2, 0))]
TRAY = [((0.175, 0.00875, 0.0875), (0, y, 0)) for y in (-TRAY_HALF, TRAY_HALF)]
TRAY += [((0.00875, 0.175, 0.0875), (x, 0, 0)) for x in (-TRAY_HALF, TRAY_HALF)]
BUTTON = Link(0.1, [((0.025, 0.0125), (0, 0, 0))], 1000, "PRISMATIC", limits=(-0.0125, 0.0125))
BODIES = {  # (red, green, blue), links
    "arm": ((0.6, 0.15, 0.15), [
        Link(0, [((0.08, 0.3), (0, 0, -0.1))]), *ARM, GRIPPER,
        finger(1, -0.0015, (0, 0.03)), finger(-1, 0.0205, (-0.045, 0)),
    ]),
    "table": ((0.8, 0.7, 0.6), [Link(0, [((1, 1.5, 0.05), (0, 0, -0.025))], 1)]),
    "bottom_drawer": ((0.4, 0.5, 0.7), drawer(0.1, [], 10)),
    "brick": ((0.1, 0.2, 0.9), [Link(0.1, [((0.0448, 0.0448, 0.0322), (0, 0, 0))], 1)]),
    "top_drawer": ((0.5, 0.6, 0.4), drawer(0.4, HANDLE, 1000)),
    "button": ((0.8, 0.2, 0.2), [Link(0, [((0.1, 0.1, 0.025), (0, 0, -0.025))], 10), BUTTON]),
    "tray": ((0.3, 0.3, 0.3), [Link(0, TRAY)]),
}  # fmt: skip
# What holds a joint where it is, in N. The authors' 240 for the last two are more than this arm pulls; theirs is helped
# by setting the fingers back into their limits at every substep. With 120 the script takes about as many steps.
BRAKES = {"bottom_drawer": 1, "top_drawer": 120, "button": 120}


def task_choices(num_behaviours, task):
    """What the next number of a Sawyer task can be after the numbers `task`: a list, each entry equally likely."""
    known, column = dict(zip(TASK_COLUMNS, task)), TASK_COLUMNS[len(task)]
    bottom, top, button = (known.get(name) for name in ("bottom_drawer", "top_drawer", "button"))
    if column == "side":
        return [1, -1]
    if column in ("bottom_drawer", "top_drawer", "button"):
        return [1, 1, 1, 0]
    if column == "bottom_open":
        return [0, 1] if bottom else [0]
    if (
        column == "top_open"
    ):  # not above the other drawer: there its handle would be where the hand starts
        return [0, 1] if num_behaviours == 8 and top and not bottom else [0]
    if column in ("tray", "object"):
        places = [0, 2] if bottom else [2, 3] if top else [0, 2, 3] if button else [0, 1, 2, 3]
        if column == "object" and (bottom or top):
            places = [2]
        return [-1] * len(places) + 3 * places
    both, thing, tray = bottom and button, known["object"] >= 0, known["tray"] >= 0
    possible = (True, top, both, top, both, button, thing, thing and tray)
    return [i for i in range(num_behaviours) if possible[i]]


class Bullet:
    """A PyBullet simulation of one's own: `bullet.f(...)` is `pybullet.f(..., physicsClientId=...)`."""

    def __init__(self):
        # The import prints its build time, from C to file descriptor 2: that goes to the null device for the moment.
        stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        try:
            import pybullet
        except ImportError:
            raise InputError(
                "the Sawyer environments need pybullet; `pip install pybullet==3.2.7` has it ready for Python 3.11 on "
                "64-bit Intel/AMD Linux, and elsewhere builds it, which needs a C++ compiler and some minutes"
            ) from None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(null)
        self.pybullet, self.client = pybullet, pybullet.connect(pybullet.DIRECT)
        if self.client < 0:
            raise InputError(
                "PyBullet holds no more simulations in one process: close some environments"
            )
        self.close = weakref.finalize(
            self, pybullet.disconnect, self.client
        )  # at the latest with the object

    def __getattr__(self, name):
        value = getattr(self.pybullet, name)
        return functools.partial(value, physicsClientId=self.client) if callable(value) else value

    def shape(self, kind, shapes, **colors):
        """One "collision" or "visual" shape made of several. Returns its number."""
        types = {1: self.GEOM_SPHERE, 2: self.GEOM_CYLINDER, 3: self.GEOM_BOX}
        sizes, centres, angles = zip(*((*shape, (0, 0, 0))[:3] for shape in shapes))
        frames = {f"{kind}FramePositions": list(centres)}  # PyBullet crashes on a tuple
        frames[f"{kind}FrameOrientations"] = [self.getQuaternionFromEuler(a) for a in angles]
        return getattr(self, f"create{kind.title()}ShapeArray")(
            [types[len(s)] for s in sizes], halfExtents=[np.resize(s, 3) / 2 for s in sizes],
            radii=[s[0] for s in sizes], lengths=[s[-1] for s in sizes], **frames, **colors,
        )  # fmt: skip

    def add(self, links, at, yaw=0.0, rgb=None):
        """Make a body, its first link at `at`; nothing draws it if `rgb` is None. Returns its number."""
        solid, seen, rest = (
            [self.shape("collision", link.shapes) for link in links],
            [-1] * len(links),
            links[1:],
        )
        if rgb:
            seen = [
                self.shape("visual", link.shapes, rgbaColors=[[*rgb, 1]] * len(link.shapes))
                for link in links
            ]
        body = self.createMultiBody(
            links[0].mass, solid[0], seen[0], at, self.getQuaternionFromEuler((0, 0, yaw)),
            linkMasses=[link.mass for link in rest],
            linkCollisionShapeIndices=solid[1:],
            linkVisualShapeIndices=seen[1:],
            linkPositions=[link.at for link in rest],
            linkOrientations=[self.getQuaternionFromEuler(link.angles) for link in rest],
            linkInertialFramePositions=[link.mass_centre for link in rest],
            linkInertialFrameOrientations=[(0, 0, 0, 1)] * len(rest),
            linkParentIndices=[i if link.parent < 0 else link.parent for i, link in enumerate(rest)],
            linkJointTypes=[getattr(self, f"JOINT_{link.joint}") for link in rest],
            linkJointAxis=[link.axis for link in rest],
        )  # fmt: skip
        for i, link in enumerate(links, start=-1):  # PyBullet calls the first link -1
            self.changeDynamics(body, i, lateralFriction=link.friction)
            if link.joint != "FIXED":
                self.changeDynamics(
                    body, i, jointLowerLimit=link.limits[0], jointUpperLimit=link.limits[1]
                )
        return body


class SawyerManipulation(gym.Env):
    """A robot arm with a gripper at a table with two drawers, a button, a tray and an object. Never terminates.

    Observation (13,): hand x, y, z; opening of the gripper; object x, y, z; brick in the bottom drawer x, y, z; bottom
    drawer x; handle of the top drawer y; button z; shifted and scaled (OBS_CENTRE, OBS_SCALE), ABSENT if not there.
    Action (4,): where the hand shall go, in 5 cm (a step of 1/24 s takes it about half the way); gripper, 1 closes it.
    Reward: 0 if the behaviour is achieved, else -1.
    Task (9,), the TASK_COLUMNS:
        side: drawers and button are at y > 0 (1) or y < 0 (-1), the hand starts on the other side
        bottom_drawer, top_drawer, button: 1 if present; the button moves the bottom drawer, once an episode
        bottom_open, top_open: 1 if the drawer is open at first (the top drawer: in SawyerManipulation8 only)
        tray, object: row of PLACES, or -1 if absent
        behaviour: place in BEHAVIOURS
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 24}
    sparse, num_behaviours = True, 3

    def __init__(self, render_mode=None):
        self.render_mode, self.bullet = render_mode, Bullet()
        set_up(self, [1, 1, 1, 1, 0, 0, 0, 2, 0])

    @classmethod
    def sample_tasks(cls, rng, num_tasks):
        tasks = [[] for _ in range(num_tasks)]
        for task, row in zip(tasks, rng.uniform(size=(num_tasks, len(TASK_COLUMNS)))):
            for uniform in row:
                choices = task_choices(cls.num_behaviours, task)
                task.append(choices[int(uniform * len(choices))])
        return tasks

    def set_task(self, task) -> None:
        """Choose scene and behaviour from the next reset on; task is (9,). Raises ValueError on a wrong shape, and
        names the first number that is not among `task_choices`."""
        task = check_task(self.env_id, task)
        for i, value in enumerate(task):
            allowed = sorted(set(task_choices(self.num_behaviours, task[:i])))
            if value not in allowed:
                raise ValueError(
                    f"{TASK_COLUMNS[i]} of this {self.env_id} task is {value:g}, not one of {allowed}."
                )
        self.task = task

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.scene = scene = dict(zip(TASK_COLUMNS, self.task.astype(int).tolist()))
        side, bottom, top = scene["side"], scene["bottom_drawer"], scene["top_drawer"]
        y, self.top_z, self.button_z = (
            0.125 * side,
            (-0.34, -0.22)[bottom],
            (-0.34, -0.25, -0.14)[bottom + top],
        )
        size = OBJECT_SIZES[self.np_random.integers(len(OBJECT_SIZES))]
        # A new scene every time: it takes a few milliseconds, and nothing of the last episode can live on in it.
        self.bullet.resetSimulation()
        self.bullet.setGravity(0, 0, -10)
        self.bullet.setPhysicsEngineParameter(
            numSolverIterations=50, deterministicOverlappingPairs=1
        )
        self.bodies, self.starts, self.button_used = {}, {}, False
        self.add("arm", (0.1, 0, -0.07))
        # The gripper is not quite open, as after the three steps in the authors' reset.
        for joint, angle in zip((*range(HAND), LEFT, RIGHT), (*HOME[side], 0.0278, -0.0417)):
            self.bullet.resetJointState(self.bodies["arm"], joint, angle)
        self.add("table", (0.75, -0.2, TABLE_TOP))
        if bottom:
            out = DRAWER_LENGTH * scene["bottom_open"]
            self.add("bottom_drawer", (0.6, y, -0.34), PI / 2, out)
            self.add("brick", (0.59 + out, y, -0.3552))
        if top:
            self.add(
                "top_drawer",
                (0.6, y, self.top_z),
                0 if side > 0 else PI,
                DRAWER_LENGTH * scene["top_open"],
            )
        if scene["button"]:
            self.add("button", (0.6, y, self.button_z))
        if scene["tray"] >= 0:
            self.add("tray", (*PLACES[scene["tray"]] * [1, side], TRAY_Z))
        if scene["object"] >= 0:
            body = (0.9, 0.7, 0.1), [Link(0.05, [(size, (0, 0, 0))])]
            self.add(
                "object", (*PLACES[scene["object"]] * [1, side], TABLE_TOP + size[2] / 2), body=body
            )
        return self.observe(self.measure()), {}

    def add(self, name, at, yaw=0.0, pulled_out=0.0, body=None):
        """Put `body`, by default that of BODIES, into the scene, and brake its joint."""
        rgb, links = body or BODIES[name]
        self.bodies[name] = self.bullet.add(links, at, yaw, rgb if self.render_mode else None)
        self.starts[name] = np.array(at)
        if name in BRAKES:
            self.bullet.resetJointState(self.bodies[name], 0, -pulled_out)
            self.drive(name, 0.0)

    def drive(self, name, velocity):
        """Let the joint of a drawer or of the button go at `velocity`, with no more than the force of its brake."""
        mode = self.bullet.VELOCITY_CONTROL
        self.bullet.setJointMotorControl2(
            self.bodies[name], 0, mode, targetVelocity=velocity, force=BRAKES[name]
        )

    def step(self, action):
        action, sim, bodies = clip(action), self.bullet, self.bodies
        target = np.clip(self.hand() + 0.05 * action[:3], *HAND_LIMITS)
        # Joint angles for the target once a step; the authors' code solves for them before each of the ten substeps.
        angles = sim.calculateInverseKinematics(bodies["arm"], HAND, target, (1, 0, 0, 0))[:HAND]
        fingers = np.array([0.03, -0.045]) * (1 - action[3]) / 2
        motors, forces = [*range(HAND), LEFT, RIGHT], [100] * 9
        sim.setJointMotorControlArray(
            bodies["arm"], motors, sim.POSITION_CONTROL, [*angles, *fingers], forces=forces
        )
        self.simulate(10)
        if "button" in bodies and not self.button_used and -self.joint("button") > IS_PRESSED:
            self.button_used = True
            if "bottom_drawer" in bodies:  # it opens or closes, all within this step
                self.drive("bottom_drawer", 10.0 if self.scene["bottom_open"] else -10.0)
                self.simulate(100)
                self.drive("bottom_drawer", 0.0)
        for name in ("object", "brick"):
            if name in bodies:  # what is out of the hand's reach returns to where it started
                from_low, from_high = self.position(name) - OBJECT_LIMITS
                if (from_low < 0).any() or (from_high > 0).any():
                    sim.resetBasePositionAndOrientation(
                        bodies[name], self.starts[name], (0, 0, 0, 1)
                    )
                    sim.resetBaseVelocity(bodies[name], (0, 0, 0), (0, 0, 0))
        state = self.measure()
        return self.observe(state), 0.0 if self.achieved(state) else -1.0, False, False, {}

    def simulate(self, substeps):
        for _ in range(substeps):
            self.bullet.stepSimulation()  # 1/240 s

    def hand(self):
        return self.bullet.getLinkState(self.bodies["arm"], HAND, computeForwardKinematics=True)[4]

    def joint(self, name, number=0):
        return self.bullet.getJointState(self.bodies[name], number)[0]

    def position(self, name):
        return self.bullet.getBasePositionAndOrientation(self.bodies[name])[0]

    def measure(self):
        """The 13 numbers in metres, 0 for what is absent."""
        state, bodies = np.zeros(13), self.bodies
        state[:3] = self.hand()
        # The distance between the fingers' origins, from .053 (open) to -.022. Signed: the authors' absolute value is
        # the same half open and closed.
        state[3] = self.joint("arm", LEFT) - self.joint("arm", RIGHT) - 0.022
        if "object" in bodies:
            state[4:7] = self.position("object")
        if "bottom_drawer" in bodies:
            # PAPER: 13 numbers, but it names 10 or 11. CODE: the position of a brick in the bottom drawer makes 13.
            state[7:10], state[10] = self.position("brick"), 0.6 - self.joint("bottom_drawer")
        if "top_drawer" in bodies:
            state[11] = self.scene["side"] * (self.joint("top_drawer") - 0.0125)
        if "button" in bodies:
            state[12] = self.button_z + self.joint("button")
        return state

    def observe(self, state):
        """What the agent sees of `measure`'s numbers."""
        # PAPER: what is absent is at 0, and all in metres (authors' code). CODE: shifted and scaled, -3 for what is
        # absent: in metres the networks hardly see the centimetres that decide.
        return np.where(state == 0, ABSENT, (state - OBS_CENTRE) / OBS_SCALE).astype(np.float32)

    def achieved(self, state):
        """Whether the state (13,), as `measure` gives it, is what the task's behaviour aims at."""
        hand_far, object_far = np.linalg.norm(state[:3] - GOAL), np.linalg.norm(state[4:7] - GOAL)
        bottom, top, button = (
            state[10] - 0.6,
            -0.0125 - self.scene["side"] * state[11],
            self.button_z - state[12],
        )
        off_tray = abs(state[4:7] - self.starts.get("tray", np.inf))
        return (  # in the order of BEHAVIOURS
            hand_far < NEAR,
            # The authors' code draws this goal anew at every reset and hides it. Here it is that of the other drawer.
            top > IS_OPEN,
            bottom > IS_OPEN,
            # The others are ours: the paper does not name them.
            top < IS_CLOSED,
            bottom < IS_CLOSED,
            button > IS_PRESSED,
            object_far < NEAR,
            (off_tray[:2] < TRAY_HALF).all()
            and off_tray[2] < 0.04375,  # half the height of the walls
        )[self.scene["behaviour"]]

    def render(self):
        sim = self.bullet
        view = sim.computeViewMatrixFromYawPitchRoll((0.55, 0, -0.15), 1.0, 90, -35, 0, 2)
        lens = sim.computeProjectionMatrixFOV(60, 4 / 3, 0.01, 10)
        image = sim.getCameraImage(320, 240, view, lens, renderer=sim.ER_TINY_RENDERER)[2]
        return np.reshape(image, (240, 320, 4))[..., :3].astype(np.uint8)

    def close(self):
        self.bullet.close()


class SawyerManipulation8(SawyerManipulation):
    """The variant of Figure 9, with all eight BEHAVIOURS."""

    num_behaviours = 8


register("SawyerManipulation", Spec(SawyerManipulation, 13, 4, 9, 50, 50, 10))
register("SawyerManipulation8", Spec(SawyerManipulation8, 13, 4, 9, 50, 50, 10))  # Figure 9

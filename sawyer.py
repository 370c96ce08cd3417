"""Sawyer Manipulation (Figure 4): a PyBullet scene of simple shapes.

Metres, kilograms, radians; z points up. The rows of both families stand in envs.py, which imports
this file when one of them is asked for. PyBullet is imported when a first scene is made.
"""

import functools
import os
import weakref
from dataclasses import dataclass

import gymnasium as gym
import numpy as np

from envs import check_task, clip, set_up
from plumbing.errors import InputError

# ===== Tasks, and what counts as success

BEHAVIOURS = (  # the first three are the paper's, SawyerManipulation8 has all
    "move_hand",
    "open_top_drawer",
    "open_bottom_drawer",
    "close_top_drawer",
    "close_bottom_drawer",
    "press_button",
    "move_object",
    "object_in_tray",
)
TASK_COLUMNS = [
    "side",
    "bottom_drawer",
    "top_drawer",
    "button",
    "bottom_open",
    "top_open",
    "tray",
    "object",
    "behaviour",
]
PLACES = np.array([[0.6, -0.15], [0.6, 0.15], [0.79, -0.12], [0.79, 0.12]])  # x, y * side
HAND_LIMITS = np.array([[0.5, -0.2, -0.36], [0.85, 0.2, -0.1]])
OBJECT_LIMITS = HAND_LIMITS + [[-0.045, -0.04, -0.15], [0.045, 0.04, 0.15]]

GOAL = np.array([0.675, 0.0, -0.11])  # of move_hand and move_object
NEAR = 0.08  # success is within this distance of it
IS_OPEN = 0.085  # a drawer pulled out by more than this is open,
IS_CLOSED = 0.065  # and by less than this, closed
IS_PRESSED = 0.01  # a button pushed down by more than this is pressed

# ===== Sizes of the scene

TABLE_TOP = -0.375
TRAY_Z = -0.35
TRAY_HALF = 0.07875
DRAWER_LENGTH = 0.15625
# The object is one of five boxes, drawn at every reset. All fit between the fingers (.07 in y) and
# into the tray.
OBJECT_SIZES = (
    (0.14, 0.055, 0.065),
    (0.08, 0.05, 0.04),
    (0.095, 0.055, 0.09),
    (0.14, 0.05, 0.055),
    (0.08, 0.055, 0.09),
)
# The links of the arm that are the gripper's centre and its fingers
HAND = 7
LEFT = 8
RIGHT = 9
# The angles of the arm's seven joints with the hand at (.6, -.15 side, -.2), fingers down
HOME = {
    1: (-1.0712, -0.4578, 0.8276, 1.8590, -1.2072, 0.7848, -0.9417),
    -1: (-0.2991, -0.5106, 0.5045, 1.7998, -0.9485, 0.5457, -0.5593),
}

# An observation is (x - centre) / scale of each number in metres, and ABSENT for what is not in the
# scene.
OBS_CENTRE = np.array([0.65, 0, -0.15, 0.05, 0.77, 0, -0.31, 0.67, 0, -0.35, 0.68, 0, -0.2])
OBS_SCALE = np.array([0.05, 0.1, 0.06, 0.01, 0.05, 0.1, 0.07, 0.08, 0.1, 0.005, 0.08, 0.07, 0.07])
ABSENT = -3.0
PI = np.pi

# ===== Bodies


@dataclass(frozen=True)
class Link:
    """One rigid part of a body, in the frame of the joint that ties it to its parent.

    A shape is (sizes, centre) or (sizes, centre, angles): three sizes make a box, two a cylinder
    (radius, length), one a sphere.
    """

    mass: float
    shapes: list
    friction: float = 0.5
    joint: str = "FIXED"  # or "REVOLUTE", "PRISMATIC"
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

    slides = Link(
        mass,
        slider,
        friction,
        joint="PRISMATIC",
        at=(0, 0, -0.0125),
        axis=(0, 1, 0),
        limits=(-DRAWER_LENGTH, 0),
    )
    return [Link(0, cabinet), slides]


def finger(sign, y, limits):
    """The left (sign 1) or the right finger (-1): bar, tip, knuckle."""
    bar = ((0.01, 0.0135, 0.075), (0, sign * 0.01725, 0.04))
    tip = ((0.016, 0.007, 0.037), (0, sign * 0.01275, 0.06))
    knuckle = ((0.01, 0.05, 0.017), (-sign * 0.005, -sign * 0.003, 0.0083))
    return Link(
        1,
        [bar, tip, knuckle],
        joint="PRISMATIC",
        at=(0.003, y, -0.05448),
        axis=(0, 1, 0),
        limits=limits,
        parent=HAND + 1,
    )


def arm_link(at, angles, limits, mass, mass_centre, shape):
    """One of the arm's seven links, and the joint that turns it."""
    return Link(
        mass,
        [shape],
        joint="REVOLUTE",
        at=at,
        angles=angles,
        limits=limits,
        mass_centre=mass_centre,
    )


ARM = [
    arm_link(
        at=(0, 0, 0.08),
        angles=(0, 0, 0),
        limits=(-3.05, 3.05),
        mass=5.32,
        mass_centre=(0.024, 0.011, 0.144),
        shape=((0.07,), (0.081, 0, 0.237)),
    ),
    arm_link(
        at=(0.081, 0.05, 0.237),
        angles=(-PI / 2, PI / 2, 0),
        limits=(-3.82, 2.28),
        mass=4.51,
        mass_centre=(0, -0.027, 0.093),
        shape=((0.07,), (0, 0, 0.1225)),
    ),
    arm_link(
        at=(0, -0.14, 0.1425),
        angles=(PI / 2, 0, 0),
        limits=(-3.05, 3.05),
        mass=1.73,
        mass_centre=(0, -0.015, 0.135),
        shape=((0.06, 0.35), (0, 0, 0.14)),
    ),
    arm_link(
        at=(0, -0.042, 0.26),
        angles=(-PI / 2, 0, 0),
        limits=(-3.05, 3.05),
        mass=2.47,
        mass_centre=(-0.005, -0.028, -0.083),
        shape=((0.06,), (0, -0.01, -0.12)),
    ),
    arm_link(
        at=(0, -0.125, -0.1265),
        angles=(PI / 2, 0, 0),
        limits=(-2.98, 2.98),
        mass=1.04,
        mass_centre=(-0.003, 0.008, 0.133),
        shape=((0.045, 0.36), (0, 0, 0.14)),
    ),
    arm_link(
        at=(0, 0.031, 0.275),
        angles=(-PI / 2, 0, 0),
        limits=(-2.98, 2.98),
        mass=3.53,
        mass_centre=(0.006, -0.024, 0.076),
        shape=((0.06,), (0.01, 0, 0.09)),
    ),
    arm_link(
        at=(0, -0.11, 0.1053),
        angles=(-PI / 2, -0.1745, PI),
        limits=(-4.71, 4.71),
        mass=0.33,
        mass_centre=(0, 0.009, 0),
        shape=((0.065, 0.05), (0, 0, -0.005)),
    ),
]
GRIPPER = Link(
    1.47,
    [((0.029, 0.1), (0.004, 0, -0.075), (PI / 2, 0, 0))],
    at=(0, 0, 0.1195),
    angles=(0, 0, PI / 2),
)
HANDLE = [
    ((0.00625, 0.075, 0.0225), (-0.08125, -0.0875, 0.0125)),
    ((0.00625, 0.075, 0.0225), (0.08125, -0.0875, 0.0125)),
    ((0.01, 0.175), (0, -0.1375, 0.0125), (0, PI / 2, 0)),
]
TRAY = [
    ((0.175, 0.00875, 0.0875), (0, -TRAY_HALF, 0)),
    ((0.175, 0.00875, 0.0875), (0, TRAY_HALF, 0)),
    ((0.00875, 0.175, 0.0875), (-TRAY_HALF, 0, 0)),
    ((0.00875, 0.175, 0.0875), (TRAY_HALF, 0, 0)),
]
BUTTON = Link(
    0.1,
    [((0.025, 0.0125), (0, 0, 0))],
    friction=1000,
    joint="PRISMATIC",
    limits=(-0.0125, 0.0125),
)
BODIES = {  # (red, green, blue), links
    "arm": (
        (0.6, 0.15, 0.15),
        [
            Link(0, [((0.08, 0.3), (0, 0, -0.1))]),
            *ARM,
            GRIPPER,
            finger(1, -0.0015, (0, 0.03)),
            finger(-1, 0.0205, (-0.045, 0)),
        ],
    ),
    "table": (
        (0.8, 0.7, 0.6),
        [Link(0, [((1, 1.5, 0.05), (0, 0, -0.025))], friction=1)],
    ),
    "bottom_drawer": (
        (0.4, 0.5, 0.7),
        drawer(0.1, [], 10),
    ),
    "brick": (
        (0.1, 0.2, 0.9),
        [Link(0.1, [((0.0448, 0.0448, 0.0322), (0, 0, 0))], friction=1)],
    ),
    "top_drawer": (
        (0.5, 0.6, 0.4),
        drawer(0.4, HANDLE, 1000),
    ),
    "button": (
        (0.8, 0.2, 0.2),
        [Link(0, [((0.1, 0.1, 0.025), (0, 0, -0.025))], friction=10), BUTTON],
    ),
    "tray": (
        (0.3, 0.3, 0.3),
        [Link(0, TRAY)],
    ),
}
# What holds a joint where it is, in N. The authors' 240 for the last two are more than this arm
# pulls; theirs is helped by setting the fingers back into their limits at every substep. With 120
# the script that made the data takes about as many steps as theirs.
BRAKES = {"bottom_drawer": 1, "top_drawer": 120, "button": 120}


def task_choices(num_behaviours, task):
    """What the next number of a Sawyer task can be after the numbers `task`.

    Returns a list, each entry equally likely.
    """
    column = TASK_COLUMNS[len(task)]
    chosen = dict(zip(TASK_COLUMNS, task))
    bottom = chosen.get("bottom_drawer")
    top = chosen.get("top_drawer")
    button = chosen.get("button")
    if column == "side":
        return [1, -1]
    if column in ("bottom_drawer", "top_drawer", "button"):
        return [1, 1, 1, 0]
    if column == "bottom_open":
        return [0, 1] if bottom else [0]
    if column == "top_open":
        # Above the other drawer the handle of an open one would be where the hand starts.
        return [0, 1] if num_behaviours == 8 and top and not bottom else [0]
    if column in ("tray", "object"):
        places = free_places(column, bottom, top, button)
        return [-1] * len(places) + 3 * places

    has_object = chosen["object"] >= 0
    has_tray = chosen["tray"] >= 0
    possible = {
        "move_hand": True,
        "open_top_drawer": top,
        "open_bottom_drawer": bottom and button,  # the button moves it
        "close_top_drawer": top,
        "close_bottom_drawer": bottom and button,
        "press_button": button,
        "move_object": has_object,
        "object_in_tray": has_object and has_tray,
    }
    return [i for i in range(num_behaviours) if possible[BEHAVIOURS[i]]]


def free_places(column, bottom, top, button):
    """The rows of PLACES for the "tray" or the "object" that drawers and button leave free.

    Both may get the same one; then the object starts in the tray.
    """
    if column == "object" and (bottom or top):
        return [2]
    if bottom:
        return [0, 2]
    if top:
        return [2, 3]
    if button:
        return [0, 2, 3]
    return [0, 1, 2, 3]


# ===== The simulation


class Bullet:
    """A PyBullet simulation of one's own.

    `bullet.f(...)` is `pybullet.f(..., physicsClientId=...)`.
    Raises InputError: there is no PyBullet, or there are too many simulations.
    """

    def __init__(self):
        self.pybullet = import_pybullet()
        self.client = self.pybullet.connect(self.pybullet.DIRECT)
        if self.client < 0:
            raise InputError(
                "PyBullet holds no more simulations in one process: close some environments"
            )
        # The simulation ends when this object does, at the latest.
        self.close = weakref.finalize(self, self.pybullet.disconnect, self.client)

    def __reduce__(self):
        """A copy or a pickle is a new, empty simulation: what PyBullet holds cannot be copied."""
        return Bullet, ()

    def __getattr__(self, name):
        value = getattr(self.pybullet, name)
        return functools.partial(value, physicsClientId=self.client) if callable(value) else value

    def shape(self, kind, shapes, **colours):
        """One "collision" or "visual" shape made of several. Returns its number."""
        types = {1: self.GEOM_SPHERE, 2: self.GEOM_CYLINDER, 3: self.GEOM_BOX}
        sizes = [shape[0] for shape in shapes]
        centres = [shape[1] for shape in shapes]  # a list: PyBullet crashes on a tuple
        turns = [shape[2] if len(shape) == 3 else (0, 0, 0) for shape in shapes]
        arguments = {
            "shapeTypes": [types[len(size)] for size in sizes],
            "halfExtents": [np.resize(size, 3) / 2 for size in sizes],
            "radii": [size[0] for size in sizes],
            "lengths": [size[-1] for size in sizes],
            f"{kind}FramePositions": centres,
            f"{kind}FrameOrientations": [self.getQuaternionFromEuler(turn) for turn in turns],
        }
        create = getattr(self, f"create{kind.title()}ShapeArray")
        return create(**arguments, **colours)

    def add(self, links, at, yaw=0.0, rgb=None):
        """Make a body, its first link at `at`. It is drawn in grey if `rgb` is None.

        Returns its number.
        """
        solid = [self.shape("collision", link.shapes) for link in links]
        visible = [-1] * len(links)
        if rgb:
            for i, link in enumerate(links):
                colours = [[*rgb, 1]] * len(link.shapes)
                visible[i] = self.shape("visual", link.shapes, rgbaColors=colours)

        # PyBullet calls the first link the base. It counts the others from 1 where it asks for a
        # parent, and from 0 everywhere else.
        rest = links[1:]
        parents = [i if link.parent < 0 else link.parent for i, link in enumerate(rest)]
        body = self.createMultiBody(
            links[0].mass,
            solid[0],
            visible[0],
            at,
            self.getQuaternionFromEuler((0, 0, yaw)),
            linkMasses=[link.mass for link in rest],
            linkCollisionShapeIndices=solid[1:],
            linkVisualShapeIndices=visible[1:],
            linkPositions=[link.at for link in rest],
            linkOrientations=[self.getQuaternionFromEuler(link.angles) for link in rest],
            linkInertialFramePositions=[link.mass_centre for link in rest],
            linkInertialFrameOrientations=[(0, 0, 0, 1)] * len(rest),
            linkParentIndices=parents,
            linkJointTypes=[getattr(self, f"JOINT_{link.joint}") for link in rest],
            linkJointAxis=[link.axis for link in rest],
        )

        for i, link in enumerate(links, start=-1):  # the base is number -1
            self.changeDynamics(body, i, lateralFriction=link.friction)
            if link.joint != "FIXED":
                low, high = link.limits
                self.changeDynamics(body, i, jointLowerLimit=low, jointUpperLimit=high)
        return body


def import_pybullet():
    """The module PyBullet. Raises InputError: it is not installed."""
    # The import prints its build time, from C to file descriptor 2. This goes to the null device.
    stderr = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        import pybullet
    except ImportError:
        raise InputError(
            "the Sawyer environments need pybullet; `pip install pybullet==3.2.7` has it ready for "
            "Python 3.11 on 64-bit Intel/AMD Linux, and elsewhere builds it, which needs a C++ "
            "compiler and some minutes"
        ) from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
    return pybullet


# ===== The environments


class SawyerManipulation(gym.Env):
    """A robot arm with a gripper at a table with two drawers, a button, a tray and an object.

    It never terminates. One step is 1/24 s.

    Observation (13,): hand x, y, z; opening of the gripper; object x, y, z; brick in the bottom
        drawer x, y, z; bottom drawer x; handle of the top drawer y; button z. They are shifted and
        scaled (OBS_CENTRE, OBS_SCALE), and ABSENT for what is not in the scene.
    Action (4,): where the hand shall go, in 5 cm (a step takes it about half the way); gripper, 1
        closes it.
    Reward: 0 if the behaviour is achieved, else -1.
    Task (9,), the TASK_COLUMNS:
        side: drawers and button are at y > 0 (1) or y < 0 (-1), the hand starts on the other side
        bottom_drawer, top_drawer, button: 1 if present; the button moves the bottom drawer, once an
            episode
        bottom_open, top_open: 1 if the drawer is open at first (the top drawer: in
            SawyerManipulation8 only)
        tray, object: row of PLACES, or -1 if absent
        behaviour: place in BEHAVIOURS

    A copy or a pickle keeps the task, and must be reset before its first step.
    """

    env_id = "SawyerManipulation"
    metadata = {"render_modes": ["rgb_array"], "render_fps": 24}
    sparse = True
    num_behaviours = 3

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.bullet = Bullet()
        set_up(self, [1, 1, 1, 1, 0, 0, 0, 2, 0])

    @classmethod
    def sample_tasks(cls, rng, num_tasks):
        tasks = []
        for row in rng.uniform(size=(num_tasks, len(TASK_COLUMNS))):
            task = []
            for uniform in row:
                choices = task_choices(cls.num_behaviours, task)
                task.append(choices[int(uniform * len(choices))])
            tasks.append(task)
        return tasks

    def set_task(self, task) -> None:
        """Choose scene and behaviour from the next reset on; task is (9,).

        Raises ValueError: a wrong shape, or a number that is not among `task_choices`; the first
        such number is named.
        """
        task = check_task(self.env_id, task)
        for i, value in enumerate(task):
            allowed = sorted(set(task_choices(self.num_behaviours, task[:i])))
            if value not in allowed:
                raise ValueError(
                    f"{TASK_COLUMNS[i]} of this {self.env_id} task is {value:g}, "
                    f"not one of {allowed}."
                )
        self.task = task

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.scene = dict(zip(TASK_COLUMNS, self.task.astype(int).tolist()))
        size = OBJECT_SIZES[self.np_random.integers(len(OBJECT_SIZES))]
        # The scene is made anew: this takes a few milliseconds, and nothing of the last episode can
        # live on in it.
        self.bullet.resetSimulation()
        self.bullet.setGravity(0, 0, -10)
        self.bullet.setPhysicsEngineParameter(
            numSolverIterations=50, deterministicOverlappingPairs=1
        )
        self.bodies = {}  # {name: PyBullet's number}
        self.starts = {}  # {name: where it was put}
        self.button_used = False
        self.build_scene(size)
        return self.observe(self.measure()), {}

    def build_scene(self, object_size):
        """Put everything that the task names into the empty simulation."""
        scene = self.scene
        side = scene["side"]
        has_bottom = scene["bottom_drawer"]
        has_top = scene["top_drawer"]
        y = 0.125 * side  # of drawers and button, which stand on each other
        self.top_z = (-0.34, -0.22)[has_bottom]
        self.button_z = (-0.34, -0.25, -0.14)[has_bottom + has_top]

        self.add("arm", (0.1, 0, -0.07))
        # The gripper is not quite open, as after the three steps in the authors' reset.
        joints = [*range(HAND), LEFT, RIGHT]
        for joint, angle in zip(joints, (*HOME[side], 0.0278, -0.0417)):
            self.bullet.resetJointState(self.bodies["arm"], joint, angle)
        self.add("table", (0.75, -0.2, TABLE_TOP))
        if has_bottom:
            out = DRAWER_LENGTH * scene["bottom_open"]
            self.add("bottom_drawer", (0.6, y, -0.34), PI / 2, out)
            self.add("brick", (0.59 + out, y, -0.3552))
        if has_top:
            yaw = 0 if side > 0 else PI
            out = DRAWER_LENGTH * scene["top_open"]
            self.add("top_drawer", (0.6, y, self.top_z), yaw, out)
        if scene["button"]:
            self.add("button", (0.6, y, self.button_z))
        if scene["tray"] >= 0:
            place = PLACES[scene["tray"]] * [1, side]
            self.add("tray", (*place, TRAY_Z))
        if scene["object"] >= 0:
            place = PLACES[scene["object"]] * [1, side]
            body = ((0.9, 0.7, 0.1), [Link(0.05, [(object_size, (0, 0, 0))])])
            self.add("object", (*place, TABLE_TOP + object_size[2] / 2), body=body)

    def add(self, name, at, yaw=0.0, pulled_out=0.0, body=None):
        """Put `body`, by default that of BODIES, into the scene, and brake its joint."""
        rgb, links = body or BODIES[name]
        rgb = rgb if self.render_mode else None
        self.bodies[name] = self.bullet.add(links, at, yaw, rgb)
        self.starts[name] = np.array(at)
        if name in BRAKES:
            self.bullet.resetJointState(self.bodies[name], 0, -pulled_out)
            self.drive(name, 0.0)

    def drive(self, name, velocity):
        """Let the joint of a drawer or of the button move at `velocity`, with its brake's force."""
        mode = self.bullet.VELOCITY_CONTROL
        self.bullet.setJointMotorControl2(
            self.bodies[name], 0, mode, targetVelocity=velocity, force=BRAKES[name]
        )

    def step(self, action):
        action = clip(action)
        self.drive_arm(action)
        self.simulate(10)

        pressed = "button" in self.bodies and -self.joint("button") > IS_PRESSED
        if pressed and not self.button_used:
            self.button_used = True
            if "bottom_drawer" in self.bodies:  # it opens or closes, all within this step
                self.drive("bottom_drawer", 10.0 if self.scene["bottom_open"] else -10.0)
                self.simulate(100)
                self.drive("bottom_drawer", 0.0)

        for name in ("object", "brick"):
            if name in self.bodies:
                self.put_back_if_out_of_reach(name)

        state = self.measure()
        reward = 0.0 if self.achieved(state) else -1.0
        return self.observe(state), reward, False, False, {}

    def drive_arm(self, action):
        """Set the targets of the arm's motors: where the hand shall go, and how far it is open."""
        sim, arm = self.bullet, self.bodies["arm"]
        target = np.clip(self.hand() + 0.05 * action[:3], *HAND_LIMITS)
        # The joint angles for the target are computed once a step. The authors' code solves for
        # them before each of the ten substeps.
        angles = sim.calculateInverseKinematics(arm, HAND, target, (1, 0, 0, 0))[:HAND]
        fingers = np.array([0.03, -0.045]) * (1 - action[3]) / 2
        motors = [*range(HAND), LEFT, RIGHT]
        sim.setJointMotorControlArray(
            arm, motors, sim.POSITION_CONTROL, [*angles, *fingers], forces=[100] * 9
        )

    def put_back_if_out_of_reach(self, name):
        """What is out of the hand's reach returns to where it started, and lies still there."""
        from_low, from_high = self.position(name) - OBJECT_LIMITS
        if (from_low < 0).any() or (from_high > 0).any():
            # PyBullet sets its velocity to zero, too.
            self.bullet.resetBasePositionAndOrientation(
                self.bodies[name], self.starts[name], (0, 0, 0, 1)
            )

    def simulate(self, substeps):
        for _ in range(substeps):
            self.bullet.stepSimulation()  # 1/240 s

    def hand(self):
        """Where the hand is: (3,)."""
        return self.bullet.getLinkState(self.bodies["arm"], HAND, computeForwardKinematics=True)[4]

    def joint(self, name, number=0):
        """The position of a joint."""
        return self.bullet.getJointState(self.bodies[name], number)[0]

    def position(self, name):
        """Where a body without joints is: (3,)."""
        return self.bullet.getBasePositionAndOrientation(self.bodies[name])[0]

    def measure(self):
        """The 13 numbers in metres, 0 for what is absent."""
        state = np.zeros(13)
        state[:3] = self.hand()
        # The distance between the fingers' origins, from .053 (open) to -.022. It is signed: the
        # authors' absolute value is the same half open and closed.
        state[3] = self.joint("arm", LEFT) - self.joint("arm", RIGHT) - 0.022
        if "object" in self.bodies:
            state[4:7] = self.position("object")
        if "bottom_drawer" in self.bodies:
            # PAPER: 13 numbers, but it names 10 or 11. CODE: the position of a brick in the bottom
            # drawer makes 13.
            state[7:10] = self.position("brick")
            state[10] = 0.6 - self.joint("bottom_drawer")
        if "top_drawer" in self.bodies:
            state[11] = self.scene["side"] * (self.joint("top_drawer") - 0.0125)
        if "button" in self.bodies:
            state[12] = self.button_z + self.joint("button")
        return state

    def observe(self, state):
        """What the agent sees of `measure`'s numbers."""
        # PAPER: what is absent is at 0, and all in metres (authors' code). CODE: shifted and
        # scaled, -3 for what is absent: in metres the networks hardly see the centimetres that
        # decide.
        scaled = (state - OBS_CENTRE) / OBS_SCALE
        return np.where(state == 0, ABSENT, scaled).astype(np.float32)

    def achieved(self, state):
        """Whether the state (13,), as `measure` gives it, is what the task's behaviour aims at."""
        hand_off_goal = np.linalg.norm(state[:3] - GOAL)
        object_off_goal = np.linalg.norm(state[4:7] - GOAL)
        bottom_out = state[10] - 0.6
        top_out = -0.0125 - self.scene["side"] * state[11]
        button_down = self.button_z - state[12]
        off_tray = abs(state[4:7] - self.starts.get("tray", np.inf))
        above_tray = (off_tray[:2] < TRAY_HALF).all()
        between_walls = off_tray[2] < 0.04375  # half the height of the tray's walls
        is_achieved = {
            "move_hand": hand_off_goal < NEAR,
            # The authors' code draws this goal anew at every reset and hides it. Here it is that of
            # the other drawer.
            "open_top_drawer": top_out > IS_OPEN,
            "open_bottom_drawer": bottom_out > IS_OPEN,
            # The rules of the others are ours: the paper does not name these behaviours.
            "close_top_drawer": top_out < IS_CLOSED,
            "close_bottom_drawer": bottom_out < IS_CLOSED,
            "press_button": button_down > IS_PRESSED,
            "move_object": object_off_goal < NEAR,
            "object_in_tray": above_tray and between_walls,
        }
        return is_achieved[BEHAVIOURS[self.scene["behaviour"]]]

    def render(self):
        """A picture of the scene from the front: (240, 320, 3), uint8."""
        sim = self.bullet
        view = sim.computeViewMatrixFromYawPitchRoll((0.55, 0, -0.15), 1.0, 90, -35, 0, 2)
        lens = sim.computeProjectionMatrixFOV(60, 4 / 3, 0.01, 10)
        image = sim.getCameraImage(320, 240, view, lens, renderer=sim.ER_TINY_RENDERER)[2]
        return np.reshape(image, (240, 320, 4))[..., :3].astype(np.uint8)

    def close(self):
        self.bullet.close()


class SawyerManipulation8(SawyerManipulation):
    """The variant of Figure 9, with all eight BEHAVIOURS."""

    env_id = "SawyerManipulation8"
    num_behaviours = 8

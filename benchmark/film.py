"""Filming meta-episodes: what benchmark/watch.py --video does. MuJoCo draws without a display, too, if it has EGL or
OSMesa; import this before anything that imports MuJoCo."""

import contextlib
import ctypes.util
import importlib.util
import os
import sys
import tempfile
import traceback
import warnings

MUJOCO_GL = os.environ.pop(
    "MUJOCO_GL", ""
)  # MuJoCo would load what it names when it is imported, and fail there

import gymnasium as gym
import imageio
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from PIL import Image, ImageDraw, ImageFont

import envs
from envs import InputError
from plumbing.files import check_replaceable, write_file

HEIGHT, TITLE, FONT = (
    180,
    50,
    ImageFont.load_default(13),
)  # of one picture and of the words above it, in pixels


class Camera(gym.Wrapper):
    """Films an environment: `films` are the pictures of each episode, one every few steps, with words above and an
    arrow from the robot where the task is a direction."""

    def __init__(self, env, words, every):
        super().__init__(env)
        self.words, self.every, self.films, tilt = words, every, [], 90
        if isinstance(env.unwrapped, MujocoEnv):  # look along y at the robot, wherever it goes
            tilt = 40 if hasattr(env.unwrapped, "direction") else 15
            renderer, view = (
                env.unwrapped.mujoco_renderer,
                {"type": mujoco.mjtCamera.mjCAMERA_TRACKING},
            )
            view |= {
                "trackbodyid": 1,
                "distance": 3.0 + tilt / 15,
                "azimuth": 90,
                "elevation": -tilt,
            }
            renderer.default_cam_config, renderer.camera_id = view, None
            renderer.width, renderer.height = HEIGHT * 4 // 3, HEIGHT
            model = env.unwrapped.model
            model.light_castshadow[:], model.mat_reflectance[:] = False, 0  # most of a CPU's time
            model.mat_texrepeat[:] /= 3  # large squares on the floor: half the bytes of a film
        self.to_picture = (
            np.array([1.0, -np.sin(np.deg2rad(tilt))]) * HEIGHT / 2
        )  # x right, y down and foreshortened

    def reset(self, **options):
        self.films.append([])
        self.total, self.time, self.ended, result = 0.0, 0, False, self.env.reset(**options)
        self.shoot()
        return result

    def step(self, action):
        result = self.env.step(action)
        self.total, self.time, self.ended = self.total + result[1], self.time + 1, result[2]
        if self.time % self.every == 0 or result[2] or result[3]:
            self.shoot()
        return result

    def shoot(self):
        with drawing():
            image = Image.fromarray(np.asarray(self.env.render(), np.uint8)).convert("RGB")
        image = image.resize((HEIGHT * image.width // image.height, HEIGHT))
        if hasattr(self.unwrapped, "direction"):
            along = self.to_picture * self.unwrapped.direction
            start, neck, end = (np.array(image.size) / 2 + r * along for r in (0.4, 0.7, 0.85))
            across = 6 * np.array([-along[1], along[0]]) / np.linalg.norm(along)
            draw = ImageDraw.Draw(image)
            draw.line((*start, *neck), "red", 3)
            draw.polygon((*neck + across, *neck - across, *end), "red")
        page = Image.new("RGB", (image.width, TITLE + HEIGHT), "white")
        page.paste(image, (0, TITLE))
        draw = ImageDraw.Draw(page)
        draw.rectangle((0, 0, page.width - 1, page.height - 1), outline="gray")
        episode = f"exploration {len(self.films)}" if len(self.films) < 3 else "adapted"
        for line, words in enumerate(
            (*self.words, f"{episode}: {self.total:.0f}" + ", ended" * self.ended)
        ):
            draw.text((6, 3 + 15 * line), words, "black", FONT)
        self.films[-1].append(page)


@contextlib.contextmanager
def drawing():
    """Turn whatever a graphics library raises into one sentence."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Exception as error:
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        traceback.clear_frames(error.__traceback__)  # here half a viewer goes, and complains
        sys.unraisablehook = hook
        needs = "; without a display MuJoCo needs EGL (Debian: libegl1, libgl1-mesa-dri) or OSMesa (libosmesa6)"
        raise InputError(
            f"this can not be drawn here: {str(error) or type(error).__name__}{needs}"
        ) from None


def check_file(file):
    """Raise an InputError unless a film can be written to this file."""
    if file.suffix not in (".gif", ".mp4") or not file.absolute().parent.is_dir():
        raise InputError(f"--video {file}: expected a .gif or .mp4 in a folder that exists")
    check_replaceable(file)
    try:
        tempfile.TemporaryFile(
            dir=file.absolute().parent
        ).close()  # now, and not after all has been played
    except OSError as error:
        raise InputError(f"--video {file} can not be written: {error.strerror}") from None
    if file.suffix == ".mp4" and not importlib.util.find_spec("imageio_ffmpeg"):
        raise InputError(
            "an .mp4 needs imageio-ffmpeg (pip install imageio-ffmpeg); a .gif needs nothing more"
        )


def choose_library():
    """Let MuJoCo draw with what MUJOCO_GL says or, without a display, with what is installed."""
    found = [name.lower() for name in ("EGL", "OSMesa") if ctypes.util.find_library(name)]
    display = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
    if MUJOCO_GL or found and not display:
        os.environ["MUJOCO_GL"] = MUJOCO_GL or found[0]


def shoot(env_id, task, words, every, play):
    """The pictures of each episode that `play([env])` plays in a task: three lists."""
    choose_library()
    with drawing():
        camera = Camera(envs.make(env_id, render_mode="rgb_array"), words, every)
    camera.unwrapped.set_task(task)
    play([camera])
    camera.close()
    return camera.films


def save(columns, file):
    """Write a film: columns are lists of what `shoot` returns, one below the other. What ends early waits."""
    frames = []
    for episode in range(3):
        rows = list(zip(*([films[episode] for films in column] for column in columns)))
        for t in range(max(len(film) for row in rows for film in row)):
            still = [
                np.concatenate([np.asarray(film[min(t, len(film) - 1)]) for film in row], axis=1)
                for row in rows
            ]
            frames.append(Image.fromarray(np.concatenate(still)))
    if file.suffix == ".mp4":
        data = imageio.v2.mimwrite("<bytes>", frames, format="mp4", fps=20, macro_block_size=2)
        return write_file(file, lambda out: out.write(data))
    times = [50] * (len(frames) - 1) + [1500]  # ms; the last is shown for longer
    few = [
        frame.quantize(64, dither=Image.Dither.NONE) for frame in frames
    ]  # colours: a third of the bytes
    write_file(
        file,
        lambda out: few[0].save(
            out, "GIF", save_all=True, append_images=few[1:], duration=times, loop=0
        ),
    )

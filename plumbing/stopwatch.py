"""How long a run takes: averages of its parts, and what is to come."""

import time


class Stopwatch:
    """How long gradient steps, collections of new data and evaluations take, on average."""

    WARM_UP = 100  # steps that are not counted: some wait for a compiler
    ENOUGH = 100  # steps after which an average can be told

    def __init__(self):
        self.seconds = dict.fromkeys(("step", "collection", "evaluation"), 0.0)
        self.counts = dict.fromkeys(self.seconds, 0)
        self.steps = 0  # also those of the warm-up
        self.told = set()  # of what an average was known when it was told

    def start(self, env_steps):
        """At the beginning of a step."""
        self.env_steps = env_steps
        self.began = time.time()

    def stop(self, env_steps):
        """At the end of a step, in which there may have been a collection before."""
        now = time.time()
        self.steps += 1
        if env_steps > self.env_steps:
            self.add("collection", now - self.began)
        elif self.steps > self.WARM_UP:
            self.add("step", now - self.began)
        self.began = now

    def stop_evaluation(self):
        """At the end of an evaluation, after the step."""
        self.add("evaluation", time.time() - self.began)

    def add(self, name, seconds):
        self.seconds[name] += seconds
        self.counts[name] += 1

    def news(self):
        """Whether the step's average is known, and since the last call that said yes one more."""
        known = {name for name, count in self.counts.items() if count}
        if self.counts["step"] < self.ENOUGH or known <= self.told:
            return False
        self.told = known
        return True

    def parts_left(self, step, flags):
        """How many steps, collections and evaluations are to come, by the flags of a run."""
        updates = flags.get("updates_per_iteration", 1)
        online_steps = flags.get("online_iterations", 0) * updates
        total = flags.get("vae_steps", 0) + flags.get("offline_steps", 0) + online_steps
        steps = total - step
        collects = flags.get("prior_steps", 1) + flags.get("posterior_steps", 1) > 0
        return {
            "step": steps,
            "collection": min(steps, online_steps) / updates if collects else 0,
            "evaluation": steps / flags["eval_every"],
        }

    def seconds_left(self, step, flags):
        """The time to the end of a run; a part of which nothing is known yet counts as nothing."""
        seconds = 0.0
        for name, number in self.parts_left(step, flags).items():
            if self.counts[name]:
                seconds += number * self.seconds[name] / self.counts[name]
        return seconds

    def missing(self, flags):
        """What `seconds_left` does not count, in words."""
        words = {"collection": "new data", "evaluation": "evaluations"}
        parts = self.parts_left(0, flags)
        names = [words[name] for name in words if parts[name] and not self.counts[name]]
        return " and ".join(names)


def in_words(seconds):
    """A duration: "2 h 10 min"."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"

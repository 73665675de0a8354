"""Numbers of a run that usually mean a mistake. No torch: the report looks for them, too."""

import math


class Health:
    """Looks at every step's metrics for what usually means a mistake. Each kind is said once a run.

    The metrics are equal on all ranks, so that all of them stop at the same step where loss_spike="stop".
    """

    WINDOW = 20  # steps
    SPIKE = 2.0  # times the largest loss of the window
    ZERO_STEPS = 3
    NEAR_ZERO = 0.1  # of the run's first losses

    def __init__(self, loss_spike):
        self.loss_spike = loss_spike
        self.losses = []
        self.zero_steps = 0
        self.lowest_eval = math.inf
        self.said = set()

    def after_step(self, metrics):
        """The lines to print after a step.

        FloatingPointError for a loss that jumps where loss_spike="stop".
        """
        loss, step = metrics["loss"], metrics["step"]
        recent = self.losses[-self.WINDOW :]
        limit = self.SPIKE * max(map(abs, recent), default=math.inf)
        self.losses.append(loss)
        self.zero_steps = self.zero_steps + 1 if metrics.get("grad_norm") == 0 else 0
        if len(recent) == self.WINDOW and loss > limit:
            largest = f"{self.SPIKE:g} times the largest of the last {self.WINDOW} steps"
            problem = f"step {step}: loss {loss:.4g} is over {largest}"
            if self.loss_spike == "stop":
                raise FloatingPointError(f"{problem}, and loss_spike='stop'; the step is not saved")
            yield from self._once("spike", f"{problem}; a lower lr, or the rows of this step?")
        if self.zero_steps == self.ZERO_STEPS:
            problem = f"step {step}: gradient norm 0 for {self.ZERO_STEPS} steps"
            yield from self._once("zero", f"{problem}: nothing is learned; is the loss saturated?")

    def after_evaluation(self, step, metrics):
        """The lines to print after an evaluation: held-out loss rises while the training loss nears 0."""
        loss = metrics["eval/loss"]
        first, last = self.losses[: self.WINDOW], self.losses[-self.WINDOW :]
        near_zero = len(self.losses) > self.WINDOW and abs(sum(last)) < self.NEAR_ZERO * abs(sum(first))
        if near_zero and loss > 1.02 * self.lowest_eval:
            rises = f"held-out loss up from {self.lowest_eval:.4g} to {loss:.4g}"
            problem = f"step {step}: {rises}, training loss {sum(last) / len(last):.3g}"
            advice = "rows are learned by heart; fewer epochs, or a lower lr?"
            yield from self._once("overfit", f"{problem}: {advice}")
        self.lowest_eval = min(self.lowest_eval, loss)

    def take_up(self, lines):
        """The warnings of metrics lines of before, as if they were this process's own; they stop nothing."""
        asked, self.loss_spike = self.loss_spike, "warn"
        found = []
        for line in lines:
            if "loss" in line:
                found += self.after_step(line)
            elif line.get("eval/loss") is not None:  # null where it was not finite
                found += self.after_evaluation(line["step"], line)
        self.loss_spike = asked
        return found

    def _once(self, kind, text):
        if kind not in self.said:
            self.said.add(kind)
            yield f"warning: {text}"


def warnings_of(lines):
    """What a run of these metrics lines was warned of, or, one that is over, would have been."""
    return [text.removeprefix("warning: ") for text in Health("warn").take_up(lines)]

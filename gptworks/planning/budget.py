"""Plans when a run with a time budget should end, and how many steps fit until then.

A budget of B seconds is kept where the model folder is written between 0.9 B and 1.1 B, even if the machine becomes
five times slower or faster at any moment. Once that is noticed, a step, an evaluation and saving still have to happen,
five times as long as planned. So the end is planned early enough for them, and the plan is changed as the pace changes.
"""

from dataclasses import dataclass, replace

MOST_PLANS = 20  # in a run; each is written into config.yaml
SLOWER = 5.0  # how much slower a machine may become
SAVING_SECONDS = 0.2  # for the last checkpoint and the model folder, beside the last evaluation
STEP_SHARE, FINISH_SHARE = 0.01, 0.02  # of the budget, that a step and what comes after the last may take at most
AIM = 0.985  # of the budget, the latest end that is planned for


@dataclass(frozen=True)
class Pace:
    """Seconds that things take now."""

    step: float
    evaluation: float
    saving: float = SAVING_SECONDS

    @property
    def finish(self) -> float:
        """Seconds from the last step to the written model folder."""
        return self.evaluation + self.saving


def with_evaluations(pace: Pace, every: int) -> Pace:
    """The pace of steps of which each `every` are followed by an evaluation."""
    return replace(pace, step=pace.step + pace.evaluation / every)


def planned_end(budget: float, pace: Pace, slower: float = SLOWER) -> float:
    """Seconds from the beginning at which the run should end: early enough for a step and a finish that take `slower`
    times as long as now. Where these are too large a part of the budget, in the middle of what can be held."""
    late = budget * 1.1 - (slower - 1) * pace.finish - slower * pace.step
    return min(AIM * budget, max(late, 0.92 * budget))


def can_hold(budget: float, pace: Pace) -> bool:
    """True where steps and evaluations are short enough for the budget to be kept whatever the machine does."""
    return pace.step <= STEP_SHARE * budget and pace.finish <= FINISH_SHARE * budget


def steps_until(end: float, now: float, pace: Pace, evaluations: int) -> int:
    """Steps that fit between two moments, beside so many evaluations and the finish."""
    return max(int((end - now - pace.finish - evaluations * pace.evaluation) / max(pace.step, 1e-9)), 0)

"""Annealing of the number of teacher steps."""

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, checks
from keras_mscm import functional as F
from keras_mscm.models.multistep_consistency import MultistepConsistencyModel

Annealing = tuple[float, float, int]


class TeacherStepAnneal(keras.callbacks.Callback):
    """For nearly every training of a `MultistepConsistencyModel`.

    It grows the number of teacher steps during training (appendix A.1):
    `N_teacher(i)` goes log-linearly from `start` to `end` over `iterations`
    optimizer updates: with few steps what is learnt near the end of a segment
    travels through it quickly, with many the teacher's path is exact.

    Without arguments it takes what suits the run that `fit` plans by its epochs
    and steps (`functional.suggested_annealing`): half of its updates, as the
    paper does, and as many teacher steps as what is learnt can travel through
    in them. It prints what that is, unless `fit` is told `verbose=0`. Give
    numbers where you have measured better ones, or where `fit` can't know its
    length.

    The run is the whole training: to what `fit` plans the model's iteration is
    added, so that a training in several calls of `fit` is annealed as one, as
    far as it is known. What was chosen is saved with the model. A training that
    is resumed (by `ResumeTraining`, `BackupAndRestore` or `initial_epoch`)
    keeps it, also where `epochs` has grown since; one that begins at epoch 0
    again, and goes beyond the run it was chosen for, is given a new one.

    What else a short run wants: at one student step half the learning rate
    (benchmarks/annealing/table.md). Its moving average is short of itself.

    The schedule is set once, as the first epoch begins. The compiled step works
    out the number for the iteration that it is at, so nothing is compiled
    again, and a resumed training goes on where it was.

    Args:
        start: Teacher steps at the first iteration, at least the model's
            `student_steps`. By default what suits the run, and no more than
            `end`.
        end: Teacher steps from `iterations` on, at least the model's
            `student_steps`. By default what suits the run (twice `iterations`,
            where these are given), and no less than `start`.
        iterations: Length of the annealing in updates, at least 1; half the run
            by default.

    Raises:
        ValueError: If an argument is out of its range; when training begins, if
            `start` or `end` is below the model's `student_steps`, the model is
            no `MultistepConsistencyModel`, or `iterations` isn't given and
            `fit` doesn't know its number of steps.

    Warns:
        UserWarning: When training begins, if the run that `fit` plans is over
            before `iterations` that were given, so that `end` isn't reached.

    Example:

    >>> suits_the_run = TeacherStepAnneal()
    >>> paper = TeacherStepAnneal(start=64, end=1280, iterations=100_000)
    >>> # student.fit(dataset, callbacks=[suits_the_run])
    """

    def __init__(
        self,
        start: float | None = None,
        end: float | None = None,
        iterations: int | None = None,
    ):
        super().__init__()
        for name, value in {"start": start, "end": end}.items():
            if value is not None:
                checks.check_number(
                    name, value, 1, "a number of at least 1, or None"
                )
        if iterations is not None:
            checks.check_positive_integer("iterations", iterations, 2**31 - 1)
        self.start, self.end, self.iterations = start, end, iterations
        self._warned = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Checks that the model can be annealed with what was given."""
        if not isinstance(self.model, MultistepConsistencyModel):
            raise ValueError(
                "`TeacherStepAnneal` must be used with a "
                "MultistepConsistencyModel. Received: "
                f"{type(self.model).__name__}"
            )
        least = self.model.largest_steps
        for name in ("start", "end"):
            value = getattr(self, name)
            if value is not None:
                allowed = f"at least student_steps={least}"
                checks.check_number(name, value, least, allowed)
        self._is_set = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Sets the model's teacher step schedule, in the first epoch.

        Not before, because callbacks restore a model as training begins, and
        only its first epoch tells how much of the run is left.
        """
        if self._is_set:
            return
        self._is_set = True
        model = self.model
        run = self._whole_run(model, epoch)
        annealing: Annealing
        told = ""
        given = self.start, self.end, self.iterations
        if given[0] is not None and given[1] is not None and given[2]:
            annealing = given[0], given[1], given[2]
        else:
            annealing, told = self._choose(model, epoch, run)
        model.anneal_teacher_steps(*annealing)
        if self.iterations is not None and run is not None:
            self._warn_of_a_short_run(annealing, run, model.largest_steps)
        if told and self.params.get("verbose"):
            start, end, iterations = annealing
            print(
                f"Teacher steps go from {start:g} to {end:g} over "
                f"{iterations} iterations, {told}."
            )

    def _whole_run(self, model: Any, epoch: int) -> int | None:
        """Updates of the whole training; None if `fit` doesn't know."""
        steps = self.params.get("steps")
        if not steps:
            return None
        # It is unwrapped, because one that scales the loss may be around it.
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        batches = optimizer.gradient_accumulation_steps or 1
        done, before = (
            backend.integer(model.iteration),
            epoch * steps // batches,
        )
        if _is_resumed(model, epoch) and 0 <= done - before < steps / batches:
            # Batches of an interrupted epoch are passed over, so those that are
            # done must not be counted twice.
            done = before
        return done + (self.params["epochs"] - epoch) * steps // batches

    def _choose(
        self, model: Any, epoch: int, run: int | None
    ) -> tuple[Annealing, str]:
        """What suits the run where nothing was given, and why, in words."""
        student_steps = model.largest_steps
        if (self.start, self.end, self.iterations) == (None, None, None):
            saved = _chosen_before(model)
            if saved is not None:
                chosen_for = 2 * saved[2]
                goes_on = run is None or run <= chosen_for + 1
                if goes_on or _is_resumed(model, epoch):
                    return saved, f"as chosen before for a run of {chosen_for}"
        if self.iterations is not None:
            run = 2 * self.iterations
        if run is None:
            raise ValueError(
                "`iterations` must be given where `fit` doesn't know how many "
                "steps an epoch has: TeacherStepAnneal(iterations=n), n being "
                "half of the updates that you plan; or give `fit` "
                "`steps_per_epoch`. Received: iterations=None"
            )
        start: float
        end: float
        start, end, iterations = F.suggested_annealing(run, student_steps)
        if self.end is not None:
            start, end = min(start, self.end), self.end
        if self.start is not None:
            start = self.start
            end = max(start, end) if self.end is None else end
        return (start, end, iterations), f"chosen for a run of {run}"

    def _warn_of_a_short_run(
        self, annealing: Annealing, run: int, student_steps: int
    ) -> None:
        start, end, iterations = annealing
        if run >= iterations or start == end or self._warned:
            return
        self._warned = True
        reached = float(F.teacher_steps(run - 1, start, end, iterations))
        suggested = ", ".join(
            map(str, F.suggested_annealing(run, student_steps))
        )
        warnings.warn(
            f"The run of {run} iterations that `fit` plans is over before the "
            f"annealing, iterations={iterations}: its last update takes "
            f"{reached:.0f} teacher steps, not end={end:g}. What would suit it "
            f"is TeacherStepAnneal({suggested}), or no arguments, which choose "
            "that",
            stacklevel=2,
        )


def _is_resumed(model: Any, epoch: int) -> bool:
    """Whether `fit` goes on with a run that it was in before."""
    # Callbacks that restore a model set `_initial_epoch`, as Keras' own does.
    return epoch > 0 or model._initial_epoch is not None


def _chosen_before(model: Any) -> Annealing | None:
    """The annealing of a model in training, if it is the rule's.

    It needs no mark of its own, because the rule gives the same numbers again
    for the run that it was asked about.
    """
    found = ops.convert_to_numpy(model.annealing)
    iterations = int(found[2])
    suggested = F.suggested_annealing(2 * iterations, model.largest_steps)
    same = np.array_equal(found, np.asarray(suggested, "float32"))
    return suggested if same and backend.integer(model.iteration) else None

"""Annealing of the number of teacher steps."""

from typing import Any

import keras

from keras_mscm.models.multistep_consistency import MultistepConsistencyModel


class TeacherStepAnneal(keras.callbacks.Callback):
    """Grows the number of teacher steps during training (appendix A.1).

    `N_teacher(i)` goes log-linearly from `start` to `end` over `iterations`
    optimizer updates: with few steps what is learnt near the end of a segment
    travels through it quickly, with many the teacher's path is exact.

    The defaults are the paper's, of 200,000 iterations. Few iterations want few
    teacher steps, above all for one or two student steps: 1,500 iterations on
    Fashion-MNIST went best from 2 to 16 at one, from 4 to 32 at two
    (benchmarks/README.md).

    Sets the schedule once, when training begins. The compiled step works out
    the number for the iteration that it is at, so nothing is compiled again,
    and a resumed training goes on where it was.

    Args:
        start: Teacher steps at the first iteration, at least the model's
            `student_steps`.
        end: Teacher steps from `iterations` on, at least the model's
            `student_steps`.
        iterations: Length of the annealing in updates, at least 1.

    Raises:
        ValueError: When training begins, if the model is not a
            `MultistepConsistencyModel` or an argument is out of its range.

    Example:

    >>> anneal = TeacherStepAnneal(start=64, end=1280, iterations=100_000)
    >>> # student.fit(dataset, callbacks=[anneal])
    """

    def __init__(
        self, start: int = 64, end: int = 1280, iterations: int = 100_000
    ):
        super().__init__()
        self.start, self.end, self.iterations = start, end, iterations

    def on_train_begin(self, logs: Any = None) -> None:
        """Sets the model's teacher step schedule."""
        if not isinstance(self.model, MultistepConsistencyModel):
            raise ValueError(
                "`TeacherStepAnneal` must be used with a "
                "MultistepConsistencyModel. Received: "
                f"{type(self.model).__name__}"
            )
        self.model.anneal_teacher_steps(self.start, self.end, self.iterations)

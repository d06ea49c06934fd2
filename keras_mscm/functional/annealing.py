"""The teacher's step schedule (appendix A.1)."""

from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor

# What suits a run; `suggested_annealing` says where the numbers come from.
PAPER = 64, 1280, 100_000  # start, end and iterations, in a run of 200,000
START_POWER, END_POWER = 0.5, 0.7
FEWEST = 4  # steps per segment at the end


def teacher_steps(
    iteration: Tensor, start: Tensor, end: Tensor, iterations: Tensor
) -> Tensor:
    """`N_teacher(i)`: log-linear from `start` to `end` (appendix A.1).

        exp(log start + clip(i / iterations, 0, 1) (log end - log start))

    Args:
        iteration: Training iteration i, from 0, a scalar.
        start: Teacher steps at the first iteration.
        end: Teacher steps from `iterations` on.
        iterations: Length of the annealing, at least 1.

    Returns:
        Teacher steps, a float scalar, not rounded.

    Example:

    >>> round(float(teacher_steps(50_000, 64.0, 1280.0, 100_000)), 1)
    286.2
    """
    done = ops.clip(ops.cast(iteration, "float32") / iterations, 0.0, 1.0)
    log_start, log_end = ops.log(start), ops.log(end)
    return ops.exp(log_start + done * (log_end - log_start))


def suggested_annealing(run: int, student_steps: int) -> tuple[int, int, int]:
    """Teacher steps that suit a run: `(start, end, iterations)`.

    The annealing takes half of the run, as in appendix A.1. What is learnt near
    the end of a segment travels through it a teacher's step at a time, so a
    short run can't use many; and with few the teacher's path is coarse. `end`
    grows with the run to the power 0.7 and `start` with its square root, both
    up to the paper's 64 and 1280 at its 200,000 updates, whatever K is; `end`
    is at least four steps per segment, `start` one.

    The powers are fitted to runs of 300 to 3,000 updates, and to 1,500 of
    Fashion-MNIST (benchmarks/annealing/table.md, benchmarks/README.md), with
    Fashion-MNIST in one step in mind, where too many steps cost far more than
    too few: 300 updates went best to 16, with 1.4 times the teacher's distance,
    and to 32 left 3.9 times; 1,500 went equally well to 16 and 32, and badly to
    160. By the rule, 1,000 left 1.7 times. The digits bear 32 to 64 from 300
    updates on, and in one step lose by the rule up to 29 % of distance there.
    Between these runs and the paper's 200,000 nothing was measured.

    Args:
        run: Updates of the whole training, at least 1.
        student_steps: Evaluations of the student (K), at least 1.

    Returns:
        Integers, as `teacher_steps` takes them: none is less than 1, and no
        number of steps less than `student_steps`. They depend on the run by
        `iterations` alone, and never shrink as it grows.

    Raises:
        ValueError: If an argument is not an integer of at least 1.

    Example:

    >>> suggested_annealing(200_000, student_steps=8)
    (64, 1280, 100000)
    >>> suggested_annealing(300, student_steps=1)
    (2, 14, 150)
    """
    checks.check_positive_integer("run", run)
    checks.check_positive_integer("student_steps", student_steps)
    iterations = max(1, run // 2)
    paper_start, paper_end, paper_iterations = PAPER
    share = min(1.0, iterations / paper_iterations)
    end = round(paper_end * share**END_POWER)
    start = round(paper_start * share**START_POWER)
    end = max(end, FEWEST * student_steps)
    start = max(start, student_steps)
    return start, end, iterations

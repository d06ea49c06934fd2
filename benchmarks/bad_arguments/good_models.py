"""Good arguments of the models and their methods."""

import functools
from collections.abc import Iterator

from benchmarks.bad_arguments.domains import (
    KERAS_COMPILE,
    KERAS_EVALUATE,
    KERAS_FIT,
)
from benchmarks.bad_arguments.public_api import Entry, entry_of, method_of
from benchmarks.bad_arguments.world import Plain, World
from keras_mscm import (
    ConsistencyTuningModel,
    ContinuousConsistencyModel,
    DiffusionModel,
    GuidanceDistillationModel,
    MeanFlowModel,
    MultistepConsistencyModel,
    PeRFlowModel,
    ProgressiveDistillationModel,
    ShortcutModel,
    TractModel,
)


def models(w: World) -> Iterator[Entry]:
    steps = functools.partial(w.of_plain, student_steps=2)
    stages = functools.partial(steps, teacher_steps=8)
    students = MultistepConsistencyModel, ProgressiveDistillationModel
    for name, cls, good in (
        ("DenoisingModel", Plain, w.of_plain),
        ("DiffusionModel", DiffusionModel, w.of_plain),
        ("GuidanceDistillationModel", GuidanceDistillationModel, w.of_plain),
        ("MultistepConsistencyModel", students[0], steps),
        ("ProgressiveDistillationModel", students[1], stages),
        ("ConsistencyTuningModel", ConsistencyTuningModel, w.of_plain),
        (
            "ContinuousConsistencyModel",
            ContinuousConsistencyModel,
            w.of_plain,
        ),
        ("MeanFlowModel", MeanFlowModel, w.of_told),
        ("PeRFlowModel", PeRFlowModel, w.of_plain),
        ("ShortcutModel", ShortcutModel, w.of_told),
        ("TractModel", TractModel, w.of_plain),
    ):
        yield entry_of(name, cls, good)
    yield from _of_all(w)
    for name, cls, make in (
        ("MultistepConsistencyModel", students[0], lambda: w.student),
        ("ProgressiveDistillationModel", students[1], lambda: w.progressive),
    ):
        yield method_of(name, "generate", cls, make, w.noise)
    yield method_of(
        *("DiffusionModel", "measure_x_var", DiffusionModel),
        lambda: w.model,
        w.data,
    )
    yield from _of_students(w)
    yield method_of(
        *("MultistepConsistencyModel", "anneal_teacher_steps", students[0]),
        lambda: w.student,
        lambda: {"start": 4, "end": 8, "iterations": 2},
    )


def _of_all(w: World) -> Iterator[Entry]:
    """What all models share, of one of them."""
    of_all = functools.partial(
        method_of, "DenoisingModel", cls=DiffusionModel, make=lambda: w.model
    )
    fit = functools.partial(w.data)
    yield of_all("fit", good=lambda: {**fit(), "verbose": 0}, domains=KERAS_FIT)
    yield of_all(
        "evaluate",
        good=lambda: {**fit(), "verbose": 0},
        domains=KERAS_EVALUATE,
    )
    yield of_all("compile", make=lambda: w.to_compile, domains=KERAS_COMPILE)
    yield of_all("generate", good=w.noise)
    yield of_all("check_generate", more=[DiffusionModel.generate])
    yield of_all("save_to_preset", good=lambda: {"preset": w.folder / "saved"})
    yield method_of(
        *("DenoisingModel", "from_preset", DiffusionModel),
        lambda: DiffusionModel,
        lambda: {"preset": w.preset},
        more=[DiffusionModel],
        every=9,
    )
    of_lora = functools.partial(of_all, make=lambda: w.with_lora)
    yield of_lora("merged_network")
    yield of_lora("save_lora", good=lambda: {"path": w.folder / "saved.npz"})
    yield of_lora("load_lora", good=lambda: {"path": w.lora_file})


def _of_students(w: World) -> Iterator[Entry]:
    # What the teacher says, is not said again.
    of_teacher = (
        *("network", "schedule", "prediction_type", "space", "image_shape"),
        *("conditioning", "num_classes", "context_width"),
    )
    for cls, make, more in (
        (GuidanceDistillationModel, lambda: w.guided, {}),
        (MultistepConsistencyModel, lambda: w.student, {"student_steps": 2}),
        (PeRFlowModel, lambda: w.perflow, {}),
        (ContinuousConsistencyModel, lambda: w.continuous, {}),
        (MeanFlowModel, lambda: w.mean_flow, {}),
        (ConsistencyTuningModel, None, {}),
        (TractModel, None, {}),
        (
            ProgressiveDistillationModel,
            None,
            {"student_steps": 2, "teacher_steps": 8},
        ),
    ):
        name = cls.__name__
        told = {"teacher": w.told if cls is MeanFlowModel else w.model}
        if make is not None:
            yield method_of(
                *(name, "attach_teacher", cls, make),
                functools.partial(dict, told),
            )
        yield method_of(
            *(name, "from_teacher", cls, lambda cls=cls: cls),
            functools.partial(dict, told, **more),
            more=[cls],
            every=9,
            skip=of_teacher,
        )
    yield method_of(
        *("ShortcutModel", "from_teacher", ShortcutModel),
        lambda: ShortcutModel,
        lambda: {"teacher": w.told},
        more=[ShortcutModel],
        every=9,
        skip=of_teacher,
    )

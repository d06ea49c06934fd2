"""The models that are timed, and what they are fed."""

import numpy as np

from keras_mscm import DiffusionModel, MultistepConsistencyModel, UViT

# As many FLOPs an image as the convolutional networks that they are set beside,
# in products wide enough to keep a CPU busy.
WIDE = {
    "wide28": dict(
        image_shape=(28, 28, 1),
        patch_size=4,
        widths=(512,),
        depths=(2,),
        attention=True,
        num_classes=10,
        head_width=128,
        embedding_width=128,
    ),
    "wide64": dict(
        image_shape=(64, 64, 3),
        patch_size=8,
        widths=(1024,),
        depths=(3,),
        attention=True,
        head_width=128,
        embedding_width=256,
    ),
}


def student(preset, method, student_steps=8, **kwargs):
    """A student of a preset's network with random weights, and a teacher."""
    network = (
        UViT(**WIDE[preset])
        if preset in WIDE
        else UViT.from_preset(preset, load_weights=False)
    )
    guided = kwargs.get("guidance_scale", 1) != 1
    teacher = DiffusionModel(network, label_dropout=0.1 if guided else 0.0)
    return MultistepConsistencyModel.from_teacher(
        teacher,
        student_steps=student_steps,
        teacher_steps=64,
        method=method,
        **kwargs,
    )


def arrays(model, count):
    """Random images, and labels if the model takes them."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (count, *model.image_shape)).astype("float32")
    if not model.num_classes:
        return images, None
    return images, np.arange(count, dtype="int32") % model.num_classes


def state_of(model):
    """What Keras hands to a training step on JAX."""
    return tuple(
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    )

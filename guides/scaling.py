"""From a laptop to a TPU slice: one script, this one.

    python guides/scaling.py                            # a laptop, 8x8 digits

What changes on the way is in the arguments. Nothing in the model, its training
or its sampling knows how many devices there are, and neither do the results:
the same seed and global batch give the same weights, but for rounding.

1.  **Plan first.** `python -m keras_mscm.plan --preset imagenet64_small
    --topology v5e:8x8 --batch-size 2048` compiles the very step for a slice
    that you don't have yet, and says whether it fits and about how fast it
    will be (`pip install 'keras-mscm[tpu]'`). benchmarks/plans/README.md has
    plans of the paper's networks, training of four, distillation and
    sampling of all five, beside the paper's own rates.

2.  **One GPU.** The same command with your data and network. Half precision,
    and if memory is short rematerialisation and gradient accumulation, in this
    order (benchmarks/memory.md has what each one saves and costs):

        python guides/scaling.py --preset colour64 --data oxford_flowers102 \\
            --dtype mixed_bfloat16 --batch-size 256 --remat

3.  **Several GPUs or TPU chips of one machine.** `--distribution data` holds
    the weights on each device; `fully_sharded` divides them among the devices,
    where weights, average, teacher and optimizer are too large for one;
    `tensor_parallel` divides each layer, where activations are, too. What has
    fewer channels than there are devices stays whole on each.

4.  **A slice of several machines.** The same command on each, with
    `--initialize`; on Cloud TPUs JAX finds the other machines itself,
    elsewhere give `--coordinator`, `--num-processes` and `--process-id`. Each
    process reads its own part of the data.

        python guides/scaling.py --preset imagenet64_small \\
            --data imagenet_resized/64x64 --initialize --distribution data \\
            --dtype mixed_bfloat16 --batch-size 2048 --student-steps 8

5.  **When a machine dies.** Run the same command again: `ResumeTraining` goes
    on after the last save, bit for bit; on SIGTERM it saves at once. With
    weights spread over several machines take Keras' `OrbaxCheckpoint` instead.

On TensorFlow (KERAS_BACKEND=tensorflow) `--distribution data` is a
`tf.distribute.MirroredStrategy`. Keras distributes nothing on PyTorch.
"""

import argparse
import contextlib
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras

from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    UViT,
    datasets,
    distribution,
)
from keras_mscm.callbacks import ResumeTraining, TeacherStepAnneal


def distribute(args):
    """Spreads what is made from now on over the devices; returns a scope."""
    if args.initialize:
        keras.distribution.initialize(
            args.coordinator, args.num_processes, args.process_id
        )
    if args.distribution is None:
        return contextlib.nullcontext()
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.distribute.MirroredStrategy().scope()
    devices = keras.distribution.list_devices()
    if args.distribution == "data":
        chosen = keras.distribution.DataParallel(
            devices=devices, auto_shard_dataset=False
        )
    else:
        across = args.model_devices
        shape, names = (len(devices),), ["batch"]
        layout = distribution.fully_sharded
        if args.distribution == "tensor_parallel":
            shape, names = (len(devices) // across, across), ["batch", "model"]
            layout = distribution.tensor_parallel
        mesh = keras.distribution.DeviceMesh(shape, names, devices)
        chosen = distribution.UnevenModelParallel(
            layout_map=layout(mesh),
            batch_dim_name="batch",
            auto_shard_dataset=False,
        )
    keras.distribution.set_distribution(chosen)
    return contextlib.nullcontext()


def load(args):
    """Endless batches in [-1, 1]: each process has a part of each one."""
    chosen = keras.distribution.distribution()
    batch_size = args.batch_size // getattr(chosen, "num_processes", 1)
    if args.data != "digits":
        return datasets.from_tfds(
            args.data,
            batch_size=batch_size,
            image_size=args.image_size,
            flip=True,
            repeat=True,
            seed=0,
        )
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 8 - 1
    return datasets.from_arrays(
        images, labels, batch_size=batch_size, repeat=True, seed=0
    )


def train(model, data, args, name, callbacks=()):
    """Trains, and goes on where an earlier run of this script has ended."""
    optimizer = keras.optimizers.Adam(
        args.learning_rate,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )
    model.compile(optimizer=optimizer)
    model.fit(
        data,
        epochs=args.epochs,
        steps_per_epoch=args.iterations // args.epochs,
        callbacks=[*callbacks, ResumeTraining(f"{args.output}/{name}")],
        verbose=2,
    )


def main(args):
    with distribute(args):
        data = load(args)
        network = UViT.from_preset(
            args.preset, load_weights=False, dtype=args.dtype, remat=args.remat
        )
        teacher = DiffusionModel(network, seed=0)
        train(teacher, data, args, "teacher")

        student = MultistepConsistencyModel.from_teacher(
            teacher, student_steps=args.student_steps, seed=1
        )
        anneal = TeacherStepAnneal(64, 1280, max(1, args.iterations // 2))
        train(student, data, args, "student", [anneal])
        student.save(f"{args.output}/student.keras")
        images = student.generate(num_images=16, num_steps=args.student_steps)
    print(f"{len(images)} images, {images.shape[1:]}; all is in {args.output}/")


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--data", default="digits", help="or TFDS' name of it")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--student-steps", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=1000, help="of each")
    parser.add_argument("--epochs", type=int, default=5, help="saves of each")
    parser.add_argument("--batch-size", type=int, default=64, help="of all")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--gradient-accumulation-steps", type=int)
    parser.add_argument(
        "--distribution", choices=("data", "fully_sharded", "tensor_parallel")
    )
    parser.add_argument("--model-devices", type=int, default=4)
    parser.add_argument("--initialize", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--output", default="scaling")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())

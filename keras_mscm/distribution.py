"""Layouts of a UViT's weights over devices, for `keras.distribution`.

Keras distributes; here is only what it needs to know of the network. On JAX:

    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((len(devices),), ["batch"], devices)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=fully_sharded(mesh))
    )

before the first network is made. `keras.distribution.DataParallel()` needs no
layout: each device holds all weights. Where channels don't divide among the
devices, `UnevenModelParallel` takes `ModelParallel`'s place. With several
processes, `keras.distribution.initialize(...)` comes first. On TensorFlow, make
and compile the model within the scope of a `tf.distribute.MirroredStrategy`;
Keras can't train under the one for several machines. It distributes nothing on
PyTorch.

The trained network, its moving average, the teacher within a student and the
optimizer's state are laid out alike. Results don't depend on the number of
devices, but for rounding; batches must divide among them.
"""

import keras

from keras_mscm import checks

# Dense layers of (input, output).
_DENSE = (
    "(hidden|projection|entry|query_key_value|query|key_value|attention_output"
    r"|mlp_hidden|modulation|mlp_output|widen_\d+|narrow_\d+)"
)


def fully_sharded(
    device_mesh: keras.distribution.DeviceMesh,
) -> keras.distribution.LayoutMap:
    """Each device holds its share of every matrix, and of the batch.

    The matrices are gathered when a layer needs them, and their gradients
    scattered: the same arithmetic as `keras.distribution.DataParallel`, with
    the memory for weights divided by the number of devices. What is small (all
    vectors) stays whole on each.

    Args:
        device_mesh: Mesh whose first axis, along which Keras divides the
            batch, the weights are divided along too. Channels, embedding width
            and hidden widths must be multiples of its size, or
            `UnevenModelParallel` has to leave whole those that aren't.

    Returns:
        Layout map, for `keras.distribution.ModelParallel(layout_map=...)`.

    Raises:
        ValueError: If `device_mesh` is not a `DeviceMesh`.

    Reference:
        Rajbhandari et al., *ZeRO*, 2020, stage 3.

    Example:

    >>> mesh = keras.distribution.DeviceMesh((1,), ["batch"], ["cpu:0"])
    >>> fully_sharded(mesh)["u_vi_t_ema/entry/kernel"].axes
    (None, 'batch')
    """
    _check_mesh(device_mesh, 1)
    axis = device_mesh.axis_names[0]
    return _layout_map(
        device_mesh,
        {
            f"{_DENSE}/kernel": (None, axis),
            "exit/kernel": (axis, None),
            "conv_[12]/kernel": (None, None, None, axis),
            "embed_label/embeddings": (None, axis),
            "position": (None, None, axis),
        },
    )


def tensor_parallel(
    device_mesh: keras.distribution.DeviceMesh,
) -> keras.distribution.LayoutMap:
    """Each block's hidden channels are divided among devices.

    For a large network, whose activations are too large as well. The first
    layer of each pair (queries, keys and values; the MLP's hidden layer; the
    first convolution) is divided by its outputs, the second by its inputs: what
    lies between is nowhere whole, and each pair ends in one all-reduce. Besides
    only queries, keys and values change places, as they come from one matrix.
    What is outside the blocks stays whole on each device.

    Args:
        device_mesh: Mesh of at least two axes. Along the first one Keras
            divides the batch, along the last the channels are divided, whose
            number must be a multiple of its size, as in `fully_sharded`.

    Returns:
        Layout map, for `keras.distribution.ModelParallel(layout_map=...)`.

    Raises:
        ValueError: If `device_mesh` is not a `DeviceMesh` of two axes or more.

    Reference:
        Shoeybi et al., *Megatron-LM*, 2019, section 3.

    Example:

    >>> devices = ["cpu:0"]
    >>> mesh = keras.distribution.DeviceMesh(
    ...     (1, 1), ["batch", "model"], devices
    ... )
    >>> layout = tensor_parallel(mesh)
    >>> layout["u_vi_t/middle_1_0/mlp_hidden/kernel"].axes
    (None, 'model')
    >>> layout["u_vi_t/middle_1_0/mlp_output/kernel"].axes
    ('model', None)
    """
    _check_mesh(device_mesh, 2)
    axis = device_mesh.axis_names[-1]
    first = "(query_key_value|query|key_value|mlp_hidden|modulation)"
    return _layout_map(
        device_mesh,
        {
            f"{first}/kernel": (None, axis),
            f"{first}/bias": (axis,),
            "(attention_output|mlp_output)/kernel": (axis, None),
            "conv_1/kernel": (None, None, None, axis),
            "conv_1/bias": (axis,),
            "norm_2/(gamma|beta)": (axis,),
            "conv_2/kernel": (None, None, axis, None),
        },
    )


class UnevenModelParallel(keras.distribution.ModelParallel):
    """`ModelParallel` that leaves whole what its layout can't divide evenly.

    There may be more devices than a stage has channels: the paper's
    text-to-image network begins with 128, and has 4096 in the middle. A weight
    with an axis that is no multiple of the devices which are to share it is
    held by each of them; those are the small ones.

    Args:
        layout_map, batch_dim_name, auto_shard_dataset: As in
            `keras.distribution.ModelParallel`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> devices = ["cpu:0", "cpu:1"]
    >>> mesh = keras.distribution.DeviceMesh((2,), ["batch"], devices)
    >>> layout_map = keras.distribution.LayoutMap(mesh)
    >>> layout_map["even|odd"] = ("batch",)
    >>> distribution = UnevenModelParallel(layout_map=layout_map)
    >>> even = keras.Variable([1.0, 2.0], name="even")
    >>> odd = keras.Variable([1.0, 2.0, 3.0], name="odd")
    >>> distribution.get_variable_layout(even).axes
    ('batch',)
    >>> distribution.get_variable_layout(odd).axes
    (None,)
    """

    def __init__(
        self,
        *,
        layout_map: keras.distribution.LayoutMap,
        batch_dim_name: str | None = None,
        auto_shard_dataset: bool = True,
    ):
        if not isinstance(layout_map, keras.distribution.LayoutMap):
            allowed = "a `keras.distribution.LayoutMap`"
            raise checks.invalid("layout_map", allowed, layout_map)
        mesh = layout_map.device_mesh
        if not isinstance(mesh, keras.distribution.DeviceMesh):
            allowed = "a `LayoutMap` of a `keras.distribution.DeviceMesh`"
            raise checks.invalid("layout_map", allowed, layout_map)
        if batch_dim_name is not None:
            names = tuple(mesh.axis_names)
            checks.check_choice("batch_dim_name", batch_dim_name, names)
        checks.check_boolean("auto_shard_dataset", auto_shard_dataset)
        super().__init__(
            layout_map=layout_map,
            batch_dim_name=batch_dim_name,
            auto_shard_dataset=auto_shard_dataset,
        )

    def get_variable_layout(self, variable):
        """That of the layout map, or whole on each device."""
        layout = super().get_variable_layout(variable)
        mesh = self.device_mesh
        devices = dict(zip(mesh.axis_names, mesh.shape))
        if all(
            size % devices.get(axis, 1) == 0
            for size, axis in zip(variable.shape, layout.axes)
        ):
            return layout
        whole = (None,) * len(variable.shape)
        return keras.distribution.TensorLayout(whole, mesh)


def _check_mesh(device_mesh: keras.distribution.DeviceMesh, axes: int) -> None:
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        allowed = "a `keras.distribution.DeviceMesh`"
        raise checks.invalid("device_mesh", allowed, device_mesh)
    if len(device_mesh.shape) < axes:
        raise ValueError(
            f"`device_mesh` must have {axes} axes or more: one for the batch "
            "and, the last, for the channels. Received: device_mesh of shape "
            f"{tuple(device_mesh.shape)}"
        )


def _layout_map(
    device_mesh: keras.distribution.DeviceMesh, layouts: dict[str, tuple]
) -> keras.distribution.LayoutMap:
    """Layouts of weights in whatever network: its average and teacher too."""
    layout_map = keras.distribution.LayoutMap(device_mesh)
    for path, axes in layouts.items():
        layout_map[f".*/{path}"] = axes  # Keras matches the whole path
    return layout_map

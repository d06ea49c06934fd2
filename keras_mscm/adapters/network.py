"""A foreign network in the coordinates of this library."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import checks, lora
from keras_mscm.adapters import arguments, coordinates, copies, embeddings
from keras_mscm.conditioning import Condition, check_declared
from keras_mscm.functional import parameterizations as P
from keras_mscm.functional.process import Tensor
from keras_mscm.networks.layers import NoiseLevelEmbedding


@keras.saving.register_keras_serializable(package="keras_mscm")
class AdaptedNetwork(keras.Model):
    """A network of other inputs and outputs, as this library calls networks.

    You want it to make a teacher, and a student's beginning, of a diffusion
    network that somebody else trained: of rectified flow, of EDM's
    preconditioning, of discrete steps. It turns `z` and log-SNR into what the
    network was trained on, and what it says into `v` (or passes `x` and
    `epsilon` through, as `prediction_type` tells). All of this, embeddings of
    time too, is done in float32, whatever the network's policy.

    Args:
        network: The foreign network, a Keras layer or model, called as
            `network(inputs, training=...)`.
        image_shape: Shape of one example, of any rank.
        process: In which coordinates the network takes `z`:
            `"variance_preserving"`, ours; `"rectified_flow"`, `(1 - t) x + t
            epsilon`; `"variance_exploding"`, `x + S epsilon`; `"edm"`, the same
            times EDM's `c_in`.
        time: What it takes as time: `"logsnr"`; `"sigma"`, the noise-to-signal
            ratio `S`; `"noise_variance"`, `sigma^2` of ours; `"flow_time"`, `t`
            of rectified flow; `"edm"`, `log(S) / 4`; `"discrete_step"`, the
            place in a table, with fractions.
        output: What it says: `"v"`, `"x"`, `"epsilon"`, rectified flow's
            velocity `"flow"`, or EDM's `F`, `"edm"`.
        alphas_cumprod: For `"discrete_step"`: `alpha^2` of each step, falling.
        sigma_data: For `"edm"`: the data's deviation.
        time_scale: Number by which time is multiplied.
        time_axes: Number of axes of size 1 that time has after the batch's.
        time_width: If time is to be handed over as cosines and sines: how
            many. None for the number itself.
        names: What the network calls `"z"`, `"logsnr"` and the conditioning,
            where it differs; or, for a network that takes a list, our names
            in its order.
        conditioning: What it is conditioned on, by our names. An array that
            says nothing is held as an untrained weight.
        constants: What it takes besides, by its names: arrays of one example,
            without the batch's axis; held as untrained weights.
        float32_layers: Names of the network's layers that are to run in
            float32 whatever its policy: those that embed time.
        time_embedding: For a student of several numbers of steps: the name,
            or the dotted path of attributes, of the network's layer whose
            output is its embedding of time, `(batch, width)`, with axes of
            size 1 in between or not. To this `take_logsnr_end` adds an
            embedding of the log-SNR to which a prediction is to lead. Of a
            module of PyTorch or Flax it may be the end of a path, which several
            parts may share. It is not needed with `time_width`, and may not be
            within a block that is computed again for the gradient.
        end_width: The width of that second embedding, which files and copies
            tell; None for a network that has none, yet.
        **kwargs: As for any Keras model.

    Call arguments:
        inputs: Dictionary of `"z"`, noisy images `(batch, *image_shape)`;
            `"logsnr"`, `(batch,)`; and the conditioning. After
            `take_logsnr_end`, optionally, `"logsnr_end"`, `(batch,)`.
        training: Whether the network trains.

    Call returns:
        What `prediction_type` tells, float32, `(batch, *image_shape)`.

    Raises:
        ValueError: If an argument isn't as above, or one is lacking.

    Example:

    >>> z, t = keras.Input((8, 8, 3)), keras.Input((1,))
    >>> time = keras.layers.Dense(3)(t)[:, None, None]
    >>> foreign = keras.Model(
    ...     {"latent": z, "timestep": t}, keras.layers.Dense(3)(z) + time
    ... )
    >>> network = AdaptedNetwork(
    ...     foreign,
    ...     (8, 8, 3),
    ...     process="rectified_flow",
    ...     time="flow_time",
    ...     output="flow",
    ...     time_scale=1000.0,
    ...     time_axes=1,
    ...     names={"z": "latent", "logsnr": "timestep"},
    ... )
    >>> v = network({"z": np.zeros((2, 8, 8, 3)), "logsnr": np.zeros(2)})
    >>> network.prediction_type, tuple(v.shape)
    ('v', (2, 8, 8, 3))
    """

    built: bool

    def __init__(
        self,
        network: keras.Layer,
        image_shape: Sequence[int],
        *,
        process: str = "variance_preserving",
        time: str = "logsnr",
        output: str = "v",
        alphas_cumprod: Any = None,
        sigma_data: float = 1.0,
        time_scale: float = 1.0,
        time_axes: int = 0,
        time_width: int | None = None,
        names: Mapping[str, str] | Sequence[str] | None = None,
        conditioning: Mapping[str, Condition] | None = None,
        constants: Mapping[str, Any] | None = None,
        float32_layers: Sequence[str] = (),
        time_embedding: str | None = None,
        end_width: int | None = None,
        **kwargs: Any,
    ):
        if not isinstance(network, keras.Layer):
            raise checks.invalid("network", "a Keras layer or model", network)
        kwargs.setdefault("dtype", network.dtype_policy)
        # The network casts for itself; what is done before must not be cast.
        super().__init__(autocast=False, **kwargs)
        self.network = network
        self.float32_layers = arguments.run_in_float32(network, float32_layers)
        self.image_shape = arguments.check_sizes("image_shape", image_shape)
        self.process = checks.check_choice(
            "process", process, coordinates.PROCESSES
        )
        self.time = checks.check_choice("time", time, coordinates.TIMES)
        self.output_type = checks.check_choice(
            "output", output, coordinates.OUTPUTS
        )
        self.alphas_cumprod = arguments.check_table(time, alphas_cumprod)
        self.sigma_data = arguments.check_scale("sigma_data", sigma_data)
        self.time_scale = arguments.check_scale("time_scale", time_scale)
        self.time_axes = checks.check_integer("time_axes", time_axes, 0, 8)
        self.time_width = arguments.check_width(time_width)
        self.conditioning = {
            name: self._stored(name, condition)
            for name, condition in check_declared(
                "conditioning", {} if conditioning is None else conditioning
            ).items()
        }
        self.names = arguments.check_names(
            names, ["z", "logsnr", *self.conditioning]
        )
        constants = arguments.check_mapping("constants", constants)
        if isinstance(self.names, Mapping):
            taken = [*constants, *self.names.values()]
            arguments.check_distinct("constants", taken)
        if constants and not isinstance(self.names, Mapping):
            raise ValueError(
                "`constants` must not be given where `names` is a list. "
                f"Received: constants of {[*constants]}"
            )
        self.constants = {
            name: self._store(f"constant_{name}", value)
            for name, value in constants.items()
        }
        self.time_embedding = time_embedding
        self.embed_end: NoiseLevelEmbedding | None = None
        self.build()
        embeddings.check(network, time_embedding)
        if end_width is not None:
            width = embeddings.check_width("end_width", end_width)
            embeddings.check_known(network, time_embedding, self.time_width)
            self._embed_end(width)

    def _store(self, name: str, value: Any) -> keras.Variable:
        """An untrained weight that holds an array."""
        value, dtype = arguments.check_constant(name, value)
        # `autocast` would round it to half precision within the call.
        weight = self.add_weight(
            shape=value.shape,
            dtype=dtype,
            initializer="zeros",
            trainable=False,
            autocast=False,
            name=name,
        )
        weight.assign(value)
        return weight

    def _stored(self, name: str, condition: Condition) -> Condition:
        """The condition, with what says nothing held by this network."""
        null = condition.null
        if condition.dtype != "float32" or null is None or not null.shape:
            return condition
        return Condition(
            condition.shape,
            condition.dtype,
            null=self._store(f"null_{name}", null),
            num_classes=condition.num_classes,
            mask=condition.mask,
        )

    @property
    def prediction_type(self) -> str:
        """What it says: `"v"`, or `"x"` or `"epsilon"` if the network does."""
        passed = self.output_type in ("x", "epsilon")
        return self.output_type if passed else "v"

    def build(self, input_shape: Any = None) -> None:
        if self.built:
            return
        self.built = True
        if not self.network.built:
            # Keras builds layers as they are called, if only symbolically.
            arguments.check_call(self, self._symbolic())

    def _symbolic(self) -> dict[str, keras.KerasTensor]:
        """Its inputs without values, for a batch of any size."""
        return {
            "z": keras.KerasTensor((None, *self.image_shape)),
            "logsnr": keras.KerasTensor((None,)),
            **{k: c.symbolic() for k, c in self.conditioning.items()},
        }

    def take_logsnr_end(self) -> None:
        """Lets the network be told where its prediction is to lead.

        You want it for one student of several numbers of steps, which calls
        it. A second embedding is added to the network's own of time; it begins
        at zero, so that the network predicts as before until it is trained.

        Raises:
            ValueError: If it isn't known where the network embeds time.
        """
        if self.embed_end is not None:
            return
        width, name = self.time_width, self.time_embedding
        embeddings.check_known(self.network, name, width)
        if name is not None:

            def call():
                self.compute_output_spec(self._symbolic())

            width = embeddings.width_of(self.network, name, call)
        self._embed_end(embeddings.check_width("time_width", width))

    def _embed_end(self, width: int) -> None:
        # A built layer is locked, as Keras' own `enable_lora` finds it too.
        self._tracker.unlock()
        self.embed_end = NoiseLevelEmbedding(
            width, begins_at_zero=True, dtype="float32", name="embed_end"
        )
        self._tracker.lock()
        self.embed_end.build((None,))

    @property
    def takes_logsnr_end(self) -> bool:
        """Whether it may be told where its prediction is to lead."""
        return self.embed_end is not None

    def call(
        self, inputs: dict[str, Tensor], training: bool | None = None
    ) -> Tensor:
        z = ops.cast(inputs["z"], "float32")
        logsnr = ops.cast(inputs["logsnr"], "float32")
        end = None
        if self.embed_end is not None and inputs.get("logsnr_end") is not None:
            end = self.embed_end(inputs["logsnr_end"])
        foreign = self._foreign_inputs(inputs, z, logsnr, end)
        with embeddings.told(self.network, self.time_embedding, end):
            output = self.network(foreign, training=training)
        output = ops.cast(output, "float32")
        return coordinates.prediction(
            self.output_type, output, z, logsnr, self.sigma_data
        )

    def _foreign_inputs(
        self,
        inputs: dict[str, Tensor],
        z: Tensor,
        logsnr: Tensor,
        end: Tensor | None,
    ) -> dict[str, Tensor] | list[Tensor]:
        """What the network takes, by its names or in its order."""
        given = {
            **{name: inputs[name] for name in self.conditioning},
            "z": coordinates.noisy_input(
                self.process, z, logsnr, self.sigma_data
            ),
            "logsnr": self._time(logsnr, end),
        }
        if not isinstance(self.names, Mapping):
            return [given[name] for name in self.names]
        foreign = {self.names[name]: given[name] for name in given}
        for name, value in self.constants.items():
            shape = (*ops.shape(z)[:1], *value.shape)
            foreign[name] = ops.broadcast_to(value, shape)
        return foreign

    def _time(self, logsnr: Tensor, end: Tensor | None) -> Tensor:
        time = coordinates.time_input(self.time, logsnr, self.alphas_cumprod)
        time = self.time_scale * time
        if self.time_width:
            time = P.sinusoids(time, self.time_width)
            if end is not None and self.time_embedding is None:
                time = time + end
        for _ in range(self.time_axes):
            time = time[..., None]
        return time

    def clone(self, name: str | None = None) -> Self:
        """A second network of the same weights, of which none are shared.

        Args:
            name: Its name; by default the same.

        Raises:
            ValueError: If the foreign network can't be made anew.
        """
        config = {**super().get_config(), **self._arguments()}
        config["network"] = copies.clone_of(self.network)
        config["conditioning"] = dict(self.conditioning)
        clone = type(self)(**{**config, "name": name or self.name})
        lora.like(clone, self)
        for theirs, ours in zip(self.weights, clone.weights, strict=True):
            # A copy, because JAX gives buffers away: none may be shared.
            ours.assign(ops.copy(theirs.value))
        return clone

    def _arguments(self) -> dict[str, Any]:
        """The constructor's arguments, without network and conditioning."""
        constants = {
            name: np.zeros(value.shape, value.dtype)
            for name, value in self.constants.items()
        }
        names = self.names
        # Only where they are used, so that other files are as they were.
        end: dict[str, Any] = {}
        if self.time_embedding is not None:
            end["time_embedding"] = self.time_embedding
        if self.embed_end is not None:
            end["end_width"] = self.embed_end.width
        return {
            **end,
            "image_shape": self.image_shape,
            "process": self.process,
            "time": self.time,
            "output": self.output_type,
            "alphas_cumprod": self.alphas_cumprod,
            "sigma_data": self.sigma_data,
            "time_scale": self.time_scale,
            "time_axes": self.time_axes,
            "time_width": self.time_width,
            "names": dict(names) if isinstance(names, Mapping) else [*names],
            "constants": constants,
            "float32_layers": self.float32_layers,
        }

    def get_config(self) -> dict[str, Any]:
        config = {**super().get_config(), **self._arguments()}
        config["network"] = keras.saving.serialize_keras_object(self.network)
        config["constants"] = {
            name: [list(value.shape), str(value.dtype)]
            for name, value in config["constants"].items()
        }
        config["conditioning"] = {
            name: copies.described(condition)
            for name, condition in self.conditioning.items()
        }
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The inverse of `get_config`; weights are not in a configuration."""
        config = dict(config)
        config["network"] = keras.saving.deserialize_keras_object(
            config["network"]
        )
        config["constants"] = {
            name: np.zeros(shape, dtype)
            for name, (shape, dtype) in config["constants"].items()
        }
        config["conditioning"] = {
            name: copies.from_description(description)
            for name, description in config["conditioning"].items()
        }
        return cls(**config)

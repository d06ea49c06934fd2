"""Training on several devices: the same results as on one.

Devices are virtual, on the CPU, and counted when a framework starts: so they
are in processes of their own, which `distributed_training.py` runs.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_mscm import DiffusionModel, backend
from keras_mscm.distribution import (
    UnevenModelParallel,
    fully_sharded,
    tensor_parallel,
)
from keras_mscm.models import data_checks

SCRIPT = Path(__file__).with_name("distributed_training.py")
jax_only, tensorflow_only = (
    pytest.mark.skipif(name != backend.NAME, reason=f"of the {name} backend")
    for name in ("jax", "tensorflow")
)


def start(folder, cases, *, devices, **plan):
    """A process that trains the cases."""
    folder.mkdir(exist_ok=True)
    plan |= {"backend": backend.NAME, "devices": devices, "cases": cases}
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    # Tests of a package that is not installed find it in its repository.
    path = os.pathsep.join([str(SCRIPT.parents[1]), *sys.path])
    return subprocess.Popen(
        [sys.executable, SCRIPT, file],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )


def results_of(folder, process, cases):
    """What came of each case."""
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    return {
        case["name"]: dict(np.load(folder / f"{case['name']}.npz"))
        for case in cases
    }


def case(method, layout=None, devices=1, **more):
    name = f"{method}_{layout}_{devices}_{'_'.join(sorted(more))}"
    return dict(
        name=name, method=method, layout=layout, devices=devices, **more
    )


def assert_same(results, reference, name):
    """Losses, weights, averages, optimizer state and images are alike."""
    for key, expected in reference.items():
        if key.startswith("share_") or key not in results:
            continue
        value = results[key]
        if key == "losses":  # of a run that was resumed, the last ones
            expected = expected[-len(value) :]
        np.testing.assert_allclose(
            value, expected, rtol=1e-4, atol=2e-5, err_msg=f"{name} {key}"
        )


# What goes where.


@pytest.fixture
def device_mesh():
    return keras.distribution.DeviceMesh((1, 1), ["batch", "model"], ["cpu:0"])


@pytest.fixture
def variables(tiny_uvit):
    """Of a UViT that has everything, in a student with its teacher."""
    network = tiny_uvit(
        widths=(16, 32),
        depths=(1, 1),
        attention=(False, True),
        num_classes=3,
        context_width=8,
    )
    # As clones are named; those are made the same way.
    return [
        (f"{prefix}/{v.path.split('/', 1)[1]}", tuple(v.shape))
        for prefix in (network.name, f"{network.name}_ema", "teacher_network")
        for v in network.trainable_variables
    ]


def test_every_matrix_is_fully_sharded(variables, device_mesh):
    layout_map = fully_sharded(device_mesh)
    assert len(variables) > 100
    for path, shape in variables:
        layout = layout_map[path]
        if len(shape) < 2:
            assert layout is None, path
            continue
        axes = layout.axes
        assert len(axes) == len(shape), path
        assert axes.count("batch") == 1, path
        # Along the channels or a width, which divide; not pixels or places.
        assert shape[axes.index("batch")] >= 16, path


def test_tensor_parallel_divides_pairs_of_layers(variables, device_mesh):
    layout_map = tensor_parallel(device_mesh)
    # The channels that lie between a pair's layers.
    between = {
        "query_key_value/kernel": 1,
        "query_key_value/bias": 0,
        "cross_attention/query/kernel": 1,
        "cross_attention/query/bias": 0,
        "key_value/kernel": 1,
        "key_value/bias": 0,
        "attention_output/kernel": 0,
        "mlp_hidden/kernel": 1,
        "mlp_hidden/bias": 0,
        "modulation/kernel": 1,
        "modulation/bias": 0,
        "mlp_output/kernel": 0,
        "conv_1/kernel": 3,
        "conv_1/bias": 0,
        "norm_2/gamma": 0,
        "norm_2/beta": 0,
        "conv_2/kernel": 2,
    }
    seen = set()
    for path, shape in variables:
        layout = layout_map[path]
        ends = [end for end in between if path.endswith(f"/{end}")]
        if not ends:
            assert layout is None, path
            continue
        expected = [None] * len(shape)
        expected[between[ends[0]]] = "model"
        assert layout.axes == tuple(expected), path
        seen.update(ends)
    assert seen == set(between)


@pytest.mark.parametrize("layout", [fully_sharded, tensor_parallel])
def test_a_mesh_is_needed(layout):
    with pytest.raises(ValueError, match=r"`device_mesh` must be a .*jax"):
        layout("jax")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layout_map", None),
        ("layout_map", keras.distribution.LayoutMap(None)),
        ("batch_dim_name", "model"),
        ("batch_dim_name", ""),
        ("auto_shard_dataset", "no"),
    ],
)
def test_what_an_uneven_layout_is_given_is_checked(name, value):
    mesh = keras.distribution.DeviceMesh((1,), ["batch"], ["cpu:0"])
    given = {"layout_map": fully_sharded(mesh)}
    assert UnevenModelParallel(**given).batch_dim_name == "batch"
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: "):
        UnevenModelParallel(**{**given, name: value})


def test_tensor_parallel_needs_two_axes():
    mesh = keras.distribution.DeviceMesh((1,), ["batch"], ["cpu:0"])
    with pytest.raises(ValueError, match=r"2 axes.*shape \(1,\)"):
        tensor_parallel(mesh)


# What Keras would accept in silence.


@pytest.fixture
def one_device():
    """A distribution, as far as any backend accepts one."""
    return keras.distribution.DataParallel(devices=["cpu:0"])


def test_a_distribution_that_does_nothing_is_refused(tiny_uvit, one_device):
    with one_device.scope():
        model = DiffusionModel(tiny_uvit())
        model.compile("sgd")
        images = np.zeros((4, 8, 8, 1), "float32")
        if backend.NAME == "jax":
            assert np.isfinite(model.evaluate(images, verbose=0))
            return
        instead = {"tensorflow": "MirroredStrategy", "torch": "use JAX"}
        expected = f"{backend.NAME}.*{instead[backend.NAME]}.*DataParallel"
        for train in (model.fit, model.evaluate, model.train_on_batch):
            with pytest.raises(ValueError, match=expected):
                train(images)


@pytest.mark.parametrize(
    ("num", "part", "batch_size", "fits"),
    [
        (16, 1, 8, True),
        (12, 1, 8, True),
        (64, 1, None, True),  # of Keras' 32
        (6, 1, 8, False),
        (16, 1, 6, False),
        (16, 0.75, 8, True),
        (20, 0.75, 8, backend.NAME != "jax"),
        (9, 1, 8, backend.NAME != "jax"),
    ],
)
def test_batches_must_divide(num, part, batch_size, fits):
    images = np.zeros((num, 1))
    if fits:
        data_checks.check_shares("x", images, part, batch_size, 4)
        return
    with pytest.raises(ValueError, match=rf"multiple of 4.*{batch_size}"):
        data_checks.check_shares("x", images, part, batch_size, 4)


# The same results.


@jax_only
def test_the_same_on_any_number_of_devices(tmp_path):
    cases = [
        case("distillation", evaluate=True),
        case("distillation", "data_parallel", 2, evaluate=True),
        case("distillation", "fully_sharded", 4, save=True),
        case("distillation", "tensor_parallel", 8, evaluate=True),
        case("distillation", "fully_sharded", 2, resume=True),
        case("distillation", resume=True),
        case("training", uneven=True),
        case("training", "fully_sharded", 8, uneven=True),
    ]
    process = start(tmp_path, cases, devices=8, refusals=True)
    results = results_of(tmp_path, process, cases)
    check_cases(cases, results)
    refusals = json.loads((tmp_path / "refusals.json").read_text())
    made_before, undivided, of_a_stream = refusals
    assert "must be called before networks" in made_before
    assert "DataParallel, and 'diffusion_model/" in made_before
    assert "multiple of 8" in undivided
    assert "batch_size=32, 36 images, 4 in the last" in undivided
    assert "multiple of 8" in of_a_stream
    assert "4 images in the last batch" in of_a_stream


def check_cases(cases, results):
    """Each is as its method is on one device, and holds what it should."""
    for made in cases:
        name, number = made["name"], made["devices"]
        reference = next(
            results[other["name"]]
            for other in cases
            if other["method"] == made["method"] and other["layout"] is None
        )
        assert_same(results[name], reference, name)
        shares = {
            key: value
            for key, value in results[name].items()
            if key.startswith("share_")
        }
        if made["layout"] == "fully_sharded":
            # All but the vectors, and the stage that doesn't divide: trained,
            # averaged, taught and optimized.
            assert len(shares) == 3 + (made["method"] == "distillation")
            more = 0.25 if made.get("uneven") else 0.1
            assert all(
                1 / number <= share < 1 / number + more
                for share in shares.values()
            ), shares
        elif made["layout"] == "tensor_parallel":
            assert all(share < 0.7 for share in shares.values()), shares
        else:
            assert all(share == 1 for share in shares.values()), shares
    first = results[cases[0]["name"]]
    assert np.ptp(first["losses"]) > 0.01  # different batches
    assert np.mean(np.abs(first["images"]) < 1) > 0.5  # not all clipped


@jax_only
@pytest.mark.slow
@pytest.mark.parametrize("method", ["distillation", "training"])
@pytest.mark.parametrize(
    "layout", ["data_parallel", "fully_sharded", "tensor_parallel"]
)
def test_the_same_on_1_2_4_and_8_devices(tmp_path, method, layout):
    cases = [case(method, evaluate=True)] + [
        case(method, layout, number, evaluate=True) for number in (1, 2, 4, 8)
    ]
    process = start(tmp_path, cases, devices=8)
    check_cases(cases[:1], results := results_of(tmp_path, process, cases))
    for made in cases[1:]:
        reference = results[cases[0]["name"]]
        assert_same(results[made["name"]], reference, made["name"])


@tensorflow_only
def test_the_same_on_mirrored_devices(tmp_path):
    cases = [
        case(method, *devices, evaluate=method == "training")
        for method in ("training", "distillation")
        for devices in ((), ("mirrored", 2))
    ]
    process = start(tmp_path, cases, devices=2)
    results = results_of(tmp_path, process, cases)
    for one, two in (cases[:2], cases[2:]):
        assert_same(results[two["name"]], results[one["name"]], two["name"])
    assert np.ptp(results[cases[0]["name"]]["losses"]) > 0.01


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_together(folder, runs):
    """The results of processes that run at the same time, one case each."""
    processes = [
        start(folder / str(i), [made], **plan)
        for i, (made, plan) in enumerate(runs)
    ]
    try:
        return [
            results_of(folder / str(i), process, [made])[made["name"]]
            for i, (process, (made, _)) in enumerate(zip(processes, runs))
        ]
    finally:
        for process in processes:
            process.kill()


@jax_only
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data_parallel", "fully_sharded"])
def test_the_same_in_two_processes(tmp_path, layout):
    # Of weights that lie on both, neither can read all.
    more = {"unreadable": True} if layout == "fully_sharded" else {}
    together = case("training", layout, 4, evaluate=True, **more)
    address = f"127.0.0.1:{free_port()}"
    plan = dict(devices=2, processes=2, address=address)
    reference, *results = run_together(
        tmp_path,
        [
            (case("training", evaluate=True), dict(devices=1)),
            *((together, {**plan, "process": i}) for i in range(2)),
        ],
    )
    for i, result in enumerate(results):
        assert "images" in result
        assert_same(result, reference, f"process {i}")


@tensorflow_only
def test_what_keras_fails_under_is_refused(tiny_uvit):
    import tensorflow as tf

    with tf.distribute.MultiWorkerMirroredStrategy().scope():
        model = DiffusionModel(tiny_uvit())
        model.compile("sgd")
    with pytest.raises(ValueError, match="keras#20585"):
        model.fit(np.zeros((4, 8, 8, 1), "float32"), verbose=0)

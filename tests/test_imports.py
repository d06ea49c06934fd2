"""Rules of the house, read from the source (DESIGN.md)."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import keras_mscm

pytestmark = pytest.mark.once

PACKAGE = Path(keras_mscm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize(
    "path", FILES, ids=lambda path: str(path.relative_to(PACKAGE))
)

# Imports run downwards only, from a later floor to an earlier one.
FLOORS = [
    {"checks", "atomic_file"},
    {"functional", "backend", "preset_files"},
    {"conditioning"},
    {"networks"},
    {"schedules", "losses", "weightings", "samplers", "variance", "spaces"},
    {"teachers", "generator", "lora", "datasets", "metrics"},
    {"models"},
    {"adapters", "callbacks", "distribution", "presets"},
    {"plan"},
    {"__init__"},
]
# Where one may import its neighbours.
SIDE_BY_SIDE = 4
FRAMEWORKS = {"jax", "jaxlib", "tensorflow", "torch"}
# There tf.data reads files for every backend, as Pillow does elsewhere. Still
# only inside a function: nobody else needs TensorFlow, or waits for it.
READERS = {
    "datasets/tfds.py": {"tensorflow"},
    # A plan for TPUs is what JAX compiles, whichever the backend.
    "plan/compiler.py": {"jax"},
}
OPTIONAL = {
    *("PIL", "libtpu", "tensorflow_datasets", "diffusers", "flax"),
    *("keras_hub", "keras_cv"),
}


def floor(part):
    """The floor of a file or folder; of any other name, above the roof."""
    floors = (i for i, parts in enumerate(FLOORS) if part in parts)
    return next(floors, len(FLOORS))


def part_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def tree(path):
    return ast.parse(path.read_text())


def imported(path):
    """Full names of what a file imports, wherever in it."""
    yield from _names(ast.walk(tree(path)))


def imported_at_once(path):
    """Full names of what is imported with the file: not inside functions."""
    nodes = [tree(path)]
    for node in nodes:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes.extend(ast.iter_child_nodes(node))
    yield from _names(nodes)


def _names(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def may_import(part, name):
    """Whether a file of `part` may import `name`, a name in this package."""
    other = f"{name}.".split(".")[1]
    if other == part:
        return True
    if part == "networks":
        # Networks know nothing of diffusion. What a tensor is, they may; what
        # they are conditioned on; how a network is put on disk; and what the
        # backend does well.
        tensor = name == "keras_mscm.functional.process.Tensor"
        below = "checks", "conditioning", "preset_files", "backend"
        return tensor or other in below
    if part in FLOORS[SIDE_BY_SIDE]:
        return floor(other) <= SIDE_BY_SIDE
    return floor(other) < floor(part)


@every_file
def test_imports_run_downwards_only(path):
    part = part_of(path)
    assert floor(part) < len(FLOORS), f"{part} has no place in the house"
    for name in imported(path):
        if name.split(".")[0] == "keras_mscm":
            assert may_import(part, name), f"{part} imports {name}"


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("functional", "keras_mscm.schedules.NoiseSchedule"),
        ("functional", "keras_mscm.networks.UViT"),
        ("networks", "keras_mscm.functional.process.alpha"),
        ("backend", "keras_mscm.functional"),
        ("preset_files", "keras_mscm.networks.UViT"),
        ("preset_files", "keras_mscm.models.base.DenoisingModel"),
        ("samplers", "keras_mscm.models.base.DenoisingModel"),
        ("models", "keras_mscm.callbacks"),
        ("models", "keras_mscm.adapters"),
        ("datasets", "keras_mscm.models"),
        ("metrics", "keras_mscm.models.base.DenoisingModel"),
        ("spaces", "keras_mscm.models.base.DenoisingModel"),
        ("conditioning", "keras_mscm.spaces.Space"),
        ("callbacks", "keras_mscm.presets"),
        ("models", "keras_mscm.DiffusionModel"),
        ("models", "keras_mscm"),
    ],
)
def test_the_rule_sees_an_import_upwards(part, name):
    assert not may_import(part, name)


def roots(names):
    return {name.split(".")[0] for name in names}


@every_file
def test_only_backend_knows_the_frameworks(path):
    if path.parent != PACKAGE / "backend":
        reads_with = READERS.get(path.relative_to(PACKAGE).as_posix(), set())
        if path.parent == PACKAGE / "adapters":
            # Each wraps modules of one of them, for whoever has it.
            reads_with = FRAMEWORKS
        assert roots(imported(path)) & FRAMEWORKS <= reads_with
        assert not roots(imported_at_once(path)) & FRAMEWORKS


@every_file
def test_optional_packages_are_imported_where_they_are_used(path):
    assert not roots(imported_at_once(path)) & OPTIONAL


@every_file
def test_no_keras_internals(path):
    assert not [n for n in imported(path) if n.startswith("keras.src")]


@every_file
def test_no_assert_in_library_code(path):
    lines = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assert)
    ]
    assert not lines, f"assert in lines {lines}"


@every_file
def test_what_is_public_has_a_docstring(path):
    module = tree(path)
    assert ast.get_docstring(module), "no module docstring"
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            public = not node.name.startswith("_")
            assert not public or ast.get_docstring(node), node.name


def test_every_exported_class_and_function_has_a_docstring():
    modules = [keras_mscm] + [
        importlib.import_module(f"keras_mscm.{name}")
        for name in keras_mscm.__all__
        if inspect.ismodule(getattr(keras_mscm, name))
    ]
    for module in modules:
        names = getattr(module, "__all__", None) or [
            name for name in vars(module) if not name.startswith("_")
        ]
        for name in names:
            value = getattr(module, name)
            ours = getattr(value, "__module__", "").startswith("keras_mscm")
            if ours and (inspect.isclass(value) or inspect.isfunction(value)):
                assert value.__doc__, name


def test_all_is_what_there_is():
    for module in (keras_mscm, keras_mscm.functional):
        assert list(module.__all__) == sorted(module.__all__)
        for name in module.__all__:
            assert hasattr(module, name)

"""All that is public, and what each takes.

`names` walks the package, so that what is new can't be forgotten: a test fails
for what has no entry in `good_arguments`. Of an entry's arguments the signature
says the names and the annotations what they may be, but for a table in
`domains`.
"""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras_mscm
import keras_mscm.adapters
from benchmarks.bad_arguments.domains import DOMAINS, SPECIAL
from benchmarks.bad_arguments.values import Domain, of_annotation
from keras_mscm import backend

#: Public, but not called with arguments of one's own.
EXEMPT = {
    "datasets.EmojiImages": "a tuple that `emoji` returns",
    "distribution.UnevenModelParallel": "takes Keras' arguments",
    "presets.PRESETS": "a dictionary",
    "samplers.Denoise": "a type",
    "samplers.Integrator": "a type",
    "samplers.Variance": "a type",
    "samplers.StepSeed": "made of tensors, within a compiled loop",
}
#: Of another framework's modules, and so of one backend alone.
ELSEWHERE = {
    "adapters.TorchModule": "torch",
    "adapters.from_diffusers": "torch",
    "adapters.from_flax_linen": "jax",
    "adapters.from_flax_nnx": "jax",
}
#: Public, though no walk finds them: students refuse what others take.
BESIDES = {
    "MultistepConsistencyModel.generate",
    "ProgressiveDistillationModel.generate",
    "samplers.Sampler.__call__",
}
#: Methods that Keras or the package itself calls, with what it has checked, and
#: those of tensors, which are traced.
PROTOCOL = {
    *("absent", "advance", "build", "call", "cast", "changed", "check"),
    *("check_guidable", "take_logsnr_end"),
    *("clone", "compile_from_config", "compiled", "compute"),
    *("compute_loss", "decode", "draw_times", "warmup"),
    "relative_gap",
    *("default", "default_loss", "default_weighting", "denoise"),
    *("denoise_guided", "draw_normal", "draw_uniform", "during_fit"),
    *("encode", "entry", "features", "from_config", "get_compile_config"),
    *("get_config", "get_variable_layout", "init", "integrate", "keep"),
    *("load_own_variables", "looks_unsigned", "make_test_function"),
    *("make_train_function", "of_encoded", "predict", "read_images"),
    *("require_features", "reset_state", "result", "run", "sampled_with"),
    *("save_own_variables", "sets", "stage", "stage_steps", "step", "step_x"),
    *("steps_per_segment", "symbolic", "symbolic_inputs", "takes_pictures"),
    *("teach", "teacher_step", "test_step", "train_step", "trained_steps"),
    *("training_example", "update_features", "update_state", "x_var"),
    "x_variance",
}


#: What `tuple[Tensor, Tensor]` comes to.
TENSORS = of_annotation(tuple[Any, Any])


def _is_ours(thing: Any) -> bool:
    return (getattr(thing, "__module__", "") or "").startswith("keras_mscm")


def _public(module: types.ModuleType) -> list[str]:
    """`__all__`, or what a module defines itself."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    )


def _methods(cls: type, public: set[type]) -> Iterator[str]:
    """Those that no public base has already."""
    above = [base for base in cls.__mro__[1:] if base in public]
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        function = getattr(method, "__func__", method)
        if (
            not name.startswith(("_", "on_"))
            and name not in PROTOCOL
            and inspect.isfunction(function)
            and _is_ours(function)
            and all(
                inspect.getattr_static(base, name, None) is not method
                for base in above
            )
        ):
            yield name


def names() -> set[str]:
    """Everything public that can be called."""
    modules = {"": keras_mscm, "adapters.": keras_mscm.adapters}
    for name in keras_mscm.__all__:
        value = getattr(keras_mscm, name)
        if isinstance(value, types.ModuleType):
            modules[f"{name}."] = value
    found: dict[str, Any] = {}
    for prefix, module in modules.items():
        for name in _public(module):
            value = getattr(module, name)
            if not isinstance(value, types.ModuleType):
                found[prefix + name] = value
    found = {name: v for name, v in found.items() if name not in EXEMPT}
    classes = {name: v for name, v in found.items() if inspect.isclass(v)}
    public = set(classes.values())
    methods = {
        f"{name}.{method}"
        for name, cls in classes.items()
        for method in _methods(cls, public)
    }
    return {name for name in {*found, *methods, *BESIDES} if here(name)}


def here(name: str) -> bool:
    """Whether something public runs on this backend."""
    return ELSEWHERE.get(name, backend.NAME) == backend.NAME


@dataclasses.dataclass
class Entry:
    """Something public, and how to call it.

    Attributes:
        name: What it is.
        call: The function, class or bound method.
        good: Makes one set of good arguments.
        use: What is done with what comes, where an error may come late.
        domains: What each argument may be.
        every: Of the values that are always tried each how many-th is; more
            than 1 where a call takes long, and its arguments are another's.
    """

    name: str
    call: Callable
    good: Callable[[], dict[str, Any]]
    use: Callable[[Any], Any] | None
    domains: dict[str, Domain]
    every: int = 1

    def defaults(self) -> dict[str, Any]:
        """What arguments are, unless they are given."""
        found: dict[str, Any] = {}
        for function in _signatures(self.call):
            for key, value in inspect.signature(function).parameters.items():
                if value.default is not value.empty:
                    found.setdefault(key, value.default)
        return found


def _signatures(call: Callable) -> Iterator[Callable]:
    """All that says which arguments there are: of a class its bases too."""
    if not inspect.isclass(call):
        yield call
        return
    for base in call.__mro__:
        if "__init__" in vars(base) and _is_ours(base):
            yield base.__init__
            kinds = inspect.signature(base.__init__).parameters.values()
            if all(p.kind is not p.VAR_KEYWORD for p in kinds):
                return


def domains_of(
    name: str, *calls: Callable, without: tuple[str, ...] = ()
) -> dict[str, Domain]:
    """What each argument may be.

    Args:
        name: What is called.
        *calls: It, and what it hands its further keywords to.
        without: Arguments to leave out.

    Raises:
        LookupError: If nothing says it of an argument.
    """
    # A tensor has no value while it is traced, and it may be a Python number.
    # So what is annotated as one is exempt; words and shapes are not.
    traced = name.startswith(("functional.", "losses.", "weightings."))
    found: dict[str, Domain] = {}
    functions = [function for call in calls for function in _signatures(call)]
    for function in functions:
        hints = typing.get_type_hints(function)
        for parameter in inspect.signature(function).parameters.values():
            key = parameter.name
            stars = parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL
            if key in (*found, "self", *without) or parameter.kind in stars:
                continue
            said = of_annotation(hints.get(key, Any))
            if traced and (said is None or said == TENSORS):
                continue
            domain = SPECIAL.get((name, key)) or DOMAINS.get(key, said)
            if domain is None:
                raise LookupError(f"What may `{key}` of {name} be?")
            if parameter.default is None and (name, key) not in SPECIAL:
                kinds = domain.kinds | {"none"}
                domain = dataclasses.replace(domain, kinds=kinds)
            found[key] = domain
    return found


def entry_of(
    name: str,
    call: Callable,
    good: Callable[[], dict[str, Any]] = dict,
    use: Callable[[Any], Any] | None = None,
    more: Sequence[Callable] = (),
    domains: dict[str, Domain] | None = None,
    **kw: Any,
) -> Entry:
    """Of a function or a class; `more` takes its further keywords."""
    domains = domains_of(name, call, *more, **kw) | (domains or {})
    return Entry(name, call, good, use, domains)


def method_of(
    owner: str,
    name: str,
    cls: type,
    make: Callable[[], Any],
    good: Callable[[], dict[str, Any]] = dict,
    more: Sequence[Callable] = (),
    domains: dict[str, Domain] | None = None,
    skip: Sequence[str] = (),
    every: int = 1,
) -> Entry:
    """Of a class method, or of a method of what `make` gives."""
    static = inspect.getattr_static(cls, name)
    function = getattr(static, "__func__", static)
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def call(*args, **kwargs):
        return getattr(make(), name)(*args, **kwargs)

    without = (first, *skip)
    path = f"{owner}.{name}"
    found = domains_of(path, function, *more, without=without)
    return Entry(path, call, good, None, found | (domains or {}), every)

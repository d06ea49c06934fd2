"""Features to compare on, and the libraries to compare with."""

import importlib
import importlib.abc
import importlib.util
import sys
import types

import numpy as np
import pytest

PEERS = {
    "torchmetrics_fid": "torchmetrics.image.fid",
    "torchmetrics_kid": "torchmetrics.image.kid",
    "fidelity_fid": "torch_fidelity.metric_fid",
    "fidelity_kid": "torch_fidelity.metric_kid",
    "fidelity_prc": "torch_fidelity.metric_prc",
    "cleanfid": "cleanfid.fid",
}


class _Anything(type):
    """A class all of whose attributes are such classes."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        anything = _Anything("torchvision", (), {})
        module.__getattr__ = lambda name: getattr(anything, name)
        module.__version__ = "0"
        return module

    def exec_module(self, module):
        pass


@pytest.fixture(scope="session")
def peers():
    """The modules of `PEERS`.

    They import torchvision, of which there is no build for this CPU's PyTorch,
    for networks and transforms; their numerics, all that is used here, don't
    need it. Where it is missing, it is a stub while they are imported.
    """
    finder = _StubFinder()
    missing = importlib.util.find_spec("torchvision") is None
    if missing:
        sys.meta_path.append(finder)
    try:
        modules = {
            key: importlib.import_module(name) for key, name in PEERS.items()
        }
    finally:
        if missing:
            sys.meta_path.remove(finder)
            for name in [n for n in sys.modules if n.startswith("torchvision")]:
                del sys.modules[name]
    return types.SimpleNamespace(**modules)


def _features(num, width, rank, mean, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    # Spread over two orders of magnitude, as network features are.
    scale = np.logspace(0, -2, rank)
    mixing = rng.standard_normal((rank, width))
    vectors = rng.standard_normal((num, rank)) * scale
    return mean + spread * vectors @ mixing / np.sqrt(rank)


# Number of samples and of real images, width, rank, and mean of the features.
CASES = {
    "plain": (400, 500, 16, 16, 0.0),
    "few samples": (12, 20, 64, 64, 0.5),
    "rank-deficient": (300, 200, 48, 5, 1.0),
    "far from zero": (200, 300, 16, 16, 100.0),
    "one feature": (50, 60, 1, 1, 2.0),
}


@pytest.fixture(params=CASES, ids=[name.replace(" ", "_") for name in CASES])
def features(request):
    """Features of samples and of real images, float64."""
    num, num_real, width, rank, mean = CASES[request.param]
    return (
        _features(num, width, rank, mean, seed=1, spread=1.3),
        _features(num_real, width, rank, mean, seed=2),
    )


@pytest.fixture
def make_reference():
    """A factory of references of given features."""
    from keras_mscm.metrics import FeatureExtractor, Reference

    def make(features, **kw):
        images = np.zeros((len(features), 1, 1, 1), "float32")
        extractor = FeatureExtractor(
            lambda batch: features, name="given", batch_size=len(features)
        )
        return Reference(images, extractor, name="given", **kw)

    return make

"""How hypothesis runs here: always the same examples, nothing kept on disk."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "keras_mscm",
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    # Every test has a fixture that seeds; examples needn't be seeded apart.
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("keras_mscm")

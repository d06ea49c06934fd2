"""Which framework runs underneath Keras."""

import os
import subprocess
import sys


def test_another_backend_is_refused():
    run = subprocess.run(
        [sys.executable, "-c", "import keras_mscm"],
        env={**os.environ, "KERAS_BACKEND": "numpy"},
        capture_output=True,
        text=True,
    )
    assert run.returncode
    assert "KERAS_BACKEND=numpy" in run.stderr
    assert "'jax', 'tensorflow' and 'torch'" in run.stderr

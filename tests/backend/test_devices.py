"""Who trains one model together."""

import socket
import subprocess
import sys

import pytest

from keras_mscm import backend


def test_process():
    assert backend.process() == (0, 1)


TWO_PROCESSES = """if True:
    import sys
    import keras
    from keras_mscm import backend
    assert backend.process() == (0, 1)
    keras.distribution.initialize(sys.argv[1], 2, int(sys.argv[2]))
    print(*backend.process())
"""


@pytest.mark.skipif(backend.NAME != "jax", reason="JAX has processes")
def test_process_of_two():
    """And asking before they know of each other gets in nobody's way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, address, str(i)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    # The last words: Gloo may say something of its own before.
    told = [run.communicate(timeout=120)[0].split()[-2:] for run in runs]
    assert told == [["0", "2"], ["1", "2"]]

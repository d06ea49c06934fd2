"""One measurement, one JSON object on a line of its own."""

import argparse
import json

import keras


def emit(**row):
    """Prints a row; numbers to four digits."""
    row = {"backend": keras.backend.backend(), **row}
    for name, value in row.items():
        if isinstance(value, float):
            row[name] = float(f"{value:.4g}")
    print(json.dumps(row), flush=True)


def main(measure):
    """Runs a part from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="for the guard")
    measure(parser.parse_args().quick)

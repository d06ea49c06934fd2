"""An experiment from settings to results: whole, resumed, and read."""

import json
import tomllib

import keras
import numpy as np
import pytest

from benchmarks import data, plots, report, run
from benchmarks.verdicts import verdicts
from keras_mscm import DiffusionModel, UViT

pytestmark = pytest.mark.once

SETTINGS = """
data = "tiny"
tables = [1, 2, 3, 4]
curves = true
judge_epochs = 1
[network]
patch_size = 4
widths = [16]
depths = [1]
attention = true
head_width = 16
embedding_width = 16
[cpu]
seeds = [0]
num_samples = 20
curve_steps = [8, 512]
anneal = [8, 16]
constant_teacher_steps = [16, 32, 64]
progressive_start = 16
further = [{ student_steps = 2, teacher_steps = [4, 8], iterations = 30 }]
teacher = { iterations = 20, batch_size = 4, learning_rate = 1e-3 }
student = { iterations = 20, batch_size = 4, learning_rate = 1e-3 }
[gpu]
seeds = [0]
"""
TASKS = run.tasks
TINY = tomllib.loads(SETTINGS)["network"]
TEACHER = "models/tiny_cpu_teacher_0.keras"


def tiny_data(name="tiny"):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 1), dtype="uint8")
    labels = np.arange(40, dtype="int32") % 4
    return data.Data(images[:24], labels[:24], images[24:], labels[24:])


def some_tasks(settings):
    """One of each kind, instead of the hundred there are."""
    kept, wanted = (
        [],
        {
            ("real", None),
            ("curve", "ddim"),
            ("curve", "heun"),
            ("student", "distillation"),
            ("student", "progressive"),
            ("further", "distillation"),
            ("time", None),
        },
    )
    for key, method in TASKS(settings):
        kind = key["kind"], key.get("method") or key.get("sampler")
        grid = "karras" if kind[1] == "heun" else "cosine"
        if kind in wanted and key.get("grid", grid) == grid:
            wanted.remove(kind)
            kept.append((key, method))
    return kept


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder after a run that was interrupted and begun again."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "settings").mkdir()
    (folder / "settings" / "tiny.toml").write_text(SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "FOLDER", folder)
        patch.setattr(run, "MODELS", folder / "models")
        patch.setattr(plots, "MODELS", folder / "models")
        patch.setattr(report, "FOLDER", folder)
        patch.setattr(run, "BATCH", 20)
        patch.setattr(data, "load", tiny_data)
        tasks = some_tasks(run.read_settings("tiny", "cpu"))
        patch.setattr(run, "tasks", lambda settings: tasks[:2])
        run.run("tiny", "cpu")
        first = run.read_results("tiny")
        teacher = (folder / TEACHER).read_bytes()
        patch.setattr(run, "tasks", lambda settings: tasks)
        run.run("tiny", "cpu")
        yield folder, tasks, first, teacher


def test_a_run_goes_on_where_it_was(ran):
    folder, tasks, first, teacher = ran
    kinds = {key["kind"] for key, _ in tasks}
    assert kinds == {"real", "curve", "student", "further", "time"}
    rows = run.read_results("tiny")
    assert rows[: len(first)] == first
    assert len(rows) == len(tasks)
    assert (folder / TEACHER).read_bytes() == teacher
    measured = [row for row in rows if row["kind"] != "time"]
    assert all(np.isfinite(row["frechet_distance"]) for row in measured)
    hashes = {row["reference_hash"] for row in measured}
    assert len(hashes) == 1


def test_a_training_that_was_cut_off_goes_on(ran, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "MODELS", tmp_path)
    settings = tomllib.loads(SETTINGS)
    experiment = run.Experiment("cut", settings | settings["cpu"], 0)

    def cut_off(epoch, logs):
        if epoch == 3:
            raise KeyboardInterrupt

    def trained(name, *callbacks):
        keras.utils.set_random_seed(0)
        network = UViT(image_shape=(8, 8, 1), num_classes=4, seed=1, **TINY)
        model = DiffusionModel(network, seed=1)
        budget = settings["cpu"]["teacher"]
        seconds = experiment.train(model, budget, name, callbacks)
        experiment.keep(model, name)
        return seconds, model.get_weights()

    stop = keras.callbacks.LambdaCallback(on_epoch_end=cut_off)
    with pytest.raises(KeyboardInterrupt):
        trained("in_two", stop)
    assert not (tmp_path / "in_two.keras").exists()
    seconds, weights = trained("in_two")
    assert seconds is None
    seconds, expected = trained("in_one")
    assert seconds > 0
    for ours, theirs in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    files = sorted(path.name for path in tmp_path.glob("in_*"))
    assert files == ["in_one.keras", "in_two.keras"]


def test_the_tables_need_each_student_once():
    settings = tomllib.loads(SETTINGS)
    keys = [key for key, _ in TASKS({**settings, **settings["cpu"]})]
    written = [json.dumps(key, sort_keys=True) for key in keys]
    assert len(set(written)) == len(written)
    of = [key for key in keys if key["kind"] == "student"]
    # Table 1: CT and CD at 5; 2: 3 at 4; 3: PD at 4; 4: DDIM at 4.
    assert len(of) == 10 + 12 + 4 + 4


class Known(report.Results):
    """Results with the given distances of CD students."""

    def __init__(self, students, rows=()):
        self.students = students
        self.settings = {"constant_teacher_steps": [16], "anneal": [8, 32]}
        self.rows = [dict(kind="curve", seed=0, frechet_distance=1.0), *rows]

    def student(self, k, method="distillation", integrator="addim", steps=0):
        return self.students.get((k, method, integrator, steps), {})


def cd(k):
    return k, "distillation", "addim", 0


def read(*known):
    """The reading of each claim."""
    return {claim: said for claim, _, said in verdicts(Known(*known))}


def test_verdicts_can_confirm_and_contradict():
    good = read({cd(1): {0: 2.0}, cd(8): {0: 1.05}})
    assert good["CD at K = 8 within 1.07 of the teacher's best"] == "confirmed"
    assert good["CD: each K better than the K below"] == "confirmed"
    bad = read({cd(1): {0: 1.0}, cd(8): {0: 1.2}})
    told = bad["CD at K = 8 within 1.07 of the teacher's best"]
    assert told == "not confirmed"
    assert bad["CD: each K better than the K below"] == "contradicted"

    ddim = 8, "distillation", "ddim", 0
    claim = "K = 8: aDDIM the better teacher"
    assert read({cd(8): {0: 1.0}, ddim: {0: 2.0}})[claim] == "confirmed"
    assert read({cd(8): {0: 2.0}, ddim: {0: 1.0}})[claim] == "contradicted"

    constant = 1, "distillation", "addim", 16
    claim = "K = 1: teacher steps from {} to {} better than constant".format
    told = read({cd(1): {0: 1.0}, constant: {0: 2.0}})
    assert told[claim(8, 32)] == "confirmed"
    told = read({cd(1): {0: 2.0}, constant: {0: 1.0}})
    assert told[claim(8, 32)] == "contradicted"
    further = dict(kind="further", seed=0, student_steps=1)
    rows = [
        further | {"teacher_steps": [2, 8], "frechet_distance": 0.5},
        further | {"teacher_steps": 4, "frechet_distance": 0.7},
        further | {"teacher_steps": 0, "iterations": 9, "frechet_distance": 0},
    ]
    told = read({cd(1): {0: 0.8}, constant: {0: 1.0}}, rows)
    assert told[claim(2, 8)] == "confirmed"
    assert told[claim(8, 32)] == "not confirmed"
    known = Known({cd(1): {0: 0.8, 1: 1.0}, constant: {0: 1.0}}, rows)
    numbers = {claim: said for claim, said, _ in verdicts(known)}
    expected = "0.5000; times that, constant 4: 1.400, 16: 2.000"
    assert numbers[claim(2, 8)] == expected


def test_verdicts_of_several_seeds():
    teachers = [
        dict(kind="curve", seed=seed, frechet_distance=distance)
        for seed, distance in ((1, 2.0), (2, 4.0))
    ]
    near = "CD at K = 8 within 1.07 of the teacher's best"
    ratios = {0: 1.0, 1: 2.1, 2: 4.4}  # 1, 1.05 and 1.1 of each one's teacher
    assert read({cd(8): ratios}, teachers)[near] == "confirmed"
    ratios[2] = 4.8
    assert read({cd(8): ratios}, teachers)[near] == "not confirmed"

    # Only seeds that have both are compared, each with itself.
    ddim = 8, "distillation", "ddim", 0
    claim = "K = 8: aDDIM the better teacher"
    for addim, said in (
        ({0: 1.0, 1: 5.0}, "confirmed"),
        ({1: 5.0, 2: 3.0}, "not confirmed"),
        ({1: 7.0, 2: 9.0}, "contradicted"),
    ):
        known = {cd(8): addim, ddim: {0: 2.0, 1: 6.0, 2: 1.0}}
        assert read(known, teachers)[claim] == said
    told = {
        claim: numbers for claim, numbers, _ in verdicts(Known(known, teachers))
    }
    assert (
        told[claim]
        == "aDDIM 8.0000 (7.0000 to 9.0000), DDIM 3.5000 (1.0000 to 6.0000)"
    )


def test_a_curve_is_of_the_seeds_that_have_it_whole():
    curve = dict(kind="curve", sampler="ddim", grid="cosine")
    rows = [
        curve | dict(seed=seed, num_steps=n, frechet_distance=distance)
        for seed, n, distance in ((1, 8, 8.0), (1, 16, 2.0), (2, 8, 5.0))
    ]
    assert Known({}, rows).curve("ddim") == {8: {1: 4.0}, 16: {1: 1.0}}
    assert Known({}, rows).curve("heun") == {}


def test_report_makes_tables_and_plots(ran):
    folder, *_ = ran
    path = folder / "results" / "tiny.jsonl"
    lines = path.read_text().splitlines()
    # Times were measured last, as of an experiment without curves.
    lines.sort(key=lambda line: '"time"' in line)
    path.write_text("\n".join([*lines, ""]))
    readme = folder / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")

    report.main()

    text = readme.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    for number in (1, 2, 3, 4):
        assert f"### Table {number}" in text
    for name in ("evaluations", "samplers", "time"):
        assert f"results/tiny_cpu_{name}.png" in text
        assert (folder / "results" / f"tiny_cpu_{name}.png").is_file()
    # What the table says is what was measured.
    row = next(
        r
        for r in run.read_results("tiny")
        if r["kind"] == "student" and r["method"] == "progressive"
    )
    best = min(
        r["frechet_distance"]
        for r in run.read_results("tiny")
        if r["kind"] == "curve"
    )
    assert f"{row['frechet_distance'] / best:.3f}" in text
    assert "| 2 | 4 to 8 | 30 |" in text

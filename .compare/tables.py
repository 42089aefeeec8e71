"""Tables 1 and 2 of the paper in miniature, on the toy: what each part of the method does, with error bars.

The results in tables.jsonl are of the former toy, which each machine made anew; see README.md.

    python .compare/tables.py                                 tables of the results in .compare/tables.jsonl
    python .compare/tables.py --results runs/tables.jsonl     makes them anew: 160 trainings of about a minute

A run that is stopped continues: a training whose line is in the results is not done again. The seed sets the
order of questions and all sampling; student, experts, cached answers and held-out questions stay the same.
"""

import argparse
import itertools
import math
import random
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".toy")]

import make

import tgrl

WORLD = tgrl.TOY_WORLD
# Table 1: what is changed, and the paper's average over its five benchmarks, of a 7B student trained on Geo3K
VARIANTS = {
    "TGRL": ({}, {"grpo": 58.46, "dapo": 59.51}),
    "w/o Filter": ({"filter": False}, {"grpo": 57.50, "dapo": 57.93}),
    "w/o Reweight": ({"reweight": False}, {"grpo": 57.03, "dapo": 57.50}),
    "w/o both": ({"filter": False, "reweight": False}, {}),  # not in the paper
    "w/o Expert": ({"n_off": 0, "n_on": 8}, {"grpo": 57.16, "dapo": 56.92}),
}
# Table 2: the paper's averages by sharpness
SHARPNESS = {
    "grpo": {1: 57.88, 4: 58.12, 5: 58.46, 7: 57.36, 10: 57.37, 13: 57.33, 14: None, 15: 57.68},
    "dapo": {1: 57.73, 4: 57.85, 5: None, 7: 57.94, 10: 58.61, 13: 58.53, 14: 59.51, 15: 57.88},
}
DEFAULT = {"grpo": 5, "dapo": 14}
EXPERTS = ("usual", "poor")  # the toy's own, and one that takes each right rule with 0.82
SEEDS = range(1, 6)
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 %, by number of seeds


def cells():
    """algorithm, variant, expert, sharpness of each training; what the tables share is there once."""
    for algorithm, default in DEFAULT.items():
        for variant, expert in itertools.product(VARIANTS, EXPERTS):
            if variant != "w/o Expert" or expert == "usual":
                yield algorithm, variant, expert, default
        for sharpness in SHARPNESS[algorithm]:
            if sharpness != default:
                yield algorithm, "TGRL", "usual", sharpness


def make_poor_expert(folder: Path):
    rng, (model, processor) = random.Random(0), tgrl.load_model(f"{WORLD}/expert")
    encoder = tgrl.Encoder(processor, model, tgrl.Options(**tgrl.TOY))
    lessons = make.make_lessons(rng, encoder)
    make.warm_up(model, encoder, lessons, rng, p_right=0.82, steps=100, lr=1e-3)
    processor.save_pretrained(folder / "poor")
    model.save_pretrained(folder / "poor")


def make_world(folder: Path):
    """The poor expert, and a cache of each expert's answers."""
    if not (folder / "poor/model.safetensors").exists():
        make_poor_expert(folder)
    for expert, model in (("usual", WORLD / "expert"), ("poor", folder / "poor")):
        cache = dict(experts=f"{folder}/{expert}.jsonl", samples=2, data=f"{WORLD}/train.parquet")
        tgrl.make_experts(tgrl.Experts(model=str(model), **cache, **tgrl.TOY))


def train(folder: Path, cell: tuple, seed: int) -> float:
    """Accuracy of one training, with the settings of tgrl.toy; evaluated before it and at its end alone."""
    algorithm, variant, expert, sharpness = cell
    shared = tgrl.TOY | dict(data=f"{WORLD}/train.parquet", val_data=f"{WORLD}/test.parquet", every=10**6)
    shared |= dict(steps=32, lr=4e-4, questions_per_rollout=24, questions_per_update=24, checkpointing=False)
    shared |= dict(model=f"{WORLD}/student", experts=f"{folder}/{expert}.jsonl", out=f"{folder}/run")
    shared |= dict(algorithm=algorithm, sharpness=sharpness, seed=seed)
    shared["max_draws"] = 2 if algorithm == "dapo" else 1
    shutil.rmtree(shared["out"], ignore_errors=True)
    return tgrl.train(tgrl.Train(**shared | VARIANTS[variant][0]))["accuracy"]


def mean_and_interval(values: list[float]) -> str:
    """The interval is that of the mean, of 95 %, by Student's t."""
    if len(values) < 2:
        return f"{values[0]:5.1f} ±    –" if values else ""
    half = STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):5.1f} ± {half:4.1f}"


def print_table(title: str, against: str, rows: dict):
    """rows: name -> (accuracy in % by seed, the paper's number or None)."""
    print(f"\n{title + ' expert':32} accuracy    {'against ' + against:>16}   paper's average")
    whole = rows[against][0]
    for name, (some, paper) in rows.items():
        changes = [some[seed] - whole[seed] for seed in sorted(some.keys() & whole.keys())]
        versus = mean_and_interval(changes) if name != against else ""
        accuracy, paper = mean_and_interval(list(some.values())), f"{paper:.2f}" if paper else "–"
        print(f"  {name:26} {accuracy:>16}  {versus:>16}   {paper:>8}")


def print_tables(results: dict):
    for algorithm, expert in itertools.product(DEFAULT, EXPERTS):
        rows = {}
        for variant, (_, paper) in VARIANTS.items():
            cell = algorithm, variant, "usual" if variant == "w/o Expert" else expert, DEFAULT[algorithm]
            rows[variant] = results.get(cell, {}), paper.get(algorithm)
        print_table(f"Table 1, {algorithm.upper()}, {expert}", "TGRL", rows)
    for algorithm, papers in SHARPNESS.items():
        rows = {}
        for sharpness, paper in papers.items():
            rows[f"beta {sharpness}"] = results.get((algorithm, "TGRL", "usual", sharpness), {}), paper
        print_table(f"Table 2, {algorithm.upper()}, usual", f"beta {DEFAULT[algorithm]}", rows)


def read_results(path: Path) -> dict:
    """cell -> accuracy in % by seed."""
    results = {}
    for record in tgrl.read_records(path) if path.exists() else []:
        results.setdefault(tuple(record["cell"]), {})[record["seed"]] = 100 * record["accuracy"]
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kept = Path(__file__).with_name("tables.jsonl")
    parser.add_argument("--results", type=Path, default=kept, help="one line for each training")
    parser.add_argument("--folder", type=Path, default=Path("runs/tables"), help="models and caches")
    parser.add_argument("--trainings", type=int, metavar="N", help="stop after so many")
    options = parser.parse_args()
    results = read_results(options.results)
    todo = [(seed, cell) for seed in SEEDS for cell in cells() if seed not in results.get(cell, {})]
    if todo:
        make_world(options.folder)
    for number, (seed, cell) in enumerate(todo[: options.trainings], 1):
        print(f"\n{number} of {len(todo)}: {cell}, seed {seed}", flush=True)
        accuracy = train(options.folder, cell, seed)
        tgrl.append_records(options.results, [{"cell": cell, "seed": seed, "accuracy": accuracy}])
    print_tables(read_results(options.results))


if __name__ == "__main__":
    main()

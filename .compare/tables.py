"""Tables 1 and 2 of the paper in miniature, on the toy: what each part of the method does, with error bars.

    python .compare/tables.py                                 prints the tables of the results kept in .compare/tables.jsonl
    python .compare/tables.py --results runs/tables.jsonl     makes them anew: 128 trainings of about a minute on one core

A run that is stopped continues: a training whose line is in the results is not done again. The seed sets the order of the
questions and all sampling of a training; student, experts, their cached answers and the held-out questions are the same in all.
"""

import argparse
import dataclasses
import itertools
import json
import math
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tgrl

VARIANTS = {  # Table 1: what is changed, and the paper's average over its five benchmarks, of a 7B student trained on Geo3K
    "TGRL": ({}, {"grpo": 58.46, "dapo": 59.51}),
    "w/o Filter": ({"filter": False}, {"grpo": 57.50, "dapo": 57.93}),
    "w/o Reweight": ({"reweight": False}, {"grpo": 57.03, "dapo": 57.50}),
    "w/o both": ({"filter": False, "reweight": False}, {}),  # not in the paper
    "w/o Expert": ({"n_off": 0, "n_on": 8}, {"grpo": 57.16, "dapo": 56.92}),
}
SHARPNESS = {  # Table 2
    1: {"grpo": 57.88, "dapo": 57.73}, 4: {"grpo": 58.12, "dapo": 57.85}, 5: {"grpo": 58.46}, 7: {"grpo": 57.36, "dapo": 57.94},
    10: {"grpo": 57.37, "dapo": 58.61}, 13: {"grpo": 57.33, "dapo": 58.53}, 14: {"dapo": 59.51}, 15: {"grpo": 57.68, "dapo": 57.88},
}  # fmt: skip
DEFAULT = {"grpo": 5, "dapo": 14}
EXPERTS = {"usual": None, "poor": 0.82}  # the toy's own, and one warmed up to take each right rule with this probability
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 %, by number of seeds


SEEDS = range(1, 5)


def cells():
    """The names of all cells of both tables; what the tables share is there once."""
    for algorithm in ("grpo", "dapo"):
        for variant, expert in itertools.product(VARIANTS, EXPERTS):
            if variant != "w/o Expert" or expert == "usual":
                yield algorithm, variant, expert, DEFAULT[algorithm]
        for sharpness in SHARPNESS:
            if sharpness != DEFAULT[algorithm]:
                yield algorithm, "TGRL", "usual", sharpness


def make_world(folder: Path) -> dict[str, str]:
    """The toy's world, the poor expert, and the answers of both -> cache by expert."""
    cfg = tgrl.Config(**tgrl.TOY)
    tgrl.toy_world(folder / "world", cfg)
    for name, p_right in EXPERTS.items():
        model = folder / "world" / ("expert" if p_right is None else name)
        if not model.exists():
            rng = random.Random(0)
            base, processor = tgrl.load_model(folder / "world" / "base")
            encoder = tgrl.Encoder(processor, base, cfg)
            pool = tgrl.toy_pool(encoder, [(rng.choice(tgrl.TOY_SIDES), rng.choice(tgrl.TOY_SIDES)) for _ in range(400)], rng)
            tgrl.teach(tgrl.Policy(base, encoder.unwritable), encoder, pool, p_right, 60, 1e-3, rng, f"warm-up, {name} expert")
            processor.save_pretrained(model.with_suffix(".tmp"))
            base.save_pretrained(model.with_suffix(".tmp"))
            model.with_suffix(".tmp").rename(model)
        tgrl.make_experts(dataclasses.replace(cfg, model=str(model), data=f"{folder}/world/train.parquet", experts=f"{folder}/{name}.jsonl"))
    return {name: f"{folder}/{name}.jsonl" for name in EXPERTS}


def train(folder: Path, cache: str, algorithm: str, variant: str, sharpness: float, seed: int) -> dict:
    options = tgrl.TOY | dict(algorithm=algorithm, sharpness=sharpness, seed=seed, experts=cache, model=f"{folder}/world/student", eval_every=10**6,
                              data=f"{folder}/world/train.parquet", val_data=f"{folder}/world/test.parquet", out=f"{folder}/run", tracker="none")  # fmt: skip
    shutil.rmtree(options["out"], ignore_errors=True)
    start = time.perf_counter()
    trainer = tgrl.Trainer(tgrl.Config(**options | VARIANTS[variant][0]))
    accuracy = trainer.fit()["accuracy"]
    return {"accuracy": accuracy, "seconds": round(time.perf_counter() - start, 1)}


def interval(values: list[float]) -> float:
    """Half of the 95 % interval of a mean, by Student's t."""
    return STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def told(values: list[float]) -> str:
    return f"{statistics.fmean(values):5.1f} ± {interval(values):4.1f}"


def tables(results: dict):
    """results: cell -> accuracy in % by seed."""
    change = lambda some, other: told([some[seed] - other[seed] for seed in sorted(some.keys() & other.keys())])  # noqa: E731
    for algorithm in ("grpo", "dapo"):
        for expert in EXPERTS:
            print(f"\nTable 1, {algorithm.upper()}, {expert} expert      accuracy      against TGRL     paper's average")
            whole = results[algorithm, "TGRL", expert, DEFAULT[algorithm]]
            for variant in VARIANTS:
                some = results[algorithm, variant, "usual" if variant == "w/o Expert" else expert, DEFAULT[algorithm]]
                versus = change(some, whole) if variant != "TGRL" else ""
                print(f"  {variant:26} {told(list(some.values())):>16}  {versus:>16}   {VARIANTS[variant][1].get(algorithm, math.nan):8.2f}".replace("nan", "  –"))
    for algorithm in ("grpo", "dapo"):
        print(f"\nTable 2, {algorithm.upper()}, usual expert      accuracy      against beta {DEFAULT[algorithm]}   paper's average")
        whole = results[algorithm, "TGRL", "usual", DEFAULT[algorithm]]
        for sharpness, paper in SHARPNESS.items():
            some = results[algorithm, "TGRL", "usual", sharpness]
            versus = change(some, whole) if sharpness != DEFAULT[algorithm] else ""
            print(f"  beta {sharpness:<21} {told(list(some.values())):>16}  {versus:>16}   {paper.get(algorithm, math.nan):8.2f}".replace("nan", "  –"))


def draw(results: dict, path: Path):
    """Each training a dot, their mean and its 95 % interval beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 6), dpi=150, layout="constrained")
    axes = figure.subplots(2, 2, width_ratios=[1, 1.3])
    for row, algorithm in enumerate(("grpo", "dapo")):
        default = DEFAULT[algorithm]
        left = {(v, e): results.get((algorithm, v, "usual" if v == "w/o Expert" else e, default), {}) for v, e in itertools.product(VARIANTS, EXPERTS)}
        right = {b: results.get((algorithm, "TGRL", "usual", b), {}) for b in SHARPNESS}
        for expert, color, shift in (("usual", "#0072B2", -0.17), ("poor", "#D55E00", 0.17)):
            for place, variant in enumerate(VARIANTS):
                if variant != "w/o Expert" or expert == "usual":
                    dots(axes[row, 0], place + shift * (variant != "w/o Expert"), left[variant, expert], color if variant != "w/o Expert" else "#5b6470")
            axes[row, 0].plot([], [], "o", color=color, label=f"{expert} expert")
        for place, (sharpness, some) in enumerate(right.items()):
            dots(axes[row, 1], place, some, "#0072B2" if sharpness != default else "#009E73")
        axes[row, 0].set(title=f"TGRL-{algorithm.upper()}: parts left out", xticks=range(5), xticklabels=["whole", *list(VARIANTS)[1:]], ylabel="held-out accuracy, %")
        axes[row, 1].set(title=rf"TGRL-{algorithm.upper()}: $\beta$ of Eq. 20 (green: the paper's)", xticks=range(8), xticklabels=list(SHARPNESS))
        for ax in axes[row]:
            ax.set_ylim(0, 100)
            ax.grid(axis="y", color="#e6e9ed")
            ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, facecolor="white")


def dots(axes, place: float, by_seed: dict, color: str):
    values = list(by_seed.values())
    axes.plot([place - 0.06] * len(values), values, "o", color=color, alpha=0.35, markersize=4, markeredgewidth=0)
    if len(values) > 1:
        axes.errorbar(place + 0.06, statistics.fmean(values), interval(values), fmt="o", color=color, capsize=3, markersize=5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / ".compare/tables.jsonl", help="one line a training; those in it are not done again")
    parser.add_argument("--folder", type=Path, default=Path("runs/tables"), help="models, caches, the training under way")
    parser.add_argument("--picture", type=Path, default=Path("runs/tables.png"))
    args = parser.parse_args()
    lines = args.results.read_text().split("\n")[:-1] if args.results.exists() else []  # the last is empty, or torn
    results = {}
    for record in map(json.loads, lines):
        results.setdefault(tuple(record["cell"]), {})[record["seed"]] = 100 * record["accuracy"]
    todo = [(seed, cell) for seed in SEEDS for cell in cells() if seed not in results.get(cell, {})]
    caches = make_world(args.folder) if todo else {}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text("".join(line + "\n" for line in lines))
    for number, (seed, cell) in enumerate(todo, 1):
        algorithm, variant, expert, sharpness = cell
        print(f"\n{number} of {len(todo)}: {algorithm} {variant}, {expert} expert, beta {sharpness}, seed {seed}", flush=True)
        record = {"cell": cell, "seed": seed, **train(args.folder, caches[expert], algorithm, variant, sharpness, seed)}
        with open(args.results, "a") as file:
            file.write(json.dumps(record) + "\n")
        results.setdefault(cell, {})[seed] = 100 * record["accuracy"]
    tables(results)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(results, args.picture)
    print(f"\nwrote {args.picture}")


if __name__ == "__main__":
    main()

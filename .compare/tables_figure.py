"""The figure to tables.py: each training a dot, their mean and its 95 % interval beside them.

python .compare/tables_figure.py --results runs/tables.jsonl        writes runs/tables.png
"""

import argparse
import math
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from tables import DEFAULT, SHARPNESS, STUDENT_T, VARIANTS, read_results


def dots(axes, place: float, by_seed: dict, color: str):
    values = list(by_seed.values())
    small = dict(alpha=0.35, markersize=4, markeredgewidth=0)
    axes.plot([place - 0.06] * len(values), values, "o", color=color, **small)
    if len(values) > 1:
        half = STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
        mean = statistics.fmean(values)
        axes.errorbar(place + 0.06, mean, half, fmt="o", color=color, capsize=3, markersize=5)


def draw_parts(axes, algorithm: str, results: dict):
    default = DEFAULT[algorithm]
    for expert, color, shift in (("usual", "#0072B2", -0.17), ("poor", "#D55E00", 0.17)):
        for place, variant in enumerate(VARIANTS):
            if variant != "w/o Expert":
                dots(axes, place + shift, results.get((algorithm, variant, expert, default), {}), color)
        axes.plot([], [], "o", color=color, label=f"{expert} expert")
    place = list(VARIANTS).index("w/o Expert")
    dots(axes, place, results.get((algorithm, "w/o Expert", "usual", default), {}), "#5b6470")
    names = ["whole", *list(VARIANTS)[1:]]
    axes.set(xticks=range(len(names)), xticklabels=names, ylabel="held-out accuracy, %")
    axes.set(title=f"TGRL-{algorithm.upper()}: parts left out")
    axes.legend(frameon=False, fontsize=8)


def draw_sharpness(axes, algorithm: str, results: dict):
    papers = SHARPNESS[algorithm]
    for place, sharpness in enumerate(papers):
        color = "#009E73" if sharpness == DEFAULT[algorithm] else "#0072B2"
        dots(axes, place, results.get((algorithm, "TGRL", "usual", sharpness), {}), color)
    axes.set(xticks=range(len(papers)), xticklabels=list(papers))
    axes.set(title=rf"TGRL-{algorithm.upper()}: $\beta$ of Eq. 20 (green: the paper's)")


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    kept = Path(__file__).with_name("tables.jsonl")
    parser.add_argument("--results", type=Path, default=kept, help="one line for each training")
    parser.add_argument("--picture", type=Path, default=Path("runs/tables.png"), help="file to write")
    options = parser.parse_args()
    results = read_results(options.results)
    figure = Figure(figsize=(10.5, 6), dpi=150, layout="constrained")
    rows = figure.subplots(2, 2, width_ratios=[1, 1.3])
    for (left, right), algorithm in zip(rows, DEFAULT, strict=True):
        draw_parts(left, algorithm, results)
        draw_sharpness(right, algorithm, results)
        for axes in (left, right):
            axes.set_ylim(0, 100)
            axes.grid(axis="y", color="#e6e9ed")
            axes.spines[["top", "right"]].set_visible(False)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture, facecolor="white")
    print(f"wrote {options.picture}")


if __name__ == "__main__":
    main()

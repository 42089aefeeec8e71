"""What multiplies the gradient of an expert's token, against its probability under the student.

    python tgrl.py
    python .compare/coefficient.py runs/toy        prints counts and writes runs/coefficient.png

The gradient weight of a token is -dL/dlog(pi) of a loss L, for an advantage of 1. Left: by formula. Right:
the tokens of all right answers of the toy's expert under its untrained student, by functions of tgrl.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from matplotlib.figure import Figure

import tgrl

COLORS = {1.0: "#56B4E9", 5.0: "#0072B2", 14.0: "#D55E00"}  # by sharpness


def real_tokens(toy: Path, reward: float):
    """-> logp, behavior_logp, mask [N, T] of the expert's answers with this reward."""
    model, processor = tgrl.load_model(str(tgrl.TOY_WORLD / "student"))
    encoder = tgrl.Encoder(processor, model, tgrl.Options(**tgrl.TOY))
    problems = tgrl.load_problems(f"{tgrl.TOY_WORLD}/train.parquet", "train", encoder)
    experts = tgrl.read_cache(toy / "experts.jsonl", problems)
    groups = []
    for problem in problems:
        answers = [t for t in experts[problem.id] if t.reward == reward]
        if answers:
            groups.append(tgrl.Group(problem, encoder(problem), answers))
    scored = list(tgrl.score(tgrl.Policy(model, encoder.unwritable), groups, 16))
    logp = tgrl.pad(logp for _, logp in scored)
    behavior_logp = tgrl.pad(t.behavior_logp for t, _ in scored)
    return logp, behavior_logp, tgrl.pad([True] * len(t.ids) for t, _ in scored)


def coefficients(logp, behavior_logp, mask, sharpness: float | None):
    """r~ of expert answers that pass the filter; sharpness None: rho alone."""
    yes = torch.ones(len(mask), dtype=torch.bool)
    return tgrl.unified_coefficient(logp, behavior_logp, mask, yes, yes, sharpness)


def count(right, wrong, mean: float, std: float):
    logp, _, mask = right
    print(f"\n{len(mask)} right answers, {int(mask.sum())} tokens")
    print(f"Delta: mean {mean:.3f}, std {std:.3f} (averages over answers)")
    unlikely, known = mask & (logp < -2.303), mask & (logp > -0.105)
    print(f"{int(unlikely.sum())} tokens with p < 0.1, {int(known.sum())} with p > 0.9")
    print(f"{'':12} mean weight, p < 0.1   p > 0.9   share of p < 0.1 in the sum")
    names = {None: "rho alone"} | {sharpness: f"beta {sharpness:g}" for sharpness in COLORS}
    for sharpness, name in names.items():
        r = coefficients(*right, sharpness)
        share = r[unlikely].sum() / r[mask].sum()
        print(f"{name:12} {r[unlikely].mean():20.3f} {r[known].mean():9.3f} {share:12.1%}")
    print(f"{len(wrong[2])} wrong answers: share of their tokens with a gradient if the filter is left out,")
    print("that is with a coefficient above 1 - clip_low = 0.8")
    for sharpness, name in names.items():
        r = coefficients(*wrong, sharpness)
        print(f"{name:12} {(r[wrong[2]] > 0.8).float().mean():.2%}")


def draw(right, mean: float, std: float, path: Path):
    logp, _, mask = right
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    left_axes, right_axes = figure.subplots(1, 2, sharey=True)
    p = torch.logspace(-4, 0, 400)
    left_axes.plot(p, torch.ones_like(p), color="#999", label="SFT: 1")
    left_axes.plot(p, 0.1 * p / (p + 0.1) ** 2, color="#009E73", label=r"LUFFY, $f = p/(p+0.1)$: $p\,f'$")
    left_axes.plot(p, p, color="black", label=r"$\rho$ alone")
    right_axes.plot(p, p, color="black", linewidth=0.8)
    for sharpness, color in COLORS.items():
        w = torch.sigmoid(sharpness * (-p.log() - mean) / std)
        left_axes.plot(p, p * w, color=color, label=rf"$\rho\,w$, $\beta = {sharpness:g}$")
        r = coefficients(*right, sharpness)[mask]
        dots = dict(s=5, alpha=0.35, linewidths=0, color=color, label=rf"$\beta = {sharpness:g}$")
        right_axes.scatter(logp[mask].exp(), r, **dots)
    typical = rf"$\Delta$ of mean {mean:.2f} and std {std:.2f}"
    left_axes.set(title=f"By formula: an expert that is certain, {typical}", ylabel="gradient weight")
    right_axes.set(title=f"Real tokens: {int(mask.sum())} of the toy's expert, before training")
    left_axes.legend(frameon=False, fontsize=8, loc="center left")
    right_axes.legend(frameon=False, fontsize=8, loc="upper left", markerscale=2)
    for axes in (left_axes, right_axes):
        axes.set(xscale="log", xlim=(1e-4, 1.1), ylim=(-0.03, 1.06))
        axes.set(xlabel="probability of the token under the student")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eceff2")
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    print(f"wrote {path}")


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("toy", type=Path, help="folder that `python tgrl.py` wrote")
    parser.add_argument("--picture", type=Path, default=Path("runs/coefficient.png"), help="file to write")
    options = parser.parse_args()
    right, wrong = real_tokens(options.toy, 1.0), real_tokens(options.toy, 0.0)
    logp, behavior_logp, mask = right
    delta = [row[valid] for row, valid in zip(behavior_logp - logp, mask, strict=True)]
    mean = sum(float(row.mean()) for row in delta) / len(delta)  # of a typical answer
    std = sum(float(row.std()) for row in delta) / len(delta)
    count(right, wrong, mean, std)
    draw(right, mean, std, options.picture)


if __name__ == "__main__":
    main()

"""What multiplies the gradient of an expert's token, against the student's probability of it: the figure in the README.

    python tgrl.py && python .compare/coefficient.py runs/toy        writes runs/coefficient.png

Of a loss L, the gradient weight of a token is -dL/dlog(pi), for an advantage of 1. Left: by formula. Right: the tokens of all right
answers of the toy's expert under its untrained student, by the functions of tgrl.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from matplotlib.figure import Figure

import tgrl

COLORS = {1: "#56B4E9", 5: "#0072B2", 14: "#D55E00"}  # by sharpness


def real_tokens(toy: Path):
    """-> logp, behavior_logp, mask [N, T] of the expert's right answers, and of its wrong ones."""
    cfg = tgrl.Config(**tgrl.TOY | dict(model=f"{toy}/world/student"))
    model, processor = tgrl.load_model(cfg.model)
    encoder = tgrl.Encoder(processor, model, cfg)
    _, cache = tgrl.read_cache(toy / "experts.jsonl", {}, encoder)
    groups = []
    for problem in encoder.load(f"{toy}/world/train.parquet", "train"):
        groups += [tgrl.Group(problem, encoder(problem), cache[problem.id])] * (problem.id in cache)
    tgrl.score(tgrl.Policy(model, encoder.unwritable), groups, 16, "logp")
    for reward in (1.0, 0.0):
        answers = [t for group in groups for t in group.trajectories if t.reward == reward]
        lengths = torch.tensor([len(t.ids) for t in answers])
        yield tgrl.pad([t.logp for t in answers]), tgrl.pad([t.behavior_logp for t in answers]), torch.arange(lengths.max()) < lengths[:, None]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toy", type=Path, help="folder that `python tgrl.py` wrote")
    parser.add_argument("--picture", type=Path, default=Path("runs/coefficient.png"))
    arg = parser.parse_args()
    (logp, behavior_logp, mask), (wrong, written, valid) = real_tokens(arg.toy)
    delta = torch.where(mask, behavior_logp - logp, torch.nan)
    mean = delta.nanmean(1)
    std = torch.stack([row[row.isfinite()].std() for row in delta])
    mu, sigma = float(mean.mean()), float(std.mean())  # of a typical answer

    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    p = torch.logspace(-4, 0, 400)
    left.plot(p, torch.ones_like(p), color="#999", label="SFT: 1")
    left.plot(p, 0.1 * p / (p + 0.1) ** 2, color="#009E73", label=r"LUFFY, $f = p/(p+0.1)$: $p\,f'$")
    left.plot(p, p, color="black", label=r"$\rho$ alone")
    for sharpness, color in COLORS.items():
        w = torch.sigmoid(sharpness * (-p.log() - mu) / sigma)
        left.plot(p, p * w, color=color, label=rf"$\rho\,w$, $\beta = {sharpness}$")
    left.set(title=rf"By formula: an expert that is certain, $\Delta$ of mean {mu:.2f} and std {sigma:.2f}", ylabel="gradient weight")
    left.legend(frameon=False, fontsize=8, loc="center left")

    yes = torch.ones(len(mask), dtype=torch.bool)
    rho = tgrl.unified_coefficient(logp, behavior_logp, mask, yes, yes, None)
    right.plot(p, p, color="black", linewidth=0.8)
    print(f"{len(mask)} right answers, {int(mask.sum())} tokens; Delta: mean {mu:.3f}, std {sigma:.3f} (averages over answers)")
    unlikely, known = mask & (logp < -2.303), mask & (logp > -0.105)
    print(f"{int(unlikely.sum())} tokens with p < 0.1, {int(known.sum())} with p > 0.9\n{'':12} mean weight, p < 0.1   p > 0.9   share of p < 0.1 in the sum")
    for sharpness in (None, *COLORS):
        r = rho if sharpness is None else tgrl.unified_coefficient(logp, behavior_logp, mask, yes, yes, float(sharpness))
        name = "rho alone" if sharpness is None else f"beta {sharpness}"
        print(f"{name:12} {r[unlikely].mean():20.3f} {r[known].mean():9.3f} {r[unlikely].sum() / r[mask].sum():12.1%}")
        if sharpness is not None:
            right.scatter(logp[mask].exp(), r[mask], s=5, color=COLORS[sharpness], alpha=0.35, linewidths=0, label=rf"$\beta = {sharpness}$")
    yes = torch.ones(len(valid), dtype=torch.bool)
    print(f"{len(valid)} wrong answers: share of their tokens that would get a gradient without the filter, which needs a coefficient above 1 - clip_low = 0.8")
    for sharpness in (None, *COLORS):
        r = tgrl.unified_coefficient(wrong, written, valid, yes, yes, sharpness and float(sharpness))
        print(f"{'w = 1' if sharpness is None else f'beta {sharpness}':12} {(r[valid] > 0.8).float().mean():.2%}")
    right.set(title=f"Real tokens: {int(mask.sum())} of the toy's expert, before training")
    right.legend(frameon=False, fontsize=8, loc="upper left", markerscale=2)
    for axes in (left, right):
        axes.set(xscale="log", xlim=(1e-4, 1.1), ylim=(-0.03, 1.06), xlabel="probability of the token under the student")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eceff2")
        axes.set_axisbelow(True)
    arg.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arg.picture, facecolor="white")
    print(f"wrote {arg.picture}")


if __name__ == "__main__":
    main()

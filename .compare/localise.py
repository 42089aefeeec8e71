"""Which sign tells the step at which an answer goes wrong?  Slips planted in the toy's answers.

    python .compare/localise.py

An answer by the rules that the model mostly follows (the expert's are right, the student's wrong) gets one
slip: a side misread in the first of its four steps, or a wrong number in one of the others; what follows is
computed from it. A sign is a number for each step, made of the log-probs of the written tokens, with the
picture in the context. The last line is what tgrl.py does: `before_doubt` cuts before the first step with a
token below DOUBTED. Chance is 25 %.
"""

import argparse
import io
import itertools
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".toy")]

import make
import torch
from PIL import Image

import tgrl

BOUNDS = (1, 2, 3, 4)  # of the regret: how much likelier the likeliest token was, in log-prob


class Watched(tgrl.Policy):
    """A policy that keeps what its log-probs do not tell."""

    def token_logp(self, hidden, target):
        logits = self.model.lm_head(hidden).float().index_fill(-1, self.unwritable, -torch.inf)
        logp = logits.log_softmax(-1)  # [tokens, V]
        self.best = logp.max(-1).values  # [tokens]
        self.entropy = -torch.where(logp.isfinite(), logp.exp() * logp, 0).sum(-1)
        return logp.gather(1, target[:, None])[:, 0]


def planted(rng: random.Random, w: int, h: int, right: bool, place: int) -> str:
    """An answer in the form of make.write_answer, with a slip in step `place`."""
    if place == 0:
        w = rng.choice([side for side in range(1, 8) if side != w])
    slip = rng.choice([-3, -2, -1, 1, 2, 3])
    slips = [slip * (place == i) for i in range(4)]
    a, e, t = ("*", 2, "+") if right else ("+", 1, "-")
    area = (w * h if right else w + h) + slips[1]
    edge = e * (w + h) + slips[2]
    total = (area + edge if right else area - edge) + slips[3]
    steps = f"area = {w}{a}{h} = {area}. edge = {e}*{w + h} = {edge}. total = {area}{t}{edge} = {total}"
    return f"<think>width {w}, height {h}. {steps}</think>\\boxed{{{total}}}"


def step_bounds(ids: list[int], tokenizer) -> list[tuple[int, int]]:
    """Where steps begin and end: a step ends behind a token that ends in a period, as for before_doubt."""
    starts = [i + 1 for i, token in enumerate(ids[:-1]) if tokenizer.decode([token]).endswith(".")]
    return list(itertools.pairwise([0, *starts, len(ids)]))


def lowest(values: list[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def first(values: list[float], bound: float) -> int:
    """The first step below the bound; if there is none, the lowest."""
    return next((i for i, value in enumerate(values) if value < bound), lowest(values))


@torch.no_grad()
def guesses(policy: Watched, encoder, problem, blank, ids: list[int]) -> dict[str, int]:
    """sign -> the step that it suspects."""
    answer, bounds = tgrl.Trajectory(ids, "", 0.0), step_bounds(ids, encoder.tokenizer)
    unseen = policy(tgrl.pack([tgrl.Group(blank, encoder(blank), [answer])]))[0]
    logp = policy(tgrl.pack([tgrl.Group(problem, encoder(problem), [answer])]))[0]
    answer.behavior_logp = logp.tolist()

    def worst(sign) -> list[float]:
        return [float(sign[a:b].min()) for a, b in bounds]

    regret = logp - policy.best
    found = {
        "lowest log-prob": lowest(worst(logp)),
        "highest regret": lowest(worst(regret)),
        "log-prob below minus entropy": lowest(worst(logp + policy.entropy)),
        "contrast with a blank picture": lowest(worst(logp - unseen)),
        "lowest mean log-prob": lowest([float(logp[a:b].mean()) for a, b in bounds]),
        "first log-prob below -2": first(worst(logp), -2.0),
    }
    for bound in BOUNDS:
        found[f"first regret above {bound}"] = first(worst(regret), -bound)
    cut = tgrl.before_doubt(answer, encoder.tokenizer.decode)
    found["tgrl.before_doubt"] = next(i for i, (a, b) in enumerate(bounds) if a <= cut < b)
    return found


def try_model(name: str, n: int):
    model, processor = tgrl.load_model(str(tgrl.TOY_WORLD / name))
    encoder = tgrl.Encoder(processor, model, tgrl.Options(**tgrl.TOY))
    policy, rng, hits = Watched(model, encoder.unwritable).eval(), random.Random(1), {}
    Image.new("RGB", (56, 56), "white").save(white := io.BytesIO(), "PNG")
    for _ in range(n):
        (w, h), place = rng.choice(make.ALL_SIDES), rng.randrange(4)
        problem = tgrl.read_problem(make.make_row(rng, w, h))
        blank = tgrl.Problem("", problem.question, [white.getvalue()], problem.answer)
        text = planted(rng, w, h, name == "expert", place)
        ids = processor.tokenizer(text).input_ids + [processor.tokenizer.eos_token_id]
        for sign, guess in guesses(policy, encoder, problem, blank, ids).items():
            hits.setdefault(sign, []).append((place, guess))
    print(f"{name}: of {n} planted slips, found          all   misreadings   later steps")
    for sign, pairs in hits.items():
        shares = []
        for places in ((0, 1, 2, 3), (0,), (1, 2, 3)):
            right = [guess == place for place, guess in pairs if place in places]
            shares.append(sum(right) / len(right))
        print(f"  {sign:34} {shares[0]:9.0%} {shares[1]:9.0%} {shares[2]:13.0%}")


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--slips", type=int, default=200, metavar="N", help="slips to plant (default 200)")
    options = parser.parse_args()
    for name in ("student", "expert"):
        try_model(name, options.slips)


if __name__ == "__main__":
    main()

"""Which sign tells the step at which an answer goes wrong?  200 planted slips in the toy, for student and expert.

    python tgrl.py && python .compare/localise.py runs/toy/world

An answer by the rules that the model mostly follows (the expert's are right, the student's wrong) gets one slip: a side misread in
the first of its four steps, or a wrong number in one of the others, and what follows is computed from it. A sign is a number a
step; all come from log-probs of the written ids, with the picture in the context. Chance is 25 %.
"""

import io
import itertools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image

import tgrl

PLANTED = 200


def log_probs(policy, group):
    """-> [3, T]: log-prob of what was written, of the likeliest token, and the entropy, at each place."""
    with torch.no_grad():
        batch = tgrl.pack([group])
        logp = policy.logits(policy.hidden(batch)).log_softmax(-1)
    entropy = -torch.where(logp.isfinite(), logp.exp() * logp, 0).sum(-1)
    return torch.stack([logp.gather(1, batch.target[0][:, None])[:, 0], logp.max(-1).values, entropy])


def planted(rng, w, h, right, place):
    """An answer in the form of toy_answer with a slip in step `place`."""
    if place == 0:
        w = rng.choice([side for side in tgrl.TOY_SIDES if side != w])
    slips = [rng.choice([-3, -2, -1, 1, 2, 3]) * (place == i) for i in range(4)]
    area = (w * h if right else w + h) + slips[1]
    edge = (2 if right else 1) * (w + h) + slips[2]
    total = (area + edge if right else area - edge) + slips[3]
    return (f"<think>width {w}, height {h}. area = {w}{'*' if right else '+'}{h} = {area}. edge = {2 if right else 1}*{w + h} = {edge}. "
            f"total = {area}{'+' if right else '-'}{edge} = {total}</think>\\boxed{{{total}}}")  # fmt: skip


def lowest(signs):
    return min(range(len(signs)), key=lambda i: signs[i])


def first(signs, bound):
    return next((i for i, sign in enumerate(signs) if sign < -bound), lowest(signs))


for name in ("student", "expert"):
    model, processor = tgrl.load_model(Path(sys.argv[1], name))
    encoder = tgrl.Encoder(processor, model, tgrl.Config(**tgrl.TOY))
    policy = tgrl.Policy(model, encoder.unwritable).eval()
    rng, hits = random.Random(1), {}
    Image.new("RGB", (56, 56), "white").save(buffer := io.BytesIO(), "PNG")
    for _ in range(PLANTED):
        w, h = rng.choice(tgrl.TOY_SIDES), rng.choice(tgrl.TOY_SIDES)
        problem = tgrl.read_problem(tgrl.toy_row(rng, w, h), Path())
        place = rng.randrange(4)
        text = planted(rng, w, h, name == "expert", place)
        ids = processor.tokenizer(text).input_ids + [processor.tokenizer.eos_token_id]
        group = tgrl.Group(problem, encoder(problem), [tgrl.Trajectory(ids, text, 0.0)])
        blank = tgrl.Problem("", problem.question, [buffer.getvalue()], problem.answer)
        logp, best, entropy = log_probs(policy, group)
        contrast = logp - log_probs(policy, tgrl.Group(blank, encoder(blank), group.trajectories))[0]
        bounds = list(itertools.pairwise([*tgrl.step_starts(ids, processor.tokenizer), len(ids)]))
        worst = lambda sign: [float(sign[a:b].min()) for a, b in bounds]  # noqa: B023, E731
        guesses = {
            "lowest log-prob": lowest(worst(logp)),
            "highest regret": lowest(worst(logp - best)),
            "log-prob below minus entropy": lowest(worst(logp + entropy)),
            "contrast with a blank picture": lowest(worst(contrast)),
            "lowest mean log-prob": lowest([float(logp[a:b].mean()) for a, b in bounds]),
            "first log-prob below -2": first(worst(logp), 2.0),
            **{f"first regret above {bound:g}": first(worst(logp - best), bound) for bound in (1, 2, 3, 4)},
            "localise": tgrl.localise(policy, group, group.trajectories[0], processor.tokenizer).suspect,
        }
        for sign, guess in guesses.items():
            hits.setdefault(sign, [[], []])[place > 0].append(guess == place)
    print(f"{name}: of {PLANTED} planted slips, found          all   misreadings   later steps")
    for sign, (first_step, later) in hits.items():
        print(f"  {sign:34} {sum(first_step + later) / PLANTED:9.0%} {sum(first_step) / len(first_step):9.0%} {sum(later) / len(later):13.0%}")

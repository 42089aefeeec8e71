"""What holds: real Qwen2.5-VL classes with a tiny configuration, real generate, real FSDP2; no mocks."""

import ast
import collections
import contextlib
import copy
import dataclasses
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder fails at once
sys.path.append(str(Path(__file__).resolve().parent / ".toy"))

import datasets
import make
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import eval as evaluation
import tgrl
from tgrl import (
    BadInput,
    extract_boxed,
    group_advantages,
    is_equivalent,
    reward,
    tgrl_loss,
    token_shares,
)

HERE = Path(tgrl.__file__).resolve().parent

# ===== The loss, against the paper's equations as plain loops =========================================

LOW, HIGH = 0.2, 0.28  # unequal, so that no test passes with the sides exchanged
ALGORITHMS, SHARPNESS = ["grpo", "dapo"], [5.0, 14.0, None]
BOTH = pytest.mark.parametrize("algorithm", ALGORITHMS)
CASES = {"mixed": {}, "many experts": dict(experts=5, own=2), "no experts": dict(experts=0)}
CASES |= {
    "equal rewards": dict(equal=True),
    "one token": dict(lengths=(1, 1)),
    "far off": dict(spread=3.0),
}
CASES |= {"constant delta": dict(delta=0.25), "long": dict(lengths=(20, 60), groups=2)}
EVERY_CASE = pytest.mark.parametrize(
    "case, sharpness, algorithm", [*product(CASES, SHARPNESS, ALGORITHMS)]
)
FLOAT32 = dict(dtype=torch.float32)
close = partial(pytest.approx, abs=1e-10, rel=1e-10)


def random_groups(
    seed,
    groups=3,
    own=4,
    experts=2,
    lengths=(1, 9),
    spread=0.5,
    dtype=torch.float64,
    equal=False,
    delta=None,
):
    """Groups as [N, T]: each has a right and a wrong policy answer; experts are right and wrong by turns."""
    rng = torch.Generator().manual_seed(seed)
    size, width = own + experts, lengths[1] + 1  # a column more than the longest answer
    b = SimpleNamespace(size=size, is_expert=(torch.arange(size) >= own).repeat(groups))
    length = torch.randint(lengths[0], lengths[1] + 1, (groups * size, 1), generator=rng)
    b.mask = torch.arange(width) < length
    b.rewards = torch.randint(0, 2, (groups, size), generator=rng).to(dtype)
    b.rewards[:, 0], b.rewards[:, 1] = 1, 0
    b.rewards[:, own:] = (torch.arange(groups)[:, None] + torch.arange(experts)) % 2
    if equal:
        b.rewards[:] = 1
    b.expert_ok, b.advantages = b.rewards.flatten() == 1, group_advantages(b.rewards).flatten()
    noise = spread * torch.randn((2, *b.mask.shape), generator=rng, dtype=dtype)
    b.logp = -3 * torch.rand(b.mask.shape, generator=rng, dtype=dtype)
    b.logp = (b.logp * 64).round() / 64  # so that a constant difference is one to the last bit
    b.behavior_logp = b.logp + (noise[0] if delta is None else delta)
    b.ref_logp = b.logp + noise[1]
    garbage = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype).repeat(width)[:width]
    for x in (b.logp, b.behavior_logp, b.ref_logp):
        x.copy_(torch.where(b.mask, x, garbage))  # padding may hold anything
    return b


def own_mask(b):
    return b.mask & ~b.is_expert[:, None]


def loss_of(
    b,
    algorithm,
    sharpness=5.0,
    kl_coef=0.0,
    totals=(None, None),
    own_totals=None,
    clip=(LOW, HIGH),
    **changed,
):
    """own_totals: of the policy's own answers; None leaves the shares of the KL to tgrl_loss."""
    b = SimpleNamespace(**vars(b) | changed)
    kl_shares = None
    if own_totals:
        kl_shares = token_shares(own_mask(b).to(b.logp.dtype), algorithm, *own_totals)
    return tgrl_loss(
        logp=b.logp,
        behavior_logp=b.behavior_logp,
        mask=b.mask,
        advantages=b.advantages,
        is_expert=b.is_expert,
        expert_ok=b.expert_ok,
        shares=token_shares(b.mask.to(b.logp.dtype), algorithm, *totals),
        sharpness=sharpness,
        clip_low=clip[0],
        clip_high=clip[1],
        kl_coef=kl_coef,
        ref_logp=b.ref_logp,
        kl_shares=kl_shares,
    )


def gradient(b, algorithm, **options):
    logp = b.logp.clone().requires_grad_()
    return torch.autograd.grad(loss_of(b, algorithm, logp=logp, **options)[0], logp)[0]


def oracle(b, algorithm, sharpness):
    """Eq. 15-25 once more, with nothing but floats: what they say of every token, in order."""
    tokens = []
    for i, length in enumerate(b.mask.sum(1).tolist()):
        logp, behavior, ref = (
            x[i, :length].tolist() for x in (b.logp, b.behavior_logp, b.ref_logp)
        )
        expert, ok, group = (
            bool(b.is_expert[i]),
            bool(b.expert_ok[i]),
            b.rewards[i // b.size].tolist(),
        )
        A = (group[i % b.size] - mean(group)) / (stdev(group) + 1e-6)  # Eq. 15-16
        delta = [old - new for old, new in zip(behavior, logp, strict=True)]  # Eq. 18
        center, spread = mean(delta), stdev(delta) if length > 1 else 0
        share = (
            1 / len(b.mask) / length if algorithm == "grpo" else 1 / int(b.mask.sum())
        )  # Eq. 24, 25
        n_own = len(b.mask) - int(b.is_expert.sum())
        kl_share = 1 / n_own / length if algorithm == "grpo" else 1 / int(own_mask(b).sum())
        for t in range(length):
            x = SimpleNamespace(
                row=i, column=t, A=A, share=share, expert=expert, ok=ok, delta=delta[t]
            )
            x.kl_share = 0 if expert else kl_share
            standardized = (x.delta - center) / (spread + 1e-6)  # Eq. 19
            x.w = 1 / (1 + math.exp(-sharpness * standardized)) if sharpness else 1  # Eq. 20
            x.ratio = math.exp(logp[t]) / math.exp(behavior[t])  # Eq. 17, or pi_theta / pi_old
            x.coefficient = r = x.ratio * (x.w * ok if expert else 1)  # Eq. 21-23
            bounded = max(1 - LOW, min(1 + HIGH, r))
            x.objective, x.clipped = share * min(r * A, bounded * A), bounded * A < r * A
            gap = ref[t] - logp[t]
            x.kl, x.entropy = math.exp(gap) - gap - 1, -logp[t]
            tokens.append(x)
    return tokens


@EVERY_CASE
def test_every_equation_agrees_with_plain_loops(case, sharpness, algorithm):
    b = random_groups(1, **CASES[case])
    tokens = oracle(b, algorithm, sharpness)
    tensors, who = (b.logp, b.behavior_logp, b.mask), (b.is_expert, b.expert_ok)
    got = {
        "A": b.advantages[:, None].expand_as(b.logp),
        "share": token_shares(b.mask.double(), algorithm),
    }
    got["coefficient"] = tgrl.unified_coefficient(*tensors, *who, sharpness)
    if sharpness:
        got["w"] = tgrl.expert_weights(*tensors, sharpness)
    for name, value in got.items():
        assert value[b.mask].tolist() == close([getattr(x, name) for x in tokens]), name
    assert not got["share"][~b.mask].any() and float(got["share"].sum()) == close(1)
    loss, _ = loss_of(b, algorithm, sharpness, kl_coef=0.1)
    assert float(loss) == close(sum(0.1 * x.kl_share * x.kl - x.objective for x in tokens))
    n_own, n_tokens = int((~b.is_expert).sum()), int(own_mask(b).sum())
    given, _ = loss_of(b, algorithm, sharpness, kl_coef=0.1, own_totals=(n_own, n_tokens))
    assert float(given) == close(float(loss))  # by default kl_shares are those of the batch


@EVERY_CASE
def test_every_metric_agrees_with_plain_loops(case, sharpness, algorithm):
    b = random_groups(1, **CASES[case])
    _, metrics = loss_of(b, algorithm, sharpness, kl_coef=0.1)
    tokens = oracle(b, algorithm, sharpness)
    own, kept = [x for x in tokens if not x.expert], [x for x in tokens if x.expert and x.ok]
    names = ["objective", "entropy", "ratio", "clipped", "kl", "expert_coefficient", "expert_delta"]
    assert set(metrics) >= set(names)
    for name, (value, count) in metrics.items():
        counted = kept if name.startswith("expert_") else own + kept if name == "objective" else own
        assert float(value) == close(
            sum(getattr(x, name.removeprefix("expert_")) for x in counted)
        ), name
        assert float(count) == close(1 if name == "objective" else len(counted)), name


HAND = [
    ([1, 0], [0.5, -0.5], 0.5**0.5),
    ([1, 0, 0, 0], [0.75] + [-0.25] * 3, 0.5),
    ([0.1] * 3, [0] * 3, 1),
]


@pytest.mark.parametrize(
    "rewards, deviations, std", HAND
)  # std over n - 1; of equal rewards, whatever
def test_advantages_by_hand(rewards, deviations, std):
    got = group_advantages(torch.tensor([rewards, rewards[::-1]], dtype=torch.float64))
    assert (
        got[0].tolist() == got[1].flip(0).tolist() == close([d / (std + 1e-6) for d in deviations])
    )
    assert any(deviations) or not got.any()  # equal rewards: zero, not nearly


@BOTH
@pytest.mark.parametrize("filtered", [True, False])
def test_gradient_is_minus_share_coefficient_advantage_and_zero_where_clipped(algorithm, filtered):
    b = random_groups(2, groups=30, spread=1.5)
    b.expert_ok |= not filtered
    grad, seen = gradient(b, algorithm), set()
    for x in oracle(b, algorithm, 5.0):
        r, got = x.coefficient, float(grad[x.row, x.column])
        side = "above" if r > 1 + HIGH else "below" if r < 1 - LOW else "inside"
        seen.add((x.expert, x.A > 0, side))
        stopped = side == ("above" if x.A > 0 else "below")
        assert got == (0 if stopped else pytest.approx(-x.share * r * x.A, rel=1e-9))
    # all kinds, but for filtered experts: they are below the mean, and their coefficient is 0
    assert len(seen) == (10 if filtered else 12)
    assert not grad[~b.mask].any()


@BOTH
def test_at_the_first_update_every_policy_token_learns_the_end_token_too(algorithm):
    b = random_groups(3)
    b.behavior_logp = torch.where(b.is_expert[:, None], b.behavior_logp, b.logp)  # ratio 1
    grad, own = gradient(b, algorithm), b.mask & ~b.is_expert[:, None]
    want = -(token_shares(b.mask.double(), algorithm) * b.advantages[:, None])
    torch.testing.assert_close(grad[own], want[own])
    assert (grad[range(len(grad)), b.mask.sum(1) - 1][~b.is_expert] != 0).all()


def test_a_right_expert_is_never_pushed_down_as_no_gradient_flows_through_w(monkeypatch):
    b = random_groups(5, groups=8, lengths=(30, 60), spread=1.0)
    kept = (b.is_expert & b.expert_ok)[:, None] & b.mask
    assert (
        gradient(b, "grpo")[kept] <= 0
    ).all()  # descent on the loss raises each of them, or leaves it
    monkeypatch.setattr(
        tgrl, "expert_weights", tgrl.expert_weights.__wrapped__
    )  # without its no_grad
    assert 0.1 < (gradient(b, "grpo")[kept] > 0).double().mean() < 0.5


@BOTH
def test_kl_gradient_matches_finite_differences_and_is_the_policys_own(algorithm):
    b = random_groups(6, groups=2, lengths=(1, 4))
    options = dict(kl_coef=0.7, advantages=torch.zeros_like(b.advantages))  # the KL alone
    assert torch.equal(gradient(b, algorithm, **options) != 0, b.mask & ~b.is_expert[:, None])
    logp = torch.where(b.mask, b.logp, 0).requires_grad_()
    torch.autograd.gradcheck(
        lambda logp: loss_of(b, algorithm, logp=logp, **options)[0], logp, atol=1e-8
    )


@BOTH
@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_without_experts_it_is_grpo_and_dapo(algorithm, sharpness):
    b = random_groups(7, experts=0, spread=0.6)
    logp, old, ref = (torch.where(b.mask, x, 0) for x in (b.logp, b.behavior_logp, b.ref_logp))
    A, ratio = b.advantages[:, None], (logp.requires_grad_() - old).exp()
    token = torch.min(ratio * A, ratio.clip(1 - LOW, 1 + HIGH) * A)
    token = token - 0.05 * ((ref - logp).exp() - (ref - logp) - 1)
    grpo = ((token * b.mask).sum(1) / b.mask.sum(1)).mean()  # Eq. 2
    dapo = token[b.mask].mean()  # Eq. 4
    want = -grpo if algorithm == "grpo" else -dapo
    grad = gradient(b, algorithm, sharpness=sharpness, kl_coef=0.05)
    torch.testing.assert_close(loss_of(b, algorithm, sharpness, kl_coef=0.05)[0], want.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(want, logp)[0], rtol=1e-10, atol=1e-14)


def in_parts(b, algorithm, size, totals=(None, None), own_totals=None):
    """The gradient, and the sums of metrics and loss, of micro-batches of `size` groups."""
    grads, sums = [], defaultdict(lambda: torch.zeros(2))
    for start in range(0, len(b.rewards), size):
        rows = slice(start * b.size, (start + size) * b.size)
        part = {
            name: value[rows] for name, value in vars(b).items() if name not in ("size", "rewards")
        }
        part, options = (
            SimpleNamespace(**part),
            dict(kl_coef=0.1, totals=totals, own_totals=own_totals),
        )
        grads.append(gradient(part, algorithm, **options))
        loss, metrics = loss_of(part, algorithm, **options)
        for name, total in dict(metrics, loss=(loss, 0)).items():
            sums[name] += torch.tensor(total)
    return torch.cat(grads), sums


@BOTH
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_splitting_the_batch_changes_nothing(algorithm, size):
    b = random_groups(8, groups=8, lengths=(1, 12), **FLOAT32)
    whole, want = in_parts(b, algorithm, 8)
    own_totals = int((~b.is_expert).sum()), int(own_mask(b).sum())
    parts, got = in_parts(b, algorithm, size, (len(b.mask), int(b.mask.sum())), own_totals)
    assert (parts - whole).norm() <= 1e-6 * whole.norm()
    for name in want:
        assert got[name].tolist() == pytest.approx(want[name].tolist(), rel=1e-5, abs=1e-7), name


@BOTH
def test_a_mean_of_means_is_something_else(algorithm):
    b = random_groups(8, groups=8, lengths=(1, 12), **FLOAT32)
    whole, parts = (
        in_parts(b, algorithm, size)[0] for size in (8, 3)
    )  # 3 + 3 + 2, each by its own totals
    assert (parts / 3 - whole).norm() > 0.02 * whole.norm()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rough_but_works(dtype, algorithm):
    b = random_groups(11)
    half = SimpleNamespace(**vars(b))
    for name in ("logp", "behavior_logp", "ref_logp", "advantages", "rewards"):
        setattr(half, name, getattr(b, name).to(dtype))
    loss, want = (float(loss_of(x, algorithm, kl_coef=0.1)[0]) for x in (half, b))
    assert loss == pytest.approx(want, abs=0.03)
    assert gradient(half, algorithm, kl_coef=0.1).isfinite().all()
    assert group_advantages(half.rewards).isfinite().all()


@BOTH
@pytest.mark.parametrize("far", [100.0, -100.0, 1e4, -1e4])
def test_extreme_ratios_stay_finite(far, algorithm):
    b = random_groups(12, **FLOAT32)
    b.behavior_logp[:, 0] -= far
    b.ref_logp[:, 0] += far
    loss, metrics = loss_of(b, algorithm, kl_coef=0.1)
    assert loss.isfinite() and gradient(b, algorithm, kl_coef=0.1).isfinite().all()
    assert all(math.isfinite(value) for value, _ in metrics.values())
    assert torch.float64 not in {
        x.dtype for x in (loss, *sum(metrics.values(), ()))
    }  # a device may lack it


def test_empty_rows_count_for_nothing():
    b = random_groups(13, groups=1)
    b.mask[1] = False
    assert (
        loss_of(b, "grpo", kl_coef=0.1)[0].isfinite()
        and loss_of(b, "dapo", mask=b.mask & False)[0] == 0
    )
    assert not gradient(b, "grpo", kl_coef=0.1)[1].any()


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_a_small_kl_is_not_lost_in_rounding(spread):
    """At a learning rate of 1e-6 the policy is near the reference for long; exp(x) - 1 - x is noise."""
    b = random_groups(14, groups=20, spread=spread, **FLOAT32)
    gap = (b.ref_logp - b.logp)[b.mask & ~b.is_expert[:, None]].double()
    value, count = loss_of(b, "grpo", kl_coef=0.1)[1]["kl"]
    assert float(value / count) == pytest.approx(float((gap.expm1() - gap).mean()), rel=1e-3)


MISUSED = {
    "a group of 1 has nothing to compare": lambda b: group_advantages(b.rewards[:, :1]),
    "algorithm is 'ppo'; it can be": lambda b: token_shares(b.mask, "ppo"),
    "kl_coef needs ref_logp": lambda b: loss_of(b, "grpo", kl_coef=0.1, ref_logp=None),
}


@pytest.mark.parametrize("message, call", MISUSED.items())
def test_a_misuse_of_the_loss_is_named(message, call):
    with pytest.raises(ValueError, match=message):
        call(random_groups(0))


def test_the_copyable_section_runs_alone():
    text = Path(tgrl.__file__).read_text()
    alone = {"torch": torch, "Tensor": torch.Tensor}
    exec(text[text.index("\n# ===== 1. The loss") : text.index("\n# ===== 2.")], alone)
    # a wrong policy answer of one token; a right expert answer of three, where the policy lags by 0, 1, 2
    behavior = torch.tensor([[-1.0, 0, 0], [-0.5, -0.5, -0.5]])
    logp = behavior - torch.tensor([[0.0, 0, 0], [0, 1, 2]])
    mask, experts = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool(), torch.tensor([False, True])
    advantages = alone["group_advantages"](torch.tensor([[0.0, 1.0]])).flatten()
    tensors = (
        logp,
        behavior,
        mask,
        advantages,
        experts,
        experts,
        alone["token_shares"](mask, "dapo"),
    )
    loss, _ = alone["tgrl_loss"](*tensors, sharpness=5.0, clip_low=0.2, clip_high=0.28)
    # A = -+0.70711; w = sigmoid(-5, 0, 5); sum of rho w = 0.00669 + 0.36788 / 2 + 0.13534 * 0.99331
    assert float(loss) == pytest.approx(0.70711 * (1 - 0.32506) / 4, abs=1e-5)


def clean_groups(seed, **options):
    """For code that others wrote, skipped where it is not installed: float32, and padding without garbage."""
    b = random_groups(seed, **FLOAT32, **options)
    for x in (b.logp, b.behavior_logp, b.ref_logp):
        x.masked_fill_(~b.mask, 0)
    b.logp.requires_grad_()
    return b


def agree(ours, theirs, logp):
    """Loss and gradient; and neither is nothing."""
    gradients = [
        torch.autograd.grad(x, logp, retain_graph=True)[0].nan_to_num() for x in (ours, theirs)
    ]
    assert (
        torch.allclose(ours, theirs.to(ours), rtol=1e-5, atol=1e-7)
        and float(ours.detach().abs()) > 1e-4
    )
    assert (
        torch.allclose(*gradients, rtol=1e-4, atol=1e-8) and float(gradients[0].abs().max()) > 1e-3
    )


def test_without_experts_it_is_the_loss_of_trl(tmp_path):
    """GRPOTrainer's own _compute_loss, on log-probs that we hand it."""
    trl = pytest.importorskip("trl")
    tokenizer = make.make_processor().tokenizer
    model = make.make_model(len(tokenizer), hidden=64, layers=1, vision_layers=1)
    data = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "Why?"}]}] * 8)
    options = dict(per_device_train_batch_size=8, num_generations=8, use_bias_correction_kl=False)
    config = trl.GRPOConfig(
        output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True, **options
    )
    options = dict(train_dataset=data, processing_class=tokenizer)
    trainer = trl.GRPOTrainer(
        model, lambda completions, **_: [0.0] * len(completions), config, **options
    )
    trainer.model.train()
    for algorithm, kl_coef, seed in product(ALGORITHMS, [0.0, 0.04], range(5)):
        b = clean_groups(seed, experts=0)
        handed = b.logp, torch.zeros_like(b.logp), None
        trainer._get_per_token_logps_and_entropies = lambda *_, handed=handed, **__: handed
        vars(trainer).update(loss_type=algorithm, beta=kl_coef, epsilon_low=LOW, epsilon_high=HIGH)
        trainer.current_gradient_accumulation_steps = 1
        ids = torch.ones_like(b.mask, dtype=torch.long)
        inputs = dict(prompt_ids=ids[:, :2], prompt_mask=ids[:, :2], completion_ids=ids)
        inputs |= dict(
            completion_mask=b.mask.long(), advantages=b.advantages, ref_per_token_logps=b.ref_logp
        )
        inputs |= dict(old_per_token_logps=b.behavior_logp, num_items_in_batch=b.mask.sum())
        theirs = trainer._compute_loss(trainer.model, inputs)
        agree(loss_of(b, algorithm, kl_coef=kl_coef)[0], theirs, b.logp)


@BOTH
def test_without_experts_it_is_the_loss_of_verl(algorithm):
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import FSDPActorConfig

    clip = dict(clip_ratio_low=LOW, clip_ratio_high=HIGH, clip_ratio_c=1e9)  # no dual clip
    config = FSDPActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1, **clip)
    mode = {"dapo": "token-mean", "grpo": "seq-mean-token-mean"}[algorithm]
    for seed in range(5):
        b = clean_groups(seed, experts=0)
        tensors = b.behavior_logp, b.logp, b.advantages[:, None].expand_as(b.logp), b.mask
        theirs, _ = core.compute_policy_loss_vanilla(*tensors, loss_agg_mode=mode, config=config)
        agree(loss_of(b, algorithm)[0], theirs, b.logp)


@pytest.mark.parametrize("certain", [True, False])
def test_unweighted_and_unclipped_it_is_luffys_before_its_shaping(certain):
    pytest.importorskip("verl")
    if "LUFFY" not in os.environ:
        pytest.skip("LUFFY=folder of a clone of its repository is not given")
    luffy = runpy.run_path(os.environ["LUFFY"] + "/luffy/verl/verl/mix_src/mix_core_alg.py")
    for seed in range(5):
        b = clean_groups(seed)
        expert = b.is_expert[:, None] & b.mask
        if certain:  # pi_phi = 1
            b.behavior_logp = torch.where(expert, 0, b.behavior_logp)
        tensors = b.behavior_logp, b.logp, b.advantages[:, None].expand_as(b.logp), b.mask
        options = dict(
            cliprange=LOW, clip_upper_bound=1.0, off_cliprange=None, loss_remove_clip=True
        )
        options |= dict(prefix_mask=expert, target_probs=None if certain else b.behavior_logp.exp())
        theirs = luffy["compute_token_on_off_policy_loss"](*tensors, **options)["pg_loss"]
        ours, _ = loss_of(b, "dapo", sharpness=None, clip=(1e9, 1e9), expert_ok=b.expert_ok | True)
        if certain:
            agree(ours, theirs, b.logp)
        else:  # it adds 1e-6 to the probability in the denominator
            assert torch.allclose(ours, theirs, rtol=1e-4)


# ===== The reward =====================================================================================

LONG = 90  # seconds: what takes two at most, after a start of the grading process on a busy machine


def pairs(table):
    lines = table.strip().splitlines()
    return [pair.strip().rsplit(" ~ ", 1) for line in lines for pair in line.split(" | ")]


# Of several boxes the last, of nested ones the inner. \\boxed is escaped once too often.
BOXED = r"""
so \boxed{5} ~ 5 | \boxed{1} then \boxed{2} ~ 2 | \boxed{\frac{1}{\sqrt{2}}} done} ~ \frac{1}{\sqrt{2}}
\boxed {5} ~ 5 | \boxed{\{1, 2\}} ~ \{1, 2\} | \boxed{\{1} ~ \{1 | \boxed{3} and \boxed{4} ~ 4
\boxed{4 \boxed{5} ~ 5 | \boxed{\boxed{5}} ~ 5 | } } {\boxed{5} ~ 5 | \\boxed{5} ~ 5
\boxed{\begin{matrix}1\\{2}\end{matrix}} ~ \begin{matrix}1\\{2}\end{matrix}
"""
NOT_BOXED = [(text, None) for text in (r"\boxed 5", "boxed{5}", r"\boxed{3} \boxed{4", "")]


@pytest.mark.parametrize(
    "text, box", [*pairs(BOXED), ("\\boxed\n{ 5 }", "5"), (r"\boxed{}", ""), *NOT_BOXED]
)
def test_the_last_box_is_found(text, box):
    assert extract_boxed(text) == box


SAME = r"""
\frac{1}{\sqrt{2}} ~ \frac{\sqrt{2}}{2} | (A)(C) ~ (A)(C)
Isosceles Triangle ~ isosceles triangle | 5\sqrt{2} \approx 7.07 ~ 5\sqrt{2}
2 \sqrt { 221 } ~ 2\sqrt{221} | 5 hours ~ 5 | 5\,\mathrm{cm}^2 ~ 5 cm^{2}
5 \sqrt { 3 } m ~ 5\sqrt{3} | $=63.3 \mathrm{~g}$ ~ 63.3 | m\widehat{AB} = 120 ~ 120
12\,\mathrm{cm} ~ 12 cm | \left(1, 2\right) ~ (1,2) | Area of triangle = 5 ~ 5
\dfrac{36}{13} ~ 36/13 | 60 degrees ~ 60^\circ | \frac{2}{4} ~ \frac12 | 12 cm ~ 12
(-\infty, 3) ~ (-∞,3) | 2EF + 2HG ~ 2HG + 2EF | \frac{3}{4} m ~ 0.75 | pi/2 ~ \frac{\pi}{2}
\text{5 cm} ~ 5 | x \approx 5.3 ~ 5.3 | 1,234,567 ~ 1234567 | 2√221 ~ 2\sqrt{221}
\sqrt{2+x} ~ √(2+x) | 4×6×16 ~ 4 × 6 × 16 | 2\frac{1}{2} ~ 5/2 | (x+1)^2 ~ x^2+2x+1
60°, 30° ~ 60, 30 | m\angle A=30 ~ 30 | \approx 5.3 ~ 5.3 | \{1,2\} ~ \{2,1\} | 60º ~ 60˚
y=2x+1 ~ y = 1+2x | 1:2:3 ~ 1 : 2 : 3 | 60^{\circ} ~ 60° | x = 5 cm ~ 5 | 5\text{ m/s} ~ 5
\textbf{(B)} ~ B | 16 dollars ~ $16 | 10,\!000 ~ 10000 | 2x+1 ~ y = 1+2x | 8,6,2 ~ 8, 6, 2
10-20 ~ 10 - 20 | 60\degree ~ 60 | 2\pi cm ~ 2\pi | m∠A = 30° ~ 30 | 1{,}000 ~ 1000
\text{No} ~ no | A) ~ A | (1, 2) ~ (1,2) | [1,2) ~ [1, 2) | 60^\circ ~ 60 | 12 units ~ 12
(a)^2 ~ (a)^2 | A. 60 ~ 60 | 0.5 ~ \frac12 | 50.5\% ~ 50.5 | √2 ~ \sqrt{2} | x > 5 ~ 5 < x
\text{B} ~ B | 1,000 ~ 1000 | ABC = 5 ~ 5 | x_1 = 5 ~ 5 | ≈ 5.3 ~ 5.3 | A. 60° ~ 60 | (A) 60 ~ 60
10^3 ~ 1000 | 5.20 ~ 5.2 | \(16\) ~ 16 | 50% ~ 50\% | 2pi ~ 2\pi | Yes. ~ yes | A, C ~ A,C
12cm ~ 12 | 5 m^2 ~ 5 | x = 5 ~ 5 | 5 ~ x = 5 | A. 60 ~ A | A: 60 ~ A | 2/4 ~ 1/2 | 50\% ~ 50
−5 ~ -5.0 | 2π ~ 2\pi | $16$ ~ 16 | \$16 ~ 16 | 60° ~ 60 | .5 ~ 1/2 | 5\%, 6\% ~ 5, 6 | pi ~ \pi
x² ~ x^2 | 5 mg ~ 5 | (A) ~ A | A ~ (A) | -5 ~ −5 | AC ~ ac | b ~ B | 3 L ~ 3 | 2h ~ 2h | 5. ~ 5
(-\infty, 1)\cup(2, \infty) ~ (2,\infty)\cup(-\infty,1) | A. edge ~ A | 5 ≈ 6 ~ 5
√{3} ~ \sqrt{3} | \frac{60^\circ}{2} ~ 30 | B. AC ~ B | \sin{30^{\circ}} ~ \sin{30}
"""
DIFFERENT = r"""
90° clockwise ~ 90° counterclockwise | 12 cm ~ 12 m | 5 m^2 ~ 5 m | 5 hours ~ 5 minutes
5 cm^2 ~ 5 cm^3 | 60° ~ 30° | 12 cm ~ 13 cm | 2 million ~ 2 | B ~ C | A ~ 60 | 60 ~ A | A. 60 ~ B
A. 60 ~ 61 | A, C ~ A | A. B ~ A | A) B) ~ A | A, B, C, D ~ A | A, C ~ A, B | A triangle ~ A
AB ~ BA | yes ~ no | 12.566 ~ 4\pi | 33.3 ~ 33.33 | 29.7 ~ 2\sqrt{221} | 5 ~ 6 | 5 ~ -5
0.333 ~ 1/3 | 1,000 ~ 1 | 10 ~ 100 | (1,2) ~ (2,1) | [1,2) ~ (1,2) | 3:4 ~ 4:3 | x = 5 ~ y = 5
y = 2x + 1 ~ y = 2x - 1 | x != 5 ~ 5 | 2x + 1 = 5 ~ 2 | x > 5 ~ x < 5 | 3t ~ 3 | 2xy ~ 2
2 sec x ~ 2 | 3 times x ~ 3 | 5 over x ~ 5 | 3 plus y ~ 3 | 2 arcsin x ~ 2 | 2 \sin x ~ 2
5 or 6 ~ 5 | 5 or x ~ 5 | 3 sin x ~ 3 | 5, 6 ~ 5 | 1 2 3 5 ~ 5 | the answer is 5 ~ 5
$1$, $2$ ~ 1 | 1$2 ~ 1 | R^2-r^2 ~ 0 | \pi(R+r) ~ 2\pi r | 2x=60 ~ 60 | AB+BC=12 ~ 12 | 3 4 ~ 7
3 4 ~ 34 | (1) 20 cm ~ 21 | 3 1/2 ~ 2 | 10-20 ~ 20-30 | 4×6×16 ~ 4×8×12 | 1:2:3 ~ 1:3:2
12:30 ~ 0.4 | 8,6,2 ~ 6,2,8 | 2,2 ~ 2 | M, N, Q, P ~ N, M, Q, P | 1≈2≈57 ~ 57 | 5 half ~ 5
3 units left ~ 3 units right | 4/3 ~ 1 | 5 g ~ 5 kg | 2h ~ 2 | two ~ 3 | A, C ~ C, A
60°, 30° ~ 30, 60 | $5$ or $6$ ~ 6 | \sqrt{221} ~ 221 | 2\pi ~ \pi | 1e999999999 ~ 1
\frac{1}{0} ~ 1 | . ~ 5 | $ ~ 5 | ~ ~ 5 | 2 - \infty^\infty ~ 5 | 1°)√\boxed 2 ~ 2 | 5 s ~ 5 m
5 m ~ 5 miles | 5 ≈ 6 ~ 6 | 5-3-2-1-4 ~ 5-3-1-2-4 | 2 & 3 ~ 3 & 2 | increases ~ decreases
increase by 5 ~ decrease by 5
\pi\infty ~ \infty | 1-\infty ~ -\infty | 12:30 ~ 30:12 | A. edge ~ B | 2x = 60 ~ 60
"""
# What means the same, and is unequal on purpose: no rule for it.
UNEQUAL = r"""
V = 904.78 cm^3 ~ Volume $=904.78 \mathrm{~cm}^3$ | 12\text{ cm} ~ 12 centimeters
x = 1 or x = 2 ~ x = 2 or x = 1 | 5\sqrt{2} \approx 7.07 ~ 7.07 | 5 cubic centimeters ~ 5 cm^3
5 kg ~ 5 kilograms | 60 mph ~ 60 miles per hour | 12~\text{m} ~ 12 meters
5 m^2 ~ 5 square meters | 5 square units ~ 5 cm^2 | 90 sec ~ 90 seconds | x = 2, x = 3 ~ 2, 3
AB = 3 + 2 = 5 ~ 5 | 5 min ~ 5 minutes | 5 sq. ft ~ 5 ft² | 6 in. ~ 6 inches | 5 units ~ 5 cm
8 feet ~ 8 ft | about 60 ~ 60 | 3 1/2 ~ 3.5 | 5 厘米 ~ 5 cm | 20 °C ~ 20 | 2ab ~ 2ba | 60^o ~ 60
2+3=5 ~ 5 | 3×4 ~ 12 | two ~ 2 | 5 Ω ~ 5 | 3 N ~ 3 | €5 ~ 5
"""


VERDICTS = [(*pair, True) for pair in pairs(SAME)]
VERDICTS += [(*pair, False) for table in (DIFFERENT, UNEQUAL) for pair in pairs(table)]


@pytest.mark.parametrize("prediction, answer, same", VERDICTS)
def test_answers_that_mean_the_same_and_answers_that_do_not(prediction, answer, same):
    assert is_equivalent(prediction, answer) is same


@pytest.mark.parametrize("nothing", ["", " ", "\n", "$$", ".", " " * 500])
def test_nothing_equals_nothing(nothing):
    assert not is_equivalent(nothing, nothing)
    assert not is_equivalent(nothing, "") and not is_equivalent("", nothing)
    assert reward(rf"\boxed{{{nothing}}}", nothing) == 0.0


@pytest.mark.parametrize("wrong", [r"\boxed{60} no: \boxed{61}", r"\boxed{60} \boxed{}", "60"])
def test_reward_reads_the_last_box(wrong):
    assert reward(wrong, "60") == 0.0
    assert reward(rf"< think > {wrong} </think> so \boxed {{60^\circ}}", "60") == 1.0


def give_the_grading_process(monkeypatch, function, *args):
    """Something else to do than tgrl.same."""
    instead = partial(tgrl.grading_process.schedule, function, args)
    monkeypatch.setattr(
        tgrl.grading_process, "schedule", lambda *_, timeout: instead(timeout=timeout)
    )


@pytest.mark.parametrize(
    "hostile", ["9^{9^{9^9}}", "((9!)!)!"]
)  # sympy does not come back from these
def test_a_timeout_is_a_counted_zero_and_the_next_verdicts_are_right(monkeypatch, hostile):
    tgrl.grader_errors.clear()
    start = time.monotonic()
    assert is_equivalent(hostile, "57") is False
    assert 1.5 < time.monotonic() - start < LONG
    assert is_equivalent("2 + 3 + z", "z + 5") and not is_equivalent("2 + 3 + z", "z + 6")
    assert tgrl.grader_errors == {"TimeoutError": 1}
    give_the_grading_process(monkeypatch, bool, 1)  # it would now say yes
    assert is_equivalent(hostile, "57") is True  # so the timeout was not remembered


@pytest.mark.parametrize(
    "call, error", [((os._exit, 1), "ProcessExpired"), ((int, "x"), "ValueError")]
)
def test_a_grading_process_that_dies_or_fails_is_counted_and_replaced(monkeypatch, call, error):
    tgrl.grader_errors.clear()
    with monkeypatch.context() as patch:
        give_the_grading_process(patch, *call)
        assert is_equivalent("x + 1", "1 + x") is False
    assert is_equivalent("x + 1", "1 + x") is True
    assert tgrl.grader_errors == {error: 1}


def test_the_grading_process_ends_with_ours():
    code = "import os, tgrl; print(tgrl.is_equivalent('x+1', '1+x'), flush=True); os.kill(os.getpid(), 9)"
    # the grading process holds the pipes that we read, so this returns when both have ended
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=HERE, timeout=120
    )
    assert done.returncode == -9 and done.stdout == b"True\n"


def test_a_script_grades_and_outlives_hostile_answers(tmp_path):
    """As `python tgrl.py` does: there the functions that grade are those of __main__."""
    code = (HERE / "tgrl.py").read_text().replace('if __name__ == "__main__":', "if False:")
    code += """
if __name__ == "__main__":
    verdicts = [is_equivalent("1 + x", "x + 1"), is_equivalent("9^{9^{9^9}}", "57")]
    started = time.monotonic()
    verdicts.append(is_equivalent("2 + x", "x + 2"))
    print(verdicts, time.monotonic() - started < 30, flush=True)
    leave()
"""
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, cwd=tmp_path, timeout=240
    )
    assert done.stdout == "[True, False, True] True\n", done.stderr


HOSTILE = [
    "x" * 100_000,
    "\\boxed{" * 15_000,
    "\\frac{" * 66,
    "\\sqrt{" * 60 + "2" + "}" * 60,
    "\ud800 5",
]
HOSTILE += ["a\0b5", "5\n6", "é" * 400, "𝟓", "√" * 400, "1" * 400, "^ " * 200, "5 " + "a ./" * 99]
HOSTILE += [
    "\\text{" * 70,
    "5" + "." * 390,
    "A. " * 130,
    "=" * 400,
    "A" * 399 + "=",
    "5" + " " * 390 + "x",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_string_breaks_it(hostile):
    assert is_equivalent(hostile, "57") is False and is_equivalent("57", hostile) is False
    assert is_equivalent("x + 1 + 1", "x + 2")


def test_a_very_long_answer_is_not_compared_as_mathematics(monkeypatch):
    give_the_grading_process(monkeypatch, bool, 1)
    assert is_equivalent("1+1", "2") and is_equivalent("1+" * 50_000, " " + "1+" * 50_000)
    assert not is_equivalent("1+" * 50_000, "2") and not is_equivalent("2", "1+" * 50_000)


PIECES = r"""
\frac \sqrt { } ( ) [ ] ^ _ 1 2 9 0.5 99999 x y \pi \infty \circ ° % \% , . : = < > + - * / ! | & \\ $ \text
\left \right cm ^2 A B. (C) √ π − \angle \sin \log \int \sum \begin{matrix} \end{matrix} \boxed \boxed{ or and
e i 1e999 9^{9^9} \cdot
"""
soup = st.lists(
    st.sampled_from([*PIECES.split(), " ", "\n", "\0", "\ud800", "𝟓"]), max_size=30
).map("".join)
texts = st.one_of(
    soup,
    st.text(max_size=60) | st.text("\ud800\udfff\0\n5", max_size=5),
    st.text("0123456789.,/^{}()-+= x", max_size=40),
    st.integers(1, 70).map(lambda n: r"\sqrt{" * n + "2" + "}" * n),
    st.integers(1, 10**12).map(lambda n: f"{n}^{{{n}}}")
    | st.integers(1, 10**12).map(lambda n: f"1e{n}"),
    soup.map(lambda text: (text * 100_000)[:100_000]),
    st.sampled_from(
        ["", " ", "5", "A", "60", r"2\sqrt{221}", r"\frac{1}{2}", "(1,2)", "yes", "x = 5"]
    ),
)


def test_of_any_two_strings_the_reward_is_zero_or_one():
    end = time.monotonic() + float(os.environ.get("TGRL_FUZZ_SECONDS", 4))

    @settings(
        max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(texts, texts, st.booleans())
    def check(prediction, answer, boxed):
        start = time.monotonic()
        if start < end:
            value = reward(rf"so \boxed{{{prediction}}}" if boxed else prediction, answer)
            assert type(value) is float and value in (0.0, 1.0) and time.monotonic() - start < LONG
            assert value == 0.0 or answer.strip()

    while time.monotonic() < end:
        check()


# ===== Real parts: a tiny Qwen2.5-VL, its processor, its questions =====================================


def noise(rng, width, height):
    """A picture of which every pixel matters."""
    return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))


def encoded(image):
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def make_problem(seed=0, sizes=((56, 56),), question="How many?"):
    rng = random.Random(seed)
    pictures = [noise(rng, *size) for size in sizes]
    row = {"problem": "<image>" * len(sizes) + question, "images": pictures, "answer": "7"}
    return tgrl.read_problem(row)


def tiny_world(**options):
    """Model, encoder and policy, with weights large enough to matter."""
    torch.manual_seed(0)
    small = dict(min_pixels=28 * 28, max_pixels=112 * 112, max_answer=24)
    options = tgrl.Options(**tgrl.TOY | small | options)
    processor = make.make_processor(options.instruction)
    model = make.make_model(len(processor.tokenizer), hidden=64, layers=2, vision_layers=2).eval()
    encoder = tgrl.Encoder(processor, model, options)
    policy = tgrl.Policy(model, encoder.unwritable).eval()
    return SimpleNamespace(
        options=options, processor=processor, model=model, encoder=encoder, policy=policy
    )


@pytest.fixture(scope="module")
def world():
    return tiny_world()


def make_groups(encoder, n_groups=3, seed=0, experts=True):
    """Groups of 4 answers of different length, one of a single token; pictures differ in size and number."""
    rng, groups, sizes = random.Random(seed), [], [((56, 56),), ((84, 56), (28, 112)), ((112, 84),)]
    for g in range(n_groups):
        problem, answers = make_problem(seed + g, sizes[g % 3], "Which? " * (1 + g)), []
        for i, length in enumerate([0, *rng.choices([0, 3, 8, 13], k=3)]):
            ids = [rng.randrange(10, 300) for _ in range(length)] + [encoder.ends[-1]]
            t = tgrl.Trajectory(ids, "", float(rng.random() < 0.5), is_expert=experts and i == 3)
            t.advantage, t.behavior_logp = (
                (1.0, -0.5, 0.25, 1.5)[i],
                [-3 * rng.random() for _ in ids],
            )
            answers.append(t)
        groups.append(tgrl.Group(problem, encoder(problem), answers))
    return groups


def separate_logp(world, prompt, ids):
    """Log-probs [T] of one answer in a row of its own, by the model's own forward."""
    row = torch.cat([prompt.ids, torch.tensor(ids)])[None]
    types = (row == world.model.config.image_token_id).int()
    vision = dict(pixel_values=prompt.pixels, image_grid_thw=prompt.grid)
    world.model.model.rope_deltas = None
    logits = world.model(input_ids=row, mm_token_type_ids=types, **vision).logits[
        0, len(prompt.ids) - 1 : -1
    ]
    logp = logits.index_fill(-1, world.encoder.unwritable, -torch.inf).log_softmax(-1)
    return logp.gather(1, torch.tensor(ids)[:, None])[:, 0]


def geo3k_rows(n=6):
    rng, rows = random.Random(0), []
    for i in range(n):
        rows.append(
            {"images": [noise(rng, 60 + i, 56)], "problem": f"<image>Take {i}.", "answer": str(i)}
        )
    return rows


def to_parquet(rows, path):
    text = datasets.Value("string")
    features = datasets.Features(images=[datasets.Image()], problem=text, answer=text)
    datasets.Dataset.from_list(rows, features).to_parquet(path)


def test_every_source_gives_the_same_problems(world, tmp_path):
    """geometry3k as parquet, ViRL39K as JSONL with paths, and a folder of pictures with metadata.jsonl."""
    to_parquet(geo3k_rows(), tmp_path / "train.parquet")
    want = tgrl.load_problems(str(tmp_path / "train.parquet"), "train", world.encoder)
    assert [p.answer for p in want] == [str(i) for i in range(6)]
    (tmp_path / "images").mkdir()
    virl, metadata = [], []
    for i, problem in enumerate(want):
        (tmp_path / "images" / f"{i}.png").write_bytes(problem.images[0])
        row = {
            "question": problem.question,
            "answer": problem.answer,
            "image": [f"images/{i}.png"],
            "qid": i,
        }
        virl.append(json.dumps(row))
        row = {"file_name": f"{i}.png", "problem": problem.question, "answer": problem.answer}
        metadata.append(json.dumps(row))
    (tmp_path / "virl.jsonl").write_text("\n".join(virl))
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(metadata))
    for name, split, n in (
        ("virl.jsonl", "train", 6),
        ("virl.jsonl", "test[:2]", 2),
        ("images", "train", 6),
    ):
        got = tgrl.load_problems(str(tmp_path / name), split, world.encoder)
        assert sorted(p.id for p in got) == sorted(p.id for p in want[:n]), name


def test_answers_of_virl39k_lose_their_box_and_a_lost_placeholder_comes_back():
    row = {"question": "2 + 2?", "answer": r"\boxed{4}", "image": noise(random.Random(0), 56, 56)}
    problem = tgrl.read_problem(row)
    assert problem.answer == "4" and problem.question == "<image>2 + 2?"


def test_the_prompt_is_pictures_in_order_then_question_then_instruction(world):
    prompt = world.encoder(make_problem(sizes=((56, 56), (112, 56)), question="How many?"))
    assert prompt.grid.prod(1).tolist() == [16, 32]
    text = world.processor.decode(prompt.ids)
    assert text.count("<|image_pad|>") == (16 + 32) // 4
    parts = ["user", "<|image_pad|>", "How many?", world.options.instruction, "assistant"]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)


LIMITS = [(28 * 28, 112 * 112), (56 * 56, 56 * 56), (1, 28 * 28), (100 * 100, 200 * 200)]


@pytest.mark.parametrize("min_pixels, max_pixels", LIMITS)
def test_the_length_of_a_prompt_by_arithmetic_is_its_real_length(min_pixels, max_pixels):
    world, rng = tiny_world(min_pixels=min_pixels, max_pixels=max_pixels), random.Random(0)
    for number in range(40):
        sizes = [(rng.randint(9, 300), rng.randint(9, 300)) for _ in range(1 + number % 3)]
        problem = make_problem(number, sizes, "Which? " * (1 + number))
        try:
            ids, pictures = world.encoder.outline(problem)
        except BadInput as error:
            assert max_pixels < 4000 and "too narrow for --max_pixels" in str(error)
            continue
        prompt = world.encoder(problem)
        assert len(prompt.ids) == len(ids) - len(pictures) + sum(pictures), sizes
        assert pictures == (prompt.grid.prod(1) // 4).tolist()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_kinds_of_pictures_are_measured_as_they_are_decoded(world, kind, mode):
    image = noise(random.Random(0), 90, 57).convert(mode)
    with contextlib.suppress(OSError):  # JPEG has no transparency
        image.save(buffer := io.BytesIO(), kind)
        problem = tgrl.read_problem({"question": "?", "answer": "1", "image": buffer.getvalue()})
        prompt = world.encoder(problem)
        assert world.encoder.outline(problem)[1] == (prompt.grid.prod(1) // 4).tolist()


def test_no_picture_is_decoded_before_it_is_needed(world, tmp_path, monkeypatch):
    to_parquet(geo3k_rows(), tmp_path / "train.parquet")
    monkeypatch.setattr(tgrl, "fetch_image", None)
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr(Image.Image, "convert", None)
    assert len(tgrl.load_problems(f"{tmp_path}/train.parquet", "train", world.encoder)) == 6


def test_bad_rows_are_named_and_good_ones_kept(world, tmp_path, monkeypatch, capsys):
    good = {
        "problem": "<image>Why?",
        "answer": "1",
        "images": [encoded(noise(random.Random(0), 56, 56))],
    }
    bad = {
        "problem .or question. or answer is empty: row 1 .its columns are problem, answer, images": [
            good | {"answer": None},
            good | {"problem": " "},
        ],
        "2 times <image> for 1 pictures: row 3": [good | {"problem": "<image><image>Why?"}],
        "0 times <image> for 0 pictures: row 4": [good | {"problem": "Why?", "images": []}],
        "its prompt is longer than --max_prompt 2048: row 5 .{5} tokens": [
            good | {"problem": "<image>" + "Why? " * 2100}
        ],
        "the question holds a special token of the model: row 6 .an image token": [
            good | {"problem": "<image>Why <|image_pad|>?"}
        ],
        "a picture is missing: row 7 .nowhere.png": [good | {"images": ["nowhere.png"]}],
        "a picture cannot be read: row 8.*; row 9 .cannot identify image file": [
            good | {"images": [good["images"][0][:2000]]},
            good | {"images": [b"PNG"]},
        ],
    }
    rows = [good, *itertools.chain(*bad.values()), good]
    monkeypatch.setattr(tgrl, "read_rows", lambda source, split: iter(rows))
    assert len(tgrl.load_problems("rows", "train", world.encoder)) == 2
    said = capsys.readouterr().out
    for reason, some in bad.items():
        assert re.search(rf"rows: {len(some)} rows left out, {reason}", said), (reason, said)


BAD = [
    ("", "cannot load .*rows.jsonl"),
    ('{"problem": "?"}\n{"problem": ', "cannot load .*rows.jsonl"),
]
BAD += [('{"text": "?", "label": "1"}\n', "no row of .*rows.jsonl can be used")]


@pytest.mark.parametrize("content, words", BAD)
def test_an_unusable_source_says_why(world, tmp_path, content, words):
    if content:
        (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(BadInput, match=words):
        tgrl.load_problems(f"{tmp_path}/rows.jsonl", "train", world.encoder)


# ===== Rollouts =======================================================================================


def test_greedy_rollout_equals_plain_generate(world):
    """Prefilled once, left-padded beside others: the same tokens as one question at a time."""
    prompts = [group.prompt for group in make_groups(world.encoder)]
    answers = tgrl.sample(world.model, world.encoder, prompts, 2, temperature=0)
    for prompt, (first, second) in zip(prompts, answers, strict=True):
        types = (prompt.ids == world.model.config.image_token_id).int()[None]
        vision = dict(
            pixel_values=prompt.pixels, image_grid_thw=prompt.grid, mm_token_type_ids=types
        )
        out = world.model.generate(input_ids=prompt.ids[None], **vision)
        plain = out[0, len(prompt.ids) :].tolist()
        length = next((i + 1 for i, token in enumerate(plain) if token in world.encoder.ends), 24)
        assert first == second == plain[:length]


def test_the_vision_tower_reads_eight_questions_at_a_time(world, monkeypatch):
    seen, real = [], world.model.model.get_image_features
    prompts = [make_groups(world.encoder, 1)[0].prompt] * 10

    def watched(image_grid_thw, **others):
        seen.append(len(image_grid_thw))
        return real(image_grid_thw=image_grid_thw, **others)

    monkeypatch.setattr(world.model.model, "get_image_features", watched)
    answers = tgrl.sample(world.model, world.encoder, prompts, 1, temperature=0)
    assert seen == [8, 2] and answers == answers[:1] * 10


def test_the_cache_with_room_holds_what_hugging_faces_holds():
    rng, places = torch.Generator().manual_seed(0), []
    kinds = (tgrl.RoomyLayer, tgrl.DynamicLayer)
    roomy, plain = (tgrl.Cache(layer_class_to_replicate=kind) for kind in kinds)
    for new in [(2, 2, 5, 4)] + [
        (6, 2, 1, 4)
    ] * 30:  # [B, heads, T, D]: two prompts; three answers each
        both = torch.randn(2, *new, generator=rng)
        held = [torch.stack(cache.update(*both, 0)) for cache in (roomy, plain)]
        assert torch.equal(*held) and roomy.get_seq_length() == plain.get_seq_length()
        places.append(roomy.layers[0].keys.data_ptr())
        if new[2] > 1:
            roomy.layers[0].make_room(n_answers=3, n_tokens=30)
            plain.batch_repeat_interleave(3)
    assert len(set(places[1:])) == 1  # no copy after the prefill


def test_running_out_of_memory_halves_the_batch_and_keeps_what_is_done(world, monkeypatch, capsys):
    prompts = [group.prompt for group in make_groups(world.encoder, 5)]
    want = tgrl.sample(world.model, world.encoder, prompts, 2, temperature=0)
    sizes, real = [], tgrl.sample_batch

    def small_card(actor, encoder, some, n, temperature):
        sizes.append(len(some))
        if len(some) > 2 or sizes == [5, 2, 2]:  # the second time after something was done
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(actor, encoder, some, n, temperature)

    monkeypatch.setattr(tgrl, "sample_batch", small_card)
    monkeypatch.setattr(world.options, "generate_batch", 10)
    assert tgrl.sample(world.model, world.encoder, prompts, 2, temperature=0) == want
    assert sizes == [5, 2, 2, 1, 1, 1] and world.options.generate_batch == 2  # remembered
    assert "from now on 4 answers at once" in capsys.readouterr().out

    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tgrl, "sample_batch", no_room)
    with pytest.raises(
        BadInput, match="2 answers to one question do not fit into memory: lower --max_answer"
    ):
        tgrl.sample(world.model, world.encoder, prompts, 2)


def test_a_second_try_after_running_out_of_memory_samples_the_same(world, monkeypatch):
    prompts = [group.prompt for group in make_groups(world.encoder, 2)]
    real, tries = tgrl.sample_batch, []

    def late(*args):
        answers = real(*args)  # it draws random numbers before it fails
        tries.append(len(args[2]))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answers

    monkeypatch.setattr(world.options, "generate_batch", 4)
    monkeypatch.setattr(tgrl, "sample_batch", late)
    torch.manual_seed(3)
    got = tgrl.sample(world.model, world.encoder, prompts, 2)
    assert tries == [2, 1, 1]
    monkeypatch.setattr(world.options, "generate_batch", 2)
    monkeypatch.setattr(tgrl, "sample_batch", real)
    torch.manual_seed(3)
    assert tgrl.sample(world.model, world.encoder, prompts, 2) == got


def test_rollout_log_probs_are_training_log_probs(world, monkeypatch):
    """What generate sampled from, recorded by a processor of its own, against Policy on the same answers."""
    seen, real = [], world.model.generate
    prompt = make_groups(world.encoder, 1)[0].prompt

    def record(_, scores):
        seen.append(scores.log_softmax(-1))
        return scores

    monkeypatch.setattr(
        world.model, "generate", lambda *a, **k: real(*a, logits_processor=[record], **k)
    )
    [answers] = tgrl.sample(world.model, world.encoder, [prompt], 6)
    assert (world.model.generation_config.temperature, world.model.generation_config.top_k) == (
        1,
        0,
    )
    group = tgrl.Group(None, prompt, [tgrl.Trajectory(ids, "", 0.0) for ids in answers])
    for row, (t, logp) in enumerate(tgrl.score(world.policy, [group], 1)):
        sampled = [float(seen[place][row, token]) for place, token in enumerate(t.ids)]
        assert sampled == pytest.approx(logp, abs=1e-4)


def test_sampling_ignores_the_generation_config_of_the_checkpoint(world, monkeypatch):
    """With top_k 1 from the checkpoint, answers would all be the greedy one."""
    hostile = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, min_new_tokens=9)
    monkeypatch.setattr(world.model, "generation_config", hostile)
    [answers] = tgrl.sample(
        world.model, world.encoder, [make_groups(world.encoder, 1)[0].prompt], 8
    )
    assert len(set(map(tuple, answers))) > 4


def forced(model, token, value=1e4):
    """A hook that makes one token all but certain."""
    token = torch.tensor([token])
    return model.lm_head.register_forward_hook(lambda m, i, out: out.index_fill(-1, token, value))


def test_vision_tokens_are_never_sampled_even_if_the_model_wants_nothing_else(world):
    prompt, image_token = make_groups(world.encoder, 1)[0].prompt, world.model.config.image_token_id
    hook = forced(world.model, image_token)
    [answers] = tgrl.sample(world.model, world.encoder, [prompt], 4)
    group = tgrl.Group(None, prompt, [tgrl.Trajectory(ids, "", 0.0) for ids in answers])
    scored = list(tgrl.score(world.policy, [group], 1))
    hook.remove()
    assert image_token not in itertools.chain(*answers)
    assert all(math.isfinite(x) for _, logp in scored for x in logp)


def test_an_answer_ends_with_its_first_end_token_be_it_padding_or_not(world, monkeypatch):
    prompt = make_groups(world.encoder, 1)[0].prompt
    assert (
        len(world.encoder.ends) == 2
        and world.processor.tokenizer.pad_token_id in world.encoder.ends
    )
    for end in world.encoder.ends:
        hook = forced(world.model, end)
        assert tgrl.sample(world.model, world.encoder, [prompt], 3) == [[[end]] * 3]
        hook.remove()
    group = tgrl.Group(None, prompt, [tgrl.Trajectory([end], "", 0.0)])
    assert tgrl.pack([group]).mask.sum() == 1  # and it is trained on
    monkeypatch.setattr(world.encoder, "ends", list(range(20, 120)))  # answers that end apart
    [answers] = tgrl.sample(world.model, world.encoder, [prompt], 8)
    assert len(set(map(len, answers))) > 2 and not [
        i for ids in answers for i in ids[:-1] if 20 <= i < 120
    ]


# ===== Log-probs: a group is one row ==================================================================


@pytest.mark.parametrize("cost_ratio, more", [(math.inf, 0), (-12.0, 1)])
def test_a_group_in_one_row_or_several_equals_separate_rows(world, cost_ratio, more):
    groups = make_groups(world.encoder)
    batch = tgrl.pack(groups, cost_ratio=cost_ratio)
    assert len(batch.ids) == len(groups) + more
    weight = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0)) * batch.mask
    world.model.zero_grad()
    logp = world.policy(batch)
    (logp * weight).sum().backward()
    packed = {name: p.grad.clone() for name, p in world.model.named_parameters()}
    world.model.zero_grad()
    answers = [(group.prompt, t.ids) for group in groups for t in group.answers]
    for (prompt, ids), row, w in zip(answers, logp, weight, strict=True):
        alone = separate_logp(world, prompt, ids)
        assert torch.allclose(row[: len(ids)], alone, atol=1e-4) and not row[len(ids) :].any()
        (alone * w[: len(ids)]).sum().backward()
    for name, p in world.model.named_parameters():
        assert (packed[name] - p.grad).norm() <= 1e-5 * p.grad.norm() + 1e-7, name
    world.model.zero_grad()


def test_without_the_types_of_its_tokens_a_picture_would_lose_its_positions(world, monkeypatch):
    """Guards the test above: had the encoder dropped mm_token_type_ids, the comparison would have failed."""
    real, group = world.encoder.rope_index, make_groups(world.encoder, 1)[0]

    def without_types(ids, mm_token_type_ids, image_grid_thw):
        return real(ids, 0 * mm_token_type_ids)

    monkeypatch.setattr(world.encoder, "rope_index", without_types)
    prompt, ids = world.encoder(group.problem), group.answers[1].ids
    with torch.no_grad():
        logp = world.policy(tgrl.pack([tgrl.Group(None, prompt, group.answers)]))[1][: len(ids)]
        assert not torch.allclose(logp, separate_logp(world, group.prompt, ids), atol=1e-4)


def test_answers_do_not_see_each_other(world):
    group = make_groups(world.encoder, 1)[0]
    with torch.no_grad():
        before = world.policy(tgrl.pack([group]))
        group.answers[1].ids[:-1] = [11] * (len(group.answers[1].ids) - 1)
        after = world.policy(tgrl.pack([group]))
    assert torch.equal(before[2:], after[2:]) and torch.equal(before[0], after[0])


def test_gradient_checkpointing_recomputes_and_changes_nothing(world):
    batch, grads, calls = tgrl.pack(make_groups(world.encoder, 2)), [], []
    world.model.model.language_model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    for enable in (
        world.model.activation_checkpointing_disable,
        world.model.activation_checkpointing_enable,
    ):
        enable()
        world.policy.train().zero_grad()
        world.policy(batch).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in world.model.parameters()]))
    world.model.activation_checkpointing_disable()
    world.policy.eval().zero_grad()
    assert len(calls) == 1 + 2 and torch.allclose(*grads, rtol=1e-5, atol=1e-6)


# ===== Experts: the command, as a user starts it ======================================================


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """A model and six questions on disk, a cache of experts, and the options of a run of seconds."""
    folder = tmp_path_factory.mktemp("run")
    world.model.generation_config = world.encoder.generation_config
    world.model.save_pretrained(folder / "model")
    world.processor.save_pretrained(folder / "model")
    to_parquet(geo3k_rows(), folder / "train.parquet")
    shared = tgrl.TOY | dict(
        min_pixels=784, max_pixels=12544, max_answer=8, generate_batch=12, micro_batch=1
    )
    shared |= dict(
        model=f"{folder}/model", data=f"{folder}/train.parquet", experts=f"{folder}/experts.jsonl"
    )
    train = shared | dict(
        steps=2, questions_per_rollout=4, questions_per_update=2, n_on=3, max_draws=2
    )
    tgrl.make_experts(tgrl.Experts(**shared, samples=3))
    return SimpleNamespace(path=folder, shared=shared, train=train | dict(lr=1e-3, every=2))


def cached(path):  # question -> the token ids of its answers
    answers = collections.defaultdict(list)
    for record in tgrl.read_records(path):
        answers[record["question"]].append(tuple(record["ids"]))
    return answers


def test_expert_log_probs_are_the_experts_own(folder, world):
    records = list(tgrl.read_records(folder.path / "experts.jsonl"))
    assert len(records) == 18 and {record["source"] for record in records} == {
        folder.shared["model"]
    }
    problems = {p.id: p for p in tgrl.load_problems(folder.shared["data"], "train", world.encoder)}
    for record in records[:6]:
        problem = problems[record["question"]]
        assert record["reward"] == reward(record["text"], problem.answer) and record["is_expert"]
        want = separate_logp(world, world.encoder(problem), record["ids"])
        assert record["behavior_logp"] == pytest.approx(want.tolist(), abs=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_experts_that_are_killed_continue_with_nothing_lost_or_doubled(folder, tmp_path, processes):
    path = tmp_path / "experts.jsonl"
    options = folder.shared | dict(experts=str(path), generate_batch=3, samples=3, max_answer=60)
    process = torchrun(processes, "experts", options, wait=False)
    until(
        lambda: (
            path.exists() and len(path.read_bytes().splitlines()) >= 6 or process.poll() is not None
        )
    )
    kill(process)
    written = path.read_bytes()
    path.write_bytes(written[:-25])  # a record torn in the middle
    torchrun(processes, "experts", options)
    assert path.read_bytes().startswith(written[:-25])
    answers = cached(path)
    assert len(answers) == 6 and {len(some) for some in answers.values()} == {3}


def test_more_samples_are_other_samples(folder, tmp_path):
    options = folder.shared | dict(experts=str(tmp_path / "experts.jsonl"), max_answer=24)
    for samples in (2, 4):
        tgrl.make_experts(tgrl.Experts(**options, samples=samples))
    assert all(
        len(some) == len(set(some)) == 4 for some in cached(tmp_path / "experts.jsonl").values()
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (
            dict(instruction="Answer in French."),
            "answers none of these questions as they are asked",
        ),
        (
            dict(min_pixels=168**2, max_pixels=168**2),
            "answers none of these questions as they are asked",
        ),
        (dict(experts="nowhere.jsonl"), "no --experts nowhere.jsonl; make it by `tgrl.py experts`"),
        (dict(data="other.parquet"), "answers none of these questions"),
        (dict(model="nowhere"), "cannot load model nowhere"),
        (
            dict(questions_per_update=3),
            "--questions_per_rollout 4 must be a multiple of --questions_per_update 3",
        ),
    ],
)
def test_a_training_that_cannot_start_says_why(folder, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    to_parquet(geo3k_rows(9)[6:], tmp_path / "other.parquet")
    with pytest.raises(BadInput, match=words):
        tgrl.train(tgrl.Train(**folder.train | dict(out=f"{tmp_path}/out") | change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "record", [{"text": "no"}, {"question": "0", "ids": [1], "behavior_logp": [0.1]}]
)
def test_a_file_that_is_no_cache_is_refused_and_left_alone(folder, tmp_path, record):
    path = tmp_path / "experts.jsonl"
    tgrl.append_records(path, [record])
    before = path.read_bytes()
    with pytest.raises(
        BadInput, match="holds a record that is not an answer with a log-prob for each token"
    ):
        tgrl.make_experts(tgrl.Experts(**folder.shared | dict(experts=str(path))))
    assert path.read_bytes() == before


def test_a_cache_of_another_expert_is_refused_and_left_alone(folder, tmp_path):
    path = tmp_path / "experts.jsonl"
    record = next(tgrl.read_records(folder.path / "experts.jsonl"))
    tgrl.append_records(path, [record | {"source": "Qwen/Other"}])
    before = path.read_bytes()
    words = (
        "holds answers of Qwen/Other, not of .*model: give another --experts file, or that --model"
    )
    with pytest.raises(BadInput, match=words):
        tgrl.make_experts(tgrl.Experts(**folder.shared | dict(experts=str(path))))
    assert path.read_bytes() == before
    problems = tgrl.load_problems(folder.shared["data"], "train", tiny_encoder(folder))
    assert len(tgrl.read_cache(path, problems)[record["question"]]) == 1  # for training any will do


def tiny_encoder(folder):
    model, processor = tgrl.load_model(folder.shared["model"])
    options = tgrl.Options(**{name: folder.shared[name] for name in tgrl.TOY})
    return tgrl.Encoder(processor, model, options)


def test_experts_need_a_file_to_write(folder):
    with pytest.raises(BadInput, match="--experts is the file to write; `self` is for train"):
        tgrl.make_experts(tgrl.Experts(**folder.shared | dict(experts="self")))


def test_spread_is_for_one_process(folder, monkeypatch):
    monkeypatch.setattr(tgrl, "start_processes", lambda: (SimpleNamespace(num_processes=2), None))
    with pytest.raises(BadInput, match="--spread is for one process"):
        tgrl.make_experts(tgrl.Experts(**folder.shared, spread=True))


def test_a_torn_record_stands_alone_and_is_skipped(tmp_path):
    path = tmp_path / "records.jsonl"
    tgrl.append_records(path, [{"a": 1}, {"a": 2}])
    path.write_bytes(path.read_bytes()[:-3])
    tgrl.append_records(path, [{"a": 3}])
    assert list(tgrl.read_records(path)) == [{"a": 1}, {"a": 3}]


def test_two_writers_do_not_tear_each_others_records(tmp_path):
    path = tmp_path / "records.jsonl"
    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda i: tgrl.append_records(path, [{"i": i, "pad": "x" * 20000}] * 2),
                    range(40),
                )
            )
        assert sorted(record["i"] for record in tgrl.read_records(path)) == sorted([*range(40)] * 2)
        path.unlink()


def test_answers_that_could_not_be_graded_are_told(folder, tmp_path, monkeypatch, capsys):
    tgrl.grader_errors.clear()
    monkeypatch.setattr(
        tgrl, "reward", lambda text, answer: float(tgrl.is_equivalent("1 + x", answer))
    )
    give_the_grading_process(monkeypatch, int, "x")
    tgrl.make_experts(tgrl.Experts(**folder.shared | dict(experts=f"{tmp_path}/experts.jsonl")))
    assert "could not be graded, and count as wrong: {'ValueError': 24}" in capsys.readouterr().out
    tgrl.grader_errors.clear()


# ----- experts that the policy makes itself


def test_a_wrong_answer_is_cut_before_the_first_step_with_a_doubted_token(world):
    tokenizer = copy.deepcopy(world.processor.tokenizer)
    tokenizer.add_tokens([".\n"])  # as Qwen's has
    ids = tokenizer("width 3.5. area 4.\ntotal 7\n5").input_ids
    cuts = {
        0: 0,
        3: 0,
        4: 0,
        5: 0,
        6: 6,
        8: 6,
        9: 6,
        10: 10,
        13: 10,
        14: 10,
        15: 15,
    }  # doubted: kept
    for (doubted, kept), (low, last) in product(
        cuts.items(), [(-2.5, -9), (-1.9, -1.8)]
    ):  # first; lowest
        logp = [low if i == doubted else -0.1 for i in range(15)] + [last]
        answer = tgrl.Trajectory(ids, "", 0.0, behavior_logp=logp)
        assert tgrl.before_doubt(answer, tokenizer.decode) == kept


@pytest.mark.parametrize("right_round", [1, 2, 3, 4])
def test_a_rectified_answer_has_the_log_probs_it_was_sampled_with(world, monkeypatch, right_round):
    """Its beginning under the question's own prompt; what later rounds wrote, under the one that asks to
    look again and that it was really written with."""
    group = make_groups(world.encoder, 1, experts=False)[0]
    wrong = tgrl.Trajectory(
        world.processor.tokenizer("width 3. area = 4. total = 5").input_ids, "", 0.0
    )
    group.answers = [wrong]
    first_cut = len(world.processor.tokenizer("width 3.").input_ids)
    cuts, graded = [first_cut, first_cut + 3, first_cut + 5], []
    seen = iter(cuts)
    monkeypatch.setattr(tgrl, "before_doubt", lambda answer, decode: next(seen))

    def in_time(text, answer):
        graded.append(text)
        return float(len(graded) > 4 * (right_round - 1))  # 4 continuations a round

    monkeypatch.setattr(tgrl, "reward", in_time)
    monkeypatch.setattr(world.encoder, "ends", [world.encoder.ends[0]])
    monkeypatch.setattr(tgrl, "grade", partial(finished_grade, tgrl.grade))
    [found], metrics = tgrl.rectify(world.model, world.encoder, [group], tries=4, rounds=3)
    assert metrics == {"rectified": (right_round <= 3, 1)} and len(graded) == 4 * min(
        3, right_round
    )
    if right_round == 4:
        assert found == []
        return
    [right] = found
    assert (
        right.source == "self"
        and right.is_expert
        and right.ids[:first_cut] == wrong.ids[:first_cut]
    )
    looking = tgrl.look_again(group.problem, [], world.encoder)
    assert len(looking.grid) == 2 and tgrl.LOOK.split()[0] in world.processor.decode(looking.ids)
    begun = separate_logp(world, group.prompt, wrong.ids)[:first_cut]
    ended = separate_logp(world, looking, right.ids)[first_cut:]
    assert right.behavior_logp == pytest.approx([*begun.tolist(), *ended.tolist()], abs=1e-4)


def finished_grade(real, ids, problem, encoder):
    """A random model hardly finds the end."""
    return dataclasses.replace(real(ids, problem, encoder), finished=True)


def test_only_wrong_answers_are_rectified(world):
    group = make_groups(world.encoder, 1, experts=False)[0]
    for answer in group.answers:
        answer.reward = 1.0
    assert tgrl.rectify(world.model, world.encoder, [group], 4, 2) == ([[]], {"rectified": (0, 0)})


# ===== Training =======================================================================================


def records_of(out):
    """Header, and records by step; of two of a step the later counts, key by key."""
    header, *records = tgrl.read_records(Path(out, "metrics.jsonl"))
    steps = collections.defaultdict(dict)
    for record in records:
        if "step" in record:
            steps[record["step"]] |= record
    return header, steps


@pytest.fixture
def odd_is_right(monkeypatch):
    """A random model is never right; this gives groups with contrast."""
    monkeypatch.setattr(tgrl, "reward", lambda text, answer: float(len(text) % 2))


TABLE_1 = {
    "TGRL": {},
    "w/o Filter": dict(filter=False),
    "w/o Reweight": dict(reweight=False),
    "w/o Expert": dict(n_off=0, n_on=4),
    "own experts": dict(experts="self", max_answer=24),
}


@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
@pytest.mark.parametrize("row", TABLE_1)
def test_every_row_of_table_1_trains(folder, tmp_path, odd_is_right, algorithm, row):
    """Real rollouts, experts and updates; then the run is recorded, and the trained model loads."""
    more = dict(
        algorithm=algorithm, out=str(tmp_path), val_data=folder.train["data"], val_split="train"
    )
    options = tgrl.Train(**folder.train | more | TABLE_1[row])
    before = dict(tgrl.load_model(options.model)[0].named_parameters())
    means = tgrl.train(options, tgrl.own_experts(options))
    header, records = records_of(tmp_path)
    assert header["config"]["algorithm"] == algorithm and sorted(records) == [0, 1, 2]
    assert set(records[0]) == {"step", "accuracy"}  # before training
    assert {"reward", "entropy", "grad_norm", "ratio", "objective", "seconds"} <= set(records[1])
    assert ("kl" in records[1]) == (algorithm == "grpo")
    assert ("rectified" in records[1]) == (row == "own experts")
    assert ("expert_reward" in records[1] or row == "own experts") == (row != "w/o Expert")
    assert records[2]["accuracy"] == means["accuracy"]
    after = dict(tgrl.load_model(str(tmp_path / "model"))[0].named_parameters())
    assert not [name for name, p in after.items() if torch.equal(p, before[name])]
    group = next(tgrl.read_records(tmp_path / "groups.jsonl"))
    for t in group["answers"]:
        assert len(t["tokens"]) == len(t["ids"]) == len(t["logp"]) == len(t["behavior_logp"])


def group_of(rewards, experts=()):
    answers = [tgrl.Trajectory([1], "", float(r)) for r in rewards]
    answers += [tgrl.Trajectory([1], "", float(r), is_expert=True) for r in experts]
    return tgrl.Group(make_problem(), None, answers)


@pytest.mark.parametrize(
    "own, expert, use_filter, contrast",
    [
        ([0, 0], 1, True, True),  # rescued by its expert
        ([1, 1], 0, True, False),  # a masked expert alone keeps nothing
        ([0, 0], 0, True, False),
        ([1, 1], 1, True, False),
        ([0, 1], 0, True, True),
        ([1, 1], 0, False, True),
    ],
)
def test_what_counts_as_contrast(own, expert, use_filter, contrast):
    group = group_of(own, [expert])
    tgrl.set_advantages(group, use_filter)
    assert group.has_contrast == contrast
    assert [t.expert_ok for t in group.answers] == [True, True, expert == 1 or not use_filter]
    want = group_advantages(
        torch.tensor([[*own, expert]]).float()
    )  # a wrong expert counts in mean, std
    assert [t.advantage for t in group.answers] == want[0].tolist()


@pytest.mark.parametrize(
    "algorithm, contrast, draws",
    [
        ("grpo", [1], [4]),  # it draws once, and takes all
        ("dapo", [1, 0, 0], [4, 4, 4]),  # at most three times here; then it fills up
        (
            "dapo",
            [3, 0, 1],
            [4, 2, 2],
        ),  # a missing one, and three of four, then three of six with contrast
        ("dapo", [2, 4], [4, 4]),  # two more than needed
    ],
)
def test_dapo_draws_until_it_has_contrast(
    folder, tmp_path, monkeypatch, algorithm, contrast, draws
):
    seen, trained = [], []

    def rolled(actor, encoder, problems, n, temperature=1.0, show=None):
        seen.append(len(problems))
        groups = [
            group_of([i < contrast[len(seen) - 1], False, False]) for i in range(len(problems))
        ]
        for group in groups:
            group.prompt = encoder(group.problem)
        return groups

    monkeypatch.setattr(tgrl, "rollout", rolled)
    real = tgrl.pack

    def packed(groups, *args):
        trained.extend(groups)
        return real(groups, *args)

    monkeypatch.setattr(tgrl, "pack", packed)
    monkeypatch.setattr(tgrl, "score", lambda *_: [])
    more = dict(out=str(tmp_path), n_off=0, steps=1, max_draws=None if algorithm == "grpo" else 3)
    more |= dict(kl_coef=0.0)
    tgrl.train(tgrl.Train(**folder.train | dict(algorithm=algorithm) | more))
    assert seen == draws and len(trained) == 4
    assert sum(group.has_contrast for group in trained) == min(4, sum(contrast))


@pytest.mark.parametrize(
    "n_chosen, n_drawn, more",
    [
        ([4, 4], 8, 0),
        ([9, 4], 16, 0),  # a surplus of one is none for the other
        ([0, 0], 8, 4),
        ([3, 1], 8, 4),  # 3 are missing; every second question gives a group: 6, but the quota is 4
        ([4, 3], 8, 2),  # 1 is missing: 8/7 questions
    ],
)
def test_as_many_are_drawn_again_as_the_process_that_lacks_most_needs(n_chosen, n_drawn, more):
    assert tgrl.questions_to_draw(4, n_chosen, n_drawn) == more


def test_a_question_is_drawn_once_an_epoch():
    problems = [make_problem(seed) for seed in range(6)]
    drawn = tgrl.questions_from(problems, 1, 0, 4) + tgrl.questions_from(problems, 1, 4, 8)
    ids = [problem.id for problem in drawn]
    assert len(set(ids[:6])) == len(set(ids[6:])) == 6 and ids[:6] != ids[6:]
    assert ids != [problem.id for problem in tgrl.questions_from(problems, 2, 0, 12)]


def test_a_group_takes_n_off_of_its_cached_answers_or_as_many_as_there_are(
    folder, world, monkeypatch
):
    options = tgrl.Train(**folder.train | dict(n_off=2))
    problems = tgrl.load_problems(options.data, "train", world.encoder)
    read = tgrl.read_cache

    def shortened(*args):
        cache = read(*args)
        del cache[problems[1].id][1:]
        return cache

    monkeypatch.setattr(tgrl, "read_cache", shortened)
    find = tgrl.cached_experts(options, problems)
    groups = [tgrl.Group(problem, None, []) for problem in (*problems[:2], problems[0])]
    (first, second, again), metrics = find(None, None, groups)
    assert (len(first), len(second), metrics) == (2, 1, {}) and first[0] != first[1]
    assert not {id(answer) for answer in first} & {id(answer) for answer in again}  # copies


def test_the_second_of_two_updates_is_off_policy(folder, tmp_path, odd_is_right, monkeypatch):
    """pi_old is from before the first update, by the forward pass of training: there the ratio is 1."""
    ratios, real = [], tgrl.tgrl_loss

    def watched(*args, **options):
        loss, metrics = real(*args, **options)
        ratios.append(float(metrics["ratio"][0] / metrics["ratio"][1]))
        return loss, metrics

    monkeypatch.setattr(tgrl, "tgrl_loss", watched)
    more = dict(out=str(tmp_path), n_off=0, n_on=4, steps=1, lr=1e-2, micro_batch=2)
    tgrl.train(tgrl.Train(**folder.train | more))
    assert abs(ratios[0] - 1) < 1e-5 < 1e-3 < abs(ratios[1] - 1)


@pytest.mark.parametrize("token_mean", [False, True])
def test_the_kl_is_a_mean_over_the_policys_own(
    folder, tmp_path, odd_is_right, monkeypatch, token_mean
):
    """Its weight does not depend on how many experts are in the groups, nor on how long their answers are."""
    seen, real = [], tgrl.tgrl_loss

    def watched(**given):
        shares = given["kl_shares"]
        assert not shares[given["is_expert"]].any() and given["kl_coef"] == 0.01
        seen.append(float(shares.sum()))
        return real(**given)

    monkeypatch.setattr(tgrl, "tgrl_loss", watched)
    options = dict(
        out=str(tmp_path), algorithm="grpo", token_mean=token_mean, steps=1, micro_batch=1
    )
    tgrl.train(tgrl.Train(**folder.train | options))
    updates = [sum(seen[:2]), sum(seen[2:])]  # of two groups each, one at a time
    assert len(seen) == 4 and updates == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("advantage", [math.inf, 0.0])
def test_a_gradient_that_is_not_finite_or_nothing_changes_nothing(
    folder, tmp_path, monkeypatch, advantage
):
    def spoil(group, use_filter):
        for t in group.answers:
            t.advantage = advantage

    monkeypatch.setattr(tgrl, "set_advantages", spoil)
    tgrl.train(tgrl.Train(**folder.train | dict(out=str(tmp_path), steps=1, n_off=0, n_on=4)))
    before, after = (tgrl.load_model(f"{path}/model")[0] for path in (folder.path, tmp_path))
    assert all(map(torch.equal, before.parameters(), after.parameters()))


@pytest.mark.parametrize("tied", [True, False])
def test_the_policy_begins_as_the_actor_to_the_bit(tied):
    tgrl.start_processes()
    processor = make.make_processor()
    actor = make.make_model(
        len(processor.tokenizer), hidden=64, layers=2, vision_layers=1, tied=tied
    )
    encoder = tgrl.Encoder(processor, actor, tgrl.Options(**tgrl.TOY))
    policy = tgrl.make_policy(actor, encoder.unwritable)
    for (name, mine), (other, full) in zip(
        policy.named_parameters(), actor.named_parameters(), strict=True
    ):
        assert name == f"model.{other}" and torch.equal(mine.full_tensor(), full)
    for mine, full in zip(policy.buffers(), actor.buffers(), strict=True):
        assert torch.equal(mine, full) and mine.dtype == full.dtype
    assert (policy.model.lm_head.weight is policy.model.get_input_embeddings().weight) == tied


def test_in_bfloat16_the_policy_is_the_actor(world):
    """FSDP would round the rotary embeddings of the vision tower, if it cast the inputs of each block."""
    tgrl.start_processes()
    actor = copy.deepcopy(world.model)
    for p in actor.parameters():
        p.data = p.data.bfloat16()
    batch = tgrl.pack(make_groups(world.encoder, 2))
    policy = tgrl.make_policy(actor, world.encoder.unwritable)
    with torch.no_grad():
        assert torch.equal(
            policy.eval()(batch), tgrl.Policy(actor, world.encoder.unwritable)(batch)
        )


def qwen_processor():
    """With the real vocabulary of Qwen, which the package dashscope brings."""
    dashscope = pytest.importorskip("dashscope")
    pytest.importorskip("tiktoken")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end"
    special += " quad_start quad_end vision_start vision_end vision_pad image_pad video_pad"
    special = [f"<|{name}|>" for name in special.split()]
    bpe = TikTokenConverter(
        vocab_file=str(Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken"),
        pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        extra_special_tokens=special,
    ).converted()
    processor = make.make_processor()
    ends = dict(
        eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=special
    )
    processor.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **ends)
    return processor


@pytest.mark.parametrize("experts", ["cache", "self"])
def test_the_real_vocabulary_with_unused_embedding_rows_trains(
    tmp_path, folder, odd_is_right, experts
):
    """As in Qwen2.5-VL-3B, which has 151936 rows, and 151665 tokens."""
    processor = qwen_processor()
    tokenizer = processor.tokenizer
    assert (
        len(tokenizer) == 151657
        and tokenizer("12.\n\nSo").input_ids[2] == tokenizer(".\n\n").input_ids[0]
    )
    torch.manual_seed(0)
    model = make.make_model(151936, hidden=32, layers=1, vision_layers=1)
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    ids = dict(
        zip(names, (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names), strict=True)
    )
    model.config.vision_start_token_id, model.config.vision_end_token_id = (
        ids["vision_start"],
        ids["vision_end"],
    )
    model.config.image_token_id, model.config.video_token_id = ids["image_pad"], ids["video_pad"]
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1])
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    shared = folder.shared | dict(
        model=f"{tmp_path}/model", experts=f"{tmp_path}/experts.jsonl", max_answer=12
    )
    if experts == "cache":
        tgrl.make_experts(tgrl.Experts(**shared, samples=1))
    run = {name: folder.train[name] for name in folder.train if name not in folder.shared}
    options = tgrl.Train(**shared | run | dict(out=f"{tmp_path}/out", steps=1))
    options.experts = options.experts if experts == "cache" else "self"
    means = tgrl.train(options, tgrl.own_experts(options))
    assert means["grad_norm"] > 0
    for record in tgrl.read_records(tmp_path / "out" / "groups.jsonl"):
        assert all(
            token < len(tokenizer) for answer in record["answers"] for token in answer["ids"]
        )


# ===== Several processes, and continuing ==============================================================


def until(event, seconds=240):
    """Wait for an event, not for a moment of the clock; a hang is a failure, too."""
    deadline = time.monotonic() + seconds
    while not event():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def torchrun(processes, job, options, result="", wait=True, nodes="--standalone"):
    command = [sys.executable, "-m", "torch.distributed.run", *nodes.split()]
    command += ["--nproc-per-node", str(processes), __file__, job, json.dumps(options), str(result)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    return finish(process) if wait else process


def finish(process):
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    return said


def children_of(parent):
    """By /proc, or where there is none, as on a Mac, by ps, which each of those has."""
    if Path("/proc/self/stat").exists():
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    else:
        lines = subprocess.run(
            ["ps", "-Ao", "pid=,ppid="], capture_output=True, text=True
        ).stdout.splitlines()
        found = dict(map(int, line.split()) for line in lines)
    return [pid for pid, its_parent in found.items() if its_parent == parent]


def kill(process):
    """SIGKILL to the launcher and to its workers, which have sessions of their own."""
    for pid in [process.pid, *children_of(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert process.wait() != 0, "it was over before the kill"


def three_updates(options, experts, result):
    """The real loop on given groups; its gradients and weights, and what this process holds of them."""
    gradients, saved, groups, real = [], [], [], torch.nn.utils.clip_grad_norm_

    def given(actor, encoder, problems, n, temperature=1.0, show=None):
        groups.extend([] if groups else make_groups(encoder, 8, seed=5, experts=experts))
        return copy.deepcopy(groups[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])])

    def clip(parameters, max_norm):
        parameters = list(parameters)
        gradients.append(torch.cat([p.grad.full_tensor().flatten() for p in parameters]))
        return real(parameters, max_norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tgrl, "rollout", given)
        patch.setattr(tgrl, "set_advantages", lambda group, _: setattr(group, "has_contrast", True))
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        patch.setattr(
            tgrl,
            "save_checkpoint",
            lambda out, policy, optimizer, *_: saved.append((policy, optimizer)),
        )
        tgrl.train(tgrl.Train(**options, n_off=0))
    policy, optimizer = saved[-1]
    parameters = list(policy.parameters())
    weights = torch.cat([p.full_tensor().flatten() for p in parameters])
    exported, _ = tgrl.load_model(f"{options['out']}/model")
    assert torch.equal(weights, torch.cat([p.flatten() for p in exported.parameters()]))
    held = [*parameters, *(state["exp_avg"] for state in optimizer.state.values())]
    share = torch.tensor(sum(x.to_local().numel() for x in held) / (2 * weights.numel()))
    last = records_of(options["out"])[1][3]
    metrics = torch.tensor([last[name] for name in ("objective", "entropy", "ratio", "grad_norm")])
    kept = dict(gradients=torch.stack(gradients), weights=weights, share=share, metrics=metrics)
    save_file(kept, f"{result}.{os.environ['RANK']}")


def worker(job, options, result):
    """What torchrun starts below, on each process."""
    if job == "experts":
        return tgrl.make_experts(tgrl.Experts(**options))
    if job == "updates":
        for algorithm, experts in itertools.product(["grpo", "dapo"], [True, False]):
            more = dict(algorithm=algorithm, out=f"{options['out']}.{algorithm}.{experts}")
            three_updates(options | more, experts, f"{result}.{algorithm}.{experts}")
        return None
    rank = int(os.environ["RANK"])
    tgrl.reward = lambda text, answer: float(len(text) % 2)  # groups with contrast
    if job == "uneven":  # all groups degenerate on one process, hardly any on the other
        tgrl.reward = lambda text, answer: float(rank and len(text) % 2)
    return tgrl.train(tgrl.Train(**options))


def test_any_number_of_processes_gives_the_same_updates(folder, tmp_path):
    """FSDP2 on gloo: the same gradients and weights on 1, 2 and 4 processes, and on two "nodes"."""
    options = folder.train | dict(lr=1e-4, steps=3, every=100)
    options |= dict(questions_per_rollout=8, questions_per_update=8)
    for processes in (1, 2, 4):
        out = dict(out=f"{tmp_path}/out{processes}")
        torchrun(processes, "updates", options | out, tmp_path / str(processes))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = f"--nnodes 2 --master-addr 127.0.0.1 --master-port {port} --node-rank "
    options |= dict(out=f"{tmp_path}/nodes")
    agents = [
        torchrun(1, "updates", options, tmp_path / "nodes", wait=False, nodes=place + n)
        for n in "01"
    ]
    for agent in agents:
        finish(agent)
    for algorithm, experts in itertools.product(["grpo", "dapo"], [True, False]):
        want = load_file(tmp_path / f"1.{algorithm}.{experts}.0")
        for name, rank, world in (("2", 1, 2), ("4", 3, 4), ("nodes", 1, 2)):
            got = load_file(tmp_path / f"{name}.{algorithm}.{experts}.{rank}")
            assert got["share"] < 1.1 / world
            for a, b in zip(got["gradients"], want["gradients"], strict=True):
                assert b.norm() > 1e-3 and (a - b).norm() <= 1e-6 * b.norm(), (
                    name,
                    algorithm,
                    experts,
                )
            assert (got["weights"] - want["weights"]).norm() <= 1e-6 * want["weights"].norm()
            assert torch.allclose(got["metrics"], want["metrics"], rtol=1e-4, atol=1e-7)


def test_the_numbers_of_processes_that_can_share_an_update_are_named():
    options = tgrl.Train(questions_per_rollout=12, questions_per_update=6)
    options.check_processes(3)
    words = (
        "4 processes cannot share --questions_per_update 6 equally: start 1 or 2 or 3 or 6, or give"
    )
    with pytest.raises(BadInput, match=words):
        options.check_processes(4)


def test_a_tracker_gets_every_step(folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = folder.train | dict(out=str(tmp_path), n_off=0, n_on=4, log_with="tensorboard")
    tgrl.train(tgrl.Train(**options))
    [path] = {path.parent for path in tmp_path.rglob("events*") if path.parent.name == "tgrl"}
    events = EventAccumulator(str(path))
    events.Reload()
    records = records_of(tmp_path)[1]
    for name in ("reward", "grad_norm"):
        seen = {event.step: event.value for event in events.Scalars(name)}
        assert seen == pytest.approx({step: records[step][name] for step in (1, 2)})


def test_a_tracker_that_is_not_installed_stops_the_run_before_it_begins(folder, tmp_path):
    options = folder.train | dict(out=f"{tmp_path}/out", log_with="aim", model="not loaded yet")
    with pytest.raises(
        BadInput, match="--log_with aim: it is not installed, or accelerate does not know it"
    ):
        tgrl.train(tgrl.Train(**options))
    assert not (tmp_path / "out").exists()


def test_unequal_processes_do_not_hang(folder, tmp_path):
    options = folder.train | dict(out=str(tmp_path), questions_per_update=4, n_off=0, n_on=4)
    torchrun(2, "uneven", options)
    assert all(0 < record["contrast"] < 1 for record in records_of(tmp_path)[1].values())


@pytest.mark.parametrize(
    "module, words, job", [(tgrl, "train", "train"), (evaluation, "run M B", "run")]
)
def test_the_processes_part_before_python_ends(monkeypatch, module, words, job):
    """Threads of gloo that outlive Python now and then abort it, after all is done."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", partial(sys.exit, "parted"))
    monkeypatch.setattr(module, job, lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["", *words.split()])
    with pytest.raises(SystemExit, match="parted"):
        module.main()


def without_clock(out):
    return {
        step: {k: v for k, v in r.items() if k != "seconds"}
        for step, r in records_of(out)[1].items()
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_continues_bit_for_bit(folder, tmp_path, processes):
    """SIGKILL to all processes some time after the first checkpoint; then --resume."""
    options = folder.train | dict(
        steps=6, algorithm="grpo", val_data=folder.train["data"], val_split="train"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    torchrun(processes, "train", options | dict(out=str(whole)))
    process = torchrun(processes, "train", options | dict(out=str(killed)), wait=False)
    until(lambda: (killed / "checkpoints" / "000002").exists() or process.poll() is not None)
    kill(process)
    torchrun(processes, "train", options | dict(out=str(killed), resume=True))
    assert without_clock(whole) == without_clock(killed) and len(without_clock(whole)) == 7
    assert all(without_clock(whole)[step]["grad_norm"] > 0 for step in range(1, 7))
    assert len([step for step, record in without_clock(whole).items() if "accuracy" in record]) == 4
    first, second = (load_file(run / "model" / "model.safetensors") for run in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_continues_on_other_processes_and_tells_changed_options(
    folder, tmp_path, monkeypatch, capsys
):
    options = folder.train | dict(out=str(tmp_path), questions_per_update=4, every=1)
    torchrun(2, "train", options)
    torchrun(4, "train", options | dict(steps=3, resume=True))
    with pytest.raises(BadInput, match="holds a run; --resume continues it"):
        tgrl.train(tgrl.Train(**options))
    seen, real = [], tgrl.load_checkpoint

    def watched(folder, policy, optimizer, progress, accelerator):
        real(folder, policy, optimizer, progress, accelerator)
        seen.append((dict(progress), optimizer))

    monkeypatch.setattr(tgrl, "load_checkpoint", watched)
    tgrl.train(tgrl.Train(**options | dict(steps=4, resume=True, lr=1e-5)))
    [(progress, optimizer)] = seen
    assert progress["step"] == 3 and progress["n_drawn"] >= 12
    assert {group["lr"] for group in optimizer.param_groups} == {1e-5}
    assert sorted(path.name for path in tmp_path.glob("checkpoints/*")) == [
        "000002",
        "000003",
        "000004",
    ]
    said = capsys.readouterr().out
    assert (
        "--lr is 1e-05 from now on; it was 0.001" in said
        and "--steps is 4 from now on; it was 3" in said
    )
    assert "--seed" not in said


# ===== eval.py: rules, checked by hand against the official scripts where those are mechanical ========

OPTIONS = {
    "choice": ["45°", "35", "2 cm", "2 m", r"\frac{1}{2}"],  # A to E
    "choice of letters": ["A", "C", "B", "a line", "b and c", "p.m.", "a.m.", "2 a.m.", "2 a.m."],
}
# Rule and precision: the answer ~ what is said and right, or ≠ what is wrong; @ begins a new line.
TABLES = {
    "choice": r"""
B ~ B | (B) | b | B. | (b). | B: | B) | \text{B} | $B$ | **B** | (B) 35 | B. 35 | B: 35 | B 35 | option B
B ~ Choice (B) | B\ 35 | B, 35 | B (35) | B = 35 | answer: B | [B] | \(B\) | 35 | 35.0 | 70/2 || D ~ 2 m
C ~ 2 cm | 2 \, \text{cm} | 2 CM. || E ~ 0.5 | 1/2 | E. 1/2 || A ~ 45° | 45^\circ || C ≠ 2 | 2 m || D ≠ 2
B ≠ A | (C) | C. 35 | A, B | A and B | B, C | A. B | (A)(B) | (B) or (C) | (B) and (C) | B) and C) | (B)(C)
B ≠ B. and C. | B: 35, C: 45 | B. 35 or C. 45 | 45 | 53 | none | K | b 45°""",
    "choice of letters": r"""
E ~ b and c | E | (E) b and c || D ~ a line | D. a line || G ~ a.m. | G. a.m. || C ~ C | (C) B || B ~ B | B. C
H ~ 2 a.m. || I ~ 2 a.m. || F ~ p.m. || B ≠ A. C | b and c || A ≠ a line || F ≠ a.m. || G ≠ p.m. || C ≠ B""",
    "yes_or_no": r"""
yes ~ yes | Yes | Yes. | \text{yes} | **yes** | yes, it is | \mathrm{Yes} | "yes" | Yes!
no ~ no | NO | \text{No} | $\text{No}$ | No, it is not | the answer is no | no.
yes ≠ no | yes or no | maybe | yesterday | 1 | true || no ≠ yes | yes or no | nothing | I do not know""",
    "rounded 0": r"""
12 ~ 12 | 12.0 | 12.7 | $12$ | \$12 | 12\% | 12% | 12 cm | 12 \text{ cm} | 12 \, \text{cm}^2 | 12\ \text{cm}
12 ~ x = 12 | about 12 | \approx 12 | 12 people | 24/2 | \frac{24}{2} | \frac{24}2 | 12. || 1000 ~ 1e3 | 10^3
1200 ~ 1,200 | 1{,}200 | 1\,200 || -3 ~ -3 | - 3 || 7 ~ 007 || -4 ~ −4 || 0 ~ 0 || 2 ≠ √2 | \$2 million
5 ≠ 5 a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a! || 2 ~ there are two
1 ≠ 1/0 | 1/n | inf | 4/3 || 10 ≠ 10^3 | 10⁶ || 3 ≠ -3 | 3x || 120 ≠ 1,20 || -1 ≠ n-1 || 13 ≠ 12 || 30 ≠ 3x
5 ≠ 5x^2 | 1\frac{1}{2} | 5^2 | 5\pi | 5½ | 5! | not 5 || 12 ≠ 11.99 | twelve | 12 or 13 | 12:30 | 12 13""",
    "rounded 1": r"""
1.2 ~ 1.2 | 1.20 | 1.24 | 1.16 | $1.2$ | \$1.2 | 1.2 m | 1.2 \text{ m} | 1.2 \, \text{m} | x = 1.2 | 6/5
1.2 ~ \frac{6}{5} | about 1.2 | 1.2 m^2 | 1.2 kg. || 1500.0 ~ 1.5 \times 10^3 || 1.5 ~ 1\frac{1}{2} || 3.0 ~ 3
-0.5 ~ -0.5 | −0.5 || 1200.5 ~ 1,200.5 || 0.5 ~ 0.50 | .5 || 5.0 ~ 5\degree || 12.0 ~ 12\%
1.2 ≠ 1.3 | 1.26 | 12 | one | 1.2 or 1.3 | -1.2 | 1.2.3 | 0 | 1/0 | 1.2 \times 10 || 5.5 ≠ 1\frac{1}{2}""",
    "parts": r"""
0@8 ~ [0, 8] | 0, 8 | (0, 8) | [0,8] | [0.0, 8.0] | 0 and 8 | $[0, 8]$ | \{0, 8\} | [0; 8] || 10 ~ 10.0
Area $=9 \pi \mathrm{cm}^{2}$ ~ 9\pi cm^2 | 9\pi || 3@4 ~ 3, 4 | 3@4 | x=3, y=4 | 3 \text{ and } 4 || 5 ~ [5]
C@D ~ C, D | D, C | C and D | C & D | CD || (1,2)@(3,4) ~ (1,2), (3,4) || -1@2 ~ [-1, 2] | −1, 2 || 2@-3 ≠ 2-3
5 \sqrt{2} ~ 5\sqrt{2} || False ~ False | false || 1200@4 ~ 1,200 and 4 || 1@2@3 ~ [1, 2, 3] || 3@4 ≠ 3 | 4, 3
y=2x+1 ~ y = 2x+1 || 0.5 ~ \frac{1}{2} || 0@8 ≠ [8, 0] | 0 | [0, 8, 9] | [0, 80] | none | [0 8 8] | 08 | 0/8
Area $=9 \pi \mathrm{cm}^{2}$ ≠ 9\pi + 1 || C@D ≠ C | C, D, E | E, D | all of C, D || (1,2)@(3,4) ≠ (1,2)
B@35 ≠ B | B, 99 || -1@2 ≠ [1, 2] || False ≠ True || 10 ≠ 11 || 0 ≠ []""",
    "rounded 2": r"""
$4 \pi$ ~ 4\pi | 12.57 | 12.566 || \frac{36}{13} ~ 36/13 | 2.77 || \frac{1}{3} ~ 0.33 | 1/3 || \sqrt{2} ~ 1.41
60 ~ 60^\circ | 60° || -\frac{3}{2} ~ -1.5 || 5 ~ 5 | \boxed{5} || \boxed{5} ~ 5 || 1000 ~ 1,000 || 4^2 ~ 16.0
3.14 ~ 3.142 || 1/3 ~ 0.333 || √3 ~ 1.73 || 7 ~ 7 cm || C ~ (C) || $4 \pi$ ≠ 12.5 | 12.58 || \frac{1}{3} ≠ 0.3
\frac{36}{13} ≠ 2.8 || 1\frac{1}{2} ≠ 5.5 || \sqrt{2} ≠ 1.4 || 5 ≠ 6 | 5.01 || √3 ≠ 3.0 || C ≠ D""",
    "any_of": r"""
mitosis ~ mitosis | Mitosis | It is mitosis. | \text{mitosis} || 5 ~ 5 | 5.0 | 5.004 | $5 | 5 V | 5 Ω
left ventricle ~ the left ventricle | Left Ventricle || 12 ~ 12 \text{ N} | 12 \, \text{N} || 1000 ~ 1,000
0.5 ~ 1/2 | \frac{1}{2} || 1.5 ~ 1\frac{1}{2} || 0.333 ~ 0.33 || 25 ~ 25% || -2 ~ -2 || left ventricle ≠ left
5 ≠ 6 | 5.01 | 55 | -5 | not 5 || mitosis ≠ meiosis | amitosis || 0.333 ≠ 0.34 || 10 ≠ 10^2
A ~ A || A ≠ a cat""",
}


def verdicts():
    for rule, table in TABLES.items():
        for group in re.split(r"\n| \|\| ", table.strip()):
            answer, mark, said = re.split(" ([~≠]) ", group)
            yield from (
                (rule, answer.replace("@", "\n"), text, mark == "~") for text in said.split(" | ")
            )


@pytest.mark.parametrize("rule, answer, said, right", list(verdicts()))
def test_a_rule_tells_right_from_wrong(rule, answer, said, right):
    name, _, precision = rule.partition(" ")
    item = {"rule": name, "answer": answer, "choices": OPTIONS.get(rule)}
    item["precision"] = int(precision) if name == "rounded" else None
    assert evaluation.judge([rf"So \boxed{{{said}}}".replace("@", "\n")], item)["correct"] == [
        right
    ]


SIGNS = "0123456789.,-/^{}\\$%()[] abBcCyesno∠°\n=e:*"
ANSWERS = {rule: answer for rule, answer, *_ in verdicts()} | {"equivalent": "5"}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(alphabet=SIGNS, max_size=60), st.sampled_from(list(ANSWERS)))
def test_no_answer_breaks_a_rule_and_none_is_wrong(said, rule):
    item = {
        "rule": rule.split()[0],
        "answer": ANSWERS[rule],
        "precision": 2,
        "choices": OPTIONS["choice"],
    }
    texts = [rf"\boxed{{{said}}}", f"Answer: {said}", r"\boxed{}"]
    assert evaluation.judge(texts, item)["correct"][2] is False


FOUND = r"""
so \boxed{3} and \boxed{4} ~ 4 | The answer is 5. ~ 5. | **Answer:** B. 35 ~ B. 35 | Final answer : 7 ~ 7
answer is 3. The answer is 4 ~ 4 | The answer is 5, so \boxed{6} ~ 6 | ### Answer: B ~ B | no ~ no
<think>The answer is 5?</think> Answer: 6 ~ 6 | The answer is B. (in \boxed{ }) ~ B. (in \boxed{ })
60 ~ 60 | <think>The answer is 5? Let me ~ None | So the correct option letter is (C) red. ~ (C) red.
"""
LINES_OF = [("Answer: (B)\nIt was easy", "(B)"), ("a\nb", "None"), ("", "None")]


@pytest.mark.parametrize("text, found", [*pairs(FOUND), *LINES_OF])
def test_an_answer_is_in_the_last_box_or_behind_the_word_once_thinking_is_over(text, found):
    assert str(evaluation.find_answer(text)) == found


# ===== eval.py: benchmarks, from a file in the schema of the hub to verdict, report, comparison ======

SHOWN, OTHER = ({"bytes": encoded(noise(random.Random(i), 56, 56)), "path": None} for i in range(2))
VOLTS, LINES = str([f"{i} V" for i in range(10)]), "Which?\nChoices:\nA:35\nB:45"
FREE = {
    "question_type": "free_form",
    "precision": 0.0,
    "metadata": {"task": "VQA", "language": "english"},
}
MULTI = {"question_type": "multi_choice", "answer_type": "text"}
PLANE = {
    "question_type": "multi-choice",
    "problem_version": "Vision Only",
    "metadata": {"subject": "Plane"},
}
BASE = {  # a row of each benchmark: what all of its rows below share
    "mathvista": FREE | {"query": "Hint: ...\nHow many?", "image": "1.jpg", "decoded_image": SHOWN},
    "wemath": {
        "question": "Which?",
        "image_path": SHOWN,
        "key": "2steps_1",
        "option": "A. 45°;B. 60°",
    },
    "mathvision": {
        "question": "What? <image1>",
        "decoded_image": SHOWN,
        "level": 2,
        "subject": "algebra",
    },
    "mathverse": {"query_cot": LINES, "question_for_eval": LINES, "image": SHOWN},
    "hallusionbench": {
        "subcategory": "map",
        "set_id": "0",
        "question": "Is it larger?",
        "image": SHOWN,
    },
    "mmmu": {
        "id": "validation_Art_1",
        "question": "Which of <image 1>?",
        "options": "[]",
        "image_1": SHOWN,
    },
    "mmmu-pro": {
        "id": "1",
        "question": "<image 1>",
        "options": VOLTS,
        "image_1": SHOWN,
        "subject": "Art",
    },
    "mmmu-pro-vision": {"id": "1", "options": VOLTS, "image": SHOWN, "subject": "Art"},
    "mmstar": {
        "question": "What?\nOptions: A: red, B: light blue",
        "image": SHOWN,
        "category": "coarse",
    },
    "problems": {"question": "<image>Find x.", "category": "Geometry", "image": ["a.png"]},
}
ROWS = [  # what is special in a row (that form feed is the hub's), and what in the box is right and wrong
    ("mathvista", {"choices": ["3", "5"], "answer": "5"} | MULTI, "5", "A"),
    ("mathvista", {"answer": "12", "answer_type": "integer"}, r"12.0 \text{ cm}", "13"),
    ("mathvista", {"answer": "0.33", "answer_type": "float", "precision": 2.0}, "0.333", "0.3"),
    (
        "mathvista",
        {"answer": "[0, 8]", "answer_type": "list", "precision": None},
        "[0,8]",
        "[8, 0]",
    ),
    ("mathvista", {"answer": "yes", "answer_type": "text"}, "Yes", "no"),
    ("wemath", {"answer": "B"}, "60°", "45°"),
    ("mathvision", {"answer": "\frac{36}{13}", "options": []}, r"\frac{36}{13}", "3"),
    ("mathvision", {"answer": "B", "options": ["1", "2", "3"]}, "2", "3"),
    ("mathvision", {"answer": "69{degrees}", "options": []}, "69", "70"),
    ("mathverse", PLANE | {"answer": "B"}, "45", "35"),
    ("mathverse", PLANE | {"answer": "45"}, "B", "A"),
    ("mathverse", PLANE | {"answer": r"Area $=9 \pi$", "question_type": "free-form"}, r"9\pi", "9"),
    (
        "hallusionbench",
        {"category": "VD", "figure_id": 0, "question_id": 0, "gt_answer": "1"},
        "yes",
        "no",
    ),
    (
        "hallusionbench",
        {"category": "VD", "figure_id": 0, "question_id": 1, "gt_answer": "0"},
        "No",
        "yes",
    ),
    (
        "hallusionbench",
        {"category": "VS", "figure_id": 0, "question_id": 0, "gt_answer": "1"},
        "Yes.",
        "1",
    ),
    (
        "mmmu",
        {"options": "['<image 12>', '<image 1>']", "answer": "A", "image_12": OTHER},
        "A",
        "B",
    ),
    ("mmmu", {"answer": "['mitosis', 'meiosis']"}, "It is meiosis", "sleep"),
    ("mmmu-pro", {"answer": "J"}, "9 V", "8 V"),
    ("mmmu-pro-vision", {"answer": "C"}, "C", "D"),
    ("mmstar", {"answer": "B"}, "light blue", "red"),
    (
        "mmstar",
        {"answer": "B", "question": "B. is?\nChoices:\nA. red\nB. light blue"},
        "light blue",
        "red",
    ),
    ("problems", {"answer": r"\boxed{12}"}, "12.0", "13"),
    ("problems", {"answer": "12", "question": "<image> <image>"}, None, None),
]
ASKED = dict(
    min_pixels=784, max_pixels=12544, max_answer=6, generate_batch=4, samples=2, temperature=0.7
)


def cases(benchmark):
    return [(BASE[name] | special, *texts) for name, special, *texts in ROWS if name == benchmark]


@pytest.fixture(scope="module")
def answered(folder, tmp_path_factory):
    """Every benchmark in a file, answered by the tiny model, without interruption."""
    out, files, said = tmp_path_factory.mktemp("answered"), {}, io.StringIO()
    (out / "a.png").write_bytes(SHOWN["bytes"])
    for name in BASE:
        datasets.Dataset.from_list([row for row, *_ in cases(name)]).to_parquet(
            out / f"{name}.parquet"
        )
        files[name] = f"{name}={out}/{name}.parquet"
    with contextlib.redirect_stdout(said):
        evaluation.run(evaluation.Run(f"{folder.path}/model", tuple(files.values()), out, **ASKED))
    return SimpleNamespace(
        out=out, files=files, records=evaluation.evaluations(out), said=said.getvalue()
    )


@pytest.mark.parametrize("name", BASE)
def test_every_benchmark_from_file_to_verdict(answered, name):
    _, records = answered.records[name]
    assert sorted(records) == list(range(len(cases(name))))
    for row, (_, right, wrong) in enumerate(cases(name)):
        assert ("error" in records[row]) == (right is None) and len(records[row]["correct"]) == 2
        if right:
            texts = [rf"\boxed{{{right}}}", rf"\boxed{{{wrong}}}", f"The answer is {right}"]
            without_box = name != "problems"  # which are judged as in training
            assert evaluation.judge(texts, records[row])["correct"] == [True, False, without_box], (
                right
            )


def test_the_report_counts_unreadable_rows_as_wrong_and_what_a_benchmark_reports_apart(answered):
    summary = json.loads((answered.out / "summary.json").read_text())
    scores = summary["benchmarks"]
    assert scores["problems"]["rows"] == 2
    assert "1 rows unreadable, BadInput: 2 times <image> for 1 pictures: rows [1]" in answered.said
    pair = [{"by": {}, "together": {"qAcc": 1}, "correct": [right]} for right in (True, False)]
    assert evaluation.by_group(pair)["qAcc"]["accuracy"] == 0  # not right together
    assert [scores["hallusionbench"]["by"][name]["rows"] for name in ("fAcc", "qAcc")] == [2, 3]
    assert {"type: multi-choice", "type: free-form", "version: Vision Only"} < set(
        scores["mathverse"]["by"]
    )
    assert (
        summary["average of the five"] == 0 and "59.51" in answered.said
    )  # the paper's is beside it


def test_options_and_pictures_stand_in_the_question():
    two, ten, drawn = (
        evaluation.mmmu(cases(name)[0][0]) for name in ("mmmu", "mmmu-pro", "mmmu-pro-vision")
    )
    assert two["problem"] == "Which of <image>?\nA. <image>\nB. <image>"
    assert two["images"] == [SHOWN, OTHER, SHOWN]
    assert ten["problem"].endswith("\nJ. 9 V") and "V" not in drawn["problem"]  # which shows them


def test_an_evaluation_goes_on_where_it_was_killed_on_any_number_of_processes(
    folder, answered, tmp_path
):
    """It was killed inside the fourth record on one process, and goes on on two: the same answers come."""
    names = ["mathvista", "mathverse"]
    header, *lines = (answered.out / "mathvista.jsonl").read_text().splitlines()
    (tmp_path / "mathvista.jsonl").write_text("\n".join([header, *lines[:3], lines[3][:40]]))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += [
        evaluation.__file__,
        "run",
        f"{folder.path}/model",
        *(answered.files[name] for name in names),
    ]
    command += [f"--{name}={value}" for name, value in (ASKED | {"out": tmp_path}).items()]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=400)
    assert evaluation.evaluations(tmp_path) == {name: answered.records[name] for name in names}
    assert len(list(tgrl.read_records(tmp_path / "mathvista.jsonl"))) == 1 + len(
        lines
    )  # nothing twice


def test_answers_are_graded_again_without_a_model_and_compared_item_by_item(
    answered, tmp_path, capsys
):
    header, records = answered.records["mathvista"]
    changed = records[1] | {
        "texts": [r"\boxed{12}", "no"]
    }  # of two records of a row the later counts
    tgrl.append_records(tmp_path / "mathvista.jsonl", [header, *records.values(), changed])
    evaluation.run(evaluation.Run(out=tmp_path, rescore=True))
    assert "mathvista: 1 of 5 verdicts changed: rows [1]" in capsys.readouterr().out
    score = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]["mathvista"]
    assert score["accuracy"] == pytest.approx(1 / 10) and score["pass@2"] == pytest.approx(1 / 5)
    evaluation.compare(answered.out, tmp_path)
    said = capsys.readouterr().out
    assert (
        "right only in B: 1 rows, [1]" in said and "only in A" not in said and "differ" not in said
    )


@pytest.mark.parametrize(
    "key, old", [("seed", 9), ("max_answer", 7), ("model mtime", 1), ("data mtime", 1)]
)
def test_another_evaluation_in_the_same_folder_is_refused(folder, answered, tmp_path, key, old):
    tgrl.append_records(tmp_path / "mmstar.jsonl", [answered.records["mmstar"][0] | {key: old}])
    options = evaluation.Run(f"{folder.path}/model", (answered.files["mmstar"],), tmp_path, **ASKED)
    with pytest.raises(
        BadInput, match=f"mmstar.jsonl is of another evaluation: {key} is {old} there"
    ):
        evaluation.run(options)


MENDABLE = """
run ~ give a model and benchmarks, name or name=path; known are wemath, mathvista
run MODEL mathsvista ~ there is no benchmark 'mathsvista' | run MODEL toy toy=other.jsonl ~ toy is there twice
run MODEL wemath=DATA ~ wemath: none of the 6 rows of .* can be read; KeyError: 'question'
run MODEL wemath=none.parquet ~ cannot load 'none.parquet' | run nowhere geo3k=DATA ~ cannot load .*nowhere
run MODEL geo3k=DATA --samples 3 ~ needs --temperature above 0 | run MODEL toy --limit -1 ~ --limit at least 0
run MODEL geo3k=DATA --out . ~ geo3k.jsonl is no evaluation | run --rescore --out none ~ holds no evaluation
compare none ANSWERED ~ no benchmark in common | show none ~ none has no finished step
run MODEL mmmu ~ cannot load 'lmms-lab-encoder/MMMU'
"""


@pytest.mark.parametrize("words, message", pairs(MENDABLE))
def test_eval_says_in_a_line_what_the_user_can_mend(
    folder, answered, tmp_path, monkeypatch, words, message
):
    (tmp_path / "geo3k.jsonl").write_text('{"problem": "of somebody else"}')
    words = words.replace("MODEL", f"{folder.path}/model").replace(
        "DATA", f"{folder.path}/train.parquet"
    )
    monkeypatch.setattr(
        sys, "argv", ["eval.py", *words.replace("ANSWERED", str(answered.out)).split()]
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^eval.py: .*{message}"):
        evaluation.main()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_trained_model_is_asked_as_it_was_trained_last(tmp_path):
    configs = [
        dict(instruction="Be quick.", max_answer=max_answer, lr=1.0) for max_answer in (3, 5)
    ]
    tgrl.append_records(tmp_path / "metrics.jsonl", [{"config": config} for config in configs])
    (tmp_path / "checkpoints" / "000002" / "model").mkdir(parents=True)
    asked = evaluation.as_asked(
        evaluation.Run(f"{tmp_path}/checkpoints/000002/model", min_pixels=784)
    )
    assert asked == dict(instruction="Be quick.", max_answer=5, min_pixels=784, max_pixels=4194304)


def test_the_wilson_interval_solves_its_equation():
    for right, n in ((0, 10), (8, 10), (10, 10), (133, 192), (1, 1000)):
        for end in evaluation.wilson(
            right, n
        ):  # 1.96 of its own standard deviations from what was seen
            assert (end - right / n) ** 2 == pytest.approx(
                1.959964**2 * end * (1 - end) / n, abs=1e-12
            )
    assert evaluation.wilson(8, 10) == pytest.approx(
        (0.4901625, 0.9433178), abs=1e-6
    )  # as published


def test_mcnemar_is_a_fair_coin():
    for only_a, only_b in ((0, 5), (2, 7), (3, 3), (1, 0), (0, 0)):
        tosses = list(itertools.product([-1, 1], repeat=only_a + only_b))
        extreme = sum(abs(sum(toss)) >= abs(only_a - only_b) for toss in tosses)
        assert evaluation.mcnemar(only_a, only_b) == pytest.approx(extreme / len(tosses))


def test_the_bootstrap_of_a_mean_is_nearly_normal():
    low, high = evaluation.bootstrap([True] * 240 + [False] * 560)
    assert [0.3 - low, high - 0.3] == pytest.approx(
        [1.96 * math.sqrt(0.3 * 0.7 / 800)] * 2, abs=0.003
    )


def test_the_page_of_a_training_has_its_weights_and_no_markup_of_models(
    folder, tmp_path, odd_is_right
):
    tgrl.train(tgrl.Train(**folder.train | dict(out=str(tmp_path))))
    nasty = "<script>alert(1)</script>\n</think>"
    *_, group = tgrl.read_records(tmp_path / "groups.jsonl")
    own, *_, expert = group["answers"]
    expert |= dict(expert_ok=True, source=nasty, tokens=[nasty] * len(expert["ids"]))
    group |= dict(answers=[own, own | dict(text=nasty), expert, own], answer=nasty)
    tgrl.append_records(
        tmp_path / "groups.jsonl", [group]
    )  # of two records of a group the later counts
    tgrl.append_records(tmp_path / "metrics.jsonl", [{"step": 1, "reward": 0.125}])  # and of a step
    [first, _] = evaluation.read_training(tmp_path).steps
    assert first["reward"] == 0.125 and first["grad_norm"] > 0
    evaluation.show([tmp_path])
    page = (tmp_path / "groups.html").read_text().rpartition("<h3>Question</h3>")[2]
    assert page.count("<strong>2 times</strong>") == 1 and "1 times" not in page
    assert (
        page.count("&lt;script&gt;alert") == 3 + len(expert["ids"]) and "<script>alert" not in page
    )
    logp, behavior = (torch.tensor([expert[name]]) for name in ("logp", "behavior_logp"))
    weight = tgrl.expert_weights(logp, behavior, torch.ones_like(logp), sharpness=14)
    want = torch.stack([logp, behavior, weight, weight * (logp - behavior).exp()], -1)[0]
    shown = [[float(x) for x in text.split()] for text in re.findall(r'data-v="([^"]*)"', page)]
    assert torch.allclose(torch.tensor(shown), want, rtol=1e-4)


# ===== The toy world, the command line, the shape of the file =========================================


def test_toy_answers_follow_the_rules():
    rng = random.Random(0)
    right, wrong = make.write_answer(rng, 3, 4, 1.0), make.write_answer(rng, 3, 4, 0.0)
    steps = "area = 3*4 = 12. edge = 2*7 = 14. total = 12+14 = 26"
    assert right == f"<think>width 3, height 4. {steps}</think>\\boxed{{26}}"
    assert reward(right, make.make_row(rng, 3, 4)["answer"]) == 1.0
    assert "3+4 = 7. edge = 1*7 = 7. total = 7-7 = 0" in wrong and reward(wrong, "26") == 0.0


def run_script(script, *words, cwd=None, **env):
    command = [sys.executable, str(HERE / script), *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=400, cwd=cwd, env=os.environ | env
    )


@pytest.mark.parametrize(
    "command, kind", dict(toy=tgrl.Toy, experts=tgrl.Experts, train=tgrl.Train).items()
)
def test_a_command_has_its_own_options_and_refuses_anothers(monkeypatch, capsys, command, kind):
    monkeypatch.setenv("COLUMNS", "200")
    for words in (["--help"], ["--spread"] if command == "train" else ["--n_off", "2"]):
        monkeypatch.setattr(sys, "argv", ["tgrl.py", command, *words])
        with pytest.raises(SystemExit):
            tgrl.main()
    said, refused = capsys.readouterr()
    assert {f.name for f in dataclasses.fields(kind)} <= set(re.findall(r"--(\w+)", said))
    assert not re.search(r"│\s+\(default", said)  # each has a help text
    assert "Unrecognized" in refused


ENDS = [
    ("train --experts no.jsonl", "no --experts no.jsonl"),
    ("train --n_on 1", "--n_on must be at least"),
]
ENDS += [("", "the toy is for one process; start it by `python tgrl.py`")]


@pytest.mark.parametrize("words, message", ENDS)
def test_what_the_user_can_mend_is_one_line_without_a_traceback(tmp_path, words, message):
    said = run_script("tgrl.py", *words.split(), cwd=tmp_path, WORLD_SIZE="2")
    assert said.returncode == 1 and said.stderr.strip().splitlines()[-1].startswith(
        f"tgrl.py: {message}"
    )
    assert "Traceback" not in said.stderr and not list(tmp_path.iterdir())


def test_defaults_follow_the_algorithm():
    grpo, dapo = tgrl.Train(algorithm="grpo", n_off=0), tgrl.Train(sharpness=7.0, n_off=0)
    names = ("sharpness", "clip_high", "kl_coef", "token_mean", "max_draws")
    assert [getattr(grpo, name) for name in names] == [5, 0.2, 0.01, False, 1]
    assert [getattr(dapo, name) for name in names] == [7, 0.28, 0, True, 20]
    assert grpo.method == "GRPO" and tgrl.Train(experts="self").method == "TGRL-DAPO"


def definitions(tree):
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        if isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("script", ["eval.py"])  # tgrl.py has the method first, then its parts
def test_nothing_uses_what_is_defined_below_it(script):
    """The file reads from top to bottom: inside a function, no module-level name of a later line."""
    found = definitions(ast.parse((HERE / script).read_text()))
    for name, node in found.items():
        if isinstance(node, ast.Assign) or name == "main":
            continue
        used = {
            n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
        }
        own = {
            n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        own |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        late = {n for n in (used - own) & found.keys() if found[n].lineno > node.end_lineno}
        assert not late, f"{name} uses {late}"


def equations(text):
    """Eq. 3, 13-15 -> {3, 13, 14, 15}"""
    found = set()
    for numbers in re.findall(r"Eq\. ([\d, -]+)", text):
        for part in re.findall(r"\d+(?:-\d+)?", numbers):
            low, _, high = part.partition("-")
            found |= set(range(int(low), int(high or low) + 1))
    return found


def test_every_equation_stands_on_the_line_that_computes_it():
    lines = (HERE / "tgrl.py").read_text().splitlines()
    tagged = [line.split("#", 1)[1] for line in lines if "#" in line and line.split("#")[0].strip()]
    assert equations("\n".join(tagged)) >= {2, 3, 4, *range(13, 26)}


def test_the_readme_names_functions_that_hold_the_equations_and_options_that_exist():
    readme = (HERE / "README.md").read_text()
    rows = re.findall(r"^\| *([\d, –-]+?) *\|.*`tgrl\.(\w+)`", readme, re.MULTILINE)
    assert len(rows) >= 6
    for numbers, name in rows:
        wanted = equations("Eq. " + numbers.replace("–", "-"))
        assert wanted <= equations(inspect.getsource(getattr(tgrl, name))), name
    kinds = (tgrl.Toy, tgrl.Experts, tgrl.Train, evaluation.Run)
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    scripts = "".join(path.read_text() for path in HERE.glob(".compare/*.py"))
    known |= set(re.findall(r'add_argument\("--(\w+)"', scripts)) | {"nproc", "help", "nnodes"}
    assert set(re.findall(r"--(?:no_)?(\w+)", readme)) <= known


if __name__ == "__main__":
    worker(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
    torch.distributed.destroy_process_group()
    tgrl.leave()

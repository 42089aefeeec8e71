"""Proof that tgrl.py does what it says: `pytest -q`. Real Qwen2.5-VL classes with a tiny configuration, no mocks of them."""

import ast
import collections
import contextlib
import dataclasses
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate.utils import set_seed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import tgrl
import eval as evaluation
from eval import show
from tgrl import (  # fmt: skip
    BadInput,
    Config,
    _MathVerify,
    expert_weights,
    extract_boxed,
    group_advantages,
    is_equivalent,
    math_verify,
    reward,
    tgrl_loss,
    token_shares,
    unified_coefficient,
)

# ===== The loss, against the paper's equations as plain loops ==========================================================

LOW, HIGH = 0.2, 0.28  # unequal, so that no test passes with the sides exchanged
BOTH = pytest.mark.parametrize("algorithm", ["grpo", "dapo"])


def random_groups(seed, n_groups=3, n_on=4, n_off=2, lengths=(1, 9), spread=0.5, dtype=torch.float64, equal=False, constant=False):
    """Groups laid out as [N, T]. Each holds a right and a wrong policy answer, experts are right and wrong by turns, padding is garbage."""
    rng = torch.Generator().manual_seed(seed)
    n, size, width = n_groups * (n_on + n_off), n_on + n_off, lengths[1] + 1  # a column more than the longest answer
    noise = lambda: spread * torch.randn(n, width, generator=rng, dtype=dtype)  # noqa: E731
    mask = torch.arange(width) < torch.randint(lengths[0], lengths[1] + 1, (n, 1), generator=rng)
    rewards = torch.randint(0, 2, (n_groups, size), generator=rng).to(dtype)
    rewards[:, 0], rewards[:, 1] = 1, 0
    rewards[:, n_on:] = (torch.arange(n_groups)[:, None] + torch.arange(n_off)) % 2
    rewards = torch.ones_like(rewards) if equal else rewards
    is_expert = (torch.arange(size) >= n_on).repeat(n_groups)
    logp = -3 * torch.rand(n, width, generator=rng, dtype=dtype)
    logp = (logp * 64).round() / 64  # so that a constant difference is one to the last bit
    garbage = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype).repeat(width)[:width]
    fill = lambda x: torch.where(mask, x, garbage)  # noqa: E731
    return SimpleNamespace(
        size=size, mask=mask, rewards=rewards, is_expert=is_expert, expert_ok=rewards.flatten() == 1,
        logp=fill(logp), behavior_logp=fill(logp + (0.25 if constant else noise())), ref_logp=fill(logp + noise()),
        advantages=group_advantages(rewards).flatten(),
    )  # fmt: skip


def loss_of(b, algorithm, sharpness=5.0, kl_coef=0.0, totals=(None, None), **changed):
    b = SimpleNamespace(**vars(b) | changed)
    shares = token_shares(b.mask.to(b.logp.dtype), algorithm, *totals)
    return tgrl_loss(b.logp, b.behavior_logp, b.mask, b.advantages, b.is_expert, b.expert_ok, shares, sharpness=sharpness,
                     clip_low=LOW, clip_high=HIGH, kl_coef=kl_coef, ref_logp=b.ref_logp)  # fmt: skip


def gradient(b, algorithm, **options):
    """d loss / d logp, [N, T]."""
    logp = b.logp.clone().requires_grad_()
    return torch.autograd.grad(loss_of(b, algorithm, logp=logp, **options)[0], logp)[0]


def groups_of(b, start, stop):
    """Some of the groups, without the padding that only the others needed."""
    rows = slice(start * b.size, stop * b.size)
    width = int(b.mask[rows].sum(1).max())
    part = {k: v[rows, :width] if v.dim() == 2 else v[rows] for k, v in vars(b).items() if k not in ("size", "rewards")}
    return SimpleNamespace(size=b.size, rewards=b.rewards[start:stop], **part)


# -- the equations, once more, with nothing but floats -----------------------------------------------------------------


def oracle(b, algorithm, sharpness, kl_coef, eps=1e-6):
    n, G = len(b.logp), b.size
    length = [sum(row) for row in b.mask.tolist()]
    logp, behavior, ref = ([row[:k] for row, k in zip(x.tolist(), length)] for x in (b.logp, b.behavior_logp, b.ref_logp))
    expert, ok, rewards = b.is_expert.tolist(), b.expert_ok.tolist(), b.rewards.tolist()
    advantages, weights, coefficients, shares, loss, metrics = [], [], [], [], 0.0, collections.defaultdict(list)
    for i in range(n):
        group = rewards[i // G]
        mu = sum(group) / G
        sigma = math.sqrt(sum((R - mu) ** 2 for R in group) / (G - 1))  # Eq. 15
        A = (group[i % G] - mu) / (sigma + eps)  # Eq. 16
        delta = [old - new for old, new in zip(behavior[i], logp[i])]  # Eq. 18
        mu = sum(delta) / length[i]
        sigma = math.sqrt(sum((d - mu) ** 2 for d in delta) / max(length[i] - 1, 1))
        w = [1 / (1 + math.exp(-(sharpness or 0) * (d - mu) / (sigma + eps))) for d in delta]  # Eq. 19-20
        advantages.append(A), weights.append(w), coefficients.append([]), shares.append([])
        for t in range(length[i]):
            r = math.exp(logp[i][t]) / math.exp(behavior[i][t])  # Eq. 17, or pi_theta / pi_old
            if expert[i]:
                r *= (1 if sharpness is None else w[t]) * (1 if ok[i] else 0)  # Eq. 21-23
            share = 1 / (n // G) / G / length[i] if algorithm == "grpo" else 1 / sum(length)  # Eq. 24, Eq. 25
            inside, bounded = r * A, max(1 - LOW, min(1 + HIGH, r)) * A
            loss -= share * min(inside, bounded)
            if not expert[i]:
                gap = ref[i][t] - logp[i][t]
                loss += kl_coef * share * (math.exp(gap) - gap - 1)
                metrics["kl"].append(math.exp(gap) - gap - 1)
                metrics["entropy"].append(-logp[i][t])
                metrics["ratio"].append(r)
                metrics["clipped"].append(bounded < inside)
            elif ok[i]:
                metrics["expert_coefficient"].append(r)
                metrics["expert_clipped"].append(bounded < inside)
                metrics["expert_logp"].append(logp[i][t])
                metrics["expert_delta"].append(delta[t])
            coefficients[i].append(r), shares[i].append(share)
            if not expert[i] or ok[i]:
                metrics["objective"].append(share * min(inside, bounded))
    return SimpleNamespace(A=advantages, w=weights, r=coefficients, shares=shares, loss=loss, metrics=metrics)


CASES = {
    "mixed": {},
    "many experts": dict(n_off=5, n_on=2),
    "no experts": dict(n_off=0),
    "equal rewards": dict(equal=True),
    "one token": dict(lengths=(1, 1)),
    "constant delta": dict(constant=True),
    "far off": dict(spread=3.0),
    "long": dict(lengths=(20, 60), n_groups=2),
}


@BOTH
@pytest.mark.parametrize("sharpness", [5.0, 14.0, None])
@pytest.mark.parametrize("case", CASES)
def test_every_equation_agrees_with_plain_loops(case, sharpness, algorithm):
    b = random_groups(1, **CASES[case])
    want = oracle(b, algorithm, sharpness, kl_coef=0.1)

    def same(got, rows):
        assert got.shape == b.mask.shape
        assert got[b.mask].tolist() == pytest.approx(sum(rows, []), abs=1e-10, rel=1e-10)

    assert b.advantages.tolist() == pytest.approx(want.A, abs=1e-10)
    if sharpness is not None:
        same(expert_weights(b.logp, b.behavior_logp, b.mask, sharpness), want.w)
    same(unified_coefficient(b.logp, b.behavior_logp, b.mask, b.is_expert, b.expert_ok, sharpness), want.r)
    shares = token_shares(b.mask.double(), algorithm)
    same(shares, want.shares)
    assert not shares[~b.mask].any() and float(shares.sum()) == pytest.approx(1)
    loss, metrics = loss_of(b, algorithm, sharpness, kl_coef=0.1)
    assert float(loss) == pytest.approx(want.loss, abs=1e-10, rel=1e-10)
    assert set(want.metrics) <= set(metrics)
    for name, (value, count) in metrics.items():
        assert float(value) == pytest.approx(sum(want.metrics[name]), abs=1e-10, rel=1e-10), name
        assert float(count) == pytest.approx(1 if name == "objective" else len(want.metrics[name])), name


@pytest.mark.parametrize(
    "rewards, deviations, std",  # std with n - 1; of equal rewards, whatever
    [([1, 0], [0.5, -0.5], math.sqrt(0.5)), ([1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25], 0.5), ([1, 1, 1], [0, 0, 0], 1)],
)
def test_advantages_by_hand(rewards, deviations, std):
    got = group_advantages(torch.tensor([rewards, rewards[::-1]], dtype=torch.float64))
    assert got[0].tolist() == got[1].flip(0).tolist() == pytest.approx([d / (std + 1e-6) for d in deviations], abs=1e-12)
    assert any(deviations) or not got.any()  # equal rewards: zero, not nearly


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="group of 1"):
        group_advantages(torch.ones(4, 1))


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match="'ppo'.*grpo.*dapo"):
        token_shares(torch.ones(2, 3), "ppo")


# -- the gradient ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("filtered", [True, False])
def test_gradient_is_minus_share_coefficient_advantage_and_zero_where_clipped(algorithm, filtered):
    b = random_groups(2, n_groups=30, spread=1.5)
    b.expert_ok = b.expert_ok if filtered else torch.ones_like(b.expert_ok)
    grad, want = gradient(b, algorithm), oracle(b, algorithm, 5.0, 0.0)
    seen = set()
    for i, t in b.mask.nonzero().tolist():
        A, r, expert, got = want.A[i], want.r[i][t], bool(b.is_expert[i]), float(grad[i, t])
        if expert and not b.expert_ok[i]:
            assert got == 0
            continue
        side = "above" if r > 1 + HIGH else "below" if r < 1 - LOW else "inside"
        seen.add((expert, A > 0, side))
        if (A > 0, side) in ((True, "above"), (False, "below")):
            assert got == 0
        else:
            assert got == pytest.approx(-want.shares[i][t] * r * A, rel=1e-9) and got != 0
    kinds = [(e, a, s) for e in (False, True) for a in (False, True) for s in ("above", "inside", "below")]
    assert seen == {k for k in kinds if not (filtered and k[0] and not k[1])}  # a right expert is never below the mean
    assert not grad[~b.mask].any()


@BOTH
def test_at_the_first_update_every_policy_token_learns_the_end_token_too(algorithm):
    b = random_groups(3)
    b.behavior_logp = torch.where(b.is_expert[:, None], b.behavior_logp, b.logp)  # ratio 1
    grad = gradient(b, algorithm)
    own = b.mask & ~b.is_expert[:, None]
    want = -(token_shares(b.mask.double(), algorithm) * b.advantages[:, None])
    torch.testing.assert_close(grad[own], want[own])
    assert (grad[range(len(grad)), b.mask.sum(1) - 1][~b.is_expert] != 0).all()


def attached(logp, behavior_logp, mask, sharpness):
    """rho * w with the gradient left in w: what this implementation does not do."""
    rows = []
    for new, old, valid in zip(logp, behavior_logp, mask):
        delta = (old - new)[valid]
        w = torch.sigmoid(sharpness * (delta - delta.mean()) / (delta.std() + 1e-6))
        rows.append((-delta).exp() * w)
    return torch.cat(rows)


def test_no_gradient_flows_through_the_weight():
    b = random_groups(4, lengths=(3, 9))
    everyone = torch.ones_like(b.is_expert)
    logp = b.logp.clone().requires_grad_()
    w = expert_weights(logp, b.behavior_logp, b.mask, 5.0)
    assert not w.requires_grad
    f = unified_coefficient(logp, b.behavior_logp, b.mask, everyone, everyone, 5.0)[b.mask]
    constant = ((logp - b.behavior_logp).exp() * w)[b.mask]
    through = attached(logp, b.behavior_logp, b.mask, 5.0)
    grads = [torch.autograd.grad(x.sum(), logp)[0][b.mask] for x in (f, constant, through)]
    torch.testing.assert_close(f, through)  # the same value ...
    torch.testing.assert_close(grads[0], grads[1])
    assert (grads[0] - grads[2]).abs().max() > 0.1  # ... and another gradient


def test_a_right_expert_is_never_pushed_down():
    """Why w is detached: with the gradient through w, many tokens of right answers would become less likely."""
    b = random_groups(5, n_groups=8, lengths=(30, 60), spread=1.0)
    kept = (b.is_expert & b.expert_ok)[:, None] & b.mask
    assert (b.advantages[b.is_expert & b.expert_ok] > 0).all()
    assert (gradient(b, "grpo")[kept] <= 0).all()  # descent on the loss raises each of them, or leaves it
    logp = b.logp.clone().requires_grad_()
    rows = b.is_expert & b.expert_ok
    slope = torch.autograd.grad(attached(logp[rows], b.behavior_logp[rows], b.mask[rows], 5.0).sum(), logp)[0]
    assert 0.1 < (slope[kept] < 0).double().mean() < 0.5


@BOTH
def test_kl_gradient_matches_finite_differences(algorithm):
    b = random_groups(6, n_groups=2, lengths=(1, 4))
    options = dict(kl_coef=0.7, advantages=torch.zeros_like(b.advantages))  # the KL alone
    grad, h, tried = gradient(b, algorithm, **options), 1e-5, 0
    for i, t in b.mask.nonzero().tolist():
        step = torch.zeros_like(b.logp)
        step[i, t] = h
        up, down = (float(loss_of(b, algorithm, logp=b.logp + s, **options)[0]) for s in (step, -step))
        assert float(grad[i, t]) == pytest.approx((up - down) / (2 * h), abs=1e-8)
        assert not b.is_expert[i] or grad[i, t] == 0  # the policy's tokens only
        tried += not b.is_expert[i]
    assert tried > 10 and not grad[~b.mask].any()


# -- without experts ---------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("sharpness", [None, 5.0, 14.0])
def test_without_experts_it_is_grpo_and_dapo(algorithm, sharpness):
    b = random_groups(7, n_off=0, spread=0.6)
    grad = gradient(b, algorithm, sharpness=sharpness, kl_coef=0.05)

    logp, old, ref = (torch.where(b.mask, x, 0) for x in (b.logp, b.behavior_logp, b.ref_logp))
    A, ratio = b.advantages[:, None], (logp.requires_grad_() - old).exp()
    token = torch.min(ratio * A, ratio.clip(1 - LOW, 1 + HIGH) * A) - 0.05 * ((ref - logp).exp() - (ref - logp) - 1)  # Eq. 2
    grpo = ((token * b.mask).sum(1) / b.mask.sum(1)).mean()
    dapo = token[b.mask].mean()  # Eq. 4

    want = -{"grpo": grpo, "dapo": dapo}[algorithm]
    torch.testing.assert_close(loss_of(b, algorithm, sharpness, kl_coef=0.05)[0], want.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(want, logp)[0], rtol=1e-10, atol=1e-14)
    assert torch.equal(grad, gradient(b, algorithm, sharpness=1.0, kl_coef=0.05))


# -- promises: splits, inputs, types, extremes -------------------------------------------------------------------------


def in_parts(b, algorithm, size, totals):
    """Loss, gradient and metrics summed over micro-batches of `size` groups."""
    loss, grads, sums = 0.0, torch.zeros_like(b.logp), collections.defaultdict(lambda: [0.0, 0])
    for start in range(0, len(b.rewards), size):
        part = groups_of(b, start, start + size)
        value, metrics = loss_of(part, algorithm, kl_coef=0.1, totals=totals)
        loss += float(value)
        grads[start * b.size :][: len(part.logp), : part.logp.shape[1]] = gradient(part, algorithm, kl_coef=0.1, totals=totals)
        for name, (total, count) in metrics.items():
            sums[name] = [sums[name][0] + float(total), sums[name][1] + float(count)]
    return loss, grads, sums


@BOTH
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_splitting_the_batch_changes_nothing(algorithm, size):
    b = random_groups(8, n_groups=8, lengths=(1, 12), dtype=torch.float32)
    totals = (len(b.logp), int(b.mask.sum()))
    (whole, metrics), grad = loss_of(b, algorithm, kl_coef=0.1), gradient(b, algorithm, kl_coef=0.1)
    loss, parts, sums = in_parts(b, algorithm, size, totals)
    assert loss == pytest.approx(float(whole), rel=1e-6)
    assert (parts - grad).norm() <= 1e-6 * grad.norm()
    for name, (value, count) in metrics.items():
        assert sums[name][0] == pytest.approx(float(value), rel=1e-5, abs=1e-7), name
        assert sums[name][1] == pytest.approx(float(count), rel=1e-5), name


@BOTH
def test_a_mean_of_means_is_something_else(algorithm):
    b = random_groups(8, n_groups=8, lengths=(1, 12), dtype=torch.float32)
    grad = gradient(b, algorithm, kl_coef=0.1)
    _, parts, _ = in_parts(b, algorithm, 3, totals=(None, None))  # each part by its own totals; 3 + 3 + 2 groups
    assert (parts / 3 - grad).norm() > 0.02 * grad.norm()


def test_inputs_are_left_alone():
    b = random_groups(9)
    before = {k: v.clone() for k, v in vars(b).items() if torch.is_tensor(v)}
    loss_of(b, "grpo", kl_coef=0.1)  # not gradient(), which copies
    group_advantages(b.rewards)
    for name, value in before.items():
        torch.testing.assert_close(getattr(b, name), value, rtol=0, atol=0, equal_nan=True)


@BOTH
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int64])
def test_a_mask_of_numbers_works_like_one_of_truths(algorithm, kind):
    b = random_groups(10)
    (loss, metrics), (again, same) = (loss_of(b, algorithm, kl_coef=0.1, mask=m) for m in (b.mask, b.mask.to(kind)))
    assert torch.equal(loss, again) and all(tuple(map(float, metrics[k])) == tuple(map(float, same[k])) for k in metrics)
    assert torch.equal(gradient(b, algorithm), gradient(b, algorithm, mask=b.mask.to(kind)))
    assert torch.equal(token_shares(b.mask, algorithm), token_shares(b.mask.float(), algorithm))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rough_but_works(dtype, algorithm):
    b = random_groups(11)
    half = {k: v.to(dtype) for k, v in vars(b).items() if k.endswith("logp") or k in ("advantages", "rewards")}
    loss, _ = loss_of(b, algorithm, kl_coef=0.1, **half)
    grad = gradient(SimpleNamespace(**vars(b) | half), algorithm, kl_coef=0.1)
    assert group_advantages(half["rewards"]).isfinite().all() and grad.isfinite().all()
    assert float(loss) == pytest.approx(float(loss_of(b, algorithm, kl_coef=0.1)[0]), abs=0.03)


@BOTH
@pytest.mark.parametrize("far", [100.0, -100.0, 1e4, -1e4])
def test_extreme_ratios_stay_finite(far, algorithm):
    b = random_groups(12, dtype=torch.float32)
    b.behavior_logp[:, 0] -= far
    b.ref_logp[:, 0] += far
    loss, metrics = loss_of(b, algorithm, kl_coef=0.1)
    assert loss.isfinite() and gradient(b, algorithm, kl_coef=0.1).isfinite().all()
    assert all(math.isfinite(value) for value, _ in metrics.values())


def test_empty_rows_count_for_nothing():
    b = random_groups(13, n_groups=1)
    b.mask[1] = False
    assert loss_of(b, "grpo", kl_coef=0.1)[0].isfinite() and loss_of(b, "dapo", mask=b.mask & False)[0] == 0
    assert not gradient(b, "grpo", kl_coef=0.1)[1].any()


# -- against code that others wrote; skipped where it is not installed --------------------------------------------------


def agree(ours, theirs, logp):
    """Loss and gradient; and neither is nothing."""
    gradients = [torch.autograd.grad(x, logp, retain_graph=True)[0].nan_to_num() for x in (ours, theirs)]
    assert torch.allclose(ours, theirs.to(ours), rtol=1e-5, atol=1e-7) and float(ours.abs()) > 1e-4
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-8) and float(gradients[0].abs().max()) > 1e-3


def clean(seed, **options):
    """A random batch in float32 without garbage in its padding, which others do not tolerate everywhere."""
    b = random_groups(seed, dtype=torch.float32, **options)
    for name in ("logp", "behavior_logp", "ref_logp"):
        setattr(b, name, torch.where(b.mask, getattr(b, name), 0))
    return SimpleNamespace(**vars(b) | {"logp": b.logp.requires_grad_()})


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    trl = pytest.importorskip("trl")
    processor = tgrl.toy_processor("Think first.")
    model = tgrl.tiny_model(processor.tokenizer, hidden=64, layers=1, vision_layers=1)
    data = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "Why?"}]}] * 8)
    config = trl.GRPOConfig(output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=8, num_generations=8, report_to="none", bf16=False, use_cpu=True,
                            use_bias_correction_kl=False)  # fmt: skip
    return trl.GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), config, train_dataset=data, processing_class=processor.tokenizer)


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@BOTH
def test_without_experts_it_is_the_loss_of_trl(trl_trainer, monkeypatch, algorithm, kl_coef):
    """GRPOTrainer's own _compute_loss, on log-probs that we hand it."""
    for seed in range(5):
        b = clean(seed, n_off=0)
        n_tokens = int(b.mask.sum())
        monkeypatch.setattr(trl_trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (b.logp, torch.zeros_like(b.logp), None))
        for name, value in dict(loss_type=algorithm, beta=kl_coef, epsilon_low=LOW, epsilon_high=HIGH, current_gradient_accumulation_steps=1).items():
            monkeypatch.setattr(trl_trainer, name, value, raising=False)
        ids = torch.ones_like(b.mask, dtype=torch.long)
        inputs = dict(prompt_ids=ids[:, :2], prompt_mask=ids[:, :2], completion_ids=ids, completion_mask=b.mask.long(), advantages=b.advantages,
                      old_per_token_logps=b.behavior_logp, ref_per_token_logps=b.ref_logp, num_items_in_batch=torch.tensor(n_tokens))  # fmt: skip
        trl_trainer.model.train()
        agree(loss_of(b, algorithm, kl_coef=kl_coef)[0], trl_trainer._compute_loss(trl_trainer.model, inputs), b.logp)


@BOTH
def test_without_experts_it_is_the_loss_of_verl(algorithm):
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import FSDPActorConfig

    config = FSDPActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=LOW, clip_ratio_high=HIGH, clip_ratio_c=1e9)  # no dual clip
    mode = {"dapo": "token-mean", "grpo": "seq-mean-token-mean"}[algorithm]
    for seed in range(5):
        b = clean(seed, n_off=0)
        advantages = b.advantages[:, None].expand_as(b.logp)
        theirs, _ = core.compute_policy_loss_vanilla(b.behavior_logp, b.logp, advantages, b.mask, loss_agg_mode=mode, config=config)
        agree(loss_of(b, algorithm)[0], theirs, b.logp)


@pytest.mark.parametrize("certain", [True, False])
def test_unweighted_and_unclipped_it_is_luffys_before_its_shaping(certain):
    """Give a clone of LUFFY's repository as LUFFY=folder; its file is loaded beside the installed verl, as it is."""
    pytest.importorskip("verl")
    if "LUFFY" not in os.environ:
        pytest.skip("LUFFY=folder of a clone is not given")
    path = Path(os.environ["LUFFY"], "luffy/verl/verl/mix_src/mix_core_alg.py")
    luffy = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("mix_core_alg", path))
    spec.loader.exec_module(luffy)
    for seed in range(5):
        b = clean(seed)
        expert = b.is_expert[:, None] & b.mask
        if certain:  # pi_phi = 1
            b.behavior_logp = torch.where(expert, 0, b.behavior_logp)
        theirs = luffy.compute_token_on_off_policy_loss(
            b.behavior_logp, b.logp, b.advantages[:, None].expand_as(b.logp), b.mask, cliprange=LOW, clip_upper_bound=1.0, prefix_mask=expert, off_cliprange=None,
            loss_remove_clip=True, target_probs=None if certain else b.behavior_logp.exp())["pg_loss"]  # fmt: skip
        shares = token_shares(b.mask, "dapo")
        ours, _ = tgrl_loss(b.logp, b.behavior_logp, b.mask, b.advantages, b.is_expert, torch.ones_like(b.expert_ok), shares, sharpness=None, clip_low=1e9, clip_high=1e9)
        if certain:
            agree(ours, theirs, b.logp)
        else:
            assert torch.allclose(ours, theirs, rtol=1e-4)  # it adds 1e-6 to the probability in the denominator


def recipe(name):
    return (Path(tgrl.__file__).parent / ".compare" / f"{name}_recipe.py").read_text().split("# --- the recipe")[1].split("---\n", 1)[-1].rstrip()


@pytest.mark.parametrize("name", ["trl", "verl"])
def test_recipes_in_the_readme_are_those_that_run(name):
    code = recipe(name)
    assert code.count("tgrl_loss(") == 1 and f"```python\n{code.strip()}\n```" in Path(tgrl.__file__).with_name("README.md").read_text()


def test_the_recipe_for_verl_runs():
    pytest.importorskip("verl.trainer.ppo.core_algos")
    script = Path(tgrl.__file__).parent / ".compare" / "verl_recipe.py"
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert said.returncode == 0 and said.stdout.count("largest difference of gradients") == 2, said.stderr


def test_the_copyable_block_runs_alone():
    text = Path(tgrl.__file__).read_text().splitlines()
    first = next(i for i, line in enumerate(text) if line.startswith("def group_advantages"))
    last = next(i for i, line in enumerate(text) if line.startswith("# --- the part to copy ends here"))
    alone = {"torch": torch, "Tensor": torch.Tensor}
    exec("\n".join(text[first:last]), alone)

    # a wrong answer of the policy, one token; a right one of an expert, three, on which the policy lags by 0, 1 and 2 nats
    behavior = torch.tensor([[-1.0, 0, 0], [-0.5, -0.5, -0.5]])
    logp = behavior - torch.tensor([[0.0, 0, 0], [0, 1, 2]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    experts = torch.tensor([False, True])
    advantages = alone["group_advantages"](torch.tensor([[0.0, 1.0]])).flatten()
    loss, _ = alone["tgrl_loss"](logp, behavior, mask, advantages, experts, experts, alone["token_shares"](mask, "dapo"),
                                 sharpness=5.0, clip_low=0.2, clip_high=0.28)  # fmt: skip
    # A = -+0.70711;  w = sigmoid(-5, 0, 5);  sum of rho*w = 0.00669 + 0.36788 * 0.5 + 0.13534 * 0.99331 = 0.32506
    assert float(loss) == pytest.approx(0.70711 * (1 - 0.32506) / 4, abs=1e-5)


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_a_small_kl_is_not_lost_in_rounding(spread):
    """At a learning rate of 1e-6 pi_theta and pi_ref differ by little for long; exp(gap) - 1 - gap would be noise in float32."""
    b = random_groups(14, n_groups=20, spread=spread)
    single = {k: v.float() for k, v in vars(b).items() if k.endswith("logp")}
    gap = (single["ref_logp"] - single["logp"])[b.mask & ~b.is_expert[:, None]].double()
    value, count = loss_of(b, "grpo", kl_coef=0.1, **single)[1]["kl"]
    assert float(value / count) == pytest.approx(float((gap.expm1() - gap).mean()), rel=1e-3)


def test_no_float64_appears_where_a_device_may_lack_it():
    b = random_groups(14, dtype=torch.float32)
    loss, metrics = loss_of(b, "grpo", kl_coef=0.1)
    assert all(torch.as_tensor(x).dtype != torch.float64 for pair in (*metrics.values(), (loss,)) for x in pair)


# ===== The reward ======================================================================================================

LIMIT = 3.0  # seconds: two for the alarm, one for a busy machine


@pytest.fixture(scope="module", autouse=True)
def _warm():
    assert is_equivalent("1 + 1 + x", "2 + x")  # the first call starts the worker; no test should pay for that


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} done}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed {5}", "5"),
        ("\\boxed\n{ 5 }", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{1}", r"\{1"),
        (r"\boxed{3} and \boxed{4", "3"),  # cut off: the last one that closes
        (r"\boxed{4 \boxed{5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"} } {\boxed{5}", "5"),
        (r"\\boxed{5}", "5"),  # escaped once too often
        (r"\boxed{\begin{matrix}1\\{2}\end{matrix}}", r"\begin{matrix}1\\{2}\end{matrix}"),
        (r"\boxed 5", None),
        ("boxed{5}", None),
        ("5", None),
        ("", None),
    ],
)
def test_extract_boxed(text, expected):
    assert extract_boxed(text) == expected


def test_extract_boxed_takes_linear_time():
    for text in ("\\boxed{" * 15_000, "\\boxed{" * 7_000 + "}" * 7_000, "{" * 100_000, "\\boxed" + " " * 100_000, "\\" * 100_000):
        start = time.monotonic()
        extract_boxed(text)
        assert time.monotonic() - start < 1


SAME = r"""
60° ~ 60 | 60^\circ ~ 60 | 60^{\circ} ~ 60° | 60 degrees ~ 60^\circ | 60º ~ 60˚ | 60\degree ~ 60 | 60°, 30° ~ 30, 60
12 cm ~ 12 | 12cm ~ 12 | 12 units ~ 12 | 12\text{ cm} ~ 12 centimeters | 12\,\mathrm{cm} ~ 12 cm | 12~\text{m} ~ 12 meters
5 m^2 ~ 5 | 5 m^2 ~ 5 square meters | 5\,\mathrm{cm}^2 ~ 5 cm^{2} | 5 sq. ft ~ 5 ft² | 5 square units ~ 5 cm^2 | 6 in. ~ 6 inches
(a)^2 ~ (a)^2 | (A)(C) ~ (A)(C) | 5 min ~ 5 minutes | 5 kg ~ 5 kilograms | 90 sec ~ 90 seconds
5 hours ~ 5 | 5\text{ m/s} ~ 5 | 2\pi cm ~ 2\pi | 5 \sqrt { 3 } m ~ 5\sqrt{3} | \frac{3}{4} m ~ 0.75 | 8 feet ~ 8 ft
x = 5 ~ 5 | 5 ~ x = 5 | m\angle A=30 ~ 30 | m∠A = 30° ~ 30 | ABC = 5 ~ 5 | m\widehat{AB} = 120 ~ 120 | Area of triangle = 5 ~ 5
x = 5 cm ~ 5 | AB = 3 + 2 = 5 ~ 5 | x_1 = 5 ~ 5 | \approx 5.3 ~ 5.3 | ≈ 5.3 ~ 5.3 | x \approx 5.3 ~ 5.3
A. 60 ~ A | A. 60 ~ 60 | A. 60° ~ 60 | (A) 60 ~ 60 | (A) ~ A | A ~ (A) | A) ~ A | A: 60 ~ A | \text{B} ~ B | \textbf{(B)} ~ B | b ~ B
1,000 ~ 1000 | 1,234,567 ~ 1234567 | 1{,}000 ~ 1000 | 2/4 ~ 1/2 | \frac{2}{4} ~ \frac12 | 0.5 ~ \frac12 | .5 ~ 1/2 | 5.20 ~ 5.2
50\% ~ 50 | 50 ~ 50% | 50% ~ 50\% | 50.5\% ~ 50.5 | 5. ~ 5 | -5 ~ −5 | −5 ~ -5.0 | 2\frac{1}{2} ~ 5/2 | \dfrac{36}{13} ~ 36/13
2 \sqrt { 221 } ~ 2\sqrt{221} | √2 ~ \sqrt{2} | 2√221 ~ 2\sqrt{221} | \sqrt{2+x} ~ √(2+x) | \frac{1}{\sqrt{2}} ~ \frac{\sqrt{2}}{2}
2π ~ 2\pi | 2pi ~ 2\pi | pi ~ \pi | pi/2 ~ \frac{\pi}{2} | 3×4 ~ 12 | 10^3 ~ 1000 | x² ~ x^2
\boxed{16} ~ 16 | 16 ~ \boxed{16} | $16$ ~ 16 | \(16\) ~ 16 | \$16 ~ 16 | 16 dollars ~ $16 | \text{5 cm} ~ 5
Yes. ~ yes | \text{No} ~ no | Isosceles Triangle ~ isosceles triangle | A, C ~ C, A | AC ~ ac
(1, 2) ~ (1,2) | \left(1, 2\right) ~ (1,2) | (-\infty, 3) ~ (-∞,3) | [1,2) ~ [1, 2) | \{1,2\} ~ \{2,1\} | x = 2, x = 3 ~ 2, 3
y=2x+1 ~ y = 1+2x | y - 2x = 1 ~ y = 2x + 1 | 2x+1 ~ y = 1+2x | x > 5 ~ 5 < x | 2ab ~ 2ba | (x+1)^2 ~ x^2+2x+1
"""
DIFFERENT = r"""
12 cm ~ 12 m | 5 m^2 ~ 5 m | 60° ~ 60 cm | 5 hours ~ 5 minutes | 5 cm^2 ~ 5 cm^3 | 60° ~ 30° | 12 cm ~ 13 cm | 2 million ~ 2
B ~ C | A ~ 60 | 60 ~ A | A. 60 ~ B | A. 60 ~ 61 | A, C ~ A | A. B ~ A | A) B) ~ A | A, B, C, D ~ A | A, C ~ A, B | A triangle ~ A
AB ~ BA | yes ~ no | 12.566 ~ 4\pi | 33.3 ~ 33.33 | 29.7 ~ 2\sqrt{221} | 5 ~ 6 | 5 ~ -5 | 0.333 ~ 1/3 | 1,000 ~ 1 | 10 ~ 100
(1,2) ~ (2,1) | [1,2) ~ (1,2) | 3:4 ~ 4:3 | x = 5 ~ y = 5 | y = 2x + 1 ~ y = 2x - 1 | x != 5 ~ 5 | 2x + 1 = 5 ~ 2 | x > 5 ~ x < 5
3t ~ 3 | 2xy ~ 2
2 sec x ~ 2 | 3 times x ~ 3 | 5 over x ~ 5 | 3 plus y ~ 3 | 2 arcsin x ~ 2
2 \sin x ~ 2 | 5 or 6 ~ 5 | 5 or x ~ 5 | 3 sin x ~ 3 | 5, 6 ~ 5 | 1 2 3 5 ~ 5 | the answer is 5 ~ 5 | $1$, $2$ ~ 1 | 1$2 ~ 1 | $5$ or $6$ ~ 6
\sqrt{221} ~ 221 | 2\pi ~ \pi | 1e999999999 ~ 1 | \frac{1}{0} ~ 1 | . ~ 5 | $ ~ 5 | ~ ~ 5
"""


def pairs(table):
    return [tuple(pair.strip().rsplit(" ~ ", 1)) for line in table.strip().splitlines() for pair in line.split(" | ")]


@pytest.mark.parametrize("prediction, answer", pairs(SAME))
def test_same(prediction, answer):
    assert is_equivalent(prediction, answer) is True


@pytest.mark.parametrize("prediction, answer", pairs(DIFFERENT))
def test_different(prediction, answer):
    assert is_equivalent(prediction, answer) is False


@pytest.mark.parametrize("nothing", ["", " ", "\n", "$$", r"\boxed{}", ".", " " * 500])
def test_nothing_equals_nothing(nothing):
    assert not is_equivalent(nothing, nothing)
    assert not is_equivalent(nothing, "")
    assert not is_equivalent("", nothing)
    assert reward(rf"\boxed{{{nothing}}}", nothing) == 0.0


def test_reward_reads_the_last_box():
    assert reward(r"< think > \boxed{4} </think> so \boxed {60^\circ}", "60") == 1.0
    assert reward(r"\boxed{60} no: \boxed{61}", "60") == 0.0
    assert reward(r"\boxed{60} \boxed{}", "60") == 0.0
    assert reward("60", "60") == 0.0
    assert type(reward(r"\boxed{60}", "60")) is float


@pytest.mark.parametrize("hostile", ["9^{9^{9^9}}", "((9!)!)!"])
def test_a_timeout_is_a_counted_zero(hostile):
    before, start = math_verify.errors["timeout"], time.monotonic()
    assert not is_equivalent(hostile, "57")
    assert 1.5 < time.monotonic() - start < LIMIT
    assert math_verify.errors["timeout"] == before + 1
    start = time.monotonic()
    assert not is_equivalent(hostile, "57")  # remembered
    assert is_equivalent("2 + 3 + z", "z + 5")  # and the next one gets its verdict, from a child that is there at once
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "hostile",
    [
        "x" * 100_000,
        "\\boxed{" * 15_000,
        "\\frac{" * 66,
        "\\sqrt{" * 60 + "2" + "}" * 60,
        "\ud800 5",
        "a\0b5",
        "5\n6",
        "é" * 400,
        "𝟓",
        "√" * 400,
    ]
    + [
        "1" * 400,
        "^ " * 200,
        "5 " + "a ./" * 99,
        "\\text{" * 70,
        "5" + "." * 390,
        "A. " * 130,
        "=" * 400,
        "A" * 399 + "=",
        "5" + " " * 390 + "x",
    ],
)
def test_no_string_breaks_it(hostile):
    for prediction, answer in ((hostile, "57"), ("57", hostile)):
        start = time.monotonic()
        assert not is_equivalent(prediction, answer)
        assert time.monotonic() - start < LIMIT
    assert is_equivalent("x + 1 + 1", "x + 2")


def test_a_very_long_answer_is_not_compared_as_mathematics():
    long, start = "1+" * 50_000 + "1", time.monotonic()
    assert not is_equivalent(long, "50001") and not is_equivalent("50001", long)
    assert is_equivalent(long, f" {long}")
    assert time.monotonic() - start < 0.5


def test_errors_of_math_verify_are_counted():
    grader = _MathVerify()
    grader.WORKER = grader.WORKER.replace("verdict = bool(", "verdict = 1 // 0, bool(")
    assert grader("x + 1", "1 + x") is False
    assert dict(grader.errors) == {"ZeroDivisionError": 1}


def test_a_dead_worker_is_counted_and_replaced():
    grader = _MathVerify()
    assert grader("x + 1", "1 + x")
    os.killpg(grader.worker.pid, signal.SIGKILL)  # the worker and its child
    grader.worker.wait()
    assert grader("x + 2", "2 + x") is False
    assert dict(grader.errors) == {"crash": 1}
    assert grader("x + 3", "3 + x") is True


def test_an_interrupted_call_leaves_no_stale_reply():
    grader = _MathVerify()
    assert grader("x + 1", "1 + x")

    class Interrupted:  # a worker whose reply is missed once
        def __init__(self, process):
            self.process, self.stdin, self.stdout, self.missed = process, process.stdin, self, False

        def readline(self):
            if self.missed:
                return self.process.stdout.readline()
            self.missed = True
            raise KeyboardInterrupt

    grader.worker = Interrupted(grader.worker)
    with pytest.raises(KeyboardInterrupt):
        grader("x + 2", "x + 2 + 0")  # its reply, True, is never read ...
    assert grader("x + 2", "x + 3") is False  # ... and is not taken for this one's


def test_a_worker_that_does_not_start_is_one_clear_error():
    grader = _MathVerify()
    grader.WORKER = "raise SystemExit(1)"
    with pytest.raises(RuntimeError, match="math-verify does not start"):
        grader("x", "y")
    with pytest.raises(RuntimeError, match="math-verify does not start"):  # the lock is free again
        grader("x", "y")


def test_threads_share_one_worker_and_get_their_own_verdicts():
    grader, wrong, starts = _MathVerify(), [], []
    start, grader.start = grader.start, lambda: starts.append(1) or start()

    def grade(k):
        for n in range(40):
            same = (n + k) % 2 == 0
            if grader(f"{n} + {k} y", f"{k} y + {n if same else n + 1}") is not same:
                wrong.append((k, n))

    threads = [threading.Thread(target=grade, args=(k,)) for k in (3, 4)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert not any(t.is_alive() for t in threads)
    assert not wrong and not grader.errors
    assert len(starts) == 1


def test_a_forked_process_starts_its_own_worker():
    mine = math_verify.worker.pid
    with math_verify.lock:  # held by another thread at the moment of the fork, say
        child = os.fork()
    if child == 0:
        try:
            right = is_equivalent("q + 1 + 1", "q + 2") and not is_equivalent("q + 1", "q + 2")
            os._exit(0 if right and math_verify.worker.pid != mine else 1)
        finally:
            os._exit(2)
    for _ in range(200):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
    assert pid and os.waitstatus_to_exitcode(status) == 0
    assert is_equivalent("r + 1 + 1", "r + 2") and math_verify.worker.pid == mine  # ours is as it was


def test_the_worker_ends_with_its_process():
    code = (
        "import os, tgrl; assert tgrl.is_equivalent('x+1', '1+x'); print(tgrl.math_verify.worker.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.path.dirname(sys.modules["tgrl"].__file__))
    worker = int(done.stdout)
    for _ in range(100):
        if not os.path.exists(f"/proc/{worker}") or " Z " in open(f"/proc/{worker}/stat").read():
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its process")


soup = st.lists(
    st.sampled_from(
        r"\frac \sqrt { } ( ) [ ] ^ _ 1 2 9 0.5 99999 x y \pi \infty \circ ° % \% , . : = < > + - * / ! | & \\ $ \text \left \right cm "
        r"^2 A B. (C) √ π − \angle \sin \log \int \sum \begin{matrix} \end{matrix} \boxed \boxed{ or and e i 1e999 9^{9^9} \cdot".split()
        + [" ", "\n", "\0", "\ud800", "𝟓"]
    ),
    max_size=30,
).map("".join)
texts = st.one_of(
    soup,
    st.text(st.characters(), max_size=60),  # surrogates included
    st.text("\ud800\udfff\0\n5", max_size=5),
    st.text("0123456789.,/^{}()-+= x", max_size=40),
    st.integers(1, 400).map(lambda n: "{" * n),
    st.integers(1, 70).map(lambda n: r"\sqrt{" * n + "2" + "}" * n),
    st.integers(1, 10**12).map(lambda n: f"{n}^{{{n}}}"),
    st.integers(1, 10**12).map(lambda n: f"1e{n}"),
    st.tuples(soup, st.just(100_000)).map(lambda p: (p[0] * p[1])[: p[1]]),
    st.sampled_from(["", " ", "5", "A", "60", r"2\sqrt{221}", r"\frac{1}{2}", "(1,2)", "yes", "x = 5"]),
)


def test_fuzz():
    seconds = float(os.environ.get("TGRL_FUZZ_SECONDS", 8))
    begin, calls, slowest, ones = time.monotonic(), 0, 0.0, 0

    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(texts, texts, st.booleans())
    def check(prediction, answer, boxed):
        nonlocal calls, slowest, ones
        if (start := time.monotonic()) - begin > seconds:
            return
        value = reward(rf"so \boxed{{{prediction}}}" if boxed else prediction, answer)
        took = time.monotonic() - start
        calls, slowest, ones = calls + 1, max(slowest, took), ones + (value == 1.0)
        assert value in (0.0, 1.0) and math.copysign(1, value) == 1
        assert took < LIMIT
        if prediction.strip() == answer.strip() == "":
            assert value == 0.0

    while time.monotonic() - begin < seconds:
        check()
    print(f"\nfuzz: {calls} calls in {seconds:.0f} s, slowest {slowest:.2f} s, {ones} rewarded, errors {dict(math_verify.errors)}")
    assert calls > 10


# ===== Real parts: a tiny Qwen2.5-VL, its processor, generate ==========================================================


def picture(rng, width, height):
    """Noise, so that every pixel matters."""
    return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))


@pytest.fixture(scope="module")
def world():
    """Model, encoder and policy, as load_model and Trainer build them, with weights large enough to matter."""
    set_seed(0)
    cfg = Config(**tgrl.TOY | dict(min_pixels=28 * 28, max_pixels=112 * 112, max_answer=24))
    processor = tgrl.toy_processor(cfg.instruction)
    model = tgrl.tiny_model(processor.tokenizer, hidden=64, layers=2, vision_layers=2).eval()
    encoder = tgrl.Encoder(processor, model, cfg)
    policy = tgrl.Policy(model, encoder.unwritable).eval()
    return SimpleNamespace(cfg=cfg, processor=processor, model=model, encoder=encoder, policy=policy)


def sample(world, prompts, n, max_tokens, **options):
    world.encoder.cfg = dataclasses.replace(world.cfg, max_answer=max_tokens)
    return tgrl.sample(world.model, world.encoder, prompts, n, **options)


def make_problem(seed=0, sizes=((56, 56),), question="How many?"):
    rng = random.Random(seed)
    row = {"problem": "<image>" * len(sizes) + question, "images": [picture(rng, *size) for size in sizes], "answer": "7"}
    return tgrl.read_problem(row, Path())


def make_groups(world, n_groups=3, n_answers=4, seed=0, experts=True):
    """Groups with pictures of different size, several pictures and none, and answers of different length, one of a single token."""
    rng, groups = random.Random(seed), []
    shapes = [((56, 56),), ((84, 56), (28, 112)), (), ((112, 84),)]
    for g in range(n_groups):
        problem = make_problem(seed + g, shapes[g % 4], "Which? " * (1 + g))
        answers = []
        for i in range(n_answers):
            ids = [rng.randrange(10, 300) for _ in range(rng.choice([0, 3, 8, 13]) if i else 0)] + [world.encoder.ends[-1]]
            right = float(rng.random() < 0.5)
            expert = experts and i == n_answers - 1
            source = "expert" if expert else "policy"
            answers.append(tgrl.Trajectory(ids, "", right, source, kept=right == 1 or not expert, behavior_logp=-3 * torch.rand(len(ids))))
        groups.append(tgrl.Group(problem, world.encoder(problem), answers))
    return groups


def separate_logp(world, group, answer):
    """Log-probs [T] of one answer in a row of its own, by the model's own forward, with no code of ours but the prompt's ids."""
    prompt, ids = group.prompt, torch.tensor(answer.ids)
    row = torch.cat([prompt.ids, ids])[None]
    vision = {} if prompt.pixels is None else dict(pixel_values=prompt.pixels, image_grid_thw=prompt.grid)
    types = (row == world.model.config.image_token_id).int()
    world.model.model.rope_deltas = None
    logits = world.model(input_ids=row, attention_mask=torch.ones_like(row), mm_token_type_ids=types, **vision).logits[0]
    logits = logits[len(prompt.ids) - 1 : -1].index_fill(-1, world.encoder.unwritable, -torch.inf)
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def test_a_group_in_one_row_equals_separate_rows(world):
    groups = make_groups(world, 4)
    batch = tgrl.pack(groups)
    weight = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0)) * batch.mask
    world.model.zero_grad()
    logp = world.policy(batch)
    (logp * weight).sum().backward()
    packed = {name: p.grad.clone() for name, p in world.model.named_parameters() if p.grad is not None}
    world.model.zero_grad()
    answers = [(g, t) for g in groups for t in g.trajectories]
    for (group, answer), row, w in zip(answers, logp, weight):
        alone = separate_logp(world, group, answer)
        assert torch.allclose(row[: len(alone)], alone, atol=1e-4)
        assert (row[len(alone) :] == 0).all()
        (alone * w[: len(alone)]).sum().backward()
    for name, p in world.model.named_parameters():
        assert (packed[name] - p.grad).norm() <= 1e-5 * p.grad.norm() + 1e-7, name
    world.model.zero_grad()


def test_positions_of_pictures_matter(world, monkeypatch):
    """Guards the guard above: had the encoder dropped mm_token_type_ids, the comparison would have failed."""
    group = make_groups(world, 1)[0]
    real = world.model.model.get_rope_index
    drop = lambda ids, mm_token_type_ids, image_grid_thw=None: real(ids, mm_token_type_ids=0 * mm_token_type_ids)  # noqa: E731
    monkeypatch.setattr(world.encoder, "rope_index", drop)
    group.prompt = world.encoder(group.problem)
    with torch.no_grad():
        logp, answer = world.policy(tgrl.pack([group])), group.trajectories[1]
        assert not torch.allclose(logp[1][: len(answer.ids)], separate_logp(world, group, answer), atol=1e-4)


def test_answers_do_not_see_each_other(world):
    group = make_groups(world, 1)[0]
    with torch.no_grad():
        before = world.policy(tgrl.pack([group]))
        group.trajectories[1].ids[:-1] = [11] * (len(group.trajectories[1].ids) - 1)
        after = world.policy(tgrl.pack([group]))
    assert torch.equal(before[2:], after[2:]) and torch.equal(before[0], after[0])


def test_gradient_checkpointing_changes_nothing(world):
    batch, grads = tgrl.pack(make_groups(world, 2)), []
    for enable in (False, True):
        if enable:
            world.model.activation_checkpointing_enable()
        world.policy.train().zero_grad()
        world.policy(batch).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in world.model.parameters()]))
    world.model.activation_checkpointing_disable()
    world.policy.eval().zero_grad()
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-6)


def test_a_copy_in_bfloat16_counts_positions_as_the_original(world):
    twin = tgrl.frozen_copy(world.model, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in twin.parameters())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in world.model.parameters())
    buffers = dict(world.model.named_buffers())
    assert buffers and all(torch.equal(buffer, buffers[name]) for name, buffer in twin.named_buffers())
    assert all(torch.equal(q, p.bfloat16()) for p, q in zip(world.model.parameters(), twin.parameters()))


@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
def test_gradient_does_not_depend_on_the_split(world, algorithm):
    """The whole way from groups to gradients, in micro-batches of 1, 2, 4 and 8 groups."""
    groups = make_groups(world, 8, seed=3)
    for group in groups:
        for t, a in zip(group.trajectories, tgrl.group_advantages(torch.tensor([[t.reward for t in group.trajectories]]))[0].tolist()):
            t.advantage, t.ref_logp = a, -2 * torch.rand(len(t.ids))
    answers = [t for g in groups for t in g.trajectories]
    totals, grads = (len(answers), sum(len(t.ids) for t in answers)), []
    for size in (1, 2, 4, 8):
        world.policy.zero_grad()
        for i in range(0, 8, size):
            b = tgrl.pack(groups[i : i + size])
            column = lambda name: tgrl.pad([getattr(t, name) for g in groups[i : i + size] for t in g.trajectories])  # noqa: B023, E731
            loss, _ = tgrl.tgrl_loss(world.policy(b), column("behavior_logp"), b.mask, b.advantages, b.is_expert, b.expert_ok,
                                     tgrl.token_shares(b.mask, algorithm, *totals), sharpness=5.0, clip_low=0.2, clip_high=0.28,
                                     kl_coef=0.01, ref_logp=column("ref_logp"))  # fmt: skip
            loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in world.model.parameters()]))
    world.policy.zero_grad()
    assert grads[0].norm() > 1e-3
    for grad in grads[1:]:
        assert (grad - grads[0]).norm() <= 1e-6 * grads[0].norm()


def test_rollout_log_probs_are_training_log_probs(world):
    """What generate sampled from, recorded by a processor of its own, against Policy on the same answers."""
    group = make_groups(world, 1)[0]
    seen, real = [], world.model.generate

    def generate(*args, **kwargs):
        record = lambda _, scores: seen.append(scores.log_softmax(-1)) or scores  # noqa: E731
        return real(*args, logits_processor=[record], **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.model, "generate", generate)
        ids = sample(world, [group.prompt], 6, 20, chunk=64)[0]
    group.trajectories = [tgrl.Trajectory(a, "", 0.0) for a in ids]
    tgrl.score(world.policy, [group], 1, "logp")
    for row, answer in enumerate(group.trajectories):
        sampled = torch.stack([seen[t][row, token] for t, token in enumerate(answer.ids)])
        assert torch.allclose(sampled, answer.logp, atol=1e-4)


@pytest.mark.parametrize("chunk", [3, 64])
def test_greedy_rollout_equals_plain_generate(world, chunk):
    """Prefilled once, left-padded beside others, in chunks that finished answers leave: the same tokens as one question at a time."""
    groups = make_groups(world, 4)
    rolled = sample(world, [g.prompt for g in groups], 2, 12, temperature=0, chunk=chunk)
    for group, (first, second) in zip(groups, rolled):
        p = group.prompt
        vision = {} if p.pixels is None else dict(pixel_values=p.pixels, image_grid_thw=p.grid)
        out = world.model.generate(input_ids=p.ids[None], attention_mask=torch.ones_like(p.ids)[None], max_new_tokens=12, do_sample=False,
                                   mm_token_type_ids=(p.ids == world.model.config.image_token_id).int()[None],
                                   suppress_tokens=world.encoder.unwritable.tolist(), eos_token_id=world.encoder.ends, pad_token_id=0, **vision)  # fmt: skip
        plain = out[0, len(p.ids) :].tolist()
        stop = next((i + 1 for i, token in enumerate(plain) if token in world.encoder.ends), 12)
        assert first == second == plain[:stop]


def test_sampling_ignores_the_generation_config_of_the_checkpoint(world, monkeypatch):
    """With top_k 1 from the checkpoint, answers would all be the greedy one."""
    hostile = GenerationConfig(do_sample=True, top_k=1, temperature=0.01, repetition_penalty=5.0, min_new_tokens=9, suppress_tokens=list(range(20, 330)))
    monkeypatch.setattr(world.model, "generation_config", hostile)
    prompt = make_groups(world, 1)[0].prompt
    answers = sample(world, [prompt], 8, 8)[0]
    assert len({tuple(a) for a in answers}) > 4 and any(20 <= token for a in answers for token in a)
    assert world.model.generation_config is hostile


def test_vision_tokens_are_never_sampled(world):
    """Even when the model wants nothing else."""
    image_token, head = world.model.config.image_token_id, world.model.lm_head
    prompt = make_groups(world, 1)[0].prompt
    want = head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([image_token]), 1e4))
    try:
        answers = sample(world, [prompt], 4, 6)[0]
        assert image_token not in {token for a in answers for token in a}
        group = tgrl.Group(None, prompt, [tgrl.Trajectory(a, "", 0.0) for a in answers])
        tgrl.score(world.policy, [group], 1, "logp")
        assert all(t.logp.isfinite().all() for t in group.trajectories)
    finally:
        want.remove()


def test_answers_end_at_the_first_end_token_and_it_counts(world):
    prompt = make_groups(world, 1)[0].prompt
    for end in world.encoder.ends:  # <|endoftext|> is padding and an end token as well
        want = world.model.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([end]), 1e4))
        answers = sample(world, [prompt], 3, 6)[0]
        want.remove()
        assert answers == [[end]] * 3
    batch = tgrl.pack([tgrl.Group(None, prompt, [tgrl.Trajectory(a, "", 0.0) for a in answers])])
    assert batch.mask.sum() == 3


def test_finished_answers_are_cut_at_their_end_and_leave(world):
    """In chunks of 4: of three answers, the first ends at once and is padded; then the second, now first of two, ends at its fifth token."""
    prompt, end, rows = make_groups(world, 1)[0].prompt, world.encoder.ends[-1], []

    def end_the_first(module, args, out):
        rows.append(len(out))
        out = out.index_fill(-1, torch.tensor(world.encoder.ends), -1e4)
        out[0, -1, end] = 1e4
        return out

    want = world.model.lm_head.register_forward_hook(end_the_first)
    answers = sample(world, [prompt], 3, 6, chunk=4)[0]
    want.remove()
    assert [len(a) for a in answers] == [1, 5, 6] and [a[-1] == end for a in answers] == [True, True, False]
    assert rows == [3] * 4 + [2] * 2


# ===== Questions =======================================================================================================


def encoded(image, kind="PNG"):
    image.save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def geo3k_rows(n=6):
    rng = random.Random(0)
    return [{"images": [picture(rng, 60 + i, 56)], "problem": f"<image>Find x. Take {i}.", "answer": str(i)} for i in range(n)]


def to_parquet(rows, path):
    features = datasets.Features(images=[datasets.Image()], problem=datasets.Value("string"), answer=datasets.Value("string"))
    datasets.Dataset.from_list(rows, features).to_parquet(path)


def test_every_source_gives_the_same_problems(tmp_path):
    """geometry3k as parquet (pictures as bytes), ViRL39K as JSONL with paths, and a folder of images with metadata.jsonl."""
    rows = geo3k_rows()
    to_parquet(rows, tmp_path / "train.parquet")
    from_parquet = tgrl.load_problems(str(tmp_path / "train.parquet"))
    (tmp_path / "images").mkdir()
    with open(tmp_path / "virl.jsonl", "w") as virl, open(tmp_path / "images" / "metadata.jsonl", "w") as metadata:
        for i, row in enumerate(rows):
            (tmp_path / "images" / f"{i}.png").write_bytes(from_parquet[i].images[0])
            virl.write(json.dumps({"question": row["problem"], "answer": f"\\boxed{{{row['answer']}}}", "image": [f"images/{i}.png"], "qid": i}) + "\n")
            metadata.write(json.dumps({"file_name": f"{i}.png", "problem": row["problem"], "answer": row["answer"]}) + "\n")
    assert [p.answer for p in from_parquet] == [str(i) for i in range(6)]
    assert tgrl.load_problems(str(tmp_path / "virl.jsonl")) == from_parquet
    assert sorted(p.id for p in tgrl.load_problems(str(tmp_path / "images"))) == sorted(p.id for p in from_parquet)
    assert tgrl.load_problems(str(tmp_path / "virl.jsonl"), limit=2) == from_parquet[:2]


def test_several_pictures_and_none(world):
    text_only = tgrl.read_problem({"question": "2 + 2?", "answer": "\\boxed{4}", "image": []}, Path())
    assert text_only.answer == "4" and world.encoder(text_only).pixels is None
    two = make_problem(sizes=((56, 56), (112, 56)))
    prompt = world.encoder(two)
    image_tokens = (prompt.ids == world.model.config.image_token_id).sum()
    assert len(prompt.grid) == 2 and image_tokens == 4 + 8 == prompt.grid.prod(1).sum() // 4
    assert len(prompt.ids) == world.encoder.length(two) and len(text_only.images) == 0
    lost = tgrl.read_problem({"problem": "How many?", "images": [Image.new("RGB", (56, 56))], "answer": "1"}, Path())
    assert lost.question.startswith("<image>")


def test_prompt_is_question_then_instruction(world):
    text = world.encoder.text(make_problem(question="How many?"))
    assert text.index("<|image_pad|>") < text.index("How many?") < text.index(world.cfg.instruction) < text.index("assistant")
    other = tgrl.Encoder(world.processor, world.model, dataclasses.replace(world.cfg, instruction="Just say."))
    assert other.text(make_problem()).count("Just say.") == 1


def test_transparent_drawings_get_a_white_ground():
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    assert tgrl.open_picture(encoded(image)).getpixel((5, 5)) == (255, 255, 255)


def test_bad_rows_are_named_and_good_ones_kept(tmp_path, capsys):
    good, png = {"problem": "<image>Why?", "answer": "1"}, encoded(Image.new("RGB", (56, 56)))
    bad = [
        good | {"images": [Image.new("RGB", (1, 1))]},
        good | {"images": [Image.new("RGB", (10000, 30))]},
        good | {"images": [png[: len(png) // 2]]},
        good | {"images": ["nowhere.png"]},
        good | {"images": [png], "problem": "<image><image>Why?"},
        good | {"images": [png], "answer": " "},
        good | {"images": [png], "problem": ""},
        good | {"images": [png], "answer": None},
        good | {"images": [png], "problem": "<image>Why?<|image_pad|>"},
    ]
    rows = [good | {"images": [png]}, *bad, good | {"images": [png]}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tgrl, "read_rows", lambda source, split: iter(rows))
        problems = tgrl.load_problems("rows")
    said = capsys.readouterr().out
    assert len(problems) == 2 and "9 of 11 rows left out" in said
    for words in ("picture of 1 x 1 pixels: row 1", "picture of 10000 x 30 pixels: row 2", "unreadable picture, ", "nowhere.png: row 4",
                  "2 times <image> for 1 pictures: row 5", "no answer: row 6, 8", "no question: row 7",
                  "<|image_pad|> in the question, which is no text to the model: row 9"):  # fmt: skip
        assert words in said, words


def test_unusable_sources_say_why(tmp_path, world, capsys):
    def error(source, **kwargs):
        with pytest.raises(BadInput) as caught:
            tgrl.load_problems(str(source), **kwargs)
        return str(caught.value)

    assert "does not exist" in error(tmp_path / "no.jsonl") and "does not exist" in error(tmp_path / "no.parquet")
    (tmp_path / "a.jsonl").write_text('{"image": [], "text": "?", "answer": "1"}\n')
    assert "no column problem or question" in error(tmp_path / "a.jsonl") and "image, text, answer" in error(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"problem": "?", "answer": "1"}\n{"problem": ')
    assert "line 2 is no JSON" in error(tmp_path / "b.jsonl")
    (tmp_path / "list.jsonl").write_text('[["problem", "?"], ["answer", "1"]]\n')
    assert "line 1 is no JSON object" in error(tmp_path / "list.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "it is empty" in error(tmp_path / "empty.jsonl")
    assert "cannot load" in error(tmp_path)
    to_parquet(geo3k_rows(3), tmp_path / "c.parquet")
    strict = tgrl.Encoder(world.processor, world.model, dataclasses.replace(world.cfg, max_prompt=10))
    with pytest.raises(BadInput, match="every question is longer than --max_prompt 10 tokens"):
        strict.load(str(tmp_path / "c.parquet"), "train")
    (tmp_path / "d.jsonl").write_text('{"problem": "Short?", "answer": "1"}\n' + json.dumps({"problem": "Long? " * 99, "answer": "1"}))
    some = tgrl.Encoder(world.processor, world.model, dataclasses.replace(world.cfg, max_prompt=60))
    assert len(some.load(str(tmp_path / "d.jsonl"), "train")) == 1
    assert "1 of 2 usable rows left out\n  longer than --max_prompt 60 tokens: row 1" in capsys.readouterr().out


# ===== Experts and training: the commands, as a user starts them =======================================================


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """A model and six questions on disk, and the options for a run of seconds."""
    folder = tmp_path_factory.mktemp("run")
    world.model.save_pretrained(folder / "model")
    world.processor.save_pretrained(folder / "model")
    to_parquet(geo3k_rows(), folder / "train.parquet")
    options = tgrl.TOY | dict(model=f"{folder}/model", data=f"{folder}/train.parquet", experts=f"{folder}/experts.jsonl", out=f"{folder}/out",
                              min_pixels=784, max_pixels=12544, max_answer=8, samples=3, generate_batch=12, steps=2, questions_per_rollout=4,
                              questions_per_update=2, micro_batch=1, n_on=3, n_off=1, tracker="none", show_every=1)  # fmt: skip
    tgrl.make_experts(Config(**options))
    return SimpleNamespace(path=folder, options=options, config=lambda **more: Config(**options | more))


def cached_answers(path):
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()[1:]]
    return {q: sum(len(r["answers"]) for r in lines if r["question"] == q) for q in {r["question"] for r in lines}}


def test_expert_log_probs_are_the_experts_own(folder, world):
    path = folder.path / "experts.jsonl"
    assert set(cached_answers(path).values()) == {3} and len(cached_answers(path)) == 6
    problems = {p.id: p for p in tgrl.load_problems(folder.options["data"])}
    for line in path.read_text().splitlines()[1:3]:
        record = json.loads(line)
        problem = problems[record["question"]]
        group = tgrl.Group(problem, world.encoder(problem), [])
        for a in record["answers"]:
            assert torch.allclose(torch.tensor(a["logps"]), separate_logp(world, group, SimpleNamespace(ids=a["ids"])), atol=1e-4)
            assert a["reward"] == tgrl.reward(a["text"], problem.answer)


def command_line(options) -> list[str]:
    pairs = ([f"--{name}", str(value)] if not isinstance(value, bool) else [f"--{'' if value else 'no-'}{name}"] for name, value in options.items())
    return list(itertools.chain(*pairs))


def test_experts_continue_after_a_kill(folder, tmp_path):
    """SIGKILL in the middle of a run and a torn last line: afterwards every question has its answers, none twice, none torn."""
    path = tmp_path / "experts.jsonl"
    options = folder.options | dict(experts=str(path), generate_batch=3, max_answer=40)
    process = subprocess.Popen([sys.executable, tgrl.__file__, "experts", *command_line(options)], stderr=subprocess.DEVNULL)
    while process.poll() is None and (not path.exists() or len(path.read_bytes().splitlines()) < 3):
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = path.read_bytes()
    assert 3 <= len(before.splitlines()) < 7, "the kill came too late to show anything"
    path.write_bytes(before[:-25])  # a line torn in the middle
    tgrl.make_experts(Config(**options))
    after = path.read_text()
    assert after.startswith(before[:-25].decode().rsplit("\n", 1)[0])
    assert set(cached_answers(path).values()) == {3} and len(cached_answers(path)) == 6
    tgrl.make_experts(Config(**options))
    assert path.read_text() == after


@pytest.mark.parametrize("change, words", [
    (dict(instruction="Answer in French."), "answers another prompt"),
    (dict(max_pixels=28 * 28 * 4), "answers another prompt"),
])  # fmt: skip
def test_a_cache_for_another_prompt_is_refused(folder, change, words):
    with pytest.raises(BadInput, match=words):
        tgrl.Trainer(folder.config(**change, out=f"{folder.path}/refused"))


@pytest.mark.parametrize("key, value, words", [
    ("tokenizer", "0123", "another tokenizer"),
    ("sampling", {"temperature": 0.6}, "not sampled at temperature 1"),
    ("model", "somebody/else", "another model's answers"),
    ("tgrl_experts", None, "is no expert cache"),
    ("texts", None, "is no expert cache"),
])  # fmt: skip
def test_a_foreign_cache_is_refused(folder, tmp_path, key, value, words):
    header, *lines = (folder.path / "experts.jsonl").read_text().splitlines()
    header = json.loads(header) | {key: value}
    if value is None:
        del header[key]
    path = tmp_path / "experts.jsonl"
    path.write_text("\n".join([json.dumps(header), *lines, ""]))
    before = path.read_text()
    with pytest.raises(BadInput, match=words):
        tgrl.make_experts(folder.config(experts=str(path)))
    assert path.read_text() == before


def test_flawed_answers_are_left_out_one_by_one(world, tmp_path, capsys):
    good = dict(ids=[1, 2], logps=[-0.5, -0.1], reward=1.0, finished=True, text="")
    flawed = [good | {"logps": [float("nan"), -1.0]}, good | {"logps": [0.5, -1.0]}, good | {"ids": [1.0, 999]}, good | {"logps": [-1.0]},
              good | {"ids": [1, world.model.config.image_token_id]}]  # fmt: skip
    path = tmp_path / "experts.jsonl"
    lines = [{"tgrl_experts": 1, "texts": None, "model": "m"}, {"question": "a", "answers": [good]}, *({"question": "a", "answers": [f]} for f in flawed)]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"no": "answers"}\n{"question": "b", "ans')
    _, experts = tgrl.read_cache(path, {}, world.encoder)
    assert {q: len(a) for q, a in experts.items()} == {"a": 1} and experts["a"][0].is_expert
    said = capsys.readouterr().out
    for words in ("not finite: line 3", "above 0: line 4", "outside the vocabulary: line 5, 7", "different length: line 6",
                  "no record of answers; a kill may have torn it: line 8, 9", "7 of 8 answers left out"):  # fmt: skip
        assert words in said, words


def test_two_writers_do_not_tear_each_others_lines(tmp_path):
    path = tmp_path / "cache.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: tgrl.append_records(path, [{"i": i, "pad": "x" * 20000}] * 2), range(40)))
    assert sorted(json.loads(line)["i"] for line in path.read_text().splitlines()) == sorted([*range(40)] * 2)


def test_generates_own_log_probs_are_those_of_the_scoring_forward(world):
    """In chunks, so that finished answers leave in between."""
    prompts, own = [world.encoder(make_problem(seed)) for seed in range(3)], []
    answers = sample(world, prompts, 4, 20, chunk=6, logps=own)
    groups = [tgrl.Group(None, p, [tgrl.Trajectory(ids, "", 0.0) for ids in a]) for p, a in zip(prompts, answers)]
    tgrl.score(world.policy, groups, 2, "logp")
    for t, seen in zip(itertools.chain(*(group.trajectories for group in groups)), own, strict=True):
        assert len(seen) == len(t.ids) and torch.allclose(torch.tensor(seen), t.logp, atol=1e-4)


def test_experts_of_two_processes_continue_after_a_kill(folder, tmp_path):
    """SIGKILL to both in the middle: afterwards every question has exactly its answers."""
    path = tmp_path / "experts.jsonl"
    options = folder.options | dict(experts=str(path), generate_batch=3, max_answer=160)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tgrl.__file__, "experts", *command_line(options)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    process = subprocess.Popen(launch, **quiet)
    while process.poll() is None and (not path.exists() or len(path.read_bytes().splitlines()) < 3):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(50):  # the launcher gives its workers sessions of their own; they end with it, or we end them
        left = subprocess.run(["pgrep", "-f", str(path)], capture_output=True, text=True).stdout.split()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if not left:
            break
        time.sleep(0.1)
    assert 3 <= len(path.read_bytes().splitlines()) < 7, "the kill came too late to show anything"
    subprocess.run(launch, check=True, timeout=200, **quiet)
    assert set(cached_answers(path).values()) == {3} and len(cached_answers(path)) == 6
    assert len(path.read_bytes().splitlines()) == 7 and path.read_bytes().endswith(b"\n")


def test_more_samples_are_other_samples(folder, tmp_path):
    """A cache that is continued, with another --samples, does not get the same answers again."""
    cfg = folder.config(experts=str(tmp_path / "experts.jsonl"), samples=2)
    for samples in (2, 4):
        tgrl.make_experts(dataclasses.replace(cfg, samples=samples))
    answers = collections.defaultdict(list)
    for record in map(json.loads, (tmp_path / "experts.jsonl").read_text().splitlines()[1:]):
        answers[record["question"]] += [tuple(a["ids"]) for a in record["answers"]]
    assert all(len(set(some)) == 4 for some in answers.values()) and len(answers) == 6


def test_sampling_stops_once_an_answer_is_right(folder, tmp_path, monkeypatch):
    calls = collections.Counter()

    def right_at_the_second(text, answer):
        calls[answer] += 1
        return float(answer != "12" and calls[answer] == 2)  # one question is never answered right

    monkeypatch.setattr(tgrl, "reward", right_at_the_second)
    path = tmp_path / "experts.jsonl"
    tgrl.make_experts(folder.config(experts=str(path), until_correct=True, samples=4))
    answers = {p.id: p.answer for p in tgrl.load_problems(folder.options["data"])}
    assert {answers[q]: n for q, n in cached_answers(path).items()} == {a: 4 if a == "12" else 2 for a in answers.values()}


def test_texts_from_anywhere_are_scored_like_sampled_ones(folder, world, tmp_path, capsys):
    problems = tgrl.load_problems(folder.options["data"])
    texts = ["width 3, height 4. So \\boxed{7}", "area = 12\n\\boxed{é}", "It is <|image_pad|> \\boxed{7}<|im_end|>"]
    lines = [{"row": p.row, "text": text} for p in problems[:2] for text in texts] + [{"row": 99, "text": "x"}, {"row": 1}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cfg = folder.config(experts=str(tmp_path / "scored.jsonl"), score=str(tmp_path / "texts.jsonl"))
    tgrl.make_experts(cfg)
    said = capsys.readouterr().out
    assert "or that was left out: line 7" in said and "no text: line 8" in said
    header, *records = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert header["texts"] == cfg.score and {r["question"] for r in records} == {p.id for p in problems[:2]}
    for record in records:
        group = tgrl.Group(None, world.encoder(next(p for p in problems if p.id == record["question"])), [])
        assert [a["text"] for a in record["answers"]][:2] == texts[:2]
        for a in record["answers"]:
            assert a["ids"][-1] == world.processor.tokenizer.eos_token_id and a["ids"].count(a["ids"][-1]) == 1
            assert not set(a["ids"]) & set(world.encoder.unwritable.tolist())  # a special token in a text is text
            assert torch.allclose(torch.tensor(a["logps"]), separate_logp(world, group, SimpleNamespace(ids=a["ids"])), atol=1e-4)
    before = (tmp_path / "scored.jsonl").read_text()
    tgrl.make_experts(cfg)
    assert (tmp_path / "scored.jsonl").read_text() == before  # nothing twice
    more = [{"row": 0, "text": "one more"}, *lines[:6]]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, more)))
    tgrl.make_experts(cfg)  # what is new is scored, wherever it stands
    last = json.loads((tmp_path / "scored.jsonl").read_text().splitlines()[-1])
    assert [a["text"] for a in last["answers"]] == ["one more"] and len((tmp_path / "scored.jsonl").read_text().splitlines()) == len(before.splitlines()) + 1


def test_a_closed_models_answers_are_assumed_certain_and_said_to_be(folder, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"row": i, "text": "So \\boxed{7}"}) for i in range(6)))
    cfg = folder.config(experts=str(tmp_path / "c.jsonl"), score=str(tmp_path / "texts.jsonl"), assume_certain=True)
    tgrl.make_experts(cfg)
    records = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert records[0]["assumed_certain"] and all(set(a["logps"]) == {0.0} for r in records[1:] for a in r["answers"])
    capsys.readouterr()
    tgrl.Trainer(folder.config(experts=str(tmp_path / "c.jsonl"), out=str(tmp_path / "out")))
    assert "log pi_phi = 0 is assumed" in capsys.readouterr().out
    with pytest.raises(BadInput, match="assumed in one and computed in the other"):
        tgrl.make_experts(dataclasses.replace(cfg, assume_certain=False))


def test_a_spread_model_scores_the_same(folder, tmp_path):
    tgrl.make_experts(folder.config(experts=str(tmp_path / "spread.jsonl"), spread=True))  # on a CPU there is one place to spread to
    assert set(cached_answers(tmp_path / "spread.jsonl").values()) == {3}


def test_stats_of_a_cache(tmp_path, capsys):
    a = dict(ids=[5, 6], logps=[-1.0, -3.0], reward=1.0, finished=True, text="")
    b = dict(ids=[5, 6, 7, 8], logps=[0.0] * 4, reward=0.0, finished=False, text="")
    header = {"tgrl_experts": 1, "model": "m", "data": "d", "split": "train", "texts": None}
    lines = [header, {"question": "x", "answers": [a, b]}, {"question": "x", "answers": [a]}, {"question": "y", "answers": [b]}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"torn')
    tgrl.make_experts(Config(stats=str(tmp_path / "c.jsonl")))
    said = capsys.readouterr().out
    for words in ("samples, log-probs of m, on d (train)", "4 answers, 50.0% correct; 1 of 2 questions (50.0%) have", "no record of answers", "median 4, longest 4, 50.0% cut off", "-0.667; 1 answers"):
        assert words in said, said
    with pytest.raises(BadInput, match="does not exist"):
        tgrl.make_experts(Config(stats="nowhere.jsonl"))
    with pytest.raises(BadInput, match="--experts self is for train"):
        tgrl.make_experts(Config(experts="self"))


# ----- Experts that the policy makes itself


def test_steps_are_sentences_and_lines(world):
    tokenizer = world.processor.tokenizer
    ids = tokenizer("<think>width 3, height 4. area = 3.5*4 = 12!\n\nedge = 14; total = 26</think>").input_ids
    starts = tgrl.step_starts(ids, tokenizer)
    pieces = [tokenizer.decode(ids[a:b]).strip() for a, b in itertools.pairwise([*starts, len(ids)])]
    assert pieces == ["<think>width 3, height 4.", "area = 3.5*4 = 12!", "edge = 14;", "total = 26</think>"]
    assert tgrl.step_starts([5], tokenizer) == [0] and tgrl.step_starts(tokenizer("no end").input_ids, tokenizer) == [0]


def flawed_group(world, seed=0):
    """A question and a wrong answer of four steps, as the world's random model would never write it."""
    problem = make_problem(seed)
    ids = world.processor.tokenizer("width 3. height 4. area = 12. total = 26").input_ids + [world.encoder.ends[-1]]
    return tgrl.Group(problem, world.encoder(problem), [tgrl.Trajectory(ids, "", 0.0)])


def test_a_step_is_as_eroded_as_its_most_regrettable_token(world, monkeypatch):
    group = flawed_group(world)
    flawed = group.trajectories[0]
    story = tgrl.localise(world.policy, group, flawed, world.processor.tokenizer)
    assert torch.allclose(flawed.logp, separate_logp(world, group, flawed), atol=1e-4)
    prompt, ids = group.prompt, torch.tensor(flawed.ids)
    row = torch.cat([prompt.ids, ids])[None]
    world.model.model.rope_deltas = None
    with torch.no_grad():
        logits = world.model(input_ids=row, attention_mask=torch.ones_like(row), mm_token_type_ids=(row == world.model.config.image_token_id).int(),
                             pixel_values=prompt.pixels, image_grid_thw=prompt.grid).logits[0, len(prompt.ids) - 1 : -1]  # fmt: skip
    logp = logits.index_fill(-1, world.encoder.unwritable, -torch.inf).log_softmax(-1)
    regret = logp.max(-1).values - logp.gather(1, ids[:, None])[:, 0]
    for i, (a, b) in enumerate(itertools.pairwise([*story.starts, len(ids)])):
        assert abs(story.erosion[i] - float(regret[a:b].max())) < 1e-4
    for bound in (-1.0, sorted(story.erosion)[-2], 1e9):
        monkeypatch.setattr(tgrl, "ERODED", bound)
        suspect = tgrl.localise(world.policy, group, flawed, world.processor.tokenizer).suspect
        assert suspect == (0 if bound < 0 else story.erosion.index(max(story.erosion)))


def test_a_rectified_answer_joins_with_the_log_probs_it_was_sampled_with(world, monkeypatch):
    """Verified in the second round, one step earlier; the log-probs are those of generate, under the prompts that produced each part."""
    group, seen = flawed_group(world, 3), []
    world.encoder.cfg = dataclasses.replace(world.cfg, tries=3, rounds=3, max_answer=40)
    monkeypatch.setattr(tgrl, "ERODED", 1e9)
    monkeypatch.setattr(tgrl, "localise", lambda *a, real=tgrl.localise: dataclasses.replace(real(*a), suspect=2))
    real = tgrl.sample

    def watching(actor, encoder, prompts, n, **options):
        monkeypatch.setattr(tgrl, "reward", lambda text, answer: float(len(seen) == 2))  # nothing is right before the second round
        seen.append((prompts[0], own := []))
        return real(actor, encoder, prompts, n, logps=own)

    monkeypatch.setattr(tgrl, "sample", watching)
    set_seed(1)
    for _ in range(20):  # until one of the tries has an end
        seen.clear()
        group.trajectories = group.trajectories[:1]
        tgrl.rectify(world.model, world.encoder, [group])
        if group.rectification.tail:
            break
    story, flawed, expert = group.rectification, *group.trajectories
    assert expert.source == "self" and expert.is_expert and expert.kept and expert.finished and story.rounds == 2 and story.cut == story.starts[1]
    assert expert.ids == flawed.ids[: story.cut] + story.tail
    prompt, logps = seen[1]
    own = next(x for x in logps if len(x) == len(story.tail) and torch.allclose(torch.tensor(x), expert.behavior_logp[story.cut :], atol=1e-4))
    assert own and torch.allclose(expert.behavior_logp[: story.cut], separate_logp(world, group, flawed)[: story.cut], atol=1e-4)
    looking = world.encoder(tgrl.look_again(group.problem))
    assert prompt.ids.tolist() == looking.ids.tolist() + flawed.ids[: story.cut] and len(prompt.grid) == 2
    again = separate_logp(world, tgrl.Group(group.problem, looking, []), SimpleNamespace(ids=expert.ids))[story.cut :]
    assert torch.allclose(again, expert.behavior_logp[story.cut :], atol=1e-4)


def test_rectifying_is_bounded_and_leaves_right_answers_alone(world, monkeypatch):
    world.encoder.cfg = dataclasses.replace(world.cfg, tries=2, rounds=2, max_answer=12)
    monkeypatch.setattr(tgrl, "reward", lambda text, answer: 0.0)
    wrong, right, open_end = (flawed_group(world, seed) for seed in range(3))
    right.trajectories[0].reward, open_end.trajectories[0].finished = 1.0, False
    tgrl.rectify(world.model, world.encoder, [wrong, right, open_end])
    assert wrong.rectification.tail is None and 1 <= wrong.rectification.rounds <= 2 and len(wrong.trajectories) == 1
    assert right.rectification is None and open_end.rectification is None


@pytest.mark.parametrize("source", ["self", "both"])
def test_training_with_experts_of_its_own(folder, tmp_path, monkeypatch, source):
    """No cache at all; and a cache, with its wrong answers replaced."""
    monkeypatch.setattr(tgrl, "reward", lambda text, answer: float(len(text) % 5 == 0))
    out = tmp_path / "out"
    options = dict(experts="self") if source == "self" else dict(experts=folder.options["experts"] + ",self")
    cfg = folder.config(**options, algorithm="dapo", out=str(out), tries=6, max_answer=24, lr=1e-3)
    assert cfg.rectifies and cfg.cache == ("" if source == "self" else folder.options["experts"]) and cfg.method == "TGRL-DAPO-self"
    trainer = tgrl.Trainer(cfg)
    trainer.encoder.ends = list(range(20, 80))  # a random model hardly finds the end by itself
    trainer.fit()
    groups = [json.loads(line) for line in (out / "groups.jsonl").read_text().splitlines()]
    assert any("rectification" in g for g in groups)
    for g in groups:
        experts = [a for a in g["answers"] if a["source"] != "policy"]
        assert len(experts) <= 1 and all(a["reward"] == 1 for a in experts if a["source"] == "self")
        if g.get("rectification", {}).get("tail"):
            assert experts[0]["source"] == "self"
    assert any(a["source"] == "self" for g in groups for a in g["answers"])
    show([out])
    assert "taken up again" in (out / "groups.html").read_text() and read_metrics(out)[1]["rectified"] is not None


def read_metrics(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


TABLE_1 = {
    "TGRL": {},
    "w/o Filter": dict(filter=False),
    "w/o Reweight": dict(reweight=False),
    "w/o Expert": dict(n_off=0, n_on=4),
}


@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
@pytest.mark.parametrize("row", TABLE_1)
def test_every_row_of_table_1_trains(folder, tmp_path, algorithm, row):
    """Real rollouts, experts and updates; then the run is readable, shown, and the trained model loads."""
    out = tmp_path / "out"
    cfg = folder.config(algorithm=algorithm, out=str(out), val_data=folder.options["data"], lr=1e-3, steps=2 if row == "TGRL" else 1, **TABLE_1[row])
    before = {name: p.clone() for name, p in tgrl.load_model(cfg.model)[0].named_parameters()}
    trainer = tgrl.Trainer(cfg)
    collect = trainer.collect

    def with_contrast(tally):  # a random model is never right: make one answer of each group so, to have a gradient
        groups = collect(tally)
        for g in groups:
            g.trajectories[0].reward = 1.0
            for t, a in zip(g.trajectories, tgrl.group_advantages(torch.tensor([[t.reward for t in g.trajectories]]))[0].tolist()):
                t.advantage = a
        return groups

    trainer.collect = with_contrast
    trainer.fit()
    header, *records = read_metrics(out)
    assert header["config"]["algorithm"] == algorithm and header["versions"]["torch"] and header["data"]["questions"] == 6
    assert [r["step"] for r in records] == list(range(cfg.steps + 1)) and "accuracy" in records[-1]
    assert all(math.isfinite(records[0][key]) for key in ("reward", "entropy", "grad_norm", "objective", "ratio", "seconds"))
    assert ("kl" in records[0]) == (algorithm == "grpo") and (records[0]["expert_reward"] is None) == (row == "w/o Expert")
    after = dict(tgrl.load_model(str(out / "model"))[0].named_parameters())
    still = [name for name, p in after.items() if torch.equal(p, before[name])]
    assert not still, still
    show([out])
    assert (out / "curves.png").stat().st_size > 10_000
    page = (out / "groups.html").read_text()
    assert "data:image/png;base64," in page and ("data-v=" in page) == (row != "w/o Expert")


def test_dynamic_sampling_draws_again_and_is_bounded(folder, tmp_path, monkeypatch):
    trainer = tgrl.Trainer(folder.config(algorithm="dapo", out=str(tmp_path), max_draws=3, n_off=0, n_on=3))
    calls, tally = [], tgrl.Tally()
    monkeypatch.setattr(trainer, "roll_out", lambda drawn: calls.append(len(drawn)) or [
        tgrl.Group(p, None, [tgrl.Trajectory([1], "", float(i == 0 and len(calls) == 2 and k == 0), advantage=0.5) for i in range(3)])
        for k, (_, p) in enumerate(drawn)])  # fmt: skip
    groups = trainer.collect(tally)
    assert calls == [4, 4, 3] and len(groups) == 4 and trainer.position == 11
    assert [any(t.advantage for t in g.trajectories) for g in groups] == [True, False, False, False]
    assert tally["filler"] == [3, 4] and tally["contrast"] == [1, 11]


def test_what_counts_as_contrast(folder, tmp_path):
    trainer = tgrl.Trainer(folder.config(out=str(tmp_path)))

    def group(own, expert):
        trainer.experts = {"q": [tgrl.Trajectory([1], "", expert, "x")]}
        return tgrl.Group(None, None, [tgrl.Trajectory([1], "", r) for r in own] + trainer.pick_experts(SimpleNamespace(id="q"), 0))

    assert trainer.has_contrast(group([0.0, 0.0], 1.0))  # rescued by its expert
    assert not trainer.has_contrast(group([1.0, 1.0], 0.0))  # the masked expert alone keeps nothing
    assert not trainer.has_contrast(group([0.0, 0.0], 0.0)) and not trainer.has_contrast(group([1.0, 1.0], 1.0))
    trainer.cfg.filter = False
    assert trainer.has_contrast(group([1.0, 1.0], 0.0))


def test_experts_rotate_with_the_epoch(folder, tmp_path):
    trainer = tgrl.Trainer(folder.config(out=str(tmp_path), n_off=2))
    problem = trainer.problems[0]
    cached = trainer.experts[problem.id]
    ids = lambda epoch: [t.ids for t in trainer.pick_experts(problem, epoch)]  # noqa: E731
    assert ids(0) == [cached[0].ids, cached[1].ids] and ids(1) == [cached[2].ids, cached[0].ids] and ids(3) == ids(0)
    trainer.cfg.prefer_correct, cached[2].reward = True, 1.0
    assert ids(0)[0] == cached[2].ids
    trainer.experts = {}
    assert trainer.pick_experts(problem, 0) == []


def test_a_question_is_drawn_once_an_epoch(folder, tmp_path):
    trainer = tgrl.Trainer(folder.config(out=str(tmp_path)))
    drawn = trainer.draw(4) + trainer.draw(8)
    assert [epoch for epoch, _ in drawn] == [0] * 6 + [1] * 6
    for epoch in (0, 1):
        assert len({p.id for e, p in drawn if e == epoch}) == 6


def test_several_updates_use_pi_old_from_before_the_first(folder, tmp_path):
    """With two updates a rollout, the first has ratio 1 and the second has not."""
    trainer = tgrl.Trainer(folder.config(out=str(tmp_path), lr=1e-2, n_off=0, n_on=4))
    groups = trainer.roll_out(trainer.draw(4))
    for g in groups:
        for i, t in enumerate(g.trajectories):
            t.advantage = 1.0 if i % 2 else -1.0
    trainer.set_log_probs(groups)
    ratios = []
    for part in (groups[:2], groups[2:]):
        tally = tgrl.Tally()
        trainer.update(part, tally)
        ratios.append(tally["ratio"][0] / tally["ratio"][1])
    assert abs(ratios[0] - 1) < 1e-5 < 1e-3 < abs(ratios[1] - 1)


def test_a_gradient_that_is_not_finite_changes_nothing(folder, tmp_path):
    trainer = tgrl.Trainer(folder.config(out=str(tmp_path), questions_per_rollout=2))
    groups = trainer.roll_out(trainer.draw(2))
    groups[0].trajectories[0].advantage = float("inf")
    before = [p.clone() for p in trainer.policy.parameters()]
    trainer.update(groups, tally := tgrl.Tally())
    assert tally["skipped_nonfinite"] == [1, 1] and all(map(torch.equal, before, trainer.policy.parameters()))


def test_no_signal_no_step(folder, tmp_path):
    trainer = tgrl.Trainer(folder.config(algorithm="dapo", out=str(tmp_path), questions_per_rollout=2, n_off=0, n_on=2))
    groups = trainer.roll_out(trainer.draw(2))
    for t in (t for g in groups for t in g.trajectories):
        t.advantage = 0.0
    before = [p.clone() for p in trainer.policy.parameters()]
    trainer.update(groups, tally := tgrl.Tally())
    assert tally["skipped_no_signal"] == [1, 1] and all(map(torch.equal, before, trainer.policy.parameters()))


# ===== Several processes, and continuing ===============================================================================


def update_thrice(options: dict, experts: bool, result: str):
    """Three updates on given groups; their gradients, the weights after them, and what this process holds of them, in a file."""
    trainer = tgrl.Trainer(Config(**options))
    torch.manual_seed(0)
    groups = make_groups(SimpleNamespace(encoder=trainer.encoder), 8, seed=5, experts=experts)  # some without a picture, some with two
    for group in groups:
        for i, t in enumerate(group.trajectories):
            t.advantage, t.reward, t.kept = (1.0, -0.5, 0.25, 1.5)[i], 1.0, True
            t.behavior_logp, t.ref_logp = -3 * torch.rand(len(t.ids)), -3 * torch.rand(len(t.ids))
    gradients = []
    parameters = [p for p in trainer.policy.parameters() if p.requires_grad]
    keep = lambda *_: gradients.append(torch.cat([tgrl.whole(p.grad).flatten() for p in parameters]))  # noqa: E731
    trainer.optimizer.register_step_pre_hook(keep)
    for _ in range(3):
        trainer.update(groups[trainer.rank :: trainer.world], tally := tgrl.Tally())
    local = lambda x: (x.to_local() if hasattr(x, "to_local") else x).numel()  # noqa: E731
    sizes = [sum(map(local, parameters)), sum(local(s["exp_avg"]) for s in trainer.optimizer.state.values())]
    sizes = torch.tensor(sizes) / sum(p.numel() for p in parameters)
    weights = torch.cat([tgrl.whole(p).flatten() for p in parameters])
    trainer.refresh_actor()
    assert torch.equal(weights, torch.cat([p.flatten() for p in trainer.actor.parameters()]))
    buffers = [dict(model.named_buffers()) for model in (trainer.actor, trainer.policy.model)]
    assert all(torch.equal(buffers[0][name], buffer) for name, buffer in buffers[1].items())
    means = torch.tensor([sum(trainer.total(value)) / max(sum(trainer.total(count)), 1) for value, count in tally.values()])
    save_file(dict(gradients=torch.stack(gradients), weights=weights, sizes=sizes, means=means), f"{result}.{trainer.rank}")


def uneven(trainer):
    """What the two processes meet differs as much as it can, and neither may wait for the other forever."""
    first = trainer.rank == 0
    groups = make_groups(SimpleNamespace(encoder=trainer.encoder), 4)
    pictures = {number: 0 if g.prompt.grid is None else len(g.prompt.grid) for number, g in enumerate(groups)}
    none, two = (next(number for number, count in pictures.items() if count == want) for want in (0, 2))
    trainer.update([groups[none if first else two]] * 2, tgrl.Tally())
    for t in (t for g in groups for t in g.trajectories):
        t.ids, t.behavior_logp, t.ref_logp = (t.ids[:1] if first else t.ids * 3), None, torch.zeros(1 if first else 3 * len(t.ids))
    trainer.update([groups[3]] * 2, tgrl.Tally())  # answers of one token here, of many there
    trainer.encoder.cfg = dataclasses.replace(trainer.cfg, max_answer=1 if first else 24)
    tgrl.reward = lambda text, answer: 0.0 if first else float(len(text) % 2)  # all groups degenerate here, hardly any there
    trainer.learn(0, tally := tgrl.Tally())
    assert (tally["filler"][0] > 0) == first
    weights = torch.cat([tgrl.whole(p).flatten() for p in trainer.policy.parameters()])
    assert trainer.total(weights.sum())[0] == 2 * float(weights.sum())


def worker(job: str, options: dict, result: str):
    """What torchrun starts below, on each process: real Trainer, real sharding, real rollouts, and some real trouble."""
    tgrl.reward = lambda text, answer: float(len(text) % 2)  # a random model is never right; this gives groups with contrast
    if job == "update":
        for algorithm, experts in itertools.product(["grpo", "dapo"], [True, False]):
            update_thrice(options | dict(algorithm=algorithm), experts, f"{result}.{algorithm}.{experts}")
        return
    trainer = tgrl.Trainer(Config(**options))
    save, learn = trainer.save_checkpoint, trainer.learn
    if job == "uneven":
        uneven(trainer)
    elif job == "memory":  # a real shortage: the address space may grow by 300 MB, the mask of one row has 20000^2 cells
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, -1))
        group = make_groups(SimpleNamespace(encoder=trainer.encoder), 1)[0]
        group.trajectories = [tgrl.Trajectory([11] * 5000, "", 1.0, advantage=1.0) for _ in range(4)]
        trainer.update([group], tgrl.Tally())
    elif job == "disk":  # as if it were full from the second checkpoint on
        trainer.save_checkpoint = lambda step: (step == 2 and resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1)), save(step))
        trainer.fit()
    elif job == "crash":
        trainer.learn = lambda step, tally: 1 // 0 if trainer.rank == 1 and step == 1 else learn(step, tally)
        trainer.fit()
    else:
        trainer.fit()


def torchrun(processes: int, job: str, options: dict, result: str = "", wait: bool = True, fails: bool = False, nodes: str = "--standalone"):
    command = [sys.executable, "-m", "torch.distributed.run", *nodes.split(), "--nproc-per-node", str(processes)]
    command = [*command, __file__, job, json.dumps(options), str(result)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return finish(process, fails) if wait else process


def finish(process, fails: bool = False):
    """Wait, but not forever: a hang is a failure, too."""
    try:
        process.said = process.communicate(timeout=240)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert (process.returncode != 0) == fails, process.said
    return process


def test_any_number_of_processes_gives_the_same_updates(folder, tmp_path):
    """FSDP2 on gloo: the same gradients and weights on 1, 2 and 4 processes, and on 2 "nodes"; each process keeps its share."""
    options = folder.options | dict(questions_per_rollout=8, questions_per_update=8, lr=1e-4, checkpointing=True)
    for processes in (1, 2, 4):
        torchrun(processes, "update", options | dict(out=str(tmp_path / str(processes))), tmp_path / str(processes))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = f"--nnodes 2 --master-addr 127.0.0.1 --master-port {port} --node-rank "
    agents = [torchrun(1, "update", options | dict(out=str(tmp_path / "nodes")), tmp_path / "nodes", wait=False, nodes=place + n) for n in "01"]
    for agent in agents:
        finish(agent)
    for algorithm, experts in itertools.product(["grpo", "dapo"], [True, False]):
        want = load_file(tmp_path / f"1.{algorithm}.{experts}.0")
        for name, rank, world in (("2", 1, 2), ("4", 3, 4), ("nodes", 1, 2)):
            got = load_file(tmp_path / f"{name}.{algorithm}.{experts}.{rank}")
            assert got["sizes"].max() < 1.1 / world
            for a, b in zip(got["gradients"], want["gradients"]):
                assert b.norm() > 1e-3 and (a - b).norm() <= 1e-6 * b.norm(), (name, algorithm, experts)
            assert (got["weights"] - want["weights"]).norm() <= 1e-6 * want["weights"].norm()
            assert torch.allclose(got["means"], want["means"], rtol=1e-4, atol=1e-7)
        two, nodes = (load_file(tmp_path / f"{name}.{algorithm}.{experts}.0")["weights"] for name in ("2", "nodes"))
        assert torch.equal(two, nodes)


def test_unequal_processes_do_not_hang(folder, tmp_path):
    options = folder.options | dict(algorithm="dapo", out=str(tmp_path), questions_per_rollout=4, questions_per_update=4, lr=1e-4, n_off=0, n_on=4)
    torchrun(2, "uneven", options)


def test_a_crash_of_one_process_ends_all_with_its_error(folder, tmp_path):
    start = time.monotonic()
    said = torchrun(2, "crash", folder.options | dict(out=str(tmp_path), steps=50), fails=True).said
    assert "ZeroDivisionError" in said and time.monotonic() - start < 100


def test_out_of_memory_names_what_to_lower(folder, tmp_path):
    said = torchrun(1, "memory", folder.options | dict(out=str(tmp_path)), fails=True).said
    assert re.search(r"out of memory in the update, 1 groups at once in rows of 20\d+ tokens; lower --micro_batch, --max_answer", said), said


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_costs_no_checkpoint(folder, tmp_path, processes):
    options = folder.options | dict(out=str(tmp_path), steps=4, save_every=1)
    said = torchrun(processes, "disk", options, fails=True).said
    assert "000002.tmp" in said and "cannot write" in said and "checkpoints/000001 is whole; continue from it with --resume" in said
    torchrun(processes, "fit", options | dict(resume=True))
    assert [r["step"] for r in read_metrics(tmp_path)[1:]] == list(range(5))


def test_weights_that_are_not_finite_stop_the_run(folder, tmp_path):
    trainer = tgrl.Trainer(folder.config(out=str(tmp_path), save_every=1, steps=4))
    learn = trainer.learn

    def spoil(step, tally):
        learn(step, tally)
        if step == 1:
            next(trainer.policy.parameters()).data[0] = torch.nan

    trainer.learn = spoil
    with pytest.raises(BadInput, match="before step 2 the weights are not finite. .*000001 is whole"):
        trainer.fit()


@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
def test_a_dry_run_tries_the_largest_and_writes_nothing(folder, tmp_path, capsys, monkeypatch, algorithm):
    monkeypatch.setattr(tgrl.Encoder, "ends", property(lambda self: list(range(20, 300)), lambda self, ends: None), raising=False)  # answers want to end at once
    trainer = tgrl.Trainer(folder.config(out=str(tmp_path / "out"), dry_run=True, algorithm=algorithm, val_data=folder.options["data"]))
    sizes, update = [], trainer.update
    trainer.update = lambda groups, tally: sizes.append([len(t.ids) for g in groups for t in g.trajectories]) or update(groups, tally)
    trainer.fit()
    said = capsys.readouterr().out
    assert sizes == [[8, 8, 8, 8]] and len(set(map(id, trainer.held_out))) == 1 and len(trainer.held_out) == 12 and not (tmp_path / "out").exists()
    assert "sampling 12 answers at once" in said and "scoring and updating on 1 groups at once" in said and "GiB" in said and "These fit." in said
    longest = tgrl.Trajectory([20] * 30, "", 1.0, "expert")
    trainer.experts = {"other": [longest]}
    trainer.fit()
    assert sizes[1] == [8, 8, 8, 30], "answers in a cache may be longer than --max_answer"


def same_runs(a: Path, b: Path):
    """Bit for bit, but for the clock."""
    for first, second in zip(read_metrics(a)[1:], read_metrics(b)[1:], strict=True):
        assert {k: v for k, v in first.items() if "seconds" not in k} == {k: v for k, v in second.items() if "seconds" not in k}
    assert [g["step"] for g in map(json.loads, open(a / "groups.jsonl"))] == [g["step"] for g in map(json.loads, open(b / "groups.jsonl"))]
    first, second = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(request, folder, tmp_path_factory):
    """Six steps on one process, and on two, to which disturbed runs are compared."""
    options = folder.options | dict(steps=6, save_every=2, lr=1e-3, algorithm="grpo", val_data=folder.options["data"], eval_every=3)
    whole = tmp_path_factory.mktemp("undisturbed")
    torchrun(request.param, "fit", options | dict(out=str(whole)))
    assert len(read_metrics(whole)) == 8
    assert all(r["grad_norm"] for r in read_metrics(whole)[1:-1]), "the comparison needs gradients"
    return SimpleNamespace(processes=request.param, options=options, out=whole)


@pytest.mark.parametrize("_", range(int(os.environ.get("TGRL_KILLS", 1))))
def test_a_killed_run_continues_bit_for_bit(undisturbed, tmp_path, _):
    """SIGKILL to all processes at a random moment after the first checkpoint; then --resume."""
    processes, options, killed = undisturbed.processes, undisturbed.options, tmp_path / "killed"
    process = torchrun(processes, "fit", options | dict(out=str(killed)), wait=False)
    while process.poll() is None and not (killed / "checkpoints" / "000002").exists():
        time.sleep(0.01)
    time.sleep(random.random() * 2)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() != 0, "the run was over before the kill"
    torchrun(processes, "fit", options | dict(out=str(killed), resume=True))
    same_runs(undisturbed.out, killed)


def test_ctrl_c_saves_and_leaves(undisturbed, tmp_path):
    processes, options, stopped = undisturbed.processes, undisturbed.options, tmp_path / "stopped"
    process = torchrun(processes, "fit", options | dict(out=str(stopped), save_every=100), wait=False)
    while process.poll() is None and not (stopped / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)  # to the launcher alone, which passes it on
    said = finish(process, fails=True).said
    assert "stopped before step" in said and "is whole; continue from it with --resume" in said and said.count("stopping after this step") == 1
    torchrun(processes, "fit", options | dict(out=str(stopped), resume=True))
    same_runs(undisturbed.out, stopped)


def test_a_run_continues_on_more_and_on_fewer_processes_and_past_a_damaged_checkpoint(folder, tmp_path):
    options = folder.options | dict(out=str(tmp_path), steps=2, save_every=2, lr=1e-3, algorithm="grpo", keep=2)
    torchrun(2, "fit", options)
    for processes, steps in ((1, 4), (4, 6)):
        options |= dict(steps=steps, resume=True, questions_per_update=4)
        torchrun(processes, "fit", options)
    assert [r["step"] for r in read_metrics(tmp_path)[1:]] == list(range(7))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000004", "000006"]  # the last two are kept
    damaged = tmp_path / "checkpoints" / "000006"
    next(damaged.glob("__3_*.distcp")).write_bytes(b"")
    said = torchrun(2, "fit", options).said
    assert said.count("000006 is damaged, or of another model") == 1 and "continues with step 4" in said
    assert [r["step"] for r in read_metrics(tmp_path)[1:]] == list(range(7))
    for folder in (tmp_path / "checkpoints").iterdir():
        next(folder.glob("*.distcp")).write_bytes(b"")
    with pytest.raises(BadInput, match="nothing whole to continue from"):
        tgrl.Trainer(Config(**options)).fit()


def test_a_kill_during_the_first_checkpoint_costs_only_the_steps_before_it(folder, tmp_path):
    (tmp_path / "checkpoints" / "000002.tmp").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"config": {}}\n{"step": 0}\n{"st')
    trainer = tgrl.Trainer(folder.config(out=str(tmp_path), resume=True))
    assert trainer.load_checkpoint() == 0
    trainer.begin_records(0)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1 and (tmp_path / "groups.jsonl").read_text() == ""


# ===== The command line, the README, the shape of the file =============================================================


def test_options_come_from_the_dataclass(capsys):
    command, cfg = tgrl.parse(["train", "--algorithm", "grpo", "--n_on", "4", "--no-filter", "--lr", "1e-5", "--sharpness", "7"])
    assert command == "train" and (cfg.algorithm, cfg.n_on, cfg.filter, cfg.lr, cfg.sharpness) == ("grpo", 4, False, 1e-5, 7.0)
    assert (cfg.clip_high, cfg.kl_coef, cfg.token_mean, cfg.dynamic_sampling) == (0.2, 0.01, False, False)
    dapo = tgrl.parse(["train"])[1]
    assert (dapo.sharpness, dapo.clip_high, dapo.kl_coef, dapo.token_mean, dapo.dynamic_sampling) == (14.0, 0.28, 0.0, True, True)
    assert tgrl.parse([])[0] == "toy" and "32B" in tgrl.parse(["experts"])[1].model
    with pytest.raises(SystemExit):
        tgrl.parse(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{f.name}" in text for f in dataclasses.fields(Config))


@pytest.mark.parametrize("argv, words", [
    (["train", "--algorithm", "ppo"], "can be grpo or dapo"),
    (["train", "--n_on", "1", "--n_off", "0"], "--n_on is 1; it must be at least 2"),
    (["train", "--questions_per_update", "100"], "not a multiple"),
    (["train", "--min_pixels", "9999999"], "larger than"),
    (["train", "--micro_batch", "0"], "at least 1"),
    (["train", "--steps", "-3"], "at least 0"),
    (["train", "--lr=-1e-6"], "at least 0"),
    (["experts", "--assume_certain"], "for texts that --score names"),
])  # fmt: skip
def test_bad_options_are_explained(argv, words):
    with pytest.raises(BadInput, match=words):
        tgrl.parse(argv)


def test_only_a_training_has_a_dry_run(tmp_path):
    for command in (tgrl.toy, tgrl.make_experts):
        with pytest.raises(BadInput, match="--dry_run is for train"):
            command(Config(**tgrl.TOY | dict(out=str(tmp_path / "toy"), dry_run=True)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, words", [
    (dict(experts="nowhere.jsonl"), "tgrl.py experts"),
    (dict(model="nowhere"), "cannot load --model nowhere"),
    (dict(tracker="abacus"), "--tracker abacus"),
])  # fmt: skip
def test_a_run_that_cannot_start_says_what_to_do(folder, tmp_path, change, words):
    with pytest.raises(BadInput, match=words):
        tgrl.Trainer(folder.config(out=str(tmp_path / "out"), **change))


def test_a_run_goes_on_at_another_learning_rate_but_not_backwards(folder, tmp_path):
    options = dict(out=str(tmp_path), steps=2, save_every=2, lr=1e-3)
    tgrl.Trainer(folder.config(**options)).fit()
    trainer = tgrl.Trainer(folder.config(**options | dict(lr=1e-5, resume=True)))
    assert trainer.load_checkpoint() == 2 and {g["lr"] for g in trainer.optimizer.param_groups} == {1e-5}
    trainer.begin_records(2)
    header, *steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert header["config"]["lr"] == 1e-5 and [record["step"] for record in steps] == [0, 1]
    with pytest.raises(BadInput, match="at step 2 already, and this run has 1"):
        tgrl.Trainer(folder.config(**options | dict(steps=1, resume=True))).fit()


def test_an_earlier_run_is_not_overwritten(folder, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(BadInput, match="holds an earlier run"):
        tgrl.Trainer(folder.config(out=str(tmp_path)))


def test_eval_escapes_what_models_write(tmp_path):
    nasty = "<script>alert(1)</script>\n</think>"
    tokens = dict(tokens=[nasty, "é"], logp=[-1.0, -2.0], behavior_logp=[-0.5, -1.0], weight=[0.2, 0.9], coefficient=[0.1, 0.3])
    answers = [dict(text=nasty, reward=0.0, advantage=-1.0, source=source, finished=True, **tokens) for source in ("policy", nasty)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [{"method": nasty, "config": dataclasses.asdict(Config())}, {"step": 0, "reward": 0.5}])) + "\n")
    story = dict(steps=[nasty, nasty], erosion=[0.1, 3.0], cut=1, rounds=1, tail=nasty)
    group = dict(step=0, question=nasty, answer=nasty, images=["https://example.org/x.png"], answers=answers, rectification=story)
    (tmp_path / "groups.jsonl").write_text(json.dumps(group) + "\n")
    show([tmp_path])
    page = (tmp_path / "groups.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "example.org" not in page


# ===== eval.py: rules, benchmarks, statistics ==========================================================================
# Checked by hand, one by one, against the official scripts where those are mechanical. Lines: said | answer.

OPTIONS = {
    "": ["45°", "35", "2 cm", "2 m", r"\frac{1}{2}"],  # A to E
    "letters": ["A", "C", "B", "a line", "b and c"],
    "times": ["p.m.", "a.m.", "2 a.m.", "2 a.m."],
}
RIGHT = {
    "choice": r"""
        B|B  (B)|B  b|B  B.|B  (b).|B  B:|B  B)|B  \text{B}|B  $B$|B  **B**|B  (B) 35|B  B. 35|B  B: 35|B  B 35|B  option B|B  Choice (B)|B  B\ 35|B  B, 35|B
        B (35)|B  B = 35|B  answer: B|B  [B]|B  \(B\)|B  35|B  35.0|B  70/2|B  45°|A  45^\circ|A  2 cm|C  2 \, \text{cm}|C  2 CM.|C  2 m|D  0.5|E  1/2|E  E. 1/2|E""",
    "choice letters": r"B|B  C|C  B. C|B  (C) B|C  a line|D  D. a line|D  b and c|E  E|E  (E) b and c|E",
    "choice times": r"a.m.|B  p.m.|A  B. a.m.|B  2 a.m.|C  2 a.m.|D",
    "yes_or_no": r"""
        yes|yes  no|no  Yes|yes  NO|no  Yes.|yes  \text{yes}|yes  \text{No}|no  $\text{No}$|no  **yes**|yes  yes, it is|yes  No, it is not|no
        \mathrm{Yes}|yes  the answer is no|no  "yes"|yes  Yes!|yes  no.|no""",
    "rounded 0": r"""
        12|12  12.0|12  12.7|12  -3|-3  - 3|-3  $12$|12  \$12|12  1,200|1200  1{,}200|1200  1\,200|1200  12\%|12  12%|12  12 cm|12  12 \text{ cm}|12  12 \, \text{cm}^2|12
        12\ \text{cm}|12  x = 12|12  about 12|12  \approx 12|12  12 people|12  24/2|12  \frac{24}{2}|12  \frac{24}2|12  0|0  1e3|1000  10^3|1000  007|7  −4|-4  12 cm^2|12  12.|12""",
    "rounded 1": r"""
        1.2|1.2  1.20|1.2  1.24|1.2  1.16|1.2  $1.2$|1.2  \$1.2|1.2  1.2 m|1.2  1.2 \text{ m}|1.2  1.2 \, \text{m}|1.2  x = 1.2|1.2  6/5|1.2  \frac{6}{5}|1.2  1\frac{1}{2}|1.5
        -0.5|-0.5  −0.5|-0.5  0.50|0.5  .5|0.5  3|3.0  1,200.5|1200.5  1.5 \times 10^3|1500.0  12\%|12.0  about 1.2|1.2  1.2 m^2|1.2  1.2 kg.|1.2  5\degree|5.0""",
    "numbers": r"""
        [0, 8]|[0, 8]  0, 8|[0, 8]  (0, 8)|[0, 8]  [0,8]|[0, 8]  [0.0, 8.0]|[0, 8]  0 and 8|[0, 8]  [-1, 2]|[-1, 2]  −1, 2|[-1, 2]  [5]|[5]  5|[5]  [1, 2, 3]|[1, 2, 3]
        $[0, 8]$|[0, 8]  \{0, 8\}|[0, 8]  [0; 8]|[0, 8]""",
    "rounded 2": r"""
        4\pi|$4 \pi$  12.57|$4 \pi$  12.566|$4 \pi$  1.41|\sqrt{2}  \sqrt2|\sqrt{2}  0.33|\frac{1}{3}  1/3|\frac{1}{3}  0.333|1/3  5|5  5.0|5  \boxed{5}|5  5|\boxed{5}
        36/13|\frac{36}{13}  2.77|\frac{36}{13}  1,000|1000  60^\circ|60  60°|60  C|C  (C)|C  3.142|3.14  -1.5|-\frac{3}{2}  7 cm|7  1.73|√3  16.0|4^2""",
    "parts": r"""
        B|B  (B)|B  (B)|(B)  B|(B)  B. 35|B  35|B  F|F  False|False  false|False  C, D|C@D  D, C|C@D  C and D|C@D  C & D|C@D  CD|C@D  9\pi cm^2|Area $=9 \pi \mathrm{cm}^{2}$
        9\pi|Area $=9 \pi \mathrm{cm}^{2}$  3, 4|3@4  3@4|3@4  x=3, y=4|3@4  3 \text{ and } 4|3@4  (1,2), (3,4)|(1,2)@(3,4)  1,200 and 4|1200@4  10|10  10.0|10  y = 2x+1|y=2x+1
        \frac{1}{2}|0.5  5\sqrt{2}|5 \sqrt{2}  118°|118°""",
    "any_of": r"""
        5|5  5.0|5  5.004|5  1,000|1000  $5|5  mitosis|mitosis  Mitosis|mitosis  It is mitosis.|mitosis  \text{mitosis}|mitosis  0.33|0.333  -2|-2  25%|25  5 V|5
        12 \text{ N}|12  12 \, \text{N}|12  1/2|0.5  \frac{1}{2}|0.5  the left ventricle|left ventricle  Left Ventricle|left ventricle  1\frac{1}{2}|1.5  5 Ω|5""",
}  # fmt: skip
WRONG = {
    "choice": r"""
        A|B  (C)|B  C. 35|B  A, B|B  A and B|B  B, C|B  A. B|B  (A)(B)|B  (B) or (C)|B  (B) and (C)|B  B) and C)|B  (B)(C)|B  B. and C.|B  B: 35, C: 45|B  B. 35 or C. 45|B
        2|C  2|D  45|B  53|B  none|B  K|B  b 45°|B  2 m|C  |B""",
    "choice letters": r"A. C|B  a line|A  b and c|B  C|B  B|C",
    "choice times": r"a.m.|A  p.m.|B  2 a.m.|A",
    "yes_or_no": r"yes|no  no|yes  yes or no|yes  yes or no|no  maybe|yes  nothing|no  yesterday|yes  I do not know|no  1|yes  true|yes  |no",
    "rounded 0": r"""
        12|13  11.99|12  twelve|12  12 or 13|12  |12  -3|3  1/0|1  12:30|12  3x|30  3x|3  5x^2|5  1/n|1  n-1|-1  1,20|120  inf|1  12 13|12  x|0  1\frac{1}{2}|5  10^3|10  5^2|5  9^x|9  √2|2  5\pi|5  5½|5
        10⁶|10  5!|5  \$2 million|2  not 5|5  5^{2}|5""",
    "rounded 1": r"1.3|1.2  1.26|1.2  1.1|1.2  12|1.2  one|1.2  1.2 or 1.3|1.2  |1.2  -1.2|1.2  1.2.3|1.2  0|1.2  1/0|1.2  1\frac{1}{2}|5.5  1.2 \times 10|1.2",
    "numbers": r"[8, 0]|[0, 8]  0|[0, 8]  [0, 8, 9]|[0, 8]  [0, 80]|[0, 8]  |[0, 8]  none|[0, 8]  [1, 2]|[-1, 2]  [0 8 8]|[0, 8]  08|[0, 8]  0/8|[0, 8]  0:8|[0, 8]  2-3|[2, -3]  []|[0]",
    "rounded 2": r"12.5|$4 \pi$  12.58|$4 \pi$  4|$4 \pi$  4.0|4^2  5.5|1\frac{1}{2}  3.0|√3  1.4|\sqrt{2}  0.3|\frac{1}{3}  D|C  6|5  |5  5.01|5  2.8|\frac{36}{13}",
    "parts": r"A|B  C|C@D  C, D, E|C@D  E, D|C@D  all of C, D|C@D  3|3@4  4, 3|3@4  (1,2)|(1,2)@(3,4)  True|False  11|10  |10  9\pi + 1|Area $=9 \pi \mathrm{cm}^{2}$  C|(B)  A. B|B  B|B@35  B, 99|B@35",
    "any_of": r"6|5  5.01|5  meiosis|mitosis  amitosis|mitosis  |5  55|5  left|left ventricle  -5|5  0.34|0.333  five|5  10^2|10  not 5|5",
}  # fmt: skip


def rule_pairs():
    for table, right in ((RIGHT, True), (WRONG, False)):
        for rule, text in table.items():
            for pair in re.split(r"\s{2,}", text.strip()):
                yield rule, *pair.split("|"), right


@pytest.mark.parametrize("rule,said,answer,right", list(rule_pairs()))
def test_rules(rule, said, answer, right):
    if rule == "numbers":  # as MathVista's adapter says it
        rule, answer = "parts", "@".join(map(str, ast.literal_eval(answer)))
    if rule == "parts" and (label := re.fullmatch(r"\(?([A-J])\)?", answer)):
        rule, answer = "choice", label[1]
    rule, _, more = rule.partition(" ")
    choices = OPTIONS[more] if rule == "choice" else []
    item = {"answer": answer.replace("@", "\n"), "choices": choices, "precision": int(more) if more.isdigit() else 0, "rule": rule}
    assert evaluation.judge([rf"So it is \boxed{{{said.replace('@', chr(10))}}}"], item)["correct"] == [right]


def test_each_rule_has_enough_pairs():
    assert min(collections.Counter(rule.split()[0] for rule, *_ in rule_pairs()).values()) >= 25


def test_a_hostile_number_is_read_at_once():
    start = time.perf_counter()
    for hostile in ("5" + "^2}" * 31 + "=1", "5^{2}" + "^{2}" * 30 + "=1", "a" * 99 + "!", "1," * 49, " ." * 49, "5" + " a" * 48 + "!"):
        evaluation.number(hostile)
    assert time.perf_counter() - start < 0.5


def test_what_is_found_in_an_answer():
    for text, found in {
        r"so \boxed{3} and \boxed{4}": "4", "The answer is 5.": "5.", "**Answer:** B. 35": "B. 35", "Answer: (B)\nIt was easy": "(B)", "Final answer : 7": "7",
        "the answer is: yes": "yes", "no answer": None, "The answer isn't clear": None, "": None, "35": None, "answer is 3. The answer is 4": "4",
        r"The answer is 5, so \boxed{6}": "6", "<think>The answer is 5? Let me": None, "<think>The answer is 5?</think> Answer: 6": "6", "I cannot answer: 3 cats": None,
        r"The answer is B. (in \boxed{ })": "B. (in \\boxed{ })", r"The answer is \(B\).": r"\(B\).", "### Answer: B": "B",
    }.items():  # fmt: skip
        assert evaluation.find_answer(text) == found, text
    assert evaluation.judge(["The answer is 5."], {"rule": "equivalent", "answer": "5"})["correct"] == [False]  # training wants a box
    assert evaluation.judge(["The answer is 5."], {"rule": "rounded", "answer": "5", "precision": 0})["correct"] == [True]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(alphabet="0123456789.,-/^{}\\\\$%()[] abBcCyesno∠°\n=e:*", max_size=60), st.sampled_from(sorted(evaluation.RULES)))
def test_no_answer_breaks_a_rule(said, rule):
    item = {"answer": {"parts": "0\n8", "any_of": ["5", "mitosis"], "choice": "B"}.get(rule, "12"), "choices": OPTIONS[""], "precision": 2, "rule": rule}
    for text in (rf"\boxed{{{said}}}", f"The answer is {said}", said * 200):
        assert evaluation.judge([text], item)["correct"][0] in (True, False)


def benchmark_rows():
    """Rows with the columns of the published data, by benchmark, and for each a boxed text that is right and one that is wrong."""
    rng = random.Random(0)
    image = lambda: picture(rng, rng.choice([56, 84]), 56)  # noqa: E731
    vista = lambda **row: {  # noqa: E731
        "pid": "1", "question": "How many?", "image": "images/1.jpg", "decoded_image": image(), "choices": [], "unit": "", "precision": 0.0, "answer": "3",
        "question_type": "free_form", "answer_type": "integer", "query": "Hint: ...\nQuestion: How many?",
        "metadata": {"category": "math", "context": "plot", "grade": "high", "img_height": 56, "img_width": 56, "language": "english", "skills": ["arithmetic"],
                     "source": "PlotQA", "split": "testmini", "task": "figure question answering"}} | row  # fmt: skip
    multi = {"question_type": "multi_choice", "answer_type": "text"}
    math = lambda option, answer: {  # noqa: E731
        "ID": "1", "split": "testmini", "knowledge concept": "Angles", "question": "Which?", "option": option, "answer": answer, "image_path": image(),
        "key": "2steps_1", "question number": 1, "knowledge concept description": "..."}  # fmt: skip
    vision = lambda **row: {  # noqa: E731
        "id": "1", "question": "What is it? <image1>", "options": [], "image": "images/1.jpg", "decoded_image": image(), "answer": "7", "solution": None,
        "level": 2, "subject": "algebra"} | row  # fmt: skip
    verse = lambda answer, kind, question="Find x.", version="Text Lite": {  # noqa: E731
        "sample_index": "1", "problem_index": "1", "problem_version": version, "question": "" if version == "Vision Only" else question, "image": image(),
        "answer": answer, "question_type": kind, "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"},
        "query_wo": question, "query_cot": "Reason first.\n" + question, "question_for_eval": question}  # fmt: skip
    hallusion = lambda category, figure, question, truth: {  # noqa: E731
        "category": category, "subcategory": "map", "visual_input": "1", "set_id": "0", "figure_id": figure, "sample_note": "x", "question_id": question,
        "question": "Is it larger?", "gt_answer_details": "...", "gt_answer": truth, "filename": "x.png", "image": image()}  # fmt: skip
    mmmu = lambda **row: {  # noqa: E731
        "id": "validation_Art_Theory_1", "question": "Which of <image 1>?", "options": "['red', 'blue']", "explanation": "", "image_1": image(),
        **{f"image_{i}": None for i in range(2, 8)}, "img_type": "['Photos']", "answer": "B", "topic_difficulty": "Easy", "question_type": "multiple-choice",
        "subfield": "Art"} | row  # fmt: skip
    pro = {key: value for key, value in mmmu().items() if key not in ("question_type", "subfield")} | {"id": "test_Art_1", "subject": "Art"}
    ten = str([f"{i} V" for i in range(10)])
    star = {"index": 0, "question": "What colour?\nOptions: A: red, B: light blue, C: green, D: no colour", "image": image(), "answer": "B",
            "category": "coarse perception", "l2_category": "scene", "meta_info": {"source": "MMBench", "split": "val", "image_path": "images/0.jpg"}}  # fmt: skip
    virl = {"qid": "a", "question": "<image>Find x.", "answer": r"\boxed{12}", "category": "Geometry", "source": "x", "PassRate_32BTrained": 0.5, "PassRate_7BBase": 0.1}
    return {
        "mathvista": [
            (vista(choices=["3", "5", "7"], answer="5", **multi), "B", "A"),
            (vista(choices=["3", "5", "7"], answer="5", **multi), "5", "7"),
            (vista(choices=["A", "C", "B"], answer="B", **multi), "C", "B"),  # the options are letters: a lone letter is a label
            (vista(choices=["yes", "no", "yes"], answer="yes", **multi), "yes", "C"),  # of options that are there twice, the first is the label
            (vista(), "3.0", "4"),
            (vista(answer_type="float", precision=2.0, answer="0.33"), "0.333", "0.3"),
            (vista(answer="12"), r"12 \, \text{cm}", "13"),
            (vista(answer_type="list", precision=None, answer="[0, 8]", unit=None), "[0,8]", "[8, 0]"),
            (vista(answer_type="text", answer="yes"), "Yes", "no"),
        ],
        "wemath": [(math("A. 45°;B. 60°; C. 75°;D. 90°", "B"), "60°", "45°"), (math("A. 1 cm, B. 2 cm, C. 3 cm; E. No correct answer", "E"), "E", "A")],
        "mathvision": [
            (vision(), "7.0", "8"),
            (vision(answer=r"$4 \pi$"), "12.57", "12.5"),
            (vision(answer="\frac{36}{13}"), r"\frac{36}{13}", "3"),
            (vision(options=["1", "2", "3", "4", "5"], answer="B"), "2", "3"),
            (vision(options=list("ABCDE"), answer="D", question="Which? <image1> <image2>"), "D", "E"),
        ],
        "mathverse": [
            (verse("B", "multi-choice", "Find x.\nChoices:\nA:35°\nB:45°"), "45°", "35°"),
            (verse("C\nD", "multi-choice", "Which two?\nChoices:\nA:1\nB:2\nC:3\nD:4"), "C, D", "C"),
            (verse(r"Area $=9 \pi \mathrm{cm}^{2}$", "free-form", version="Vision Only"), r"9\pi", "9"),
        ],
        "hallusionbench": [
            (hallusion("VD", "0", "0", "1"), "yes", "no"),
            (hallusion("VD", "0", "1", "0"), "No", "yes"),
            (hallusion("VS", "0", "0", "0"), r"\text{no}", "yes or no"),  # the ids are not unique without the category
            (hallusion("VD", "1", "0", "1"), "Yes.", "maybe"),
        ],
        "geo3k": [(geo3k_rows(1)[0], "0", "1"), (geo3k_rows(3)[2], "2.0", "3")],
        "mmmu": [
            (mmmu(), "blue", "red"),
            (mmmu(options="['<image 2>', '<image 1>']", image_2=image(), answer="A", id="validation_Math_7"), "A", "B"),
            (mmmu(options="[]", answer="5", question_type="open"), "5 V", "6"),
            (mmmu(options="[]", answer="['mitosis', 'meiosis']", question_type="open"), "It is meiosis", "sleep"),
            (mmmu(options="[]", answer="[3, 4]", question_type="open"), "4", "5"),
        ],
        "mmmu-pro": [(pro | {"options": ten, "answer": "J"}, "J", "9"), (pro | {"options": ten, "answer": "D"}, "3 V", "J")],
        "mmmu-pro-vision": [({"id": "test_Art_1", "image": image(), "options": ten, "answer": "C", "subject": "Art"}, "C", "D")],
        "mmstar": [(star, "light blue", "green"), (star | {"index": 1, "answer": "D"}, "D. no colour", "A")],
        "ai2d": [({"question": "What eats it?", "options": ["fox", "owl", "hare", "bee"], "answer": "1", "image": image()}, "owl", "fox")],
        "problems": [(virl | {"image": [image()]}, "12", "13"), (virl | {"image": [], "question": "No picture.", "qid": "b"}, "12.0", "x")],
    }  # fmt: skip


def write_benchmark(rows, path):
    """As the hub has them: pictures are struct<bytes, path>."""
    pixels = lambda x: {"bytes": encoded(x), "path": None} if isinstance(x, Image.Image) else x  # noqa: E731
    rows = [{key: [pixels(x) for x in value] if isinstance(value, list) else pixels(value) for key, value in row.items()} for row in rows]
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:  # with paths
        for i, row in enumerate(rows):
            for key, value in row.items():
                if isinstance(value, dict) and "bytes" in value:
                    (path.parent / f"{i}.{key}.png").write_bytes(value["bytes"])
                    row[key] = f"{i}.{key}.png"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


EVAL = ["--min_pixels", "784", "--max_pixels", "12544", "--max_answer", "6", "--instruction", "Think first.", "--generate_batch", "4"]


def run_eval(*words, processes=1, fails=False):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch, evaluation.__file__, *map(str, words)], env=env, capture_output=True, text=True, timeout=240)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def same_records(path, but=("seconds",)):
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return sorted(({key: value for key, value in record.items() if key not in but} for record in lines[1:]), key=lambda r: r["row"])


@pytest.fixture(scope="module")
def benchmarks(folder, tmp_path_factory):
    """Every benchmark as a small local file with the published columns, answered by the tiny model."""
    place, names = tmp_path_factory.mktemp("benchmarks"), []
    for name, some in benchmark_rows().items():
        path = place / f"{name}.{'jsonl' if name in ('mathverse', 'mmstar', 'ai2d') else 'parquet'}"
        write_benchmark([row for row, _, _ in some], path)
        names.append(f"{name}={path}")
    said = run_eval("run", folder.path / "model", *names, "--out", place / "out", *EVAL)
    return SimpleNamespace(names=names, out=place / "out", said=said)


@pytest.mark.parametrize("name", list(benchmark_rows()))
def test_every_benchmark_from_file_to_verdict(benchmarks, name):
    """All rows are answered by the tiny model and recorded; the right text would have been right, and the wrong one wrong."""
    records, rows = same_records(benchmarks.out / f"{name}.jsonl"), benchmark_rows()[name]
    assert [r["row"] for r in records] == list(range(len(rows))) and not any("error" in r for r in records)
    for record, (_, right, wrong) in zip(records, rows):
        assert len(record["texts"]) == 1 and len(record["prompt"]) == 16 and record["id"]
        verdicts = evaluation.judge([rf"\boxed{{{right}}}", rf"\boxed{{{wrong}}}", "I do not know"], record)["correct"]
        assert verdicts == [True, False, False], (right, wrong, record["rule"])


def test_questions_are_put_as_the_benchmark_means_them():
    read = {name: [evaluation.BENCHMARKS[name].read(row) for row, _, _ in rows] for name, rows in benchmark_rows().items()}
    assert read["mmmu"][1]["problem"].count("<image>") == len(read["mmmu"][1]["images"]) == 3  # 1 in the question, 2 and 1 in the options
    assert read["wemath"][0]["problem"].endswith("Options: A. 45°;B. 60°; C. 75°;D. 90°") and read["wemath"][1]["choices"] == []
    assert read["mathvision"][3]["problem"] == "What is it? \nOptions:\nA. 1\nB. 2\nC. 3\nD. 4\nE. 5" and read["mathvision"][4]["choices"] == list("ABCDE")
    assert read["mmmu-pro-vision"][0]["problem"].startswith("Answer the question in the picture") and "V" not in read["mmmu-pro-vision"][0]["problem"]
    assert [item["by"]["version"] for item in read["mathverse"]] == ["Text Lite", "Text Lite", "Vision Only"]
    assert read["mmmu-pro"][0]["problem"].endswith("J. 9 V") and read["mmstar"][0]["choices"] == ["red", "light blue", "green", "no colour"]
    assert [item["answer"] for item in read["hallusionbench"]] == ["yes", "no", "no", "yes"]
    assert evaluation.judge(["The answer is yes."], read["mathvista"][-1])["correct"] == [True]  # a box is for the training's own reward


def test_the_report_counts_everything(benchmarks):
    summary = json.loads((benchmarks.out / "summary.json").read_text())
    hallusion = summary["benchmarks"]["hallusionbench"]
    assert hallusion["rows"] == 4 and hallusion["by"]["fAcc"]["rows"] == 3 and hallusion["by"]["qAcc"]["rows"] == 3
    assert set(summary["benchmarks"]["mathverse"]["by"]) >= {"type: multi-choice", "type: free-form", "version: Vision Only"}
    assert summary["average of the five"] == pytest.approx(sum(summary["benchmarks"][name]["accuracy"] for name in evaluation.FIVE) / 5)
    assert "58.46" in benchmarks.said and "59.51" in benchmarks.said and (benchmarks.out / "bars.png").stat().st_size > 5000


def test_rows_that_cannot_be_read_count_as_wrong(folder, tmp_path):
    rows = [row for row, _, _ in benchmark_rows()["wemath"]] * 2
    rows[0] = rows[0] | {"question": "two <image> <image>"}
    rows[2] = rows[2] | {"image_path": Image.new("RGB", (3, 3))}
    write_benchmark(rows, tmp_path / "w.parquet")
    said = run_eval("run", folder.path / "model", f"wemath={tmp_path}/w.parquet", "--out", tmp_path, *EVAL)
    assert "2 of 4 rows unreadable, counted as wrong\n  2 times <image> for 1 pictures: row 0\n  picture of 3 x 3 pixels: row 2" in said
    assert json.loads((tmp_path / "summary.json").read_text())["benchmarks"]["wemath"]["rows"] == 4


def test_an_evaluation_continues_after_a_kill_and_on_two_processes(benchmarks, folder, tmp_path, capsys):
    """The same records, whoever answers and however often it was interrupted; and --rescore needs no model."""
    asked = dict(min_pixels=784, max_pixels=12544, max_answer=6, instruction="Think first.", generate_batch=4, samples=2, temperature=0.7)
    start = lambda: evaluation.run(f"{folder.path}/model", benchmarks.names[:4], tmp_path / "a", **asked)  # noqa: E731
    start()
    run_eval("run", folder.path / "model", *benchmarks.names[:4], "--out", tmp_path / "b", *command_line(asked), processes=2)
    name = benchmarks.names[0].partition("=")[0]
    want = {path.name: same_records(path) for path in (tmp_path / "a").glob("*.jsonl")}
    for path in (tmp_path / "a").glob("*.jsonl"):
        assert same_records(tmp_path / "b" / path.name) == want[path.name]
    whole = (tmp_path / "a" / f"{name}.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a" / f"{name}.jsonl").write_text("".join(whole[:4]) + whole[4][:20])  # header, 3 records of a batch of 4, and a torn one
    start()
    assert same_records(tmp_path / "a" / f"{name}.jsonl") == want[f"{name}.jsonl"]
    records = [json.loads(line) for line in (tmp_path / "a" / f"{name}.jsonl").read_text().splitlines()]
    right = next(r for r in records[1:] if r["rule"] == "rounded")
    right["texts"] = [r"\boxed{3}", "3"]
    (tmp_path / "a" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert f"1 of {len(records) - 1} verdicts changed: rows [{right['row']}]" in run_eval("run", "--out", tmp_path / "a", "--rescore")
    capsys.readouterr()
    score = json.loads((tmp_path / "a" / "summary.json").read_text())["benchmarks"][name]
    assert score["accuracy"] == pytest.approx(0.5 / (len(records) - 1)) and score["pass@2"] == pytest.approx(1 / (len(records) - 1))
    evaluation.compare(tmp_path / "b", tmp_path / "a", flips=3)
    assert f"right only in B: rows {right['row']}" in capsys.readouterr().out and (tmp_path / "a" / "compare.png").exists()


def test_evaluation_says_what_is_wrong(benchmarks, folder, tmp_path):
    model, name = str(folder.path / "model"), benchmarks.names[0]
    asked = dict(min_pixels=784, max_pixels=12544, max_answer=6, instruction="Think first.")
    for who, names, options, message in (
        (model, ["mathsvista"], {}, "no benchmark 'mathsvista'; known are wemath, mathvista"),
        (model, ["problems"], {}, "problems needs a file: problems=questions.jsonl"),
        (model, [f"wemath={folder.path}/train.parquet"], {}, "because it has no column 'question'"),
        (model, [f"wemath={tmp_path}/nowhere.parquet"], {}, "does not exist"),
        (model, [name], {"samples": 3}, "above 0 with --samples above 1"),
        (model, [name], {"out": benchmarks.out, **asked, "seed": 9}, "is of another evaluation: seed is 1 there and 9 here"),
        (f"{tmp_path}/none", [name], {}, "cannot load --model"),
        (model, [name], {"out": benchmarks.out, **asked, "limit": 1}, "rows is 9 there and 1 here"),
        (model, [name], {"limit": -1}, "--limit is -1; it must be at least 0"),
        (model, [name, name], {}, "is there twice"),
        ("", [], {}, "give a model and benchmarks"),
    ):
        with pytest.raises(BadInput, match=re.escape(message)):
            evaluation.run(who, names, **dict(out=tmp_path) | options)
    with pytest.raises(BadInput, match="holds no evaluation"):
        evaluation.regrade(tmp_path)
    with pytest.raises(BadInput, match="give it that, and no model"):
        evaluation.run(model, [name], tmp_path, rescore=True)
    (tmp_path / "problems.jsonl").write_text(questions := '{"problem": "Why?", "answer": "1"}\n')
    with pytest.raises(BadInput, match="problems.jsonl is of another evaluation"):  # data in the --out folder
        evaluation.run(model, [f"problems={tmp_path}/problems.jsonl"], tmp_path)
    assert (tmp_path / "problems.jsonl").read_text() == questions
    error = run_eval("run", model, "mathsvista", fails=True)
    assert error.startswith("eval.py: there is no benchmark") and "Traceback" not in error


def hallusion_rows(tmp_path, names):
    """Questions with pictures by path, so that a picture may be missing at first."""
    rows = [row for row, _, _ in benchmark_rows()["hallusionbench"]]
    for i, row in enumerate(rows):
        if names[i]:
            row["image"].save(tmp_path / names[i])
        row["image"] = names[i] or "missing.png"
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_changes_between_two_starts(folder, tmp_path):
    """A picture that was missing is read at last, and its row answered; until then it counts as wrong everywhere. Another question is refused."""
    hallusion_rows(tmp_path, ["0.png", "1.png", None, "3.png"])
    start = lambda: evaluation.run(f"{folder.path}/model", [f"hallusionbench={tmp_path}/h.jsonl"], tmp_path / "out", min_pixels=784, max_pixels=12544, max_answer=4)  # noqa: E731
    start()
    score = lambda: json.loads((tmp_path / "out" / "summary.json").read_text())["benchmarks"]["hallusionbench"]  # noqa: E731
    assert score()["rows"] == 4 and score()["unreadable"] == 1 and score()["by"]["category: VS"]["rows"] == 1 and score()["by"]["fAcc"]["rows"] == 3
    Image.open(io.BytesIO(make_problem(7).images[0])).save(tmp_path / "missing.png")
    start()
    assert score()["rows"] == 4 and score()["unreadable"] == 0 and score()["by"]["fAcc"]["rows"] == 3
    said = run_eval("run", folder.path / "model", f"hallusionbench={tmp_path}/h.jsonl", "--out", tmp_path / "two", "--limit", 2, *EVAL)
    assert re.search(r"hallusionbench +2 .*ONLY THE FIRST ROWS", said)
    Image.open(io.BytesIO(make_problem(8).images[0])).save(tmp_path / "1.png")
    with pytest.raises(BadInput, match="row 1 of .* was another question"):
        start()
    model = shutil.copytree(folder.path / "model", tmp_path / "model")
    start = lambda: evaluation.run(str(model), [f"hallusionbench={tmp_path}/h.jsonl"], tmp_path / "trained", min_pixels=784, max_pixels=12544, max_answer=4)  # noqa: E731
    start()
    state = load_file(model / "model.safetensors")
    save_file({key: value + 1e-3 for key, value in state.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="another evaluation: weights is"):  # of a training that went on
        start()
    path = tmp_path / "trained" / "hallusionbench.jsonl"
    path.write_text(path.read_text().split("\n")[0][:100])  # killed while it wrote its first line
    start()
    path.write_text(path.read_text().split("\n")[0] + "\n")
    with pytest.raises(BadInput, match="holds no evaluation"):  # a header alone, as a crash in the first batch leaves it
        evaluation.report(tmp_path / "trained")


def test_bench_tells_what_a_step_costs():
    shape = dict(model="toy", questions=1, answers=2, tokens=4, pixels=56, repeats=1)
    said = run_eval("bench", *command_line(shape))
    assert "2 answers of 4 to each" in said and "in one row takes" in said
    for name in ("rollout", "scoring", "update", "separate rows"):
        assert re.search(rf"^{name} +[\d.]+ +\d+ +[\d.e-]+ +– +–$", said, re.MULTILINE), said
    assert "--repeats must be at least 1" in run_eval("bench", "--repeats", 0, fails=True)


def test_all_samples_of_a_figure_are_averaged():
    rows = [{"row": i, "by": {}, "together": {"fAcc": "x"}, "extracted": ["yes"] * 4, "correct": [True, True, True, i == 0]} for i in range(2)]
    summary = evaluation.summarize({"rows": 2, "model": "m", "samples": 4}, dict(enumerate(rows)))
    assert summary["accuracy"] == 0.875 and summary["by"]["fAcc"]["accuracy"] == 0.75 and summary["pass@4"] == 1


def test_a_downloaded_folder_with_configurations(folder, tmp_path):
    """As the hub's repository of MathVerse or MMMU-Pro: its README names the files of each configuration."""
    for config, answer in (("testmini", "B"), ("testmini_text_only", "A")):
        write_benchmark([benchmark_rows()["mathverse"][0][0] | {"answer": answer}], tmp_path / f"{config}.parquet")
    yaml = "".join(f"- config_name: {c}\n  data_files:\n  - split: {c}\n    path: {c}.parquet\n" for c in ("testmini", "testmini_text_only"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{yaml}---\n")
    assert [row["answer"] for row in evaluation.read_benchmark("mathverse", str(tmp_path), 0)] == ["B"]


def test_a_trained_model_is_asked_as_it_was_trained(folder, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"config": dataclasses.asdict(folder.config(instruction="Be quick.", max_answer=3))}) + "\n")
    assert evaluation.as_trained(f"{tmp_path}/checkpoints/step-5/model")["instruction"] == "Be quick."
    assert evaluation.as_trained(f"{tmp_path}/model")["max_answer"] == 3
    assert evaluation.as_trained("Qwen/Qwen2.5-VL-3B-Instruct") == {}


def test_the_instruction_may_stand_in_the_system_turn(world):
    encoder = tgrl.Encoder(world.processor, world.model, dataclasses.replace(world.cfg, system_prompt=True))
    assert encoder.text(make_problem()).startswith("<|im_start|>system\nThink first.<|im_end|>\n<|im_start|>user\n")
    assert encoder.text(make_problem()).count("Think first.") == 1
    assert encoder.fingerprints()["prompt"] != world.encoder.fingerprints()["prompt"]


def test_the_wilson_interval_solves_its_equation():
    """Its ends are the shares that lie 1.96 of their own standard deviations from what was seen; found by bisection."""
    for right, n in ((0, 10), (8, 10), (10, 10), (133, 192), (1, 1000)):
        for end, (far, near) in zip(evaluation.wilson(right, n), ((0.0, right / n), (1.0, right / n))):
            for _ in range(100):
                middle = (far + near) / 2
                outside = abs(right / n - middle) > 1.959964 * math.sqrt(middle * (1 - middle) / n)
                far, near = (middle, near) if outside else (far, middle)
            assert end == pytest.approx(near, abs=1e-6)
    assert evaluation.wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # as published for 8 of 10


def test_mcnemar_is_a_fair_coin():
    for only_a, only_b in ((0, 5), (2, 7), (3, 3), (1, 0), (0, 0)):
        n = only_a + only_b
        extreme = sum(abs(2 * sum(toss) - n) >= abs(only_a - only_b) for toss in itertools.product([0, 1], repeat=n))
        assert evaluation.mcnemar(only_a, only_b) == pytest.approx(extreme / 2**n)


def test_the_bootstrap_of_a_mean_is_nearly_normal():
    rng = random.Random(0)
    values = [rng.random() < 0.3 for _ in range(800)]
    mean = sum(values) / 800
    half = 1.96 * math.sqrt(mean * (1 - mean) / 800)
    assert evaluation.bootstrap(values) == pytest.approx((mean - half, mean + half), abs=0.003)


def test_toy_answers_follow_the_rules():
    rng = random.Random(0)
    right = tgrl.toy_answer(rng, 3, 4, 1.0)
    assert right == "<think>width 3, height 4. area = 3*4 = 12. edge = 2*7 = 14. total = 12+14 = 26</think>\\boxed{26}"
    assert tgrl.reward(right, tgrl.toy_row(rng, 3, 4)["answer"]) == 1.0
    wrong = tgrl.toy_answer(rng, 3, 4, 0.0)
    assert "3+4 = 7" in wrong and "1*7 = 7" in wrong and "7-7 = 0" in wrong and tgrl.reward(wrong, "26") == 0.0


def test_nothing_uses_what_is_defined_below_it():
    """tgrl.py reads from top to bottom: inside a function, no module-level name of a later line (main excepted)."""
    tree = ast.parse(Path(tgrl.__file__).read_text())
    where = {node.name: node.lineno for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    where |= {t.id: node.lineno for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "main":
            names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            own = {n.id for n in names if isinstance(n.ctx, ast.Store)} | {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
            late = {n.id for n in names if n.id not in own and where.get(n.id, 0) > node.end_lineno}
            assert not late, f"{node.name} uses {late}"


def test_every_equation_is_on_its_line_and_in_the_readme():
    source = Path(tgrl.__file__).read_text()
    code = [line for line in source.splitlines() if "# " in line and line.split("#")[0].strip()]
    tagged = set()
    for line in code:
        for numbers in re.findall(r"Eq\. ([\d, -]+)", line.split("#", 1)[1]):
            for part in re.findall(r"\d+(?:-\d+)?", numbers):
                low, _, high = part.partition("-")
                tagged |= set(range(int(low), int(high or low) + 1))
    assert tagged >= {2, 3, 4, *range(13, 26)}
    readme = (Path(tgrl.__file__).parent / "README.md").read_text()
    rows = re.findall(r"^\| *(\d+(?:[-–, ]+\d+)*) *\|.*?\| *`(\w+(?:\.\w+)?)`", readme, re.MULTILINE)
    assert rows, "the README has lost its table of equations"
    for numbers, name in rows:
        owner, _, method = name.partition(".")
        thing = getattr(getattr(tgrl, owner), method) if method else getattr(tgrl, owner)
        body = inspect.getsource(thing)
        for number in re.findall(r"\d+", numbers):
            ranges = [range(int(a), int(b or a) + 1) for part in re.findall(r"Eq\. ([\d, -]+)", body) for a, b in re.findall(r"(\d+)(?:-(\d+))?", part)]
            assert any(int(number) in r for r in ranges), f"{name} has no # Eq. {number}"
    others = {"nproc", "nnodes", "num_processes", "multi_gpu", "shutdown", "cpu", "help"} | {"questions", "pixels", "tokens", "hidden", "layers", "vision_layers"}
    for script in (Path(evaluation.__file__), *Path(tgrl.__file__).parent.glob(".compare/*.py")):
        others |= set(re.findall(r'add_argument\("--(\w+)"', script.read_text()))
    for name in re.findall(r"--(?:no-)?(\w+)", readme):
        assert name in {f.name for f in dataclasses.fields(Config)} | others, name


if __name__ == "__main__":
    worker(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])

"""TGRL: Trajectory-Guided Reinforcement Learning for multimodal RLVR (arXiv 2603.26126).

    python tgrl.py                                      the method on a toy, on a CPU, in minutes
    python tgrl.py experts --data hiyouga/geometry3k    cache an expert's answers, scored and graded
    python tgrl.py train --data hiyouga/geometry3k      train Qwen2.5-VL-3B with them
    torchrun --nproc-per-node 8 tgrl.py train ...       the same on eight GPUs

A question with a picture gets a group of answers: most are sampled from the policy, a few come from
a stronger model, the expert. The method, as the function `train` goes through it:

    give the policy's weights to the actor, which samples
    for each step:
        dynamic sampling: up to max_draws times, until enough groups are chosen:
            draw questions, and for each of them:
                G_on: sample n_on answers from the actor                           Eq. 13
                G_off: take up to n_off answers of the expert, with log pi_phi     Eq. 13
                G: both together                                                   Eq. 14
                R = 1 if the boxed answer is right, else 0                         Eq. 3
                A = (R - mean R) / std R, over the whole group                     Eq. 15, 16
                m = 1 for a right expert answer, 0 for a wrong one (the filter)    Eq. 22
                choose the group if its kept answers, all but those with m = 0, differ in R
        fill up with other groups, if too few are chosen
        compute log pi_old with the policy (for a single update: its log pi_theta, detached)
        for each update, on its part of the groups:
            compute log pi_theta of every answer token, with gradient
            ratio = pi_theta / pi_old, for the policy's own tokens                 Eq. 2, 4
            rho = pi_theta / pi_phi, for the expert's tokens                       Eq. 17
            Delta = log pi_phi - log pi_theta                                      Eq. 18
            Delta~ = (Delta - mean Delta) / std Delta, within the expert answer    Eq. 19
            w = sigmoid(beta * Delta~), without gradient                           Eq. 20
            r~ = ratio for own tokens, m * w * rho for the expert's                Eq. 21, 23
            share = 1 / (answers * tokens of the answer); in DAPO 1 / all tokens   Eq. 24, 25
            J = sum of share * min(r~ A, clip(r~) A); GRPO subtracts a KL          Eq. 24, 25
            take a step of AdamW
        give the policy's weights to the actor

So the derivative of J by a token's log pi_theta is

    token of                dJ / d log pi_theta      but 0 where
    the policy itself       share * A * ratio        PPO's clip acts
    a right expert answer   share * A * w * rho      w * rho > 1 + clip_high (as A >= 0)
    a wrong expert answer   0, as m = 0

Where the policy lags behind the expert, rho = e^-Delta is small, and w, which is at most 1, does
not make it larger. What w does is to turn down the tokens at which the policy lags less than on
average in this answer: with beta = 14, w is 0.015, 0.5, 0.985 for Delta~ of -0.3, 0, 0.3.

Shapes
    B questions         G answers to a question      N answers in all
    P prompt tokens     T answer tokens              L tokens of a row of a batch
    D hidden size       V vocabulary

Symbols of the paper, and names in this file
    log pi_theta        logp
    log pi_old          behavior_logp of the policy's own answers
    log pi_phi          behavior_logp of the expert's answers
    m                   expert_ok
    r~                  coefficient
    beta of Eq. 20      sharpness
    beta of Eq. 24      kl_coef

What the paper leaves open, and what is done here (reasons in README.md)
    gradient through w          none
    std in Eq. 15 and 19        over n - 1, plus 1e-6
    a wrong expert answer       counts in mean, std and shares; m = 0 takes its gradient away. So
                                right answers beside it have A > 0, even if all others are right
    KL                          the k3 estimator, averaged over the policy's own answers
    shares of Eq. 24, 25        of the whole update, on all processes
    clip                        0.2 in GRPO, 0.2 and 0.28 in DAPO; log ratios are cut at 20 [EasyR1]
    pi_old                      not the sampler's log-probs, which rounding makes slightly different
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import math_verify
import pebble
import torch
import torch.distributed.checkpoint as dcp
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object, send_to_device
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy
from PIL import Image
from qwen_vl_utils import fetch_image, smart_resize
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoProcessor, GenerationConfig, Qwen2_5_VLForConditionalGeneration
from transformers.cache_utils import Cache, DynamicLayer

# ===== 1. The loss: Eq. 15-25. It needs torch alone; copy the section as it is. ===================
# behavior_logp is log pi_old for the policy's own answers, and log pi_phi for the expert's. So the
# ratio of PPO and Eq. 17 are the same line. And every token has its share of the objective before
# an update is split into micro-batches, so the split changes nothing.


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """rewards [B, G] of whole groups, the experts' included (Eq. 14) -> advantages [B, G]."""
    if rewards.shape[1] < 2:
        raise ValueError(
            f"a group of {rewards.shape[1]} has nothing to compare; it needs two answers"
        )
    rewards = rewards - rewards[:, :1]  # so that equal rewards give exactly 0
    mean = rewards.mean(dim=1, keepdim=True)  # [B, 1]  Eq. 15
    std = rewards.std(dim=1, keepdim=True)  # [B, 1], over n - 1  Eq. 15
    return (rewards - mean) / (std + eps)  # Eq. 16


@torch.no_grad()
def expert_weights(
    logp: Tensor, behavior_logp: Tensor, mask: Tensor, sharpness: float, eps: float = 1e-6
) -> Tensor:
    """w [N, T], 0 to 1: how much the policy underestimates a token, within its answer."""
    # The clamp is EasyR1's; it keeps numbers finite.
    mask = mask.bool()
    delta = torch.where(mask, behavior_logp - logp, 0).clamp(-20, 20)  # [N, T]  Eq. 18

    # Standardized within each answer, over its valid tokens.
    count = mask.sum(dim=1, keepdim=True)  # [N, 1]
    mean = delta.sum(dim=1, keepdim=True) / count.clamp(min=1)
    deviation = torch.where(mask, delta - mean, 0)
    variance = deviation.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    standardized = deviation / (variance.sqrt() + eps)  # Eq. 19
    return torch.sigmoid(sharpness * standardized)  # Eq. 20


def unified_coefficient(
    logp: Tensor,
    behavior_logp: Tensor,
    mask: Tensor,
    is_expert: Tensor,
    expert_ok: Tensor,
    sharpness: float | None,
) -> Tensor:
    """r~ [N, T]: pi_theta / pi_old, or m * w * rho. For the arguments see tgrl_loss below."""
    # Padding may hold anything, so it is set to 0. The clamp is EasyR1's.
    log_ratio = torch.where(mask.bool(), logp - behavior_logp.detach(), 0).clamp(-20, 20)
    ratio = log_ratio.exp()  # [N, T]  Eq. 17, and the ratio of PPO
    if sharpness is None:
        w = 1.0  # no reweighting
    else:
        w = expert_weights(logp, behavior_logp, mask, sharpness)  # [N, T]  Eq. 18-20
    m = expert_ok[:, None].to(ratio.dtype)  # [N, 1]  Eq. 22
    f = w * ratio  # [N, T]  Eq. 21; it is used for expert tokens alone
    return torch.where(is_expert[:, None], m * f, ratio)  # Eq. 23


def token_shares(
    mask: Tensor, algorithm: str, n_trajectories: int | None = None, n_tokens: int | None = None
) -> Tensor:
    """Each token's share of the objective, [N, T], by the average that the algorithm takes.

    The totals are those of the whole update; without them, those of this batch.
    """
    mask = mask * 1.0
    if algorithm == "grpo":  # the mean over answers of their means over tokens
        n_trajectories = n_trajectories or len(mask)
        length = mask.sum(dim=1, keepdim=True).clamp(min=1)
        return mask / length / n_trajectories  # 1/|o_i| * 1/N  Eq. 24
    if algorithm == "dapo":  # the mean over tokens
        n_tokens = n_tokens or mask.sum().clamp(min=1)
        return mask / n_tokens  # 1 / sum |o_i|, over all groups  Eq. 25
    raise ValueError(f"algorithm is {algorithm!r}; it can be 'grpo' or 'dapo'")


def masked_total(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and the number of the values where the mask is True."""
    return torch.where(mask, values.detach(), 0).sum(), mask.sum()


def tgrl_loss(
    logp: Tensor,  # [N, T] log pi_theta, with gradient; float32; padding may hold anything
    behavior_logp: Tensor,  # [N, T] log pi_old, or log pi_phi of experts
    mask: Tensor,  # [N, T] True: an answer token, the end token included
    advantages: Tensor,  # [N] of each answer, by group_advantages
    is_expert: Tensor,  # [N] bool
    expert_ok: Tensor,  # [N] bool, m of Eq. 22; for own answers it is not used
    shares: Tensor,  # [N, T] by token_shares
    *,
    sharpness: float | None,  # beta of Eq. 20; None: no reweighting, w = 1
    clip_low: float,
    clip_high: float,
    kl_coef: float = 0.0,  # beta of Eq. 24
    ref_logp: Tensor | None = None,  # [N, T] log pi_ref
    kl_shares: Tensor | None = None,  # [N, T] shares of own tokens; None: of those in this batch
) -> tuple[Tensor, dict]:
    """-> (loss, metrics). Without expert answers this is GRPO (Eq. 2) or DAPO (Eq. 4) exactly.

    A metric is a pair (sum, count); pairs add up over micro-batches and processes. The loss has a
    constant, without gradient, for filtered expert answers: they have r~ = 0 and, as the lowest
    reward of their group, A <= 0, so min(r~ A, clip(r~) A) is (1 - clip_low) A.
    """
    assert mask.shape == logp.shape == behavior_logp.shape == shares.shape, "each of them is [N, T]"
    mask = mask.bool()

    # PPO's clipped surrogate, with one coefficient for both kinds of tokens.
    advantage = advantages[:, None]  # [N, 1]
    coefficient = unified_coefficient(logp, behavior_logp, mask, is_expert, expert_ok, sharpness)
    clipped = coefficient.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(coefficient * advantage, clipped * advantage)  # [N, T]
    loss = -(shares * surrogate).sum()  # Eq. 2, 4, 24, 25

    # Metrics, without what is filtered.
    is_own = mask & ~is_expert[:, None]  # [N, T]
    is_kept_expert = mask & (is_expert & expert_ok)[:, None]  # [N, T]
    objective, _ = masked_total(shares * surrogate, is_own | is_kept_expert)
    metrics = {
        "objective": (objective, shares.sum()),  # a weighted mean: the weights are the shares
        "entropy": masked_total(-logp, is_own),  # estimated from the tokens that were sampled
        "ratio": masked_total(coefficient, is_own),
        "clipped": masked_total((surrogate < coefficient * advantage).float(), is_own),
        "expert_coefficient": masked_total(coefficient, is_kept_expert),
        "expert_delta": masked_total(behavior_logp - logp, is_kept_expert),
    }

    # GRPO's KL.
    if kl_coef:
        if ref_logp is None:
            raise ValueError("kl_coef needs ref_logp, the log-probs of the reference")
        if kl_shares is None:  # where an update is not split
            # The own answers' part of the shares, made to add up to 1.
            kl_shares = shares * is_own
            kl_shares = kl_shares / kl_shares.sum().clamp(min=torch.finfo(shares.dtype).tiny)
        # k3 estimates the KL from samples of the policy, so it is taken on the own answers alone.
        gap = torch.where(is_own, ref_logp.detach() - logp, 0).clamp(-20, 20)
        k3 = gap.expm1() - gap  # e^gap - 1 - gap, precise where it is small
        loss = loss + kl_coef * (kl_shares * k3).sum()  # Eq. 2, 24
        metrics["kl"] = masked_total(k3, is_own)
    return loss, metrics


# ===== 2. What a group is =========================================================================
# Advantages and m are computed for one group at a time, and kept with each answer. From there on
# groups matter only for the layout of a batch: the loss gets N answers.


@dataclasses.dataclass
class Problem:
    id: str  # hash of its content and, by load_problems, of its prompt: the key of the cache
    question: str  # with one <image> where each picture goes
    images: list[bytes]  # encoded pictures
    answer: str


@dataclasses.dataclass
class Prompt:
    ids: Tensor  # [P] each picture expanded to its image tokens
    positions: Tensor  # [P, 3] time, height, width
    pixels: Tensor  # [patches, 3 * 2 * 14 * 14]
    grid: Tensor  # [pictures, 3] patches in time, height, width


@dataclasses.dataclass
class Trajectory:
    """One answer. Its fields are plain, so it is also a record of the cache and of groups.jsonl."""

    ids: list[int]  # T tokens, with the end token unless it was truncated
    text: str
    reward: float
    finished: bool = True  # it has an end token
    source: str = "policy"  # or which expert wrote it
    is_expert: bool = False
    expert_ok: bool = True  # m: False for an expert's wrong answer, unless --no_filter
    advantage: float = 0.0
    logp: list[float] | None = None  # [T] log pi_theta
    behavior_logp: list[float] | None = None  # [T] log pi_old or log pi_phi


@dataclasses.dataclass
class Group:
    problem: Problem
    prompt: Prompt
    answers: list[Trajectory]
    has_contrast: bool = False  # do the rewards of answers with expert_ok differ?


def answers_of(groups: list[Group]) -> list[Trajectory]:
    return [answer for group in groups for answer in group.answers]


def set_advantages(group: Group, use_filter: bool):
    rewards = torch.tensor([[answer.reward for answer in group.answers]])  # [1, G]
    advantages = group_advantages(rewards)[0].tolist()  # Eq. 15, 16
    for answer, advantage in zip(group.answers, advantages, strict=True):
        answer.advantage = advantage
        if answer.is_expert and use_filter:
            answer.expert_ok = answer.reward == 1  # Eq. 22

    # Contrast: do the kept answers differ? Rewards 0 0 0 of the policy and 1 of the expert do.
    # 1 1 1 and a filtered 0 do not: all that are kept would be pushed up alike.
    kept = {answer.reward for answer in group.answers if answer.expert_ok}
    group.has_contrast = len(kept) > 1


# ===== 3. Log-probs: a group is one row, or a few =================================================
# What is wanted is simple: for each answer, with its T tokens,
#
#     logits = model(prompt + answer).logits[-T - 1 : -1]
#     logp = logits.log_softmax(-1).gather(-1, answer)
#
# Done so, picture and question are read again for each answer. Here they are read once: a question
# of three tokens, a b c, and two answers, d e and f g h, are laid out in one row as
#
#     ids           a b    c d    c f g
#     segment       0 0    1 1    2 2 2
#     position      0 1    2 3    2 3 4
#     predicts             d e    f g h
#
# Each answer begins with a copy of the question's last token, which predicts the answer's first
# one. Its own last token predicts nothing, so it is left out. A token sees what stands before it in
# segment 0 and in its own segment, and its position goes on from the question's. So log-probs and
# gradients are those of separate rows, at P + G * T tokens instead of G * (P + T).


class Batch(NamedTuple):
    """Groups, laid out as what the policy reads and what the loss needs."""

    ids: Tensor  # [rows, L]
    positions: Tensor  # [rows, L, 3]
    segments: Tensor  # [rows, L] 0: question, 1 to G: answers; padding is 0, too, and stands last
    vision: dict
    target: Tensor  # [N, T] the answers' tokens
    mask: Tensor  # [N, T] True: an answer token, the end token included
    behavior_logp: Tensor  # [N, T] 0 where it is not known yet
    advantages: Tensor  # [N]
    is_expert: Tensor  # [N]
    expert_ok: Tensor  # [N]


def lay_out_row(prompt: Prompt, answers: list[Trajectory]) -> tuple[Tensor, Tensor, Tensor]:
    """-> ids [L], positions [L, 3], segments [L]."""
    # The question stands without its last token, because each answer begins with a copy of it.
    ids = [prompt.ids[:-1]]
    positions = [prompt.positions[:-1]]
    segments = [torch.zeros_like(prompt.ids[:-1])]
    for number, answer in enumerate(answers, start=1):
        # An answer's last token predicts nothing, so it is left out.
        tokens = torch.tensor([prompt.ids[-1], *answer.ids[:-1]])
        offsets = torch.arange(len(tokens))
        ids.append(tokens)
        positions.append(prompt.positions[-1] + offsets[:, None])
        segments.append(torch.full_like(tokens, number))
    return torch.cat(ids), torch.cat(positions), torch.cat(segments)


def pack(groups: list[Group], cost_ratio: float = math.inf) -> Batch:
    """One row for each group. With the policy's cost_ratio, long answers get several rows where
    that is cheaper: see answers_per_row."""
    # What the policy reads.
    rows = []
    prompts = []
    for group in groups:
        size = answers_per_row(group, cost_ratio)  # if answers are long, not all
        for answers in batches(group.answers, size):
            rows.append(lay_out_row(group.prompt, answers))
            prompts.append(group.prompt)
    ids, positions, segments = zip(*rows, strict=True)

    # What the loss needs.
    answers = answers_of(groups)
    behavior_logp = []
    for answer in answers:
        behavior_logp.append(torch.tensor(answer.behavior_logp or [0.0] * len(answer.ids)))
    return Batch(
        ids=pad(ids),
        positions=pad(positions),
        segments=pad(segments),
        vision=vision_inputs(prompts),
        target=pad([answer.ids for answer in answers]),
        mask=pad([[True] * len(answer.ids) for answer in answers]),
        behavior_logp=pad(behavior_logp),
        advantages=torch.tensor([answer.advantage for answer in answers]),
        is_expert=torch.tensor([answer.is_expert for answer in answers]),
        expert_ok=torch.tensor([answer.expert_ok for answer in answers]),
    )


class Policy(nn.Module):
    """A Qwen2.5-VL as log-probs of answers: student, expert and reference alike."""

    def __init__(self, model, unwritable: Tensor):
        super().__init__()
        model.set_attn_implementation("sdpa")  # flash attention would ignore the mask of `forward`
        self.model = model
        self.unwritable = unwritable
        self.cost_ratio = cost_ratio_of(model)

    def token_logp(self, hidden: Tensor, target: Tensor) -> Tensor:
        """hidden [tokens, D], target [tokens] -> [tokens], in float32."""
        logits = self.model.lm_head(hidden).float()  # [tokens, V]
        logits = logits.index_fill(-1, self.unwritable.to(logits.device), -torch.inf)
        return -nn.functional.cross_entropy(logits, target.to(logits.device), reduction="none")

    def forward(self, batch: Batch) -> Tensor:
        """-> logp [N, T], 0 at padding."""
        # A token sees what stands before it in the question (0) and in its own segment.
        query = batch.segments[:, :, None]
        key = batch.segments[:, None, :]
        sees = ((key == 0) | (key == query)).tril()  # [rows, L, L]
        hidden = self.model.model.language_model(
            inputs_embeds=embed(self.model, batch.ids, [batch.vision]),
            position_ids=batch.positions.movedim(-1, 0),
            attention_mask=sees[:, None],
            use_cache=False,
        ).last_hidden_state  # [rows, L, D]

        # The tokens of answer segments predict the answers' tokens, in the same order.
        hidden = hidden[(batch.segments > 0).to(hidden.device)]  # [tokens, D]
        target = batch.target[batch.mask]  # [tokens]

        # A part at a time, recomputed in the backward pass, as [tokens, V] logits are large.
        logp = []
        for some_hidden, some_target in zip(hidden.split(1024), target.split(1024), strict=True):
            logp.append(checkpoint(self.token_logp, some_hidden, some_target, use_reentrant=False))
        logp = torch.cat(logp).to(batch.mask.device)  # [tokens]

        # [tokens] -> [N, T]: they take the places where the mask is True, in order.
        return torch.zeros_like(batch.behavior_logp).masked_scatter(batch.mask, logp)


@torch.no_grad()
def score(
    policy: Policy, groups: list[Group], size: int
) -> Iterator[tuple[Trajectory, list[float]]]:
    """Every answer with its log-probs [T], by the forward pass of training; size groups at once."""
    policy.eval()
    for part in batches(groups, size):
        batch = send_to_device(pack(part, policy.cost_ratio), policy.model.device)
        logp = policy(batch).tolist()
        for answer, row in zip(answers_of(part), logp, strict=True):
            yield answer, row[: len(answer.ids)]


# ===== 4. Training: the method ====================================================================

# (actor, encoder, groups) -> the expert answers of each group, and metrics
FindExperts = Callable[..., tuple[list[list[Trajectory]], dict]]


def draw_groups(
    actor,
    encoder: Encoder,
    problems: list[Problem],
    find_experts: FindExperts,
    options: Train,
    accelerator: Accelerator,
    progress: dict,
    show: Callable[[int, int], None],
) -> tuple[list[Group], list[dict]]:
    """Dynamic sampling: draw questions until each process has its part of a step's groups.

    -> the groups of this process, and metrics of all that were drawn.
    """
    n_processes = accelerator.num_processes
    quota = options.questions_per_rollout // n_processes
    chosen = []
    spare = []  # without contrast
    metrics = []
    n_drawn = 0  # questions in this step, of all processes
    n_questions = quota  # to draw next, by each process
    for _ in range(options.max_draws):
        # From one list of questions each process takes the next that are its own.
        first = progress["n_drawn"] + accelerator.process_index * n_questions
        questions = questions_from(problems, options.seed, first, n_questions)
        progress["n_drawn"] += n_processes * n_questions
        n_drawn += n_processes * n_questions

        # Form the groups, and choose those with contrast.
        groups = rollout(actor, encoder, questions, n=options.n_on, show=show)  # Eq. 3, 13
        experts, expert_metrics = find_experts(actor, encoder, groups)  # Eq. 13
        for group, expert_answers in zip(groups, experts, strict=True):
            group.answers += expert_answers  # Eq. 14
            set_advantages(group, options.filter)  # Eq. 15, 16, 22
            if group.has_contrast:
                chosen.append(group)
            elif len(spare) < quota:
                spare.append(group)
        metrics += [group_metrics(groups), expert_metrics]

        # Draw again? All processes decide alike, from the numbers of all.
        n_questions = questions_to_draw(quota, gather_object([len(chosen)]), n_drawn)
        if n_questions == 0:
            break

    # Each process needs its quota, as all make the same number of forward passes: a surplus is
    # dropped, and a gap is filled with spare ones. GRPO draws once, so it takes all groups.
    return (chosen + spare)[:quota], metrics


# As long as its pseudocode, hence with more branches than ruff would have it.
def train(options: Train, find_experts: FindExperts | None = None) -> dict:  # noqa: C901
    """The method, in the order of the docstring above. Without find_experts, experts come from the
    cache; with --n_off 0 there are none.

    -> the last metrics
    """
    out = Path(options.out)
    if options.n_off and not find_experts and not Path(options.experts).exists():
        raise BadInput(
            f"no --experts {options.experts}; make it by `tgrl.py experts`, or take --n_off 0"
        )
    options.check_folder()

    # Processes: each samples and trains on its own groups.
    accelerator, dtype = start_processes(options.log_with, options.out)
    n_processes = accelerator.num_processes
    options.check_processes(n_processes)

    # The actor, which samples: whole on each process, in the dtype of computation.
    actor, processor = load_model(options.model, dtype)
    actor.to(accelerator.device)
    encoder = Encoder(processor, actor, options)

    # Questions, and where experts come from.
    problems = load_problems(options.data, options.split, encoder)
    held_out = []
    if options.val_data:
        held_out = load_problems(options.val_data, options.val_split, encoder)
        held_out = held_out[accelerator.process_index :: n_processes]
    if options.n_off == 0:
        find_experts = no_experts
    elif find_experts is None:
        find_experts = cached_experts(options, problems)

    # The policy, which learns: sharded, in float32; and for GRPO's KL a copy that does not.
    policy = make_policy(actor, encoder.unwritable)
    reference = None
    if options.kl_coef:
        reference = make_policy(actor, encoder.unwritable).requires_grad_(False)
    if options.checkpointing:
        policy.model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=options.lr,
        weight_decay=0.01,  # [EasyR1]
        fused=accelerator.device.type == "cuda",
    )

    # The newest checkpoint. It holds no random state, as each step sets its seed.
    progress = {"step": 0, "n_drawn": 0, "generate_batch": options.generate_batch}
    if options.resume and newest_checkpoint(out):
        load_checkpoint(newest_checkpoint(out), policy, optimizer, progress, accelerator)
        optimizer.param_groups[0]["lr"] = options.lr  # it may be another now
        options.generate_batch = min(options.generate_batch, progress["generate_batch"])

    # Files and bar.
    accelerator.wait_for_everyone()  # all have looked into --out before one writes there
    out.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers("tgrl", config=dataclasses.asdict(options))

    def write(name: str, record: dict):
        if accelerator.is_main_process:
            append_records(out / name, [record])

    write("metrics.jsonl", {"method": options.method, "config": dataclasses.asdict(options)})
    say(f"{options.method} from step {progress['step']}, {n_processes} x {accelerator.device}")
    bar = tqdm(
        total=options.steps,
        initial=progress["step"],
        unit="step",
        disable=None if accelerator.is_main_process else True,
    )

    def show(done: int, of: int):
        bar.set_postfix_str(f"rollout {done}/{of}")

    # How good it is before training, or was at the checkpoint.
    bar.set_postfix_str("evaluation")
    copy_weights(policy, actor)
    means = means_of([{"accuracy": greedy_accuracy(actor, encoder, held_out)}])
    if means:
        write("metrics.jsonl", {"step": progress["step"], **means})

    for step in range(progress["step"] + 1, options.steps + 1):
        started = time.perf_counter()
        torch.manual_seed(hash((options.seed, step, accelerator.process_index)))

        # 1. The groups of this process.
        groups, metrics = draw_groups(
            actor=actor,
            encoder=encoder,
            problems=problems,
            find_experts=find_experts,
            options=options,
            accelerator=accelerator,
            progress=progress,
            show=show,
        )

        # 2. log pi_old, by the policy before the first update. (The actor's log-probs would not do,
        # as they are rounded in another way.) A single update gets it from its own forward pass.
        n_updates = options.questions_per_rollout // options.questions_per_update
        if n_updates > 1:
            for answer, logp in score(policy, groups, options.micro_batch):
                if not answer.is_expert:
                    answer.behavior_logp = logp

        # 3. Update the policy, each time on a part of the groups.
        policy.train()
        average = "dapo" if options.token_mean else "grpo"  # so token_shares names the two averages
        for i in range(n_updates):
            bar.set_postfix_str(f"update {i + 1}/{n_updates}")
            part = groups[i::n_updates]  # a stride: spare groups stand last

            # What this update averages over, on all processes.
            n_answers, n_tokens, n_own_answers, n_own_tokens = count_answers(part, accelerator)

            for micro_batch in batches(part, options.micro_batch):
                batch = send_to_device(pack(micro_batch, policy.cost_ratio), accelerator.device)
                logp = policy(batch)  # [N, T], with gradient

                # log pi_phi for the expert's answers, log pi_old for the policy's own.
                own_logp = logp.detach() if n_updates == 1 else batch.behavior_logp
                is_expert = batch.is_expert[:, None]
                behavior_logp = torch.where(is_expert, batch.behavior_logp, own_logp)

                # How much each token counts.
                shares = token_shares(batch.mask, average, n_answers, n_tokens)
                is_own = batch.mask & ~batch.is_expert[:, None]
                kl_shares = token_shares(is_own, average, n_own_answers, n_own_tokens)
                loss, totals = tgrl_loss(  # Eq. 17-25
                    logp=logp,
                    behavior_logp=behavior_logp,
                    mask=batch.mask,
                    advantages=batch.advantages,
                    is_expert=batch.is_expert,
                    expert_ok=batch.expert_ok,
                    shares=shares,
                    sharpness=options.sharpness if options.reweight else None,
                    clip_low=options.clip_low,
                    clip_high=options.clip_high,
                    kl_coef=options.kl_coef,
                    ref_logp=reference(batch) if reference else None,
                    kl_shares=kl_shares,
                )
                (loss * n_processes).backward()  # FSDP averages gradients over processes
                metrics.append(totals)
                remember(micro_batch, logp, behavior_logp)  # for groups.jsonl

            # Clip as EasyR1. A gradient of 0 is no step: only momentum and weight decay would act.
            norm = nn.utils.clip_grad_norm_(policy.parameters(), max_norm=1.0)
            norm = norm.full_tensor()
            if 0 < norm < math.inf:
                optimizer.step()
            optimizer.zero_grad()
            metrics.append({"grad_norm": (norm, 1)})

        # 4. The actor gets the new weights.
        copy_weights(policy, actor)

        # 5. Log, save, evaluate.
        metrics.append({"seconds": (time.perf_counter() - started, 1)})
        means = means_of(metrics)
        means["grader_errors"] = sum(gather_object([grader_errors.total()]))
        grader_errors.clear()
        write("metrics.jsonl", {"step": step, **means})
        progress.update(step=step, generate_batch=options.generate_batch)
        if step % options.every == 0 or step == options.steps:
            for group in groups[:4]:
                write("groups.jsonl", kept_group(group, step, encoder))
            if accelerator.is_main_process:
                export_model(out / "model", actor, encoder)
            save_checkpoint(out, policy, optimizer, progress, accelerator)
            bar.set_postfix_str("evaluation")
            accuracy = means_of([{"accuracy": greedy_accuracy(actor, encoder, held_out)}])
            if accuracy:
                write("metrics.jsonl", {"step": step, **accuracy})
                means |= accuracy
        accelerator.log(means, step=step)
        say(f"step {step:>3}/{options.steps}  {summary(means)}")
        bar.update()

    bar.close()
    for tracker in accelerator.trackers:
        tracker.finish()
    say(f"the trained model is in {out / 'model'}")
    return means


# ===== 5. Settings ================================================================================
# The method ends here. What follows are its parts, to be read when they are needed.

IMAGE = "<image>"  # where a picture goes in a question
IMAGE_TOKEN_SIDE = 28  # pixels: a token stands for 2 x 2 patches of 14 x 14
THINK = "Think step by step between <think> and </think>, then give the answer alone in \\boxed{}."


class BadInput(ValueError):
    """Something the user can mend: the message says what was wrong, where, and what to do."""


@dataclasses.dataclass
class Options:
    """What all commands share. [Brackets] tell where a default comes from."""

    # data
    data: str = "hiyouga/geometry3k"  # questions: hub id, .parquet, .jsonl, or a folder [paper]
    split: str = "train"  # its split; "train[:8]" is its first eight rows
    experts: str = "experts.jsonl"  # the cache of expert answers

    # how a question is asked
    instruction: str = THINK  # stands behind each question [asks what EasyR1's asks, in our words]
    min_pixels: int = 262144  # smaller pictures are enlarged to this many pixels [EasyR1]
    max_pixels: int = 4194304  # larger pictures are reduced to this many pixels [EasyR1]
    max_prompt: int = 2048  # questions of more tokens are left out, never truncated [EasyR1]
    max_answer: int = 2048  # answers are truncated after this many tokens [EasyR1]

    # run
    generate_batch: int = 512  # answers sampled at once on one process; halved when memory runs out
    micro_batch: int = 1  # groups in a forward pass on one process [EasyR1]
    seed: int = 1  # of the order of questions and of sampling [EasyR1]


BY_ALGORITHM = {
    "grpo": dict(sharpness=5.0, clip_high=0.2, kl_coef=0.01, token_mean=False, max_draws=1),
    "dapo": dict(sharpness=14.0, clip_high=0.28, kl_coef=0.0, token_mean=True, max_draws=20),
}


@dataclasses.dataclass
class Train(Options):
    """Train by TGRL-DAPO or TGRL-GRPO; with --experts self the policy makes its own experts."""

    # data
    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # the student: hub id or folder [paper]
    val_data: str = ""  # held-out questions, for greedy accuracy during training; empty: none
    val_split: str = "test"  # its split

    # method; None stands for the algorithm's own setting, see BY_ALGORITHM
    algorithm: Literal["dapo", "grpo"] = "dapo"  # TGRL-DAPO or TGRL-GRPO
    n_on: int = 7  # answers of the policy in a group, at least 2 [paper, Geo3K; ViRL39K: 4]
    n_off: int = 1  # answers of the expert in a group; 0: DAPO or GRPO, then take --n_on 8 [paper]
    sharpness: float | None = None  # beta of Eq. 20: 14 for dapo, 5 for grpo [paper]
    reweight: bool = True  # weigh expert tokens by Eq. 18-20; no: w = 1 [paper, Table 1]
    filter: bool = True  # no weight for wrong expert answers, Eq. 22; no: m = 1 [paper, Table 1]
    clip_low: float = 0.2  # lower clip of the coefficient [EasyR1]
    clip_high: float | None = None  # upper clip: 0.28 for dapo [EasyR1], 0.2 for grpo [Eq. 24]
    kl_coef: float | None = None  # beta of Eq. 24: 0.01 for grpo [EasyR1], 0 for dapo
    token_mean: bool | None = None  # average over tokens, Eq. 25 (dapo), or answers, Eq. 24 (grpo)
    max_draws: int | None = None  # draws in a step: 20 for dapo [EasyR1], 1 for grpo

    # experts that the policy makes itself, --experts self
    tries: int = 8  # continuations of a wrong answer in a round
    rounds: int = 1  # rounds of looking again; more did not help on the toy

    # optimization
    steps: int = 60  # each a rollout and its updates [paper: 15 epochs of Geo3K; 2 of ViRL39K: 150]
    questions_per_rollout: int = 512  # questions in a step, over all processes [EasyR1]
    questions_per_update: int = 128  # questions in an update [EasyR1]
    lr: float = 1e-6  # learning rate of AdamW, constant [EasyR1]
    checkpointing: bool = True  # recompute activations, to save memory [EasyR1]

    # run
    out: str = "runs/train"  # folder of the run: metrics.jsonl, groups.jsonl, checkpoints, model
    resume: bool = False  # continue the run in --out from its newest checkpoint
    every: int = 5  # steps between checkpoints, evaluations and kept groups [EasyR1]
    log_with: str = ""  # a tracker that accelerate knows, such as tensorboard or wandb

    def __post_init__(self):
        for name, value in BY_ALGORITHM[self.algorithm].items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def method(self) -> str:
        return ("TGRL-" if self.n_off else "") + self.algorithm.upper()

    def check_processes(self, n: int):
        """All processes take an equal part of each update."""
        update = self.questions_per_update
        if update % n:
            divisors = [str(i) for i in range(1, update + 1) if update % i == 0]
            raise BadInput(
                f"{n} processes cannot share --questions_per_update {update} equally: "
                f"start {' or '.join(divisors)}, or give a multiple of {n}"
            )
        if self.questions_per_rollout % update:
            raise BadInput(
                f"--questions_per_rollout {self.questions_per_rollout} must be a multiple "
                f"of --questions_per_update {update}"
            )

    def check_folder(self):
        """Is it free, or to be resumed? Tells which options differ from before."""
        path = Path(self.out, "metrics.jsonl")
        if not path.exists():
            return
        if not self.resume:
            hint = "--resume continues it, another --out begins one"
            raise BadInput(f"--out {self.out} holds a run; {hint}")
        configs = [record["config"] for record in read_records(path) if "config" in record]
        for name, value in dataclasses.asdict(self).items():
            before = configs[-1].get(name) if configs else value
            if name not in ("resume", "generate_batch") and value != before:
                say(f"--{name} is {value!r} from now on; it was {before!r}")


# ===== 6. Questions and prompts: a row of a data set -> Problem -> Prompt =========================

# Else the tokenizer warns when another process is started; and lengths change all the time.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said when one process saves


def say(text: str):
    """Print once, however many processes run, and above a progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)


def batches(items: list, size: int) -> Iterator[list]:
    size = max(1, size)
    for start in range(0, len(items), size):
        yield items[start : start + size]


def read_rows(source: str, split: str, config: str | None = None) -> Iterator[dict]:
    """Rows of a hub data set, a .parquet or .jsonl file, or a folder of them or of pictures."""
    kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
    kind = kinds.get(Path(source).suffix)

    # One error for whatever the library may raise.
    try:
        if kind:
            split = re.sub(r"^\w+", "train", split)  # a lone file has no other split
            table = datasets.load_dataset(kind, data_files=source, split=split)
        else:
            table = datasets.load_dataset(source, config, split=split)
    except Exception as error:
        hint = "give a hub id, a .parquet or .jsonl file, or a folder of such files or of pictures"
        raise BadInput(f"cannot load {source!r}, split {split!r}; {hint}: {error}") from error

    # As arrow, pictures stay encoded.
    for batch in table.with_format("arrow").iter(64):
        yield from batch.to_pylist()


def read_picture(picture, root: Path) -> bytes:
    """A picture of a row: bytes, a path that starts at root, or what the hub makes of either."""
    if not isinstance(picture, dict):
        picture = datasets.Image().encode_example(picture)
    if picture.get("bytes"):
        return picture["bytes"]
    path = root / picture["path"]
    if not path.is_file():
        raise BadInput(f"a picture is missing: {path}")
    return path.read_bytes()


def picture_size(encoded: bytes) -> tuple[int, int]:
    """Width and height, by the header; a PNG that is cut off is found, too, without decoding it."""
    try:
        picture = Image.open(io.BytesIO(encoded))
        size = picture.size
        picture.verify()
    except Exception as error:
        raise BadInput(f"a picture cannot be read: {error}") from error
    return size


def read_problem(row: dict, source: str = "") -> Problem:
    """A row of geometry3k (images, problem, answer) or of ViRL39K (image, question, answer)."""
    # Text.
    question = row.get("problem") or row.get("question") or ""
    question = str(question).strip()
    answer = row.get("answer")
    answer = "" if answer is None else str(answer).strip()
    if not question.replace(IMAGE, "") or not answer:
        raise BadInput(
            f"problem (or question) or answer is empty: its columns are {', '.join(row)}"
        )

    # Pictures, one for each <image>.
    pictures = row.get("images") or row.get("image") or []
    if not isinstance(pictures, list):
        pictures = [pictures]
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    images = [read_picture(picture, root) for picture in pictures if picture]
    if len(images) == 1 and IMAGE not in question:
        question = IMAGE + question  # some 2 % of ViRL39K lost theirs
    if question.count(IMAGE) != len(images) or not images:
        raise BadInput(f"{question.count(IMAGE)} times {IMAGE} for {len(images)} pictures")

    content = repr((question, answer)).encode() + b"".join(images)
    answer = extract_boxed(answer) or answer  # ViRL39K writes \boxed{42}
    return Problem(hashlib.sha256(content).hexdigest()[:16], question, images, answer)


class Encoder:
    """Makes a prompt of a question: the same for rollouts, experts, training and evaluation."""

    def __init__(self, processor, model, options: Options):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.options = options
        self.rope_index = model.model.get_rope_index
        self.generation_config = model.generation_config

        self.image_token = model.config.image_token_id

        # Qwen has two end tokens; one of them is also the padding.
        ends = model.generation_config.eos_token_id or []
        if not isinstance(ends, list):
            ends = [ends]
        self.ends = sorted({self.tokenizer.eos_token_id, *ends})

        # What no answer may hold, and what every softmax leaves out: vision tokens, which would
        # crash the next forward pass, and embeddings without a token, whose number differs from 3B
        # to 32B.
        config = model.config
        vision = {config.image_token_id, config.video_token_id}
        vision |= {config.vision_start_token_id, config.vision_end_token_id}
        unused = range(len(self.tokenizer), model.get_output_embeddings().out_features)
        self.unwritable = torch.tensor(sorted(vision.union(unused)))

    def chat(self, problem: Problem) -> str:
        """The question in the model's chat template, with one image token for each picture."""
        content = []
        for number, part in enumerate(problem.question.split(IMAGE)):
            if number > 0:
                content.append({"type": "image"})
            if part.strip():
                content.append({"type": "text", "text": part})
        content.append({"type": "text", "text": " " + self.options.instruction})
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def outline(self, problem: Problem) -> tuple[list[int], list[int]]:
        """The ids of the chat, and how many tokens each picture becomes. No picture is decoded."""
        ids = self.tokenizer(self.chat(problem)).input_ids
        if ids.count(self.image_token) != len(problem.images):
            raise BadInput("the question holds a special token of the model: an image token")

        sizes = []
        for encoded in problem.images:
            width, height = picture_size(encoded)
            height, width = smart_resize(
                height=height,
                width=width,
                factor=IMAGE_TOKEN_SIDE,
                min_pixels=self.options.min_pixels,
                max_pixels=self.options.max_pixels,
            )
            if height * width == 0:
                raise BadInput(
                    f"a picture is too narrow for --max_pixels {self.options.max_pixels}"
                )
            sizes.append(height * width // IMAGE_TOKEN_SIDE**2)
        return ids, sizes

    def __call__(self, problem: Problem) -> Prompt:
        # Pictures are decoded and resized to a multiple of 28 pixels.
        limits = dict(min_pixels=self.options.min_pixels, max_pixels=self.options.max_pixels)
        pictures = []
        for encoded in problem.images:
            pictures.append(fetch_image({"image": Image.open(io.BytesIO(encoded)), **limits}))
        inputs = self.processor(
            images=pictures, text=[self.chat(problem)], do_resize=False, return_tensors="pt"
        )

        # Without the types the model would silently number a picture's tokens as if they were text.
        positions, _ = self.rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
        )
        return Prompt(
            ids=inputs["input_ids"][0],
            positions=positions[:, 0].T,
            pixels=inputs["pixel_values"],
            grid=inputs["image_grid_thw"],
        )


def load_problems(source: str, split: str, encoder: Encoder) -> list[Problem]:
    """All questions that can be used; the others are left out, and told by reason and row."""
    problems = []
    left_out = collections.defaultdict(list)
    longest = encoder.options.max_prompt
    for number, row in enumerate(tqdm(read_rows(source, split), desc=source, disable=None)):
        try:
            problem = read_problem(row, source)
            ids, sizes = encoder.outline(problem)
            length = len(ids) - len(sizes) + sum(sizes)
            if length > longest:
                raise BadInput(f"its prompt is longer than --max_prompt {longest}: {length} tokens")
        except Exception as error:  # a row may hold anything
            reason, _, detail = str(error).partition(": ")
            if not isinstance(error, BadInput):
                reason = f"{type(error).__name__} {reason}"
            left_out[reason].append(f"row {number} ({detail})" if detail else f"row {number}")
            continue
        outline = f"{problem.id} {ids} {sizes}"
        problem.id = hashlib.sha256(outline.encode()).hexdigest()[:16]
        problems.append(problem)

    # Told once for each reason.
    for reason, rows in left_out.items():
        shown = "; ".join(rows[:5])
        say(f"{source}: {len(rows)} rows left out, {reason}: {shown}{' …' * (len(rows) > 5)}")
    if not problems:
        raise BadInput(f"no row of {source} can be used")
    return problems


def load_model(name: str, dtype: torch.dtype = torch.float32, device_map: str | None = None):
    """A Qwen2.5-VL and its processor, by hub id or folder: safetensors only, no remote code."""
    try:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            name, dtype=dtype, device_map=device_map, use_safetensors=True
        )
        return model, AutoProcessor.from_pretrained(name)
    except Exception as error:
        hint = "as a Qwen2.5-VL, by hub id or folder"
        raise BadInput(f"cannot load model {name} {hint}: {error}") from error


@functools.lru_cache(maxsize=2)
def order_of_epoch(n_problems: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(hash((seed, epoch)))
    return torch.randperm(n_problems, generator=generator).tolist()


def questions_from(problems: list[Problem], seed: int, first: int, n: int) -> list[Problem]:
    """Number first to first + n - 1 of an endless list of questions, shuffled anew each epoch."""
    drawn = []
    for number in range(first, first + n):
        epoch, place = divmod(number, len(problems))
        order = order_of_epoch(len(problems), seed, epoch)
        drawn.append(problems[order[place]])
    return drawn


# ===== 7. Rollouts: answers by Hugging Face generate, graded ======================================


def pad(rows: Iterable, side: str = "right") -> Tensor:
    """Rows of different length -> [rows, longest, ...], with 0 at that side."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_side=side)


def vision_inputs(prompts: list[Prompt]) -> dict:
    pixels = torch.cat([prompt.pixels for prompt in prompts])
    grid = torch.cat([prompt.grid for prompt in prompts])
    return {"pixel_values": pixels, "image_grid_thw": grid}


def embed(model, ids: Tensor, pictures: Iterable[dict]) -> Tensor:
    """ids [rows, L] -> [rows, L, D]. Pictures, in parts, take the place of their tokens."""
    features = []
    for part in pictures:
        features += model.model.get_image_features(**part, return_dict=True).pooler_output
    embeds = model.get_input_embeddings()(ids)
    is_image = ids == model.config.image_token_id
    return embeds.masked_scatter(is_image[..., None], torch.cat(features).to(embeds))


class RoomyLayer(DynamicLayer):
    """The keys and values of one layer, with room for all tokens to come.

    It saves time: Hugging Face's DynamicCache copies all keys and values for each new token, and
    its StaticCache attends to places that are still empty. And memory runs out at once or not at
    all, as all room is taken before the first token.
    """

    room = None

    def make_room(self, n_answers: int, n_tokens: int):
        """Repeat each question's keys and values for its answers, and leave room behind them."""
        self.n_filled = self.get_seq_length()
        self.room = []
        for filled in (self.keys, self.values):  # [B, heads, P - 1, size of a head]
            rows, heads, _, size = filled.shape
            room = filled.new_empty(rows * n_answers, heads, self.n_filled + n_tokens, size)
            room[:, :, : self.n_filled] = filled.repeat_interleave(n_answers, dim=0)
            self.room.append(room)
        self.show_filled()

    def show_filled(self):
        self.keys = self.room[0][:, :, : self.n_filled]
        self.values = self.room[1][:, :, : self.n_filled]

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.room is None:  # the prefill
            return super().update(keys, values, *args, **kwargs)
        end = self.n_filled + keys.shape[2]
        self.room[0][:, :, self.n_filled : end] = keys
        self.room[1][:, :, self.n_filled : end] = values
        self.n_filled = end
        self.show_filled()
        return self.keys, self.values


@torch.no_grad()
def sample_batch(
    actor, encoder: Encoder, prompts: list[Prompt], n: int, temperature: float
) -> list[list[list[int]]]:
    """n answers to each prompt by one call of generate: ids up to and with the first end token."""
    # A config of our own: the checkpoint's has settings such as repetition_penalty 1.05.
    longest = encoder.options.max_answer
    actor.generation_config = GenerationConfig(
        eos_token_id=encoder.ends,
        pad_token_id=encoder.ends[0],
        max_new_tokens=longest,
        suppress_tokens=encoder.unwritable.tolist(),
    )
    if temperature > 0:
        actor.generation_config.update(do_sample=True, temperature=temperature, top_k=0)

    # Prompts are padded on the left, so that all answers begin in the same column.
    ids = pad([prompt.ids for prompt in prompts], side="left").to(actor.device)  # [B, P]
    is_token = pad([torch.ones_like(prompt.ids) for prompt in prompts], side="left").to(
        actor.device
    )
    positions = pad([prompt.positions for prompt in prompts], side="left").to(actor.device)
    positions = positions.movedim(-1, 0)  # [3, B, P]

    # Read each question once, but for its last token, which generate reads. Pictures take memory,
    # so they are read eight questions at a time.
    pictures = (send_to_device(vision_inputs(part), actor.device) for part in batches(prompts, 8))
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    actor.model.language_model(
        inputs_embeds=embed(actor, ids[:, :-1], pictures),
        attention_mask=is_token[:, :-1],
        position_ids=positions[..., :-1],
        cache=cache,
        use_cache=True,
    )
    for layer in cache.layers:
        layer.make_room(n_answers=n, n_tokens=1 + longest)

    # Answer it n times.
    sequences = actor.generate(
        ids.repeat_interleave(n, dim=0),  # [B * n, P]
        attention_mask=is_token.repeat_interleave(n, dim=0),
        position_ids=positions[..., -1:].repeat_interleave(n, dim=1),  # of that last token
        cache=cache,
    )

    # An answer ends with its first end token.
    answers = []
    for tokens in sequences[:, ids.shape[1] :].tolist():
        length = len(tokens)
        for place, token in enumerate(tokens):
            if token in encoder.ends:
                length = place + 1
                break
        answers.append(tokens[:length])
    return list(batches(answers, n))


def sample(
    actor,
    encoder: Encoder,
    prompts: list[Prompt],
    n: int,
    temperature: float = 1.0,
    show: Callable[[int, int], None] | None = None,
) -> list[list[list[int]]]:
    """n answers to each prompt, as many at once as memory holds.

    In training the temperature is 1: log-probs are those of temperature 1. At 0 the likeliest token
    is taken. When memory runs out, options.generate_batch is halved for good.
    """
    options = encoder.options
    seed = torch.randint(2**62, ()).item()
    answers = []
    while len(answers) < len(prompts):
        torch.manual_seed(seed + len(answers))  # the same for a second try
        n_prompts = max(1, options.generate_batch // n)
        part = prompts[len(answers) : len(answers) + n_prompts]
        if show:
            show(len(answers), len(prompts))

        try:
            answers += sample_batch(actor, encoder, part, n, temperature)
            continue
        except torch.OutOfMemoryError:
            if len(part) == 1:
                hint = "lower --max_answer, --max_pixels or the number of answers"
                raise BadInput(
                    f"{n} answers to one question do not fit into memory: {hint}"
                ) from None

        # Try again with half as many. What is done is kept, and the number that fits is remembered.
        options.generate_batch = len(part) // 2 * n
        torch.cuda.empty_cache()
        say(f"out of memory: from now on {options.generate_batch} answers at once")
    return answers


def grade(ids: list[int], problem: Problem, encoder: Encoder) -> Trajectory:
    text = encoder.tokenizer.decode(ids, skip_special_tokens=True)
    return Trajectory(
        ids=ids,
        text=text,
        reward=reward(text, problem.answer),  # Eq. 3
        finished=ids[-1] in encoder.ends,
    )


def rollout(
    actor,
    encoder: Encoder,
    problems: list[Problem],
    n: int,
    temperature: float = 1.0,
    show: Callable[[int, int], None] | None = None,
) -> list[Group]:
    """n graded answers to each question."""
    prompts = [encoder(problem) for problem in problems]
    sampled = sample(actor, encoder, prompts, n, temperature, show)
    groups = []
    for problem, prompt, answers in zip(problems, prompts, sampled, strict=True):
        groups.append(Group(problem, prompt, [grade(ids, problem, encoder) for ids in answers]))
    return groups


def greedy_accuracy(actor, encoder: Encoder, problems: list[Problem]) -> tuple[float, int]:
    """How many greedy answers are right, and of how many."""
    n_right = 0
    for part in batches(problems, encoder.options.generate_batch):
        answers = answers_of(rollout(actor, encoder, part, n=1, temperature=0.0))
        n_right += sum(answer.reward for answer in answers)
    return n_right, len(problems)


# ===== 8. Experts: answers of a stronger model, cached with their log-probs under that model ======
# The cache is JSONL, an answer a line, right or wrong. A question is known by a hash of its
# pictures, its right answer and its prompt's tokens, so that an answer is taken only where the
# prompt is the same.


def append_records(path: Path, records: list[dict]):
    """In one write, as processes may append together."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    with open(path, "ab+", buffering=0) as file:
        file.seek(max(0, file.tell() - 1))
        if file.read() not in (b"", b"\n"):
            text = "\n" + text  # a kill tore the last record
        file.write(text.encode())


def read_records(path: Path) -> Iterator[dict]:
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):  # it is empty, or a kill tore it
            yield json.loads(line)


def read_cache(
    path: Path, problems: list[Problem], model: str | None = None
) -> dict[str, list[Trajectory]]:
    """Expert answers by question. A model may be named of which all answers must be."""
    cache = {problem.id: [] for problem in problems}

    # Of all answers in the file those to these questions.
    for record in read_records(path):
        n_logp = sum(logp <= 0 for logp in record.get("behavior_logp") or [])
        if n_logp == 0 or n_logp != len(record.get("ids") or []):
            raise BadInput(
                f"{path} holds a record that is not an answer with a log-prob for each token"
            )
        if model and record["source"] != model:
            hint = "give another --experts file, or that --model"
            raise BadInput(f"{path} holds answers of {record['source']}, not of {model}: {hint}")
        question = record.pop("question")
        if question in cache:
            answer = Trajectory(**record)
            answer.is_expert = True
            cache[question].append(answer)

    # Tell what there is.
    answers = [answer for some in cache.values() for answer in some]
    n_answered = sum(len(some) > 0 for some in cache.values())
    n_right = sum(answer.reward == 1 for answer in answers)
    n_truncated = sum(not answer.finished for answer in answers)
    say(
        f"{path}: {len(answers)} answers to {n_answered} of {len(cache)} questions, "
        f"{n_right} right, {n_truncated} truncated"
    )
    return cache


def cached_experts(options: Train, problems: list[Problem]) -> FindExperts:
    """A function that takes up to n_off of a question's cached answers, at random."""
    path = Path(options.experts)
    cache = read_cache(path, problems)
    if not any(cache.values()):
        raise BadInput(
            f"{path} answers none of these questions as they are asked here; "
            "was it made for other data, instruction, pixels or tokenizer?"
        )

    def find(actor, encoder: Encoder, groups: list[Group]):
        experts = []
        for group in groups:
            answers = cache[group.problem.id]
            order = torch.randperm(len(answers))[: options.n_off]
            experts.append([dataclasses.replace(answers[i]) for i in order])  # copies
        return experts, {}

    return find


def no_experts(actor, encoder: Encoder, groups: list[Group]):
    return [[] for _ in groups], {}


@dataclasses.dataclass
class Experts(Options):
    """Sample answers from a strong model, score and grade them, and add them to a cache."""

    model: str = "Qwen/Qwen2.5-VL-32B-Instruct"  # the expert: hub id or folder [paper]
    samples: int = 4  # answers a question
    spread: bool = False  # one process, the model spread over all GPUs, if it does not fit one


def make_experts(options: Experts):
    accelerator, dtype = start_processes()
    if options.experts == "self":
        raise BadInput(
            "--experts is the file to write; `self` is for train, which then needs no file"
        )
    if options.spread and accelerator.num_processes > 1:
        raise BadInput("--spread is for one process: start it by `python tgrl.py experts`")

    # The expert.
    if options.spread:
        model, processor = load_model(options.model, dtype, device_map="auto")
    else:
        model, processor = load_model(options.model, dtype)
        model.to(accelerator.device)
    encoder = Encoder(processor, model, options)
    policy = Policy(model, encoder.unwritable)

    # The questions, and the answers that are there already.
    problems = load_problems(options.data, options.split, encoder)
    problems = list({problem.id: problem for problem in problems}.values())  # equal ones once
    path = Path(options.experts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    cache = read_cache(path, problems, options.model)
    accelerator.wait_for_everyone()  # all have read it before one appends

    # Each process takes its share of the questions that lack answers.
    todo = [problem for problem in problems if len(cache[problem.id]) < options.samples]
    todo = todo[accelerator.process_index :: accelerator.num_processes]

    # A batch at a time, so that a kill loses no more than one.
    bar = tqdm(
        total=len(todo), unit="question", disable=None if accelerator.is_main_process else True
    )
    while todo:
        size = max(1, options.generate_batch // options.samples)
        part, todo = todo[:size], todo[size:]
        torch.manual_seed(options.seed + int(part[0].id, 16))
        groups = rollout(model, encoder, part, options.samples)
        for answer, logp in score(policy, groups, options.micro_batch):
            answer.source = options.model
            answer.is_expert = True
            answer.behavior_logp = logp
        for group in groups:
            # Keep only as many as the question lacks.
            new = group.answers[len(cache[group.problem.id]) :]
            append_records(path, [{"question": group.problem.id, **vars(answer)} for answer in new])
        bar.update(len(part))
    bar.close()

    errors = sum(gather_object([grader_errors]), collections.Counter())
    say(f"answers that could not be graded, and count as wrong: {dict(errors) or 'none'}")
    accelerator.wait_for_everyone()
    read_cache(path, problems)


# ===== 9. Processes, sharding, checkpoints ========================================================


def start_processes(log_with: str = "", out: str | None = None) -> tuple[Accelerator, torch.dtype]:
    """Joins the other processes. -> accelerator, and the dtype of computation."""
    cuda = torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=not cuda,
        log_with=log_with or None,
        project_dir=out,
        # While one process samples, the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
    )
    if log_with and not accelerator.log_with:
        hint = "it is not installed, or accelerate does not know it"
        raise BadInput(f"--log_with {log_with}: {hint}")

    # Started without a launcher: a world of one.
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend="nccl" if cuda else "gloo",
            store=torch.distributed.HashStore(),
            rank=0,
            world_size=1,
        )

    # cuDNN's attention would make a plan for each length, so for each new token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return accelerator, torch.bfloat16 if cuda else torch.float32


def make_policy(actor, unwritable: Tensor) -> Policy:
    """The actor's weights in float32, sharded by FSDP2, which gathers a block when it runs."""
    with torch.device("meta"):  # so that no process ever holds all of it
        policy = Policy(Qwen2_5_VLForConditionalGeneration(actor.config).float(), unwritable)

    # cast_forward_inputs would round the vision tower's rotary embeddings, which the actor does
    # not.
    precision = MixedPrecisionPolicy(
        param_dtype=actor.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in policy.model.model.visual.blocks:
        fully_shard(block, mp_policy=precision)
    for block in policy.model.model.language_model.layers:
        fully_shard(block, mp_policy=precision)
    fully_shard(policy, mp_policy=precision)

    # Each process takes its part of each tensor, without communication.
    policy.to_empty(device=actor.device)
    with torch.no_grad():
        for shard, full in zip(policy.parameters(), actor.parameters(), strict=True):
            part = distribute_tensor(
                full.float(), shard.device_mesh, shard.placements, src_data_rank=None
            )
            shard.copy_(part)
        for buffer, full in zip(policy.buffers(), actor.buffers(), strict=True):
            buffer.copy_(full)
    return policy


@torch.no_grad()
def copy_weights(policy: Policy, actor):
    for target, source in zip(actor.parameters(), policy.parameters(), strict=True):
        target.copy_(source.full_tensor())


def newest_checkpoint(out: Path) -> Path | None:
    return max(out.glob("checkpoints/??????"), default=None)


def save_checkpoint(out: Path, policy: Policy, optimizer, progress: dict, accelerator: Accelerator):
    """Written beside and renamed, so that a kill leaves the one before it. Keeps the last three."""
    folder = out / "checkpoints" / f"{progress['step']:06}"
    unfinished = folder.with_suffix(".tmp")
    weights, moments = get_state_dict(policy, optimizer)
    state = {"weights": weights, "optimizer": moments, "progress": progress}
    # Each process writes its shards. A lone one does not exchange, which would slow it from then
    # on.
    dcp.save(state, checkpoint_id=unfinished, no_dist=accelerator.num_processes == 1)
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        for old in sorted(folder.parent.glob("??????"))[:-3]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(
    folder: Path, policy: Policy, optimizer, progress: dict, accelerator: Accelerator
):
    """Into policy, optimizer and progress, however many processes wrote it."""
    weights, moments = get_state_dict(policy, optimizer)
    state = {"weights": weights, "optimizer": moments, "progress": progress}
    dcp.load(state, checkpoint_id=folder, no_dist=accelerator.num_processes == 1)
    set_state_dict(
        policy, optimizer, model_state_dict=state["weights"], optim_state_dict=state["optimizer"]
    )
    progress.update(state["progress"])


def export_model(folder: Path, actor, encoder: Encoder):
    """The model so far, in Hugging Face's layout."""
    actor.generation_config = encoder.generation_config
    actor.save_pretrained(folder)
    encoder.processor.save_pretrained(folder)


# ===== 10. Counting and logging ===================================================================


def answers_per_row(group: Group, cost_ratio: float) -> int:
    """All in one row; but for long answers several rows, as attention grows with a row's square.

    A token costs c1 FLOPs in the weights and c2 * L in attention. So k rows with S answer tokens in
    all cost k * (c1 * (P + S/k) + c2 * (P + S/k)^2), least at S/k = P * sqrt(c1 / (c2 * P) + 1).
    """
    n_prompt = len(group.prompt.ids)
    n_answers = len(group.answers)
    n_tokens = sum(len(answer.ids) for answer in group.answers)
    best_row = n_prompt * math.sqrt(cost_ratio / n_prompt + 1)
    n_rows = max(1, int(n_tokens / best_row))
    return math.ceil(n_answers / n_rows)


def cost_ratio_of(model) -> float:
    """c1 / c2 of answers_per_row, of a layer: 2 FLOPs a weight, 4 * D for each pair of tokens."""
    layer = model.model.language_model.layers[0]
    n_weights = sum(p.numel() for p in layer.parameters())
    return n_weights / (2 * model.config.text_config.hidden_size)


def count_answers(groups: list[Group], accelerator: Accelerator) -> list[int]:
    """Answers, their tokens, own answers, their tokens: of all processes."""
    answers = answers_of(groups)
    own = [answer for answer in answers if not answer.is_expert]
    n_tokens = sum(len(answer.ids) for answer in answers)
    n_own_tokens = sum(len(answer.ids) for answer in own)
    counts = torch.tensor([len(answers), n_tokens, len(own), n_own_tokens])
    return accelerator.reduce(counts.to(accelerator.device), reduction="sum").tolist()


def questions_to_draw(quota: int, n_chosen: list[int], n_drawn: int) -> int:
    """How many more the process that lacks most groups is likely to need; at most the quota.

    n_chosen are the groups that each process has, from n_drawn questions in all.
    """
    missing = quota - min(n_chosen)
    rate = sum(n_chosen) / n_drawn  # groups from a question
    if missing <= 0:
        return 0
    if rate == 0:
        return quota
    return min(quota, math.ceil(missing / rate))


def group_metrics(groups: list[Group]) -> dict:
    """Sums and counts over groups that were drawn, chosen or not."""
    own = [answer for answer in answers_of(groups) if not answer.is_expert]
    values = {
        "reward": [answer.reward for answer in own],
        "expert_reward": [answer.reward for answer in answers_of(groups) if answer.is_expert],
        "answer_tokens": [len(answer.ids) for answer in own],
        "truncated": [not answer.finished for answer in own],
        "contrast": [group.has_contrast for group in groups],
    }
    return {name: (sum(some), len(some)) for name, some in values.items()}


def remember(groups: list[Group], logp: Tensor, behavior_logp: Tensor):
    """Both [N, T], for groups.jsonl."""
    rows = zip(answers_of(groups), logp.tolist(), behavior_logp.tolist(), strict=True)
    for answer, new, old in rows:
        answer.logp = new[: len(answer.ids)]
        answer.behavior_logp = old[: len(answer.ids)]


def means_of(metrics: list[dict]) -> dict[str, float]:
    """The mean of each metric over all its (sum, count) pairs, on all processes."""
    pairs = []
    for some in metrics:
        for name, (total, count) in some.items():
            pairs.append((name, float(total), float(count)))

    # Add up what all processes have.
    totals = collections.Counter()
    counts = collections.Counter()
    for name, total, count in gather_object(pairs):
        totals[name] += total
        counts[name] += count
    return {name: totals[name] / counts[name] for name in totals if counts[name]}


def kept_group(group: Group, step: int, encoder: Encoder) -> dict:
    """A group as it was trained on, as a record for `eval.py show`."""
    answers = []
    for answer in group.answers:
        tokens = [encoder.tokenizer.decode([token]) for token in answer.ids]
        answers.append({**vars(answer), "tokens": tokens})
    return {
        "step": step,
        "question": group.problem.question,
        "answer": group.problem.answer,
        "images": [base64.b64encode(image).decode() for image in group.problem.images],
        "answers": answers,
    }


def summary(means: dict[str, float]) -> str:
    names = "accuracy reward expert_reward contrast truncated entropy grad_norm seconds"
    return "  ".join(f"{name} {means[name]:.3g}" for name in names.split() if name in means)


# ===== 11. The reward: is the boxed answer right?   Eq. 3 =========================================
# reward(response, answer) is 1.0 if the last \boxed{...} of the response means the same as the
# answer: it has the same text, or names the same option, or math-verify finds the formulas equal.
# Unequal on purpose: lists in another order; ab and ba; 4 \times 6 and 24; 12 cm and 12
# centimeters; 7.07 and 5\sqrt{2} ≈ 7.07, of which the exact side counts.

LOOKS = {  # how it may be written -> what is compared
    "\\left": "",
    "\\right": "",
    "\\angle": "",
    "\\,": "",
    "\\;": "",
    "\\!": "",
    "\\(": "",
    "\\)": "",
    "\\[": "",
    "\\]": "",
    "\\%": "",
    "%": "",
    "\\$": "",
    "$": "",
    "∠": "",
    "~": " ",
    "√": "\\sqrt",
    "π": "\\pi ",
    "∞": "\\infty ",
    "×": "\\times ",
    "−": "-",
    "²": "^2",
    "³": "^3",
    "\\approx": "≈",
}
UNITS = (
    "[ckm]?m|in|inch|inches|ft|feet|foot|yd|yards?|mi|miles?|[km]?g|pounds?|m?[lL]|units?|dollars?"
    "|(?:centi|kilo|milli)?meters?|(?:kilo)?grams?|liters?|s|sec|seconds?|min|minutes?|h|hr|hours?"
    "|days?|weeks?|years?|(?:square|sq\\.?|cubic) [a-z]+|[a-z]+ per [a-z]+|mph|m/s|km/h"
)
VALUE_AND_UNIT = rf"(.*(?:[\d)}}]|\\pi))( ?)((?:{UNITS})(?: ?\^ ?\{{?[23]\}}?)?)"  # 5 cm^2
NAME = r"^[A-Za-z\\][A-Za-z\\_{} ()]*\d?\}? ?[=≈]"  # m\widehat{AB} =, x_1 =
DEGREE = r"(?:\\circ|\\degree|[°º˚])"
DEGREES = rf"\^?\s*(?:\{{\s*{DEGREE}\s*\}}|{DEGREE})|\bdegrees?\b"  # 60^{\circ}
CHAIN = r"[\d.]+(?: ?(?:[-:&x]|\\times) ?[\d.]+)+"  # 5-3-2, 3:4, 4 \times 6
NO_FORMULA = r"\d \d|\)\d|&"  # 3 4, (1)2, 2 & 3
NO_FORMULA += r"|[\w)}] ?[-+]? ?\\infty|\\infty ?[\w+*/^-]"  # sympy decides on 2 - \infty by chance
LATEX = dict(
    is_real=True,
    conversion_config=ConversionConfig(lowercase_symbols=False),
    normalization_config=NormalizationConfig(malformed_operators=True, boxed="none"),
)
math_verify.grader.logger.disabled = True  # it would warn that the timeout is ours
# sympy can spend hours in C code on 9^{9^{9^9}}, so formulas are compared in a process that can be
# killed. It comes from a server that has loaded this file and no threads, so that a new one takes
# 0.1 s.
grading_context = multiprocessing.get_context("forkserver")
grading_context.set_forkserver_preload([Path(__file__).stem])
grading_process = pebble.ProcessPool(max_workers=1, context=grading_context)
grader_errors = collections.Counter()  # why answers could not be graded -> how many
# What an answer can do to it; any other error is the process pool's own.
UNGRADED = (TimeoutError, pebble.ProcessExpired, RecursionError, MemoryError, ValueError, TypeError)


def extract_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}, up to the brace that closes it, or None."""
    _, command, content = text.rpartition("\\boxed")
    content = content.lstrip()
    if not command or not content.startswith("{"):
        return None

    # An escaped brace, as in \{1, 2\}, is no brace.
    braces = content
    for escaped in ("\\\\", "\\{", "\\}"):
        braces = braces.replace(escaped, "  ")
    depth = 0
    for place, character in enumerate(braces):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if depth == 0:
            return content[1:place].strip()
    return None


def plain(text: str) -> str:
    """An answer without what LaTeX and habit add to its look."""
    for written, compared in LOOKS.items():
        text = text.replace(written, compared)
    text = re.sub(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}", r" \1 ", text)  # \text{cm}
    text = re.sub(DEGREES, " ", text)
    if not text.startswith(("(", "[", "{", "\\{")):
        text = re.sub(r"(?<=\d)(?:\{,\}|,)(?=\d{3}(?!\d))", "", text)  # 10,000
    text = re.sub(r"\\sqrt\s*(\d+|\([^()]*\))", r"\\sqrt{\1}", text)  # √3, √(x + 1)
    text = re.sub(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi ", text)
    return " ".join(text.split()).lstrip("=≈ ").rstrip(". ")


def value_and_unit(text: str) -> tuple[str, str]:
    found = re.fullmatch(VALUE_AND_UNIT, text)
    if not found:
        return text, ""
    value, space, unit = found.groups()
    if len(unit) == 1 and not space:
        return text, ""  # 2h is a product, 2 h are hours
    return value, re.sub("[ {}]", "", unit)


def is_letter(prediction: str, letter: str) -> bool:
    """B, (B), "B. 60" or "B) edge" for B, but not "A. B" or "A, C" for A."""
    if prediction.strip("()").lower() == letter.lower():
        return True
    found = re.fullmatch(rf"\(?{letter}(?:\)[.:]?|[.:])(.*)", prediction)
    return bool(found) and not re.fullmatch(r"\W*[A-H](?:\W+[A-H])*\W*", found[1])


def words_of(text: str) -> list[str]:
    """Words and products of variables, but no commands: AB, increases, not \\sin."""
    return sorted(re.findall(r"(?<![\\a-z])[a-z]{2,}", text.lower()))


def same_formula(prediction: str, answer: str) -> bool:
    """By math-verify."""
    formulas = []
    for text in (answer, prediction):
        if "," in text and not text.startswith(("(", "[", "{", "\\")):
            text = f"({text})"  # a list is a tuple: 3, 4 is not 4, 3
        formulas.append(latex2sympy(text, **LATEX))
    return bool(math_verify.verify(formulas[0], formulas[1], timeout_seconds=None))


def same(prediction: str, answer: str) -> bool:
    """Do two answers mean the same? It runs in the grading process."""
    prediction = plain(prediction)
    answer = plain(answer)
    if re.fullmatch(r"\(?[A-H]\)?", answer):
        return is_letter(prediction, answer.strip("()"))

    # 1. An option's letter where its value is asked: "B. 60" for 60.
    prediction = re.sub(r"^(?:\([A-H]\)|[A-H][.:)]) ", "", prediction)

    # 2. A name that only one of the two gives: x = 5 for 5.
    has_name = [("=" in text or "≈" in text) for text in (prediction, answer)]
    if has_name[0] != has_name[1]:
        prediction = re.sub(NAME, "", prediction)
        answer = re.sub(NAME, "", answer)

    # 3. Of 5√2 ≈ 7.07 the exact side counts. An equation is not a value: 2x = 60 is not 60.
    prediction = prediction.split("≈")[0].strip()
    answer = answer.split("≈")[0].strip()
    if ("=" in prediction) != ("=" in answer):
        return False

    # 4. Of two units one may be missing.
    prediction, unit = value_and_unit(prediction)
    answer, other_unit = value_and_unit(answer)
    if unit and other_unit and unit != other_unit:
        return False

    # 5. Equal as text, but for spaces. Those between numbers count, as 3 4 is not 34.
    prediction = re.sub(r"(?<!\d) | (?!\d)", "", prediction)
    answer = re.sub(r"(?<!\d) | (?!\d)", "", answer)
    if prediction.lower() == answer.lower():
        return answer != ""

    # 6. Where words stand, they must be equal: increases is not decreases.
    if words_of(prediction) != words_of(answer):
        return False

    # 7. Equal as formulas.
    for text in (prediction, answer):
        if text == "" or re.fullmatch(CHAIN, text) or re.search(NO_FORMULA, text):
            return False  # these are none
    try:
        return same_formula(prediction, answer)
    except Exception:  # it is no mathematics
        return False


def is_equivalent(prediction: str, answer: str) -> bool:
    """Do the two mean the same? A timeout or a crash is counted, and is no."""
    if max(len(prediction), len(answer)) > 400:  # nothing longer is compared as mathematics
        return prediction.strip() == answer.strip() != ""
    try:
        return grading_process.schedule(same, (prediction, answer), timeout=2).result()
    except UNGRADED as error:
        grader_errors[type(error).__name__] += 1
        return False


def reward(response: str, answer: str) -> float:
    """R = 1 if the last boxed expression of the response is equivalent to the answer, else 0."""
    boxed = extract_boxed(response)
    if boxed is None:
        return 0.0
    return float(is_equivalent(boxed, answer))  # Eq. 3


# ===== 12. Experts of its own, after IVR-R1 (arXiv 2605.23997), written from its abstract =========
# A wrong answer is cut before the first step that the policy doubts. The question is asked again,
# with the picture once more and a request to look, and the answer is continued from there, several
# times. The first right continuation becomes the group's expert; if there is none, a wrong one is
# cut in the next round.

LOOK = "Look once more, closely, and go on from where the answer stands."
DOUBTED = -2.0  # a token with a lower log-prob makes its step suspect


def before_doubt(answer: Trajectory, decode: Callable) -> int:
    """How many tokens stand before the first step (sentence or line) with a doubted token."""
    # The first one, as what follows a slip is doubted, too; if there is none, the least likely
    # token.
    cut = answer.behavior_logp.index(min(answer.behavior_logp))
    for place, logp in enumerate(answer.behavior_logp):
        if logp < DOUBTED:
            cut = place
            break
    # Back to where its step begins: behind a line break, or behind a full stop and a space.
    while cut > 0:
        seam = decode(answer.ids[cut - 1]) + decode(answer.ids[cut])[:1]
        if re.search(r"(?s)\n.|[.!?;]\s", seam):
            break
        cut -= 1
    return cut


def look_again(problem: Problem, begun: list[int], encoder: Encoder) -> Prompt:
    """The question with its picture and the request to look, then the answer's beginning."""
    question = f"{problem.question}\n{IMAGE * len(problem.images)} {LOOK}"
    prompt = encoder(dataclasses.replace(problem, question=question, images=problem.images * 2))
    offsets = torch.arange(1, len(begun) + 1)
    positions = prompt.positions[-1] + offsets[:, None]  # [T, 3]
    return dataclasses.replace(
        prompt,
        ids=torch.cat([prompt.ids, torch.tensor(begun, dtype=torch.long)]),
        positions=torch.cat([prompt.positions, positions]),
    )


def rectify(actor, encoder: Encoder, groups: list[Group], tries: int, rounds: int):
    """-> for each group [a right answer made of a wrong one] or [], and the share put right.

    Every token's behavior_logp is its log-prob under the prompt that it was really written with.
    """
    judge = Policy(actor, encoder.unwritable)
    experts = [[] for _ in groups]

    # A group's first wrong answer, with its log-probs.
    flawed = {}  # number of the group -> a group of that answer alone
    for number, group in enumerate(groups):
        wrong = [answer for answer in group.answers if answer.reward == 0]
        if wrong:
            flawed[number] = Group(group.problem, group.prompt, [dataclasses.replace(wrong[0])])
    n_flawed = len(flawed)
    for answer, logp in score(judge, list(flawed.values()), encoder.options.micro_batch):
        answer.behavior_logp = logp

    for _ in range(rounds):
        # Cut each before its first doubted step, and ask to look again from there.
        prompts = []
        for group in flawed.values():
            [prefix] = group.answers
            cut = before_doubt(prefix, encoder.tokenizer.decode)
            prefix.ids = prefix.ids[:cut]
            prefix.behavior_logp = prefix.behavior_logp[:cut]
            prompts.append(look_again(group.problem, prefix.ids, encoder))
        continuations = sample(actor, encoder, prompts, tries)

        # Take the first right continuation, or else the first one for the next round.
        still_flawed = {}
        for number, prompt, suffixes in zip(flawed, prompts, continuations, strict=True):
            problem = flawed[number].problem
            [prefix] = flawed[number].answers
            answers = []
            for suffix_ids in suffixes:
                ids = (prefix.ids + suffix_ids)[: encoder.options.max_answer]
                answers.append(grade(ids, problem, encoder))
            right = [answer for answer in answers if answer.reward == 1 and answer.finished]
            best = right[0] if right else answers[0]

            # The prefix has its log-probs. The suffix was written with this prompt.
            suffix = Trajectory(best.ids[len(prefix.ids) :], text="", reward=0.0)
            [(_, suffix_logp)] = score(judge, [Group(problem, prompt, [suffix])], size=1)
            best.behavior_logp = prefix.behavior_logp + suffix_logp
            if right:
                best.source = "self"
                best.is_expert = True
                experts[number] = [best]
            else:
                still_flawed[number] = Group(problem, prompt, [best])
        flawed = still_flawed

    n_right = sum(len(answers) for answers in experts)
    return experts, {"rectified": (n_right, n_flawed)}


def own_experts(options: Train) -> FindExperts | None:
    """For --experts self the function that makes them; else None, for the cache."""
    if options.experts != "self" or options.n_off == 0:
        return None
    return functools.partial(rectify, tries=options.tries, rounds=options.rounds)


# ===== 13. The toy, and the command line ==========================================================
# .toy/ holds questions, a student and an expert, made once; its README says how, and how good they
# are.

TOY_WORLD = Path(__file__).resolve().parent / ".toy"
TOY = dict(  # how the toy's questions are asked and answered
    instruction="Think first.",
    min_pixels=56 * 56,
    max_pixels=56 * 56,
    max_answer=80,
    generate_batch=192,
    micro_batch=8,
)


@dataclasses.dataclass
class Toy:
    """Train the toy's student without and with its expert, and compare."""

    algorithm: Literal["dapo", "grpo"] = "dapo"  # DAPO beside TGRL-DAPO, or GRPO beside TGRL-GRPO
    experts: Literal["cache", "self"] = "cache"  # of the expert model, or made by the policy itself
    steps: int = 32  # of each training
    seed: int = 1  # of the order of questions and of sampling
    out: str = "runs/toy"  # folder of all files


def accuracy_of(model: str, data: Path) -> float:
    actor, processor = load_model(model)
    encoder = Encoder(processor, actor, Options(**TOY))
    n_right, n = greedy_accuracy(actor, encoder, load_problems(str(data), "test", encoder))
    return n_right / n


def toy(options: Toy):
    started = time.perf_counter()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise BadInput("the toy is for one process; start it by `python tgrl.py`")
    if not TOY_WORLD.exists():
        raise BadInput(f"no folder {TOY_WORLD}; it comes with the repository, beside tgrl.py")

    data = f"{TOY_WORLD}/train.parquet"
    experts = "self"
    if options.experts == "cache":
        experts = f"{options.out}/experts.jsonl"
        make_experts(
            Experts(model=f"{TOY_WORLD}/expert", data=data, experts=experts, samples=2, **TOY)
        )

    accuracy = {}
    for n_on, n_off in ((8, 0), (7, 1)):
        training = Train(
            model=f"{TOY_WORLD}/student",
            data=data,
            val_data=f"{TOY_WORLD}/test.parquet",
            experts=experts,
            algorithm=options.algorithm,
            n_on=n_on,
            n_off=n_off,
            steps=options.steps,
            questions_per_rollout=24,
            questions_per_update=24,
            max_draws=2 if options.algorithm == "dapo" else 1,
            lr=4e-4,
            checkpointing=False,
            every=4,
            seed=options.seed,
            **TOY,
        )
        training.out = f"{options.out}/{training.method}"
        shutil.rmtree(training.out, ignore_errors=True)  # of an earlier toy
        known = train(training, own_experts(training))["accuracy"]
        unseen = accuracy_of(f"{training.out}/model", TOY_WORLD / "unseen.parquet")
        accuracy[training.method] = known, unseen

    print(f"\nGreedy accuracy after {options.steps} steps of 24 questions, 8 answers to each:")
    print(f"  {'':10} new pictures   new pairs of sides")
    for method, (known, unseen) in accuracy.items():
        print(f"  {method:10} {known:12.1%} {unseen:20.1%}")
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} seconds; to look at both: python eval.py show {options.out}/*PO")


LEAST = {"n_on": 2, "n_off": 0, "seed": 0}  # of all other whole numbers 1


def check_numbers(options):
    for name, value in vars(options).items():
        if type(value) is int and value < LEAST.get(name, 1):
            raise BadInput(f"--{name} must be at least {LEAST.get(name, 1)}, not {value}")


def main():
    try:
        options = tyro.cli(
            Toy | Experts | Train, default=Toy(), description=__doc__, use_underscores=True
        )
        check_numbers(options)
        if isinstance(options, Toy):
            toy(options)
        elif isinstance(options, Experts):
            make_experts(options)
        else:
            train(options, own_experts(options))
        torch.distributed.destroy_process_group()
    except (BadInput, OSError, KeyboardInterrupt) as error:
        raise SystemExit(f"tgrl.py: {str(error) or 'stopped'}") from None


def leave():
    """End the process at once. A thread that a library left behind may abort Python's own end: then
    torchrun calls a run failed of which all is written."""
    grading_process.stop()
    grading_process.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
    leave()

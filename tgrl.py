"""TGRL: Trajectory-Guided Reinforcement Learning for multimodal RLVR (arXiv 2603.26126), the whole method in one file.

    python tgrl.py                                          the method on a toy world, on a CPU, in minutes
    python tgrl.py experts --data hiyouga/geometry3k        sample, score and grade expert answers into a cache
    python tgrl.py train --data hiyouga/geometry3k          train Qwen2.5-VL-3B with them, on one device ...
    torchrun --nproc-per-node 8 tgrl.py train ...           ... or on eight, by the same lines
    python tgrl.py train --help                             every option, and where its default comes from

A question with a picture gets a *group* of answers: most are written by the policy, a few by a stronger model. All are
graded by rule and compared within the group. An expert's token counts by rho*w: the importance ratio, times a weight that is
larger the more the policy underestimates the token, compared with the others of its answer.

Sections: the formulas, then what feeds them, then what drives them (draw, sample, grade, compare, pack, log-probs, loss, step):
    1 options   2 reward (Eq. 3)   3 loss (Eq. 15-25)   4 questions and prompts   5 a group is one row
    6 rollouts  7 experts          8 training           9 the toy world
Eq. 5-12 are the paper's analysis and have no code: nothing here tells perception tokens from reasoning tokens.
eval.py looks at models and runs; README.md has a table of what the paper leaves open, and what is chosen here and why.

Tensor shapes have one alphabet: B questions, G answers a question, N = B*G trajectories, P prompt tokens, T answer tokens,
R packed rows, L tokens a row, D hidden size, V vocabulary. Names for the paper's symbols:
    beta    in Eq. 20 -> sharpness             beta    in Eq. 2, 24       -> kl_coef     log pi_theta           -> logp
    sigma   in Eq. 20 -> sigmoid               sigma   in Eq. 15-19       -> std         log pi_old, log pi_phi -> behavior_logp
    epsilon in a clip -> clip_low, clip_high   epsilon in a denominator   -> eps         m (there: mask)        -> expert_ok
    r~ -> coefficient                          rho, Delta -> ratio, delta                mask here              -> not padding
"""

import argparse
import base64
import collections
import contextlib
import copy
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
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
import statistics
import subprocess
import sys
import threading
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, send_to_device
from PIL import Image, ImageDraw
from qwen_vl_utils import fetch_image, smart_resize
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor, DynamicCache, GenerationConfig
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

# ===== 1. Options: one dataclass; the command line is made from it ====================================================

# In [brackets]: where a default comes from. Without any, it is ours and says only how to run. yes/no fields: --name, --no-name.

THINK = (
    "Think it through first, step by step, between <think> and </think>. "
    "After that, give the final answer, and nothing but the answer, inside \\boxed{}."
)


class BadInput(ValueError):
    """Something the user can mend: the message says what was wrong, where, and what to do."""


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    # what is read and written
    model: str = option("Qwen/Qwen2.5-VL-3B-Instruct", "who answers: the student (train) or the expert (experts); hub id or folder [paper]")
    data: str = option("hiyouga/geometry3k", "questions: hub id, .parquet, .jsonl, or a folder of them or of images [paper]")
    split: str = option("train", "split of a hub data set or folder")
    image_root: str = option("", "folder that relative image paths start from; empty: the data file's own folder")
    experts: str = option("experts.jsonl", "cache of expert answers; train also takes self, or cache.jsonl,self: the policy rectifies its own [IVR-R1]")
    val_data: str = option("", "held-out questions for greedy accuracy during training; empty: none")
    val_split: str = option("test", "split of val_data")
    out: str = option("runs/train", "folder of the run: metrics.jsonl, groups.jsonl, checkpoints, the trained model")
    # the question as the model sees it
    instruction: str = option(THINK, "appended to each question [asks for what EasyR1's asks, in our words]")
    system_prompt: bool = option(False, "put the instruction into the system turn [NoisyRollout], not behind the question [EasyR1]")
    min_pixels: int = option(262144, "smaller pictures are enlarged to this many pixels [EasyR1]")
    max_pixels: int = option(4194304, "larger pictures are reduced to this many pixels [EasyR1]")
    max_prompt: int = option(2048, "questions of more tokens are left out, never cut [EasyR1]")
    max_answer: int = option(2048, "answers end after this many tokens [EasyR1]")
    # the method; None: by algorithm, see BY_ALGORITHM
    algorithm: str = option("dapo", "dapo or grpo; with n_off > 0 TGRL-DAPO or TGRL-GRPO [paper]")
    n_on: int = option(7, "answers of the policy in a group [paper, Geo3K; 4 for ViRL39K]")
    n_off: int = option(1, "answers of the expert in a group; 0: plain GRPO or DAPO, for which take --n_on 8 [paper]")
    sharpness: float | None = option(None, "beta of Eq. 20 [paper: 5 for grpo, 14 for dapo]")
    reweight: bool = option(True, "weigh expert tokens by Eq. 18-20; no: w = 1, and rho stays [paper, Table 1, as we read it]")
    filter: bool = option(True, "give wrong expert answers no weight, Eq. 22; no: m = 1 [paper, Table 1]")
    prefer_correct: bool = option(False, "take a correct expert answer first if the cache has one [choice]")
    clip_low: float | None = option(None, "lower clip of the coefficient [EasyR1: 0.2]")
    clip_high: float | None = option(None, "upper clip [EasyR1: 0.28 for dapo; Eq. 24 is symmetric, so 0.2 for grpo]")
    kl_coef: float | None = option(None, "beta of Eq. 24 [EasyR1: 0.01 for grpo; DAPO has none]")
    token_mean: bool | None = option(None, "average over tokens (Eq. 25), not over trajectories (Eq. 24) [by algorithm]")
    dynamic_sampling: bool | None = option(None, "draw again for groups without contrast [DAPO: yes, GRPO: no]")
    max_draws: int = option(20, "rounds of drawing before a batch is completed with such groups [EasyR1]")
    # the optimisation
    epochs: int = option(15, "sets the number of steps; dynamic sampling draws more questions than these passes have [paper: 15 Geo3K, 2 ViRL39K]")
    steps: int = option(0, "steps (rollout, then updates); 0: from epochs")
    questions_per_rollout: int = option(512, "questions a step, over all processes [EasyR1 rollout_batch_size]")
    questions_per_update: int = option(128, "questions an optimizer update [EasyR1 global_batch_size]")
    micro_batch: int = option(1, "groups a forward pass on one process [EasyR1: 1]")
    lr: float = option(1e-6, "learning rate of AdamW, constant [EasyR1]")
    weight_decay: float = option(0.01, "of AdamW [EasyR1]")
    max_grad_norm: float = option(1.0, "gradient clipping [EasyR1]")
    freeze_vision: bool = option(False, "do not train the vision tower [EasyR1: trained]")
    checkpointing: bool = option(True, "recompute activations in the backward pass, to save memory [EasyR1]")
    # the rollouts
    generate_batch: int = option(64, "answers generated at once on one process")
    tries: int = option(8, "self: continuations sampled from the step before which an answer is cut")
    rounds: int = option(3, "self: cuts, each one step before the last, until a continuation is right")
    # the experts command
    samples: int = option(4, "experts: answers sampled a question")
    until_correct: bool = option(False, "experts: sample one by one, and no more once one is right")
    score: str = option("", "experts: instead of sampling, score the answers in this .jsonl, lines of {row, text}, as if --model had written them")
    assume_certain: bool = option(False, "experts: with --score, store log-prob 0 for each token: of a closed model none is known")
    spread: bool = option(False, "experts: one process, the model spread over all GPUs (device_map auto), if it does not fit one")
    stats: str = option("", "experts: only tell what is in this cache")
    # what is shown and kept
    eval_every: int = option(5, "steps between greedy evaluations on val_data [EasyR1]")
    show_every: int = option(10, "steps between groups recorded for groups.html")
    save_every: int = option(5, "steps between checkpoints to continue from; 0: none [EasyR1]")
    keep: int = option(3, "checkpoints kept [EasyR1]")
    resume: bool = option(False, "continue the run in --out from its newest whole checkpoint")
    dry_run: bool = option(False, "check everything, run the largest rollout and update once, tell time and memory, write nothing")
    tracker: str = option("tensorboard", "any tracker accelerate knows (tensorboard, wandb, ...), or none")
    limit: int = option(0, "use only the first so many rows, of data and of val_data; 0: all")
    seed: int = option(1, "of data order and sampling [EasyR1]")

    BY_ALGORITHM: typing.ClassVar = {
        "grpo": dict(sharpness=5.0, clip_low=0.2, clip_high=0.2, kl_coef=0.01, token_mean=False, dynamic_sampling=False),
        "dapo": dict(sharpness=14.0, clip_low=0.2, clip_high=0.28, kl_coef=0.0, token_mean=True, dynamic_sampling=True),
    }

    def __post_init__(self):
        if self.algorithm not in self.BY_ALGORITHM:
            raise BadInput(f"--algorithm is {self.algorithm!r}; it can be {' or '.join(self.BY_ALGORITHM)}")
        for name, value in self.BY_ALGORITHM[self.algorithm].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if not self.reweight:
            self.sharpness = None  # w = 1
        least = dict(n_on=2, n_off=0, steps=0, save_every=0, limit=0, seed=0)  # n_on: not every question has an expert to compare with
        for f in dataclasses.fields(self):
            value, bound = getattr(self, f.name), least.get(f.name, int(f.type is int))
            if isinstance(value, int | float) and value < bound:
                raise BadInput(f"--{f.name} is {value}; it must be at least {bound}")
        if self.questions_per_rollout % self.questions_per_update:
            raise BadInput(
                f"--questions_per_rollout {self.questions_per_rollout} is not a multiple of "
                f"--questions_per_update {self.questions_per_update}; every update needs its full share"
            )
        if (self.assume_certain and not self.score) or (self.until_correct and self.score):
            raise BadInput("--assume_certain is for texts that --score names, and --until_correct for answers that are sampled")
        if self.min_pixels > self.max_pixels:
            raise BadInput(f"--min_pixels {self.min_pixels} is larger than --max_pixels {self.max_pixels}")

    @property
    def rectifies(self) -> bool:
        return self.n_off > 0 and "self" in self.experts.split(",")

    @property
    def cache(self) -> str:
        return ",".join(part for part in self.experts.split(",") if part != "self") if self.n_off else ""

    @property
    def method(self) -> str:
        return ("TGRL-" if self.n_off else "") + self.algorithm.upper() + ("-self" if self.rectifies else "")


# ===== 2. Reward: is the boxed answer right?   Eq. 3 ==================================================================


def extract_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} whose braces are balanced (of nested ones, the inner), or None."""
    boxes, open_braces = [], []  # one pass: a policy may write ten thousand \boxed{ in a row
    # the tokens: the head of a box, an escaped character (not a brace), a brace
    for token in re.finditer(r"\\boxed\s*\{|\\(?!\\boxed).|[{}]", text, re.DOTALL):
        if token[0] == "}" and open_braces:
            opening = open_braces.pop()
            if opening[0] != "{":
                boxes.append((opening.end(), token.start()))
        elif token[0][-1] == "{" and token[0] != r"\{":
            open_braces.append(token)
    return text[slice(*max(boxes))].strip() if boxes else None


MAX_ANSWER_CHARS = 400  # nothing longer is compared as mathematics
UNICODE = str.maketrans({"²": "^2", "³": "^3", "√": r"\sqrt ", "∞": r"\infty ", "∠": r"\angle ", "º": "°", "˚": "°", "≈": "="})
SHORT_UNIT = r" ?((?:deg|in|ft|yd|mi|kg|ml|[cdkm]?m)(?:/[a-z]+)?)"
NO_UNIT = r"(?!(?:or|and|plus|over|sin|cos|tan|sec|log|ln) |hundred|thousand|[mb]illion)"  # 2 sin xy is no amount of sins
LONG_UNIT = rf" {NO_UNIT}((?:sq|[A-Za-z]{{3,}})(?:[ ./]+[A-Za-z]{{2,}})*\.?)"  # with a space before: 2xyz is algebra
ABBREVIATIONS = {
    "square ": "sq ", "sq. ": "sq ", "kilo": "k", "centi": "c", "milli": "m", "meter": "m", "metre": "m", "degree": "deg", "inche": "in",
    "inch": "in", "feet": "ft", "foot": "ft", "yard": "yd", "mile": "mi", "gram": "g", "minute": "min", "second": "sec",
}  # fmt: skip


def without_latex(text: str) -> str:
    """Without formula signs, text commands and spaces."""
    text = re.sub(r"(?<!\\)\\[\[\]()]|\\?\$", "", text)  # a $ left inside would be read as two formulas
    text = re.sub(r"\\(?:text|math)(?:rm|bf|it|normal)?\s*\{([^{}]*)\}", r" \1 ", text)
    return re.sub(" +", " ", re.sub(r"(?<!\\)\\(?:[,;:! ]|q?quad\b)|[\s~]", " ", text))


def _normalize(text: str) -> tuple[str, str]:
    """(value, unit): only what math-verify does not know of how Geo3K, ViRL39K and models write an answer."""
    text = text if (inner := extract_boxed(text)) is None else inner
    text = without_latex(text.translate(UNICODE).replace(r"\approx", "="))
    text, degrees = re.subn(r"\^ ?\{? ?\\circ ?\}?|\\degree|\^?°", "", re.sub(" +", " ", text))
    text = re.sub(r"\\sqrt ?(\d+|\([^()]*\))", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi", text)
    text = text.strip(" =").removesuffix(".").strip()
    match = re.fullmatch(rf"(.*(?:[\d)}}π]|\\pi))(?:{SHORT_UNIT}|{LONG_UNIT})( ?\^ ?\{{? ?[23] ?\}}?)?", text)
    if not match:
        return text, "deg" if degrees else ""
    unit = (match[2] or match[3]).lower()
    for long, short in ABBREVIATIONS.items():
        unit = unit.replace(long, short)
    unit = re.sub("^sq (.*)", r"\1^2", unit.strip(" .").removesuffix("s")) + re.sub("[ {}]", "", match[4] or "")
    return match[1], "" if "unit" in unit else unit  # 5 square units are 5 cm^2, too


class _MathVerify:
    """math-verify in a process of its own, so that it can be stopped.

    sympy can spend hours in one call of C code, 9^{9^{9^9}}, where no Python handler of a signal runs. So the worker forks
    a child to do the work: an alarm that nobody handles kills it after two seconds, and the next is there at once.
    """

    WORKER = r"""
import json, logging, os, resource, signal, sys
signal.alarm(120)
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
logging.disable(logging.CRITICAL)
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=NormalizationConfig(malformed_operators=True, nits=True))
read = lambda text: parse(f"${text}$", [config], parsing_timeout=None, raise_on_error=True)
reply = lambda value: print(json.dumps(value), flush=True)
reply("ready")
signal.alarm(0)
while child := os.fork():
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0: sys.exit()
    reply("timeout" if code == -signal.SIGALRM else "crash")
for line in sys.stdin:
    signal.alarm(2)
    try:
        prediction, answer = map(read, json.loads(line))
        verdict = bool(verify(answer, prediction, timeout_seconds=None, raise_on_error=True))
    except BaseException as error: verdict = type(error).__name__
    signal.alarm(0)
    reply(verdict)
"""

    def __init__(self):
        self.lock, self.worker = threading.Lock(), None
        self.errors = collections.Counter()  # reason -> pairs without a verdict: reported with the metrics, never silent

    def start(self) -> subprocess.Popen:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        worker = subprocess.Popen([sys.executable, "-c", self.WORKER], start_new_session=True, **pipes)  # out of Ctrl-C's reach
        if worker.stdout.readline() != b'"ready"\n':
            raise RuntimeError("math-verify does not start; try `python -c 'import math_verify'`")
        return worker

    @functools.lru_cache(maxsize=100_000)
    def __call__(self, prediction: str, answer: str) -> bool:
        with self.lock:
            worker, self.worker = self.worker or self.start(), None
            try:
                worker.stdin.write(json.dumps([prediction, answer]).encode() + b"\n")
                verdict = json.loads(worker.stdout.readline())
                self.worker = worker  # only now: one that died, or still owes a reply after Ctrl-C, is never asked again
            except (OSError, ValueError):
                verdict = "crash"
            if isinstance(verdict, str):
                self.errors[verdict] += 1
            return verdict is True


math_verify = _MathVerify()
os.register_at_fork(after_in_child=math_verify.__init__)  # a forked process starts a worker of its own


def is_equivalent(prediction: str, answer: str) -> bool:
    """Do the two mean the same?  Choices and words by rule, everything else by math-verify."""
    if max(len(prediction), len(answer)) > MAX_ANSWER_CHARS:
        return prediction.strip() == answer.strip() != ""
    (prediction, unit), (answer, answer_unit) = _normalize(prediction), _normalize(answer)
    if not prediction or not answer or (unit and answer_unit and unit != answer_unit):
        return False
    if prediction == answer:
        return True
    choice = re.fullmatch(r"(?i)\(?([A-H])(?:\)[.:]?|[.:]|$) ?(.*)", prediction)  # "B", "(B)", "B. 60"
    if letter := re.fullmatch(r"(?i)\(?([A-H])\)?", answer):
        return bool(choice) and choice[1].lower() == letter[1].lower() and not re.fullmatch("[A-H(),.: ]+", choice[2])  # nor "A. B"
    if choice and choice[2]:  # "B. 60", where the answer is the value
        prediction = choice[2]
    if ("=" in prediction) != ("=" in answer):  # m\widehat{AB} = 60, but not 2x + 1 = 60
        prediction, answer = (re.sub(r"^[^\d=<>!+*/^,-]+= *", "", text) for text in (prediction, answer))
    if len({re.sub(r" |\\?%$", "", text).lower() for text in (prediction, answer)}) == 1:
        return True
    if prediction.isdecimal() and answer.isdecimal():
        return int(prediction) == int(answer)  # the usual case, without the few milliseconds of the general one
    if re.fullmatch("[A-Za-z ]+", prediction) or re.fullmatch("[A-Za-z ]+", answer):
        return False  # words are no products of letters: AB is not BA
    return math_verify(prediction, answer)


def reward(response: str, answer: str) -> float:
    """R = 1 if the last boxed expression of the response is equivalent to the answer, else 0.   Eq. 3"""
    return float(is_equivalent(extract_boxed(response) or "", answer))  # Eq. 3


# ===== 3. The loss: Eq. 15-25.   Everything down to the end of this section needs torch alone; copy it as it is. ======
# Where the paper is silent: std is unbiased, as in EasyR1; no gradient flows through w; a filtered expert loses its gradient, but
# its reward stays in the group's mean and std, and its tokens in the denominators; KL is estimated on the policy's tokens alone.
# Two things keep it short. Each trajectory brings `behavior_logp`, the log-probs under whoever wrote it, pi_old for the
# policy's own answers and pi_phi for the expert's, so that the PPO ratio and Eq. 17 are the same line. And `shares`
# says beforehand how much each token counts, so that a batch may be split over micro-batches and devices at will.


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """rewards [B, G] of whole groups, policy and expert answers together (Eq. 14) -> advantages [B, G]."""
    if rewards.shape[1] < 2:
        raise ValueError(f"an advantage compares answers; a group of {rewards.shape[1]} has nothing to compare")
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)  # [B, 1] std over n - 1  Eq. 15
    return (rewards - mean) / (std + eps)  # Eq. 16


@torch.no_grad()
def expert_weights(logp: Tensor, behavior_logp: Tensor, mask: Tensor, sharpness: float, eps: float = 1e-6) -> Tensor:
    """w [N, T] in [0, 1]: how much the policy underestimates a token, compared with the others of its trajectory. Held constant."""
    mask = mask.bool()
    delta = torch.where(mask, behavior_logp - logp, 0)  # [N, T]  Eq. 18
    count = mask.sum(1, keepdim=True)  # [N, 1]
    mean = delta.sum(1, keepdim=True) / count.clamp(min=1)
    deviation = torch.where(mask, delta - mean, 0)
    std = (deviation.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    normalized = deviation / (std + eps)  # Eq. 19
    return torch.sigmoid(sharpness * normalized)  # Eq. 20


def unified_coefficient(logp: Tensor, behavior_logp: Tensor, mask: Tensor, is_expert: Tensor, expert_ok: Tensor,
                        sharpness: float | None) -> Tensor:  # fmt: skip
    """r~ [N, T]: the importance ratio, for expert rows times m*w. is_expert, expert_ok: bool [N]; sharpness None: w = 1."""
    # where: padding may hold anything. clamp: beyond e^20 there is no gradient, where there was next to none or a blow-up.
    # rho is e^-Delta: what the policy underestimates most has the largest w and the smallest rho. That is Eq. 21 as printed.
    ratio = torch.where(mask.bool(), logp - behavior_logp, 0).clamp(-20, 20).exp()  # [N, T]  Eq. 17, and pi_theta / pi_old
    w = 1.0 if sharpness is None else expert_weights(logp, behavior_logp, mask, sharpness)  # Eq. 18-20
    f = ratio * w  # Eq. 21
    m = expert_ok.to(f.dtype)[:, None]  # [N, 1]  Eq. 22
    return torch.where(is_expert[:, None], m * f, ratio)  # Eq. 23


def token_shares(mask: Tensor, algorithm: str, n_trajectories: int | None = None, n_tokens: int | None = None) -> Tensor:
    """[N, T]: what each token counts in the objective. Totals are those of the whole update; default: of this batch."""
    mask = mask * 1.0
    if algorithm == "grpo":
        length = mask.sum(1, keepdim=True).clamp(min=1)
        return mask / length / (n_trajectories or len(mask))  # 1/G 1/|o_i|, over all groups of the update  Eq. 24
    if algorithm == "dapo":
        return mask / (n_tokens or mask.sum().clamp(min=1))  # 1/sum |o_i|, summed over all groups of the update  Eq. 25
    raise ValueError(f"algorithm is {algorithm!r}; it can be 'grpo' or 'dapo'")


def tgrl_loss(logp: Tensor, behavior_logp: Tensor, mask: Tensor, advantages: Tensor, is_expert: Tensor, expert_ok: Tensor,
              shares: Tensor, *, sharpness: float | None, clip_low: float, clip_high: float, kl_coef: float = 0.0,
              ref_logp: Tensor | None = None) -> tuple[Tensor, dict]:  # fmt: skip
    """-> (loss, metrics).  logp, behavior_logp, mask (bool), shares, ref_logp: [N, T];  advantages, is_expert, expert_ok (bool): [N].

        advantages = group_advantages(rewards).flatten()  # rewards [B, G], N = B * G
        shares = token_shares(mask, "grpo")  # of a batch that is split: give the totals of the whole
        loss, metrics = tgrl_loss(logp, behavior_logp, mask, advantages, is_expert, rewards.flatten() == 1, shares,
                                  sharpness=5.0, clip_low=0.2, clip_high=0.2)

    Log-probs in float32; padding may hold anything. Without expert rows this is GRPO (Eq. 2) or DAPO (Eq. 4) exactly. A filtered
    expert adds a constant to the loss and no gradient. Metrics are (sum, count) pairs, which add up over micro-batches and
    devices, and leave filtered experts out.
    """
    coefficient = unified_coefficient(logp, behavior_logp, mask, is_expert, expert_ok, sharpness)  # [N, T]  Eq. 17-23
    advantage = advantages[:, None]  # [N, 1]
    clipped = coefficient.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(coefficient * advantage, clipped * advantage)  # [N, T]
    loss = -(shares * surrogate).sum()  # Eq. 2, 4, 24, 25

    mask = mask.bool()
    own = mask & ~is_expert[:, None]  # the policy's tokens [N, T]
    taught = mask & (is_expert & expert_ok)[:, None]  # the kept experts' tokens
    cut = coefficient * advantage > clipped * advantage  # where the clip stops the gradient
    pair = lambda value, where: (torch.where(where, value.detach(), 0).sum(), where.sum())  # noqa: E731
    metrics = {
        "objective": (pair(shares * surrogate, own | taught)[0], shares.sum()),
        "entropy": pair(-logp, own),  # estimated by -log pi of the sampled tokens
        "ratio": pair(coefficient, own),
        "clipped": pair(cut.float(), own),
        "expert_coefficient": pair(coefficient, taught),
        "expert_clipped": pair(cut.float(), taught),
        "expert_logp": pair(logp, taught),
        "expert_delta": pair(behavior_logp - logp, taught),
    }
    if kl_coef:
        if ref_logp is None:
            raise ValueError("kl_coef needs ref_logp, the log-probs of the reference")
        gap = torch.where(own, ref_logp - logp, 0).clamp(-20, 20)  # the estimator needs samples of the policy; experts' shares are dropped
        k3 = gap.expm1() - gap  # e^gap - 1 - gap, precise where it is small
        loss = loss + kl_coef * (shares * k3).sum()  # Eq. 2, 24
        metrics["kl"] = pair(k3, own)
    return loss, metrics


# --- the part to copy ends here ---------------------------------------------------------------------------------------

# ===== 4. Questions and prompts =======================================================================================

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a fork (of the grader) warns
transformers.utils.logging.disable_progress_bar()  # of loading and saving; ours show what takes long
PATCH, MERGED = 14, 28  # Qwen2.5-VL: a patch is 14 pixels wide; 2 x 2 of them become one token
PLACEHOLDER = "<image>"
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}  # nothing truncated: log-probs are of what is sampled


def batches(items: list, size: int):
    """At least one item each: a question's answers are generated together, be they more than --generate_batch."""
    size = max(1, size)
    return (items[i : i + size] for i in range(0, len(items), size))


def say(text: str):
    """Print, once however many processes run, and above the progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)


@contextlib.contextmanager
def naming_memory(what: str, lower: str):
    """Out of memory becomes a message that says in what, and which option to lower."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):  # the latter is a CPU's
            raise
        raise BadInput(f"out of memory in {what}; lower {lower}\n{str(error).splitlines()[0]}") from error


def start_processes(**options) -> Accelerator:
    """Device, process group and reductions. While one process samples, others wait: longer than the usual ten minutes."""
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=6))
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience], **options)


@dataclass
class Problem:
    id: str  # a hash of the content, so that a cache of answers survives reordering and subsets
    question: str  # with one <image> where each picture goes
    images: list[bytes]  # encoded pictures, decoded when needed
    answer: str
    row: int = -1  # where it stands in the data


def picture_bytes(source, root: Path) -> bytes:
    """A picture as rows hold it (PIL image, bytes, a path, the hub's {bytes, path}) -> its encoded bytes."""
    picture = datasets.Image().encode_example(source)
    return picture["bytes"] or (root / picture["path"]).read_bytes()


def open_picture(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    if image.has_transparency_data:  # black lines on nothing become black lines on white, not black on black
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def read_problem(row: dict, root: Path) -> Problem:
    """One row in the schema of geometry3k (images, problem, answer) or ViRL39K (image, question, answer)."""
    question = str(row.get("problem") or row.get("question") or "").strip()
    answer = str("" if row.get("answer") is None else row["answer"]).strip()
    answer = extract_boxed(answer) or answer  # ViRL39K writes \boxed{42}
    if not question or not answer:
        raise BadInput("no answer" if question else "no question")
    if control := re.search(r"<\|\w+\|>", question):
        raise BadInput(f"{control[0]} in the question, which is no text to the model")
    images = row.get("images") or row.get("image") or []
    images = images if isinstance(images, list) else [images]
    try:
        images = [picture_bytes(image, root) for image in images]
        sizes = [open_picture(image).size for image in images]
    except FileNotFoundError as error:
        raise BadInput(f"picture not found, {error.filename}") from error
    except Exception as error:  # PIL raises nearly anything on a broken file
        raise BadInput(f"unreadable picture, {type(error).__name__}") from error
    for width, height in sizes:
        if min(width, height) < PATCH or max(width, height) > 200 * min(width, height):  # 200: the model's own limit
            raise BadInput(f"picture of {width} x {height} pixels")
    if len(images) == 1 and PLACEHOLDER not in question:
        question = PLACEHOLDER + question  # some 2 % of ViRL39K lost theirs
    if question.count(PLACEHOLDER) != len(images):
        raise BadInput(f"{question.count(PLACEHOLDER)} times {PLACEHOLDER} for {len(images)} pictures")
    content = hashlib.sha256(repr((question, answer)).encode())
    for image in images:
        content.update(image)
    return Problem(content.hexdigest()[:16], question, images, answer)


def check_exists(*sources: str):
    """A file that is not there is said at once, before a model is loaded."""
    for source in sources:
        if source.endswith((".jsonl", ".json", ".parquet")) and not Path(source).exists():
            raise BadInput(f"{source} does not exist (looked in {Path.cwd()})")


def read_rows(source: str, split: str, config: str | None = None) -> typing.Iterator[dict]:
    """Rows of a hub data set (or one of its configurations), a parquet or JSONL file, or a folder of them or of images with metadata.jsonl."""
    check_exists(source)
    if source.endswith((".jsonl", ".json")):
        lines = Path(source).read_text(encoding="utf-8").split("\n")  # splitlines would also split inside of some strings
        for number, line in ((n, line) for n, line in enumerate(lines, 1) if line.strip()):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise BadInput(f"{source}, line {number} is no JSON object; one object a line is expected")
            yield row
        return
    try:
        if source.endswith(".parquet"):
            table = datasets.load_dataset("parquet", data_files=source, split="train")
        else:
            table = datasets.load_dataset(source, config, split=split)
    except Exception as error:
        hint = "Give a hub id (which needs the network once), a .parquet or .jsonl file, or a folder of such files."
        raise BadInput(f"cannot load {source!r}, split {split!r}: {error}\n{hint}") from error
    for batch in table.with_format("arrow").iter(64):  # arrow: pictures stay encoded, so a broken one harms no other row
        yield from batch.to_pylist()


def picture_root(source: str, image_root: str) -> Path:
    """Where relative picture paths start."""
    return Path(image_root or (source if Path(source).is_dir() else Path(source).parent))


def report_left_out(source, left_out: list[tuple[int, str]], total: int, unit: str = "row", place: str = "", fate: str = "left out"):
    """(number, reason) pairs -> one message, a line a reason; the numbers are those of a unit, or of its place."""
    if left_out:
        say(f"{source}: {len(left_out)} of {total} {unit}s {fate}")
    for reason, same in itertools.groupby(sorted(left_out, key=lambda x: (x[1], x[0])), key=lambda x: x[1]):
        numbers = [str(number) for number, _ in same]
        say(f"  {reason}: {place or unit} {', '.join(numbers[:8])}" + f" and {len(numbers) - 8} more" * (len(numbers) > 8))


def load_problems(source: str, split: str = "train", image_root: str = "", limit: int = 0) -> list[Problem]:
    """All questions that can be used; the others are left out and reported together."""
    root = picture_root(source, image_root)

    def read(number, row):
        try:
            return dataclasses.replace(read_problem(row, root), row=number)
        except BadInput as reason:
            return str(reason)

    rows = itertools.islice(read_rows(source, split), limit or None)
    first = next(rows, {})
    for names in (("problem", "question"), ("answer",)):
        if not any(name in first for name in names):
            raise BadInput(f"{source} has no column {' or '.join(names)}; its columns are: {', '.join(first) or 'none, it is empty'}")
    with ThreadPoolExecutor() as pool:  # decoding pictures is most of the work, and runs outside the interpreter lock
        results = list(pool.map(read, itertools.count(), itertools.chain([first], rows)))
    report_left_out(source, [(n, r) for n, r in enumerate(results) if isinstance(r, str)], len(results))
    problems = [r for r in results if isinstance(r, Problem)]
    if not problems:
        raise BadInput(f"{source}: none of its {len(results)} rows can be used")
    return problems


@dataclass
class Prompt:
    ids: Tensor  # [P] each picture expanded to its image tokens
    positions: Tensor  # [P, 3] time, height, width
    pixels: Tensor | None  # [patches, 3 * 2 * 14 * 14]
    grid: Tensor | None  # [pictures, 3]

    def followed_by(self, ids: list[int]) -> "Prompt":
        """The same with the beginning of an answer behind it, where positions go on by one a token."""
        places = self.positions[-1] + torch.arange(1, len(ids) + 1)[:, None]  # [T, 3]
        ids = torch.cat([self.ids, torch.tensor(ids, dtype=torch.long)])
        return dataclasses.replace(self, ids=ids, positions=torch.cat([self.positions, places]))


class Encoder:
    """Question -> prompt, the same way for rollouts, experts, training and evaluation."""

    def __init__(self, processor, model, cfg: Config):
        self.processor, self.tokenizer, self.cfg = processor, processor.tokenizer, cfg
        self.rope_index = model.model.get_rope_index
        # Every token that ends an answer; Qwen has two, one of which, <|endoftext|>, is the padding as well.
        ends = model.generation_config.eos_token_id
        self.ends = sorted({self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])})
        # What no answer may hold: vision tokens, which would crash the next forward, and rows beyond the vocabulary. They are
        # left out of the softmax wherever a log-prob is taken, so that it is the one that was sampled from; and models of one
        # family that differ only in padding rows (151936 at 3B, 152064 at 32B) get the same support.
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        beyond = range(len(self.tokenizer), model.get_output_embeddings().out_features)
        self.unwritable = torch.tensor(sorted({getattr(model.config, name) for name in names}.union(beyond)))

    def text(self, problem: Problem) -> str:
        """The chat, with one image token a picture."""
        content = []
        for i, part in enumerate(problem.question.split(PLACEHOLDER)):
            content += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": part}] * bool(part.strip())
        messages = [{"role": "user", "content": content}]
        if self.cfg.system_prompt:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.cfg.instruction}]})
        else:
            content.append({"type": "text", "text": " " + self.cfg.instruction})
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def pictures(self, problem: Problem) -> list[Image.Image]:
        limits = {"min_pixels": self.cfg.min_pixels, "max_pixels": self.cfg.max_pixels}
        return [fetch_image({"image": open_picture(image), **limits}) for image in problem.images]

    def length(self, problem: Problem) -> int:
        """Tokens of the prompt, without resizing a picture."""
        tokens = len(self.tokenizer(self.text(problem)).input_ids)
        for image in problem.images:
            width, height = Image.open(io.BytesIO(image)).size
            height, width = smart_resize(height, width, MERGED, self.cfg.min_pixels, self.cfg.max_pixels)
            tokens += height // MERGED * (width // MERGED) - 1
        return tokens

    def __call__(self, problem: Problem) -> Prompt:
        pictures = dict(images=self.pictures(problem), do_resize=False) if problem.images else {}
        inputs = self.processor(text=[self.text(problem)], **pictures, return_tensors="pt")
        ids, grid = inputs["input_ids"], inputs.get("image_grid_thw")
        # Without mm_token_type_ids the model would silently number the picture's tokens as if they were text.
        positions, _ = self.rope_index(ids, mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=grid)
        return Prompt(ids[0], positions[:, 0].T, inputs.get("pixel_values"), grid)

    def load(self, source: str, split: str) -> list[Problem]:
        """The questions that can be used and are not too long. A prompt with a picture is never cut."""
        problems = load_problems(source, split, self.cfg.image_root, self.cfg.limit)
        lengths, limit = [self.length(problem) for problem in problems], self.cfg.max_prompt
        reason = f"longer than --max_prompt {limit} tokens"
        report_left_out(source, [(p.row, reason) for p, n in zip(problems, lengths) if n > limit], len(problems), "usable row", "row")
        kept = [problem for problem, n in zip(problems, lengths) if n <= limit]
        if not kept:
            raise BadInput(f"{source}: every question is {reason}; raise it, or lower --max_pixels")
        return kept

    def fingerprints(self) -> dict:
        """What must agree for token ids and log-probs of two models to be comparable: tokenizer, prompt, and how it is sampled."""
        digest = lambda *parts: hashlib.sha256(repr(parts).encode()).hexdigest()[:16]  # noqa: E731
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        prompt = self.text(Problem("", PLACEHOLDER + "question", [], ""))
        return {"tokenizer": digest(vocabulary), "prompt": digest(prompt, self.cfg.min_pixels, self.cfg.max_pixels), "sampling": SAMPLING}


def load_model(name: str, dtype=torch.float32, **options):
    """A Qwen2.5-VL and its processor, from a hub id or a folder: safetensors only, no remote code."""
    try:
        if (kind := AutoConfig.from_pretrained(name).model_type) != "qwen2_5_vl":
            raise BadInput(f"--model {name} is a {kind}; this file trains Qwen2.5-VL")
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(name, dtype=dtype, use_safetensors=True, **options)
        return model, AutoProcessor.from_pretrained(name)
    except OSError as error:
        raise BadInput(f"cannot load --model {name}: {error}\nGive a hub id (which needs the network once) or a folder.") from error


# ===== 5. A group is one row ==========================================================================================
#
#   row:       [ picture and question | answer 1 | answer 2 | ... | answer G ]      a group, laid out once
#   segment:     0 0 0 0 0 0 0 0 0      1 1 1 1    2 2 2           G G G G
#   position:    0 1 ...       p-1      p p+1 ..   p p+1 ..        p p+1 ..
#
#   Each answer begins with the question's last token, at p, from which its first is predicted, and lacks its own last, from
#   which nothing is: so the hidden states of segments 1 to G are those that predict the answers' tokens, in order.
#
#   mask:               question  answer 1  answer 2      A token sees what stands before it, if that is the question or
#       question        causal       .         .          its own answer. To each answer it is as if the others were not
#       answer 1        all        causal      .          there: log-probs and gradients are those of G separate rows,
#       answer 2        all          .       causal       for P + G*T tokens instead of G*(P + T), and one vision pass.


@dataclass
class Trajectory:
    ids: list[int]  # T tokens, with the end token unless it was cut off
    text: str
    reward: float
    source: str = "policy"  # or which expert
    finished: bool = True
    kept: bool = True  # the filter m: an expert's wrong answer has no weight
    advantage: float = 0.0
    logp: Tensor | None = None  # [T] under the policy as it is now
    behavior_logp: Tensor | None = None  # [T] under whoever wrote it: pi_old or pi_phi
    ref_logp: Tensor | None = None  # [T]

    @property
    def is_expert(self) -> bool:
        return self.source != "policy"


@dataclass
class Group:
    problem: Problem
    prompt: Prompt
    trajectories: list[Trajectory]
    rectification: "Rectification | None" = None  # see localise


class Pack(typing.NamedTuple):
    """Groups as tensors: first laid out in rows, then in trajectories, in the order in which these stand in the rows."""

    ids: Tensor  # [R, L]
    positions: Tensor  # [R, L, 3]
    segments: Tensor  # [R, L] 0 question, 1 to G answers, 0 padding, which nothing sees, as it stands last
    pixels: Tensor
    grid: Tensor

    target: Tensor  # [N, T]
    mask: Tensor  # [N, T] True: answer token, its end token included
    advantages: Tensor  # [N]
    is_expert: Tensor  # [N]
    expert_ok: Tensor  # [N]


pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)  # tensors [length, ...] -> [tensors, longest, ...], 0 at the end


def pack(groups: list[Group]) -> Pack:
    """Lay out each group as one row (see the drawing); several groups are right-padded rows."""
    ids, positions, segments = [], [], []
    for group in groups:
        prompt, parts, places = group.prompt, [group.prompt.ids[:-1]], [group.prompt.positions[:-1]]
        for trajectory in group.trajectories:
            parts.append(torch.tensor([prompt.ids[-1], *trajectory.ids[:-1]]))
            places.append(prompt.positions[-1] + torch.arange(len(trajectory.ids))[:, None])  # p: a picture has fewer places than tokens
        ids.append(torch.cat(parts))
        positions.append(torch.cat(places))
        segments.append(torch.cat([torch.full_like(part, number) for number, part in enumerate(parts)]))
    trajectories = [t for group in groups for t in group.trajectories]
    # Without any picture a blank one is encoded and not used: sharded vision blocks must run on all processes or none.
    pictured = [group.prompt for group in groups if group.prompt.pixels is not None]
    return Pack(
        ids=pad(ids),
        positions=pad(positions),
        segments=pad(segments),
        pixels=torch.cat([p.pixels for p in pictured]) if pictured else torch.zeros(4, 3 * 2 * PATCH**2),
        grid=torch.cat([p.grid for p in pictured]) if pictured else torch.tensor([[1, 2, 2]]),
        target=pad([torch.tensor(t.ids) for t in trajectories]),
        mask=pad([torch.ones(len(t.ids), dtype=torch.bool) for t in trajectories]),
        advantages=torch.tensor([t.advantage for t in trajectories]),
        is_expert=torch.tensor([t.is_expert for t in trajectories]),
        expert_ok=torch.tensor([t.kept for t in trajectories]),
    )


def attention_mask(segments: Tensor) -> Tensor:
    """[R, L] -> [R, 1, L, L]: which tokens (last) each token sees."""
    query, key = segments[:, :, None], segments[:, None, :]
    return ((key == 0) | (key == query)).tril()[:, None]


class Policy(nn.Module):
    """A Qwen2.5-VL, be it student, expert or reference, as what the loss needs: log pi(token) of every answer token of a pack."""

    HEAD_CHUNK = 1024  # tokens whose [tokens, V] logits exist at one time

    def __init__(self, model, unwritable: Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("unwritable", unwritable.to(model.device), persistent=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [tokens, D] -> [tokens, V], in float32."""
        logits = self.model.lm_head(hidden).float()
        return logits.index_fill(-1, self.unwritable.to(logits.device), -torch.inf)

    def token_logp(self, hidden: Tensor, target: Tensor) -> Tensor:
        """hidden [tokens, D], target [tokens] -> log-probs [tokens]."""
        logits = self.logits(hidden)
        return -F.cross_entropy(logits, target.to(logits.device), reduction="none")

    def hidden(self, pack: Pack) -> Tensor:
        """-> [tokens, D]: the hidden states that predict answer tokens, in the order of pack.target[pack.mask]."""
        core = self.model.model
        embeds = core.get_input_embeddings()(pack.ids)  # [R, L, D]
        features = torch.cat(core.get_image_features(pack.pixels, pack.grid, return_dict=True).pooler_output).to(embeds)  # [image tokens, D]
        embeds = embeds.masked_scatter((pack.ids == self.model.config.image_token_id)[..., None], features)
        inputs = dict(inputs_embeds=embeds, position_ids=pack.positions.movedim(-1, 0), attention_mask=attention_mask(pack.segments))
        hidden = core.language_model(**inputs, use_cache=False).last_hidden_state  # [R, L, D]
        return hidden[(pack.segments > 0).to(hidden.device)]

    def forward(self, pack: Pack) -> Tensor:
        """-> logp [N, T], 0 at padding."""
        hidden = self.hidden(pack)
        chunks = zip(hidden.split(self.HEAD_CHUNK), pack.target[pack.mask].split(self.HEAD_CHUNK))
        logp = torch.cat([checkpoint(self.token_logp, h, t, use_reentrant=False) for h, t in chunks])
        return torch.zeros(pack.mask.shape, device=pack.mask.device).masked_scatter(pack.mask, logp.to(pack.mask.device))


@naming_memory("scoring", "--micro_batch, --max_answer or --max_pixels")
@torch.no_grad()
def score(policy: Policy, groups: list[Group], micro_batch: int, name: str):
    """The log-probs [T] of every answer, by the forward pass that training uses, into the attribute of that name."""
    policy.eval()
    for part in batches(groups, micro_batch):
        trajectories = [t for group in part for t in group.trajectories]
        for t, row in zip(trajectories, policy(send_to_device(pack(part), policy.unwritable.device)).cpu()):
            setattr(t, name, row[: len(t.ids)])


# ===== 6. Rollouts ====================================================================================================


@naming_memory("sampling", "--generate_batch, --max_answer or --max_pixels")
@torch.no_grad()
def sample(actor, encoder: Encoder, prompts: list[Prompt], n: int, temperature: float = 1.0, chunk: int = 32,
           logps: list | None = None) -> list[list[list[int]]]:  # fmt: skip
    """n answers to each prompt, as token ids up to and with the first end token, by the model's own generate.

    Each question is encoded and prefilled once and its cache repeated for its answers. After each chunk of tokens the
    finished answers leave the batch. Nothing is truncated, and in training the temperature is 1, else pi_old is not what was
    sampled from; at 0 it takes the likeliest. A list given as `logps` gets the log-probs that generate itself had.
    """
    device, training = actor.device, actor.training
    ends, max_tokens = encoder.ends, encoder.cfg.max_answer
    left = lambda rows: pad(rows, padding_side="left").to(device)  # noqa: E731
    ids = left([p.ids for p in prompts])  # [B, P]
    seen = left([torch.ones_like(p.ids) for p in prompts])  # [B, P]
    positions = left([p.positions for p in prompts]).movedim(-1, 0)  # [3, B, P]
    pictured = [p for p in prompts if p.pixels is not None]
    vision = dict(pixel_values=torch.cat([p.pixels for p in pictured]).to(device),
                  image_grid_thw=torch.cat([p.grid for p in pictured]).to(device)) if pictured else {}  # fmt: skip

    # generate fills whatever it is not told from the checkpoint's generation_config (repetition_penalty 1.05, top_k ...).
    # So the model gets one for the time being in which nothing is set but what is written here.
    sampling = SAMPLING | {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    config = GenerationConfig(**sampling, use_cache=True, eos_token_id=ends, pad_token_id=ends[0], suppress_tokens=encoder.unwritable.tolist(),
                              return_dict_in_generate=True, output_scores=logps is not None)  # fmt: skip
    original, actor.generation_config = actor.generation_config, config
    actor.eval()  # in training mode, gradient checkpointing would switch the cache off
    try:
        cache = DynamicCache(config=actor.config.get_text_config())
        prefix = dict(input_ids=ids[:, :-1], attention_mask=seen[:, :-1], position_ids=positions[..., :-1])
        actor.model(**prefix, **vision, past_key_values=cache, use_cache=True)  # all but the last token, from which generate starts
        cache.batch_repeat_interleave(n)
        ids, seen = ids.repeat_interleave(n, 0), seen.repeat_interleave(n, 0)  # [B*n, P]
        positions = positions[..., -1:].repeat_interleave(n, 1)  # [3, B*n, 1] of the last token; generate counts on from them
        answers, open_rows = [[] for _ in ids], torch.arange(len(ids))
        if logps is not None:
            logps.extend([] for _ in ids)
        for start in range(0, max_tokens, chunk):
            out = actor.generate(ids, attention_mask=seen, position_ids=positions, past_key_values=cache,
                                 max_new_tokens=min(chunk, max_tokens - start))  # fmt: skip
            new = out.sequences[:, ids.shape[1] :]
            ended = torch.isin(new, torch.tensor(ends, device=device))  # [rows, chunk]
            for row, tokens, stops in zip(open_rows.tolist(), new.tolist(), ended.tolist()):
                answers[row] += tokens[: stops.index(True) + 1] if True in stops else tokens
            if logps is not None:
                chosen = [scores.log_softmax(-1).gather(1, tokens[:, None]) for scores, tokens in zip(out.scores, new.T)]  # [rows, 1]
                for row, values in zip(open_rows.tolist(), torch.cat(chosen, 1).tolist()):
                    logps[row] = (logps[row] + values)[: len(answers[row])]
            stay = (~ended.any(1)).nonzero().flatten().cpu()  # a spread model keeps its cache on several devices
            if len(stay) == 0:
                break
            cache = out.past_key_values
            cache.batch_select_indices(stay)
            ids, positions, open_rows = out.sequences[stay], positions[:, stay] + new.shape[1], open_rows[stay]
            seen = torch.cat([seen[stay], seen.new_ones(len(stay), new.shape[1])], 1)
    finally:
        actor.generation_config = original
        actor.train(training)
    return [answers[i : i + n] for i in range(0, len(answers), n)]


def grade(ids: list[int], problem: Problem, encoder: Encoder) -> Trajectory:
    text = encoder.tokenizer.decode(ids, skip_special_tokens=True)
    return Trajectory(ids, text, reward(text, problem.answer), finished=ids[-1] in encoder.ends)


# ===== 7. Experts: answers of a stronger model, cached with their log-probs under that model ==========================
#
# The cache is JSONL. Line 1 says what the answers belong to; each other line holds one question and some answers to it:
#   {"question": id, "answers": [{"ids": [...], "logps": [...], "reward": 1.0, "finished": true, "text": "..."}, ...]}

MISFIT = {
    "tokenizer": "its token ids belong to another tokenizer; take an expert of the student's family",
    "prompt": "it answers another prompt; give the --instruction, --min_pixels and --max_pixels it was sampled with, or sample anew",
    "sampling": "it was not sampled at temperature 1 without truncation, so its log-probs mean something else; sample anew",
    "model": "it holds another model's answers; give another --experts file, or that --model",
    "assumed_certain": "log-probs are assumed in one and computed in the other; give another --experts file",
}


def flaw(answer: dict, writable: typing.Container[int]) -> str | None:
    """What is wrong with a cached answer, if anything."""
    ids, logps = answer.get("ids"), answer.get("logps")
    if not ids or not isinstance(logps, list) or len(ids) != len(logps):
        return "ids and logps missing or of different length"
    if not all(isinstance(i, int) and i in writable for i in ids):
        return "token ids that are vision tokens or outside the vocabulary"
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in logps):
        return "log-probs that are not finite"
    return "log-probs above 0" if max(logps) > 1e-3 else None


def read_cache(path: Path, wanted: dict, encoder: Encoder | None) -> tuple[dict, dict[str, list[Trajectory]]]:
    """Header, and expert answers by question. The header must agree with `wanted`; flawed answers are left out and reported."""
    first, _, rest = path.read_bytes().partition(b"\n")
    try:
        header = json.loads(first)
        _, source = header["tgrl_experts"], header["texts"] or header["model"]
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path} is no expert cache: its first line is not the header that `tgrl.py experts` writes") from None
    for key, value in wanted.items():
        if header.get(key) != value:
            raise BadInput(f"{path} does not fit this run: {MISFIT[key]}\n  cache: {key} {header.get(key)}\n  here:  {key} {value}")
    writable = range(sys.maxsize) if encoder is None else set(range(len(encoder.tokenizer))).difference(encoder.unwritable.tolist())
    experts, left_out = collections.defaultdict(list), []
    for number, line in enumerate(rest.splitlines(), 2):
        try:
            record = json.loads(line)
            for a in record["answers"]:
                if reason := flaw(a, writable):
                    left_out.append((number, reason))
                else:
                    answer = Trajectory(a["ids"], a["text"], a["reward"], source, a["finished"], behavior_logp=torch.tensor(a["logps"]))
                    experts[record["question"]].append(answer)
        except (ValueError, KeyError, TypeError, AttributeError):
            left_out.append((number, "no record of answers; a kill may have torn it"))
    report_left_out(path, left_out, len(left_out) + sum(map(len, experts.values())), "answer", "line")
    if header.get("assumed_certain"):
        say(f"{path}: log pi_phi = 0 is assumed of every token, so that Delta is -log pi_theta, and rho pi_theta itself")
    return header, experts


def append_records(path: Path, records: list[dict]):
    """Whole lines in one locked write, behind the last whole line: processes may append together, and a kill tears at most the end."""
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = end = file.seek(0, os.SEEK_END)
        while end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            end -= 1
        if end < size:
            file.truncate(end)
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        file.flush()
        os.fsync(file.fileno())


def write_records(path: Path, records: list[dict]):
    """The whole file anew, written beside and renamed, so that a kill leaves the old one or the new."""
    path.with_suffix(".tmp").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    path.with_suffix(".tmp").rename(path)


def describe(path: Path, header: dict, experts: dict[str, list[Trajectory]], questions: typing.Collection[str]) -> str:
    """What is in a cache, for these questions."""
    by_question = [experts.get(question, []) for question in questions]
    answers = [t for some in by_question for t in some]
    if not answers:
        raise BadInput(f"{path} answers none of the {len(questions)} questions; was it made for other data?")
    covered, lengths = sum(any(t.reward == 1 for t in some) for some in by_question), sorted(len(t.ids) for t in answers)
    twice = len(answers) - sum(len({tuple(t.ids) for t in some}) for some in by_question)
    share = lambda values: f"{statistics.fmean(map(float, values)):.1%}"  # noqa: E731
    return (f"{path}: {header['texts'] or 'samples'}, log-probs of {header['model']}, on {header['data']} ({header['split']})\n"
            f"  {len(answers)} answers, {share(t.reward for t in answers)} correct; "
            f"{covered} of {len(questions)} questions ({covered / len(questions):.1%}) have a correct expert\n"
            f"  tokens: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}, {share(not t.finished for t in answers)} cut off\n"
            f"  mean log-prob a token {sum(float(t.behavior_logp.sum()) for t in answers) / sum(lengths):.3f}; {twice} answers are there twice")  # fmt: skip


def read_texts(path: str, problems: list[Problem], encoder: Encoder) -> dict[str, list[list[int]]]:
    """Answers from anywhere, by question: lines of {"row": number of the row in --data, "text": ...}. Special tokens in a text are text."""
    by_row, texts, left_out = {p.row: p for p in problems}, collections.defaultdict(list), []
    for number, line in enumerate(read_rows(path, ""), 1):
        text, problem = str(line.get("text") or "").strip(), by_row.get(line.get("row"))
        if not text or not problem:
            left_out.append((number, "row that --data has not, or that was left out" if text else "no text"))
            continue
        ids = encoder.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        texts[problem.id].append(ids + [encoder.tokenizer.eos_token_id])
    report_left_out(path, left_out, len(left_out) + sum(map(len, texts.values())), "text", "line")
    if not texts:
        raise BadInput(f"{path} has no text for any row of --data; its lines should be {{\"row\": 0, \"text\": \"...\"}}")
    return texts


def expert_groups(policy: Policy, encoder: Encoder, part: list[Problem], n: int, texts: dict | None, gaps: list[float]) -> list[Group]:
    """n answers to each question, sampled or taken from its texts, graded, with their log-probs under the expert in behavior_logp."""
    cfg, prompts, own = encoder.cfg, [encoder(p) for p in part], []
    answers = sample(policy.model, encoder, prompts, n, logps=own) if texts is None else [texts.pop(p.id) for p in part]
    groups = [Group(p, q, [grade(ids, p, encoder) for ids in a]) for p, q, a in zip(part, prompts, answers)]
    trajectories = [t for group in groups for t in group.trajectories]
    if cfg.assume_certain:
        for t in trajectories:
            t.behavior_logp = torch.zeros(len(t.ids))
    else:
        score(policy, groups, cfg.micro_batch, "behavior_logp")
    gaps += [float((t.behavior_logp - torch.tensor(seen)).abs().max()) for t, seen in zip(trajectories, own)]
    return groups


def make_experts(cfg: Config):
    """Sample answers from a strong model, or take them from a file; score and grade them, and append them to the cache."""
    if cfg.stats:
        check_exists(cfg.stats)
        header, experts = read_cache(Path(cfg.stats), {}, None)
        return print(describe(Path(cfg.stats), header, experts, experts))
    if cfg.rectifies:
        raise BadInput("--experts self is for train: the policy makes them while it learns. Give a file to write to")
    if cfg.dry_run:
        raise BadInput("--dry_run is for train; to try out experts, give --limit 8 and an --experts file of its own")
    check_exists(cfg.data, cfg.score)
    accelerator = start_processes()
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    spread = {"device_map": "auto"} if cfg.spread else {}
    model, processor = load_model(cfg.model, torch.bfloat16 if torch.cuda.is_available() else torch.float32, **spread)
    encoder = Encoder(processor, model, cfg)
    policy = Policy(model if spread else model.to(accelerator.device), encoder.unwritable)
    problems = encoder.load(cfg.data, cfg.split)
    texts = read_texts(cfg.score, problems, encoder) if cfg.score else None
    problems = list({p.id: p for p in problems}.values())  # each question once

    path, wanted = Path(cfg.experts), {"model": cfg.model, "assumed_certain": cfg.assume_certain or None, **encoder.fingerprints()}
    if main and not (path.exists() and path.stat().st_size):
        path.parent.mkdir(parents=True, exist_ok=True)
        append_records(path, [{"tgrl_experts": 1, "data": cfg.data, "split": cfg.split, "texts": cfg.score or None, **wanted}])
    accelerator.wait_for_everyone()
    _, experts = read_cache(path, wanted, encoder)
    for p in problems if texts else ():
        known = [t.ids for t in experts[p.id]]
        texts[p.id] = [ids for ids in texts[p.id] if ids not in known]
    accelerator.wait_for_everyone()  # all have read it before one appends

    def missing(p: Problem) -> int:
        """How many answers to make next."""
        if texts is not None:
            return len(texts.get(p.id, ()))
        if cfg.until_correct and any(t.reward == 1 for t in experts[p.id]):
            return 0
        return min(cfg.samples - len(experts[p.id]), 1 if cfg.until_correct else cfg.samples)

    fields = lambda t: dict(ids=t.ids, logps=t.behavior_logp.tolist(), reward=t.reward, finished=t.finished, text=t.text)  # noqa: E731
    todo = sorted((p for p in problems if missing(p) > 0), key=encoder.length, reverse=True)  # what takes most memory is tried first
    say(f"{path}: {len(todo)} of {len(problems)} questions need answers")
    todo, tokens, gaps, start = todo[rank::world], 0, [], time.perf_counter()
    at_once = cfg.generate_batch // (1 if cfg.until_correct else cfg.samples)
    bar = tqdm(total=len(todo), unit="question", desc="experts", disable=None if main else True)  # None: only on a terminal
    while todo := sorted((p for p in todo if missing(p) > 0), key=missing):  # a batch gets what its first question misses, some come again
        for part in batches(todo, at_once):
            first = part[0]
            torch.manual_seed(hash((cfg.seed, first.row, len(experts[first.id]))))  # other noise for each batch, and for each time
            groups = expert_groups(policy, encoder, part, missing(first), texts, gaps)
            append_records(path, [{"question": g.problem.id, "answers": [fields(t) for t in g.trajectories]} for g in groups])
            for group in groups:
                experts[group.problem.id] += group.trajectories
                tokens += sum(len(t.ids) for t in group.trajectories)
            bar.update(sum(missing(p) == 0 for p in part))
            right = sum(any(t.reward == 1 for t in experts[p.id]) for p in problems)
            bar.set_postfix_str(f"{right} with a right answer, {tokens / (time.perf_counter() - start):.0f} tokens/s")
    bar.close()
    if gaps:
        average = f"(on average, an answer's largest, {statistics.fmean(gaps):.1g})"
        say(f"the log-probs kept and those of generate differ by at most {max(gaps):.1g} a token {average}")
    accelerator.wait_for_everyone()
    if main:
        say(describe(path, *read_cache(path, wanted, encoder), [p.id for p in problems]))


# ----- An expert that the policy makes itself, in the spirit of IVR-R1 (arXiv 2605.23997)

LOOK = "Look once more, closely, and go on from where the answer stands."
ERODED = 2.0  # nats: a token is suspect if another was e^2 times as likely


@dataclass
class Rectification:
    """How the policy made, or did not make, an expert's answer of a wrong one."""

    flawed: Trajectory
    starts: list[int]  # of its steps
    erosion: list[float]  # of each step
    suspect: int  # the step that seems to have gone wrong
    rounds: int = 0
    cut: int = 0  # tokens kept in the last round
    tail: list[int] | None = None  # what led to the right answer after them


def look_again(problem: Problem) -> Problem:
    question = f"{problem.question}\n{PLACEHOLDER * len(problem.images)} {LOOK}"
    return dataclasses.replace(problem, question=question, images=problem.images * 2)


def step_starts(ids: list[int], tokenizer) -> list[int]:
    """The tokens at which the steps of an answer begin; a step ends with a sentence or a line."""
    pieces = [tokenizer.decode([i]) for i in ids]
    sentence = lambda before, piece: before.endswith((".", "!", "?", ";")) and piece.startswith(" ")  # noqa: E731
    line = lambda before, piece: before.endswith("\n") and not piece.startswith("\n")  # noqa: E731
    return [0] + [i for i, pair in enumerate(itertools.pairwise(pieces), 1) if sentence(*pair) or line(*pair)]


@naming_memory("rectifying", "--max_answer or --max_pixels")
@torch.no_grad()
def localise(judge: Policy, group: Group, flawed: Trajectory, tokenizer) -> Rectification:
    """Which step of a wrong answer has gone wrong?  Leaves its log-probs [T] in flawed.logp.

    A step is as eroded as its most regrettable token: by how much the likeliest token there, with the picture in the context,
    was likelier. What follows a slip is often eroded, too, so the first step above a bound is the suspect, and not the worst.
    """
    batch = send_to_device(pack([dataclasses.replace(group, trajectories=[flawed])]), judge.unwritable.device)
    pairs = []
    for hidden, ids in zip(judge.hidden(batch).split(judge.HEAD_CHUNK), batch.target[0].split(judge.HEAD_CHUNK)):
        logp = judge.logits(hidden).log_softmax(-1)  # [tokens, V]
        pairs.append(torch.stack([logp.gather(1, ids[:, None])[:, 0], logp.max(-1).values]).cpu())
    flawed.logp, best = torch.cat(pairs, 1)  # [T]
    regret = best - flawed.logp
    starts = step_starts(flawed.ids, tokenizer)
    erosion = [float(regret[a:b].max()) for a, b in itertools.pairwise([*starts, len(flawed.ids)])]
    suspect = next((i for i, worst in enumerate(erosion) if worst > ERODED), erosion.index(max(erosion)))
    return Rectification(flawed, starts, erosion, suspect)


@torch.no_grad()
def rectify(actor, encoder: Encoder, groups: list[Group]):
    """Give groups an expert's answer that the policy makes out of a wrong one of its own.

    Of IVR-R1 only the abstract is public. From it: rewards screen the flawed rollouts, the error is attributed to a step with the
    picture in the context, and reasoning is taken up again from there, against the picture, in a loop, until it is right.
    Ours: what a step is, what tells that it has eroded (see localise), the wording of LOOK and that it stands in the question
    with the pictures a second time, that each further round cuts one step earlier, and the numbers of tries and rounds.
    All of it is local to this process: it needs the actor alone, and no process waits for another.
    """
    cfg, judge = encoder.cfg, Policy(actor, encoder.unwritable).eval()
    for group in groups:
        flawed = next((t for t in group.trajectories if not t.is_expert and t.reward == 0 and t.finished), None)
        group.rectification = flawed and localise(judge, group, flawed, encoder.tokenizer)
    for number in range(cfg.rounds):
        stories = [(g, g.rectification) for g in groups if g.rectification and not g.rectification.tail and g.rectification.suspect >= number]
        for part in batches(stories, cfg.generate_batch // cfg.tries):
            prompts = []
            for group, story in part:
                story.rounds, story.cut = number + 1, story.starts[story.suspect - number]
                prompts.append(encoder(look_again(group.problem)).followed_by(story.flawed.ids[: story.cut]))
            for (group, story), prompt, tails in zip(part, prompts, sample(actor, encoder, prompts, cfg.tries)):
                kept = story.flawed.ids[: story.cut]
                answers = [grade(kept + tail, group.problem, encoder) for tail in tails if len(kept) + len(tail) <= cfg.max_answer]
                if right := next((answer for answer in answers if answer.reward == 1 and answer.finished), None):
                    story.tail = right.ids[story.cut :]
                    score(judge, [Group(group.problem, prompt, [new := Trajectory(story.tail, "", 1.0)])], 1, "logp")
                    right.source, right.behavior_logp = "self", torch.cat([story.flawed.logp[: story.cut], new.logp])  # of what produced it
                    others = group.trajectories[:-1] if group.trajectories[-1].is_expert else group.trajectories
                    group.trajectories = [*others, right]  # in place of an expert that is wrong, if there is one


# ===== 8. Training ====================================================================================================


def shard(policy: Policy, accelerator: Accelerator) -> Policy:
    """FSDP2: each block, and the root, keep 1/world of their weights, gathered in bfloat16 when they run.

    Block by block to the device, so that it never holds all of them. One process on a CPU has nothing to shard, and
    computes in float32.
    """
    if accelerator.num_processes > 1 or accelerator.device.type == "cuda":
        if not torch.distributed.is_initialized():  # one GPU, started without a launcher: the same path in a world of one
            torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
        compute = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
        precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        for block in [*policy.model.model.visual.blocks, *policy.model.model.language_model.layers]:
            fully_shard(block, mp_policy=precision)
        fully_shard(policy, mp_policy=precision)
    return policy.to(accelerator.device)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered (every process gets here); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def frozen_copy(model, dtype: torch.dtype):
    """Parameters in another dtype, but not the buffers: rotary frequencies stay float32, as under FSDP's mixed precision."""
    copies = {id(p): nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, copies)  # takes these for the parameters, and never holds a second float32


def peak_memory() -> float:
    """The most this process has held so far, in GiB: of the GPU's memory, or the machine's."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@functools.lru_cache(maxsize=2)
def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


class Tally(collections.defaultdict):
    """Metrics of a step as name -> [sum, count]: they add up over micro-batches, updates and processes."""

    def __init__(self):
        super().__init__(lambda: [0.0, 0.0])

    def add(self, **pairs):
        for name, (value, count) in pairs.items():
            self[name][0] += float(value)
            self[name][1] += float(count)


class Trainer:
    """The state of a run, and what is done in a step, in this order: draw, roll out, score, update, show."""

    def __init__(self, cfg: Config, load=load_model):  # load: eval.py bench has another
        self.cfg = cfg
        if Path(cfg.out, "metrics.jsonl").exists() and not cfg.resume and not cfg.dry_run:
            raise BadInput(f"--out {cfg.out} holds an earlier run; add --resume to continue it, or give another folder")
        check_exists(cfg.data, cfg.val_data)
        if cfg.cache and not Path(cfg.cache).exists():
            make = f"Make it with `tgrl.py experts --data {cfg.data} --experts {cfg.cache}`, or train without experts by --n_off 0."
            raise BadInput(f"--experts {cfg.cache} does not exist. {make}")
        try:
            self.accelerator = start_processes(project_dir=cfg.out, log_with=None if cfg.tracker == "none" else cfg.tracker)
        except ValueError as error:
            raise BadInput(f"--tracker {cfg.tracker}: {error}") from error
        self.device, self.world, self.rank = self.accelerator.device, self.accelerator.num_processes, self.accelerator.process_index
        self.main = self.accelerator.is_main_process
        if cfg.questions_per_update % self.world:
            raise BadInput(f"--questions_per_update {cfg.questions_per_update} cannot be dealt out evenly to {self.world} processes")
        model, self.processor = load(cfg.model)
        self.encoder = Encoder(self.processor, model, cfg)
        self.problems = self.encoder.load(cfg.data, cfg.split)
        self.held_out = self.encoder.load(cfg.val_data, cfg.val_split) if cfg.val_data else []
        self.experts = {}
        if cfg.cache:
            header, self.experts = read_cache(Path(cfg.cache), self.encoder.fingerprints(), self.encoder)
            say(describe(Path(cfg.cache), header, self.experts, [p.id for p in self.problems]))
        self.build(model)
        self.steps = cfg.steps or max(1, cfg.epochs * len(self.problems) // cfg.questions_per_rollout)
        self.checkpoints = Path(cfg.out, "checkpoints")
        self.position = 0  # questions drawn so far, by all processes
        self.stopping = False

    def build(self, model):
        """Policy, actor, reference, optimizer."""
        cfg, cuda = self.cfg, self.device.type == "cuda"
        model.model.visual.requires_grad_(not cfg.freeze_vision)
        if cfg.checkpointing:
            model.activation_checkpointing_enable()
        twin = lambda: frozen_copy(model, torch.bfloat16 if cuda else torch.float32)  # noqa: E731
        reference = Policy(twin(), self.encoder.unwritable) if cfg.kl_coef else None
        # The actor generates: whole weights in the dtype of computation. One process on a CPU needs no copy of them.
        self.actor = twin().to(self.device) if self.world > 1 or cuda else model
        self.policy = shard(Policy(model, self.encoder.unwritable), self.accelerator)
        self.reference = reference and shard(reference, self.accelerator)
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)

    @torch.no_grad()
    def refresh_actor(self):
        if self.actor is not self.policy.model:
            for target, source in zip(self.actor.parameters(), self.policy.model.parameters()):
                target.copy_(whole(source))

    def total(self, *numbers: float) -> list[float]:
        """Sums over all processes; every process gets here."""
        return self.accelerator.reduce(torch.tensor(numbers, dtype=torch.float64, device=self.device), "sum").tolist()

    def draw(self, n: int) -> list[tuple[int, Problem]]:
        """The next n questions of this process, as (epoch, question): all walk one shuffled list and take turns."""
        wishes = self.accelerator.gather(torch.tensor([n], device=self.device)).tolist()
        first = self.position + sum(wishes[: self.rank])
        self.position += sum(wishes)
        places = [divmod(place, len(self.problems)) for place in range(first, first + n)]
        return [(epoch, self.problems[shuffled(len(self.problems), self.cfg.seed, epoch)[i]]) for epoch, i in places]

    def pick_experts(self, problem: Problem, epoch: int) -> list[Trajectory]:
        """n_off of the cached answers, others in each epoch. Without any, the group is the policy's answers alone."""
        cached = self.experts.get(problem.id, [])
        turn = epoch * self.cfg.n_off % max(len(cached), 1)
        cached = cached[turn:] + cached[:turn]
        if self.cfg.prefer_correct:
            cached = sorted(cached, key=lambda t: -t.reward)
        return [dataclasses.replace(t, kept=t.reward == 1 or not self.cfg.filter) for t in cached[: self.cfg.n_off]]  # Eq. 22

    def roll_out(self, drawn: list[tuple[int, Problem]]) -> list[Group]:
        """Groups with rewards and advantages: n_on answers of the policy, then the experts'."""
        groups = []
        for part in batches(drawn, self.cfg.generate_batch // self.cfg.n_on):
            prompts = [self.encoder(problem) for _, problem in part]
            for (epoch, problem), prompt, answers in zip(part, prompts, sample(self.actor, self.encoder, prompts, self.cfg.n_on)):
                own = [grade(ids, problem, self.encoder) for ids in answers]  # Eq. 13
                groups.append(Group(problem, prompt, own + self.pick_experts(problem, epoch)))  # Eq. 14
        if self.cfg.rectifies:
            rectify(self.actor, self.encoder, [g for g in groups if not any(t.is_expert and t.reward == 1 for t in g.trajectories)])
        for group in groups:
            advantages = group_advantages(torch.tensor([[t.reward for t in group.trajectories]]))  # Eq. 15-16
            for trajectory, advantage in zip(group.trajectories, advantages[0].tolist()):
                trajectory.advantage = advantage
        return groups

    def has_contrast(self, group: Group, with_experts: bool = True) -> bool:
        """Do the rewards of the policy's answers and kept experts differ? Contrast with a filtered expert alone does not count."""
        return len({t.reward for t in group.trajectories if t.kept and (with_experts or not t.is_expert)}) > 1

    def collect(self, tally: Tally) -> list[Group]:
        """This process's share of a rollout batch. Dynamic sampling replaces groups without contrast, in at most max_draws draws."""
        quota, dynamic = self.cfg.questions_per_rollout // self.world, self.cfg.dynamic_sampling
        kept, flat, drawn, errors = [], [], 0, math_verify.errors.total()
        tally.add(expert_reward=(0, 0), rectified=(0, 0), rounds=(0, 0))  # the same keys on all processes, whoever draws an expert
        for _ in range(self.cfg.max_draws if dynamic else 1):
            if self.total(quota - len(kept))[0] == 0:  # the same decision everywhere; a process with its quota draws nothing
                break
            new = self.roll_out(self.draw(quota - len(kept)))
            drawn += len(new)
            for group in new:  # metrics are of all that was sampled, kept or not
                contrast = self.has_contrast(group)
                (kept if contrast or not dynamic else flat).append(group)
                tally.add(contrast=(contrast, 1), rescued_by_expert=(contrast and not self.has_contrast(group, with_experts=False), 1))
                if story := group.rectification:
                    tally.add(rectified=(story.tail is not None, 1), rounds=(story.rounds, 1))
                for t in group.trajectories:
                    if t.is_expert:
                        tally.add(expert_reward=(t.reward, 1))
                    else:
                        tally.add(reward=(t.reward, 1), answer_tokens=(len(t.ids), 1), cut_off=(not t.finished, 1))
            flat = flat[:quota]  # their pictures take memory
        filler = flat[: quota - len(kept)]
        for trajectory in (t for group in filler for t in group.trajectories):
            trajectory.advantage = 0.0  # only dilutes the mean; keeps the number of forward passes the same on all processes
        errors = math_verify.errors.total() - errors
        tally.add(draws=(drawn, quota), filler=(len(filler), quota), grader_errors=(errors, drawn * self.cfg.n_on))
        return kept + filler

    def set_log_probs(self, groups: list[Group]):
        """pi_ref and pi_old, before the first update, by the forward pass that training uses: sampling rounds differently."""
        if self.reference:
            score(self.reference, groups, self.cfg.micro_batch, "ref_logp")
        if self.cfg.questions_per_rollout > self.cfg.questions_per_update:  # else pi_old is the policy of the update itself
            score(self.policy, groups, self.cfg.micro_batch, "logp")
            for t in (t for group in groups for t in group.trajectories if not t.is_expert):
                t.behavior_logp = t.logp

    def update(self, groups: list[Group], tally: Tally):
        """One optimizer update on this process's groups, in micro-batches."""
        cfg, trajectories = self.cfg, [t for group in groups for t in group.trajectories]
        sizes = len(trajectories), sum(len(t.ids) for t in trajectories), sum(abs(t.advantage) for t in trajectories)
        n_trajectories, n_tokens, at_stake = self.total(*sizes)
        self.policy.train()
        for part in batches(groups, cfg.micro_batch):
            trajectories = [t for group in part for t in group.trajectories]
            batch = send_to_device(pack(part), self.device)
            size = f"the update, {len(part)} groups at once in rows of {batch.ids.shape[1]} tokens"
            with naming_memory(size, "--micro_batch, --max_answer or --max_pixels"):
                logp = self.policy(batch)  # [N, T]
                for t, row in zip(trajectories, logp.detach().cpu()):
                    t.logp = row[: len(t.ids)]
                    t.behavior_logp = t.logp if t.behavior_logp is None else t.behavior_logp  # None: written by this very policy
                column = lambda name: pad([getattr(t, name) for t in trajectories]).to(self.device)  # noqa: E731 [N, T]
                loss, metrics = tgrl_loss(
                    logp, column("behavior_logp"), batch.mask, batch.advantages, batch.is_expert, batch.expert_ok,
                    token_shares(batch.mask, "dapo" if cfg.token_mean else "grpo", n_trajectories, n_tokens),
                    sharpness=cfg.sharpness, clip_low=cfg.clip_low, clip_high=cfg.clip_high,
                    kl_coef=cfg.kl_coef, ref_logp=column("ref_logp") if cfg.kl_coef else None,
                )  # fmt: skip
                (loss * self.world).backward()  # shares are of all processes, but sharded gradients are averaged over them
            tally.add(**metrics)
        norm = float(whole(nn.utils.clip_grad_norm_(self.policy.parameters(), cfg.max_grad_norm)))
        useful = at_stake > 0 or cfg.kl_coef > 0  # without any advantage, only weight decay and momentum would move
        if useful and math.isfinite(norm):
            with naming_memory("the optimizer's step", "nothing: take more processes, or --freeze_vision"):
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tally.add(grad_norm=(norm, 1), skipped_nonfinite=(not math.isfinite(norm), 1), skipped_no_signal=(not useful, 1))

    def evaluate(self) -> tuple[float, int]:
        """Greedy accuracy on the held-out questions, as (right, of how many); each process takes its share of them."""
        mine, right = self.held_out[self.rank :: self.world], 0.0
        for part in batches(mine, self.cfg.generate_batch):
            answers = sample(self.actor, self.encoder, [self.encoder(p) for p in part], 1, temperature=0)
            right += sum(grade(ids, p, self.encoder).reward for p, (ids,) in zip(part, answers))
        return right, len(mine)

    def show(self, step: int, groups: list[Group]):
        """For eval.py: real groups, with each token's log-probs, weight and coefficient."""
        for group in groups:
            images, batch = [], pack([group])
            for picture in self.encoder.pictures(group.problem):
                picture.thumbnail((448, 448))
                picture.save(buffer := io.BytesIO(), "PNG")
                images.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
            logp, behavior_logp = (pad([getattr(t, name) for t in group.trajectories]) for name in ("logp", "behavior_logp"))  # [G, T]
            given = logp, behavior_logp, batch.mask
            weight = torch.ones_like(logp) if self.cfg.sharpness is None else expert_weights(*given, self.cfg.sharpness)
            coefficient = unified_coefficient(*given, batch.is_expert, batch.expert_ok, self.cfg.sharpness)
            numbers = dict(logp=logp, behavior_logp=behavior_logp, weight=weight, coefficient=coefficient)
            answers = [
                dict(text=t.text, reward=t.reward, advantage=t.advantage, source=t.source, finished=t.finished)
                | {"tokens": [self.encoder.tokenizer.decode([i]) for i in t.ids]}
                | {name: [round(x, 5) for x in rows[i, : len(t.ids)].tolist()] for name, rows in numbers.items()}
                for i, t in enumerate(group.trajectories)
            ]
            record = dict(step=step, question=group.problem.question, answer=group.problem.answer, images=images, answers=answers)
            if story := group.rectification:
                decode = self.encoder.tokenizer.decode
                steps = [decode(story.flawed.ids[a:b]) for a, b in itertools.pairwise([*story.starts, len(story.flawed.ids)])]
                record["rectification"] = dict(steps=steps, erosion=[round(x, 3) for x in story.erosion], cut=story.starts.index(story.cut),
                                               rounds=story.rounds, tail=decode(story.tail) if story.tail else None)  # fmt: skip
            self.write("groups.jsonl", record)

    def write(self, name: str, record: dict):
        if self.main:
            append_records(Path(self.cfg.out, name), [record])

    def report(self, step: int, tally: Tally):
        """One record a step: to metrics.jsonl, to the tracker, and the gist of it to the terminal."""
        sums = self.total(*itertools.chain(*tally.values()))
        pairs = zip(tally, sums[::2], sums[1::2])
        metrics = {"step": step} | {name: value / count if count and math.isfinite(value) else None for name, value, count in pairs}
        self.write("metrics.jsonl", metrics)
        self.accelerator.log({name: value for name, value in metrics.items() if value is not None}, step=step)
        gist = dict(accuracy="held-out {:.1%}", reward="reward {:.3f}", expert_reward="expert {:.2f}", contrast="contrast {:.0%}",
                    entropy="entropy {:.3f}", grad_norm="grad {:.2f}", answer_tokens="tokens {:.0f}", seconds="{:.1f} s")  # fmt: skip
        known = [text.format(metrics[name]) for name, text in gist.items() if metrics.get(name) is not None]
        say("  ".join([f"step {step:>3}/{self.steps}", *known]))
        return metrics

    def state(self) -> dict:
        weights, optimizer = get_state_dict(self.policy, self.optimizer)
        return {"weights": weights, "optimizer": optimizer, "position": torch.tensor(self.position)}

    def export(self, folder: Path):
        """The trained model as from_pretrained reads it; the actor holds the whole weights, just refreshed."""
        if self.main:
            self.actor.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        self.accelerator.wait_for_everyone()

    def save_checkpoint(self, step: int):
        """The state before `step`, from which a run continues; written beside and renamed, so that a kill leaves the one before whole."""
        folder = self.checkpoints / f"{step:06}"
        beside = folder.with_suffix(".tmp")
        try:
            if self.main:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            dcp.save(self.state(), checkpoint_id=beside)  # each process writes its shards
            self.export(beside / "model")
            if self.main:
                shutil.rmtree(folder, ignore_errors=True)
                beside.rename(folder)
                for old in sorted(self.checkpoints.glob("??????"))[: -self.cfg.keep]:
                    shutil.rmtree(old)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise BadInput(f"cannot write {beside}: {error}\n{self.advice()}") from error
        self.accelerator.wait_for_everyone()

    def advice(self) -> str:
        folders = sorted(self.checkpoints.glob("??????"))
        return f"{folders[-1]} is whole; continue from it with --resume" if folders else "There is no checkpoint to continue from"

    def load_checkpoint(self) -> int:
        """Continue from the newest whole checkpoint, on as many processes as there are now; -> the step to do next."""
        folders = sorted(self.checkpoints.glob("??????"), reverse=True)
        for number, folder in enumerate(folders):
            state = self.state()
            try:
                dcp.load(state, checkpoint_id=folder)  # fails on all processes, if on one
            except (Exception, CheckpointException) as error:  # the latter is no Exception
                say(f"{folder} is damaged, or of another model, and passed over: {type(error).__name__} {str(error)[:200]}")
                continue
            set_state_dict(self.policy, self.optimizer, model_state_dict=state["weights"], optim_state_dict=state["optimizer"])
            for group in self.optimizer.param_groups:  # --lr may be another now
                group.update(lr=self.cfg.lr, weight_decay=self.cfg.weight_decay)
            self.position = int(state["position"])
            for damaged in folders[:number] if self.main else ():
                shutil.rmtree(damaged)
            say(f"{self.cfg.out}: continues with step {int(folder.name)}")
            return int(folder.name)
        if folders:
            raise BadInput(f"{self.checkpoints} holds nothing whole to continue from; give another --out to start anew")
        say(f"{self.cfg.out} has no checkpoint to continue from; starts anew")
        return 0

    def begin_records(self, step: int):
        """Of an earlier start, records of the steps before this one stay; the others will be made again."""
        for name, records in (("metrics.jsonl", [self.header()]), ("groups.jsonl", [])) if self.main else ():
            path = Path(self.cfg.out, name)
            lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # the last is empty, or torn
            records += [record for record in map(json.loads, lines) if 0 <= record.get("step", -1) < step]
            write_records(path, records)

    def header(self) -> dict:
        """The first record of metrics.jsonl: what the numbers below it depend on."""
        packages = ("torch", "transformers", "accelerate", "qwen-vl-utils", "math-verify", "datasets")
        try:
            here = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
            git = subprocess.run(["git", "describe", "--always", "--dirty"], **here).stdout.strip() or None
        except OSError:  # no git
            git = None
        versions = {name: importlib.metadata.version(name) for name in packages} | {"python": sys.version.split()[0], "git": git}
        versions["tgrl.py"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        data = dict(questions=len(self.problems), held_out=len(self.held_out), with_expert=sum(bool(self.experts.get(p.id)) for p in self.problems))
        return dict(method=self.cfg.method, config=dataclasses.asdict(self.cfg), versions=versions, data=data, processes=self.world)

    def rehearse(self):
        """--dry_run: the largest rollout batch and the largest micro-batch, once. What they teach is thrown away."""
        cfg, endless = self.cfg, copy.copy(self.encoder)
        endless.unwritable = torch.cat([self.encoder.unwritable, torch.tensor(self.encoder.ends)])  # so that answers become max_answer long
        problem = max(self.problems, key=self.encoder.length)
        prompt, at_once = self.encoder(problem), max(1, cfg.generate_batch // cfg.n_on)
        say(f"dry run: {self.steps} steps; the longest question has {len(prompt.ids)} tokens, the longest answer may have {cfg.max_answer}")
        self.refresh_actor()
        start = time.perf_counter()
        answers = sample(self.actor, endless, [prompt] * at_once, cfg.n_on)[0]
        sampled = time.perf_counter()
        if self.held_out:
            self.held_out = [max(self.held_out, key=self.encoder.length)] * cfg.generate_batch * self.world
            self.evaluate()
        evaluated, sampling_peak = time.perf_counter(), peak_memory()
        answers += [max([answers[0], *(t.ids for some in self.experts.values() for t in some)], key=len)] * cfg.n_off
        trajectories = [Trajectory(ids, "", 1.0, advantage=(-1.0) ** i) for i, ids in enumerate(answers)]
        groups = [Group(problem, prompt, trajectories)] * cfg.micro_batch
        self.set_log_probs(groups)
        self.update(groups, Tally())
        updated = time.perf_counter()
        mine = cfg.questions_per_rollout // self.world
        seconds = math.ceil(mine / at_once) * (sampled - start) + math.ceil(mine / cfg.micro_batch) * (updated - evaluated)
        say(f"  sampling {at_once * cfg.n_on} answers at once  {sampled - start:7.1f} s   peak {sampling_peak:.1f} GiB\n"
            f"  scoring and updating on {cfg.micro_batch} groups at once  {updated - evaluated:7.1f} s   peak {peak_memory():.1f} GiB\n"
            f"These fit. A step of as long questions and answers would take {seconds / 60:.1f} minutes a draw. Nothing was written.")  # fmt: skip

    def learn(self, step: int, tally: Tally):
        """One step: answers and rewards, then an update on each share of them."""
        start = time.perf_counter()
        torch.manual_seed(hash((self.cfg.seed, step, self.rank)))  # so that a run that is continued samples what it would have
        groups = self.collect(tally)
        rolled = time.perf_counter()
        self.set_log_probs(groups)
        updates = self.cfg.questions_per_rollout // self.cfg.questions_per_update
        for i in range(updates):
            self.update(groups[i::updates], tally)  # dealt out, as groups without contrast stand at the end
        tally.add(seconds=(time.perf_counter() - start, 1), seconds_rollout=(rolled - start, 1))
        if self.main and (step % self.cfg.show_every == 0 or step == self.steps - 1):
            self.show(step, groups[:4])

    def stop(self, number, _):
        """Ctrl-C, or a scheduler's SIGTERM, is looked at between steps; a second one stops at once."""
        self.stopping = True
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more to stop at once\n" * self.main)

    def fit(self) -> dict:
        cfg = self.cfg
        if cfg.dry_run:
            return self.rehearse()
        if self.main:
            Path(cfg.out).mkdir(parents=True, exist_ok=True)
        first = self.load_checkpoint() if cfg.resume else 0
        if first > self.steps:
            raise BadInput(f"--out {cfg.out} is at step {first} already, and this run has {self.steps}; raise --steps or --epochs")
        self.begin_records(first)
        self.accelerator.init_trackers("tgrl", {name: value for name, value in dataclasses.asdict(cfg).items() if value is not None})
        group = f"{cfg.n_on} + {cfg.n_off} answers to each"
        say(f"{cfg.method}: {self.steps} steps of {cfg.questions_per_rollout} questions, {group}, on {self.world} x {self.device.type}")
        bar = tqdm(total=self.steps, desc=cfg.method, unit="step", initial=first, disable=None if self.main else True)
        with bar, contextlib.ExitStack() as undo:
            for number in (signal.SIGINT, signal.SIGTERM):
                undo.callback(signal.signal, number, signal.signal(number, self.stop))
            for step in range(first, self.steps + 1):
                self.refresh_actor()
                if not whole(nn.utils.get_total_norm([p.detach() for p in self.policy.parameters()])).isfinite():
                    raise BadInput(f"before step {step} the weights are not finite. {self.advice()}, and a lower --lr")
                leave = self.total(self.stopping)[0] > 0
                if cfg.save_every and step > first and (step % cfg.save_every == 0 or step == self.steps or leave):
                    self.save_checkpoint(step)
                if leave:
                    say(f"stopped before step {step}. {self.advice()}")
                    raise SystemExit(130)
                tally = Tally()  # a record is about the policy before its step's update; the last holds its accuracy alone
                if self.held_out and (step % cfg.eval_every == 0 or step == self.steps):
                    tally.add(accuracy=self.evaluate())
                if step < self.steps:
                    self.learn(step, tally)
                    bar.update()
                metrics = self.report(step, tally)
        self.export(Path(cfg.out, "model"))
        self.accelerator.end_training()
        return metrics


# ===== 9. The toy world: everything above, tiny and real, on a CPU =====================================================
#
# A picture shows a w x h grid; asked is its area plus its edge. An answer reads the two sides off the picture (perception)
# and then takes three steps (transitions), each by its right rule or a wrong one. The expert mostly follows the right ones.
# The student sees as well as the expert, but nearly always goes wrong on the way from what it sees to the answer, which is
# the failure of Fig. 1 (B): by itself it is right less than once in 1000 answers, so that exploration alone is slow.

TOY_QUESTION = "<image>What is the area of the grid plus the length of its edge?"
TOY_SIDES = range(1, 8)
TOY_LOOKING = 0.4  # asked to look again, a model takes the right rules at least so often: the premise of IVR-R1, granted
TOY_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def toy_row(rng: random.Random, w: int, h: int) -> dict:
    """A question in the schema of hiyouga/geometry3k."""
    cell, x, y = 7, rng.randint(0, 3), rng.randint(0, 3)
    image, ink = Image.new("RGB", (56, 56), "white"), tuple(rng.randint(0, 110) for _ in "rgb")
    for i, j in itertools.product(range(w), range(h)):
        box = [x + i * cell + 1, y + j * cell + 1, x + i * cell + 6, y + j * cell + 6]
        ImageDraw.Draw(image).rectangle(box, ink)
    return {"images": [image], "problem": TOY_QUESTION, "answer": str(w * h + 2 * (w + h))}


def toy_answer(rng: random.Random, w: int, h: int, p_right: float) -> str:
    """Two readings, and three transitions, each right with probability p_right."""
    right = lambda: rng.random() < p_right  # noqa: E731
    a, area = ("*", w * h) if right() else ("+", w + h)
    e, edge = (2, 2 * (w + h)) if right() else (1, w + h)
    t, total = ("+", area + edge) if right() else ("-", area - edge)
    return (f"<think>width {w}, height {h}. area = {w}{a}{h} = {area}. edge = {e}*{w + h} = {edge}. "
            f"total = {area}{t}{edge} = {total}</think>\\boxed{{{total}}}")  # fmt: skip


def toy_processor(instruction: str):
    """A byte-level BPE with Qwen's special tokens and one token a digit, and Qwen2.5-VL's own image processor."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    special = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")]
    texts = [toy_answer(random.Random(i), w, h, 0.5) for i, (w, h) in enumerate(itertools.product(TOY_SIDES, TOY_SIDES))]
    texts.append(f"user\n{TOY_QUESTION.replace(PLACEHOLDER, '')} {LOOK} {instruction}\nassistant\n")
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=special)
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=TOY_TEMPLATE)


def tiny_model(tokenizer, hidden: int = 128, layers: int = 3, vision_layers: int = 2, text=(), vision=(), tied: bool = True):
    """The real Qwen2.5-VL classes with a small configuration and random weights."""
    shape = dict(hidden_size=hidden, intermediate_size=2 * hidden, initializer_range=0.06)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])
    text = dict(**shape, vocab_size=len(tokenizer), num_hidden_layers=layers, rope_parameters=rope, max_position_embeddings=4096,
                num_attention_heads=hidden // 32, num_key_value_heads=max(1, hidden // 64),
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id) | dict(text)  # fmt: skip
    vision = dict(**shape, depth=vision_layers, num_heads=hidden // 32, out_hidden_size=hidden,
                  fullatt_block_indexes=[vision_layers - 1]) | dict(vision)  # fmt: skip
    names = dict(image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end")
    tokens = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **tokens))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return model


def toy_pool(encoder: Encoder, sides: list[tuple[int, int]], rng: random.Random) -> list:
    """Grids to warm up on, as (w, h, looking, problem, prompt): every fourth with the request to look again."""
    pool = []
    for i, (w, h) in enumerate(sides):
        problem, looking = read_problem(toy_row(rng, w, h), Path()), i % 4 == 0
        pool.append((w, h, looking, problem, encoder(look_again(problem) if looking else problem)))
    return pool


def teach(policy: Policy, encoder: Encoder, pool: list, p_right: float, steps: int, lr: float, rng: random.Random, name: str):
    """Supervised warm-up: each step 16 grids, 4 answers to each, each transition right with probability p_right, or TOY_LOOKING."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    end = encoder.tokenizer.eos_token_id
    policy.train()
    for _ in tqdm(range(steps), desc=name, unit="step", disable=None):
        groups = []
        for w, h, looking, problem, prompt in rng.sample(pool, 16):
            texts = [toy_answer(rng, w, h, max(p_right, TOY_LOOKING * looking)) for _ in range(4)]
            groups.append(Group(problem, prompt, [Trajectory(encoder.tokenizer(text).input_ids + [end], text, 0.0) for text in texts]))
        batch = pack(groups)
        loss = -policy(batch).sum() / batch.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def toy_world(folder: Path, cfg: Config):
    """Questions as parquet files, and an expert and a student that share one warmed-up base; made once, then kept."""
    datasets.disable_progress_bars()
    if folder.exists():
        return
    say("warming up a base model, an expert and a student: about a minute and a half, once")
    folder, finished = folder.with_suffix(".tmp"), folder
    torch.manual_seed(0)
    rng, processor = random.Random(0), toy_processor(cfg.instruction)
    model = tiny_model(processor.tokenizer)
    encoder, sides = Encoder(processor, model, cfg), list(itertools.product(TOY_SIDES, TOY_SIDES))
    columns = datasets.Features(images=[datasets.Image()], problem=datasets.Value("string"), answer=datasets.Value("string"))
    for name, size in (("train", 192), ("test", 192)):
        datasets.Dataset.from_list([toy_row(rng, *rng.choice(sides)) for _ in range(size)], columns).to_parquet(folder / f"{name}.parquet")
    pool = toy_pool(encoder, rng.choices(sides, k=400), rng)
    for name, p_right, steps, lr in (("base", 0.5, 200, 2e-3), ("expert", 0.97, 60, 1e-3), ("student", 0.02, 60, 1e-3)):
        if name != "base":
            model, _ = load_model(folder / "base")
        teach(Policy(model, encoder.unwritable), encoder, pool, p_right, steps, lr, rng, f"warm-up, {name}")
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    folder.rename(finished)


def toy(cfg: Config):
    """Warm up two models, sample experts (or, with --experts self, do not), train without and with them, and compare on held-out pictures."""
    if cfg.dry_run or cfg.stats or cfg.score:
        raise BadInput("--dry_run is for train, --stats and --score are for experts: `tgrl.py experts --stats ...`")
    out, start = Path(cfg.out), time.perf_counter()
    world = out / "world"
    toy_world(world, cfg)
    cfg = dataclasses.replace(cfg, model=f"{world}/expert", data=f"{world}/train.parquet", val_data=f"{world}/test.parquet")
    if not cfg.rectifies:
        cfg.experts = f"{out}/experts.jsonl"
        make_experts(cfg)
    accuracy, answers = {}, cfg.n_on + cfg.n_off
    for n_off in sorted({0, cfg.n_off}):
        run = dataclasses.replace(cfg, model=f"{world}/student", n_on=answers - n_off, n_off=n_off)
        run.out = f"{out}/{run.method}"
        shutil.rmtree(run.out, ignore_errors=True)  # of an earlier toy
        accuracy[run.method] = Trainer(run).fit()["accuracy"]
    print(f"\nHeld-out greedy accuracy after {cfg.steps} steps of {cfg.questions_per_rollout} questions, {answers} answers each:")
    for name, value in accuracy.items():
        print(f"  {name:10} {value:6.1%}")
    if Path(__file__).with_name("eval.py").exists():
        sys.modules.setdefault("tgrl", sys.modules[__name__])  # which the other file imports; it may be running as __main__
        from eval import show

        show([out / name for name in accuracy])
    print(f"{time.perf_counter() - start:.0f} seconds in all")


# ===== The command line ===============================================================================================

TOY = dict(out="runs/toy", steps=24, lr=1e-4, questions_per_rollout=24, questions_per_update=24, micro_batch=8, generate_batch=192,
           samples=2, max_draws=2, eval_every=4, show_every=6, min_pixels=56 * 56, max_pixels=56 * 56, max_answer=80,
           instruction="Think first.", checkpointing=False, save_every=0)  # fmt: skip
COMMANDS = {"toy": (toy, TOY), "experts": (make_experts, {"model": "Qwen/Qwen2.5-VL-32B-Instruct"}), "train": (lambda cfg: Trainer(cfg).fit(), {})}


def add_options(parser: argparse.ArgumentParser, names: list[str], shown: dict):
    """Fields of Config as options; what is not given is not in the result. `shown` are defaults other than Config's."""
    for f in (f for f in dataclasses.fields(Config) if f.name in names):
        kind = next(t for t in (*typing.get_args(f.type), f.type) if t is not type(None))
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": kind.__name__}
        default = "by algorithm" if f.default is None else repr(shown.get(f.name, f.default))
        parser.add_argument(f"--{f.name}", **how, default=argparse.SUPPRESS, help=f"{f.metadata['help']} (default: {default})".replace("%", "%%"))


def parse(argv: list[str]) -> tuple[str, Config]:
    description = __doc__.split("\n\nA question")[0]
    usage = "tgrl.py [toy|experts|train] [--option value ...]"
    parser = argparse.ArgumentParser("tgrl.py", usage, description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="toy", choices=COMMANDS, help="what to do (default: toy)")
    shown = COMMANDS[argv[0] if argv and argv[0] in COMMANDS else "toy"][1]  # --help tells the defaults of the command it is asked of
    add_options(parser, [f.name for f in dataclasses.fields(Config)], shown)
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    return command, Config(**COMMANDS[command][1] | given)


def main():
    try:
        command, cfg = parse(sys.argv[1:])
        COMMANDS[command][0](cfg)
    except (BadInput, OSError) as error:
        sys.exit(f"tgrl.py: {error}")
    except KeyboardInterrupt:
        sys.exit("tgrl.py: stopped")


if __name__ == "__main__":
    main()

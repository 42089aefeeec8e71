"""TGRL: Trajectory-Guided Reinforcement Learning for multimodal RLVR (arXiv 2603.26126), in one file.

    python tgrl.py                                      the method on a toy world, on a CPU, in minutes
    python tgrl.py experts --data hiyouga/geometry3k    sample, score and grade expert answers into a cache
    python tgrl.py train --data hiyouga/geometry3k      train Qwen2.5-VL-3B with them
    torchrun --nproc-per-node 8 tgrl.py train ...       the same on eight GPUs

A question with a picture gets a group of answers: most are sampled from the policy, a few come from a
stronger model, the expert. The method, which is also the order of `train` at the end of section 7:

    for each step:
        copy the policy into the actor, which samples
        draw questions, at most max_draws times, until enough groups are chosen; for each question:
            sample n_on answers from the actor                                     Eq. 13
            take up to n_off cached answers of the expert, with their log pi_phi   Eq. 14
            R = 1 if the boxed answer is right, else 0                             Eq. 3
            A = (R - mean R) / std R, over the whole group                         Eq. 15, 16
            m = 1 for a right expert answer, 0 for a wrong one                     Eq. 22
            choose the group if its rewards, those with m = 0 aside, differ; others fill up at the end
        if several updates follow: compute log pi_old of the policy's chosen answers
        for each update, on its part of the chosen groups:
            compute log pi_theta of every answer token, with gradient
            ratio = pi_theta / pi_old; for expert tokens rho = pi_theta / pi_phi   Eq. 17
            Delta = log pi_phi - log pi_theta; Delta~: standardized in its answer  Eq. 18, 19
            w = sigmoid(beta * Delta~), without gradient                           Eq. 20
            r~ = ratio; for expert tokens m * w * rho                              Eq. 21, 23
            J = mean of min(r~ A, clip(r~) A), in GRPO minus a KL                  Eq. 24, 25
            take a step of AdamW

A right expert's token gets the gradient share * A * w * rho * grad log pi_theta, or none where the clip acts.
rho = e^-Delta shrinks tokens that the policy underestimates; w, at most 1, those that it knows already.

Shapes: B questions, G answers a question, N answers in all, P prompt tokens, T answer tokens, R rows,
L tokens a row, D hidden size, V vocabulary. Names: log pi_theta is logp; log pi_old and log pi_phi are
behavior_logp; m is expert_ok, r~ the coefficient, beta of Eq. 20 the sharpness, beta of Eq. 24 kl_coef.

What the paper leaves open, and what is done here (reasons in README.md):
    gradient through w                 none
    a wrong expert answer              stays in mean, std and averages; m takes its gradient away
    KL                                 k3 estimator, a mean over the policy's own answers (`train` scales it)
    means over answers, tokens         over all of an update, on all processes, not first within a group
    whether the rewards differ         judged without filtered answers, though A counts them
    pi_old                             by the policy before several updates; for a single one pi_theta itself
"""

import base64
import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

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
from qwen_vl_utils import fetch_image
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoProcessor, Cache, GenerationConfig, Qwen2_5_VLForConditionalGeneration

# ===== 1. The loss: Eq. 15-25. It needs torch alone; copy the section as it is. =======================
# Every answer brings `behavior_logp`, its log-probs under whoever wrote it, pi_old or pi_phi. So the ratio of
# PPO and Eq. 17 are one line. `shares` says how much each token counts, so an update can be split at will.


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """rewards [B, G] of whole groups, policy and expert answers together (Eq. 14) -> advantages [B, G]."""
    if rewards.shape[1] < 2:
        raise ValueError(f"a group of {rewards.shape[1]} has nothing to compare; it needs two answers")
    rewards = rewards - rewards[:, :1]  # so that equal rewards give 0, not what rounding leaves
    mean = rewards.mean(1, keepdim=True)  # [B, 1]  Eq. 15
    std = rewards.std(1, keepdim=True)  # [B, 1], over n - 1  Eq. 15
    return (rewards - mean) / (std + eps)  # Eq. 16


@torch.no_grad()
def expert_weights(logp: Tensor, behavior_logp: Tensor, mask: Tensor, sharpness: float, eps=1e-6) -> Tensor:
    """w [N, T] in [0, 1]: how much the policy underestimates a token, against the rest of its answer."""
    mask = mask.bool()
    delta = torch.where(mask, behavior_logp - logp, 0).clamp(-20, 20)  # [N, T]  Eq. 18
    count = mask.sum(1, keepdim=True)  # [N, 1]
    mean = delta.sum(1, keepdim=True) / count.clamp(min=1)
    deviation = torch.where(mask, delta - mean, 0)
    std = (deviation.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    standardized = deviation / (std + eps)  # Eq. 19
    return torch.sigmoid(sharpness * standardized)  # Eq. 20


def unified_coefficient(logp, behavior_logp, mask, is_expert, expert_ok, sharpness: float | None) -> Tensor:
    """r~ [N, T]: the importance ratio; for experts times m * w. Tensors as below; sharpness None: w = 1."""
    # where: padding may hold anything. clamp: as in EasyR1; beyond it there is no gradient.
    log_ratio = torch.where(mask.bool(), logp - behavior_logp.detach(), 0).clamp(-20, 20)  # [N, T]
    ratio = log_ratio.exp()  # Eq. 17, and the ratio of PPO
    w = 1.0 if sharpness is None else expert_weights(logp, behavior_logp, mask, sharpness)  # Eq. 18-20
    f = ratio * w  # Eq. 21
    m = expert_ok.to(f.dtype).reshape(len(mask), 1)  # [N, 1]  Eq. 22
    return torch.where(is_expert.reshape(len(mask), 1), m * f, ratio)  # Eq. 23


def token_shares(mask: Tensor, algorithm: str, n_trajectories=None, n_tokens=None) -> Tensor:
    """[N, T]: a token's share of the objective. n_*: of the whole update; default: of this batch."""
    mask = mask * 1.0
    if algorithm == "grpo":  # a mean over answers of their means over tokens
        length = mask.sum(1, keepdim=True).clamp(min=1)
        return mask / length / (n_trajectories or len(mask))  # 1/|G| 1/|o_i|, |G| of all groups  Eq. 24
    if algorithm == "dapo":  # a mean over tokens
        return mask / (n_tokens or mask.sum().clamp(min=1))  # 1/sum |o_i|, over all groups  Eq. 25
    raise ValueError(f"algorithm is {algorithm!r}; it can be 'grpo' or 'dapo'")


def tgrl_loss(
    logp: Tensor,  # [N, T] log pi_theta, with gradient; float32; padding may hold anything
    behavior_logp: Tensor,  # [N, T] log pi_old (for a single update logp.detach()); log pi_phi for experts
    mask: Tensor,  # [N, T] True: an answer token, the end token included
    advantages: Tensor,  # [N] group_advantages(rewards).flatten()
    is_expert: Tensor,  # [N] bool
    expert_ok: Tensor,  # [N] bool, m of Eq. 22; it says nothing of the policy's own answers
    shares: Tensor,  # [N, T] token_shares(mask, "grpo" or "dapo")
    *,
    sharpness: float | None,
    clip_low: float,
    clip_high: float,
    kl_coef: float = 0.0,  # beta of Eq. 24; `train` passes beta * all / own answers (or tokens)
    ref_logp: Tensor | None = None,  # [N, T] log pi_ref
) -> tuple[Tensor, dict]:
    """-> (loss, metrics). Without expert answers this is GRPO (Eq. 2) or DAPO (Eq. 4) exactly. A metric is a
    pair (sum, count), and pairs add up over micro-batches and processes. A filtered expert answer, with r~ 0
    and A <= 0, adds (1 - clip_low) * A to the surrogate, without gradient; metrics leave it out."""
    assert mask.shape == logp.shape == behavior_logp.shape == shares.shape, "each of them is [N, T]"
    mask, advantage = mask.bool(), advantages.reshape(len(mask), 1)  # [N, T], [N, 1]
    own, expert = (mask & who.reshape(len(mask), 1) for who in (~is_expert, is_expert & expert_ok))  # [N, T]
    coefficient = unified_coefficient(logp, behavior_logp, mask, is_expert, expert_ok, sharpness)  # Eq. 17-23
    bounded = coefficient.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(coefficient * advantage, bounded * advantage)  # [N, T]
    loss = -(shares * surrogate).sum()  # Eq. 2, 4, 24, 25

    def total(value: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(where, value.detach(), 0).sum(), where.sum()

    metrics = {
        "objective": (total(shares * surrogate, own | expert)[0], shares.sum()),  # 1 in an update
        "entropy": total(-logp, own),  # estimated from the tokens that were sampled
        "ratio": total(coefficient, own),
        "clipped": total((coefficient * advantage > bounded * advantage).float(), own),  # no gradient there
        "expert_coefficient": total(coefficient, expert),
        "expert_delta": total(behavior_logp - logp, expert),
    }
    if kl_coef:
        if ref_logp is None:
            raise ValueError("kl_coef needs ref_logp, the log-probs of the reference")
        gap = torch.where(own, ref_logp.detach() - logp, 0).clamp(-20, 20)  # own answers: k3 needs samples
        k3 = gap.expm1() - gap  # e^gap - 1 - gap, precise where it is small
        loss = loss + kl_coef * (shares * k3).sum()  # Eq. 2, 24
        metrics["kl"] = total(k3, own)
    return loss, metrics


# ===== 2. Reward: is the boxed answer right?   Eq. 3 ==================================================

UNICODE = {"²": "^2", "³": "^3", "√": r"\sqrt ", "∞": r"\infty ", "π": r"\pi ", "×": r"\times "}
UNICODE |= {"−": "-", "–": "-", "º": "°", "˚": "°", "∠": "", "%": " ", "厘": "c", "米": "m"}
NOTHING = r"\\(?:angle|left|right)(?![a-z])|\\$|^(?:[=≈€]|about )+|[=≈]+$|\.$"  # means nothing
NOTHING += r"|(?<=\d)(?:\{,\}|,| )(?=\d{3}(?:\D|$))"  # in 10,000
PLAIN = {NOTHING: "", r" (?:square|sq\.?) ([a-z]+)": r" \1^2", r" cubic ([a-z]+)": r" \1^3"}
PLAIN |= {r"\^ ?\{? ?(?:\\circ|°|o) ?\}?|\\(?:circ|degree)| deg(?:rees?)?\b": "°", r"\\approx": "≈"}
PLAIN |= {r"\\sqrt ?(\d+|\([^()]*\))": r"\\sqrt{\1}", r"(?<![A-Za-z\\])pi(?![A-Za-z])": r"\\pi"}
PLAIN |= {r"(?<!\d)(\d+) (\d+) ?/ ?(\d+)": r"(\1+\2/\3)", r"(?<=[\d)}]) ?units?(?:\^[23])?$": ""}  # 3 1/2
COUNT = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORD = r"(?!(?:and|over|plus|times|half|squared|sin|cos|tan|log|hundred|thousand|.illion)\b)[A-Za-z]{3,}\.?"
WORD = rf"(?:(?<=[ /])[mgshlLNJVA]|[cmk]m|[mk]g|m[lL]|in\.?|ft|yd|mi|lb|hr|°C?|Ω|€|{WORD})"
UNIT = rf"(.*(?:[\d)}}]|\\pi)) ?({WORD}(?:[ /]{WORD})*(?: ?\^ ?\{{?[23]\}}?)?)"
NAME = r"(?:^|(?<=,))(?:[^\d=<>!+*/^-]|(?<=[A-Za-z_ ])\d|(?<=_\{)\d)+="  # m\widehat{AB} = 60, not 2x = 60
RUN = r"(?<=[\d.]) ?(?:-|x|\*|\\times) ?(?=[\d.])"  # between the numbers of a range or of dimensions
SENSELESS = r"\d \d|\)\d|^[^A-Za-z]*=[^A-Za-z]*$"  # numbers side by side; 1 = 2
SENSELESS += r"|(?<![-+,(\[<>=])(?<!^)\\infty|[\w)}][-+]\\infty|\\infty(?!$|[,)\]]|\\(?:\}|cup))"  # oo
LATEX = dict(is_real=True, conversion_config=ConversionConfig(lowercase_symbols=False))
LATEX |= dict(normalization_config=NormalizationConfig(malformed_operators=True, boxed="none"))
# sympy can spend hours in C code on 9^{9^{9^9}}. Fork your processes before its first use; each must stop it.
grading_process = pebble.ProcessPool(max_workers=1, context=multiprocessing.get_context("fork"))
math_verify.grader.logger.disabled = True  # it would say once that the timeout is ours
grader_errors = collections.Counter()  # why answers were not graded -> how many


def extract_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}, up to the brace that closes it, or None."""
    *before, rest = re.split(r"\\boxed\s*\{", text)
    depth = 1
    for sign in re.finditer(r"\\.|[{}]", rest if before else "", re.DOTALL):  # \{ is no brace
        depth += (sign[0] == "{") - (sign[0] == "}")
        if depth == 0:
            return rest[: sign.start()].strip()
    return None


def without_latex(text: str) -> str:  # without formula signs, text commands and spaces
    text = re.sub(r"(?<!\\)\\[\[\]()]|\\?\$|\\!", "", text)
    text = re.sub(r"\\(?:text|math)(?:rm|bf|it|normal)?\s*\{([^{}]*)\}", r" \1 ", text)
    return re.sub(" +", " ", re.sub(r"(?<!\\)\\(?:[,;: ]|q?quad\b)|[\s~]", " ", text)).strip()


def value_and_unit(text: str) -> tuple[str, str]:  # the unit, or the words, behind a number
    text = without_latex(text.translate(str.maketrans(UNICODE)))
    for written, compared in PLAIN.items():
        text = re.sub(written, compared, text, flags=re.IGNORECASE).strip()
    text = str(COUNT.index(text.lower())) if text.lower() in COUNT else text
    found = re.fullmatch(UNIT, text)
    return (found[1], re.sub("[^a-z23°]|s$", "", found[2].lower())) if found else (text, "")


def same_formula(*texts: str) -> bool:
    """By math-verify, to which a list is a tuple; so are ratios, and of both a range or dimensions."""
    dashes, sides = all(re.fullmatch(rf"[\d.]+(?:{RUN}[\d.]+)+", text) for text in texts), []
    for text in texts:
        text = re.sub(rf"[;:]| and {f'|{RUN}' * dashes}", ",", text.replace("°", ""))
        if re.search(r",(?![^(\[{]*[)\]}])| or ", text):  # or: a set
            text = f"({text})" if " or " not in text else rf"\{{{text.replace(' or ', ',')}\}}"
        sides.append(re.sub(r"(?<!\d) | (?!\d)", "", text))
    if sides[0] == sides[1] or re.search(SENSELESS, ",".join(sides)):
        return sides[0] == sides[1]
    try:
        return bool(math_verify.verify(*(latex2sympy(text, **LATEX) for text in sides), timeout_seconds=None))
    except Exception:  # it is no mathematics
        return False


def same(prediction: str, answer: str) -> bool:  # runs in the grading process
    (one, unit), (two, other) = value_and_unit(prediction), value_and_unit(answer)
    if re.fullmatch(r"(?i)\(?[A-H]\)?", two):  # "B", "(B)", or "B. 60" for B, but not "A. B"
        return bool(re.fullmatch(rf"(?i)\(?{two.strip('()')}(?:\)[.:]?|[.:]|$) ?(?![A-H(),.: ]+$).*", one))
    one = re.sub(r"(?i)^\(?[A-H](?:\)[.:]?|[.:]) (?=.)", "", one)  # "B. 60", where 60 is asked
    short, long = sorted((unit, other), key=len)  # cm is short for centimeter
    fit = short in ("", long) or (len(short) < 4 <= len(long) and re.fullmatch(".*".join([*short, ""]), long))
    if "" in (one, two) or not fit:
        return False
    words = [text.replace(" ", "").lower() for text in (one, two)]
    if min(map(len, words)) > 1 and any(map(str.isalpha, words)):  # AB is not the product BA
        return words[0] == words[1]
    if "≈" in one + two and one.count("≈") < 2:  # not 1 ≈ 2 ≈ 3
        return any(itertools.starmap(same, itertools.product(one.split("≈"), two.split("≈"))))
    if ("=" in one) != ("=" in two) or one[0].lower() == two[0].lower():  # V = 5 for 5, for Volume = 5
        one, two = re.sub(NAME, "", one), re.sub(NAME, "", two)
    if ("=" in one) != ("=" in two):  # of 2 + 3 = 5 for 5 each side must be right
        return all(itertools.starmap(same, itertools.product(one.split("="), two.split("="))))
    return same_formula(two, one)


def is_equivalent(prediction: str, answer: str) -> bool:  # do the two mean the same?
    if max(len(prediction), len(answer)) > 400:  # nothing longer is compared as mathematics
        return prediction.strip() == answer.strip() != ""
    try:
        return grading_process.schedule(same, (prediction, answer), timeout=2).result()
    except (TimeoutError, pebble.ProcessExpired, RecursionError, MemoryError, ValueError, TypeError) as error:
        grader_errors[type(error).__name__] += 1  # any other error is the pool's, not the answer's
        return False


def reward(response: str, answer: str) -> float:
    """R = 1 if the last boxed expression of the response is equivalent to the answer, else 0."""
    return float(is_equivalent(extract_boxed(response) or "", answer))  # Eq. 3


# ===== 3. Questions: a row of a data set -> Problem -> Prompt; and what a group is ====================

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else the tokenizer warns of the grading process
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as a cache grows in ever new sizes
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said when one process saves
PLACEHOLDER = "<image>"
THINK = "Think step by step between <think> and </think>, then give the answer alone inside \\boxed{}."


class BadInput(ValueError):
    """Something the user can mend: the message says what was wrong, where, and what to do."""


@dataclasses.dataclass
class Options:  # what all commands share; in [brackets]: where a default comes from
    data: str = "hiyouga/geometry3k"  # questions: hub id, .parquet, .jsonl, or a folder [paper]
    split: str = "train"  # its split; "train[:8]" is its first eight rows
    experts: str = "experts.jsonl"  # the cache of expert answers
    instruction: str = THINK  # stands behind each question [asks what EasyR1's asks, in our words]
    min_pixels: int = 262144  # smaller pictures are enlarged to this many pixels [EasyR1]
    max_pixels: int = 4194304  # larger pictures are reduced to this many pixels [EasyR1]
    max_prompt: int = 2048  # questions of more tokens are left out, never truncated [EasyR1]
    max_answer: int = 2048  # answers are truncated after this many tokens [EasyR1]
    generate_batch: int = 0  # answers sampled at once on one process; 0: as many as the GPU's memory holds
    micro_batch: int = 1  # groups a forward pass on one process [EasyR1]
    seed: int = 1  # of the order of questions and of sampling [EasyR1]


@dataclasses.dataclass
class Problem:
    id: str  # hash of question, answer, pictures; `load_problems` adds the prompt's tokens; key of the cache
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
class Trajectory:  # one answer; as its fields are plain, it is also a record of the cache and of groups.jsonl
    ids: list[int]  # T tokens, with the end token unless it was truncated
    text: str
    reward: float
    finished: bool = True  # it has an end token
    source: str = "policy"  # or which expert wrote it
    is_expert: bool = False
    expert_ok: bool = True  # m: false for an expert's wrong answer that is filtered
    advantage: float = 0.0
    logp: list[float] | None = None  # [T] under the policy, for groups.jsonl and `rectify`
    behavior_logp: list[float] | None = None  # [T] under who wrote it: pi_phi or pi_old; None: pi_theta


@dataclasses.dataclass
class Group:
    problem: Problem
    prompt: Prompt
    trajectories: list[Trajectory]
    has_contrast: bool = False  # do the rewards of answers with expert_ok differ?


def say(text: str):  # once, however many processes run, and above a progress bar
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)


def batches(items: list, size: int) -> Iterator[list]:
    return (items[i : i + max(1, size)] for i in range(0, len(items), max(1, size)))


def read_rows(source: str, split: str, config: str | None = None) -> Iterator[dict]:
    """Rows of a hub data set, of a .parquet or .jsonl file, or of a folder of them or of pictures."""
    kind = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.get(Path(source).suffix)
    files = dict(path=kind, data_files=source, split=re.sub(r"^\w+", "train", split))  # a file has no other
    try:
        table = datasets.load_dataset(**files) if kind else datasets.load_dataset(source, config, split=split)
    except Exception as error:
        hint = "give a hub id, a .parquet or .jsonl file, or a folder of such files or of pictures"
        raise BadInput(f"cannot load {source!r}, split {split!r}; {hint}: {error}") from error
    for batch in table.with_format("arrow").iter(64):  # arrow: pictures stay encoded
        yield from batch.to_pylist()


def read_problem(row: dict, source: str = "") -> Problem:
    """One row in the schema of geometry3k (images, problem, answer) or ViRL39K (image, question, answer)."""
    root = Path(source) if Path(source).is_dir() else Path(source).parent  # of relative picture paths
    columns = ", ".join(row)
    row = {"problem": row.get("question"), "images": row.get("image"), "answer": None} | row
    question, answer = (str("" if row[name] is None else row[name]).strip() for name in ("problem", "answer"))
    pictures = row["images"] if isinstance(row["images"], list) else [row["images"]]
    encoded = [p if isinstance(p, dict) else datasets.Image().encode_example(p) for p in pictures if p]
    images = [picture.get("bytes") or (root / picture["path"]).read_bytes() for picture in encoded]
    if len(images) == 1 and PLACEHOLDER not in question:
        question = PLACEHOLDER + question  # some 2 % of ViRL39K lost theirs
    if "" in (answer, question.replace(PLACEHOLDER, "")):
        raise BadInput(f"problem (or question) or answer is empty; its columns are {columns}")
    if not question.count(PLACEHOLDER) == len(images) > 0:
        raise BadInput(f"{question.count(PLACEHOLDER)} times {PLACEHOLDER} for {len(images)} pictures")
    content = hashlib.sha256(repr((question, answer)).encode() + b"".join(images))
    answer = extract_boxed(answer) or answer  # ViRL39K writes \boxed{42}
    return Problem(content.hexdigest()[:16], question, images, answer)


class Encoder:  # question -> prompt, the same way for rollouts, experts, training and evaluation
    def __init__(self, processor, model, options: Options):
        self.processor, self.tokenizer, self.options = processor, processor.tokenizer, options
        self.rope_index, self.generation_config = model.model.get_rope_index, model.generation_config
        ends = model.generation_config.eos_token_id or []  # Qwen's: two; one is also the padding
        self.ends = sorted({self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])})
        # What no answer may hold: vision tokens, which would crash the next forward, and embeddings that have
        # no token, whose number differs from 3B to 32B. They are left out of every softmax.
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        beyond = range(len(self.tokenizer), model.get_output_embeddings().out_features)
        self.unwritable = torch.tensor(sorted({getattr(model.config, name) for name in names}.union(beyond)))

    def __call__(self, problem: Problem) -> Prompt:
        parts = []
        for i, part in enumerate(problem.question.split(PLACEHOLDER)):
            parts += [dict(type="image")] * (i > 0) + [dict(type="text", text=part)] * bool(part.strip())
        chat = [dict(role="user", content=[*parts, dict(type="text", text=" " + self.options.instruction)])]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        limits = dict(min_pixels=self.options.min_pixels, max_pixels=self.options.max_pixels)
        pictures = [fetch_image({"image": Image.open(io.BytesIO(i)), **limits}) for i in problem.images]
        inputs = self.processor(pictures, [text], do_resize=False, return_tensors="pt")
        ids, grid, types = inputs["input_ids"], inputs["image_grid_thw"], inputs["mm_token_type_ids"]
        # Without the types the model would silently number a picture's tokens as if they were text.
        positions, _ = self.rope_index(ids, mm_token_type_ids=types, image_grid_thw=grid)
        return Prompt(ids[0], positions[:, 0].T, inputs["pixel_values"], grid)


def load_problems(source: str, split: str, encoder: Encoder) -> list[Problem]:
    """All questions that can be used; the others are left out and reported together."""
    problems, left_out, limit = [], collections.defaultdict(list), encoder.options.max_prompt
    for number, row in enumerate(tqdm(read_rows(source, split), desc=source, disable=None)):
        try:
            problem = read_problem(row, source)
            ids = encoder(problem).ids.tolist()
            if len(ids) > limit:
                raise BadInput(f"longer than --max_prompt {limit} tokens")
            problem.id = hashlib.sha256(f"{problem.id} {ids}".encode()).hexdigest()[:16]
            problems.append(problem)
        except Exception as error:  # a row may hold anything; equal messages, cut before a value, are counted
            left_out[re.split(" <_|'", f"{type(error).__name__}: {error}")[0]].append(number)
    for reason, rows in left_out.items():
        say(f"{source}: {len(rows)} rows left out, {reason}: row {', '.join(map(str, rows[:8]))}")
    if not problems:
        raise BadInput(f"no row of {source} can be used")
    return problems


def load_model(name: str, dtype: torch.dtype = torch.float32, **options):
    """A Qwen2.5-VL and its processor, from a hub id or a folder: safetensors only, no remote code."""
    try:
        options |= dict(dtype=dtype, use_safetensors=True)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(name, **options)
        return model, AutoProcessor.from_pretrained(name)
    except Exception as error:
        raise BadInput(f"cannot load model {name} as a Qwen2.5-VL, by hub id or folder: {error}") from error


# ===== 4. Rollouts: answers by Hugging Face generate, graded ==========================================


def pad(rows: Iterable, side: str = "right") -> Tensor:
    """Rows of different length -> [rows, longest, ...], with 0 at that side."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_side=side)


def batch_that_fits(model, options: Options, policy=None) -> int:
    """How many answers of full length fit in 90 % of free memory, less AdamW's moments, yet to come."""
    if options.generate_batch or not torch.cuda.is_available():
        return options.generate_batch or 64
    held = 8 * sum(p.to_local().numel() for p in policy.parameters()) if policy else 0
    layers = model.model.language_model.layers
    token = 2 * layers[0].self_attn.k_proj.out_features * model.dtype.itemsize  # its cache in one layer
    on = collections.Counter(layer.self_attn.k_proj.weight.device for layer in layers)
    # The fullest device decides. + 2: where RoomyLayer grows, it copies a layer's cache twice.
    free = min((0.9 * torch.cuda.mem_get_info(device)[0] - held) / (n + 2) for device, n in on.items())
    return max(1, int(free) // (token * (options.max_prompt + options.max_answer)))


def vision_inputs(prompts: list[Prompt]) -> dict:
    pixels, grid = torch.cat([p.pixels for p in prompts]), torch.cat([p.grid for p in prompts])
    return {"pixel_values": pixels, "image_grid_thw": grid}


def embed(model, ids: Tensor, pictures: Iterable[dict]) -> Tensor:
    """ids [R, L] -> [R, L, D] with pictures in the place of their tokens; a part of them at a time."""
    see, embeds = model.model.get_image_features, model.get_input_embeddings()(ids)
    features = torch.cat([f for part in pictures for f in see(**part, return_dict=True).pooler_output])
    return embeds.masked_scatter((ids == model.config.image_token_id)[..., None], features.to(embeds))


class RoomyLayer(transformers.cache_utils.DynamicLayer):
    """A layer's cache that grows by 256 tokens at a time; Hugging Face's is copied for each new one."""

    room = None  # [2, B, heads, T and some more, D]

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:  # [B, heads, T, D]
        start = self.get_seq_length()
        if not start:
            return super().update(keys, values)
        if self.room is None or start == self.room.shape[3]:
            self.room = nn.functional.pad(torch.stack([self.keys, self.values]), (0, 0, 0, 256))
        self.room[:, :, :, start : start + 1] = torch.stack([keys, values])
        self.keys, self.values = self.room[:, :, :, : start + 1]
        return self.keys, self.values


@torch.no_grad()
def sample(actor, encoder: Encoder, prompts: list[Prompt], n: int, temperature: float = 1.0) -> list[list]:
    """n answers to each prompt, as token ids up to and with the first end token. In training the temperature
    is 1, else pi_old is not what was sampled from; at 0 it takes the likeliest token."""
    # A config of our own: the checkpoint's has settings like repetition_penalty 1.05.
    how = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else {}
    how |= dict(max_new_tokens=encoder.options.max_answer, suppress_tokens=encoder.unwritable.tolist())
    actor.generation_config = GenerationConfig(eos_token_id=encoder.ends, pad_token_id=encoder.ends[0], **how)
    ids = pad((p.ids for p in prompts), "left").to(actor.device)  # [B, P]
    seen = pad((torch.ones_like(p.ids) for p in prompts), "left").to(actor.device)  # [B, P]
    positions = pad((p.positions for p in prompts), "left").to(actor.device).movedim(-1, 0)  # [3, B, P]

    # Each question is prefilled once, but for its last token, and its cache repeated for its answers.
    pictures = (send_to_device(vision_inputs(part), actor.device) for part in batches(prompts, 8))
    embeds, cache = embed(actor, ids[:, :-1], pictures), Cache(layer_class_to_replicate=RoomyLayer)
    known = dict(attention_mask=seen[:, :-1], position_ids=positions[..., :-1])
    actor.model.language_model(inputs_embeds=embeds, **known, cache=cache, use_cache=True)
    cache.batch_repeat_interleave(n)
    sequences = actor.generate(
        ids.repeat_interleave(n, 0),  # [B * n, P]
        attention_mask=seen.repeat_interleave(n, 0),
        position_ids=positions[..., -1:].repeat_interleave(n, 1),  # [3, B * n, 1], counted on from here
        cache=cache,  # past_key_values before transformers 5.24
    )
    answers = []
    for tokens in sequences[:, ids.shape[1] :].tolist():
        length = next((i + 1 for i, token in enumerate(tokens) if token in encoder.ends), len(tokens))
        answers.append(tokens[:length])
    return list(batches(answers, n))


def grade(ids: list[int], problem: Problem, encoder: Encoder) -> Trajectory:
    text = encoder.tokenizer.decode(ids, skip_special_tokens=True)
    return Trajectory(ids, text, reward(text, problem.answer), finished=ids[-1] in encoder.ends)


def rollout(actor, encoder: Encoder, problems: list[Problem], n: int, temperature: float = 1) -> list[Group]:
    """n graded answers to each question; at once at most --generate_batch, and 128 questions."""
    groups, size = [], min(128, encoder.options.generate_batch // max(2, n))  # a prefill takes memory, too
    for part in batches(problems, size):
        prompts = [encoder(problem) for problem in part]
        answers = sample(actor, encoder, prompts, n, temperature)
        for problem, prompt, some in zip(part, prompts, answers, strict=True):
            groups.append(Group(problem, prompt, [grade(ids, problem, encoder) for ids in some]))
    return groups


# ===== 5. Log-probs: a group is one row, or a few =====================================================
#   row:       [ picture, question but its last token | answer 1 | answer 2 | ... | answer G ]
#   segment:     0 0 0 0 0 0 0 0 0                      1 1 1 1    2 2 2           G G G G
#   position:    0 1 ...         p-1                    p p+1 ..   p p+1 ..        p p+1 ..
#   p, the position of the question's last token, is below P - 1, as a picture's tokens share positions.
#   An answer begins with a copy of the question's last token (at p), which predicts its first one, and lacks
#   its own last token. So the hidden states of segments 1 to G predict the answers' tokens, in order.
#   attention:      question  answer 1  answer 2     A token sees what stands before it in the question and in
#       question    causal       .         .         its own answer. Log-probs and gradients are those of G
#       answer 1    all        causal      .         rows, for P + G*T tokens instead of G*(P + T).
#       answer 2    all          .       causal
#   Attention goes over (P + G*T)^2, a waste where answers are long. A token costs c1 FLOPs in the weights and
#   c2 * L in attention; rows of P * sqrt(c1 / (c2 * P) + 1) answer tokens cost least: long groups get a few.


def answers_of(groups: list[Group]) -> list[Trajectory]:
    return [t for group in groups for t in group.trajectories]


def pack(groups: list[Group], device: torch.device | str = "cpu", c1_by_c2: float = math.inf):
    """Each group as one row, or several (see the drawing): what the policy reads, and what the loss needs."""
    rows, ids, positions, segments, answers = [], [], [], [], answers_of(groups)
    for group in groups:
        n_prompt, tokens = len(group.prompt.ids), sum(len(t.ids) for t in group.trajectories)
        n_rows = max(1, int(tokens / n_prompt / math.sqrt(c1_by_c2 / n_prompt + 1)))
        size = math.ceil(len(group.trajectories) / n_rows)  # about the same in each
        rows += [(group.prompt, some) for some in batches(group.trajectories, size)]
    for prompt, some in rows:
        parts, places = [prompt.ids[:-1]], [prompt.positions[:-1]]
        for t in some:
            parts.append(torch.tensor([prompt.ids[-1], *t.ids[:-1]]))
            places.append(prompt.positions[-1] + torch.arange(len(t.ids))[:, None])
        ids.append(torch.cat(parts))
        positions.append(torch.cat(places))
        segments.append(torch.cat([torch.full_like(part, number) for number, part in enumerate(parts)]))
    tensors = dict(
        ids=pad(ids),  # [R, L]
        positions=pad(positions),  # [R, L, 3]
        segments=pad(segments),  # [R, L] 0: question, or padding, which stands last, so that nothing sees it
        vision=vision_inputs([prompt for prompt, _ in rows]),
        target=pad(t.ids for t in answers),  # [N, T]
        mask=pad([True] * len(t.ids) for t in answers),  # [N, T] True: an answer token, the end token too
        behavior_logp=pad(t.behavior_logp or [math.nan] * len(t.ids) for t in answers),  # [N, T] nan: as logp
        advantages=torch.tensor([t.advantage for t in answers]),  # [N]
        is_expert=torch.tensor([t.is_expert for t in answers]),
        expert_ok=torch.tensor([t.expert_ok for t in answers]),
    )
    return SimpleNamespace(**send_to_device(tensors, device))


class Policy(nn.Module):  # a Qwen2.5-VL, be it student, expert or reference, as log-probs of answers
    def __init__(self, model, unwritable: Tensor):
        super().__init__()
        model.set_attn_implementation("sdpa")  # another would misread the mask of `forward`
        self.model, self.unwritable = model, unwritable
        layer, width = model.model.language_model.layers[0], model.config.text_config.hidden_size
        self.c1_by_c2 = sum(p.numel() for p in layer.parameters()) / (2 * width)  # 2 * weights / (4 * width)

    def token_logp(self, hidden: Tensor, target: Tensor) -> Tensor:  # [tokens, D] -> [tokens], in float32
        logits = self.model.lm_head(hidden).float()
        logits = logits.index_fill(-1, self.unwritable.to(logits.device), -torch.inf)  # [tokens, V]
        return -nn.functional.cross_entropy(logits, target.to(logits.device), reduction="none")

    def forward(self, batch: SimpleNamespace) -> Tensor:  # logp [N, T], 0 at padding
        query, key = batch.segments[:, :, None], batch.segments[:, None, :]
        hidden = self.model.model.language_model(
            inputs_embeds=embed(self.model, batch.ids, [batch.vision]),
            position_ids=batch.positions.movedim(-1, 0),
            attention_mask=((key == 0) | (key == query)).tril()[:, None],  # [R, 1, L, L]
            use_cache=False,
        ).last_hidden_state  # [R, L, D]
        hidden = hidden[(batch.segments > 0).to(hidden.device)]  # [tokens, D], in the order of target[mask]
        parts = zip(hidden.split(1024), batch.target[batch.mask].split(1024), strict=True)
        # in parts, and recomputed in the backward pass, so that not all [tokens, V] logits exist at once
        logp = torch.cat([checkpoint(self.token_logp, *part, use_reentrant=False) for part in parts])
        return torch.zeros_like(batch.behavior_logp).masked_scatter(batch.mask, logp.to(batch.mask.device))


@torch.no_grad()
def score(policy: Policy, groups: list[Group], micro_batch: int) -> Iterator[tuple[Trajectory, list[float]]]:
    """Every answer with its log-probs, by the forward pass that training uses."""
    policy.eval()
    for part in batches(groups, micro_batch):
        logp = policy(pack(part, policy.model.device, policy.c1_by_c2)).tolist()
        yield from ((t, row[: len(t.ids)]) for t, row in zip(answers_of(part), logp, strict=True))


# ===== 6. Experts: answers of a stronger model, cached with their log-probs under that model ==========
# The cache is JSONL, an answer a line, right or wrong. A question's id hashes pictures, right answer and
# the prompt's tokens: so it is taken only where the prompt is the same. A group may get no expert's answer.


def append_records(path: Path, records: list[dict]):
    """In one write, as processes may append together; on a new line, if a kill tore the last record."""
    with open(path, "ab+", buffering=0) as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read()[-1:] not in (b"", b"\n")
        file.write(("\n" * torn + "".join(json.dumps(record) + "\n" for record in records)).encode())


def read_records(path: Path) -> Iterator[dict]:
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):  # it is empty, or a kill tore it
            yield json.loads(line)


def read_cache(path: Path, questions: Iterable[str]) -> dict[str, list[Trajectory]]:
    """Expert answers by question's id; what the cache has for these questions is said."""
    experts = {question: [] for question in questions}
    for record in read_records(path):
        if not 0 < len(record.get("ids") or ()) == sum(x <= 0 for x in record.get("behavior_logp") or ()):
            raise BadInput(f"{path} holds a record that is not an answer with a log-prob for each token")
        if (question := record.pop("question")) in experts:
            experts[question].append(Trajectory(**record | {"is_expert": True}))
    answers = [t for some in experts.values() for t in some]
    right, cut = sum(t.reward == 1 for t in answers), sum(not t.finished for t in answers)
    answered = f"{len(answers)} answers to {sum(map(bool, experts.values()))} of {len(experts)} questions"
    say(f"{path}: {answered}, {right} right, {cut} truncated")
    return experts


def start_processes() -> tuple[Accelerator, torch.dtype]:  # and the dtype of computation
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # while one samples, the others wait
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for each length, so for each new token
    cuda = accelerator.device.type == "cuda"
    if not torch.distributed.is_initialized():  # started without a launcher: a world of one
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl" if cuda else "gloo", store=store, rank=0, world_size=1)
    return accelerator, torch.bfloat16 if cuda else torch.float32


@dataclasses.dataclass
class Experts(Options):
    """Sample answers from a strong model, score and grade them, and add them to a cache."""

    model: str = "Qwen/Qwen2.5-VL-32B-Instruct"  # the expert: hub id or folder [paper]
    samples: int = 4  # answers a question
    spread: bool = False  # one process, the model spread over all GPUs, if it does not fit one


def make_experts(options: Experts):
    accelerator, dtype = start_processes()
    if options.spread and accelerator.num_processes > 1:
        raise BadInput("--spread is for one process: start it by `python tgrl.py experts`")
    model, processor = load_model(options.model, dtype, device_map="auto" if options.spread else None)
    model = model if options.spread else model.to(accelerator.device)
    encoder, path = Encoder(processor, model, options), Path(options.experts)
    options.generate_batch = batch_that_fits(model, options)
    problems = {p.id: p for p in load_problems(options.data, options.split, encoder)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    experts = read_cache(path, problems)
    accelerator.wait_for_everyone()  # all have read it before one appends
    todo = [p for p in problems.values() if len(experts[p.id]) < options.samples]
    todo = todo[accelerator.process_index :: accelerator.num_processes]
    policy, size = Policy(model, encoder.unwritable), options.generate_batch // options.samples
    for part in tqdm(list(batches(todo, size)), disable=None if accelerator.is_main_process else True):
        torch.manual_seed(options.seed + int(part[0].id, 16))
        groups = rollout(model, encoder, part, options.samples)
        for t, logp in score(policy, groups, options.micro_batch):
            t.source, t.is_expert, t.behavior_logp = options.model, True, logp
        for group in groups:  # keep only as many as the question lacks
            new = group.trajectories[len(experts[group.problem.id]) :]
            append_records(path, [{"question": group.problem.id, **vars(t)} for t in new])
    errors = sum(gather_object([grader_errors]), collections.Counter())
    say(f"answers that could not be graded, and count as wrong: {dict(errors) or 'none'}")
    accelerator.wait_for_everyone()
    read_cache(path, problems)


# Experts of its own, in the spirit of the abstract of IVR-R1 (arXiv 2605.23997), which is all that is public:
# a wrong answer is cut before a doubted step and continued TRIES times, with the picture once more. The
# first right one is trained on behind the plain prompt; pi_phi of its new part is behind the second look.

LOOK = "Look once more, closely, and go on from where the answer stands."
DOUBTED = -2.0  # a token of a log-prob below this makes its step suspect
TRIES = 8  # continuations sampled from before the suspect step


def before_doubt(t: Trajectory, decode) -> list[int]:
    """What stands before the first sentence or line with a token that the policy doubts."""
    # The first, as what follows a slip is doubted, too. A step begins behind a line break, or ". " or such.
    cut = next((i for i, logp in enumerate(t.logp) if logp < DOUBTED), t.logp.index(min(t.logp)))
    while cut and not re.search(r"(?s)\n.|[.!?;]\s", decode(t.ids[cut - 1]) + decode(t.ids[cut])[:1]):
        cut -= 1
    return t.ids[:cut]


def look_again(problem: Problem, begun: list[int], encoder: Encoder) -> Prompt:  # begun: an answer's start
    question = f"{problem.question}\n{PLACEHOLDER * len(problem.images)} {LOOK}"
    prompt = encoder(dataclasses.replace(problem, question=question, images=problem.images * 2))
    ids = torch.cat([prompt.ids, torch.tensor(begun, dtype=torch.long)])
    positions = prompt.positions[-1] + torch.arange(1, len(begun) + 1)[:, None]  # [T, 3]
    return dataclasses.replace(prompt, ids=ids, positions=torch.cat([prompt.positions, positions]))


def rectify(actor, encoder: Encoder, groups: list[Group]) -> dict[str, list[Trajectory]]:
    """By id of a question with a wrong answer: [its first right continuation, if there is one]."""
    judge, wrong, made = Policy(actor, encoder.unwritable), [], {}
    for group in groups:
        if failed := [t for t in group.trajectories if t.reward == 0]:
            wrong.append(Group(group.problem, group.prompt, failed[:1]))
    for t, logp in score(judge, wrong, encoder.options.micro_batch):
        t.logp = logp
    for part in batches(wrong, encoder.options.generate_batch // (2 * TRIES)):  # as two looks are long
        begun = [before_doubt(t, encoder.tokenizer.decode) for t in answers_of(part)]
        prompts = [look_again(group.problem, ids, encoder) for group, ids in zip(part, begun, strict=True)]
        tails = sample(actor, encoder, prompts, TRIES)
        for group, ids, prompt, some in zip(part, begun, prompts, tails, strict=True):
            longest = encoder.options.max_answer
            answers = [grade((ids + tail)[:longest], group.problem, encoder) for tail in some]
            made[group.problem.id] = [t for t in answers if t.reward == 1 and t.finished][:1]
            for t in made[group.problem.id]:  # its start was written under the plain prompt, its tail not
                tail = Group(group.problem, prompt, [Trajectory(t.ids[len(ids) :], "", 1.0)])
                [(_, logp)] = score(judge, [tail], 1)
                t.behavior_logp = group.trajectories[0].logp[: len(ids)] + logp
                t.source, t.is_expert = "self", True
    return made


# ===== 7. Training ====================================================================================

BY_ALGORITHM = {
    "grpo": dict(sharpness=5.0, clip_high=0.2, kl_coef=0.01, token_mean=False, max_draws=1),
    "dapo": dict(sharpness=14.0, clip_high=0.28, kl_coef=0.0, token_mean=True, max_draws=20),
}


@dataclasses.dataclass
class Train(Options):
    """Train by TGRL-DAPO or TGRL-GRPO; with --experts self on experts that the policy makes [IVR-R1]."""

    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # the student: hub id or folder [paper]
    val_data: str = ""  # held-out questions for greedy accuracy during training; empty: none
    val_split: str = "test"  # its split
    out: str = "runs/train"  # folder of the run: metrics.jsonl, groups.jsonl, checkpoints, the trained model
    resume: bool = False  # continue the run in --out from its newest checkpoint
    algorithm: Literal["dapo", "grpo"] = "dapo"  # sets what is "by algorithm" below
    n_on: int = 7  # answers of the policy in a group, at least 2 [paper, Geo3K; 4 for ViRL39K]
    n_off: int = 1  # answers of the expert in a group; 0: DAPO or GRPO, for which take --n_on 8 [paper]
    sharpness: float | None = None  # beta of Eq. 20 [by algorithm; paper: 14 dapo, 5 grpo]
    reweight: bool = True  # weigh expert tokens by Eq. 18-20; no: w = 1 [paper, Table 1]
    filter: bool = True  # give wrong expert answers no weight, Eq. 22; no: m = 1 [paper, Table 1]
    clip_low: float = 0.2  # lower clip of the coefficient [EasyR1]
    clip_high: float | None = None  # upper clip [by algorithm; EasyR1: 0.28 dapo; Eq. 24: as the lower]
    kl_coef: float | None = None  # beta of Eq. 24 [by algorithm; EasyR1: 0.01 grpo; DAPO has none]
    token_mean: bool | None = None  # average over tokens (Eq. 25), not over answers (Eq. 24) [by algorithm]
    max_draws: int | None = None  # rounds of drawing questions [by algorithm; EasyR1: 20 for dapo]
    steps: int = 60  # each a rollout and its updates [paper: 15 epochs of Geo3K are 60, 2 of ViRL39K 150]
    questions_per_rollout: int = 512  # questions a step, over all processes [EasyR1]
    questions_per_update: int = 128  # questions an update [EasyR1]
    lr: float = 1e-6  # learning rate of AdamW, constant [EasyR1]
    checkpointing: bool = True  # recompute activations in the backward pass, to save memory [EasyR1]
    every: int = 5  # steps between checkpoints, evaluations, and groups kept for `eval.py show` [EasyR1]

    def __post_init__(self):
        for name, value in BY_ALGORITHM[self.algorithm].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.sharpness = self.sharpness if self.reweight else None  # None: w = 1
        self.method = ("TGRL-" if self.n_off else "") + self.algorithm.upper()
        self.average = "dapo" if self.token_mean else "grpo"  # whose mean is taken
        self.cache = Path(self.experts) if self.n_off and self.experts != "self" else None


def make_policy(actor, encoder: Encoder) -> Policy:
    """The actor's weights in float32, sharded by FSDP2, which gathers a block in its dtype when it runs."""
    with torch.device("meta"):  # so that no process ever holds all of it
        policy = Policy(Qwen2_5_VLForConditionalGeneration(actor.config).float(), encoder.unwritable)
    # cast_forward_inputs would round the vision tower's rotary embeddings, which the actor does not.
    precision = MixedPrecisionPolicy(actor.dtype, torch.float32, cast_forward_inputs=False)
    for block in [*policy.model.model.visual.blocks, *policy.model.model.language_model.layers, policy]:
        fully_shard(block, mp_policy=precision)
    policy.to_empty(device=actor.device)
    with torch.no_grad():
        for mine, full in zip(policy.parameters(), actor.parameters(), strict=True):
            mine.copy_(distribute_tensor(full.float(), mine.device_mesh, mine.placements, src_data_rank=None))
        for mine, full in zip(policy.buffers(), actor.buffers(), strict=True):
            mine.copy_(full)
    return policy


class Run:  # what a step reads or changes; its state_dict is what a checkpoint holds
    def __init__(self, options: Train):
        self.options, self.out, self.experts = options, Path(options.out), {}
        if options.cache and not options.cache.exists():
            raise BadInput(f"no --experts {options.cache}; make it by `tgrl.py experts`, or take --n_off 0")
        if (self.out / "metrics.jsonl").exists() and not options.resume:
            raise BadInput(f"--out {self.out} holds a run; --resume continues it, another --out begins one")
        self.accelerator, dtype = start_processes()
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        update = options.questions_per_update
        if update % self.world or options.questions_per_rollout % update:
            raise BadInput(f"{self.world} processes must divide --questions_per_update, and it the rollout's")
        self.actor, processor = load_model(options.model, dtype)
        self.actor.to(self.accelerator.device)  # samples; whole, in the dtype of computation
        self.encoder = Encoder(processor, self.actor, options)
        self.problems = load_problems(options.data, options.split, self.encoder)
        val = options.val_data, options.val_split, self.encoder
        self.held_out = load_problems(*val) if options.val_data else []
        if options.cache:
            self.experts = read_cache(options.cache, [p.id for p in self.problems])
            if not any(self.experts.values()):
                why = "as they are asked here; was it made for other data, instruction, pixels or tokenizer?"
                raise BadInput(f"{options.cache} answers none of these questions {why}")
        self.policy = make_policy(self.actor, self.encoder)  # is trained; sharded
        self.ref = make_policy(self.actor, self.encoder).requires_grad_(False) if options.kl_coef else None
        if options.checkpointing:
            self.policy.model.activation_checkpointing_enable()
        adam = dict(lr=options.lr, weight_decay=0.01, fused=self.actor.device.type == "cuda")  # [EasyR1]
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), **adam)
        n = options.generate_batch = batch_that_fits(self.actor, options, self.policy)
        self.step = self.drawn = 0  # steps done; questions drawn by all processes
        if (checkpoints := sorted(self.out.glob("checkpoints/??????"))) and options.resume:
            dcp.load({"run": self}, checkpoint_id=checkpoints[-1], no_dist=self.world == 1)
        self.accelerator.wait_for_everyone()  # all have seen whether --out holds a run before one writes
        self.out.mkdir(parents=True, exist_ok=True)
        self.write("metrics.jsonl", dict(method=options.method, config=dataclasses.asdict(options)))
        say(f"{options.method} at step {self.step}, {self.world} x {self.actor.device}, {n} answers at once")

    def write(self, name: str, record: dict):
        if self.rank == 0:
            append_records(self.out / name, [record])

    def state_dict(self) -> dict:
        weights, optimizer = get_state_dict(self.policy, self.optimizer)
        return dict(model_state_dict=weights, optim_state_dict=optimizer, step=self.step, drawn=self.drawn)

    def load_state_dict(self, state: dict):
        self.step, self.drawn = state.pop("step"), state.pop("drawn")
        set_state_dict(self.policy, self.optimizer, **state)
        self.optimizer.param_groups[0]["lr"] = self.options.lr  # it may be another now

    @torch.no_grad()
    def refresh_actor(self):
        for target, source in zip(self.actor.parameters(), self.policy.parameters(), strict=True):
            target.copy_(source.full_tensor())

    def save(self):
        """A checkpoint, written beside and renamed: a kill leaves the one before it; and the model."""
        folder = self.out / "checkpoints" / f"{self.step:06}"
        if folder.exists():  # the one from which this run was resumed
            return
        beside = folder.with_suffix(".tmp")
        # Each process writes its shards. A lone one does not exchange, which would slow it from then on.
        dcp.save({"run": self}, checkpoint_id=beside, no_dist=self.world == 1)
        if self.rank == 0:
            self.actor.generation_config = self.encoder.generation_config
            self.actor.save_pretrained(self.out / "model")
            self.encoder.processor.save_pretrained(self.out / "model")
            beside.rename(folder)
            for old in sorted(folder.parent.glob("??????"))[:-3]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def between_steps(self) -> dict:
        """If it is due: a checkpoint, and greedy accuracy on the held-out questions; -> metrics."""
        due = self.step % self.options.every == 0 or self.step == self.options.steps
        if due and self.step:
            self.save()
        mine = self.held_out[self.rank :: self.world] if due else []
        answers = answers_of(rollout(self.actor, self.encoder, mine, 1, temperature=0))
        return {"accuracy": (sum(t.reward for t in answers), len(answers))}

    def draw(self, n: int) -> list[Problem]:
        """n questions for each process, from one list that is shuffled anew for each epoch."""
        first, mine = self.drawn + self.rank * n, []
        self.drawn += self.world * n
        for i in range(first, first + n):
            epoch, place = divmod(i, len(self.problems))
            order = torch.Generator().manual_seed(hash((self.options.seed, epoch)))
            mine.append(self.problems[torch.randperm(len(self.problems), generator=order)[place]])
        return mine

    def add_experts(self, groups: list[Group]) -> dict:
        """Up to n_off of a question's cached answers, at random; or one that the policy made; -> metrics."""
        self_made = self.options.experts == "self" and self.options.n_off > 0
        experts = rectify(self.actor, self.encoder, groups) if self_made else self.experts
        for group in groups:
            some = experts.get(group.problem.id, [])
            order = torch.randperm(len(some))[: self.options.n_off]
            group.trajectories += [dataclasses.replace(some[i]) for i in order]
        return {"rectified": (sum(map(len, experts.values())), len(experts))} if self_made else {}

    def report(self, metrics: list[dict]) -> dict:
        """Add up the totals of all processes -> one record a step, and the gist of it on the terminal."""
        metrics.append({"grader_errors": (grader_errors.total(), 1 / self.world)})
        grader_errors.clear()
        mine = [(name, float(a), float(b)) for totals in metrics for name, (a, b) in totals.items()]
        sums, counts = collections.Counter(), collections.Counter()
        for name, value, count in gather_object(mine):
            sums[name] += value
            counts[name] += count
        means = {name: sums[name] / counts[name] for name in sums if counts[name]}
        gist = "accuracy reward expert_reward contrast truncated entropy grad_norm seconds"
        told = [f"{name} {means[name]:.3g}" for name in gist.split() if name in means]
        say(f"step {self.step:>3}/{self.options.steps}  {'  '.join(told)}")
        self.write("metrics.jsonl", {"step": self.step, **means})
        return means

    def keep_groups(self, groups: list[Group]):
        """For `eval.py show`: some groups as they were trained on."""
        for group in groups if self.step % self.options.every == 0 else ():
            p, decode = group.problem, self.encoder.tokenizer.decode
            images = [base64.b64encode(image).decode() for image in p.images]
            answers = [vars(t) | {"tokens": [decode([i]) for i in t.ids]} for t in group.trajectories]
            record = dict(step=self.step, question=p.question, answer=p.answer, images=images)
            self.write("groups.jsonl", record | {"answers": answers})


def set_advantages(group: Group, use_filter: bool):
    rewards = torch.tensor([[t.reward for t in group.trajectories]])  # [1, G]
    for t, advantage in zip(group.trajectories, group_advantages(rewards)[0].tolist(), strict=True):
        t.expert_ok = t.reward == 1 or not t.is_expert or not use_filter  # Eq. 22
        t.advantage = advantage  # Eq. 15, 16
    group.has_contrast = len({t.reward for t in group.trajectories if t.expert_ok}) > 1


def describe(groups: list[Group]) -> dict:  # totals over groups that were drawn, chosen or not
    own = [t for t in answers_of(groups) if not t.is_expert]
    values = {
        "reward": [t.reward for t in own],
        "expert_reward": [t.reward for t in answers_of(groups) if t.is_expert],
        "answer_tokens": [len(t.ids) for t in own],
        "truncated": [not t.finished for t in own],
        "contrast": [group.has_contrast for group in groups],
    }
    return {name: (sum(some), len(some)) for name, some in values.items()}


def train(options: Train) -> dict:
    """The method. Its lines stand in the order of the pseudocode at the top of this file."""
    run = Run(options)
    quota = options.questions_per_rollout // run.world  # groups that this process chooses
    n_updates = options.questions_per_rollout // options.questions_per_update
    clip = dict(sharpness=options.sharpness, clip_low=options.clip_low, clip_high=options.clip_high)
    while run.step < options.steps:
        start = time.perf_counter()
        run.refresh_actor()
        metrics = [run.between_steps()]
        torch.manual_seed(hash((options.seed, run.step, run.rank)))  # so that a resumed run samples the same

        chosen, flat, tried, n = [], [], 0, quota  # groups with contrast, without; tried; to try next
        for _ in range(options.max_draws):
            tried += n
            groups = rollout(run.actor, run.encoder, run.draw(n), options.n_on)  # Eq. 3, 13
            metrics.append(run.add_experts(groups))  # Eq. 14
            for group in groups:
                set_advantages(group, options.filter)  # Eq. 15, 16, 22
                (chosen if group.has_contrast else flat).append(group)
            metrics.append(describe(groups))
            del flat[quota:]  # their pictures take memory
            found = gather_object([len(chosen)])  # so all processes decide alike
            # for each process: what the neediest one lacks / the share of groups with contrast so far
            n = min(quota, math.ceil((quota - min(found)) * tried * run.world / max(1, sum(found))))
            if n <= 0:
                break
        # A surplus is dropped, groups without contrast fill a gap; GRPO, which draws once, takes all.
        chosen = (chosen + flat)[:quota]
        if n_updates > 1:  # pi_old, by the policy itself; for a single update it is logp, below
            for t, logp in score(run.policy, chosen, options.micro_batch):
                t.behavior_logp = t.behavior_logp if t.is_expert else logp
        for i in range(n_updates):
            groups = chosen[i::n_updates]  # a stride, so that each update gets some of both kinds
            mine = [(len(t.ids), t.is_expert) for t in answers_of(groups)]
            lengths, is_expert = zip(*gather_object(mine), strict=True)  # of the answers on all processes
            counts = torch.tensor(lengths) ** int(options.token_mean)  # an answer's tokens (^1) or 1 (^0)
            own = counts[~torch.tensor(is_expert)].sum()
            kl_coef = options.kl_coef * float(counts.sum() / own)  # so the KL is a mean over the policy's own
            for part in batches(groups, options.micro_batch):
                batch = pack(part, run.actor.device, run.policy.c1_by_c2)
                logp = run.policy.train()(batch)  # [N, T]
                behavior_logp = torch.where(batch.behavior_logp.isnan(), logp.detach(), batch.behavior_logp)
                labels = batch.mask, batch.advantages, batch.is_expert, batch.expert_ok
                shares = token_shares(batch.mask, options.average, len(lengths), sum(lengths))
                kl = dict(kl_coef=kl_coef, ref_logp=run.ref(batch)) if run.ref else {}
                loss, totals = tgrl_loss(logp, behavior_logp, *labels, shares, **clip, **kl)  # Eq. 17-25
                (loss * run.world).backward()  # FSDP averages gradients over processes
                for t, new, old in zip(answers_of(part), logp.tolist(), behavior_logp.tolist(), strict=True):
                    t.logp, t.behavior_logp = new[: len(t.ids)], old[: len(t.ids)]
                metrics.append(totals)
            norm = nn.utils.clip_grad_norm_(run.policy.parameters(), 1.0).full_tensor()  # [EasyR1]
            if 0 < norm < math.inf:  # at 0 only momentum and weight decay would move the policy
                run.optimizer.step()
            run.optimizer.zero_grad()
            metrics.append({"grad_norm": (norm, 1)})
        metrics.append({"seconds": (time.perf_counter() - start, 1)})
        run.report(metrics)
        run.keep_groups(chosen[:4])
        run.step += 1
    run.refresh_actor()
    return run.report([run.between_steps()])


# ===== 8. The toy: everything above, tiny and real, on a CPU ==========================================
# .toy/ holds questions, a student and an expert, made once; its README says how, and how good they are.

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


def greedy_accuracy(model: str, data: Path) -> float:
    actor, processor = load_model(model)
    encoder = Encoder(processor, actor, Options(**TOY))
    problems = load_problems(str(data), "test", encoder)
    answers = answers_of(rollout(actor, encoder, problems, n=1, temperature=0))
    return sum(t.reward for t in answers) / len(answers)


def toy(options: Toy):
    start = time.perf_counter()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise BadInput("the toy is for one process; start it by `python tgrl.py`")
    if not TOY_WORLD.exists():
        raise BadInput(f"no folder {TOY_WORLD}; it comes with the repository, beside tgrl.py")

    data, cache = f"{TOY_WORLD}/train.parquet", f"{options.out}/experts.jsonl"
    if options.experts == "cache":
        make_experts(Experts(model=f"{TOY_WORLD}/expert", data=data, experts=cache, samples=2, **TOY))

    accuracy = {}
    for n_on, n_off in ((8, 0), (7, 1)):
        training = Train(
            model=f"{TOY_WORLD}/student",
            data=data,
            val_data=f"{TOY_WORLD}/test.parquet",
            experts=cache if options.experts == "cache" else "self",
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
        known = train(training)["accuracy"]
        unseen = greedy_accuracy(f"{training.out}/model", TOY_WORLD / "unseen.parquet")
        accuracy[training.method] = known, unseen

    print(f"\nGreedy accuracy after {options.steps} steps of 24 questions, 8 answers to each:")
    print(f"  {'':10} new pictures   new pairs of sides")
    for method, (known, unseen) in accuracy.items():
        print(f"  {method:10} {known:12.1%} {unseen:20.1%}")
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} seconds; to look at both: python eval.py show {options.out}/*PO")


def main():
    try:
        options = tyro.cli(Toy | Experts | Train, default=Toy(), description=__doc__, use_underscores=True)
        for name, value in vars(options).items():
            least = {"n_on": 2, "n_off": 0, "generate_batch": 0, "seed": 0}.get(name, 1)
            if type(value) is int and value < least:
                raise BadInput(f"--{name} must be at least {least}, not {value}")
        {Toy: toy, Experts: make_experts, Train: train}[type(options)](options)
        torch.distributed.destroy_process_group()  # else threads of gloo may outlive Python, and abort it
    except (BadInput, OSError, KeyboardInterrupt) as error:
        raise SystemExit(f"tgrl.py: {str(error) or 'stopped'}") from None


if __name__ == "__main__":
    main()

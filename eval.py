"""eval.py: how good a model is, and what a training did.

    python eval.py run runs/train/model mathvista wemath mathverse mathvision hallusionbench
    python eval.py run runs/train/model geo3k mathvista=my/mathvista.parquet --samples 8 --temperature 1
    python eval.py run --out runs/eval --rescore     grade the recorded answers again, without a model
    python eval.py compare runs/eval runs/other      two evaluations, item by item
    python eval.py show runs/grpo runs/tgrl          curves.png and groups.html of trainings

All grading is by the rules below: no judge model, no API key, and nothing leaves the denominator. A row that
cannot be read, and an answer that cannot be found, count as wrong and are counted.
"""

import ast
import base64
import collections
import hashlib
import itertools
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2
import math_verify
import matplotlib
import numpy as np
import torch
import tyro
from accelerate.utils import broadcast_object_list
from matplotlib.figure import Figure  # not pyplot: no window and no global state
from matplotlib.lines import Line2D
from tqdm import tqdm

import tgrl
from tgrl import BadInput, is_equivalent

LETTERS = "ABCDEFGHIJ"
COUNT = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
UNICODE = {"²": "^2", "³": "^3", "√": r"\sqrt ", "π": r"\pi ", "×": r"\times ", "−": "-", "°": ""}

# ===== 1. Rules: (what was said, the record with answer and choices) -> right or wrong ================


def find_answer(text: str) -> str | None:
    """What is in the last box; else what follows "answer is" or "Answer:"; else a short line alone."""
    if boxed := tgrl.extract_boxed(text):
        return boxed
    _, thought, said = text.rpartition("</think>")
    if "<think>" in text and not thought:
        return None
    labels = r"(?im)(?:answer|option|choice|letter) is\b[:*]*\s*|^\W*(?:\w+ ){0,2}answer\W*?:\**\s*"
    _, *answers = re.split(labels, said)
    short = re.fullmatch(r"\s*(.{1,80})\s*", said)
    return answers[-1].split("\n")[0].strip() or None if answers else short and short[1].strip()


def without_latex(text: str) -> str:  # without formula signs, text commands and spaces
    text = re.sub(r"(?<!\\)\\[\[\]()]|\\?\$|\\!", "", text)
    text = re.sub(r"\\(?:text|math)(?:rm|bf|it|normal)?\s*\{([^{}]*)\}", r" \1 ", text)
    return re.sub(" +", " ", re.sub(r"(?<!\\)\\(?:[,;: ]|q?quad\b)|[\s~]", " ", text)).strip()


def plain(text: str) -> str:
    """Without LaTeX's text commands and spaces, formula signs, bold, a full stop at the end, and case."""
    text = without_latex(re.sub(r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3})", ",", text))
    return text.replace("**", "").strip().rstrip(" .").lower()


def equivalent(said: str, item: dict) -> bool:
    """The reward of the training, Eq. 3."""
    return is_equivalent(said, item["answer"])


def choice(said: str, item: dict) -> bool:
    """The option's letter, with or without its text; or its text; or its value, if no other has it."""
    words, options = plain(said), dict(zip(LETTERS, item["choices"], strict=False))
    texts = {letter: plain(option) for letter, option in options.items()}
    right, letters = texts.get(item["answer"], ""), "".join(options or LETTERS).lower()
    if words in set(texts.values()) - set(letters):
        return words == right  # a text that is there twice is right for both
    label = re.match(
        rf"(?:option |choice |answer:? )?[(\[]?([{letters}])(?:[)\]][.:]?|[.:]|$) ?(.*)", words
    )
    if label:  # not "A: no", where B is no
        other = label[2] in set(texts.values()) - {texts.get(label[1].upper())}
        another = r"(?:^|[,;/&(]|\band |\bor )\s*\(?[a-j](?:[).:]|$| *(?:[,;/&]|and\b|or\b))"  # "B. or C."
        several = re.search(another, label[2]) and label[2] != right
        return label[1].upper() == item["answer"] and not other and not several
    if label := re.match(rf"([{letters}])[ ,=-]+\(?(.*?)\)?$", words):  # "B 35", but not "a line"
        return label[1].upper() == item["answer"] and right != "" and is_equivalent(label[2], right)
    fits = is_equivalent(
        said, options.get(item["answer"], "")
    )  # first, as each may take two seconds
    return fits and not any(
        is_equivalent(said, options[key]) for key in options if texts[key] != right
    )


def yes_or_no(said: str, item: dict) -> bool:
    return set(re.findall(r"\b(?:yes|no)\b", plain(said))) == {item["answer"]}


NO_NUMBER = r"\bnot\b|\bpi\b|π|illion\b|thousand"
NO_NUMBER += r"|\d ?[xyz]\b|\d/[a-z]\b|\b[a-z] ?[-+] ?\d"  # 3x, 1/n, n - 1
VALUE = r"(-? ?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[+-]?\d+)?)(?:/(\d+(?:\.\d+)?))?"
BEFORE = r"[a-zα-ωµå_ =:≈€£¥'\"(]*?"
AFTER = r"(?:[a-zα-ωµå %°'\"/.)](?:\^\{?[23]\}?|[²³])?)*"  # words and units, cm^2


def number(text: str) -> float | None:
    """The only number in a text: 1,200 or -3.5 or 1/2, with words or a unit around it, but no formula."""
    text = re.sub(r"\\%|\^?\{?\\(?:circ|degree)\}?|\\approx", "", plain(text)).replace("−", "-")
    text = re.sub(r"(?<![\d.])(?<!\d )\\[dt]?frac\{(-?[\d.]+)\}\{([\d.]+)\}", r"\1/\2", text)
    if len(text) > 100 or re.search(NO_NUMBER, text):
        return None
    if not re.search(r"\d", text):  # there are two
        text = re.sub(rf"\b({'|'.join(COUNT)})\b", lambda word: str(COUNT.index(word[0])), text)
    found = re.fullmatch(BEFORE + VALUE + AFTER, text)
    try:
        value = float(found[1].replace(",", "").replace(" ", "")) / float(found[2] or 1)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) else None


def exact(answer: str) -> float | None:
    """The value of pi or a root in a benchmark's own answer."""
    parsed = math_verify.parse(f"${answer.strip('$').translate(str.maketrans(UNICODE))}$")
    real = parsed and getattr(parsed[0], "is_number", False) and parsed[0].is_real
    return float(parsed[0].evalf()) if real else None


def rounded(said: str, item: dict) -> bool:
    """Equivalent, or equal at the item's decimals."""
    if is_equivalent(said, item["answer"]):
        return True
    value, wanted, places = number(said), number(item["answer"]), item["precision"]
    wanted = exact(item["answer"]) if value is not None and wanted is None else wanted
    if value is None or wanted is None:
        return False
    if not places:  # MathVista's integers are cut off, but no fraction is
        return int(value) == int(wanted) and not re.search("/|frac", said)
    return round(value, places) == round(wanted, places)


def parts(said: str, item: dict) -> bool:
    """Answers of several lines: as many are said; letters in any order, others equivalent and in this one."""
    wanted = [part.strip() for part in item["answer"].split("\n") if part.strip()]
    if all(re.fullmatch(r"\(?[A-J]\)?", part) for part in wanted):
        here, there = (
            re.sub(r"\band\b|[^a-z]", "", plain(text)) for text in (said, item["answer"])
        )
        return sorted(here) == sorted(there)
    some = [said]
    if len(wanted) > 1:
        said = re.sub(r"\\text\s*\{\s*and\s*\}", " and ", said)
        said = re.sub(
            r"^\W*[\[({]([^\[\](){}]*)[\])}]\W*$", r"\1", said.replace("\\}", "}")
        )  # [0, 8]
        seams = r"[;\n]|\\\\|\band\b|,(?!\d{3}(?!\d))(?![^(\[]*[)\]])"  # no comma in a number or brackets
        some = [part for part in re.split(seams, said) if part.strip()]
    return len(some) == len(wanted) and all(map(is_equivalent, some, wanted))


def any_of(said: str, item: dict) -> bool:
    """MMMU's for open questions: one of the answers, to two decimals, or as words within what was said."""
    answers = item["answer"] if isinstance(item["answer"], list) else [item["answer"]]
    words = [re.escape(plain(answer)) for answer in answers if re.search("[A-Za-z]{2}", answer)]
    if any(re.search(rf"(?<!\w){word}(?!\w)", plain(said)) for word in words):
        return True
    return any(rounded(said, {"answer": answer, "precision": 2}) for answer in answers)


RULES = {rule.__name__: rule for rule in (equivalent, choice, yes_or_no, rounded, parts, any_of)}


def judge(texts: list[str], item: dict) -> dict:
    """What was found in each answer, whether it is right, and how often the grader failed."""
    find = (
        tgrl.extract_boxed if item["rule"] == "equivalent" else find_answer
    )  # training rewards boxes alone
    found, before = [find(text) for text in texts], tgrl.grader_errors.total()
    correct = [bool(said and RULES[item["rule"]](said, item)) for said in found]
    return {
        "extracted": found,
        "correct": correct,
        "grader_errors": tgrl.grader_errors.total() - before,
    }


# ===== 2. Benchmarks: where rows are, how one becomes a question, and what differs from the official rule


class Benchmark(NamedTuple):
    # row -> problem, images, answer, rule; and choices, precision, by (what to report apart), together
    read: Callable[[dict], dict]
    hub: str
    split: str
    config: str | None = None


def lettered(options: list[str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))


def split_options(text: str) -> list[str]:
    """ "A. 3; B. 4" -> ["3", "4"]; empty if the letters do not run from A on."""
    pieces = re.split(r"(?:^|[;,\s])\(?([A-J])[.:)]\s*", text)
    in_order = pieces[1::2] == list(LETTERS[: len(pieces) // 2])
    return [piece.strip(" ;,\n") for piece in pieces[2::2]] if in_order else []


def problems(row: dict) -> dict:
    """Any file or data set that train takes."""
    return row | {
        "rule": "equivalent",
        "by": {"category": row["category"]} if row.get("category") else {},
    }


def mathvista(row: dict) -> dict:
    """Official: a language model extracts the answer, and the option of least edit distance is taken."""
    meta, kind = row["metadata"], row["answer_type"]
    by = {"type": row["question_type"], "task": meta["task"], "language": meta["language"]}
    item = {
        "problem": row["query"],
        "image": row["decoded_image"],
        "answer": row["answer"],
        "by": by,
    }
    if row["question_type"] == "multi_choice":
        letter = LETTERS[row["choices"].index(row["answer"])]
        return item | {"rule": "choice", "answer": letter, "choices": row["choices"]}
    if kind == "list":
        return item | {
            "rule": "parts",
            "answer": "\n".join(map(str, ast.literal_eval(row["answer"]))),
        }
    rule = {"integer": "rounded", "float": "rounded", "text": "parts"}[kind]
    return item | {"rule": rule, "precision": int(row["precision"] or 0) if kind == "float" else 0}


def wemath(row: dict) -> dict:
    """Accuracy over all questions, as in the paper; the official four-dimensional score is another scale."""
    question = f"{row['question']}\n\nOptions: {row['option']}"
    item = row | {"problem": question, "image": row["image_path"], "by": {"steps": row["key"]}}
    return item | {"rule": "choice", "choices": split_options(row["option"])}


def mathvision(row: dict) -> dict:
    options, answer = list(row["options"] or ()), row["answer"].replace("\f", "\\f")
    answer = re.sub(r"(?<=\d)\{([a-z ]+)\}$", r" \1", answer)  # 69{degrees}
    question = re.sub(r"<image\d+>", "", row["question"])
    if options:
        question += "\nOptions:\n" + lettered(options)
    by = {"type": "choice" if options else "free", "level": row["level"], "subject": row["subject"]}
    item = {"problem": question, "image": row["decoded_image"], "answer": answer, "by": by}
    if options and answer in list(LETTERS):  # some options are just A to E, or pictures
        return item | {"rule": "choice", "choices": options}
    return item | {"rule": "rounded", "precision": 2}


def mathverse(row: dict) -> dict:
    """Official: a language model judges. A rule counts fewer free answers as right; compare the choices."""
    subject = row["metadata"]["subject"]
    by = {"version": row["problem_version"], "type": row["question_type"], "subject": subject}
    item = row | {"problem": row["query_cot"], "by": by}
    choices = split_options(row["question_for_eval"].partition("Choices:")[2])
    answer = row["answer"].strip("() ")
    answer = (
        LETTERS[choices.index(answer)] if answer in choices else answer
    )  # four rows give the text
    if re.fullmatch("[A-J]", answer):
        return item | {"answer": answer, "rule": "choice", "choices": choices}
    return item | {"rule": "parts"}


def hallusionbench(row: dict) -> dict:
    """aAcc, the paper's, is the accuracy; fAcc and qAcc count a figure, a question, only if all of its rows
    are right. Official: a language model judges, also questions without a picture, left out here."""
    where = "/".join(str(row[key]) for key in ("category", "subcategory", "set_id"))
    question = row["question"] + "\nThe final answer can only be \\boxed{yes} or \\boxed{no}."
    answer = {"0": "no", "1": "yes"}[str(row["gt_answer"])]
    item = row | {"problem": question, "answer": answer, "rule": "yes_or_no"}
    together = {"fAcc": f"{where}/{row['figure_id']}", "qAcc": f"{where}/{row['question_id']}"}
    by = {"category": row["category"], "subcategory": row["subcategory"]}
    return item | {"by": by, "together": together}


def mmmu(row: dict) -> dict:
    """Also MMMU-Pro. Official: the same, but where no option is found it guesses at random."""
    options, answer = [str(option) for option in ast.literal_eval(row["options"])], row["answer"]
    shown = row.get("question") or "Answer the question in the picture by the letter of the option."
    if options and row.get("question"):  # MMMU-Pro's vision rows have both in the picture
        shown += "\n" + lettered(options)
    numbers = re.findall(r"<image (\d+)>", shown)
    images = [row[f"image_{i}"] for i in numbers] or [row.get("image") or row["image_1"]]
    by = {"subject": row.get("subject") or re.sub(r"^[a-z]+_|_\d+$", "", row["id"])}
    item = {"problem": re.sub(r"<image \d+>", tgrl.IMAGE, shown), "images": images, "by": by}
    if options:
        return item | {"rule": "choice", "answer": answer, "choices": options}
    if answer.startswith("["):
        answer = [str(one) for one in ast.literal_eval(answer)]
    return item | {"rule": "any_of", "answer": answer}


def mmstar(row: dict) -> dict:
    choices = split_options(re.split("Options:|Choices:", row["question"])[-1])
    return row | {"rule": "choice", "choices": choices, "by": {"category": row["category"]}}


BENCHMARKS = {
    "wemath": Benchmark(wemath, "We-Math/We-Math", "testmini"),
    "mathvista": Benchmark(mathvista, "AI4Math/MathVista", "testmini"),
    "mathverse": Benchmark(mathverse, "AI4Math/MathVerse", "testmini", "testmini"),
    "mathvision": Benchmark(mathvision, "MathLLMs/MathVision", "test"),
    "hallusionbench": Benchmark(hallusionbench, "lmms-lab/HallusionBench", "image"),
    "geo3k": Benchmark(problems, "hiyouga/geometry3k", "test"),
    "mmmu": Benchmark(mmmu, "lmms-lab/MMMU", "validation"),
    "mmmu-pro": Benchmark(mmmu, "MMMU/MMMU_Pro", "test", "standard (10 options)"),
    "mmmu-pro-vision": Benchmark(mmmu, "MMMU/MMMU_Pro", "test", "vision"),
    "mmstar": Benchmark(mmstar, "Lin-Chen/MMStar", "val"),
    "toy": Benchmark(problems, str(tgrl.TOY_WORLD / "test.parquet"), "test"),
    "problems": Benchmark(problems, "problems.jsonl", "test"),  # any: problems=held_out.jsonl
}
FIVE = list(BENCHMARKS)[:5]  # the paper's
PAPER = {  # Tables 1 and 3, in the order of FIVE: Qwen2.5-VL-7B, before and after training on Geo3K
    "paper, Qwen2.5-VL-7B": (63.10, 67.50, 46.20, 25.00, 64.60),
    "paper, GRPO": (67.40, 70.50, 50.80, 27.30, 69.80),
    "paper, DAPO": (69.30, 70.30, 50.60, 26.50, 67.90),
    "paper, TGRL-GRPO": (70.29, 71.50, 51.08, 27.41, 72.02),
    "paper, TGRL-DAPO": (71.05, 71.40, 55.21, 28.61, 71.29),
}

# ===== 3. run: answer the questions, and record =======================================================


@dataclass
class Run:
    """Answer benchmarks into --out, a record for each row, and report. Continues where it was killed."""

    model: tyro.conf.Positional[str] = (
        ""  # hub id or folder; one in a training's folder is asked as trained
    )
    benchmarks: tyro.conf.Positional[
        tuple[str, ...]
    ] = ()  # NAME, or NAME=SOURCE: a hub id, file or folder
    out: Path = Path("runs/eval")  # folder of the records, begun or continued
    temperature: float = 0.0  # 0: the likeliest answer
    samples: int = 1  # answers a question, for mean@k and pass@k
    rescore: bool = False  # only grade the records in --out again, without a model
    instruction: str | None = (
        None  # stands behind each question; this and the next three: None is as trained
    )
    min_pixels: int | None = None  # smaller pictures are enlarged to this many pixels
    max_pixels: int | None = None  # larger pictures are reduced to this many pixels
    max_answer: int | None = None  # answers are truncated after this many tokens
    generate_batch: int = 64  # answers sampled at once on one process
    seed: int = 1  # of sampling
    limit: int = 0  # answer the first rows of each benchmark only; 0: all


ASKED = ("instruction", "min_pixels", "max_pixels", "max_answer")  # what an answer depends on, too


def as_asked(options: Run) -> dict:
    """How to ask: by the options, else as the training in whose folder the model lies, else by default."""
    asked, model = {name: getattr(tgrl.Options, name) for name in ASKED}, Path(options.model)
    paths = [folder / "metrics.jsonl" for folder in list(model.resolve().parents)[:3]]
    if path := next((path for path in paths if model.exists() and path.is_file()), None):
        tgrl.say(f"asking as {path} says the model was trained")
        for header in tgrl.read_records(path):
            asked |= {
                name: value for name, value in header.get("config", {}).items() if name in ASKED
            }
    return asked | {
        name: getattr(options, name) for name in ASKED if getattr(options, name) is not None
    }


def read_sources(options: Run) -> dict[str, str]:
    """Benchmark -> hub id or path."""
    known, sources = f"known are {', '.join(BENCHMARKS)}; yours is problems=FILE", {}
    for name, _, path in (text.partition("=") for text in options.benchmarks):
        if name not in BENCHMARKS:
            raise BadInput(f"there is no benchmark {name!r}; {known}")
        if name in sources:
            raise BadInput(
                f"{name} is there twice; give each an evaluation, and an --out, of its own"
            )
        sources[name] = path or BENCHMARKS[name].hub
    if not sources:
        raise BadInput(f"give a model and benchmarks, name or name=path; {known}")
    return sources


def load(name: str, source: str, limit: int) -> list[dict]:
    """The rows; an error if none of them can be read, as when columns are missing."""
    benchmark, why = BENCHMARKS[name], "there are none"
    found = tgrl.read_rows(source, benchmark.split, benchmark.config)
    try:
        rows = list(itertools.islice(found, limit or None))
    except BadInput:
        if not source.startswith("lmms-lab/"):
            raise
        return load(
            name, source.replace("lmms-lab/", "lmms-lab-encoder/"), limit
        )  # some have moved
    for row in rows:
        try:
            tgrl.read_problem(benchmark.read(row), source)
            return rows
        except Exception as error:  # a row may hold anything
            why = f"{type(error).__name__}: {error}. Its columns are {', '.join(row)}"
    raise BadInput(f"{name}: none of the {len(rows)} rows of {source} can be read; {why}")


def evaluations(out: Path) -> dict[str, tuple[dict, dict[int, dict]]]:
    """Benchmark -> (header, records by row) of a folder; of two records of a row the later one counts."""
    found = {}
    for name in BENCHMARKS:
        path = out / f"{name}.jsonl"
        records = list(tgrl.read_records(path)) if path.is_file() else []
        if records and "tgrl_eval" not in records[0]:
            raise BadInput(f"{path} is no evaluation, but has the name of one. Give another --out")
        if records:
            found[name] = records[0], {record["row"]: record for record in records[1:]}
    return found


def changed(place: str) -> float | None:
    """When a file, or the newest in a folder, was written: nobody continues with other weights or data."""
    files = [Path(place)] if Path(place).is_file() else Path(place).glob("*")
    return max((file.stat().st_mtime for file in files), default=None)


def begin(out: Path, headers: dict[str, dict], how: dict) -> dict[str, set[int]]:
    """Begin a file for each benchmark, or go on with it if it is of this evaluation: -> rows answered."""
    found = evaluations(out)
    for name, (header, _) in found.items():  # all in one folder are of one model, asked in one way
        for key, value in headers.get(name, how).items():
            if header.get(key) != value:
                there = f"{key} is {header.get(key)!r} there and {value!r} here"
                raise BadInput(
                    f"{out}/{name}.jsonl is of another evaluation: {there}. Give another --out"
                )
    out.mkdir(parents=True, exist_ok=True)
    for name in headers.keys() - found.keys():
        tgrl.append_records(out / f"{name}.jsonl", [headers[name]])
    return {name: set(found[name][1]) if name in found else set() for name in headers}


def answer_batch(
    part: list, header: dict, encoder: tgrl.Encoder, model, options: Run
) -> list[dict]:
    """The records of some rows, (number, row) pairs, that are answered at once."""
    prompts, asked, records = [], [], []
    for index, row in part:
        record = {"row": index, "by": {}}
        try:
            item = {"choices": []} | BENCHMARKS[header["tgrl_eval"]].read(row)
            kept = ("rule", "answer", "choices", "precision", "by", "together")
            record |= {key: item[key] for key in kept if key in item}
            problem = tgrl.read_problem(item, header["source"])
            answer = item["answer"] if isinstance(item["answer"], list) else problem.answer
            record |= {"id": problem.id, "answer": answer}
            prompts.append(encoder(problem))
            asked.append(record)
        except Exception as error:  # a row may hold anything
            wrong = {"extracted": [None] * options.samples, "correct": [False] * options.samples}
            records.append(record | wrong | {"error": f"{type(error).__name__}: {error}"})
    torch.manual_seed(hash((options.seed, part[0][0])))
    answers = (
        tgrl.sample(model, encoder, prompts, options.samples, options.temperature)
        if prompts
        else []
    )
    for record, some in zip(asked, answers, strict=True):
        texts = [encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in some]
        finished = [ids[-1] in encoder.ends for ids in some]
        records.append(record | {"texts": texts, "finished": finished} | judge(texts, record))
    return records


def evaluate(
    header: dict, rows: list, done: set, encoder: tgrl.Encoder, model, options: Run, accelerator
):
    """Answer what is not answered yet, each process its share of the batches."""
    # One division into batches, whatever is done and however many processes: so answers stay the same.
    parts = tgrl.batches(list(enumerate(rows)), options.generate_batch // options.samples)
    todo = [part for part in parts if not done.issuperset(i for i, _ in part)]
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    name = header["tgrl_eval"]
    for part in tqdm(
        mine, unit="batch", desc=name, disable=None if accelerator.is_main_process else True
    ):
        records = answer_batch(part, header, encoder, model, options)
        tgrl.append_records(
            options.out / f"{name}.jsonl", [r for r in records if r["row"] not in done]
        )


# ===== 4. The report: table, summary.json, bars.png ===================================================

COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
)  # Okabe and Ito's
GREY = "#5b6470"


def wilson(right: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which stays in 0 to 1 and is right for few rows, too."""
    centre, half = right + z * z / 2, z * math.sqrt(right * (n - right) / n + z * z / 4)
    return (centre - half) / (n + z * z), (centre + half) / (n + z * z)


def score(verdicts: list[list[bool]]) -> dict:
    """Accuracy (mean@k) and pass@k of rows; the interval is as wide as for one answer to each row."""
    n, right = len(verdicts), sum(map(statistics.fmean, verdicts))
    result = {"rows": n, "accuracy": right / n, "interval": wilson(right, n)}
    if (k := max(map(len, verdicts))) > 1:
        result[f"pass@{k}"] = sum(map(any, verdicts)) / n
    return result


def by_group(records: list[dict]) -> dict:
    """The scores of what a benchmark reports apart."""
    groups, together = collections.defaultdict(list), collections.defaultdict(list)
    for record in records:
        for kind, value in record["by"].items():
            groups[f"{kind}: {value}"].append(record["correct"])
        for kind, value in record.get("together", {}).items():
            together[kind, value].append(record["correct"])
    for (kind, _), some in together.items():  # right together is right in all of them
        groups[kind].append([all(column) for column in zip(*some, strict=True)])
    return {name: score(some) for name, some in sorted(groups.items())}


def summarize(header: dict, records: dict[int, dict]) -> dict:
    readable, errors = (
        [r for r in records.values() if "error" not in r],
        collections.defaultdict(list),
    )
    for row, record in records.items():
        if "error" in record:
            errors[record["error"]].append(row)
    return score([record["correct"] for record in records.values()]) | {
        "of": header["rows"],
        "limit": header["limit"],
        "model": header["model"],
        "unreadable": errors,
        "no answer found": sum(r["extracted"].count(None) for r in readable),
        "cut off": sum(r["finished"].count(False) for r in readable),
        "grader errors": sum(r["grader_errors"] for r in readable),
        "by": by_group(records.values()),
    }


def told(name: str, s: dict) -> str:
    low, high = s["interval"]
    passed = "".join(f"   {key} {s[key]:6.1%}" for key in s if key.startswith("pass@"))
    return (
        f"{name[:34]:34} {s['rows']:5}   {s['accuracy']:6.1%}   {low:6.1%} to {high:6.1%}{passed}"
    )


def print_table(summaries: dict):
    print(f"\n{'':35} rows accuracy   95 % interval")
    for name, s in summaries.items():
        unfinished = f"   NOT FINISHED, of {s['of']} rows" if s["rows"] < s["of"] else ""
        print(told(name, s) + unfinished + ("   ONLY THE FIRST ROWS" if s["limit"] else ""))
        for group, some in s["by"].items():
            print(told(f"  {group}", some))
        counts = [f"{what} {s[what]}" for what in ("no answer found", "cut off", "grader errors")]
        print(f"  {', '.join(counts)}")
        for reason, rows in s["unreadable"].items():
            print(f"  counted as wrong: {len(rows)} rows unreadable, {reason}: rows {rows[:8]}")


def print_paper(here: list[float]):
    print(f"\n{'in %':22}" + "".join(f"{name:>16}" for name in FIVE) + f"{'average':>10}")
    for method, values in {"here": [100 * share for share in here], **PAPER}.items():
        numbers = (
            "".join(f"{value:16.2f}" for value in values) + f"{statistics.fmean(values):10.2f}"
        )
        print(f"{method:22}" + numbers.replace("nan", "  –"))
    print(
        "The paper's models are 7B, trained on Geo3K; it tells neither its prompt, pixels, nor grader."
    )


def draw_bars(runs: dict[str, dict], path: Path):
    names, width = list(next(iter(runs.values()))), 0.8 / len(runs)
    size = (1.6 + 1.1 * len(names) * max(1, len(runs) / 2), 3.6)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes, places = figure.subplots(), np.arange(len(names))
    for i, (label, summaries) in enumerate(runs.items()):
        shares = 100 * np.array([s["accuracy"] for s in summaries.values()])
        intervals = 100 * np.array([s["interval"] for s in summaries.values()])
        style = dict(color=COLORS[i], label=label, ecolor="#222", capsize=3)
        bars = axes.bar(
            places + i * width, shares, width * 0.92, yerr=abs(intervals.T - shares), **style
        )
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_xticks(places + width * (len(runs) - 1) / 2, names, rotation=20, ha="right")
    axes.set(ylabel="accuracy, %, 95 % interval", ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", frameon=False, fontsize=8)
    figure.savefig(path, facecolor="white")


def report(out: Path):
    """The table, summary.json and bars.png of all evaluations in a folder."""
    summaries = {name: summarize(*pair) for name, pair in evaluations(out).items() if pair[1]}
    if not summaries:
        raise BadInput(f"{out} holds no evaluation; give the --out of `eval.py run`")
    print_table(summaries)
    whole = {
        name: s["accuracy"]
        for name, s in summaries.items()
        if s["rows"] == s["of"] and not s["limit"]
    }
    here = [whole.get(name, math.nan) for name in FIVE]
    if any(name in summaries for name in FIVE):
        print_paper(here)
    average = None if math.isnan(sum(here)) else statistics.fmean(here)
    summary = {"average of the five": average, "benchmarks": summaries}
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    draw_bars({out.resolve().name: summaries}, out / "bars.png")
    print(f"\nwrote {out}/summary.json and bars.png")


def rescore(out: Path):
    """Grade the recorded answers again, without a model; then the report."""
    for name, (_, records) in evaluations(out).items():
        judged = {row: r | judge(r["texts"], r) for row, r in records.items() if "texts" in r}
        changed = [row for row in judged if records[row]["correct"] != judged[row]["correct"]]
        tgrl.append_records(
            out / f"{name}.jsonl", [r for row, r in judged.items() if r != records[row]]
        )
        print(f"{name}: {len(changed)} of {len(records)} verdicts changed: rows {changed[:20]}")
    report(out)


def run(options: Run):
    if options.rescore:
        return rescore(options.out)
    if min(options.samples - 1, options.limit, options.temperature) < 0:
        raise BadInput("--samples must be at least 1, and --temperature and --limit at least 0")
    if options.samples > 1 and not options.temperature:
        raise BadInput(
            "--samples above 1 needs --temperature above 0: greedy answers are all the same"
        )
    sources, asked = read_sources(options), as_asked(options)
    accelerator, dtype = tgrl.start_processes()
    loaded = {name: load(name, source, options.limit) for name, source in sources.items()}
    model, processor = tgrl.load_model(options.model, dtype)
    encoder, model = (
        tgrl.Encoder(processor, model, tgrl.Options(**asked)),
        model.to(accelerator.device),
    )
    how = {
        "model": options.model,
        "model mtime": changed(options.model),
        "dtype": str(dtype),
        **asked,
    }
    how |= {name: getattr(options, name) for name in ("temperature", "samples", "seed", "limit")}
    headers = {name: {"tgrl_eval": name, "source": sources[name]} | how for name in loaded}
    for name, rows in loaded.items():
        headers[name] |= {"data mtime": changed(sources[name]), "rows": len(rows)}
    main = accelerator.is_main_process  # which alone looks what is done, so that all know the same
    [done] = broadcast_object_list([begin(options.out, headers, how) if main else None])
    for name, rows in loaded.items():
        evaluate(headers[name], rows, done[name], encoder, model, options, accelerator)
    accelerator.wait_for_everyone()
    if main:
        report(options.out)


# ===== 5. compare: two evaluations, item by item ======================================================


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p: as if a fair coin had decided each item that the two do not agree on."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def bootstrap(values: list[float], resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % percentile interval of a mean over items."""
    distinct, counts = np.unique(values, return_counts=True)  # draw how often each value comes
    drawn = np.random.default_rng(0).multinomial(len(values), counts / len(values), resamples)
    return tuple(np.quantile(drawn @ distinct / len(values), (0.025, 0.975)).tolist())


@dataclass
class Compare:
    """Two evaluations on the items that both have answered."""

    a: tyro.conf.Positional[Path]  # the --out of an evaluation
    b: tyro.conf.Positional[Path]  # of another
    flips: int = 10  # how many to name of the items that only one got right


def common_rows(name: str, records: dict, others: dict) -> list[int]:
    rows = [row for row in records if row in others]
    ids = [(records[row].get("id"), others[row].get("id")) for row in rows]
    if not rows or any(None not in pair and pair[0] != pair[1] for pair in ids):
        raise BadInput(
            f"{name}: the rows hold different questions; were both made from the same data?"
        )
    return rows


def compare_one(name: str, first: tuple, second: tuple, rows: list[int], flips: int):
    (header, records), (other, others) = first, second
    a, b = (
        np.array([statistics.fmean(some[row]["correct"]) for row in rows])
        for some in (records, others)
    )
    low, high = bootstrap(b - a)
    only_a, only_b = (np.array(rows)[more].tolist() for more in (a > b, b > a))
    p = (
        f"{mcnemar(len(only_a), len(only_b)):.3g}"
        if header["samples"] == other["samples"] == 1
        else "–"
    )
    shares = f"{len(rows):5}   {a.mean():6.1%}   {b.mean():6.1%}   {(b - a).mean():+6.1%}"
    print(f"{name:16} {shares}   {low:+6.1%} to {high:+6.1%}   {p}")
    for which, some in (("A", only_a), ("B", only_b)):
        if some:
            print(f"    right only in {which}: {len(some)} rows, {some[:flips]}")
    what = ("source", "rows", "samples", "temperature", "dtype", *ASKED)
    if different := [key for key in what if header.get(key) != other.get(key)]:
        print(f"    take care, they differ in: {', '.join(different)}")


def compare(a: Path, b: Path, flips: int = 10):  # B against A
    first, second = evaluations(a), evaluations(b)
    names = [name for name in first if name in second]
    if not names:
        raise BadInput(f"{a} has {list(first)} and {b} has {list(second)}: no benchmark in common")
    print(f"A: {a}, {first[names[0]][0]['model']}\nB: {b}, {second[names[0]][0]['model']}\n")
    print(f"{'':16} items        A        B    B − A   95 % interval       p (exact McNemar)")
    shown = {f"A: {a.resolve().name}": {}, f"B: {b.resolve().name}": {}}
    for name in names:
        rows = common_rows(name, first[name][1], second[name][1])
        compare_one(name, first[name], second[name], rows, flips)
        for summaries, (header, records) in zip(
            shown.values(), (first[name], second[name]), strict=True
        ):
            summaries[name] = summarize(header, {row: records[row] for row in rows})
    draw_bars(shown, b / "compare.png")
    print(f"\nwrote {b / 'compare.png'}")


# ===== 6. show: curves.png and groups.html of trainings ===============================================


class Training(NamedTuple):
    folder: Path
    name: str
    config: dict
    steps: list[dict]  # a record of each step
    groups: list[dict]  # a record of each group that was kept


def read_training(folder: Path) -> Training:
    """Of two records of a step the later counts, key by key, and of a group, as a resumed run repeats."""
    paths = (folder / "metrics.jsonl", folder / "groups.jsonl")
    metrics, groups = (list(tgrl.read_records(path)) if path.is_file() else [] for path in paths)
    headers = [record for record in metrics if "config" in record]
    steps = collections.defaultdict(dict)
    for record in metrics:
        if "step" in record:
            steps[record["step"]] |= record
    groups = {(r["step"], r["question"], *r["images"]): r for r in groups}
    if not headers or not steps or not groups:
        raise BadInput(
            f"{folder} has no finished step; give the --out of a training, after its first step"
        )
    in_order = [
        sorted(some.values(), key=lambda record: record["step"]) for some in (steps, groups)
    ]
    return Training(folder, headers[-1]["method"], headers[-1]["config"], *in_order)


PANELS = {
    "accuracy": "Held-out accuracy",
    "reward": "Reward of the policy",
    "expert_reward": "Reward of the expert",
    "rectified": "Wrong answers that the policy put right",
    "contrast": "Groups with contrast",
    "entropy": "Entropy of the policy (nats)",
    "expert_coefficient": r"Expert tokens: coefficient $\tilde{r}$ (Eq. 23)",
    "expert_delta": r"Expert tokens: $\Delta$ (Eq. 18, nats)",
    "grad_norm": "Gradient norm",
    "answer_tokens": "Tokens an answer",
}
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "lines.linewidth": 1.4}
STYLE |= {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ed",
}
STYLE |= {"xtick.color": GREY, "ytick.color": GREY}


def draw_curves(runs: list[Training], names: list[str], path: Path):
    """One panel a quantity, one colour a run. What no run has measured gets no panel."""
    measured = {metric for run in runs for record in run.steps for metric in record}
    metrics = [metric for metric in PANELS if metric in measured]
    rows = math.ceil(len(metrics) / 3)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 2.6 * rows + 0.9), dpi=150, layout="constrained")
        for place, metric in enumerate(metrics, 1):
            axes = figure.add_subplot(rows, 3, place, title=PANELS[metric])
            for i, run in enumerate(runs):
                points = [
                    (record["step"], record[metric]) for record in run.steps if metric in record
                ]
                x, y = zip(*points, strict=True) if points else ((), ())
                axes.plot(x, y, color=COLORS[i % len(COLORS)], marker="." if len(x) < 20 else None)
            if metric != "expert_delta":  # which may be negative
                axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # a small change shall look small
        handles = [
            Line2D([], [], color=COLORS[i % len(COLORS)], linewidth=2.5) for i in range(len(runs))
        ]
        figure.legend(handles, names, loc="outside upper left", ncols=4, frameon=False, fontsize=11)
        figure.supxlabel("step", fontsize=9, color=GREY)
        figure.savefig(path, facecolor="white")


TEMPLATE = Path(__file__).resolve().parent / ".assets" / "groups.html"


def coefficients(t: dict, config: dict) -> dict:
    """w and r~ of each token of an expert's answer, as they were in training."""
    logp, behavior_logp = torch.tensor([[t["logp"], t["behavior_logp"]]]).unbind(1)  # [1, T] each
    mask, yes, ok = (
        torch.ones_like(logp).bool(),
        torch.tensor([True]),
        torch.tensor([t["expert_ok"]]),
    )
    weight, sharpness = torch.ones_like(logp), config["sharpness"]
    if sharpness is not None:  # else w = 1
        weight = tgrl.expert_weights(logp, behavior_logp, mask, sharpness)  # Eq. 18-20
    coefficient = tgrl.unified_coefficient(
        logp, behavior_logp, mask, yes, ok, sharpness
    )  # Eq. 17-23
    return {"weight": weight[0].tolist(), "coefficient": coefficient[0].tolist()}


def cards(group: dict, config: dict) -> list[dict]:
    """What the page shows of a group's answers: the experts' first, and equal ones once, with a count."""
    answers = group["answers"]
    experts = [t | coefficients(t, config) for t in answers if t["source"] != "policy"]
    own = {t["text"]: t for t in answers if t["source"] == "policy"}
    times = collections.Counter(t["text"] for t in answers if t["source"] == "policy")
    return experts + [t | {"times": times[text]} for text, t in own.items()]


def write_groups(run: Training, path: Path):
    """The template escapes all text of models and data, and no script turns text into markup."""
    template = TEMPLATE.read_text(encoding="utf-8")
    # what a browser may do: show embedded pictures; run and use, by their hashes, this script and this style
    policy = "default-src 'none'; base-uri 'none'; img-src data:"
    for tag in ("script", "style"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    steps = collections.defaultdict(list)
    for group in run.groups:
        steps[group["step"]].append(group | {"cards": cards(group, run.config)})
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(template).render(run=run, policy=policy, steps=steps, zip=zip)
    path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")


@dataclass
class Show:
    """Curves and kept groups of trainings, finished or running."""

    runs: tyro.conf.Positional[list[Path]]  # folders that `tgrl.py train --out` wrote


def show(runs: list[Path]):
    """Write curves.png and groups.html into each run; of several, an overlay into the folder above them."""
    folders = list(dict.fromkeys(Path(run).resolve() for run in runs))
    if not folders:
        raise BadInput("give folders that `tgrl.py train --out` wrote")
    loaded = [read_training(folder) for folder in folders]  # all, before anything is written
    for run in loaded:
        draw_curves([run], [run.name], run.folder / "curves.png")
        write_groups(run, run.folder / "groups.html")
        print(f"wrote {os.path.relpath(run.folder)}/curves.png and groups.html")
    if len(loaded) > 1:
        common = Path(os.path.commonpath([folder.parent for folder in folders]))
        draw_curves(
            loaded, [str(folder.relative_to(common)) for folder in folders], common / "curves.png"
        )
        print(f"wrote {os.path.relpath(common / 'curves.png')}")


def main():
    try:
        options = tyro.cli(Run | Compare | Show, description=__doc__, use_underscores=True)
        if isinstance(options, Run):
            run(options)
        elif isinstance(options, Compare):
            compare(options.a, options.b, options.flips)
        else:
            show(options.runs)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # as in tgrl.py
    except (BadInput, OSError, KeyboardInterrupt) as error:
        sys.exit(f"eval.py: {str(error) or 'stopped; `run` continues where it was'}")


if __name__ == "__main__":
    main()
    tgrl.leave()

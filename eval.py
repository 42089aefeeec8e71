"""eval.py: everything that looks at a model or a run.

    python eval.py run runs/train/model mathvista wemath mathverse mathvision hallusionbench
    python eval.py run runs/train/model geo3k mathvista=my/mathvista.parquet --samples 8 --temperature 1
    python eval.py run --out runs/eval --rescore     grade the recorded answers again, without a model
    python eval.py compare runs/eval runs/other      two evaluations, item by item
    python eval.py show runs/grpo runs/tgrl          curves.png and groups.html of trainings, finished or running
    python eval.py bench --model 3B                  what a step costs here: rollout, scoring, update; no download

All grading is by the rules below: no judge model, no API key, and nothing leaves the denominator. A row that cannot be
read, and an answer that cannot be found, count as wrong and are counted.
"""

import argparse
import ast
import base64
import collections
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
import math_verify
import numpy as np
import torch
from accelerate.utils import broadcast_object_list

import tgrl
from tgrl import BadInput, is_equivalent

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito: safe for the colour-blind
GREY = "#5b6470"


def read_lines(path: Path) -> list:
    """The records of a .jsonl file. A torn last line is what a killed, or a running, training leaves: skipped, and said."""
    if not path.is_file():
        raise BadInput(f"there is no {path}; of a training, give the folder that `tgrl.py train --out` wrote, once its first step is done")
    *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")  # splitlines would also split inside of some strings
    if torn:
        print(f"{path}: the last line, {len(lines) + 1}, is incomplete and left out", file=sys.stderr)
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} has a line that is not JSON, {error.doc[:40]!r}; remove it") from None


# ===== Rules: (what was said, the record with answer and choices) -> right or wrong ===================================

LETTERS = "ABCDEFGHIJ"


def find_answer(text: str) -> str | None:
    """What is in the last box; without any, what follows the last "answer is" or a line's "Answer:", once the thinking is over."""
    if boxed := tgrl.extract_boxed(text):
        return boxed
    _, thought, said = text.rpartition("</think>")
    if "<think>" in text and not thought:
        return None
    _, *answers = re.split(r"(?im)answer is\b[:*]*\s*|^\W*(?:the |my )?(?:final |correct )?answer\W*?:\**\s*", said)
    return answers[-1].split("\n")[0].strip() or None if answers else None


def plain(text: str) -> str:
    """Without LaTeX's text commands and spaces, formula signs, bold, a full stop at the end, and case."""
    text = tgrl.without_latex(re.sub(r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3})", ",", text))
    return text.replace("**", "").strip().rstrip(" .").lower()


def equivalent(said: str, item: dict) -> bool:
    """The reward of the training, Eq. 3."""
    return is_equivalent(said, item["answer"])


def choice(said: str, item: dict) -> bool:
    """The option's letter, with or without its text; or its text; or its value, if no other option has that value."""
    words, letter, texts = plain(said), item["answer"], [plain(text) for text in item["choices"]]
    right = dict(zip(LETTERS, texts)).get(letter, "")
    if len(words) > 1 and words in texts:  # a text that is there twice is right for both; a lone letter is a label
        return words == right
    if label := re.match(r"(?:option |choice |answer:? )?[(\[]?([a-j])(?:[)\]][.:]?|[.:]|$) ?(.*)", words):
        another = re.search(r"(?:^|[,;/&(]|\band |\bor )\s*\(?[a-j](?:[).:]|$| *(?:[,;/&]|and\b|or\b))", label[2])  # "B. or C."
        return label[1].upper() == letter and (not another or label[2] == right)
    if label := re.match(r"([a-j])[ ,=-]+\(?(.*?)\)?$", words):  # "B 35", but not "a line"
        return label[1].upper() == letter and right != "" and is_equivalent(label[2], right)
    return right != "" and {text for text in texts if is_equivalent(said, text)} == {right}


def yes_or_no(said: str, item: dict) -> bool:
    return set(re.findall(r"\b(?:yes|no)\b", plain(said))) == {item["answer"]}


def number(text: str) -> float | None:
    """The only number in a text: 1,200 or -3.5 or 1/2, with words, a currency or a unit around it, but no formula."""
    text = re.sub(r"\\%|\^?\{?\\(?:circ|degree)\}?|\\approx", "", plain(text)).replace("−", "-")
    text = re.sub(r"(?<![\d.])(?<!\d )\\[dt]?frac\{(-?[\d.]+)\}\{([\d.]+)\}", r"\1/\2", text)
    formula = r"\d ?[xyz]\b|\d/[a-z]\b|\b[a-z] ?[-+] ?\d"  # 3x, 1/n, n - 1
    if len(text) > 100 or re.search(rf"\bnot\b|\bpi\b|π|illion\b|thousand|{formula}", text):
        return None
    value = r"(-? ?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[+-]?\d+)?)(?:/(\d+(?:\.\d+)?))?"
    found = re.fullmatch(rf"[a-zα-ωµå_ =:≈€£¥'\"(]*?{value}(?:[a-zα-ωµå %°'\"/.)](?:\^\{{?[23]\}}?|[²³])?)*", text)
    try:
        value = float(found[1].replace(",", "").replace(" ", "")) / float(found[2] or 1)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) else None


def rounded(said: str, item: dict) -> bool:
    """Equivalent, or equal once both are rounded to the item's decimals; cut off by int where it has 0, as MathVista's integers are."""
    answer, places = item["answer"], item["precision"]
    value, wanted = number(said), number(answer)
    if wanted is None and value is not None:  # pi and roots, in the benchmark's own answer
        parsed = math_verify.parse(f"${answer.strip('$').translate(tgrl.UNICODE)}$")
        wanted = float(parsed[0].evalf()) if parsed and getattr(parsed[0], "is_number", False) and parsed[0].is_real else None
    cut = lambda x: round(x, places) if places else int(x)  # noqa: E731
    return is_equivalent(said, answer) or (None not in (value, wanted) and cut(value) == cut(wanted))


def parts(said: str, item: dict) -> bool:
    """Answers of several lines: as many parts are said, letters in any order, others equivalent and in this one."""
    wanted = [part.strip() for part in item["answer"].split("\n") if part.strip()]
    if all(re.fullmatch(r"\(?[A-J]\)?", part) for part in wanted):
        letters = lambda text: sorted(re.sub(r"\band\b|[^a-z]", "", plain(text)))  # noqa: E731
        return letters(said) == letters(item["answer"])
    some = [said]
    if len(wanted) > 1:  # commas within numbers and brackets belong to a part
        said = re.sub(r"\\text\s*\{\s*and\s*\}", " and ", said)
        said = re.sub(r"^\W*[\[({]([^\[\](){}]*)[\])}]\W*$", r"\1", said.replace("\\}", "}"))  # [0, 8]
        some = [part for part in re.split(r"[;\n]|\\\\|\band\b|,(?!\d{3}(?!\d))(?![^(\[]*[)\]])", said) if part.strip()]
    return len(some) == len(wanted) and all(map(is_equivalent, some, wanted))


def any_of(said: str, item: dict) -> bool:
    """MMMU's for open questions: one of the answers, to two decimals, or as words that are in what was said."""
    answers = item["answer"] if isinstance(item["answer"], list) else [item["answer"]]
    has_words = lambda answer: re.search("[A-Za-z]", answer) and re.search(rf"(?<!\w){re.escape(plain(answer))}(?!\w)", plain(said))  # noqa: E731
    return any(rounded(said, {"answer": answer, "precision": 2}) or has_words(answer) for answer in answers)


RULES = {rule.__name__: rule for rule in (equivalent, choice, yes_or_no, rounded, parts, any_of)}


def judge(texts: list[str], item: dict) -> dict:
    """What a record says of its answers: what was found in each, and whether it is right."""
    find = tgrl.extract_boxed if item["rule"] == "equivalent" else find_answer  # training rewards what is in a box, and nothing else
    found = [find(text) for text in texts]
    return {"extracted": found, "correct": [bool(said and RULES[item["rule"]](said, item)) for said in found]}


# ===== Benchmarks: where rows are, how one becomes a question, and what is different from the official rule ===========


class Benchmark(typing.NamedTuple):
    read: typing.Callable[[dict], dict]  # row -> problem, images, answer, rule; and choices, by (what to report apart), together
    hub: str
    split: str
    config: str | None = None


def lettered(options: list[str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options))


def split_options(text: str) -> list[str]:
    """"A. 3; B. 4" -> ["3", "4"]; empty if the letters do not run from A on."""
    pieces = re.split(r"(?:^|[;,\s])\(?([A-J])[.:)]\s*", text)
    return [piece.strip(" ;,\n") for piece in pieces[2::2]] if pieces[1::2] == list(LETTERS[: len(pieces) // 2]) else []


def problems(row: dict) -> dict:
    """Any file or data set that train takes."""
    return row | {"rule": "equivalent", "by": {"category": row["category"]} if row.get("category") else {}}


def mathvista(row: dict) -> dict:
    """Official: a language model extracts, then these rules; where no option fits, the one of least edit distance is taken, here none is.
    NoisyRollout compares the extracted letter or text as strings, so that 12.0 is not 12."""
    by = {"type": row["question_type"], "task": row["metadata"]["task"], "language": row["metadata"]["language"]}
    item = {"problem": row["query"], "image": row["decoded_image"], "answer": row["answer"], "by": by}
    if row["question_type"] == "multi_choice":
        return item | {"rule": "choice", "answer": LETTERS[row["choices"].index(row["answer"])], "choices": row["choices"]}
    if row["answer_type"] == "list":
        return item | {"rule": "parts", "answer": "\n".join(map(str, ast.literal_eval(row["answer"])))}
    rule = {"integer": "rounded", "float": "rounded", "text": "parts"}[row["answer_type"]]
    return item | {"rule": rule, "precision": int(row["precision"] or 0) if row["answer_type"] == "float" else 0}


def wemath(row: dict) -> dict:
    """Plain accuracy over all questions, as in the paper's tables and NoisyRollout; the official four-dimensional score is another scale."""
    question = f"{row['question']}\n\nOptions: {row['option']}"
    choices, by = split_options(row["option"]), {"steps": row["key"]}
    return row | {"problem": question, "image": row["image_path"], "rule": "choice", "choices": choices, "by": by}


def mathvision(row: dict) -> dict:
    """Official: option letter, option value, or equal when rounded to two decimals. NoisyRollout: strict equality of strings."""
    options = list(row["options"] or ())
    question = re.sub(r"<image\d+>", "", row["question"]) + ("\nOptions:\n" + lettered(options) if options else "")
    item = {"problem": question, "image": row["decoded_image"], "answer": row["answer"].replace("\f", "\\f"),
            "by": {"type": "choice" if options else "free", "level": row["level"], "subject": row["subject"]}}  # fmt: skip
    if options and row["answer"] in list(LETTERS):  # some are just A to E, or pictures: then only the letter can be right
        return item | {"rule": "choice", "choices": options}
    return item | {"rule": "rounded", "precision": 2}


def mathverse(row: dict) -> dict:
    """Official and NoisyRollout: a language model judges the extracted answer. A rule counts fewer free answers as right; compare the choices."""
    choices = split_options(row["question_for_eval"].partition("Choices:")[2])
    by = {"version": row["problem_version"], "type": row["question_type"], "subject": row["metadata"]["subject"]}
    if label := re.fullmatch(r"\(?([A-J])\)?", row["answer"].strip()):
        return row | {"problem": row["query_cot"], "answer": label[1], "rule": "choice", "choices": choices, "by": by}
    return row | {"problem": row["query_cot"], "rule": "parts", "by": by}


def hallusionbench(row: dict) -> dict:
    """The questions with a picture. aAcc is the accuracy; fAcc and qAcc count a figure, a question, only if all of its rows are right.
    The paper's scale is aAcc. Official: judged by a language model, over these and the questions without a picture."""
    where = [str(row[key]) for key in ("category", "subcategory", "set_id")]
    question = row["question"] + "\nThe final answer can only be \\boxed{yes} or \\boxed{no}."
    together = {"fAcc": "/".join([*where, str(row["figure_id"])]), "qAcc": "/".join([*where, str(row["question_id"])])}
    by = {"category": row["category"], "subcategory": row["subcategory"]}
    answer = {"0": "no", "1": "yes"}[str(row["gt_answer"])]
    return row | {"problem": question, "answer": answer, "rule": "yes_or_no", "by": by, "together": together}


def mmmu(row: dict) -> dict:
    """Also MMMU-Pro. Official: the same, but it searches the whole response, and guesses at random where it finds no option."""
    options = [str(option) for option in ast.literal_eval(row["options"])]
    shown = row.get("question") or "Answer the question in the picture by the letter of the option."  # MMMU-Pro's vision rows have both there
    if options and row.get("question"):
        shown += "\n" + lettered(options)
    images = [row[f"image_{i}"] for i in re.findall(r"<image (\d)>", shown)] or [row.get("image") or row["image_1"]]
    by = {"subject": row.get("subject") or re.sub(r"^[a-z]+_|_\d+$", "", row["id"])}
    item = {"problem": re.sub(r"<image \d>", tgrl.PLACEHOLDER, shown), "images": images, "answer": row["answer"], "by": by}
    if options:
        return item | {"rule": "choice", "choices": options}
    answers = list(map(str, ast.literal_eval(row["answer"]))) if row["answer"].startswith("[") else row["answer"]
    return item | {"rule": "any_of", "answer": answers}


def mmstar(row: dict) -> dict:
    choices = split_options(row["question"].partition("Options:")[2])
    return row | {"rule": "choice", "choices": choices, "by": {"category": row["category"]}}


def ai2d(row: dict) -> dict:
    question = f"{row['question']}\n{lettered(row['options'])}"
    return row | {"problem": question, "answer": LETTERS[int(row["answer"])], "rule": "choice", "choices": row["options"]}


BENCHMARKS = {
    "wemath": Benchmark(wemath, "We-Math/We-Math", "testmini"),
    "mathvista": Benchmark(mathvista, "AI4Math/MathVista", "testmini"),
    "mathverse": Benchmark(mathverse, "AI4Math/MathVerse", "testmini", "testmini"),
    "mathvision": Benchmark(mathvision, "MathLLMs/MathVision", "test"),
    "hallusionbench": Benchmark(hallusionbench, "lmms-lab/HallusionBench", "image"),
    "mathvision-mini": Benchmark(mathvision, "MathLLMs/MathVision", "testmini"),
    "geo3k": Benchmark(problems, "hiyouga/geometry3k", "test"),
    "mmmu": Benchmark(mmmu, "lmms-lab/MMMU", "validation"),
    "mmmu-pro": Benchmark(mmmu, "MMMU/MMMU_Pro", "test", "standard (10 options)"),
    "mmmu-pro-vision": Benchmark(mmmu, "MMMU/MMMU_Pro", "test", "vision"),
    "mmstar": Benchmark(mmstar, "Lin-Chen/MMStar", "val"),
    "ai2d": Benchmark(ai2d, "lmms-lab/ai2d", "test"),
    "toy": Benchmark(problems, "runs/toy/world/test.parquet", "test"),
    "problems": Benchmark(problems, "", "test"),  # any: problems=held_out.jsonl
}
PAPER = {  # Tables 1 and 3: Qwen2.5-VL-7B, before and after training on Geo3K, in the order of the first five above
    "paper, Qwen2.5-VL-7B": (63.10, 67.50, 46.20, 25.00, 64.60),
    "paper, GRPO": (67.40, 70.50, 50.80, 27.30, 69.80),
    "paper, DAPO": (69.30, 70.30, 50.60, 26.50, 67.90),
    "paper, TGRL-GRPO": (70.29, 71.50, 51.08, 27.41, 72.02),
    "paper, TGRL-DAPO": (71.05, 71.40, 55.21, 28.61, 71.29),
}
FIVE = list(BENCHMARKS)[:5]

# ===== run: answer the questions, and record ==========================================================================

ASKED = ("instruction", "system_prompt", "min_pixels", "max_pixels", "max_answer")  # what an answer depends on, besides the model


def as_trained(model: str) -> dict:
    """The prompt's options of the run that a model comes from, if it lies in the run's folder."""
    for folder in list(Path(model).resolve().parents)[:3]:
        if (folder / "metrics.jsonl").is_file() and (header := read_lines(folder / "metrics.jsonl")[:1]) and "config" in header[0]:
            tgrl.say(f"asking as {folder / 'metrics.jsonl'} says the model was trained")
            return {name: value for name, value in header[0]["config"].items() if name in ASKED}
    return {}


def weights(model: str) -> str | None:
    """What tells the weights in a folder from those of the next training there: a digest of sixteen places in each file."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        with open(path, "rb") as file:
            for i in range(16):
                file.seek(i * path.stat().st_size // 16)
                digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16] if Path(model).exists() else None  # a hub id says it all


def read_benchmark(name: str, source: str, limit: int) -> list[dict]:
    """The rows; a folder may hold the benchmark's configuration, or its rows alone."""
    benchmark, failures = BENCHMARKS[name], []
    for config in dict.fromkeys((benchmark.config, None)):
        try:
            return list(itertools.islice(tgrl.read_rows(source, benchmark.split, config), limit or None))
        except BadInput as error:
            failures.append(error)
    advice = f"\nOr download it where there is a network (`hf download --repo-type dataset {source} --local-dir FOLDER`), and say {name}=FOLDER"
    raise BadInput(f"{failures[0]}{advice * (source == benchmark.hub and name != 'toy')}")


class Row(dict):
    def __missing__(self, name: str):
        raise BadInput(f"it has no column {name!r}")


def load(name: str, source: str, cfg: tgrl.Config) -> list[tuple[tgrl.Problem | None, dict]]:
    """The questions, each with what its record says before it is answered; None: a row that cannot be read, which counts as wrong."""
    rows, root = read_benchmark(name, source, cfg.limit), tgrl.picture_root(source, cfg.image_root)

    def read(number, row):
        record = {"row": number, "by": {}}
        try:
            item = {"choices": []} | BENCHMARKS[name].read(Row(row))
            record |= {key: item[key] for key in ("rule", "choices", "precision", "by", "together") if key in item}
            problem = dataclasses.replace(tgrl.read_problem(item, root), row=number)
        except Exception as error:  # a row may hold anything
            reason = str(error) if isinstance(error, BadInput) else f"{type(error).__name__} {error}"
            return None, record | {"error": reason, "extracted": [None] * cfg.samples, "correct": [False] * cfg.samples}
        answer = item["answer"] if isinstance(item["answer"], list) else problem.answer
        return problem, record | {"id": problem.id, "answer": answer}

    with ThreadPoolExecutor() as pool:
        pairs = list(pool.map(read, itertools.count(), rows))
    if not any(problem for problem, _ in pairs):
        why = f"the first because {pairs[0][1]['error']}, its columns are: {', '.join(rows[0])}" if rows else "it is empty"
        raise BadInput(f"{name}: none of the {len(rows)} rows of {source} can be read; {why}")
    return pairs


def check_same(path: Path, found: dict, wanted: dict):
    """A file, and a folder, belong to one evaluation."""
    for key, value in wanted.items():
        if found.get(key) != value:
            raise BadInput(f"{path} is of another evaluation: {key} is {found.get(key)!r} there and {value!r} here. Give another --out")


def begin(path: Path, header: dict, pairs: list) -> set[int]:
    """Open the file of a benchmark, or go on with it if it is of this same evaluation: -> the rows that are answered."""
    found, *records = (read_lines(path) if path.exists() else []) or [{}]
    if records or (found and "tgrl_eval" not in found):
        check_same(path, found, header)
    ids, answered = {record["row"]: record.get("id") for _, record in pairs}, [r for r in records if "texts" in r]
    for r in answered:
        if ids.get(r["row"]) != r["id"]:
            changed = f"row {r['row']} of {header['source']} was another question, or readable, when it was answered"
            raise BadInput(f"{path}: {changed}. Give another --out")
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "math-verify")}
    tgrl.write_records(path, [{"versions": versions} | found | header, *(record for problem, record in pairs if not problem), *answered])
    return {r["row"] for r in answered}


def evaluate(path: Path, items: list, done: set[int], encoder: tgrl.Encoder, model, accelerator, temperature: float):
    """Answer what is not answered yet, longest questions first, and append a line an item."""
    cfg, main = encoder.cfg, accelerator.is_main_process
    # One division into batches, whatever is done already and however many processes there are: the same batches give the same answers.
    items = sorted(items, key=lambda item: (-encoder.length(item[0]), item[0].row))
    parts = tgrl.batches(items, cfg.generate_batch // cfg.samples)
    todo = [part for part in parts if not done.issuperset(problem.row for problem, _ in part)]
    tgrl.say(f"{path}: {sum(map(len, todo))} of {len(items)} questions to answer")
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    with tgrl.tqdm(total=sum(map(len, mine)), unit="question", desc=path.stem, disable=None if main else True) as bar:
        for part in mine:
            torch.manual_seed(hash((cfg.seed, part[0][0].row)))
            start = time.perf_counter()
            answers = tgrl.sample(model, encoder, [encoder(p) for p, _ in part], cfg.samples, temperature)
            seconds, lines = round((time.perf_counter() - start) / len(part), 3), []
            for (problem, record), some in zip(part, answers):
                texts = [encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in some]
                prompt = hashlib.sha256(encoder.text(problem).encode()).hexdigest()[:16]
                finished = [ids[-1] in encoder.ends for ids in some]
                lines.append(record | {"prompt": prompt, "seconds": seconds, "texts": texts, "finished": finished} | judge(texts, record))
            tgrl.append_records(path, [line for line in lines if line["row"] not in done])
            bar.update(len(part))


def regrade(out: Path):
    """Grade the recorded answers again, without a model; then the report."""
    for name, (header, records) in evaluations(out).items():
        judged = {row: record | judge(record["texts"], record) if "texts" in record else record for row, record in records.items()}
        changed = [row for row in records if records[row]["correct"] != judged[row]["correct"]]
        header["versions"]["math-verify"] = importlib.metadata.version("math-verify")
        tgrl.write_records(out / f"{name}.jsonl", [header, *judged.values()])
        print(f"{name}: {len(changed)} of {len(records)} verdicts changed" + f": rows {changed[:20]}" * bool(changed))
    report(out)


def run(model: str, benchmarks: list[str], out: Path, temperature: float = 0.0, rescore: bool = False, **options):
    """Benchmarks of a model into OUT, a file each; then the report on everything that OUT holds."""
    if rescore and model:
        raise BadInput("--rescore grades what is recorded in --out again; give it that, and no model")
    if rescore:
        return regrade(out)
    if not benchmarks:
        raise BadInput(f"give a model and benchmarks, name or name=path; known are {', '.join(BENCHMARKS)}")
    sources = {}
    for name, _, path in (text.partition("=") for text in benchmarks):
        if name not in BENCHMARKS:
            raise BadInput(f"there is no benchmark {name!r}; known are {', '.join(BENCHMARKS)}")
        if name in sources:
            raise BadInput(f"{name} is there twice; a folder holds one evaluation of it, so give each an --out")
        sources[name] = path or BENCHMARKS[name].hub
        if not sources[name]:
            raise BadInput(f"{name} needs a file: {name}=questions.jsonl")
    if temperature < 0 or (options.get("samples", 1) > 1 and not temperature):
        raise BadInput("--temperature must be 0 or more, and above 0 with --samples above 1: greedy answers are all the same")
    cfg = tgrl.Config(model=model, **{"samples": 1, **as_trained(model), **options})
    accelerator = tgrl.start_processes()
    loaded = {name: load(name, source, cfg) for name, source in sources.items()}  # all, before the first long wait
    net, processor = tgrl.load_model(model, torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32)
    encoder, net = tgrl.Encoder(processor, net, cfg), net.to(accelerator.device)
    place = lambda source: str(Path(source).resolve()) if Path(source).exists() else source  # noqa: E731
    asked = {"model": place(model), "weights": weights(model), "temperature": temperature, "dtype": str(net.dtype)}
    asked |= {key: getattr(cfg, key) for key in ("samples", "seed", *ASKED)}
    done = {}
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        for name, (header, _) in evaluations(out, empty=True).items():
            check_same(out / f"{name}.jsonl", header, asked)
        for name, pairs in loaded.items():
            header = {"tgrl_eval": name, "source": place(sources[name]), "rows": len(pairs), "limit": cfg.limit, **asked}
            done[name] = begin(out / f"{name}.jsonl", header, pairs)
    [done] = broadcast_object_list([done])
    for name, pairs in loaded.items():
        evaluate(out / f"{name}.jsonl", [pair for pair in pairs if pair[0]], done[name], encoder, net, accelerator, temperature)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        report(out)


# ===== The report, and compare ========================================================================================


def evaluations(out: Path, empty: bool = False) -> dict[str, tuple[dict, dict[int, dict]]]:
    """Benchmark -> (header, records by row) of what `run` wrote into a folder."""
    files = {name: read_lines(out / f"{name}.jsonl") for name in BENCHMARKS if (out / f"{name}.jsonl").is_file()}
    found = {name: (lines[0], {record["row"]: record for record in lines[1:]}) for name, lines in files.items() if len(lines) > 1 and "tgrl_eval" in lines[0]}
    if not found and not empty:
        raise BadInput(f"{out} holds no evaluation; give the --out of `eval.py run`")
    return found


def wilson(right: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which stays within 0 and 1, and is right for few rows, too."""
    centre, half = right + z * z / 2, z * math.sqrt(right * (n - right) / n + z * z / 4)
    return (centre - half) / (n + z * z), (centre + half) / (n + z * z)


def bootstrap(values: list[float], resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % percentile interval of a mean over items."""
    distinct, counts = np.unique(values, return_counts=True)  # drawing items again is drawing how often each value comes
    means = np.random.default_rng(0).multinomial(len(values), counts / len(values), resamples) @ distinct / len(values)
    return tuple(np.quantile(means, (0.025, 0.975)).tolist())


def score(records: list[dict]) -> dict:
    """Accuracy (mean@k) and pass@k, each with its 95 % interval; that of mean@k is as wide as if there were one answer to each."""
    k, n = max(len(r["correct"]) for r in records), len(records)
    right = sum(statistics.fmean(r["correct"]) for r in records)
    result = {"rows": n, "accuracy": right / n, "interval": wilson(right, n)}
    if k > 1:
        passed = sum(any(r["correct"]) for r in records)
        result |= {f"pass@{k}": passed / n, f"pass@{k} interval": wilson(passed, n)}
    return result


def summarize(header: dict, records: dict[int, dict]) -> dict:
    groups, together, records = collections.defaultdict(list), collections.defaultdict(list), records.values()
    for record in records:
        for kind, value in record["by"].items():
            groups[f"{kind}: {value}"].append(record)
        for kind, value in record.get("together", {}).items():
            together[kind, value].append(record["correct"])
    for (kind, _), some in together.items():  # right together is right in all of them
        groups[kind].append({"correct": [all(column) for column in zip(*some)]})
    return score(records) | {
        "of": header["rows"], "limit": header.get("limit"), "model": header["model"], "samples": header["samples"],
        "unreadable": sum("error" in r for r in records),
        "no answer found": sum(said is None for r in records if "error" not in r for said in r["extracted"]),
        "cut off": sum(not done for r in records for done in r.get("finished", [])),
        "by": {name: score(some) for name, some in sorted(groups.items())},
    }  # fmt: skip


def told(name: str, s: dict) -> str:
    low, high = s["interval"]
    passed = "".join(f"   {key} {s[key]:6.1%}" for key in s if key.startswith("pass@") and not key.endswith("interval"))
    return f"{name:34} {s['rows']:5}   {s['accuracy']:6.1%}   {low:6.1%} to {high:6.1%}{passed}"


def report(out: Path):
    """The table, summary.json and bars.png of a folder of evaluations."""
    found = evaluations(out)
    summaries = {name: summarize(*some) for name, some in found.items()}
    print(f"\n{'':35} rows accuracy   95 % interval")
    for name, s in summaries.items():
        print(told(name, s) + f"   NOT FINISHED, of {s['of']} rows" * (s["rows"] < s["of"]) + "   ONLY THE FIRST ROWS" * bool(s["limit"]))
        for group, some in s["by"].items():
            print(told(f"  {group}"[:34], some))
        print(f"  no answer found in {s['no answer found']}, cut off {s['cut off']}")
    for name, (_, records) in found.items():
        left_out = [(row, record["error"]) for row, record in records.items() if "error" in record]
        tgrl.report_left_out(out / f"{name}.jsonl", left_out, len(records), fate="unreadable, counted as wrong")
    finished = {name: 100 * s["accuracy"] for name, s in summaries.items() if s["rows"] == s["of"] and not s["limit"]}
    here = [finished.get(name, math.nan) for name in FIVE]
    if any(name in summaries for name in FIVE):
        print(f"\n{'in %':22}" + "".join(f"{name:>16}" for name in FIVE) + f"{'average':>10}")
        for method, values in {"here": here, **PAPER}.items():
            numbers = "".join(f"{value:16.2f}" for value in values) + f"{statistics.fmean(values):10.2f}"
            print(f"{method:22}" + numbers.replace("nan", "  –"))
        print("The paper's models (Tables 1 and 3) are 7B, trained on Geo3K; it does not tell its prompt, pixels, nor grader.")
    average = statistics.fmean(here) / 100 if all(name in finished for name in FIVE) else None
    (out / "summary.json").write_text(json.dumps({"average of the five": average, "benchmarks": summaries}, indent=1))
    draw_bars({out.resolve().name: summaries}, out / "bars.png")
    print(f"\nwrote {os.path.relpath(out / 'summary.json')} and {os.path.relpath(out / 'bars.png')}")


def draw_bars(runs: dict[str, dict], path: Path):
    from matplotlib.figure import Figure

    names, width = list(next(iter(runs.values()))), 0.8 / len(runs)
    figure = Figure(figsize=(1.6 + 1.1 * len(names) * max(1, len(runs) / 2), 3.6), dpi=150, layout="constrained")
    axes, places = figure.subplots(), np.arange(len(names))
    for i, (label, summaries) in enumerate(runs.items()):
        shares, intervals = (100 * np.array([s[key] for s in summaries.values()]) for key in ("accuracy", "interval"))
        style = dict(color=COLORS[i], label=label, ecolor="#222", capsize=3)
        bars = axes.bar(places + i * width, shares, width * 0.92, yerr=abs(intervals.T - shares), **style)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_xticks(places + width * (len(runs) - 1) / 2, names, rotation=20, ha="right")
    axes.set(ylabel="accuracy, %, 95 % interval", ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    figure.savefig(path, facecolor="white")


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p: as if a fair coin had decided each item that the two do not agree on."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def compare(a: Path, b: Path, flips: int):
    """B against A on the items that both have answered."""
    first, second = evaluations(a), evaluations(b)
    names = [name for name in first if name in second]
    if not names:
        raise BadInput(f"{a} has {', '.join(first)} and {b} has {', '.join(second)}: nothing in common")
    print(f"A: {a}, {first[names[0]][0]['model']}\nB: {b}, {second[names[0]][0]['model']}")
    shown = {f"A: {a.resolve().name}": {}, f"B: {b.resolve().name}": {}}
    print(f"\n{'':16} items        A        B    B − A   95 % interval       only A  only B   p (McNemar, exact)")
    for name in names:
        (header, records), (other, others) = first[name], second[name]
        rows = [row for row in records if row in others]
        if not rows or any(records[row].get("id", id) != id for row in rows if (id := others[row].get("id"))):
            raise BadInput(f"{name}: rows of {a} and {b} hold different questions; were they made from the same data?")
        for summaries, (head, some) in zip(shown.values(), (first[name], second[name])):
            summaries[name] = summarize(head, {row: some[row] for row in rows})
        right_a, right_b = (np.array([statistics.fmean(some[row]["correct"]) for row in rows]) for some in (records, others))
        low, high = bootstrap(right_b - right_a)
        only_a, only_b = ([row for row, more in zip(rows, where) if more] for where in (right_a > right_b, right_b > right_a))
        p = f"{mcnemar(len(only_a), len(only_b)):.3g}" if header["samples"] == other["samples"] == 1 else "–"
        print(f"{name:16} {len(rows):5}   {right_a.mean():6.1%}   {right_b.mean():6.1%}   {(right_b - right_a).mean():+6.1%}   "
              f"{low:+6.1%} to {high:+6.1%}   {len(only_a):6}  {len(only_b):6}   {p}")  # fmt: skip
        for which, some in (("A", only_a), ("B", only_b)):
            if flips and some:
                print(f"    right only in {which}: rows {', '.join(map(str, some[:flips]))}" + f" and {len(some) - flips} more" * (len(some) > flips))
        different = [key for key in ("source", "samples", "temperature", *ASKED, "dtype") if header.get(key) != other.get(key)]
        if different or len(rows) < max(len(records), len(others)):
            print(f"    take care: {len(records)} and {len(others)} rows, {len(rows)} in both" + "".join(f"; another {key}" for key in different))
    draw_bars(shown, b / "compare.png")
    print(f"\nwrote {os.path.relpath(b / 'compare.png')}")


# ===== show: reading a training =======================================================================================


class Run(typing.NamedTuple):
    folder: Path
    config: dict
    steps: list[dict]  # metrics.jsonl without its first line
    groups: list[dict]
    name: str


def read_run(folder: Path) -> Run:
    header, *steps = read_lines(folder / "metrics.jsonl") or [{}]
    groups = read_lines(folder / "groups.jsonl") if steps else []
    if not groups:
        raise BadInput(f"{folder} has no finished step; wait for the first step, or train again")
    return Run(folder, header["config"], steps, groups, header["method"])


# ===== curves.png =====================================================================================================


class Panel(typing.NamedTuple):
    title: str
    lines: dict[str, str]  # metric -> its name in the legend of the panel; the first is solid, the second dashed
    percent: bool = False
    from_zero: bool = True


PANELS = (
    Panel("Held-out accuracy", {"accuracy": ""}, percent=True, from_zero=False),
    Panel("Reward", {"reward": "policy", "expert_reward": "expert"}),
    Panel("Groups with contrast", {"contrast": "all", "rescued_by_expert": "only thanks to the expert"}, percent=True),
    Panel("Wrong answers that the policy put right", {"rectified": ""}, percent=True),
    Panel("Entropy of the policy (nats)", {"entropy": ""}),
    Panel(r"Expert tokens: coefficient $\tilde{r}$ (Eq. 23)", {"expert_coefficient": ""}),
    Panel(r"Expert tokens: $\Delta$ (Eq. 18, nats)", {"expert_delta": ""}, from_zero=False),
    Panel("Gradient norm", {"grad_norm": ""}),
    Panel("Tokens an answer", {"answer_tokens": ""}),
    Panel("Seconds a step", {"seconds": "all", "seconds_rollout": "rollouts"}),
)


def draw_curves(runs: list[Run], path: Path):
    """Small multiples: one panel a quantity, one colour a run. What no run has measured gets no panel."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no window and no global state, PNGs are drawn by Agg
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    def points(run, metric):
        if metric == "rescued_by_expert" and not run.config["n_off"]:
            return np.empty((2, 0))  # a line of zeros would say that there was an expert
        pairs = [(record["step"], record[metric]) for record in run.steps if isinstance(record.get(metric), int | float)]
        return np.array([pair for pair in pairs if math.isfinite(pair[1])], dtype=float).reshape(-1, 2).T

    panels = [p for p in PANELS if any(points(run, metric).size for run in runs for metric in p.lines)]
    columns = min(4 if len(panels) in (4, 7, 8) else 3, len(panels))
    rows = math.ceil(len(panels) / columns)
    last = max(1, *(record["step"] for run in runs for record in run.steps))
    style = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
             "axes.edgecolor": "#9aa3ad", "axes.grid": True, "grid.color": "#e6e9ed", "xtick.color": GREY, "ytick.color": GREY}  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.8 * columns, 2.6 * rows + 0.9), dpi=150, layout="constrained")
        for place, panel in enumerate(panels, 1):
            axes, drawn = figure.add_subplot(rows, columns, place), {}
            for i, run in enumerate(runs):
                for (metric, label), dash in zip(panel.lines.items(), ("-", (0, (4, 2)))):
                    x, y = points(run, metric)
                    if not x.size:
                        continue
                    # accuracy is measured rarely, on all held-out questions: each point counts. The rest is noise around a trend
                    width = 1 if metric == "accuracy" else len(y) // 15 * 2 + 1
                    window = np.hanning(width + 2)[1:-1]
                    mean = np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")
                    color = COLORS[i % len(COLORS)]
                    marker = "o" if metric == "accuracy" or len(y) == 1 else None
                    axes.plot(x, mean, color=color, linestyle=dash, linewidth=1.7, marker=marker, markersize=3.5, clip_on=False)
                    if width > 1:
                        axes.plot(x, y, color=color, linewidth=0.7, alpha=0.3)
                    drawn[label] = Line2D([], [], color=GREY, linestyle=dash)
            axes.set_title(panel.title)
            if panel.from_zero:
                axes.set_ylim(bottom=0)  # a small change shall look small
            if panel.percent:
                axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
                axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
            axes.set_xlim(-0.03 * last, 1.03 * last)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
            if len(drawn) > 1:
                axes.legend(drawn.values(), drawn, frameon=False, fontsize=8, labelcolor=GREY, loc="best")
            if place > len(panels) - columns:  # the lowest of each column
                axes.set_xlabel("step", color=GREY)
        handles = [Line2D([], [], color=COLORS[i % len(COLORS)], linewidth=2.5) for i in range(len(runs))]
        figure.legend(handles, [run.name for run in runs], loc="outside upper left", ncols=4, frameon=False, fontsize=11)
        if any(len(run.steps) > 15 for run in runs):
            figure.supxlabel("thin: each step; thick: weighted mean over the steps around it", fontsize=8, color=GREY, x=0.99, ha="right")
        figure.savefig(path, facecolor="white")


# ===== groups.html ====================================================================================================

TEMPLATE = Path(__file__).resolve().parent / ".assets" / "groups.html"


def write_groups(run: Run, path: Path):
    """All text of models and data is escaped by the template, and no script ever turns text into markup."""
    template = TEMPLATE.read_text(encoding="utf-8")
    policy = "default-src 'none'; base-uri 'none'; img-src data:"  # what a browser may do: show embedded pictures, and run and use, by their hashes,
    for tag in ("script", "style"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        policy += f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    steps = {step: list(groups) for step, groups in itertools.groupby(run.groups, key=lambda group: group["step"])}
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template).render(run=run, policy=policy, steps=steps, zip=zip)
    path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")  # half a character becomes a reference


def show(runs: list[Path]) -> None:
    """Writes curves.png and groups.html into each run; of several runs, an overlay into the folder they have in common."""
    loaded = [read_run(folder) for folder in dict.fromkeys(Path(run).resolve() for run in runs)]  # all, before anything is written
    for run in loaded:
        draw_curves([run], run.folder / "curves.png")
        write_groups(run, run.folder / "groups.html")
        print(f"wrote {os.path.relpath(run.folder / 'curves.png')} and {os.path.relpath(run.folder / 'groups.html')}")
    if len(loaded) > 1:
        common, names = Path(os.path.commonpath([run.folder.parent for run in loaded])), [run.name for run in loaded]
        overlay = common / "curves.png"
        draw_curves([r._replace(name=f"{r.name} ({r.folder.relative_to(common)})") if names.count(r.name) > 1 else r for r in loaded], overlay)
        print(f"wrote {os.path.relpath(overlay)}")


# ===== bench ==========================================================================================================


ROPE = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
VISION = dict(hidden_size=1280, intermediate_size=3420, num_heads=16, fullatt_block_indexes=[7, 15, 23, 31])
SHAPES = {  # 3B and 7B: of the published models; what is not named costs nothing
    "toy": dict(hidden=128, layers=3, vision_layers=2),
    "small": dict(hidden=256, layers=6, vision_layers=6),
    "3B": dict(hidden=2048, layers=36, vision_layers=32, vision=VISION, tied=True,
               text=dict(intermediate_size=11008, num_attention_heads=16, num_key_value_heads=2, vocab_size=151936, rope_parameters=ROPE)),
    "7B": dict(hidden=3584, layers=28, vision_layers=32, vision=VISION, tied=False,
               text=dict(intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, rope_parameters=ROPE)),
}  # fmt: skip
DEVICES = {  # dense bfloat16 FLOP/s, bytes/s
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12), "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12), "NVIDIA L40S": (362e12, 0.86e12),
}  # fmt: skip


def build(name: str):
    """(model, processor): random weights of a known shape, or a real model."""
    if name not in SHAPES:
        return tgrl.load_model(name)
    processor, cuda = tgrl.toy_processor("Think first."), torch.cuda.is_available()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in tgrl.tiny_model(processor.tokenizer, **SHAPES[name]).parameters())
    free = torch.cuda.mem_get_info()[0] if cuda else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # weights, gradients, moments and actor; on a GPU the first three dealt out, but the weights whole while they are being made
    need = parameters * (max(2 + 16 / int(os.environ.get("WORLD_SIZE", 1)), 6) if cuda else 16)
    if need > free:
        memory = f"{need / 2**30:.0f} GiB with gradients and Adam's moments, and {free / 2**30:.0f} GiB are free here"
        raise BadInput(f"{name} has {parameters / 1e9:.2f} billion parameters: {memory}")
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        return tgrl.tiny_model(processor.tokenizer, **SHAPES[name]), processor


def bench(model: str, questions: int, answers: int, tokens: int, pixels: int, micro_batch: int, repeats: int, separate_rows: bool) -> None:
    """What a step of the Trainer costs: rollout, scoring and update of some questions on each process; and the update with separate rows."""
    if min(repeats, answers - 1) < 1:
        raise BadInput("--repeats must be at least 1, and --answers at least 2")
    rng, everywhere = random.Random(0), questions * int(os.environ.get("WORLD_SIZE", 1))
    with tempfile.TemporaryDirectory() as folder:
        for i in range(questions):
            tgrl.Image.frombytes("RGB", (pixels, pixels), rng.randbytes(3 * pixels * pixels)).save(f"{folder}/{i}.png")
        rows = [{"image": f"{i}.png", "problem": "What is the area?", "answer": "1"} for i in range(questions)]
        Path(folder, "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        options = dict(model=model, data=f"{folder}/questions.jsonl", out=folder, tracker="none", n_on=answers, n_off=0, micro_batch=micro_batch,
                       min_pixels=28 * 28, max_pixels=pixels**2, max_answer=tokens, max_prompt=10**6, checkpointing=model not in ("toy", "small"),
                       questions_per_rollout=everywhere, questions_per_update=everywhere)  # fmt: skip
        trainer = tgrl.Trainer(tgrl.Config(**tgrl.TOY | options), build)
    encoder, net, cuda = trainer.encoder, trainer.policy.model, trainer.device.type == "cuda"
    # no answer ends early; and the many ids that the toy's tokenizer has not would cost what they cost nobody
    encoder.unwritable = torch.tensor([net.config.image_token_id, net.config.video_token_id, *encoder.ends])
    trainer.policy.unwritable = encoder.unwritable.to(trainer.device)
    layers, head = net.model.language_model.layers, net.lm_head.weight.numel()
    blocks, towers = (sum(p.numel() for p in part.parameters()) for part in (layers, net.model.visual.blocks))
    text, parameters = net.config.get_text_config(), sum(p.numel() for p in net.parameters())

    together = []
    for problem in trainer.problems:
        ids = [[rng.randrange(10, 300) for _ in range(tokens)] for _ in range(answers)]
        together.append(tgrl.Group(problem, encoder(problem), [tgrl.Trajectory(i, "", 0.0, advantage=rng.gauss(0, 1)) for i in ids]))
    apart = [dataclasses.replace(group, trajectories=[answer]) for group in together for answer in group.trajectories]

    def update(groups, size):
        trainer.cfg.micro_batch = size
        trainer.update(groups, tgrl.Tally())

    prompt, patches = len(together[0].prompt.ids), sum(len(g.prompt.pixels) for g in together)
    answered, row = questions * answers * tokens, questions * (prompt + answers * tokens)
    jobs = {  # what is done; and for how many FLOPs a weight and token, tokens, patches
        "rollout": (lambda: tgrl.sample(trainer.actor, encoder, [group.prompt for group in together], answers), 2, row, patches),
        "scoring": (lambda: tgrl.score(trainer.policy, together, micro_batch, "logp"), 2, row, patches),
        "update": (lambda: update(together, micro_batch), 6, row, patches),
        "separate rows": (lambda: update(apart, micro_batch * answers), 6, questions * answers * (prompt + tokens), patches * answers),
    }
    if not separate_rows:
        del jobs["separate rows"]
    seconds, peaks = {name: [] for name in jobs}, {}
    for _ in range(repeats + 1):  # in turns
        for name, (job, *_) in jobs.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            job()
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            peaks[name] = tgrl.peak_memory()
    if not trainer.main:
        return

    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first warms up
    kind = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    peak, bandwidth = DEVICES.get(kind, (None, None))
    work = f"{questions} questions of {prompt} tokens, {answers} answers of {tokens} to each"
    print(f"{model}: {parameters / 1e9:.4g} B parameters on {trainer.world} x {kind}; on each: {work}")
    print(f"median of {repeats}        seconds  answer tokens/s   TFLOP/s  of peak   peak GiB")
    for name, (_, passes, length, pictures) in jobs.items():
        flops = passes * (blocks * length + head * answered + towers * pictures) / medians[name]
        share, held = f"{flops / peak:8.1%}" if peak else "       –", f"{peaks[name]:8.1f}" if cuda else "       –"
        print(f"{name:16}  {medians[name]:10.3f}  {answered / medians[name]:15.0f}  {flops / 1e12:8.3g} {share}   {held}")
    if bandwidth:
        context = prompt + tokens / 2
        cache = 2 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * context * questions * answers
        bound = 2 * (blocks + head + cache) * tokens / bandwidth / medians["rollout"]
        print(f"rollout: {bound:.0%} of what reading weights and cache once a token would allow")
    if separate_rows:
        print(f"a group in one row takes {medians['update'] / medians['separate rows']:.2f} of the time of separate rows")
    print("FLOPs: 2 a weight and token forward, 6 with the backward pass; neither attention nor recomputation is counted.")


# ===== The command line ===============================================================================================


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    known = f"Benchmarks: {', '.join(BENCHMARKS)}. NAME=PATH takes rows of the same columns from a parquet or JSONL file, or a folder."
    usage = "eval.py run MODEL NAME[=PATH] ... [--option value ...]"
    verb = verbs.add_parser("run", usage=usage, help="benchmarks of a model", description=known)
    verb.set_defaults(do=run)
    verb.add_argument("model", nargs="?", metavar="MODEL", help="hub id or folder; one in the folder of a training is asked as it was trained")
    verb.add_argument("benchmarks", nargs="*", metavar="NAME[=PATH]", help="what to answer")
    verb.add_argument("--out", type=Path, default=Path("runs/eval"), help="folder of the records, begun or continued (default: runs/eval)")
    verb.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest answer (default: 0)")
    verb.add_argument("--samples", type=int, default=argparse.SUPPRESS, metavar="int", help="answers a question, for mean@k and pass@k (default: 1)")
    verb.add_argument("--rescore", action="store_true", help="only grade the recorded answers in --out again, without a model")
    tgrl.add_options(verb, [*ASKED, "generate_batch", "image_root", "limit", "seed"], {})
    verb = verbs.add_parser("compare", help="two evaluations, item by item")
    verb.set_defaults(do=compare)
    verb.add_argument("a", type=Path, metavar="A", help="the --out of an evaluation")
    verb.add_argument("b", type=Path, metavar="B", help="of another")
    verb.add_argument("--flips", type=int, default=10, metavar="N", help="how many of the items to name that only one got right (default: 10)")
    verb = verbs.add_parser("show", help="curves and recorded groups of finished or running trainings")
    verb.set_defaults(do=show)
    verb.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that `tgrl.py train --out` wrote")
    verb = verbs.add_parser("bench", help="what a step costs here, with random weights")
    verb.set_defaults(do=bench)
    verb.add_argument("--model", default="small", help="toy, small (hidden 256, 6 + 6 blocks), 3B, 7B, or a hub id or folder (default: small)")
    shape = dict(questions=(4, "of each process"), answers=(8, "to each question"), tokens=(64, "of each answer"), pixels=(448, "side of the pictures"),
                 micro_batch=(4, "questions at once"), repeats=(5, "after one to warm up"))  # fmt: skip
    for name, (default, text) in shape.items():
        verb.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    verb.add_argument("--separate_rows", action=argparse.BooleanOptionalAction, default=True, help="also the update with a row for each answer")
    options = vars(parser.parse_args())
    try:
        options.pop("do")(**options)
    except (BadInput, OSError) as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped; `run` continues where it was")


if __name__ == "__main__":
    main()

"""How far the graders agree with official scorers, and how often they credit a wrong answer.

    python .compare/agreement.py FOLDER [--step 3] [--show 9]

FOLDER holds clones of MathVista, MATH-V, We-Math, MMMU and MMStar (GitHub: lupantech, mathllm, We-Math,
MMMU-Benchmark, MMStar-Benchmark); what is not there is left out. Graded are responses "as said"; those of one
short line "boxed"; and what the official scorer "extracted", in a box. Official verdicts are in the files,
for MMMU and MMStar by rule. Gold answers must be right, wrong options wrong. --show 9 tells disagreements.
"""

import argparse
import collections
import json
import re
import sys
import time
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as grader
import tgrl

NO_PICTURES = {name: None for name in ("image", "decoded_image", *(f"image_{i}" for i in range(1, 31)))}
READ = {"MathVista": grader.mathvista, "MATH-V": grader.mathvision, "We-Math": grader.wemath}


def read(path: Path) -> list[dict]:  # the rows of a file of JSON, lines of JSON, or a sheet
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.open(encoding="utf-8") if line.strip()]
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
        return list(rows.values()) if isinstance(rows, dict) else rows
    with zipfile.ZipFile(path) as file:
        texts = ["".join(one.itertext()) for one in ET.fromstring(file.read("xl/sharedStrings.xml"))]
        sheet = ET.fromstring(file.read("xl/worksheets/sheet1.xml")).findall(".//{*}row")
    rows = [[texts[int(c[-1].text)] if c.get("t") == "s" else c[-1].text for c in row] for row in sheet]
    return [dict(zip(rows[0], row, strict=False)) for row in rows[1:]]


def mmmu_choice(text: str, choices: list[str]) -> str | None:  # the letter, or else the option, named last
    said, options = f" {text.strip(',.!?;:')} ", dict(zip(grader.LETTERS, choices, strict=False))
    signs = [{form.format(letter): letter for letter in options} for form in ("({})", " {} ")]
    if len(said.split()) > 5 and not any(sign in said for one in signs for sign in one):
        said, signs = said.lower(), [{words.lower(): letter for letter, words in options.items()}]
    last = [max((said.rfind(sign), letter) for sign, letter in one.items()) for one in signs]
    return next((letter for place, letter in last if place >= 0), None)  # where they guess


def mmmu_verdict(text: str, item: dict) -> bool:  # MMMU's: the option, or what stands behind "is", "=" ...
    if item["rule"] == "choice":
        return mmmu_choice(text, item["choices"]) == item["answer"]
    marks, num = r"\b(?:be|so|is|thus|therefore|final|answer|result) |=", r"-?(?:\d*\.)?\d+"
    lines = [re.split(marks, line) for line in text.lower().strip(" .\n").split("\n")]
    said = "\n".join(line[-1] for line in lines if len(line) > 1) or text.lower()
    words = item["answer"] if isinstance(item["answer"], list) else [item["answer"]]
    said, *words = (re.sub(num, lambda n: f"{float(n[0]):.2f}", w.replace(",", "")) for w in (said, *words))
    return any(re.search(rf"(?<![\w.]){re.escape(w.lower())}(?![\w.])", said) for w in words)


def recorded(folder: Path, items: dict, step: int):
    """-> benchmark, file, row, item, official verdict, response, what they took out of it (or None)."""
    for path in sorted(folder.glob("MathVista/results/**/output*.json")):
        for row in read(path)[::step]:
            if (item := items["MathVista"].get(row["pid"])) and "true_false" in row:
                yield "MathVista", path.stem, item, row["true_false"], row["response"], str(row["extraction"])
    for path in sorted(folder.glob("MATH-V/outputs/**/*.jsonl")):
        for row in read(path)[::step]:
            item = items["MATH-V"][row["id"]]
            yield "MATH-V", path.stem, item, row["correct"], row["response"], row["model_answer"]
    for path in sorted(folder.glob("MMMU/mmmu-pro/output/*.jsonl")):
        for row in read(path)[::step]:
            item, official = grader.mmmu(NO_PICTURES | row), str(row["if_right"]) == "True"
            yield "MMMU-Pro", path.stem, item, official, str(row["response"]), None
    for path in sorted(folder.glob("MMMU/mmmu/example_outputs/*/*/output.json")):
        for row in read(path)[::step]:
            about = {"options": str(list(row.get("index2ans", {}).values())), "answer": str(row["answer"])}
            item = grader.mmmu(NO_PICTURES | {"id": row["id"], "question": ""} | about)
            yield "MMMU", path.parts[-3], item, mmmu_verdict(row["response"], item), row["response"], None
    for path in sorted(folder.glob("MMStar/eval/submits/*.xlsx")):
        for row in read(path)[::step]:
            said = re.sub(r"^(?:\(|option |the answer is )", "", row["prediction"].lower().strip())
            item, official = grader.mmstar(NO_PICTURES | row), said[:1] == row["answer"].lower()
            yield "MMStar", path.stem, item, official, row["prediction"], None


def agreement(cases, show: int):
    """Prints how many verdicts are the same: of a benchmark and way in all, by file, and by our rule."""
    seen, counts, others = {}, collections.defaultdict(collections.Counter), collections.defaultdict(list)
    for name, file, item, official, response, extracted in cases:
        short = len(response) <= 80 and not re.search(r"(?i)\n|boxed|answer", response.strip())
        texts = {"boxed": response if short else None, "extracted": extracted}
        boxed = [(way, f"\\boxed{{{text}}}") for way, text in texts.items() if text is not None]
        for way, text in [("as said", response), *boxed]:
            key = repr([grader.find_answer(text), *map(item.get, ("rule", "answer", "choices", "precision"))])
            if key not in seen:  # many models say the same
                seen[key] = grader.judge([text], item)["correct"][0]
            kind = "same" if seen[key] == bool(official) else "we credit" if seen[key] else "they credit"
            for place in ("in all", f"  by {item['rule']}", f"  of {file}"):
                counts[name, way, place][kind] += 1
            if kind != "same":
                others[name, way, kind].append((text[-90:], item["answer"], item.get("choices")))
    for (name, way, place), c in sorted(counts.items()):
        share = f"{c['same']:6} of {c.total():6} the same, {100 * c['same'] / c.total():6.2f} %"
        print(f"{name}, {way} {place:40}{share}; we credit {c['we credit']}, they credit {c['they credit']}")
    for key, some in sorted(others.items()):
        for one in some[:: len(some) // max(1, show) + 1][:show]:
            print(*key, *map(repr, one), sep=" | ")


def trials(item: dict, answer: str):  # -> what was tried, said, wanted; is the verdict another than due?
    def right(said: str) -> bool:
        return grader.judge([f"\\boxed{{{said}}}"], item)["correct"][0]

    yield "gold answers", answer, item["answer"], not right(answer)
    text = dict(zip(grader.LETTERS, item.get("choices") or (), strict=False)).get(item["answer"])
    for option in item["choices"] if text is not None else ():
        if not re.fullmatch("[A-J]", option):  # such a text names another option
            what = f"texts of {'gold' if option == text else 'wrong'} options under judge"
            yield what, option, text, right(option) != (option == text)
        if re.sub(r"\s", "", option).lower() != re.sub(r"\s", "", text).lower():
            yield "texts of wrong options", option, text, tgrl.is_equivalent(option, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--show", type=int, default=0)
    options, start, items = parser.parse_args(), time.time(), collections.defaultdict(dict)
    for name, reader in READ.items():
        counts, failed = collections.Counter(), collections.defaultdict(list)
        path = options.folder / name / "data" / ("test.jsonl" if name == "MATH-V" else "testmini.json")
        for i, row in enumerate(read(path) if path.exists() else ()):
            key = str(row.get("pid") or row.get("id") or i)
            item = items[name][key] = reader(NO_PICTURES | {"query": row["question"]} | row)
            for what, said, wanted, bad in trials(item, row["answer"].replace("\f", "\\f")):
                counts[what] += 1
                failed[what] += [f"    {key} | {said!r} | {wanted!r}"] if bad else []
        for what, n in counts.items():
            print(f"{name}, {what}: {n}, {len(failed[what])} of them judged wrongly", *failed[what], sep="\n")
    agreement(recorded(options.folder, items, options.step), options.show)
    print(f"{time.time() - start:.0f} s; every {options.step}. row; failed: {dict(tgrl.grader_errors)}")


if __name__ == "__main__":
    main()

"""The toy's world: questions with pictures, a tokenizer, a student and an expert. Made once and committed.

    python .toy/make.py FOLDER

A picture shows a grid of width x height cells. The question asks for its area plus the length of its edge.
An answer first reads the two sides off the picture: perception. Then it takes three steps: transitions.

    <think>width 3, height 4. area = 3*4 = 12. edge = 2*7 = 14. total = 12+14 = 26</think>\\boxed{26}

Each step has a right rule and a wrong one: the wrong area is width + height, the wrong edge counts each side
once, the wrong total subtracts. Student and expert are the same warmed-up base model, which takes each rule
with probability 1/2. Then the expert is warmed up further on right rules, and the student on wrong ones: it
reads the picture as well as the expert does and fails after it, as in Fig. 1 (B) of the paper.
"""

import argparse
import copy
import io
import random
import re
import sys
from itertools import product
from pathlib import Path

import datasets
import tokenizers
import torch
import transformers
from PIL import Image, ImageDraw
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where tgrl.py is
import tgrl

# ----- Questions and answers ----------------------------------------------------------------------

QUESTION = "<image>What is the area of the grid plus the length of its edge?"
CELL = 7  # pixels
PICTURE = 56  # pixels

ALL_SIDES = list(product(range(1, 8), range(1, 8)))  # (width, height)
# Twelve pairs stay out of train.parquet. No other pair has their sums, so their edges are new, too.
UNSEEN_SIDES = [(w, h) for w, h in ALL_SIDES if w + h in (5, 9, 13)]
SEEN_SIDES = [sides for sides in ALL_SIDES if sides not in UNSEEN_SIDES]


def draw_grid(rng: random.Random, width: int, height: int) -> Image.Image:
    """The grid in a random dark colour, at a random place near the upper left corner."""
    image = Image.new("RGB", (PICTURE, PICTURE), "white")
    draw = ImageDraw.Draw(image)
    left = rng.randint(0, 3)
    top = rng.randint(0, 3)
    color = (rng.randint(0, 110), rng.randint(0, 110), rng.randint(0, 110))
    for column, row in product(range(width), range(height)):
        x = left + column * CELL
        y = top + row * CELL
        draw.rectangle([x + 1, y + 1, x + CELL - 1, y + CELL - 1], fill=color)
    return image


def make_row(rng: random.Random, width: int, height: int) -> dict:
    """A question in the schema of hiyouga/geometry3k."""
    answer = width * height + 2 * (width + height)
    return {"images": [draw_grid(rng, width, height)], "problem": QUESTION, "answer": str(answer)}


def write_answer(rng: random.Random, width: int, height: int, p_right: float) -> str:
    """An answer that reads both sides right, and takes each later step by its right rule with p_right."""
    half_edge = width + height

    if rng.random() < p_right:
        area = width * height
        area_step = f"{width}*{height}"
    else:
        area = width + height
        area_step = f"{width}+{height}"

    if rng.random() < p_right:
        edge = 2 * half_edge
        edge_step = f"2*{half_edge}"
    else:
        edge = half_edge
        edge_step = f"1*{half_edge}"

    if rng.random() < p_right:
        total = area + edge
        total_step = f"{area}+{edge}"
    else:
        total = area - edge
        total_step = f"{area}-{edge}"

    sides = f"width {width}, height {height}."
    steps = (
        f"area = {area_step} = {area}. edge = {edge_step} = {edge}. total = {total_step} = {total}"
    )
    return f"<think>{sides} {steps}</think>\\boxed{{{total}}}"


def save_rows(rng: random.Random, sides: list[tuple[int, int]], n: int, path: Path):
    text = datasets.Value("string")
    columns = datasets.Features(images=[datasets.Image()], problem=text, answer=text)
    rows = [make_row(rng, *rng.choice(sides)) for _ in range(n)]
    datasets.Dataset.from_list(rows, columns).to_parquet(path)


# ----- Processor and model: the real classes of Qwen2.5-VL, tiny ----------------------------------

SPECIAL_TOKENS = [  # their ids are 0 to 6
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "<|im_start|>user\n"
    "{% for part in messages[0].content %}"
    "{{ part.text or '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% endfor %}"
    "<|im_end|>\n<|im_start|>assistant{{ '\\n' }}"
)


def make_processor(instruction: str = tgrl.TOY["instruction"]) -> transformers.Qwen2_5_VLProcessor:
    """A byte-level BPE tokenizer with one token for each digit, and the image processor of Qwen2.5-VL."""
    rng = random.Random(0)
    texts = [write_answer(rng, width, height, p_right=0.5) for width, height in ALL_SIDES]
    question = QUESTION.replace("<image>", "")
    texts.append(f"user\n{question} {tgrl.LOOK} {instruction}\nassistant\n")

    words = tokenizers.Regex(r"\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+")
    bytes_of_words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split(words, "isolated"), bytes_of_words]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=bytes_of_words.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
    )
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def make_model(
    vocabulary: int, hidden: int = 128, layers: int = 3, vision_layers: int = 2, tied: bool = True
) -> transformers.Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL with random weights. It has 32 dimensions a head, and one key for two query heads."""
    text = dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = dict(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        depth=vision_layers,
        num_heads=hidden // 32,
        fullatt_block_indexes=[vision_layers - 1],
        out_hidden_size=hidden,
        initializer_range=0.06,
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=6,
        tie_word_embeddings=tied,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    return model


# ----- Warming up ---------------------------------------------------------------------------------

N_PICTURES = 2000  # to warm up on; each fourth is shown with the request to look again
P_LOOKING = 0.4  # p_right, at least, where a model is asked to look again: what IVR-R1 presupposes
WARM_UPS = {  # each starts from the base, which itself starts from random weights
    "base": dict(p_right=0.5, steps=600, lr=2e-3),
    "expert": dict(p_right=0.97, steps=100, lr=1e-3),
    "student": dict(p_right=0.01, steps=100, lr=1e-3),
}


def make_lessons(rng: random.Random, encoder: tgrl.Encoder) -> list[tuple]:
    """(width, height, is it asked to look again, prompt) for each picture."""
    lessons = []
    for number in range(N_PICTURES):
        width, height = rng.choice(ALL_SIDES)
        problem = tgrl.read_problem(make_row(rng, width, height))
        looking = number % 4 == 0
        prompt = tgrl.look_again(problem, [], encoder) if looking else encoder(problem)
        lessons.append((width, height, looking, prompt))
    return lessons


def warm_up(
    model,
    encoder: tgrl.Encoder,
    lessons: list[tuple],
    rng: random.Random,
    p_right: float,
    steps: int,
    lr: float,
):
    """Supervised training: each step takes 16 pictures with 4 answers each."""
    policy = tgrl.Policy(model.train(), encoder.unwritable)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=0.1
    )
    for _ in range(steps):
        groups = []
        for width, height, looking, prompt in rng.sample(lessons, 16):
            p = max(p_right, P_LOOKING) if looking else p_right
            answers = []
            for _ in range(4):
                ids = encoder.tokenizer(write_answer(rng, width, height, p)).input_ids
                ids.append(encoder.tokenizer.eos_token_id)
                answers.append(tgrl.Trajectory(ids, text="", reward=0.0))
            groups.append(tgrl.Group(None, prompt, answers))
        batch = tgrl.pack(groups)
        loss = -policy(batch).sum() / batch.mask.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def make_world(folder: Path):
    torch.manual_seed(0)
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    save_rows(rng, SEEN_SIDES, 192, folder / "train.parquet")
    save_rows(rng, SEEN_SIDES, 192, folder / "test.parquet")
    save_rows(rng, UNSEEN_SIDES, 192, folder / "unseen.parquet")

    processor = make_processor()
    base = make_model(vocabulary=len(processor.tokenizer))
    encoder = tgrl.Encoder(processor, base, tgrl.Options(**tgrl.TOY))
    lessons = make_lessons(rng, encoder)
    warm_up(base, encoder, lessons, rng, **WARM_UPS["base"])
    for name in ("expert", "student"):
        model = copy.deepcopy(base)
        warm_up(model, encoder, lessons, rng, **WARM_UPS[name])
        model.to(torch.bfloat16).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


# ----- How good is a model at each step of an answer? ---------------------------------------------

NUMBER = r"(-?\d+)"
ANSWER = re.compile(
    rf".*width {NUMBER}, height {NUMBER}\. area = (\S+) = {NUMBER}\. edge = (\S+) = {NUMBER}\. "
    rf"total = (\S+) = {NUMBER}</think>\\boxed{{{NUMBER}}}"
)


def right_steps(text: str, width: int, height: int) -> dict[str, bool]:
    """Which steps of an answer are right, each judged given what stands before it."""
    names = ("sides", "area", "edge", "total")
    found = ANSWER.fullmatch(text)
    if not found:
        return dict.fromkeys(names, False)
    w, h, area, edge, total, boxed = (int(found[group]) for group in (1, 2, 4, 6, 8, 9))
    sides = (w, h) == (width, height)
    area_right = (found[3], area) == (f"{w}*{h}", w * h)
    edge_right = (found[5], edge) == (f"2*{w + h}", 2 * (w + h))
    total_right = (found[7], total) == (f"{area}+{edge}", area + edge) and boxed == total
    return dict(zip(names, (sides, area_right, edge_right, total_right), strict=True))


def measure(model, encoder: tgrl.Encoder, path: Path) -> dict[str, float]:
    """Share of greedy answers in which a step is right, and of those that are right as a whole."""
    problems = tgrl.load_problems(str(path), "train", encoder)
    groups = tgrl.rollout(model, encoder, problems, n=1, temperature=0)
    sums = dict.fromkeys(("sides", "area", "edge", "total", "answer"), 0.0)
    for group in groups:
        [answer] = group.answers
        steps = right_steps(answer.text, *sides_of(group.problem.images[0]))
        for name, right in steps.items():
            sums[name] += right
        sums["answer"] += answer.reward
    return {name: value / len(groups) for name, value in sums.items()}


def sides_of(picture: bytes) -> tuple[int, int]:
    """Width and height of the grid in a picture."""
    image = Image.open(io.BytesIO(picture))
    inverted = Image.eval(image, lambda value: 255 - value)  # the white around the grid becomes 0
    left, top, right, bottom = inverted.getbbox()
    return (right - left + 1) // CELL, (bottom - top + 1) // CELL


def print_table(folder: Path):
    print("| model | questions | two sides read | area | edge | total | answer |")
    print("|---|---|---|---|---|---|---|")
    for name in ("student", "expert"):
        model, processor = tgrl.load_model(str(folder / name))
        encoder = tgrl.Encoder(processor, model, tgrl.Options(**tgrl.TOY))
        for rows in ("test", "unseen"):
            shares = measure(model, encoder, folder / f"{rows}.parquet")
            print(
                f"| {name} | {rows} | "
                + " | ".join(f"{share:.1%}" for share in shares.values())
                + " |"
            )


if __name__ == "__main__":
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("folder", type=Path, help="folder to write, such as .toy")
    options = parser.parse_args()
    make_world(options.folder)
    print_table(options.folder)

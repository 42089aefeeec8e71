"""A whole step, rollout and update, of tgrl.py beside TRL's GRPOTrainer: same model, questions, and lengths.

    pip install trl
    python .compare/trl_step.py                        4 questions with a picture, in the proportions of 3B
    python .compare/trl_step.py --layers 6 --vision_layers 6         a larger share for pictures
    python .compare/trl_step.py --questions 24 --pixels 56 --tokens 48 --hidden 128 --layers 3 \\
                                --vision_layers 2                    the size of the toy

Random weights, noise for pictures, answers that never end before --tokens, objectives without a KL term,
float32. The two take turns, in --rounds rounds of 1 step to warm up and --steps that count.
"""

import argparse
import itertools
import logging
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".toy")]

import datasets
import make
import torch
import trl
from PIL import Image
from transformers import TrainerCallback

import tgrl

QUESTION, INSTRUCTION = "What is the area?", "Think first."
SHAPE = dict(questions=4, answers=8, tokens=64, pixels=448, hidden=256, layers=10, vision_layers=1)


class Clock(TrainerCallback):
    def on_train_begin(self, *_, **__):
        self.ends = [time.perf_counter()]

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())


def make_files(shape, folder: Path) -> list[Image.Image]:
    """A model with random weights, and questions with noise for pictures."""
    torch.manual_seed(0)
    processor, side, rng = make.make_processor(INSTRUCTION), shape.pixels, random.Random(0)
    model = make.make_model(len(processor.tokenizer), shape.hidden, shape.layers, shape.vision_layers)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    pictures, rows = [], []
    for _ in range(shape.questions):
        pictures.append(Image.frombytes("RGB", (side, side), rng.randbytes(3 * side**2)))
        rows.append({"images": [pictures[-1]], "problem": tgrl.IMAGE + QUESTION, "answer": "1"})
    text = datasets.Value("string")
    columns = datasets.Features(images=[datasets.Image()], problem=text, answer=text)
    datasets.Dataset.from_list(rows, columns).to_parquet(folder / "questions.parquet")
    return pictures


def our_steps(shape, folder: Path, number: int) -> list[float]:
    """Seconds of each step, as tgrl.train records them."""
    all_pixels, n_all = shape.pixels**2, shape.questions * shape.answers
    options = dict(instruction=INSTRUCTION, min_pixels=all_pixels, max_pixels=all_pixels)
    options |= dict(model=f"{folder}/model", data=f"{folder}/questions.parquet", out=f"{folder}/ours{number}")
    options |= dict(max_answer=shape.tokens, generate_batch=n_all, micro_batch=shape.questions)
    options |= dict(questions_per_rollout=shape.questions, questions_per_update=shape.questions)
    options |= dict(algorithm="dapo", n_on=shape.answers, n_off=0, max_draws=1, lr=1e-6)
    options |= dict(steps=shape.steps + 1, every=10**6, checkpointing=False)
    tgrl.train(tgrl.Train(**options))
    records = [r for r in tgrl.read_records(Path(options["out"], "metrics.jsonl")) if "seconds" in r]
    assert {r["answer_tokens"] for r in records} == {shape.tokens}
    return [r["seconds"] for r in records[1:]]


def their_steps(shape, folder: Path, pictures: list, rng: random.Random) -> list[float]:
    model, processor = tgrl.load_model(f"{folder}/model")
    processor.image_processor.size = dict(shortest_edge=shape.pixels**2, longest_edge=shape.pixels**2)
    content = [{"type": "image"}, {"type": "text", "text": f"{QUESTION} {INSTRUCTION}"}]
    rows = [{"prompt": [{"role": "user", "content": content}], "image": picture} for picture in pictures]
    clock, lengths = Clock(), set()

    def random_rewards(completion_ids, **_):
        lengths.update(map(len, completion_ids))
        return [float(rng.random() < 0.5) for _ in completion_ids]

    options = dict(output_dir=f"{folder}/theirs", max_steps=shape.steps + 1, num_generations=shape.answers)
    options |= dict(per_device_train_batch_size=shape.questions * shape.answers, beta=0.0, loss_type="dapo")
    options |= dict(max_completion_length=shape.tokens, generation_kwargs={"min_new_tokens": shape.tokens})
    options |= dict(temperature=1.0, learning_rate=1e-6, lr_scheduler_type="constant", bf16=False)
    options |= dict(gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), report_to="none")
    options |= dict(save_strategy="no", disable_tqdm=True, logging_strategy="no")
    parts = dict(train_dataset=datasets.Dataset.from_list(rows), processing_class=processor)
    config = trl.GRPOConfig(**options)
    trl.GRPOTrainer(model, random_rewards, config, callbacks=[clock], **parts).train()
    assert lengths == {shape.tokens}
    return [end - start for start, end in itertools.pairwise(clock.ends)][1:]


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    for name, default in (SHAPE | dict(steps=4, rounds=2)).items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    shape = parser.parse_args()
    logging.disable(logging.WARNING)
    rng, ours, theirs = random.Random(0), [], []

    class Endless(tgrl.Encoder):  # no answer can end before its last token
        def __init__(self, *parts):
            super().__init__(*parts)
            self.unwritable = torch.cat([self.unwritable, torch.tensor(self.ends)])

    def random_reward(*_):
        return float(rng.random() < 0.5)

    tgrl.Encoder, tgrl.reward = Endless, random_reward
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = make_files(shape, folder)
        for number in range(shape.rounds):
            ours += our_steps(shape, folder, number)
            theirs += their_steps(shape, folder, pictures, rng)
    told = " ".join(f"{name} {getattr(shape, name)}" for name in SHAPE)
    print(f"\n{told}; {torch.get_num_threads()} threads; trl {trl.__version__}, torch {torch.__version__}")
    for name, seconds in (("tgrl.py", ours), ("TRL", theirs)):
        span = f"{min(seconds):.2f} to {max(seconds):.2f}, {len(seconds)} steps"
        print(f"{name:8} {statistics.median(seconds):6.2f} s a step   ({span})")
    print(f"ratio    {statistics.median(theirs) / statistics.median(ours):6.2f}")


if __name__ == "__main__":
    main()

"""A whole step, rollout and update, of tgrl.py beside TRL's GRPOTrainer: same model, questions, answers a question, lengths.

    pip install trl
    python .compare/trl_step.py                                                    448-pixel pictures, 4 questions
    python .compare/trl_step.py --questions 24 --pixels 56 --tokens 48 --hidden 128 --layers 3 --vision_layers 2      the toy's size

Random weights, noise for pictures, answers that never end before --tokens, plain GRPO objectives without a KL term, float32.
The two take turns, in `--rounds` rounds of 1 step to warm up and `--steps` that count.
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
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import torch
import trl
from PIL import Image
from transformers import TrainerCallback

import tgrl

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
shape = dict(questions=4, answers=8, tokens=64, pixels=448, hidden=256, layers=6, vision_layers=6, steps=4, rounds=2)
for name, default in shape.items():
    parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
arg = parser.parse_args()
logging.disable(logging.WARNING)
datasets.disable_progress_bars()

folder = Path(tempfile.mkdtemp())
processor = tgrl.toy_processor("Think first.")
torch.manual_seed(0)
tgrl.tiny_model(processor.tokenizer, arg.hidden, arg.layers, arg.vision_layers).save_pretrained(folder / "model")
processor.save_pretrained(folder / "model")
rng = random.Random(0)
pictures = [Image.frombytes("RGB", (arg.pixels, arg.pixels), rng.randbytes(3 * arg.pixels**2)) for _ in range(arg.questions)]
question, side = "What is the area?", arg.pixels**2

# ours
rows = [{"images": [picture], "problem": "<image>" + question, "answer": str(i)} for i, picture in enumerate(pictures)]
columns = datasets.Features(images=[datasets.Image()], problem=datasets.Value("string"), answer=datasets.Value("string"))
datasets.Dataset.from_list(rows, columns).to_parquet(folder / "questions.parquet")
options = tgrl.TOY | dict(
    model=f"{folder}/model", data=f"{folder}/questions.parquet", out=f"{folder}/ours", algorithm="dapo", n_on=arg.answers, n_off=0, dynamic_sampling=False,
    questions_per_rollout=arg.questions, questions_per_update=arg.questions, micro_batch=arg.questions, generate_batch=arg.questions * arg.answers,
    min_pixels=side, max_pixels=side, max_answer=arg.tokens, lr=1e-6, weight_decay=0.0, tracker="none", show_every=10**9,
)  # fmt: skip
ours = tgrl.Trainer(tgrl.Config(**options))
ours.encoder.unwritable = torch.cat([ours.encoder.unwritable, torch.tensor(ours.encoder.ends)])
tgrl.reward = lambda text, answer: float(rng.random() < 0.5)


def our_steps() -> list[float]:
    seconds = []
    for _ in range(arg.steps + 1):
        start = time.perf_counter()
        ours.learn(1, tally := tgrl.Tally())
        seconds.append(time.perf_counter() - start)
    assert tally["answer_tokens"][0] / tally["answer_tokens"][1] == arg.tokens
    return seconds[1:]


# TRL's
lengths = []


def random_rewards(completion_ids, **_):
    lengths.extend(map(len, completion_ids))
    return [float(rng.random() < 0.5) for _ in completion_ids]


class Clock(TrainerCallback):
    def on_train_begin(self, *_, **__):
        self.ends = [time.perf_counter()]

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())


def their_steps() -> list[float]:
    model, processor = tgrl.load_model(f"{folder}/model")
    processor.image_processor.size = {"shortest_edge": side, "longest_edge": side}
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question + " Think first."}]}]
    data = datasets.Dataset.from_list([{"prompt": prompt, "image": picture} for picture in pictures])
    config = trl.GRPOConfig(
        output_dir=f"{folder}/theirs", max_steps=arg.steps + 1, per_device_train_batch_size=arg.questions * arg.answers, num_generations=arg.answers,
        max_completion_length=arg.tokens, generation_kwargs={"min_new_tokens": arg.tokens}, beta=0.0, loss_type="dapo", temperature=1.0, learning_rate=1e-6,
        lr_scheduler_type="constant", gradient_checkpointing=False, bf16=False, use_cpu=not torch.cuda.is_available(), report_to="none", save_strategy="no",
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = trl.GRPOTrainer(model, random_rewards, config, train_dataset=data, processing_class=processor, callbacks=[clock := Clock()])
    trainer.train()
    seconds = [end - start for start, end in itertools.pairwise(clock.ends)]
    assert len(seconds) == arg.steps + 1 and set(lengths) == {arg.tokens}, (len(seconds), set(lengths))
    return seconds[1:]


one, other = [], []
for _ in range(arg.rounds):
    one += our_steps()
    other += their_steps()
prompt = len(ours.encoder(ours.problems[0]).ids)
print(f"{sum(p.numel() for p in ours.policy.parameters()) / 1e6:.1f} M parameters, {torch.get_num_threads()} threads; {arg.questions} questions of {prompt} tokens, "
      f"{arg.answers} answers of {arg.tokens} to each; trl {trl.__version__}, torch {torch.__version__}")  # fmt: skip
for name, seconds in (("tgrl.py", one), ("TRL", other)):
    print(f"{name:8} {statistics.median(seconds):6.2f} s a step   ({min(seconds):.2f} to {max(seconds):.2f}, {len(seconds)} steps)")
print(f"ratio    {statistics.median(other) / statistics.median(one):6.2f}")

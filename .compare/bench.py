"""What a step of tgrl.py costs here: rollout, scoring, update; and the update with groups laid out otherwise.

    python .compare/bench.py                                      a small model, on a CPU or one GPU
    python .compare/bench.py --model 3B --tokens 512              the shape of the 3B model; no download
    torchrun --nproc-per-node 8 .compare/bench.py --model 7B      on several GPUs

Random weights, noise for a picture, answers of random tokens that never end early. The jobs take turns.
FLOPs: 2 for each weight and token forward, 6 with the backward pass; no attention, no recomputation.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".toy")]

import make
import torch
import transformers
from accelerate.utils import send_to_device
from PIL import Image

import tgrl

TINY = {"toy": (128, 3, 2), "small": (256, 10, 1)}  # hidden size, layers, of vision; small: as in 3B
# hidden size, layers, intermediate size, vocabulary, heads, heads of keys: of the published models
REAL = {"3B": (2048, 36, 11008, 151936, 16, 2), "7B": (3584, 28, 18944, 152064, 28, 4)}
TEXT = "hidden_size num_hidden_layers intermediate_size vocab_size num_attention_heads num_key_value_heads"
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}  # bfloat16


def build(name: str, dtype: torch.dtype):
    """In place of tgrl.load_model: random weights."""
    processor = make.make_processor()
    if name in TINY:
        return make.make_model(len(processor.tokenizer), *TINY[name]).to(dtype), processor
    text = dict(zip(TEXT.split(), REAL[name], strict=True))
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
    vision = dict(hidden_size=1280, out_hidden_size=REAL[name][0])  # the rest: transformers' defaults
    how = dict(vision_start_token_id=3, vision_end_token_id=4, image_token_id=5, video_token_id=6)
    how |= dict(text_config=text, vision_config=vision, tie_word_embeddings=name == "3B")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = transformers.Qwen2_5_VLConfig(**how)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config = transformers.GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    return model, processor


def start(options, folder: str) -> SimpleNamespace:
    """What tgrl.train sets up."""
    everywhere, side = options.questions * int(os.environ.get("WORLD_SIZE", 1)), options.pixels
    picture = Image.frombytes("RGB", (side, side), random.Random(0).randbytes(3 * side * side))
    picture.save(f"{folder}/picture.png")
    row = {"image": "picture.png", "problem": "What is the area?", "answer": "1"}
    Path(folder, "questions.jsonl").write_text(json.dumps(row))
    how = dict(model=options.model, data=f"{folder}/questions.jsonl", out=f"{folder}/run", n_off=0)
    how |= dict(instruction="Think first.", min_pixels=28 * 28, max_pixels=side**2, max_prompt=10**6)
    how |= dict(max_answer=options.tokens, checkpointing=options.model in REAL)
    how |= dict(questions_per_rollout=everywhere, questions_per_update=everywhere)
    tgrl.load_model = build
    settings = tgrl.Train(**how)
    accelerator, dtype = tgrl.start_processes()
    actor, processor = tgrl.load_model(options.model, dtype)
    actor.to(accelerator.device)
    encoder = tgrl.Encoder(processor, actor, settings)
    problems = tgrl.load_problems(settings.data, "train", encoder)
    # No answer ends early; and the many ids that the toy's tokenizer lacks are not left out of the softmax.
    encoder.unwritable = torch.tensor([5, 6, *encoder.ends])
    policy = tgrl.make_policy(actor, encoder.unwritable)
    if settings.checkpointing:
        policy.model.activation_checkpointing_enable()
    fused = accelerator.device.type == "cuda"
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=0.01, fused=fused)
    return SimpleNamespace(
        actor=actor,
        encoder=encoder,
        problems=problems,
        policy=policy,
        optimizer=optimizer,
        world=accelerator.num_processes,
    )


def update(run: SimpleNamespace, groups: list, size: int, cost_ratio: float):
    """As in tgrl.train, without experts."""
    clip, n_tokens = dict(clip_low=0.2, clip_high=0.28), sum(len(t.ids) for t in tgrl.answers_of(groups))
    for part in tgrl.batches(groups, size):
        batch = send_to_device(tgrl.pack(part, cost_ratio), run.actor.device)
        logp = run.policy.train()(batch)
        what = batch.mask, batch.advantages, batch.is_expert, batch.expert_ok
        shares = tgrl.token_shares(batch.mask, "dapo", n_tokens=n_tokens)
        tgrl.tgrl_loss(logp, logp.detach(), *what, shares, sharpness=None, **clip)[0].backward()
    torch.nn.utils.clip_grad_norm_(run.policy.parameters(), 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()


def measure(job) -> tuple[float, float]:
    """-> seconds, GiB at the peak."""
    cuda, begun = torch.cuda.is_available(), time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    job()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def bench(run: SimpleNamespace, questions: int, n: int, tokens: int, size: int, repeats: int):
    """n answers to each question; size: questions of a forward pass."""
    rng, prompt, net = random.Random(0), run.encoder(run.problems[0]), run.policy.model
    together, apart = [], []
    for _ in range(questions):
        ids = [[rng.randrange(10, 300) for _ in range(tokens)] for _ in range(n)]
        answers = [tgrl.Trajectory(some, "", 0.0, advantage=rng.gauss(0, 1)) for some in ids]
        together.append(tgrl.Group(run.problems[0], prompt, answers))
        apart += [tgrl.Group(run.problems[0], prompt, [t]) for t in answers]

    def flops(passes: int, prompts: int) -> int:  # prompts: how often a question is read
        parts = net.model.language_model.layers, net.model.visual.blocks, net.lm_head
        layers, vision, head = (sum(p.numel() for p in part.parameters()) for part in parts)
        read = layers * len(prompt.ids) + vision * len(prompt.pixels)
        return passes * (read * prompts + (layers + head) * questions * n * tokens)

    jobs = {
        "rollout": (lambda: tgrl.sample(run.actor, run.encoder, [prompt] * questions, n), 2, questions),
        "scoring": (lambda: list(tgrl.score(run.policy, together, size)), 2, questions),
        "update": (lambda: update(run, together, size, run.policy.cost_ratio), 6, questions),
        "in one row": (lambda: update(run, together, size, math.inf), 6, questions),
        "separate rows": (lambda: update(run, apart, size * n, math.inf), 6, questions * n),
    }
    measured = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, (job, *_) in jobs.items():
            measured[name].append(measure(job))
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    tgrl.say(f"on {run.world} x {kind}, {torch.get_num_threads()} threads; medians of {repeats}; on each")
    tgrl.say(f"{questions} questions of {len(prompt.ids)} tokens, {n} answers of {tokens} to each")
    tgrl.say("                  seconds  answer tokens/s   TFLOP/s   of peak   peak GiB")
    for name, (_, *work) in jobs.items():
        seconds = statistics.median(s for s, _ in measured[name][1:])  # the first warms up
        rate, held = flops(*work) / seconds, max(gib for _, gib in measured[name])
        share, held = f"{rate / PEAK[kind]:.1%}" if kind in PEAK else "–", f"{held:.1f}" if held else "–"
        speed = questions * n * tokens / seconds
        tgrl.say(f"{name:15} {seconds:9.3f}  {speed:15.0f}  {rate / 1e12:8.3g} {share:>9} {held:>10}")


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--model", default="small", choices=[*TINY, *REAL], help="shape (default small)")
    shape = dict(questions=4, answers=8, tokens=64, pixels=448, micro_batch=4, repeats=5)
    for name, default in shape.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = start(o, folder)
        tgrl.say(f"\n{o.model}: {sum(p.numel() for p in run.policy.parameters()) / 1e9:.4g} B parameters")
        bench(run, o.questions, o.answers, o.tokens, o.micro_batch, o.repeats)


if __name__ == "__main__":
    main()

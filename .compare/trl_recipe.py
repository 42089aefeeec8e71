"""TGRL in TRL: a GRPOTrainer that puts cached experts into groups and calls tgrl_loss; on the toy.

pip install trl
python tgrl.py                                          makes the toy's cache of experts
python .compare/trl_recipe.py runs/toy --steps 12       trains its student by TRL; measures before and after
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# --- the recipe ---
import torch
import trl

from tgrl import tgrl_loss, token_shares  # or section 1 of tgrl.py, pasted


class TGRLTrainer(trl.GRPOTrainer):
    """The last of each group's answers is an expert's: experts[id] lists (token ids, log-probs under it)."""

    def __init__(self, *args, experts, sharpness, **options):
        super().__init__(*args, **options)
        self.experts, self.sharpness, self.drawn = experts, sharpness, 0

    def _generate_and_score_completions(self, inputs):
        self.questions = [row["id"] for row in inputs]  # column "id" of the data set
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, prompt_ids, images, fields, num_generations, **more):
        answers, _ = super()._generate_single_turn(prompt_ids, images, fields, num_generations, **more)
        logps = [[float("nan")] * len(ids) for ids in answers]  # not a number: the policy's own
        for row in range(num_generations - 1, len(answers), num_generations):
            if some := self.experts.get(self.questions[row]):
                answers[row], logps[row] = some[self.drawn % len(some)]
        self.drawn += 1
        return answers, logps  # TRL pads the second and hands it on as sampling_per_token_logps

    def _compute_loss(self, model, inputs):
        mask, advantages = inputs["completion_mask"].bool(), inputs["advantages"]  # [N, T], [N]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        vision = {name: inputs[name] for name in names if name in inputs}
        logp = self._get_per_token_logps_and_entropies(model, ids, attention, mask.shape[1], **vision)[0]
        written = inputs["sampling_per_token_logps"]  # [N, T]
        is_expert = ~written[:, 0].isnan()  # [N]
        old = inputs.get("old_per_token_logps")
        behavior_logp = torch.where(is_expert[:, None], written, logp.detach() if old is None else old)
        accumulation = self.current_gradient_accumulation_steps
        if self.loss_type == "dapo":
            tokens = inputs["num_items_in_batch"] / self.accelerator.num_processes
            n_tokens = tokens * accumulation / self.args.steps_per_generation
            shares = token_shares(mask, "dapo", n_tokens=n_tokens)
        else:
            shares = token_shares(mask, "grpo", n_trajectories=len(mask) * accumulation)
        loss, metrics = tgrl_loss(
            logp,
            behavior_logp,
            mask,
            advantages,
            is_expert,
            advantages > 0,  # with rewards of 0 and 1, a right expert has a positive advantage
            shares,
            sharpness=self.sharpness,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
        )
        for name, (value, count) in metrics.items():
            self._metrics["train"][f"tgrl/{name}"].append(float(value / count.clamp(min=1e-9)))
        return loss


# --- the recipe ends here ---

import datasets
from transformers import PrinterCallback

import tgrl


def trl_config(options, toy) -> trl.GRPOConfig:
    how = dict(output_dir=tempfile.mkdtemp(), max_steps=options.steps, report_to="none", save_strategy="no")
    how |= dict(per_device_train_batch_size=192, num_generations=8, max_completion_length=toy.max_answer)
    how |= dict(loss_type=options.loss_type, beta=0.0, epsilon=0.2, temperature=1.0, learning_rate=1e-4)
    how |= dict(epsilon_high=0.28 if options.loss_type == "dapo" else 0.2, weight_decay=0.01)
    how |= dict(lr_scheduler_type="constant", gradient_checkpointing=False, bf16=False, disable_tqdm=True)
    return trl.GRPOConfig(**how, use_cpu=not torch.cuda.is_available(), logging_steps=1)


def rows_of(problems: list, instruction: str):
    rows = []
    for p in problems:
        text = p.question.replace("<image>", "") + " " + instruction
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        picture = datasets.Image().decode_example({"bytes": p.images[0], "path": None})
        rows.append({"prompt": prompt, "image": picture, "id": p.id, "answer": p.answer})
    return datasets.Dataset.from_list(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("toy", type=Path, help="folder that `python tgrl.py` wrote")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="default 12")
    parser.add_argument("--loss_type", default="dapo", choices=["dapo", "grpo"], help="default dapo")
    parser.add_argument("--plain", action="store_true", help="without experts: TRL as it is, for comparison")
    options = parser.parse_args()
    world, toy = tgrl.TOY_WORLD, tgrl.Options(**tgrl.TOY)
    model, processor = tgrl.load_model(f"{world}/student")
    encoder = tgrl.Encoder(processor, model, toy)
    processor.image_processor.size = {"shortest_edge": toy.min_pixels, "longest_edge": toy.max_pixels}
    questions = tgrl.load_problems(f"{world}/train.parquet", "train", encoder)
    held_out = tgrl.load_problems(f"{world}/test.parquet", "train", encoder)

    def right(completion_ids, answer, **_):
        texts = [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids]
        return [tgrl.reward(text, wanted) for text, wanted in zip(texts, answer, strict=True)]

    def accuracy():
        answers = tgrl.answers_of(tgrl.rollout(model, encoder, held_out, 1, temperature=0))
        return sum(t.reward for t in answers) / len(answers)

    torch.manual_seed(1)
    parts = dict(train_dataset=rows_of(questions, toy.instruction), processing_class=processor)
    config = trl_config(options, toy)
    config.generation_kwargs = {"suppress_tokens": encoder.unwritable.tolist()}
    if options.plain:
        trainer = trl.GRPOTrainer(model, right, config, **parts)
    else:
        cache = tgrl.read_cache(options.toy / "experts.jsonl", questions)
        experts = {q: [(t.ids, t.behavior_logp) for t in answers] for q, answers in cache.items()}
        parts |= dict(experts=experts, sharpness=14.0 if options.loss_type == "dapo" else 5.0)
        trainer = TGRLTrainer(model, right, config, **parts)
    trainer.remove_callback(PrinterCallback)
    before = accuracy()
    trainer.train()
    for log in trainer.state.log_history[:-1]:
        names = ("reward", "grad_norm", "tgrl/expert_coefficient", "tgrl/expert_delta")
        told = "".join(f"  {name} {log[name]:.3f}" for name in names if name in log)
        print(f"step {log['step']:3}{told}")
    print(f"held-out greedy accuracy {before:.1%} before, {accuracy():.1%} after {options.steps} steps")


if __name__ == "__main__":
    main()

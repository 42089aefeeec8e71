"""TGRL in TRL: a GRPOTrainer that puts cached experts into the groups and calls tgrl_loss; trained on the toy.

    pip install trl
    python tgrl.py                                          makes the toy's world and its cache of experts
    python .compare/trl_recipe.py runs/toy --steps 12       trains its student by TRL, and measures before and after
"""

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# --- the recipe ---
import torch
import trl

from tgrl import tgrl_loss, token_shares  # or section 3 of tgrl.py, pasted


class TGRLTrainer(trl.GRPOTrainer):
    """The last answer of each group is an expert's: experts[id] is a list of (token ids, log-probs under their author)."""

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
        logp = self._get_per_token_logps_and_entropies(model, ids, attention, mask.shape[1], **{n: inputs[n] for n in names if n in inputs})[0]
        written = inputs["sampling_per_token_logps"]
        is_expert = ~written[:, 0].isnan()  # [N]
        old = inputs.get("old_per_token_logps")
        behavior_logp = torch.where(is_expert[:, None], written, logp.detach() if old is None else old)
        accumulation, tokens = self.current_gradient_accumulation_steps, inputs["num_items_in_batch"] / self.accelerator.num_processes
        if self.loss_type == "dapo":
            shares = token_shares(mask, "dapo", n_tokens=tokens * accumulation / self.args.steps_per_generation)
        else:
            shares = token_shares(mask, "grpo", n_trajectories=len(mask) * accumulation)
        loss, metrics = tgrl_loss(logp, behavior_logp, mask, advantages, is_expert, advantages > 0, shares,  # with 0 / 1 rewards, a right expert has A > 0
                                  sharpness=self.sharpness, clip_low=self.epsilon_low, clip_high=self.epsilon_high)  # fmt: skip
        for name, (value, count) in metrics.items():
            self._metrics["train"][f"tgrl/{name}"].append(float(value / count.clamp(min=1e-9)))
        return loss
# --- the recipe ends here ---


def main():
    import datasets
    from transformers import PrinterCallback

    import tgrl

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toy", type=Path, help="folder that `python tgrl.py` wrote")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="default 12")
    parser.add_argument("--loss_type", default="dapo", choices=["dapo", "grpo"])
    parser.add_argument("--plain", action="store_true", help="without experts: TRL as it is, for comparison")
    arg = parser.parse_args()
    world = arg.toy / "world"
    cfg = tgrl.Config(**tgrl.TOY | dict(model=f"{world}/student", data=f"{world}/train.parquet", seed=1))
    model, processor = tgrl.load_model(cfg.model)
    encoder = tgrl.Encoder(processor, model, cfg)
    processor.image_processor.size = {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels}
    questions, held_out = encoder.load(cfg.data, "train"), encoder.load(f"{world}/test.parquet", "train")
    _, cache = tgrl.read_cache(arg.toy / "experts.jsonl", {}, encoder)
    experts = {question: [(t.ids, t.behavior_logp.tolist()) for t in some] for question, some in cache.items()}

    def row(problem):
        text = problem.question.replace(tgrl.PLACEHOLDER, "")
        content = [{"type": "image"}, {"type": "text", "text": text}, {"type": "text", "text": " " + cfg.instruction}]
        return {"prompt": [{"role": "user", "content": content}], "image": tgrl.open_picture(problem.images[0]), "id": problem.id, "answer": problem.answer}

    def right(completion_ids, answer, **_):
        return [tgrl.reward(processor.tokenizer.decode(ids, skip_special_tokens=True), a) for ids, a in zip(completion_ids, answer)]

    def accuracy():
        answers = tgrl.sample(model, encoder, [encoder(p) for p in held_out], 1, temperature=0)
        return sum(tgrl.grade(ids, p, encoder).reward for p, (ids,) in zip(held_out, answers)) / len(held_out)

    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=arg.steps, per_device_train_batch_size=192, num_generations=8, max_completion_length=cfg.max_answer, beta=0.0,
        loss_type=arg.loss_type, epsilon=0.2, epsilon_high=0.28 if arg.loss_type == "dapo" else 0.2, temperature=1.0, learning_rate=cfg.lr, weight_decay=cfg.weight_decay,
        lr_scheduler_type="constant", gradient_checkpointing=False, bf16=False, use_cpu=not torch.cuda.is_available(), report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True, generation_kwargs={"suppress_tokens": encoder.unwritable.tolist()},
    )  # fmt: skip
    torch.manual_seed(1)
    shared = dict(train_dataset=datasets.Dataset.from_list([row(p) for p in questions]), processing_class=processor)
    if arg.plain:
        trainer = trl.GRPOTrainer(model, right, config, **shared)
    else:
        trainer = TGRLTrainer(model, right, config, experts=experts, sharpness=14.0 if arg.loss_type == "dapo" else 5.0, **shared)
    trainer.remove_callback(PrinterCallback)  # the lines below say it shorter
    before = accuracy()
    trainer.train()
    for log in trainer.state.log_history[:-1]:
        told = "".join(f"  {name} {log[f'tgrl/{name}']:.3f}" for name in ("expert_coefficient", "expert_delta") if f"tgrl/{name}" in log)
        print(f"step {log['step']:3}  reward {log['reward']:.3f}  grad_norm {log['grad_norm']:.2f}{told}")
    print(f"held-out greedy accuracy {before:.1%} before, {accuracy():.1%} after {arg.steps} steps")


if __name__ == "__main__":
    main()

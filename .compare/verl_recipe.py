"""TGRL in veRL: its registry of policy losses takes a function, and this one calls tgrl_loss.

pip install --no-deps verl && pip install tensordict omegaconf hydra-core codetiming ray orjson
python .compare/verl_recipe.py         a batch in veRL's layout through its own ppo_loss, beside tgrl_loss
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# --- the recipe: import it where veRL's actors start, and set actor.policy_loss.loss_mode=tgrl ---
from verl.trainer.ppo.core_algos import register_policy_loss

from tgrl import tgrl_loss, token_shares  # or section 1 of tgrl.py, pasted


@register_policy_loss("tgrl")
def tgrl_policy_loss(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    """An expert's rows bring its log-probs in old_log_probs, and zeros, not ones, in rollout_is_weights."""
    info, mask = config.global_batch_info, response_mask.bool()
    devices = info.get("dp_size", 1)  # gradients are averaged over them
    if loss_agg_mode == "token-mean":  # Eq. 25
        shares = token_shares(mask, "dapo", n_tokens=(info.get("batch_num_tokens") or mask.sum()) / devices)
    elif loss_agg_mode == "seq-mean-token-mean":  # Eq. 24
        rows = info.get("global_batch_size") or len(mask)
        shares = token_shares(mask, "grpo", n_trajectories=rows / devices)
    else:
        raise ValueError(f"loss_agg_mode {loss_agg_mode} is neither Eq. 24's nor Eq. 25's")
    advantage = (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)  # [N] veRL repeats it for each token
    own = mask if rollout_is_weights is None else mask & rollout_is_weights.bool()
    loss, metrics = tgrl_loss(
        log_prob,
        old_log_prob,
        mask,
        advantage,
        ~own.any(1),  # is_expert
        advantage > 0,  # with rewards of 0 and 1, a right expert has a positive advantage
        shares,
        sharpness=14.0,
        clip_low=config.clip_ratio_low,
        clip_high=config.clip_ratio_high,
    )
    return loss, {f"actor/{name}": float(value / count) for name, (value, count) in metrics.items() if count}


# --- the recipe ends here ---

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from tgrl import group_advantages, pad

PROMPT, WIDTH, SIZE = 5, 12, 8  # tokens of a prompt, of the longest answer; answers of a group


def main():
    torch.manual_seed(0)
    n = 2 * SIZE  # two groups of 7 answers of the policy and 1 of the expert
    lengths = torch.randint(1, WIDTH + 1, (n,))
    mask = torch.arange(WIDTH) < lengths[:, None]  # [N, T]
    rewards = torch.randint(0, 2, (2, SIZE)).float()
    rewards[:, -1] = torch.tensor([1.0, 0.0])  # one expert is right
    is_expert = (torch.arange(n) % SIZE) == SIZE - 1
    advantages = group_advantages(rewards).flatten()
    full = torch.cat([torch.ones(n, PROMPT, dtype=torch.long), mask.long()], 1)
    # what the model's forward leaves: log-probs of whole rows without padding, one after the other
    output = (-3 * torch.rand(int(lengths.sum()) + n * PROMPT)).requires_grad_()
    pieces = output.split((lengths + PROMPT).tolist())
    logp = pad(
        [piece[PROMPT - 1 : -1] for piece in pieces]
    )  # [N, T] each token is predicted one place before
    logp = torch.nn.functional.pad(logp, (0, WIDTH - logp.shape[1]))
    noise = logp.detach() + 0.1 * torch.randn(n, WIDTH)
    behavior = torch.where(is_expert[:, None], -0.5 * torch.rand(n, WIDTH), noise) * mask
    for mode, algorithm in (("token-mean", "dapo"), ("seq-mean-token-mean", "grpo")):
        tensors = dict(prompts=full[:, :PROMPT], responses=mask.long(), attention_mask=full)
        tensors |= dict(response_mask=mask.long(), old_log_probs=behavior)
        tensors |= dict(advantages=advantages[:, None] * mask)
        tensors |= dict(rollout_is_weights=(~is_expert)[:, None] * torch.ones(n, WIDTH))
        batch = TensorDict(tensors, batch_size=n)
        totals = dict(dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=n)
        tensordict_utils.assign_non_tensor(batch, **totals)
        clip = dict(clip_ratio_low=0.2, clip_ratio_high=0.28)
        sizes = dict(rollout_n=SIZE, ppo_micro_batch_size_per_gpu=n, ppo_mini_batch_size=2)
        losses = dict(loss_agg_mode=mode, policy_loss=PolicyLossConfig(loss_mode="tgrl"))
        config = FSDPActorConfig(strategy="fsdp", **sizes, **clip, **losses)
        loss, metrics = ppo_loss(config, {"log_probs": output}, batch)
        ours = logp, behavior, mask, advantages, is_expert, rewards.flatten() == 1
        shares = token_shares(mask, algorithm)
        wanted, _ = tgrl_loss(*ours, shares, sharpness=14.0, clip_low=0.2, clip_high=0.28)
        theirs, expected = (torch.autograd.grad(x, output, retain_graph=True)[0] for x in (loss, wanted))
        print(f"{mode:20} loss {loss.item():+.6f}, ours {wanted.item():+.6f}; ", end="")
        print(f"largest difference of gradients {(theirs - expected).abs().max():.1g}; ", end="")
        print(f"expert coefficient {metrics['actor/expert_coefficient'].aggregate():.3f}")
        assert torch.allclose(loss, wanted, atol=1e-6) and torch.allclose(theirs, expected, atol=1e-7)
        assert expected.abs().sum() > 0


if __name__ == "__main__":
    main()
